// The chunk table as a function of file sizes, places in the tar, sparse maps and piece digests. Builder and decoder
// both make it here, so an index cannot state a chunk's length, name or place in contradiction to its file.
import type { ChunkTable, EntryTable } from './layer-index.ts';
import { EntryType } from './layer-index.ts';
import type { Fragment } from './tar-header.ts';
import { indexError } from './wire.ts';
import { chunkName, zeroPieceDigests } from './zero-digests.ts';

/** Every non-empty file of a layer in tar order, as columns. */
export interface FileExtents {
  readonly count: number;
  /** Logical size, bytes. */
  readonly size: Float64Array;
  /** Where its bytes start in the tar; they are contiguous there, a sparse file's fragments one after the other. */
  readonly base: Float64Array;
  /** Fragments of sparse files by number of the file: ascending, apart from each other, within the size. */
  readonly sparse: ReadonlyMap<number, readonly Fragment[]>;
}

/** Joins neighbouring fragments; undefined when they are the whole file, which then is not sparse. */
export function canonicalFragments(fragments: readonly Fragment[], size: number): Fragment[] | undefined {
  const joined: Fragment[] = [];
  for (const next of fragments) {
    const last = joined.at(-1);
    if (last !== undefined && last.offset + last.length === next.offset) {
      joined[joined.length - 1] = { offset: last.offset, length: last.length + next.length };
    } else {
      joined.push(next);
    }
  }
  return joined.length === 1 && joined[0]!.offset === 0 && joined[0]!.length === size ? undefined : joined;
}

/** Chunks of all files. */
export function countChunks(files: FileExtents, chunkBytes: number): number {
  let count = 0;
  for (let file = 0; file < files.count; file++) count += Math.ceil(files.size[file]! / chunkBytes);
  return count;
}

/**
 * Builds the table. `zero` has one byte per chunk; `stored` holds 32 bytes per piece of every other chunk, in order.
 * A chunk without a byte in the tar (a hole of a sparse file) gets tarOffset 0, where no content can be.
 * Errors: INDEX_INVALID (field `pieces`) when `stored` is too short or too long.
 */
export function buildChunkTable(
  files: FileExtents,
  chunkBytes: number,
  pieceBytes: number,
  zero: Uint8Array,
  stored: Buffer,
): ChunkTable {
  const count = zero.length;
  const length = new Uint32Array(count);
  const tarOffset = new Float64Array(count);
  const pieceStart = new Uint32Array(count + 1);
  const fragmentStart = new Uint32Array(count + 1);
  const fragmentChunkOffset: number[] = [];
  const fragmentTarOffset: number[] = [];
  const fragmentLength: number[] = [];
  let chunk = 0;
  for (let file = 0; file < files.count; file++) {
    const size = files.size[file]!;
    const base = files.base[file]!;
    const sparse = files.sparse.get(file);
    const cursor = { fragment: 0, taken: 0, tarOffset: base };
    for (let offset = 0; offset < size; offset += chunkBytes, chunk++) {
      const bytes = Math.min(chunkBytes, size - offset);
      length[chunk] = bytes;
      pieceStart[chunk + 1] = pieceStart[chunk]! + Math.ceil(bytes / pieceBytes);
      if (sparse === undefined) {
        tarOffset[chunk] = base + offset;
      } else {
        const from = fragmentLength.length;
        cutFragments(sparse, cursor, offset, bytes, fragmentChunkOffset, fragmentTarOffset, fragmentLength);
        tarOffset[chunk] = fragmentTarOffset[from] ?? 0;
        // A chunk without holes is an ordinary one.
        if (fragmentLength.length === from + 1 && fragmentLength[from] === bytes) {
          fragmentChunkOffset.pop();
          fragmentTarOffset.pop();
          fragmentLength.pop();
        }
      }
      fragmentStart[chunk + 1] = fragmentLength.length;
    }
  }
  const { digest, pieceDigest } = nameChunks(length, pieceStart, pieceBytes, zero, stored);
  return {
    count,
    digest,
    length,
    tarOffset,
    pieceStart,
    pieceDigest,
    fragmentStart,
    fragmentChunkOffset: Uint32Array.from(fragmentChunkOffset),
    fragmentTarOffset: Float64Array.from(fragmentTarOffset),
    fragmentLength: Uint32Array.from(fragmentLength),
    zero,
  };
}

interface FragmentCursor {
  fragment: number;
  /** Bytes of that fragment that earlier chunks have. */
  taken: number;
  tarOffset: number;
}

