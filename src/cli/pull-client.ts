// PullImage of dedupd's control socket (proto/dedupd.proto): what to pull, and what happens, as messages. For `rpull`, which
// is over before a gRPC library is loaded.
import { DedupError } from '../errors.ts';
import { DEDUPD_PROTOCOL } from '../protocol-version.ts';
import { callDedupd } from './control-call.ts';
import { ProtoReader, ProtoWriter } from './proto-wire.ts';

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
  const call = {
    socket,
    method: 'PullImage',
    request: encodeRequest(request),
    what: 'the pull',
    verb: 'pull images',
    stop: new ProtoWriter().bool(9, true),
  };
  for await (const message of callDedupd(call, signal)) yield decodeEvent(message);
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
