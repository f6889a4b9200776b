// Passes a blob's bytes on while checking their number, and their digest at the end. Every readAll goes through here.
import { createHash } from 'node:crypto';
import { type Digest, digestOf } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import type { ByteRange } from '../../units.ts';
import type { BlobId, Repository } from './blob-reader.ts';

/** A range as a stream of unverified bytes: what wrappers need to go on where a broken stream ended. */
export interface RangeStreamer {
  /** Exactly `range.length` bytes of the blob from `range.offset`, or an error. Errors as BlobReader.readRange. */
  streamRange(blob: BlobId, range: ByteRange, signal: AbortSignal): AsyncIterable<Buffer>;
}

/** What every Repository of this folder is. */
export type StreamingRepository = Repository & RangeStreamer;

/** Errors: those of `source`; REGISTRY_PROTOCOL for more or fewer bytes than `blob.size`; DIGEST_MISMATCH. */
export async function* verified(blob: BlobId, source: AsyncIterable<Buffer>, from: string): AsyncGenerator<Buffer> {
  const hash = createHash('sha256');
  let length = 0;
  for await (const chunk of source) {
    length += chunk.length;
    if (length > blob.size) throw wrongLength(blob, `more than ${blob.size}`, from);
    hash.update(chunk);
    yield chunk;
  }
  if (length !== blob.size) throw wrongLength(blob, `${length} instead of ${blob.size}`, from);
  const actual = `sha256:${hash.digest('hex')}`;
  if (actual !== blob.digest) {
    throw new DedupError('DIGEST_MISMATCH', `blob ${blob.digest} from ${from} has the digest ${actual}`);
  }
}

/** The bytes themselves. Errors: DIGEST_MISMATCH. */
export function verifiedBlob(digest: Digest, bytes: Buffer, from: string): Buffer {
  const actual = digestOf(bytes);
  if (actual === digest) return bytes;
  throw new DedupError('DIGEST_MISMATCH', `blob ${digest} from ${from} has the digest ${actual}`);
}

function wrongLength(blob: BlobId, what: string, from: string): DedupError {
  return new DedupError('REGISTRY_PROTOCOL', `blob ${blob.digest} from ${from} has ${what} bytes`);
}

/** Refuses a range outside the blob, before anything is asked for. Errors: INVALID_ARGUMENT. */
export function checkRange(blob: BlobId, range: ByteRange): void {
  const { offset, length } = range;
  const whole = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && Number.isSafeInteger(blob.size);
  if (!whole || offset < 0 || length < 0 || offset + length > blob.size) {
    throw new DedupError(
      'INVALID_ARGUMENT',
      `range of ${length} bytes at ${offset} is outside of blob ${blob.digest} (${blob.size} bytes)`,
    );
  }
}
