// What callers give to and get from the node store. Types only.
import type { Logger } from '../../log.ts';
import type { RootPaths } from '../../paths.ts';
import type { ReadStoreJob, StorePiecesJob, StoreRead } from '../native.ts';
import type { ImageDevice } from './direct-mounts.ts';
import type { ChunkTotals, LayerSourceName, LayerTrust } from './index-protocol.ts';

/** What the store needs of the native addon. */
export interface StoreNative {
  presenceCreate(storeBytes: number): Uint8Array;
  touchedCreate(storeBytes: number): Uint32Array;
  presenceSet(presence: Uint8Array, firstBlock: number, count: number, value: boolean): void;
  presenceTest(presence: Uint8Array, firstBlock: number, count: number): boolean;
  presenceClearEpoch(): number;
  findHoles(fd: number, ranges: Float64Array): Promise<Float64Array>;
  punchHole(fd: number, offset: number, length: number): Promise<void>;
  storePieces(job: StorePiecesJob): Promise<Uint8Array>;
  readStore(job: ReadStoreJob): Promise<StoreRead>;
}

export interface NodeStoreOptions {
  readonly paths: RootPaths;
  readonly native: StoreNative;
  readonly log: Logger;
  /** Size of a new store, bytes; an existing one must have it. Default 4 TiB. */
  readonly storeBytes?: number;
  /** Presence is flushed after this time or this many bytes. */
  readonly flushDelayMs?: number;
  readonly flushBytes?: number;
  /** Budget for what is present, bytes in whole blocks; 0: none. Default 0. */
  readonly quotaBytes?: number;
  /** What was stored or read within this time is not evicted, milliseconds. Default 10 s. */
  readonly keepUsedMs?: number;
  /** Addresses whose chunks are gone are not given again within this time, milliseconds. Default 5 s. */
  readonly quarantineMs?: number;
  /**
   * Numbers of the images of the store called `storeId` that anybody on this machine still has mounted, whether they have
   * a row or not. Absent: not known, and no address is ever given again. Errors: whatever keeps it from being known.
   */
  readonly livingImages?: (storeId: string) => Promise<ReadonlySet<number>>;
  /** Devices of this machine that images of the store called so are read through. Absent: there are none. */
  readonly devices?: (storeId: string) => Promise<readonly ImageDevice[]>;
  /** Disk space kept back so that a full disk can still be cleaned, bytes. Default 16 MiB. */
  readonly reserveBytes?: number;
}

/** How a layer is to be stored. */
export interface AddLayerOptions {
  /** "" for the whole node, "host", or "host/repository" (configuration key `dedup_scope`). */
  readonly scope: string;
  /** Digest of the index blob: part of the layer's identity. */
  readonly indexDigest: string;
  readonly sources: readonly LayerSourceName[];
  readonly trust: LayerTrust;
  /** Image reference, for people. */
  readonly reference?: string;
  /** True for the layout of kernels before 5.15: every file in one run, zero chunks included. */
  readonly contiguousFiles: boolean;
}

/** How the chunks of a layer are kept while it is read. */
export interface KeepChunksOptions {
  readonly scope: string;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  /**
   * For a layer that nobody waits for: asked before so many bytes are stored; where it rejects, or the disk is full,
   * nothing is stored, and nobody's pieces are evicted for it. Absent: on a full disk others are.
   */
  readonly requireRoom?: ((bytes: number) => Promise<void>) | undefined;
}

/** A layer and the store address of every chunk of its table (0: a zero chunk without a place). */
export interface StoredLayer {
  readonly layerId: number;
  readonly addresses: Float64Array;
}

/** A piece to be verified and written. */
export interface PieceToStore {
  /** Address of the chunk's placement, bytes. */
  readonly chunkAddress: number;
  /** Number of the piece in its chunk, and how many the chunk has. */
  readonly piece: number;
  readonly pieceCount: number;
  /** Bytes of the whole chunk. */
  readonly chunkBytes: number;
  /** Where the piece goes, bytes, 4 KiB aligned. */
  readonly address: number;
  readonly offset: number;
  readonly length: number;
  /** 32 bytes. */
  readonly digest: Uint8Array;
}

export interface NodeStoreStats extends ChunkTotals {
  /** Bytes written to the store since it was opened. */
  readonly storedBytes: number;
  /** Pieces that did not have their digest. */
  readonly mismatches: number;
  /** Reads that met blocks which the disk had changed; they are fetched again. */
  readonly damagedReads: number;
  /** Bytes of chunks that may be served, in whole blocks. */
  readonly presentBytes: number;
  readonly nextAddress: number;
  readonly generation: number;
  /** Pieces evicted since the store was opened, and their bytes in whole blocks. */
  readonly evictedPieces: number;
  readonly evictedBytes: number;
}
