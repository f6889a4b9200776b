// What the data path needs of a registry or an OCI layout: exact byte ranges of named blobs. Declared by its consumers
// (LazyLoader, index discovery); implemented by http-blob.ts and oci-layout.ts, wrapped by retrying.ts and mirrored.ts.
import type { Digest } from '../../digest.ts';
import type { ByteRange } from '../../units.ts';

/** Digest and size of a blob, as its descriptor says. */
export interface BlobId {
  readonly digest: Digest;
  readonly size: number;
}

/**
 * Takes the bytes of range number `index`; the buffer is the receiver's. What it throws ends the call it was given to;
 * parts that are under way on other connections may still be told.
 */
export type OnPart = (index: number, bytes: Buffer) => void;

export interface BlobReader {
  /**
   * Exactly the bytes of `range`, which must lie within the blob. The bytes are not verified.
   * Errors: REGISTRY_HTTP, REGISTRY_AUTH, REGISTRY_NOT_FOUND, REGISTRY_PROTOCOL, DEADLINE, CANCELLED.
   */
  readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer>;
  /**
   * Exactly the bytes of each of `ranges` (not overlapping, within the blob), in one request where the registry can, and in
   * the order given as a rule. `onPart(i, bytes)` is called once for each, as soon as its bytes are here. The bytes are not
   * verified. Errors as readRange; parts told before stay told.
   */
  readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void>;
  /**
   * The whole blob as a stream of exactly `blob.size` bytes; ends with DIGEST_MISMATCH when they do not have the
   * digest. Errors as readRange.
   */
  readAll(blob: BlobId, signal: AbortSignal): AsyncIterable<Buffer>;
}

/** A manifest or image index as stored: its bytes are what the digest names. */
export interface ManifestBytes {
  readonly digest: Digest;
  readonly mediaType: string;
  readonly bytes: Buffer;
}

/** One repository that images are read from and pushed to. */
export interface Repository extends BlobReader {
  /** "host/repository", for messages. */
  readonly name: string;
  readonly host: string;
  readonly path: string;
  /** Errors: REGISTRY_NOT_FOUND and those of readRange; DIGEST_MISMATCH when asked for by digest. */
  getManifest(tagOrDigest: string, signal: AbortSignal): Promise<ManifestBytes>;
  /** Says that blobs will be read in a moment: connections may be opened meanwhile. Never fails. */
  expectReads(): void;
  hasBlob(blob: Digest, signal: AbortSignal): Promise<boolean>;
  /**
   * A whole blob of at most `maxBytes` whose size nobody has told, in one request; verified. Errors: those of readRange,
   * DIGEST_MISMATCH, REGISTRY_PROTOCOL when it is larger.
   */
  readBlob(digest: Digest, maxBytes: number, signal: AbortSignal): Promise<Buffer>;
  putBlob(digest: Digest, bytes: Uint8Array, signal: AbortSignal): Promise<void>;
  /** Pushes under a tag or digest; true when the registry answered with an `OCI-Subject` header. */
  putManifest(
    tagOrDigest: string,
    mediaType: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<{ subjectKnown: boolean }>;
  /**
   * Manifests that name `subject` (referrers API, else the `sha256-<hex>` tag), of one artifact type; `created` (RFC 3339)
   * where the list says it.
   */
  referrers(
    subject: Digest,
    artifactType: string,
    signal: AbortSignal,
  ): Promise<{ digest: Digest; size: number; mediaType: string; created?: string }[]>;
  /** Requests and bytes received so far, for tables and tests. */
  readonly traffic: { readonly requests: number; readonly bytes: number };
}
