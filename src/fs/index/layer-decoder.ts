// Decompresses a layer once, from front to back, and collects where decompression can be restarted. Called by
// builder.ts only; random access is the LazyLoader's.
import { DedupError } from '../../errors.ts';
import { KiB, MiB } from '../../units.ts';
import { type GzipIndexer, native, type RestartPoint } from '../native.ts';
import { MAX_SPAN_OUTPUT_BYTES } from './format-limits.ts';
import type { Compression } from './layer-index.ts';
import { ZstdFrames } from './zstd-frames.ts';

/**
 * Compressed bytes given to the inflater at a time, and slices that wait for it or for the consumer: it never waits
 * for JavaScript while that is busy. Output may be 1032 times as much, with the consumer's buffer 500 MiB at worst, so
 * they are small until the stream has shown to be ordinary, and one alone while it is not.
 */
const MAX_SLICE_BYTES = 96 * KiB;
const MIN_SLICE_BYTES = 32 * KiB;
const MAX_QUEUED_SLICES = 4;
/** Output per slice that is aimed at, bytes. */
const SLICE_OUTPUT_BYTES = 4 * MiB;

/** Room for one slice's output and what the indexer keeps before it; what does not fit gets memory of its own, bytes. */
const REUSED_BYTES = MiB;

/**
 * Memory that is used for output again and again: new memory for each would cost the kernel's clearing of its pages
 * and keep the garbage collector busy. For a consumer that says when it is done with a buffer.
 */
export class OutputBuffers {
  readonly #free: Buffer[] = [];
  readonly #owned = new Map<ArrayBufferLike, Buffer>();

  take(): Buffer {
    const free = this.#free.pop();
    if (free !== undefined) return free;
    const buffer = Buffer.allocUnsafeSlow(REUSED_BYTES);
    this.#owned.set(buffer.buffer, buffer);
    return buffer;
  }

  /** Takes back what the caller is done with: a view of a buffer that was taken; any other is let alone. */
  give(view: Buffer): void {
    const buffer = this.#owned.get(view.buffer);
    if (buffer !== undefined) this.#free.push(buffer);
  }
}

/** Receives restart points in order. `window` is valid during the call. */
export type OnPoint = (point: RestartPoint) => void;

/** Compression by the first bytes, as containerd tells it whatever the media type says; needs 4 bytes if there are. */
export function compressionOf(head: Buffer): Compression {
  if (head.length >= 3 && head[0] === 0x1f && head[1] === 0x8b && head[2] === 8) return 'gzip';
  if (head.length >= 4) {
    const magic = head.readUInt32LE(0);
    if (magic === 0xfd2fb528 || (magic & 0xfffffff0) >>> 0 === 0x184d2a50) return 'zstd';
  }
  return 'none';
}

/**
 * The uncompressed bytes of `slices`. A consumer works on one buffer while the next ones are inflated on a native
 * thread; a buffer is changed after it was given out only if `outputs` gets it back. Errors: LAYER_INVALID; LAYER_NOT_LAZY when there is no place to restart for too long.
 */
export async function* decodeLayer(
  slices: AsyncIterable<Buffer>,
  compression: Compression,
  spanBytes: number,
  onPoint: OnPoint,
  outputs?: OutputBuffers | undefined,
): AsyncGenerator<Buffer> {
  let lastPoint = 0;
  let tarBytes = 0;
  const point: OnPoint = (next) => {
    lastPoint = next.outOffset;
    onPoint(next);
  };
  for await (const output of decoderOf(compression)(slices, spanBytes, point, outputs)) {
    tarBytes += output.length;
    if (tarBytes - lastPoint > 2 * MAX_SPAN_OUTPUT_BYTES + output.length) throw tooFar(lastPoint);
    yield output;
  }
}

/** Errors: LAYER_NOT_LAZY naming the place after which there is none to restart. */
export function tooFar(outOffset: number): DedupError {
  return new DedupError(
    'LAYER_NOT_LAZY',
    `no place to restart decompression for more than ${MAX_SPAN_OUTPUT_BYTES} bytes after byte ${outOffset} of the tar`,
  );
}

type Decoder = (
  slices: AsyncIterable<Buffer>,
  spanBytes: number,
  onPoint: OnPoint,
  outputs: OutputBuffers | undefined,
) => AsyncGenerator<Buffer>;

function decoderOf(compression: Compression): Decoder {
  switch (compression) {
    case 'none':
      return copied;
    case 'gzip':
      return inflated;
    case 'zstd':
      return unframed;
  }
}

const NO_BYTES = Buffer.alloc(0);

