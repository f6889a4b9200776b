// Cuts bytes where their content says so: FastCDC with normalized chunking (Xia et al., "The Design of Fast Data
// Deduplication via Normalized Chunking", IEEE TPDS 2020), for comparing it with chunks at fixed offsets. Not part of the product.
import { createHash } from 'node:crypto';

/** Normalization level of the paper's best configuration: that many bits more before the average, and fewer after it. */
const NORMALIZATION = 2;

/** The paper's proportions of shortest, average and longest chunk: 2, 8 and 64 KiB. */
const SHORTEST = 1 / 4;
const LONGEST = 8;

/** A random number for each byte value, the same everywhere. Of 32 bits: a hash of 32 bytes, which JavaScript adds in one step. */
const GEAR = Int32Array.from({ length: 256 }, (_, byte) =>
  createHash('sha256').update(`gear ${byte}`).digest().readInt32LE(0),
);

/** The highest bits depend on the most bytes, so they decide. */
function mask(bits: number): number {
  return -(2 ** (32 - bits)) | 0;
}

/** `averageBytes` is a power of two from 1 KiB to 16 MiB. Answers the end of each chunk; the last one is the end of the bytes. */
export function fastCdc(bytes: Uint8Array, averageBytes: number): number[] {
  const averageBits = Math.log2(averageBytes);
  if (!Number.isInteger(averageBits)) throw new Error(`an average chunk of ${averageBytes} bytes: not a power of two`);
  const [hard, easy] = [mask(averageBits + NORMALIZATION), mask(averageBits - NORMALIZATION)];
  const ends: number[] = [];
  for (let start = 0; start < bytes.length; ) {
    const left = bytes.length - start;
    // No cut is looked for in the first part: the paper's "cut-point skipping".
    const first = start + Math.min(left, averageBytes * SHORTEST);
    const middle = start + Math.min(left, averageBytes);
    const last = start + Math.min(left, averageBytes * LONGEST);
    let hash = 0;
    let at = first;
    let end = last;
    for (; at < middle; at++) {
      hash = ((hash << 1) + GEAR[bytes[at]!]!) | 0;
      if ((hash & hard) === 0) break;
    }
    if (at === middle) {
      for (; at < last; at++) {
        hash = ((hash << 1) + GEAR[bytes[at]!]!) | 0;
        if ((hash & easy) === 0) break;
      }
    }
    if (at < last) end = at + 1;
    ends.push(end);
    start = end;
  }
  return ends;
}

/** The same for chunks of one size. */
export function fixedChunks(bytes: Uint8Array, chunkBytes: number): number[] {
  const ends: number[] = [];
  for (let end = chunkBytes; end < bytes.length; end += chunkBytes) ends.push(end);
  if (bytes.length > 0) ends.push(bytes.length);
  return ends;
}
