// Windows of one layer's restart points: from the local restart file where there is one, else by range from a registry,
// kept in an LRU cache that layers share. Used by the LazyLoader (its WindowReader). A wrong window cannot do harm:
// pieces are verified; `forget` drops one that turned out wrong.
import { existsSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { zstdDecompressSync } from 'node:zlib';
import { LRUCache } from 'lru-cache';
import { wrapError } from '../../errors.ts';
import { type ByteRange, KiB } from '../../units.ts';
import type { BlobReader } from '../registry/blob-reader.ts';
import type { LayerIndex } from './layer-index.ts';
import { indexError } from './wire.ts';

const WINDOW_BYTES = 32 * KiB;
/** Spans whose windows are read together: about 60 KiB. */
const WINDOW_GROUP = 4;
/** How long a window is waited for that was asked for together with others: then it is asked for by itself. Milliseconds. */
const EXPECTED_MS = 5_000;
/** Windows of a layer that are kept for a plan, as they are packed: about 5 MB. */
const MAX_EXPECTED = 512;
const EMPTY = new Uint8Array(0);

/** Decompressed windows of all layers, bounded by bytes. Its keys name the restart blob, so layers can share one. */
export class WindowCache {
  readonly #cache: LRUCache<string, Uint8Array>;

  constructor(maxBytes: number) {
    this.#cache = new LRUCache({ maxSize: maxBytes, sizeCalculation: (window) => window.length + 128 });
  }

  get(restart: string, span: number): Uint8Array | undefined {
    return this.#cache.get(`${restart}:${span}`);
  }

  set(restart: string, span: number, window: Uint8Array): void {
    this.#cache.set(`${restart}:${span}`, window);
  }

  delete(restart: string, span: number): void {
    this.#cache.delete(`${restart}:${span}`);
  }
}

export class RestartReader {
  readonly #index: Pick<LayerIndex, 'restart' | 'spans'>;
  readonly #cache: WindowCache;
  readonly #localFile: string;
  /** Windows on their way or here, as they are packed, until they are read; undefined: could not be had. */
  readonly #packed = new Map<number, Promise<Buffer | undefined>>();

  /** `localFile` is where the restart blob is if it is on this node; it need not exist. */
  constructor(index: Pick<LayerIndex, 'restart' | 'spans'>, localFile: string, cache: WindowCache) {
    this.#index = index;
    this.#localFile = localFile;
    this.#cache = cache;
  }

  /**
   * Windows of spans [first, first + count), empty where a span needs none. Neighbouring windows that are not here are
   * read as one range. Errors: those of BlobReader.readRange; INDEX_INVALID for a window that does not decompress.
   */
  async readWindows(
    first: number,
    count: number,
    reader: BlobReader,
    signal: AbortSignal,
  ): Promise<readonly Uint8Array[]> {
    const { spans, restart } = this.#index;
    const windows: Uint8Array[] = new Array<Uint8Array>(count).fill(EMPTY);
    const missing: number[] = [];
    const expected = await Promise.all(windows.map((_, i) => this.#takeExpected(first + i)));
    for (const [i, window] of expected.entries()) {
      if (spans.windowLength[first + i] === 0) continue;
      if (window !== undefined) this.#cache.set(restart.digest, first + i, window);
      const cached = window ?? this.#cache.get(restart.digest, first + i);
      if (cached === undefined) missing.push(first + i);
      else windows[i] = cached;
    }
    await Promise.all(
      this.#runs(missing).map(async ({ from, to, range }) => {
        const bytes = await this.#read(range, reader, signal);
        for (let span = from; span <= to; span++) {
          const length = spans.windowLength[span]!;
          if (length === 0) continue;
          const at = spans.windowOffset[span]! - range.offset;
          const wanted = span >= first && span < first + count;
          let window: Uint8Array;
          try {
            window = this.#decompress(bytes.subarray(at, at + length), span);
          } catch (error) {
            if (wanted) throw error;
            continue; // Whoever wants it reads it again, and is told.
          }
          this.#cache.set(restart.digest, span, window);
          if (wanted) windows[span - first] = window;
        }
      }),
    );
    return windows;
  }

  expect(wanted: readonly number[], reader: BlobReader, signal: AbortSignal): void {
    const { spans, restart } = this.#index;
    if (existsSync(this.#localFile)) return;
    const missing = wanted.filter(
      (span) =>
        spans.windowLength[span]! > 0 && !this.#packed.has(span) && this.#cache.get(restart.digest, span) === undefined,
    );
    if (missing.length === 0) return;
    const here = missing.map((span) => {
      const packed = Promise.withResolvers<Buffer | undefined>();
      this.#packed.set(span, packed.promise);
      return packed;
    });
    const ranges = missing.map((span) => ({ offset: spans.windowOffset[span]!, length: spans.windowLength[span]! }));
    const came = new Set<number>();
    const take = (i: number, bytes: Buffer): void => {
      came.add(i);
      here[i]!.resolve(bytes);
    };
    const ended = (): void => {
      for (const [i, packed] of here.entries()) {
        packed.resolve(undefined);
        // Whoever comes later asks anew.
        if (!came.has(i) && this.#packed.get(missing[i]!) === packed.promise) this.#packed.delete(missing[i]!);
      }
    };
    reader.readRanges(restart, ranges, signal, take).then(ended, ended);
    // Of plans that were given up: nobody comes for them.
    for (const span of this.#packed.keys()) {
      if (this.#packed.size <= MAX_EXPECTED) break;
      this.#packed.delete(span);
    }
  }

  /** A window that was expected, once it is here; undefined when it was not, could not be had in time, or is damaged. */
  async #takeExpected(span: number): Promise<Uint8Array | undefined> {
    const coming = this.#packed.get(span);
    if (coming === undefined) return undefined;
    const late = Promise.withResolvers<undefined>();
    const timer = setTimeout(() => late.resolve(undefined), EXPECTED_MS);
    const packed = await Promise.race([coming, late.promise]);
    clearTimeout(timer);
    if (this.#packed.get(span) === coming) this.#packed.delete(span);
    if (packed === undefined) return undefined;
    try {
      return this.#decompress(packed, span);
    } catch {
      return undefined; // Asked for by itself; what comes then is judged.
    }
  }

  /** Drops cached windows of spans [first, first + count) and those read with them: when what they gave failed verification. */
  forget(first: number, count: number): void {
    const from = Math.floor(first / WINDOW_GROUP) * WINDOW_GROUP;
    const until = Math.ceil((first + count) / WINDOW_GROUP) * WINDOW_GROUP;
    for (let span = from; span < until; span++) {
      this.#cache.delete(this.#index.restart.digest, span);
      this.#packed.delete(span);
    }
  }

  /**
   * Joins spans whose windows stand one after the other in the blob. Of windows that are not here the neighbours come too,
   * up to the border of their group: readers stay in a place for a while, and a request costs more than a few windows.
   */
  #runs(wanted: readonly number[]): { from: number; to: number; range: ByteRange }[] {
    const { restart, spans } = this.#index;
    const { windowOffset, windowLength, count } = spans;
    const groups = new Set(wanted.map((span) => Math.floor(span / WINDOW_GROUP)));
    const missing: number[] = [];
    for (const group of [...groups].sort((a, b) => a - b)) {
      for (let span = group * WINDOW_GROUP; span < Math.min(count, (group + 1) * WINDOW_GROUP); span++)
        if (windowLength[span]! > 0 && this.#cache.get(restart.digest, span) === undefined) missing.push(span);
    }
    const runs: { from: number; to: number; range: ByteRange }[] = [];
    for (const span of missing) {
      const offset = windowOffset[span]!;
      const length = windowLength[span]!;
      const last = runs.at(-1);
      if (last !== undefined && last.range.offset + last.range.length === offset) {
        last.to = span;
        last.range = { offset: last.range.offset, length: last.range.length + length };
      } else {
        runs.push({ from: span, to: span, range: { offset, length } });
      }
    }
    return runs;
  }

  async #read(range: ByteRange, reader: BlobReader, signal: AbortSignal): Promise<Buffer> {
    let file: FileHandle;
    try {
      file = await open(this.#localFile, 'r');
    } catch {
      // No local copy, for whatever reason: the registry has it.
      return await reader.readRange(this.#index.restart, range, signal);
    }
    try {
      const bytes = Buffer.allocUnsafe(range.length);
      const { bytesRead } = await file.read(bytes, 0, range.length, range.offset);
      if (bytesRead === range.length) return bytes;
    } finally {
      await file.close();
    }
    return await reader.readRange(this.#index.restart, range, signal);
  }

  #decompress(packed: Buffer, span: number): Uint8Array {
    let window: Buffer;
    try {
      window = zstdDecompressSync(packed, { maxOutputLength: WINDOW_BYTES });
    } catch (cause) {
      throw wrapError(cause, `restart blob ${this.#index.restart.digest}, window of span ${span}`, 'INDEX_INVALID');
    }
    if (window.length === 0) throw indexError('restart', `the window of span ${span} is empty`);
    return window;
  }
}
