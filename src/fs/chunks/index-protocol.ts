// Messages between IndexDb (main thread) and the worker that owns index.db for writing. Types only.

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
  /** Chunks that were not known before. */
  readonly newChunks: number;
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
  readonly toPunch: readonly StoreRange[];
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
  readonly reference: string;
  /** Layer ids, bottom to top. */
  readonly layers: readonly number[];
}

export interface ChunkTotals {
  readonly chunks: number;
  readonly chunkBytes: number;
  readonly sharedChunks: number;
  readonly sharedBytes: number;
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
  markDurable: { args: DurablePieces; result: null };
  /** Committed with synchronous=FULL. */
  dropPresence: { args: { ranges: readonly StoreRange[]; generation: number }; result: null };
  createImage: { args: { key: string; layers: readonly number[]; reference: string }; result: ImageRecord };
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
