// Warm, ListWarm and ForgetWarm of dedupd's control socket (proto/dedupd.proto), as messages. For `dedupd warm`.
import { DedupError } from '../errors.ts';
import { callDedupd } from './control-call.ts';
import { ProtoReader, ProtoWriter } from './proto-wire.ts';

/** proto/dedupd.proto, WarmRequest. Empty text and 0: as dedupd has it. */
export interface WarmRequest {
  readonly reference: string;
  readonly platform: string;
  /** user:password */
  readonly credentials: string;
  readonly all: boolean;
  readonly bytesPerSecond: number;
  readonly keepMs: number;
}

/** proto/dedupd.proto, WarmProgress. */
export interface WarmEvent {
  readonly reference: string;
  readonly step: string;
  /** Compressed. */
  readonly bytesDone: number;
  readonly bytesTotal: number;
  readonly done: boolean;
  readonly part: string;
  readonly manifest: string;
  readonly layers: number;
  readonly leftOut: readonly { readonly digest: string; readonly reason: string }[];
  /** Milliseconds since 1970. */
  readonly untilMs: number;
}

/** proto/dedupd.proto, WarmImage. */
export interface WarmImage {
  readonly reference: string;
  readonly platform: string;
  readonly layers: number;
  /** Milliseconds since 1970. */
  readonly untilMs: number;
  readonly configured: boolean;
}

const WORDS = { what: 'the warm-up', verb: 'warm images' };

/** Has an image brought here; the last event has `done`. Errors: those of callDedupd, and of the warm-up. */
export async function* warmImage(
  socket: string,
  request: WarmRequest,
  signal: AbortSignal,
): AsyncGenerator<WarmEvent, void, undefined> {
  const message = new ProtoWriter()
    .string(1, request.reference)
    .string(2, request.platform)
    .string(3, request.credentials)
    .bool(4, request.all)
    .uint(5, request.bytesPerSecond)
    .uint(6, request.keepMs);
  for await (const bytes of callDedupd({ socket, method: 'Warm', request: message, ...WORDS }, signal)) {
    const event = new ProtoReader(bytes);
    yield {
      reference: event.string(1),
      step: event.string(2),
      bytesDone: event.uint(3),
      bytesTotal: event.uint(4),
      done: event.uint(5) === 1,
      part: event.string(6),
      manifest: event.string(7),
      layers: event.uint(8),
      leftOut: event.messages(9).map((layer) => ({ digest: layer.string(1), reason: layer.string(2) })),
      untilMs: event.uint(10),
    };
  }
}

/** Images that are kept for having been warmed. */
export async function listWarm(socket: string, signal: AbortSignal): Promise<WarmImage[]> {
  const answer = await only(socket, 'ListWarm', new ProtoWriter(), signal);
  return answer.messages(1).map((image) => ({
    reference: image.string(1),
    platform: image.string(2),
    layers: image.uint(3),
    untilMs: image.uint(4),
    configured: image.uint(5) === 1,
  }));
}

/** Ends that images are kept; how many there were. Errors: NOT_FOUND, FAILED_PRECONDITION; then all stay. */
export async function forgetWarm(socket: string, references: readonly string[], signal: AbortSignal): Promise<number> {
  const message = new ProtoWriter();
  for (const reference of references) message.string(1, reference);
  return (await only(socket, 'ForgetWarm', message, signal)).uint(1);
}

async function only(socket: string, method: string, request: ProtoWriter, signal: AbortSignal): Promise<ProtoReader> {
  let answer: ProtoReader | undefined;
  for await (const bytes of callDedupd({ socket, method, request, ...WORDS }, signal)) answer = new ProtoReader(bytes);
  if (answer === undefined) throw new DedupError('INTERNAL', `dedupd answered ${method} with nothing`);
  return answer;
}
