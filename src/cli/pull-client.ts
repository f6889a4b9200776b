// PullImage of dedupd's control socket (proto/dedupd.proto) for a process that lives no longer than the pull. Speaks gRPC's
// own form over node:http2: the gRPC library takes longer to load than everything else that `rpull` does. Every other call
// goes through snapshotter/dedupd-client.ts.
import { type ClientHttp2Stream, connect, constants, type IncomingHttpHeaders } from 'node:http2';
import { connect as connectSocket } from 'node:net';
import { DedupError, ERROR_CODES, type ErrorCode, GrpcStatus } from '../errors.ts';
import { DEDUPD_PROTOCOL, HINT_METADATA } from '../protocol-version.ts';
import { ProtoReader, ProtoWriter } from './proto-wire.ts';

const PATH = '/dedup.v1.Dedupd/PullImage';
/** Compression flag and length before every message (gRPC over HTTP/2, "Length-Prefixed-Message"). */
const PREFIX_BYTES = 5;

/** What to pull, and where to: proto/dedupd.proto, PullImageRequest. Empty text and 0: as dedupd has it. */
export interface PullRequest {
  readonly reference: string;
  readonly platform: string;
  /** user:password */
  readonly credentials: string;
  readonly containerdAddress: string;
  readonly namespace: string;
  readonly snapshotter: string;
  readonly leaseMs: number;
}

export type PullEvent =
  | {
      readonly kind: 'resolved';
      readonly name: string;
      readonly manifest: string;
      readonly layers: readonly { readonly digest: string; readonly size: number }[];
    }
  | {
      readonly kind: 'step';
      readonly layer: number;
      readonly state: 'fetching' | 'unpacking' | 'present' | 'lazy' | 'stored' | 'unpacked';
      readonly bytes: number;
    };

/**
 * Pulls an image into containerd; what happens, as it happens. After an abort it ends, with CANCELLED, once dedupd has left
 * nothing behind. Errors: those of the pull; UNAVAILABLE, with the detail `reached: false`, when nobody listens on `socket`.
 */
export async function* pullImage(
  socket: string,
  request: PullRequest,
  signal: AbortSignal,
): AsyncGenerator<PullEvent, void, undefined> {
  const session = connect('http://dedupd', { createConnection: () => connectSocket(socket) });
  let broken: NodeJS.ErrnoException | undefined;
  session.on('error', (error) => (broken = error));
  const headers = { ':method': 'POST', ':path': PATH, 'content-type': 'application/grpc', te: 'trailers' };
  const stream = session.request(headers);
  let status: IncomingHttpHeaders | undefined;
  const take = (received: IncomingHttpHeaders): void => {
    if (received['grpc-status'] !== undefined) status = received;
  };
  stream.on('response', take); // an error before the first message comes as headers only
  stream.on('trailers', take);
  const stop = (): void => void stream.write(framed(new ProtoWriter().bool(9, true)));
  stream.write(framed(encodeRequest(request)));
  signal.addEventListener('abort', stop, { once: true });
  if (signal.aborted) stop();
  try {
    for await (const message of messages(stream)) yield decodeEvent(message);
    throwStatus(status, socket);
  } catch (error) {
    if (error instanceof DedupError) throw error;
    // The stream breaks when the server is killed; a status that came before says more than that.
    if (status !== undefined) throwStatus(status, socket);
    throw unavailable(socket, broken ?? (error as Error).cause ?? error);
  } finally {
    signal.removeEventListener('abort', stop);
    stream.close(constants.NGHTTP2_CANCEL);
    session.destroy();
  }
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

function encodeRequest(request: PullRequest): ProtoWriter {
  return new ProtoWriter()
    .uint(1, DEDUPD_PROTOCOL)
    .string(2, request.reference)
    .string(3, request.platform)
    .string(4, request.credentials)
    .string(5, request.containerdAddress)
    .string(6, request.namespace)
    .string(7, request.snapshotter)
    .uint(8, request.leaseMs);
}

function decodeEvent(bytes: Buffer): PullEvent {
  const event = new ProtoReader(bytes);
  const resolved = event.message(1);
  if (resolved !== undefined) {
    const layers = resolved.messages(3).map((layer) => ({ digest: layer.string(1), size: layer.uint(2) }));
    return { kind: 'resolved', name: resolved.string(1), manifest: resolved.string(2), layers };
  }
  const step = event.message(2);
  if (step === undefined) throw new DedupError('INTERNAL', 'dedupd told something of the pull that is not known here');
  const state = step.string(2);
  switch (state) {
    case 'fetching':
    case 'unpacking':
    case 'present':
    case 'lazy':
    case 'stored':
    case 'unpacked':
      return { kind: 'step', layer: step.uint(1), state, bytes: step.uint(3) };
    default:
      throw new DedupError('INTERNAL', `dedupd told of a step of the pull that is not known here: ${state}`);
  }
}

/** Throws what the status of the call says, unless it says that all is well. */
function throwStatus(headers: IncomingHttpHeaders | undefined, socket: string): void {
  if (headers === undefined) throw unavailable(socket, undefined);
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
    throw new DedupError('UNIMPLEMENTED', 'the dedupd that runs cannot pull images: it is of an older version', {
      hint: 'restart it: systemctl restart dedupd',
    });
  }
  throw new DedupError('INTERNAL', `dedupd ended the pull with status ${status}: ${text}`);
}

function unavailable(socket: string, cause: unknown): DedupError {
  const code = (cause as NodeJS.ErrnoException | undefined)?.code ?? '';
  if (code === 'EACCES') {
    return new DedupError('NOT_ROOT', `the socket of dedupd, ${socket}, belongs to root`, { cause, hint: 'use sudo' });
  }
  const reached = !['ENOENT', 'ECONNREFUSED'].includes(code);
  const message = reached ? 'dedupd ended in the middle of the pull' : `dedupd does not answer on ${socket}`;
  return new DedupError('UNAVAILABLE', message, {
    cause,
    hint: reached ? 'its log says why; run the pull again' : 'is the service running?',
    details: { reached },
  });
}
