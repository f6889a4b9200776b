// Writes the restart blob of a layer: framing first, as zstd frames, then one compressed window per span that needs
// one. Called by builder.ts. Reading it by range is restart-reader.ts's.
import { promisify } from 'node:util';
import { constants, zstdCompress } from 'node:zlib';
import { MiB } from '../../units.ts';
import type { RestartPoint } from '../native.ts';
import type { SpanTable } from './layer-index.ts';

/** Framing is compressed in frames of this many raw bytes, so that the result does not depend on how it came, bytes. */
const FRAMING_FRAME_BYTES = 4 * MiB;
/** At 9 framing is a fifth smaller and takes three times as long. */
const FRAMING_LEVEL = 3;
/** From 3 to 9 windows shrink by 2 % and take twice as long. */
const WINDOW_LEVEL = 5;

/** In libuv's pool: it takes a core, but never waits. */
const compress = promisify(zstdCompress);

/** Compresses parts off this thread and keeps the results in the order in which the parts came. */
class CompressedParts {
  readonly #level: number;
  readonly #maxWaiting: number;
  readonly #parts: Buffer[] = [];
  /** Parts being compressed, in order; the first failure stays in it and is thrown by whoever waits. */
  readonly #waiting: Promise<void>[] = [];

  constructor(level: number, maxWaiting: number) {
    this.#level = level;
    this.#maxWaiting = maxWaiting;
  }

  /** Takes `bytes`, which must not change any more. */
  add(bytes: Buffer): void {
    const place = this.#parts.push(bytes) - 1;
    const promise = compress(bytes, {
      params: { [constants.ZSTD_c_compressionLevel]: this.#level },
      pledgedSrcSize: bytes.length,
    }).then((compressed) => {
      this.#parts[place] = compressed;
    });
    // Seen at its await; until then it must not count as unhandled.
    promise.catch(() => undefined);
    this.#waiting.push(promise);
  }

  /** Undefined while a caller may go on; else to be awaited, so that no more than `maxWaiting` parts wait. */
  room(): Promise<unknown> | undefined {
    if (this.#waiting.length <= this.#maxWaiting) return undefined;
    return Promise.all(this.#waiting.splice(0, this.#waiting.length - this.#maxWaiting));
  }

  async finish(): Promise<readonly Buffer[]> {
    await Promise.all(this.#waiting.splice(0));
    return this.#parts;
  }
}

export class FramingWriter {
  #raw = Buffer.allocUnsafe(256 * 1024);
  #length = 0;
  readonly #frames = new CompressedParts(FRAMING_LEVEL, 1);
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
    if (this.#length === 0) return;
    this.#frames.add(this.#raw.subarray(0, this.#length));
    this.#raw = Buffer.allocUnsafe(this.#raw.length);
    this.#length = 0;
  }

  /** To be awaited before more is added, if it is a promise. */
  room(): Promise<unknown> | undefined {
    return this.#frames.room();
  }

  async finish(): Promise<Buffer> {
    this.#flush();
    return Buffer.concat(await this.#frames.finish());
  }
}

export class SpanWriter {
  readonly #points: Omit<RestartPoint, 'window'>[] = [];
  /** Number of the window of each point; -1 without one. */
  readonly #windowNumber: number[] = [];
  #windowCount = 0;
  readonly #windows = new CompressedParts(WINDOW_LEVEL, 16);

  get lastOutOffset(): number {
    return this.#points.at(-1)?.outOffset ?? 0;
  }

  /** Takes the point and its window. */
  add(point: RestartPoint): void {
    const { outOffset, inOffset, bits, memberStart } = point;
    const needed = !memberStart && point.window.length > 0;
    if (needed) this.#windows.add(point.window);
    this.#windowNumber.push(needed ? this.#windowCount++ : -1);
    this.#points.push({ outOffset, inOffset, bits, memberStart });
  }

  /** To be awaited before more is added, if it is a promise. */
  room(): Promise<unknown> | undefined {
    return this.#windows.room();
  }

  /** The table, with windows standing one after the other from `windowsAt` in the restart blob. */
  async finish(windowsAt: number): Promise<{ spans: SpanTable; windows: Buffer }> {
    const windows = await this.#windows.finish();
    const points = this.#points;
    let at = windowsAt;
    const windowLength = this.#windowNumber.map((number) => windows[number]?.length ?? 0);
    const windowOffset = windowLength.map((length) => {
      const offset = length > 0 ? at : 0;
      at += length;
      return offset;
    });
    const spans: SpanTable = {
      count: points.length,
      outOffset: Float64Array.from(points, (point) => point.outOffset),
      inOffset: Float64Array.from(points, (point) => point.inOffset),
      bits: Uint8Array.from(points, (point) => point.bits),
      memberStart: Uint8Array.from(points, (point) => (point.memberStart ? 1 : 0)),
      windowOffset: Float64Array.from(windowOffset),
      windowLength: Uint32Array.from(windowLength),
    };
    return { spans, windows: Buffer.concat(windows) };
  }
}
