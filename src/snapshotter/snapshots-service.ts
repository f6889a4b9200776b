// containerd's snapshots service in terms of the Snapshotter: messages in, messages out, and the one place where an
// error becomes a gRPC status for containerd. Called by grpc-server.ts; keeps no state.
import {
  Metadata,
  type ServerUnaryCall,
  type ServerWritableStream,
  type sendUnaryData,
  type UntypedServiceImplementation,
} from '@grpc/grpc-js';
import type { Logger } from 'pino';
import { DedupError, ERROR_CODES, GrpcStatus } from '../errors.ts';
import { NOT_RELEASED_METADATA } from '../protocol-version.ts';
import type { Mount } from './mounts.ts';
import type { SnapshotKind, SnapshotRecord } from './snapshot-record.ts';
import type { Snapshotter } from './snapshotter.ts';

/** enum Kind of proto/snapshots.proto. */
const KINDS: Readonly<Record<SnapshotKind, number>> = Object.freeze({ view: 1, active: 2, committed: 3 });

type StringMap = Record<string, string>;
interface KeyRequest {
  key: string;
}
interface PrepareRequest extends KeyRequest {
  parent: string;
  labels: StringMap;
}
interface CommitRequest extends PrepareRequest {
  name: string;
}
interface UpdateRequest {
  info: { name: string; labels: StringMap } | null;
  update_mask: { paths: string[] } | null;
}
interface ListRequest {
  filters: string[];
}
interface MountsMessage {
  mounts: Mount[];
}

function timestamp(milliseconds: number): { seconds: number; nanos: number } {
  const seconds = Math.floor(milliseconds / 1000);
  return { seconds, nanos: Math.floor((milliseconds - seconds * 1000) * 1000) * 1000 };
}

function infoMessage(snapshot: SnapshotRecord): object {
  return {
    name: snapshot.name,
    parent: snapshot.parent,
    kind: KINDS[snapshot.kind],
    created_at: timestamp(snapshot.createdMs),
    updated_at: timestamp(snapshot.updatedMs),
    labels: snapshot.labels,
  };
}

/** What a client is told of an error: the status of its code; the message, and what to do about it. */
export function serviceError(error: unknown): { code: number; details: string; metadata: Metadata } {
  const metadata = new Metadata();
  if (!(error instanceof DedupError)) {
    const details = `internal error: ${error instanceof Error ? error.message : String(error)}`;
    return { code: GrpcStatus.internal, details, metadata };
  }
  const details = error.hint === undefined ? error.message : `${error.message} (${error.hint})`;
  return { code: ERROR_CODES[error.code].grpc, details, metadata };
}

/** Codes that are part of an ordinary conversation with containerd. */
const QUIET = new Set(['ALREADY_EXISTS', 'NOT_FOUND', 'INVALID_ARGUMENT', 'FAILED_PRECONDITION']);

/** The handlers of containerd.services.snapshots.v1.Snapshots. */
export function snapshotsService(snapshotter: Snapshotter, log: Logger): UntypedServiceImplementation {
  const failed = (method: string, error: unknown): ReturnType<typeof serviceError> => {
    const quiet = error instanceof DedupError && QUIET.has(error.code);
    log[quiet ? 'debug' : 'error']({ method, err: error }, 'snapshots call failed');
    return serviceError(error);
  };

  /** `told`: what `handle` finds worth telling beside the answer, by metadata. */
  function unary<Request, Response>(
    method: string,
    handle: (request: Request, signal: AbortSignal, told: Metadata) => Promise<Response>,
  ) {
    return (call: ServerUnaryCall<Request, Response>, answer: sendUnaryData<Response>): void => {
      const startedMs = performance.now();
      const abort = new AbortController();
      call.once('cancelled', () => abort.abort());
      const told = new Metadata();
      handle(call.request, abort.signal, told).then(
        (response) => {
          log.debug({ method, request: call.request, tookMs: performance.now() - startedMs }, 'snapshots call');
          answer(null, response, told);
        },
        (error: unknown) => answer(failed(method, error)),
      );
    };
  }

  async function list(call: ServerWritableStream<ListRequest, object>): Promise<void> {
    try {
      for await (const block of snapshotter.list(call.request.filters)) {
        if (call.cancelled) return;
        if (!call.write({ info: block.map(infoMessage) })) await drained(call);
      }
      call.end();
    } catch (error) {
      call.emit('error', failed('List', error));
    }
  }

  return {
    Prepare: unary<PrepareRequest, MountsMessage>('Prepare', async ({ key, parent, labels }, signal) => ({
      mounts: await snapshotter.prepare(key, parent, labels, signal),
    })),
    View: unary<PrepareRequest, MountsMessage>('View', async ({ key, parent, labels }, signal) => ({
      mounts: await snapshotter.view(key, parent, labels, signal),
    })),
    Mounts: unary<KeyRequest, MountsMessage>('Mounts', async ({ key }) => ({ mounts: await snapshotter.mounts(key) })),
    Commit: unary<CommitRequest, object>('Commit', async ({ name, key, labels, parent }) => {
      await snapshotter.commit(name, key, labels, parent);
      return {};
    }),
    Remove: unary<KeyRequest, object>('Remove', async ({ key }) => {
      await snapshotter.remove(key);
      return {};
    }),
    Stat: unary<KeyRequest, object>('Stat', async ({ key }) => ({ info: infoMessage(await snapshotter.stat(key)) })),
    Update: unary<UpdateRequest, object>('Update', async ({ info, update_mask }) => {
      if (info === null) throw new DedupError('INVALID_ARGUMENT', 'an update names no snapshot');
      const updated = await snapshotter.update(info.name, info.labels, update_mask?.paths ?? []);
      return { info: infoMessage(updated) };
    }),
    List: (call: ServerWritableStream<ListRequest, object>): void => {
      // list() catches everything and answers it.
      void list(call);
    },
    Usage: unary<KeyRequest, object>('Usage', async ({ key }) => {
      const { bytes, inodes } = await snapshotter.usage(key);
      return { size: bytes, inodes };
    }),
    Cleanup: unary<object, object>('Cleanup', async (_request, _signal, told) => {
      const notReleased = await snapshotter.cleanup();
      // containerd could do nothing about it; `gc` says it.
      if (notReleased !== undefined) told.set(NOT_RELEASED_METADATA, Buffer.from(notReleased));
      return {};
    }),
  };
}

function drained(call: ServerWritableStream<ListRequest, object>): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      call.off('drain', done);
      call.off('cancelled', done);
      resolve();
    };
    call.on('drain', done);
    call.on('cancelled', done);
  });
}
