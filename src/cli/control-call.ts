// One call of dedupd's control socket (proto/dedupd.proto) for a process that lives no longer than the call. Speaks gRPC's own
// form over node:http2: the gRPC library takes longer to load than such a verb takes. Used by pull-client.ts and warm-client.ts;
// every other call goes through snapshotter/dedupd-client.ts.
import { type ClientHttp2Stream, connect, constants, type IncomingHttpHeaders } from 'node:http2';
import { connect as connectSocket } from 'node:net';
import { DedupError, ERROR_CODES, type ErrorCode, GrpcStatus } from '../errors.ts';
import { HINT_METADATA } from '../protocol-version.ts';
import type { ProtoWriter } from './proto-wire.ts';

/** Compression flag and length before every message (gRPC over HTTP/2, "Length-Prefixed-Message"). */
const PREFIX_BYTES = 5;

export interface ControlCall {
  readonly socket: string;
  /** Of the service Dedupd. */
  readonly method: string;
  readonly request: ProtoWriter;
  /** What the call is to people, in errors: "the pull". */
  readonly what: string;
  /** Its verb, for what an older dedupd cannot do: "pull images". */
  readonly verb: string;
  /** Sent when the signal is aborted: the call then ends by itself. Absent: it is cut off. */
  readonly stop?: ProtoWriter;
}

/**
 * The messages of the answer, as they come. Errors: those of the call; CANCELLED after an abort; UNAVAILABLE, with the detail
 * `reached: false`, when nobody listens on the socket; UNIMPLEMENTED of an older dedupd.
 */
export async function* callDedupd(call: ControlCall, signal: AbortSignal): AsyncGenerator<Buffer, void, undefined> {
  const session = connect('http://dedupd', { createConnection: () => connectSocket(call.socket) });
  let broken: NodeJS.ErrnoException | undefined;
  session.on('error', (error) => (broken = error));
  const path = `/dedup.v1.Dedupd/${call.method}`;
  const headers = { ':method': 'POST', ':path': path, 'content-type': 'application/grpc', te: 'trailers' };
  const stream = session.request(headers);
  let status: IncomingHttpHeaders | undefined;
  const take = (received: IncomingHttpHeaders): void => {
    if (received['grpc-status'] !== undefined) status = received;
  };
  stream.on('response', take); // an error before the first message comes as headers only
  stream.on('trailers', take);
  const stop = (): void => {
    if (call.stop === undefined) stream.close(constants.NGHTTP2_CANCEL);
    else stream.write(framed(call.stop));
  };
  stream.write(framed(call.request));
  // A server that streams begins once the client has said all.
  if (call.stop === undefined) stream.end();
  signal.addEventListener('abort', stop, { once: true });
  if (signal.aborted) stop();
  try {
    yield* messages(stream);
    if (status === undefined && call.stop === undefined && signal.aborted) throw interrupted(call);
    throwStatus(status, call);
  } catch (error) {
    if (error instanceof DedupError) throw error;
    // The stream breaks when the server is killed; a status that came before says more than that.
    if (status !== undefined) throwStatus(status, call);
    if (call.stop === undefined && signal.aborted) throw interrupted(call);
    throw unavailable(call, broken ?? (error as Error).cause ?? error);
  } finally {
    signal.removeEventListener('abort', stop);
    stream.close(constants.NGHTTP2_CANCEL);
    session.destroy();
  }
}

function interrupted({ what }: ControlCall): DedupError {
  return new DedupError('CANCELLED', `${what} was interrupted`);
}

function framed(message: ProtoWriter): Buffer {
  const bytes = message.bytes();
  const out = Buffer.alloc(PREFIX_BYTES + bytes.length);
  out.writeUInt32BE(bytes.length, 1);
  bytes.copy(out, PREFIX_BYTES);
  return out;
}

/** The messages in a stream of frames. */
async function* messages(stream: ClientHttp2Stream): AsyncGenerator<Buffer, void, undefined> {
  let pending: Buffer = Buffer.alloc(0);
  for await (const chunk of stream as AsyncIterable<Buffer>) {
    pending = pending.length === 0 ? chunk : Buffer.concat([pending, chunk]);
    while (pending.length >= PREFIX_BYTES) {
      const end = PREFIX_BYTES + pending.readUInt32BE(1);
      if (pending.length < end) break;
      yield pending.subarray(PREFIX_BYTES, end);
      pending = pending.subarray(end);
    }
  }
}

/** Throws what the status of the call says, unless it says that all is well. */
function throwStatus(headers: IncomingHttpHeaders | undefined, call: ControlCall): void {
  if (headers === undefined) throw unavailable(call, undefined);
  const status = Number(headers['grpc-status']);
  if (status === 0) return;
  const text = decodeURIComponent(String(headers['grpc-message'] ?? ''));
  const [, message, code] = /^(.*) \[([A-Z_]+)\]$/su.exec(text) ?? [];
  if (message !== undefined && code !== undefined && Object.hasOwn(ERROR_CODES, code)) {
    const hint = headers[HINT_METADATA];
    const words = hint === undefined ? {} : { hint: Buffer.from(String(hint), 'base64').toString('utf8') };
    throw new DedupError(code as ErrorCode, message, words);
  }
  if (status === GrpcStatus.unimplemented) {
    throw new DedupError('UNIMPLEMENTED', `the dedupd that runs cannot ${call.verb}: it is of an older version`, {
      hint: 'restart it: systemctl restart dedupd',
    });
  }
  throw new DedupError('INTERNAL', `dedupd ended ${call.what} with status ${status}: ${text}`);
}

function unavailable({ socket, what }: ControlCall, cause: unknown): DedupError {
  const code = (cause as NodeJS.ErrnoException | undefined)?.code ?? '';
  if (code === 'EACCES') {
    return new DedupError('NOT_ROOT', `the socket of dedupd, ${socket}, belongs to root`, { cause, hint: 'use sudo' });
  }
  const reached = !['ENOENT', 'ECONNREFUSED'].includes(code);
  const message = reached ? `dedupd ended in the middle of ${what}` : `dedupd does not answer on ${socket}`;
  return new DedupError('UNAVAILABLE', message, {
    cause,
    hint: reached ? `its log says why; run ${what} again` : 'is the service running?',
    details: { reached },
  });
}