async function* copied(slices: AsyncIterable<Buffer>, spanBytes: number, onPoint: OnPoint): AsyncGenerator<Buffer> {
  let offset = 0;
  let next = 0;
  for await (const slice of slices) {
    offset += slice.length;
    for (; next < offset; next += spanBytes) {
      onPoint({ outOffset: next, inOffset: next, bits: 0, window: NO_BYTES, memberStart: false });
    }
    yield slice;
  }
}

async function* unframed(slices: AsyncIterable<Buffer>, spanBytes: number, onPoint: OnPoint): AsyncGenerator<Buffer> {
  const frames = new ZstdFrames();
  let outOffset = 0;
  let spanStart = -1;
  for await (const slice of slices) {
    for (const { inOffset, output } of frames.push(slice)) {
      if (output.length === 0) continue;
      // Neighbouring small frames make one span; a skippable frame belongs to the span before it.
      if (spanStart < 0 || outOffset + output.length - spanStart > spanBytes) {
        onPoint({ outOffset, inOffset: spanStart < 0 ? 0 : inOffset, bits: 0, window: NO_BYTES, memberStart: true });
        spanStart = outOffset;
      }
      outOffset += output.length;
      yield output;
    }
  }
  frames.finish();
}

async function* inflated(
  slices: AsyncIterable<Buffer>,
  spanBytes: number,
  onPoint: OnPoint,
  outputs: OutputBuffers | undefined,
): AsyncGenerator<Buffer> {
  const indexer = native().gzipIndexer({ spanBytes });
  const queue: { pushed: ReturnType<typeof push>; bytes: number }[] = [];
  let sliceBytes = MIN_SLICE_BYTES;
  let depth = 1;
  const next = async (): Promise<Buffer> => {
    const { pushed, bytes } = queue.shift()!;
    const { output, points } = await pushed;
    const ratio = output.length / bytes;
    sliceBytes = Math.max(MIN_SLICE_BYTES, Math.min(MAX_SLICE_BYTES, Math.floor(SLICE_OUTPUT_BYTES / ratio)));
    depth = sliceBytes === MAX_SLICE_BYTES ? MAX_QUEUED_SLICES : 1;
    for (const point of points) onPoint(point);
    return output;
  };
  try {
    for await (const slice of coalesced(slices, () => sliceBytes)) {
      const pushed = push(indexer, slice, outputs);
      // The rejection is seen at its await; until then it must not count as unhandled.
      pushed.catch(() => undefined);
      queue.push({ pushed, bytes: slice.length });
      while (queue.length > depth) {
        const output = await next();
        if (output.length > 0) yield output;
      }
    }
    while (queue.length > 0) {
      const output = await next();
      if (output.length > 0) yield output;
    }
    await indexer.finish();
  } finally {
    indexer.close();
    // What is queued ends normally; until then it reads the slices.
    await Promise.allSettled(queue.map(({ pushed }) => pushed));
  }
}

async function push(
  indexer: GzipIndexer,
  slice: Buffer,
  outputs: OutputBuffers | undefined,
): Promise<{ output: Buffer; points: RestartPoint[] }> {
  if (outputs === undefined) return await indexer.push(slice);
  const into = outputs.take();
  const { output, start = 0, length = 0, points } = await indexer.push(slice, into);
  if (output === undefined && length > 0) return { output: into.subarray(start, start + length), points };
  outputs.give(into);
  return { output: output ?? NO_BYTES, points };
}

/**
 * Buffers of `sliceBytes()`, the last shorter: fewer hops to the native thread than the network's own sizes. Buffers are
 * used in turns, so a slice is valid until MAX_QUEUED_SLICES more have been asked for and given.
 */
async function* coalesced(source: AsyncIterable<Buffer>, sliceBytes: () => number): AsyncGenerator<Buffer> {
  // One more than can be queued: the one that is being filled.
  const buffers = Array.from({ length: MAX_QUEUED_SLICES + 1 }, () => Buffer.allocUnsafeSlow(MAX_SLICE_BYTES));
  let current = 0;
  let length = 0;
  let wanted = sliceBytes();
  for await (const buffer of source) {
    for (let at = 0; at < buffer.length; ) {
      const slice = buffers[current % buffers.length]!;
      const copied = buffer.copy(slice, length, at, at + wanted - length);
      length += copied;
      at += copied;
      if (length < wanted) continue;
      yield slice.subarray(0, length);
      current++;
      length = 0;
      wanted = sliceBytes();
    }
  }
  if (length > 0) yield buffers[current % buffers.length]!.subarray(0, length);
}
