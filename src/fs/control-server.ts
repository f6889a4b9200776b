// dedupd's gRPC service (proto/dedupd.proto) on a unix socket: unpacks requests, calls the data plane, maps errors to
// statuses. Knows nothing of how images are served.
import { rm } from 'node:fs/promises';
import {
  Metadata,
  Server,
  type ServerDuplexStream,
  type ServerUnaryCall,
  type ServerWritableStream,
  type ServiceClientConstructor,
  type ServiceError,
  type sendUnaryData,
} from '@grpc/grpc-js';
import { DedupError, GrpcStatus } from '../errors.ts';
import type { Logger } from '../log.ts';
import { loadProto, serveOn } from '../protocol.ts';
import { DEDUPD_PROTOCOL, HINT_METADATA } from '../protocol-version.ts';
import { MiB } from '../units.ts';
import { isNoSpareRoom } from './spare-room.ts';

export interface LayerKeyMessage {
  readonly digest: string;
  readonly index: string;
  readonly scope: string;
}

export interface SourceMessage {
  readonly host: string;
  readonly repository: string;
}

export interface PrepareLayerMessage {
  readonly layer: LayerKeyMessage;
  readonly sources: readonly SourceMessage[];
  readonly manifest: string;
  readonly siblings: readonly LayerKeyMessage[];
  readonly budget_ms: number;
  readonly size: number;
}

export interface ImageInfoMessage {
  readonly mount_id: number;
  readonly path: string;
  readonly layers: readonly string[];
  readonly total_bytes: number;
  readonly present_bytes: number;
  readonly transport: string;
  readonly reference: string;
}

export interface StatsMessage {
  readonly chunks: number;
  readonly chunk_bytes: number;
  readonly present_bytes: number;
  readonly requests: number;
  readonly wire_bytes: number;
  readonly misses: number;
  readonly hits: number;
  readonly span_bytes: number;
  readonly control_bytes: number;
  readonly control_requests: number;
  readonly ahead_bytes: number;
  readonly prefetch_bytes: number;
  readonly prefetch_useful_bytes: number;
  readonly prefetch_late_bytes: number;
  readonly prefetch_wasted_bytes: number;
  readonly asked_bytes: number;
  readonly asked_present_bytes: number;
}

/** proto/dedupd.proto, SpaceImage. */
export interface SpaceImageMessage {
  readonly image_id: number;
  readonly reference: string;
  readonly total_bytes: number;
  readonly present_bytes: number;
  readonly shared_bytes: number;
  readonly pinned: boolean;
  readonly transport: string;
}

/** proto/dedupd.proto, SpaceResponse. */
export interface SpaceMessage {
  readonly disk_bytes: number;
  readonly present_bytes: number;
  readonly quota_bytes: number;
  readonly chunks: number;
  readonly chunk_bytes: number;
  readonly referenced_bytes: number;
  readonly shared_chunks: number;
  readonly shared_bytes: number;
  readonly freed_bytes: number;
  readonly quarantined_bytes: number;
  readonly free_bytes: number;
  readonly evicted_bytes: number;
  readonly images: readonly SpaceImageMessage[];
}

/** proto/dedupd.proto, RetainLayersResponse. */
export interface RetainedMessage {
  readonly dropped: number;
  readonly waiting: number;
  readonly again_ms: number;
}

/** proto/dedupd.proto, GcProgress. */
export interface GcProgressMessage {
  readonly step: string;
  readonly done: boolean;
  readonly count: number;
  readonly disk_bytes: number;
  readonly address_bytes: number;
}

export interface MountProgressMessage {
  readonly step: string;
  readonly bytes_done: number;
  readonly bytes_total: number;
}

/** proto/dedupd.proto, ConvertLayerRequest. */
export interface ConvertLayerMessage {
  readonly snapshot: number;
  readonly directory: string;
  readonly bottom: boolean;
  readonly layer: string;
  readonly manifest: string;
  readonly sources: readonly SourceMessage[];
  readonly namespace: string;
  readonly chain_id: string;
  readonly parent_chain_id: string;
  readonly bytes: number;
}

export interface ConvertProgressMessage {
  readonly bytes: number;
  readonly entries: number;
  readonly total: number;
  readonly held: string;
}

/** proto/dedupd.proto, Below: a directory, or the layers of a merged image (bottom to top). */
export interface BelowMessage {
  readonly directory: string;
  readonly layers: readonly LayerKeyMessage[];
}