function cutFragments(
  sparse: readonly Fragment[],
  cursor: FragmentCursor,
  chunkOffset: number,
  chunkLength: number,
  outChunkOffset: number[],
  outTarOffset: number[],
  outLength: number[],
): void {
  for (;;) {
    const fragment = sparse[cursor.fragment];
    if (fragment === undefined) return;
    const from = fragment.offset + cursor.taken;
    if (from >= chunkOffset + chunkLength) return;
    const bytes = Math.min(fragment.length - cursor.taken, chunkOffset + chunkLength - from);
    outChunkOffset.push(from - chunkOffset);
    outTarOffset.push(cursor.tarOffset);
    outLength.push(bytes);
    cursor.tarOffset += bytes;
    cursor.taken += bytes;
    if (cursor.taken < fragment.length) return;
    cursor.fragment++;
    cursor.taken = 0;
  }
}

function nameChunks(
  length: Uint32Array,
  pieceStart: Uint32Array,
  pieceBytes: number,
  zero: Uint8Array,
  stored: Buffer,
): { digest: Buffer; pieceDigest: Buffer } {
  const count = length.length;
  const zeroLengths = [pieceBytes];
  for (let i = 0; i < count; i++) if (zero[i] === 1) zeroLengths.push(lastPiece(length[i]!, pieceBytes));
  const zeros = zeroLengths.length > 1 ? zeroPieceDigests(zeroLengths) : undefined;
  const digest = Buffer.allocUnsafeSlow(count * 32);
  const pieceDigest = Buffer.allocUnsafeSlow(pieceStart[count]! * 32);
  let at = 0;
  for (let i = 0; i < count; i++) {
    const from = pieceStart[i]! * 32;
    const to = pieceStart[i + 1]! * 32;
    if (zero[i] === 1) {
      for (let piece = from; piece < to; piece += 32) {
        const bytes = piece + 32 === to ? lastPiece(length[i]!, pieceBytes) : pieceBytes;
        zeros!.get(bytes)!.copy(pieceDigest, piece);
      }
    } else {
      if (at + (to - from) > stored.length) throw indexError('pieces', 'there are fewer digests than pieces');
      stored.copy(pieceDigest, from, at, at + (to - from));
      at += to - from;
    }
    if (to - from === 32) pieceDigest.copy(digest, i * 32, from, to);
    else chunkName(pieceDigest.subarray(from, to)).copy(digest, i * 32);
  }
  if (at !== stored.length) throw indexError('pieces', 'there are more digests than pieces');
  return { digest, pieceDigest };
}

/** Bytes of the last piece of a chunk of `length` bytes. */
function lastPiece(length: number, pieceBytes: number): number {
  return length % pieceBytes || pieceBytes;
}

/** The file columns an entry table and a chunk table stand for; the inverse of buildChunkTable. */
export function fileExtents(entries: EntryTable, chunks: ChunkTable): FileExtents {
  const size: number[] = [];
  const base: number[] = [];
  const sparse = new Map<number, readonly Fragment[]>();
  let dataEnd = 0;
  for (let entry = 0; entry < entries.count; entry++) {
    if (entries.type[entry] !== EntryType.file || entries.size[entry] === 0) continue;
    const first = entries.firstChunk[entry]!;
    const fragments: Fragment[] = [];
    let offset = 0;
    let start = 0;
    for (let chunk = first; chunk < first + entries.chunkCount[entry]!; chunk++) {
      const from = chunks.fragmentStart[chunk]!;
      const to = chunks.fragmentStart[chunk + 1]!;
      const tarOffset = chunks.tarOffset[chunk]!;
      if (from === to && tarOffset > 0) fragments.push({ offset, length: chunks.length[chunk]! });
      for (let i = from; i < to; i++) {
        fragments.push({ offset: offset + chunks.fragmentChunkOffset[i]!, length: chunks.fragmentLength[i]! });
      }
      if (start === 0) start = tarOffset;
      offset += chunks.length[chunk]!;
    }
    const canonical = canonicalFragments(fragments, offset);
    // A file that is one hole has no place in the tar; it is put where the file before it ends.
    if (start === 0) start = dataEnd;
    if (canonical !== undefined) sparse.set(size.length, canonical);
    size.push(offset);
    base.push(start);
    dataEnd = paddedEnd(start, canonical, offset);
  }
  return { count: size.length, size: Float64Array.from(size), base: Float64Array.from(base), sparse };
}

/** End of a file's content in the tar with its padding: where the next header stands. */
export function paddedEnd(base: number, fragments: readonly Fragment[] | undefined, size: number): number {
  let bytes = size;
  if (fragments !== undefined) {
    bytes = 0;
    for (const fragment of fragments) bytes += fragment.length;
  }
  return base + Math.ceil(bytes / 512) * 512;
}
