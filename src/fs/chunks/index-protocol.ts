// Messages between IndexDb (main thread) and the worker that owns index.db for writing. Types only.
import type { AddressSpaceUse } from './free-space.ts';

/** A registry repository that holds a layer. */
export interface LayerSourceName {
  readonly host: string;
  readonly repository: string;
}

/** How an index came to be believed (configuration key `index_trust`). */
export type LayerTrust = 'annotation' | 'local' | 'referrer';

/** Identity of a layer on this node. The index digest is part of it: two indexes of one layer may say different things. */
export interface LayerName {
  readonly scope: string;
  readonly digest: string;
  readonly indexDigest: string;
}

/** A layer row. */
export interface LayerRecord extends LayerName {
  readonly id: number;
  /** Compressed bytes. */
  readonly size: number;
  readonly diffId: string;
  readonly restartDigest: string;
  readonly restartSize: number;
  readonly chunkCount: number;
  readonly contiguous: boolean;
  readonly reference: string;
  readonly trust: LayerTrust;
  /** True when the whole layer matched its diffID. */
  readonly verified: boolean;
  readonly condemned: boolean;
  readonly sources: readonly LayerSourceName[];
}

export interface NewLayer extends LayerName {
  readonly size: number;
  readonly diffId: string;
  readonly restartDigest: string;
  readonly restartSize: number;
  readonly reference: string;
  readonly trust: LayerTrust;
  readonly sources: readonly LayerSourceName[];
  /** 32 bytes per chunk. */
  readonly digests: Uint8Array;
  readonly lengths: Uint32Array;
  readonly zero: Uint8Array;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  /**
   * Present for the layout of kernels before 5.15: first chunk and number of chunks of every file, alternating. Each
   * such file gets one contiguous run, and zero chunks get addresses too.
   */
  readonly files: Uint32Array | undefined;
}

export interface AddedLayer {
  readonly layerId: number;
  /** Store address of every chunk of the layer's table; 0 for a zero chunk that has none. */
  readonly addresses: Float64Array;
  readonly existed: boolean;
  /** First address that is not yet given. */
  readonly nextAddress: number;
}

/** Pieces that reached the disk: `blocks[i]` is the first block of a placement, `masks[i]` its pieces, -1 for all. */
export interface DurablePieces {
  readonly blocks: Float64Array;
  readonly masks: Int32Array;
}

/** A byte range of the store. */
export interface StoreRange {
  readonly address: number;
  readonly length: number;
}

export interface OpenRequest {
  readonly file: string;
  readonly storeId: string;
  readonly storeBytes: number;
  readonly generation: number;
  readonly pendingGeneration: number;
  /** The generation that begins with this start, announced by the header. */
  readonly nextGeneration: number;
  readonly highWater: number;
  /** Generation in which ranges were last made free to be given again; 0: never. */
  readonly reuseGeneration: number;
  /** Numbers of images that are in use on this machine: none of them is given again. Undefined: not known. */
  readonly livingImages: readonly number[] | undefined;
  /** True when a device of this machine reads the store file itself. */
  readonly directReaders: boolean;
  /** False when the sums of the store's blocks are new: recorded presence cannot be checked. */
  readonly summed: boolean;
}

export interface OpenAnswer {
  readonly generation: number;
  readonly nextAddress: number;
  /** Why recorded presence was dropped at open; empty when it was kept. */
  readonly dropped: string;
  /** Where a damaged database was moved to; empty when it was sound. */
  readonly movedTo: string;
  /** Durable block ranges: first block and count, alternating, ascending and joined. */
  readonly durable: Float64Array;
  /** Ranges whose rows are gone but which may not be punched yet. */
  /** Ranges without a chunk in which a crash may have left bytes. */
  readonly unowned: readonly StoreRange[];
  readonly toPunch: readonly StoreRange[];
  /** Ranges of pieces that were evicted but may not be punched yet. */
  readonly evicted: readonly StoreRange[];
  /**
   * To images that no row names, up to this number, an address may mean another chunk than it means to the database: they
   * were made after the copy of it that was put back, and addresses were given again meanwhile. 0: to none.
   */
  readonly foreignImages: number;
}

/** Where a page of cold chunks begins: behind a chunk in the order of use, or behind a further placement. */
export interface ColdCursor {
  readonly kind: 'chunks' | 'placements';
  readonly lastUsed: number;
  readonly block: number;
}

export interface ColdChunksRequest {
  readonly after: ColdCursor;
  /** Seconds since 1970: what was used later is left alone. */
  readonly usedBefore: number;
  readonly limit: number;
  /** Chunks and when they were used after all, alternating. */
  readonly used: Float64Array;
}

export interface ColdChunks {
  /** Six numbers each: first block, bytes, bytes of a piece, durable pieces (-1 all), last use, chunk. */
  readonly rows: Float64Array;
  /** Where the next page begins; undefined behind the last one. */
  readonly next: ColdCursor | undefined;
}

/** Pieces to evict: those in `masks[i]` of the placement at `blocks[i]`, which lie in the i-th of `ranges`. */
export interface EvictRequest {
  readonly blocks: Float64Array;
  readonly masks: Int32Array;
  /** First block and number of blocks, alternating. */
  readonly ranges: Float64Array;
  readonly generation: number;
}