/** proto/dedupd.proto, WarmRequest. */
export interface WarmRequestMessage {
  readonly reference: string;
  readonly platform: string;
  readonly credentials: string;
  readonly all: boolean;
  readonly bytes_per_second: number;
  readonly keep_ms: number;
}

export interface WarmLeftOutMessage {
  readonly digest: string;
  readonly reason: string;
}

/** proto/dedupd.proto, WarmProgress. */
export interface WarmProgressMessage {
  readonly reference: string;
  readonly step: 'resolve' | 'index' | 'build' | 'fetch' | 'done';
  readonly bytes_done: number;
  readonly bytes_total: number;
  readonly part: string;
  readonly manifest: string;
  readonly layers: number;
  readonly left_out: readonly WarmLeftOutMessage[];
  readonly until_ms: number;
}

/** proto/dedupd.proto, WarmImage. */
export interface WarmImageMessage {
  readonly reference: string;
  readonly platform: string;
  readonly layers: number;
  readonly until_ms: number;
  readonly configured: boolean;
}

/** Brings images here ahead; implemented by prefetch/warm-up.ts. */
export interface Warmer {
  warm(
    request: WarmRequestMessage,
    show: (message: WarmProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<WarmProgressMessage>;
  listed(): readonly WarmImageMessage[];
  /** How many there were. Errors: NOT_FOUND, FAILED_PRECONDITION, INVALID_REFERENCE. */
  forget(references: readonly string[]): number;
}

/** What the service calls; implemented by data-plane.ts. */
export interface ControlledPlane {
  readonly root: string;
  readonly transportName: string;
  prepareLayer(request: PrepareLayerMessage): Promise<{ lazy: boolean; reason: string; layer: LayerKeyMessage }>;
  mountImage(
    layers: readonly LayerKeyMessage[],
    bottom: boolean,
    below: readonly BelowMessage[],
  ): Promise<{ path: string; mountId: number; rootUid: number; rootGid: number }>;
  releaseImages(inUse: readonly number[]): Promise<number>;
  retainLayers(layers: readonly LayerKeyMessage[]): Promise<RetainedMessage>;
  /** Errors: LAYER_NOT_LAZY when it can never be done; UNIMPLEMENTED, CANCELLED, STORE_FULL, STORE_IO. */
  convertLayer(
    request: ConvertLayerMessage,
    progress: (message: ConvertProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<LayerKeyMessage>;
  prebuildImage(layers: readonly LayerKeyMessage[]): Promise<void>;
  confirmLayer(layer: LayerKeyMessage): Promise<void>;
  layerUsage(layer: LayerKeyMessage): Promise<{ bytes: number; inodes: number }>;
  listImages(): Promise<ImageInfoMessage[]>;
  stats(): Promise<StatsMessage>;
  space(): Promise<SpaceMessage>;
  gc(show: (progress: GcProgressMessage) => void): Promise<void>;
  mountReference(
    request: { reference: string; directory: string; platform: string; credentials: string },
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string>;
  unmountReference(directory: string): Promise<void>;
  giveCredentials(host: string, credentials: string): void;
  readonly warmUp: Warmer;
}

/** proto/dedupd.proto, PullImageRequest. */
export interface PullImageMessage {
  readonly protocol: number;
  readonly reference: string;
  readonly platform: string;
  readonly credentials: string;
  readonly containerd_address: string;
  readonly namespace: string;
  readonly snapshotter: string;
  readonly lease_ms: number;
  readonly stop: boolean;
}

/** proto/dedupd.proto, PullImageEvent. */
export interface PullImageEventMessage {
  readonly resolved?: {
    readonly name: string;
    readonly manifest: string;
    readonly layers: readonly { readonly digest: string; readonly size: number }[];
  };
  readonly step?: { readonly layer: number; readonly state: string; readonly bytes: number };
}

/** Pulls an image into containerd, of which the data path itself knows nothing: dedupd.ts brings it. */
export type ImagePuller = (
  request: PullImageMessage,
  show: (event: PullImageEventMessage) => void,
  signal: AbortSignal,
) => Promise<void>;

export interface ControlServerOptions {
  readonly address: string;
  readonly plane: ControlledPlane;
  /** Answers PullImage; absent: that is not offered. */
  readonly pullImage?: ImagePuller;
  readonly version: string;
  readonly log: Logger;
  /** False once the root was emptied or replaced: whoever asks is told to look for another dedupd. */
  readonly servesRoot: () => boolean;
  /** Called after Shutdown was answered. */
  readonly onShutdown: () => void;
}

const MAX_MESSAGE_BYTES = 16 * MiB;
const CLOSE_TIMEOUT_MS = 3_000;

/** The gRPC form of any error: status, the message with its code, and the hint beside it. */
function toStatus(error: unknown): Partial<ServiceError> {
  if (!(error instanceof DedupError)) {
    return { code: GrpcStatus.internal, details: error instanceof Error ? error.message : String(error) };
  }
  const metadata = new Metadata();
  if (error.hint !== undefined) metadata.set(HINT_METADATA, Buffer.from(error.hint));
  return { code: error.info.grpc, details: `${error.message} [${error.code}]`, metadata };
}

/**
 * One pull: the first message begins it, another one, the client's end or the server's stops it. The stream ends when
 * nothing of the pull is under way any more.
 */
function servePull(
  pullImage: ImagePuller,
  log: Logger,
  stopping: AbortSignal,
): (call: ServerDuplexStream<PullImageMessage, PullImageEventMessage>) => void {
  return (call) => {
    const stop = new AbortController();
    const end = (why: string) => stop.abort(new DedupError('CANCELLED', why));
    call.on('cancelled', () => end('the client has gone'));
    let asked = false;
    call.once('end', () => {
      if (!asked) call.emit('error', toStatus(new DedupError('INVALID_ARGUMENT', 'the call named no image')));
    });
    call.once('data', (request: PullImageMessage) => {
      asked = true;
      call.on('data', () => end('interrupted'));
      const pull = async (): Promise<void> => {
        if (request.protocol !== DEDUPD_PROTOCOL) {
          throw new DedupError(
            'FAILED_PRECONDITION',
            `this dedupd speaks protocol ${DEDUPD_PROTOCOL}, the client ${request.protocol}`,
            { hint: 'restart both with the same version' },
          );
        }
        await pullImage(request, (event) => void call.write(event), AbortSignal.any([stop.signal, stopping]));
      };
      const startedMs = performance.now();
      log.debug({ reference: request.reference }, 'pull begins');
      pull().then(
        () => {
          log.debug({ call: 'PullImage', ms: Math.round(performance.now() - startedMs) }, 'call answered');
          call.end();
        },
        (error: unknown) => {
          log.info({ call: 'PullImage', reference: request.reference, err: error }, 'call failed');
          call.emit('error', toStatus(error));
        },
      );
    });
  };
}

type Handler<Request, Response> = (request: Request) => Promise<Response>;

function unary<Request, Response>(name: string, log: Logger, handler: Handler<Request, Response>) {
  return (call: ServerUnaryCall<Request, Response>, callback: sendUnaryData<Response>): void => {
    const startedMs = performance.now();
    handler(call.request).then(
      (response) => {
        log.debug({ call: name, ms: Math.round(performance.now() - startedMs) }, 'call answered');
        callback(null, response);
      },
      (error: unknown) => {
        log.warn({ call: name, err: error }, 'call failed');
        callback(toStatus(error));
      },
    );
  };
}

/** The signal of what this server's end does not end. */
const NEVER = new AbortController().signal;

/**
 * A call that is answered with progress and at last with the handler's result, marked `done`. Its signal is aborted when
 * the client goes, or `stopping` is.
 */
function streaming<Request>(
  name: string,
  log: Logger,
  stopping: AbortSignal,
  handler: (request: Request, show: (message: object) => void, signal: AbortSignal) => Promise<object>,
) {
  return (call: ServerWritableStream<Request, object>): void => {
    const abort = new AbortController();
    call.on('cancelled', () => abort.abort(new DedupError('CANCELLED', 'the client has gone')));
    const show = (message: object): void => void call.write({ ...message, done: false });
    handler(call.request, show, AbortSignal.any([abort.signal, stopping])).then(
      (result) => {
        call.write({ ...result, done: true });
        call.end();
      },
      (error: unknown) => {
        const level = isNoSpareRoom(error) ? 'debug' : abort.signal.aborted ? 'info' : 'warn';
        log[level]({ call: name, err: error }, 'call failed');
        call.emit('error', toStatus(error));
      },
    );
  };
}

/** Serves until closed. Errors: UNAVAILABLE when the socket cannot be bound. The caller holds the root's lock. */
export async function startControlServer(options: ControlServerOptions): Promise<{ close(): Promise<void> }> {
  const { address, plane, version, log } = options;
  const packages = loadProto('dedupd.proto') as unknown as { dedup: { v1: { Dedupd: ServiceClientConstructor } } };
  const stopping = new AbortController();
  const server = new Server({
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
    'grpc.max_send_message_length': MAX_MESSAGE_BYTES,
  });
  server.addService(packages.dedup.v1.Dedupd.service, {
    ...(options.pullImage === undefined ? {} : { PullImage: servePull(options.pullImage, log, stopping.signal) }),
    Hello: unary('Hello', log, async () => {
      if (!options.servesRoot()) {
        setImmediate(options.onShutdown);
        throw new DedupError('UNAVAILABLE', `this dedupd is stopping: its root ${plane.root} was emptied`);
      }
      const { root, transportName: transport } = plane;
      return { protocol: DEDUPD_PROTOCOL, version, root, pid: process.pid, transport };
    }),
    PrepareLayer: unary('PrepareLayer', log, (request: PrepareLayerMessage) => plane.prepareLayer(request)),
    MountImage: unary('MountImage', log, async ({ layers, bottom, below }: MountImageMessage) => {
      const { path, mountId, rootUid, rootGid } = await plane.mountImage(layers, bottom, below);
      return { path, mount_id: mountId, root_uid: rootUid, root_gid: rootGid };
    }),
    ReleaseImages: unary('ReleaseImages', log, async (request: { in_use: number[] }) => ({
      unmounted: await plane.releaseImages(request.in_use),
    })),
    RetainLayers: unary('RetainLayers', log, (request: { layers: LayerKeyMessage[] }) =>
      plane.retainLayers(request.layers),
    ),
    ConfirmLayer: unary('ConfirmLayer', log, async (request: { layer: LayerKeyMessage }) => {
      await plane.confirmLayer(request.layer);
      return {};
    }),
    LayerUsage: unary('LayerUsage', log, (request: { layer: LayerKeyMessage }) => plane.layerUsage(request.layer)),
    ListImages: unary('ListImages', log, async () => ({ images: await plane.listImages() })),
    Stats: unary('Stats', log, () => plane.stats()),
    Space: unary('Space', log, () => plane.space()),
    Gc: (call: ServerWritableStream<unknown, GcProgressMessage>) => {
      plane
        .gc((progress) => void call.write(progress))
        .then(
          () => call.end(),
          (error: unknown) => {
            log.warn({ call: 'Gc', err: error }, 'call failed');
            call.emit('error', toStatus(error));
          },
        );
    },
    UnmountReference: unary('UnmountReference', log, async (request: { directory: string }) => {
      await plane.unmountReference(request.directory);
      return {};
    }),
    GiveCredentials: unary('GiveCredentials', log, async (request: { host: string; credentials: string }) => {
      plane.giveCredentials(request.host, request.credentials);
      return {};
    }),
    Shutdown: unary('Shutdown', log, async () => {
      setImmediate(options.onShutdown);
      return {};
    }),
    ConvertLayer: streaming(
      'ConvertLayer',
      log,
      stopping.signal,
      async (request: ConvertLayerMessage, show, signal) => ({
        layer: await plane.convertLayer(request, show, signal),
      }),
    ),
    PrebuildImage: unary('PrebuildImage', log, async (request: { layers: LayerKeyMessage[] }) => {
      await plane.prebuildImage(request.layers);
      return {};
    }),
    Warm: streaming('Warm', log, stopping.signal, (request: WarmRequestMessage, show, signal) =>
      plane.warmUp.warm(request, show, signal),
    ),
    ListWarm: unary('ListWarm', log, async () => ({ images: plane.warmUp.listed() })),
    ForgetWarm: unary('ForgetWarm', log, async (request: { references: string[] }) => ({
      forgotten: plane.warmUp.forget(request.references),
    })),
    MountReference: streaming('MountReference', log, NEVER, async (request: MountReferenceMessage, show, signal) => ({
      step: 'mounted',
      path: await plane.mountReference(request, show, signal),
    })),
  });
  await rm(address, { force: true });
  const close = await serveOn(server, address, CLOSE_TIMEOUT_MS);
  return {
    close: () => {
      // First, so that pulls still have the time to leave nothing behind.
      stopping.abort(new DedupError('CANCELLED', 'dedupd is stopping'));
      return close();
    },
  };
}

interface MountImageMessage {
  readonly layers: readonly LayerKeyMessage[];
  readonly bottom: boolean;
  readonly below: readonly BelowMessage[];
}

interface MountReferenceMessage {
  readonly reference: string;
  readonly directory: string;
  readonly platform: string;
  readonly credentials: string;
}
