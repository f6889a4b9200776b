// Where things lie in the store file: constants shared by the store, its database and the transports. No behaviour.
import { GiB, KiB, MiB, TiB } from '../../units.ts';

/** Size of the sparse store file, bytes. Recorded when the store is made and never changed. */
export const DEFAULT_STORE_BYTES = 4 * TiB;

/** Never assigned and answered with zeros: what blkid and partition scans read at the start of a device. */
export const STORE_HEAD_BYTES = MiB;

/** Never assigned and answered with zeros: what blkid and partition scans read at the end of a device. */
export const STORE_TAIL_BYTES = 4 * MiB;

/** Bytes of the store for each byte of its sums: four for a block of 4 KiB. */
export const BYTES_PER_SUM = 1024;

/** Address of the first chunk. Below it: the head, metadata of images for kernels before 5.16, the store header. */
export const FIRST_CHUNK_ADDRESS = 64 * GiB;

/** Address of the store header: the last block of the reserved region, which no image metadata uses. */
export const HEADER_ADDRESS = FIRST_CHUNK_ADDRESS - 4 * KiB;

/** The recorded limit of given addresses runs ahead of them in steps of this many bytes. */
export const HIGH_WATER_STEP = GiB;

/** Pieces of a chunk that the database can record one by one; chunks with more are recorded only when complete. */
export const MAX_MASKED_PIECES = 31;
