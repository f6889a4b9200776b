// The decoded lazy index of a layer: tables of typed arrays, shared by the image builder, the node store and the
// LazyLoader. format.ts encodes and decodes it; builder.ts makes it from a layer. See docs/formats/layer-index.md.
import type { Digest } from '../../digest.ts';

export type Compression = 'none' | 'gzip' | 'zstd';

/** Types of entries. Values are part of the format. */
export const EntryType = {
  file: 0,
  hardLink: 1,
  symlink: 2,
  charDevice: 3,
  blockDevice: 4,
  directory: 5,
  fifo: 6,
} as const;
export type EntryTypeValue = (typeof EntryType)[keyof typeof EntryType];

/**
 * Every tar member in tar order, as columns; index i is one member. Names and link targets are raw bytes held as
 * latin1 strings. Names are cleaned: no leading "/" or "./", no trailing "/", no empty, "." or ".." component; the
 * root directory itself is "". Whiteouts (`.wh.*`) are ordinary entries here; merging resolves them.
 */
export interface EntryTable {
  readonly count: number;
  readonly type: Uint8Array;
  readonly name: readonly string[];
  /** Symlink target verbatim, or cleaned path of a hard link's target; "" otherwise. */
  readonly link: readonly string[];
  /** Permission bits, setuid, setgid, sticky: 12 bits. */
  readonly mode: Uint16Array;
  readonly uid: Uint32Array;
  readonly gid: Uint32Array;
  /** Seconds since the epoch (may be negative) and nanoseconds [0, 1e9). */
  readonly mtimeSec: Float64Array;
  readonly mtimeNsec: Uint32Array;
  /** Bytes of a regular file, logical size of a sparse one; 0 otherwise. */
  readonly size: Float64Array;
  readonly devMajor: Uint32Array;
  readonly devMinor: Uint32Array;
  /** Chunks of a file: [firstChunk, firstChunk + chunkCount) of the chunk table. Every chunk but the last is chunkBytes. */
  readonly firstChunk: Uint32Array;
  readonly chunkCount: Uint32Array;
  /** Number of an xattr set, or 0xffffffff for none. */
  readonly xattrSet: Uint32Array;
  /** Distinct sets of extended attributes: full names ("security.capability") as latin1, raw values. */
  readonly xattrSets: readonly (readonly { readonly name: string; readonly value: Buffer }[])[];
}

/** Chunks in the order of their files. A chunk is part of one file's content, at most chunkBytes. */
export interface ChunkTable {
  readonly count: number;
  /** 32 bytes per chunk: SHA-256 of the content (one piece) or of the concatenated piece digests (several). */
  readonly digest: Uint8Array;
  readonly length: Uint32Array;
  /** Offset of its content in the uncompressed tar; NaN-free; for a sparse chunk the offset of its first fragment. */
  readonly tarOffset: Float64Array;
  /** Pieces of chunk i: [pieceStart[i], pieceStart[i + 1]); length count + 1. */
  readonly pieceStart: Uint32Array;
  /** 32 bytes per piece. For a chunk of one piece it equals the chunk's digest. */
  readonly pieceDigest: Uint8Array;
  /**
   * Fragments of a sparse chunk i: [fragmentStart[i], fragmentStart[i + 1]); none for an ordinary chunk, whose
   * content is contiguous at tarOffset. Bytes of a sparse chunk outside its fragments are zeros.
   */
  readonly fragmentStart: Uint32Array;
  readonly fragmentChunkOffset: Uint32Array;
  readonly fragmentTarOffset: Float64Array;
  readonly fragmentLength: Uint32Array;
  /** 1 when every byte of the chunk is zero: never stored, never fetched; a hole in EROFS. */
  readonly zero: Uint8Array;
}

/** Restart points: span i covers uncompressed [outOffset[i], outOffset[i+1]) and compressed [inOffset[i], inOffset[i+1]]. */
export interface SpanTable {
  readonly count: number;
  readonly outOffset: Float64Array;
  readonly inOffset: Float64Array;
  readonly bits: Uint8Array;
  readonly memberStart: Uint8Array;
  /** Where the compressed 32 KiB window lies in the restart blob; length 0 when the span needs none. */
  readonly windowOffset: Float64Array;
  readonly windowLength: Uint32Array;
}

export interface LayerIndex {
  readonly layerDigest: Digest;
  readonly layerBytes: number;
  readonly diffId: Digest;
  readonly tarBytes: number;
  readonly compression: Compression;
  readonly spanBytes: number;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  /** The blob that holds framing and windows, read by range; see docs/formats/layer-index.md. */
  readonly restart: { readonly digest: Digest; readonly size: number; readonly framingLength: number };
  readonly entries: EntryTable;
  readonly chunks: ChunkTable;
  readonly spans: SpanTable;
}

/** Annotation on a layer descriptor whose value is the digest of the layer's index blob. */
export const INDEX_ANNOTATION = 'containerd.io/snapshot/dedup.index';
/** Artifact type of the manifest that holds the index blobs of an image. */
export const INDEX_ARTIFACT_TYPE = 'application/vnd.dedup-snapshotter.index.v1';
export const INDEX_LAYER_MEDIA_TYPE = 'application/vnd.dedup-snapshotter.layer-index.v1';
export const RESTART_LAYER_MEDIA_TYPE = 'application/vnd.dedup-snapshotter.layer-restart.v1';
/** Annotation on a blob of that manifest: the digest of the layer that the index or restart blob belongs to. */
export const INDEXED_LAYER_ANNOTATION = 'containerd.io/snapshot/dedup.layer';
/**
 * Annotation on the artifact's descriptor in an image index; its value is INDEX_ARTIFACT_TYPE. In place of the field
 * `artifactType`, which tools from before OCI 1.1 drop when they copy (skopeo 1.9), changing the index's digest.
 */
export const ARTIFACT_ANNOTATION = 'containerd.io/snapshot/dedup.artifact';
