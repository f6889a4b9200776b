// The parts that a caller of readRanges wants of one blob: which of them have been told, what must still be asked for, and
// how a stream of bytes is cut into them. Used by every BlobReader; knows nothing of HTTP.
import { DedupError } from '../../errors.ts';
import type { ByteRange } from '../../units.ts';
import type { BlobId, BlobReader, OnPart } from './blob-reader.ts';
import { checkRange } from './verified-stream.ts';

/** Requests at one time where several ranges take one each: as many as there are data connections to a registry. */
const AT_ONCE = 4;

/** Takes bytes that follow each other. */
export type Sink = (bytes: Buffer) => void;

export class WantedParts {
  /** In the order in which they are to come. */
  readonly #ranges: readonly ByteRange[];
  /** Their numbers, ascending by offset. */
  readonly #ascending: readonly number[];
  readonly #onPart: OnPart;
  readonly #told: Uint8Array;
  #left: number;

  /** Tells empty ranges at once. Errors: INVALID_ARGUMENT for ranges outside of the blob or overlapping. */
  constructor(blob: BlobId, ranges: readonly ByteRange[], onPart: OnPart) {
    this.#ranges = ranges;
    this.#ascending = [...ranges.keys()].sort((a, b) => ranges[a]!.offset - ranges[b]!.offset);
    this.#onPart = onPart;
    this.#told = new Uint8Array(ranges.length);
    this.#left = ranges.length;
    let end = 0;
    for (const index of this.#ascending) {
      const range = ranges[index]!;
      checkRange(blob, range);
      if (range.offset < end) {
        throw new DedupError(
          'INVALID_ARGUMENT',
          `the range at ${range.offset} of blob ${blob.digest} begins before the end of another one, ${end}`,
        );
      }
      end = range.offset + range.length;
    }
    for (const [index, { length }] of ranges.entries()) if (length === 0) this.#tell(index, Buffer.alloc(0));
  }

  /** True when every part has been told. */
  get complete(): boolean {
    return this.#left === 0;
  }

  /** What has not been told, in the order in which it is to come; ranges that follow each other there and touch as one. */
  missing(): ByteRange[] {
    const joined: { offset: number; length: number }[] = [];
    for (const [index, { offset, length }] of this.#ranges.entries()) {
      if (this.#told[index] === 1) continue;
      const last = joined.at(-1);
      if (last !== undefined && last.offset + last.length === offset) last.length += length;
      else joined.push({ offset, length });
    }
    return joined;
  }

  /**
   * A sink for the bytes of the blob from `offset` on. It tells each part as soon as it is complete and passes over bytes
   * that nobody wants, or that have been told; `offset` must not lie inside a part.
   */
  sink(offset: number): Sink {
    let position = offset;
    let next = this.#ascending.findIndex((number) => this.#ranges[number]!.offset >= offset);
    let part: Buffer | undefined;
    return (bytes) => {
      let at = 0;
      while (at < bytes.length && next >= 0 && next < this.#ascending.length) {
        const index = this.#ascending[next]!;
        const range = this.#ranges[index]!;
        if (this.#told[index] === 1) {
          next++;
          continue;
        }
        const skipped = Math.min(Math.max(range.offset - position, 0), bytes.length - at);
        at += skipped;
        position += skipped;
        if (at === bytes.length) break;
        part ??= Buffer.allocUnsafe(range.length);
        const copied = bytes.copy(part, position - range.offset, at);
        at += copied;
        position += copied;
        if (position < range.offset + range.length) break;
        this.#tell(index, part);
        part = undefined;
        next++;
      }
    };
  }

  /** Asks `reader` for every part that has not been told. Errors: those of `reader`. */
  async readFrom(reader: Pick<BlobReader, 'readRanges'>, blob: BlobId, signal: AbortSignal): Promise<void> {
    const asked = this.#ranges.flatMap((range, index) => (this.#told[index] === 1 ? [] : [{ range, index }]));
    if (asked.length === 0) return;
    const ranges = asked.map(({ range }) => range);
    await reader.readRanges(blob, ranges, signal, (i, bytes) => this.#tell(asked[i]!.index, bytes));
  }

  #tell(index: number, bytes: Buffer): void {
    this.#told[index] = 1;
    this.#left--;
    this.#onPart(index, bytes);
  }
}

/** readRanges for a reader that can read only one range a request. Errors as readRange. */
export async function readRangesOneByOne(
  reader: Pick<BlobReader, 'readRange'>,
  blob: BlobId,
  ranges: readonly ByteRange[],
  signal: AbortSignal,
  onPart: OnPart,
): Promise<void> {
  await fewAtOnce(ranges, async (range, index) => onPart(index, await reader.readRange(blob, range, signal)));
}

/**
 * Does `work` for every item in their order, four at once. After a failure none is begun, those under way may end (their
 * bytes would have to come again), and the first failure is thrown.
 */
export async function fewAtOnce<T>(
  items: readonly T[],
  work: (item: T, index: number) => Promise<unknown>,
): Promise<void> {
  const failures: unknown[] = [];
  const entries = items.entries();
  const worker = async (): Promise<void> => {
    for (const [index, item] of entries) {
      if (failures.length > 0) return;
      try {
        await work(item, index);
      } catch (error) {
        failures.push(error);
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, items.length) }, worker));
  if (failures.length > 0) throw failures[0];
}
