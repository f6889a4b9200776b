// Content digests as branded strings, made by one parser. SHA-256 only: the OCI image spec requires it of every
// implementation, and registries in use have nothing else.
import { createHash } from 'node:crypto';
import { DedupError } from './errors.ts';

/** `sha256:` followed by 64 lowercase hex digits. */
export type Digest = string & { readonly __digest: unique symbol };

const DIGEST = /^sha256:[0-9a-f]{64}$/;

export function isDigest(text: string): text is Digest {
  return DIGEST.test(text);
}

/** Parses `sha256:<hex>`. Errors: INVALID_ARGUMENT. Source: OCI image spec, descriptor.md, "Digests". */
export function parseDigest(text: string): Digest {
  if (!isDigest(text)) {
    throw new DedupError('INVALID_ARGUMENT', `not a SHA-256 digest: ${JSON.stringify(text.slice(0, 100))}`);
  }
  return text;
}

/** The digest of `bytes`. */
export function digestOf(bytes: Uint8Array | string): Digest {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}` as Digest;
}

/** A digest from its 32 raw bytes. Errors: INVALID_ARGUMENT for another length. */
export function digestFromBytes(raw: Uint8Array): Digest {
  if (raw.length !== 32) throw new DedupError('INVALID_ARGUMENT', `a SHA-256 digest has 32 bytes, not ${raw.length}`);
  return `sha256:${Buffer.from(raw.buffer, raw.byteOffset, 32).toString('hex')}` as Digest;
}

/** The 32 raw bytes of a digest. */
export function digestBytes(digest: Digest): Buffer {
  return Buffer.from(digest.slice(7), 'hex');
}

/** The 64 hex digits of a digest, for file names. */
export function digestHex(digest: Digest): string {
  return digest.slice(7);
}
