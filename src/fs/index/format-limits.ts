// Numbers of the layer index format that its encoder, decoder and builder share. docs/formats/layer-index.md lists them.
import { KiB, MiB, TiB } from '../../units.ts';

export const INDEX_MAGIC = Buffer.from('\x89DDLIX\r\n', 'latin1');
export const INDEX_VERSION = 1;
/** Bytes of the fixed header, before the section table. */
export const HEADER_BYTES = 200;
export const SECTION_BYTES = 24;

/** Sections in the order they stand in the blob. */
export const SECTION_NAMES = ['files', 'pieces', 'spans', 'entries'] as const;
export type SectionName = (typeof SECTION_NAMES)[number];

/** Largest index blob that is fetched or decoded, and largest section after decompression, bytes. */
export const MAX_INDEX_BYTES = 256 * MiB;
export const MAX_SECTION_BYTES = 1024 * MiB;
export const MAX_ENTRIES = 1 << 24;
export const MAX_CHUNKS = 1 << 24;
export const MAX_PIECES = 1 << 23;
/** Chunks of zeros cost nothing in the blob; this bounds what a few bytes of it can make a decoder allocate. */
export const MAX_ZERO_CHUNKS = 1 << 18;
export const MAX_FRAGMENTS = 1 << 22;
export const MAX_SPANS = 1 << 24;
export const MAX_XATTR_SETS = 1 << 20;
/** Uncompressed and compressed size of a layer, bytes. */
export const MAX_TAR_BYTES = 8 * TiB;
export const MAX_WINDOW_BYTES = 40 * KiB;
export const MIN_CHUNK_BYTES = 4 * KiB;
export const MAX_CHUNK_BYTES = 64 * MiB;
export const MIN_SPAN_BYTES = 64 * KiB;
export const MAX_SPAN_BYTES = 16 * MiB;
/** A zstd frame with more output than this cannot be started in the middle, so it is not lazily loadable, bytes. */
export const MAX_ZSTD_FRAME_BYTES = 8 * MiB;
/** Most output of one span, bytes: a gzip block longer than this cannot be loaded lazily. */
export const MAX_SPAN_OUTPUT_BYTES = 64 * MiB;