/** What an image needs of the store. */
export interface ImageUse {
  readonly id: number;
  /** Bytes of its distinct chunks, and of those that another image uses too. */
  readonly totalBytes: number;
  readonly sharedBytes: number;
  readonly pinned: boolean;
  /** True when a mount of it reads the store without us. */
  readonly direct: boolean;
  /** First block and bytes of each chunk, alternating. */
  readonly chunks: Float64Array;
}

export interface DroppedLayers {
  readonly dropped: readonly number[];
  /** Named for dropping, but a mount pins them. */
  readonly pinned: readonly number[];
  readonly ranges: readonly StoreRange[];
}

/** Chunks of a layer that is still being read. */
export interface ChunksToHold {
  /** Number of the hold, the caller's choice. */
  readonly hold: number;
  readonly scope: string;
  /** 32 bytes per chunk. */
  readonly digests: Uint8Array;
  readonly lengths: Uint32Array;
  readonly pieceBytes: number;
}

/** A mount whose data device reads the store itself. */
export interface DirectMount {
  readonly imageId: number;
  /** What its device is called. */
  readonly loop: string;
  /** Path of the image's metadata file. */
  readonly metadata: string;
  readonly layers: readonly number[];
}

/** What of a layer is durable: first block and number of blocks, alternating. */
export interface LayerPresence {
  /** Chunks that are not wholly durable, but not more than tell; empty when all are. */
  readonly missing: Float64Array;
  /** If all are: the blocks they take, ascending and joined. */
  readonly ranges: Float64Array;
}

export interface ImageRecord {
  readonly id: number;
  readonly key: string;
  readonly state: 'building' | 'ready';
  readonly metadataBytes: number;
  /** Layer ids, bottom to top. */
  readonly layers: readonly number[];
}

export interface ChunkTotals {
  readonly chunks: number;
  readonly chunkBytes: number;
  readonly sharedChunks: number;
  readonly sharedBytes: number;
  /** Bytes that the layers would take without sharing: each chunk as often as layers use it. */
  readonly referencedBytes: number;
  /** Address space that was given back. */
  readonly freed: AddressSpaceUse;
}

/** Every call the worker answers: its arguments and its result. */
export interface IndexCalls {
  open: { args: OpenRequest; result: OpenAnswer };
  addLayer: { args: NewLayer; result: AddedLayer };
  holdChunks: { args: ChunksToHold; result: { addresses: Float64Array; nextAddress: number } };
  /** Lets go of the chunks of a hold; answers how many chunks no layer counts and nobody holds now. */
  releaseHold: { args: { hold: number }; result: number };
  /** Drops the rows of chunks that no layer counts and nobody holds. Committed with synchronous=FULL. */
  dropUnreferenced: { args: { generation: number }; result: readonly StoreRange[] };
  layers: { args: Record<string, never>; result: LayerRecord[] };
  /** Whether every chunk of the layer is durable; if so, what is committed is on the disk (synchronous=FULL). */
  confirmLayer: { args: { layerId: number }; result: boolean };
  layerAddresses: { args: { layerId: number }; result: Float64Array };
  addSources: { args: { layerId: number; sources: readonly LayerSourceName[] }; result: null };
  setLayerState: { args: { layerId: number; verified?: boolean; condemned?: boolean }; result: null };
  /** Committed with synchronous=FULL. */
  dropLayers: { args: { layerIds: readonly number[]; generation: number }; result: DroppedLayers };
  punched: { args: { ranges: readonly StoreRange[] }; result: null };
  quarantined: { args: Record<string, never>; result: readonly StoreRange[] };
  /** Committed with synchronous=FULL. */
  endQuarantine: { args: { ranges: readonly StoreRange[]; generation: number }; result: null };
  coldChunks: { args: ColdChunksRequest; result: ColdChunks };
  /** Committed with synchronous=FULL. */
  evict: { args: EvictRequest; result: Uint8Array };
  evictedPunched: { args: { blocks: Float64Array }; result: null };
  imageUse: { args: Record<string, never>; result: ImageUse[] };
  markDurable: { args: DurablePieces; result: null };
  createImage: { args: { key: string; layers: readonly number[]; ahead: boolean }; result: ImageRecord };
  imageReady: { args: { id: number; metadataBytes: number }; result: null };
  images: { args: Record<string, never>; result: ImageRecord[] };
  dropImage: { args: { id: number }; result: null };
  pin: { args: { mountId: number; layers: readonly number[] }; result: null };
  unpin: { args: { mountId: number }; result: null };
  /** Pins of mounts that read the store themselves stay, here and above. */
  unpinAll: { args: Record<string, never>; result: null };
  layerPresence: { args: { layerId: number }; result: LayerPresence };
  /** Committed with synchronous=FULL, pins included. */
  addDirect: { args: DirectMount; result: null };
  /** `pinned`: the image is mounted otherwise, and stays pinned. */
  dropDirect: { args: { imageId: number; pinned: boolean }; result: null };
  /** Images that are made from now on get higher numbers. */
  numberImagesAbove: { args: { imageId: number }; result: null };
  directMounts: { args: Record<string, never>; result: readonly number[] };
  totals: { args: Record<string, never>; result: ChunkTotals };
  checkpoint: { args: Record<string, never>; result: null };
  close: { args: Record<string, never>; result: null };
}

export type IndexOp = keyof IndexCalls;

export interface IndexCallMessage {
  readonly id: number;
  readonly op: IndexOp;
  readonly args: unknown;
}

export type IndexReplyMessage =
  | { readonly id: number; readonly result: unknown }
  | { readonly id: number; readonly error: { readonly code: string; readonly message: string } };
