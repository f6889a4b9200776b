// SHA-256 names of chunks that hold only zeros. Builder and decoder derive them, so that an index cannot give such a
// chunk another chunk's name.
import { createHash, hash } from 'node:crypto';

/**
 * Digests of `length` zeros for every tail length asked for, at the cost of hashing the longest of them once.
 * Shapes: distinct lengths in bytes → 32 raw bytes.
 */
export function zeroPieceDigests(lengths: Iterable<number>): Map<number, Buffer> {
  const sorted = [...new Set(lengths)].sort((a, b) => a - b);
  const zeros = Buffer.alloc(64 * 1024);
  const running = createHash('sha256');
  const digests = new Map<number, Buffer>();
  let hashed = 0;
  for (const length of sorted) {
    while (hashed < length) {
      const step = Math.min(zeros.length, length - hashed);
      running.update(zeros.subarray(0, step));
      hashed += step;
    }
    digests.set(length, running.copy().digest());
  }
  return digests;
}

/** Name of a chunk whose piece digests are `pieces` (32 bytes each, joined): a single one's own, else their SHA-256. */
export function chunkName(pieces: Buffer): Buffer {
  return pieces.length === 32 ? pieces : hash('sha256', pieces, 'buffer');
}
