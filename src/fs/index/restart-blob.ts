// Writes the restart blob of a layer: framing first, as zstd frames, then one compressed window per span that needs
// one. Called by builder.ts. Reading it by range is restart-reader.ts's.
import { constants, zstdCompressSync } from 'node:zlib';
import { MiB } from '../../units.ts';
import type { RestartPoint } from '../native.ts';
import type { SpanTable } from './layer-index.ts';

/** Framing is compressed in frames of this many raw bytes, so that the result does not depend on how it came, bytes. */
const FRAMING_FRAME_BYTES = 4 * MiB;
/** At 9 framing is a fifth smaller and takes three times as long. */
const FRAMING_LEVEL = 3;
/** From 3 to 9 windows shrink by 2 % and take twice as long. */
const WINDOW_LEVEL = 5;

export class FramingWriter {
  #raw = Buffer.allocUnsafe(256 * 1024);
  #length = 0;
  readonly #frames: Buffer[] = [];
  #total = 0;

  get rawBytes(): number {
    return this.#total;
  }

  /** Appends a copy of `bytes`. */
  add(bytes: Buffer): void {
    this.#total += bytes.length;
    for (let at = 0; at < bytes.length; ) {
      const length = Math.min(bytes.length - at, FRAMING_FRAME_BYTES - this.#length);
      this.#reserve(length);
      bytes.copy(this.#raw, this.#length, at, at + length);
      this.#length += length;
      at += length;
      if (this.#length === FRAMING_FRAME_BYTES) this.#flush();
    }
  }

  #reserve(length: number): void {
    if (this.#length + length <= this.#raw.length) return;
    const larger = Buffer.allocUnsafe(
      Math.min(FRAMING_FRAME_BYTES, Math.max(this.#raw.length * 2, this.#length + length)),
    );
    this.#raw.copy(larger, 0, 0, this.#length);
    this.#raw = larger;
  }

  #flush(): void {
    if (this.#length > 0) this.#frames.push(compressed(this.#raw.subarray(0, this.#length), FRAMING_LEVEL));
    this.#length = 0;
  }

  finish(): Buffer {
    this.#flush();
    return Buffer.concat(this.#frames);
  }
}

export class SpanWriter {
  readonly #points: { outOffset: number; inOffset: number; bits: number; memberStart: boolean; windowBytes: number }[] =
    [];
  readonly #windows: Buffer[] = [];

  get lastOutOffset(): number {
    return this.#points.at(-1)?.outOffset ?? 0;
  }

  add(point: RestartPoint): void {
    const { outOffset, inOffset, bits, memberStart } = point;
    const window = memberStart || point.window.length === 0 ? undefined : compressed(point.window, WINDOW_LEVEL);
    if (window !== undefined) this.#windows.push(window);
    this.#points.push({ outOffset, inOffset, bits, memberStart, windowBytes: window?.length ?? 0 });
  }

  /** The table, with windows standing one after the other from `windowsAt` in the restart blob. */
  finish(windowsAt: number): { spans: SpanTable; windows: Buffer } {
    const points = this.#points;
    let at = windowsAt;
    const windowOffset = points.map(({ windowBytes }) => {
      const offset = windowBytes > 0 ? at : 0;
      at += windowBytes;
      return offset;
    });
    const spans: SpanTable = {
      count: points.length,
      outOffset: Float64Array.from(points, (point) => point.outOffset),
      inOffset: Float64Array.from(points, (point) => point.inOffset),
      bits: Uint8Array.from(points, (point) => point.bits),
      memberStart: Uint8Array.from(points, (point) => (point.memberStart ? 1 : 0)),
      windowOffset: Float64Array.from(windowOffset),
      windowLength: Uint32Array.from(points, (point) => point.windowBytes),
    };
    return { spans, windows: Buffer.concat(this.#windows) };
  }
}

function compressed(bytes: Buffer, level: number): Buffer {
  return zstdCompressSync(bytes, { params: { [constants.ZSTD_c_compressionLevel]: level } });
}
