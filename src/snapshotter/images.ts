// What the snapshots service needs of the data path: is a layer lazily loadable, and where is the merged image of
// consecutive lazy layers mounted. Implemented over gRPC by dedupd-client.ts; it never carries image bytes.
import { DedupError } from '../errors.ts';

/** Identity of a lazy layer: proto/dedupd.proto, LayerKey. `index` and `scope` are "" when not known. */
export interface LayerKey {
  readonly digest: string;
  readonly index: string;
  readonly scope: string;
}

/** A place a layer can be read from. */
export interface Source {
  readonly host: string;
  readonly repository: string;
}

export interface PrepareLayerArgs {
  readonly layer: LayerKey;
  /** At least one. */
  readonly sources: readonly Source[];
  /** Digest of the image's manifest; "" when not known. */
  readonly manifest: string;
  readonly siblings: readonly LayerKey[];
  /** What may be spent on the network, milliseconds. */
  readonly budgetMs: number;
}

export interface PrepareLayerResult {
  readonly lazy: boolean;
  /** Why not, for the log. */
  readonly reason: string;
  /** As stored, with index and scope filled in. */
  readonly layer: LayerKey;
}

/** One lower of a snapshot below a merged image: a layer unpacked on disk, or another merged image (bottom to top). */
export type Below =
  | { readonly kind: 'directory'; readonly path: string }
  | { readonly kind: 'layers'; readonly layers: readonly LayerKey[] };

export interface MountImageArgs {
  /** Bottom to top. */
  readonly layers: readonly LayerKey[];
  /** True when nothing lies below: whiteouts are resolved away. */
  readonly bottom: boolean;
  /** Top to bottom; empty when `bottom`. Directories that no layer describes look as they do there. */
  readonly below: readonly Below[];
}

export interface MountedImage {
  /** Mount point; stable for the same layers. */
  readonly path: string;
  readonly mountId: number;
  /** Owner of the image's root directory; root when absent. */
  readonly rootUid?: number;
  readonly rootGid?: number;
}

/** An ordinary layer that is to be converted: proto/dedupd.proto, ConvertLayerRequest. */
export interface ConvertLayerArgs {
  /** Number of its snapshot. */
  readonly snapshot: number;
  /** Absolute path of the layer as containerd unpacked it, an upper directory of overlayfs. */
  readonly directory: string;
  /** True when nothing lies below it. */
  readonly bottom: boolean;
  /** Digest of the compressed layer, and of the image's manifest; "" when not known. */
  readonly layer: string;
  readonly manifest: string;
  readonly sources: readonly Source[];
  /** containerd's namespace; "" when not known. */
  readonly namespace: string;
  /** Of the layer and those below it; "" when not known. */
  readonly chainId: string;
  /** Of those below it; "" when there are none, or it is not known. */
  readonly parentChainId: string;
  /** There must be room for so many bytes, or nothing is read. */
  readonly bytes: number;
}

/** Layers that no snapshot names and that dedupd keeps for the time being: proto/dedupd.proto, RetainLayersResponse. */
export interface WaitingLayers {
  readonly waiting: number;
  /** When to ask again, milliseconds from now; 0: nobody can tell. */
  readonly againMs: number;
}

/** How far a conversion has come: what was read so far. */
export interface ConvertProgress {
  readonly bytes: number;
  /** Of the directory; 0 while a compressed layer is read. */
  readonly entries: number;
  /** What `bytes` comes to, about; 0 when not known. */
  readonly total: number;
  /** Why nothing is done at the moment; "" while something is. */
  readonly held: string;
}

export interface ImageMounter {
  /** Errors: UNAVAILABLE, DEADLINE when nobody would answer a call now. */
  answers(): Promise<void>;
  /** Errors: UNAVAILABLE, DEADLINE and those of the registry. A layer that is not lazily loadable is not an error. */
  prepareLayer(args: PrepareLayerArgs): Promise<PrepareLayerResult>;
  /**
   * Mounts the merged image of `layers`; the same layers over the same give the same mount.
   * Errors: UNAVAILABLE, DEADLINE, IMAGE_INVALID.
   */
  mountImage(args: MountImageArgs): Promise<MountedImage>;
  /** Unmounts every merged image but these. */
  releaseImages(inUse: readonly number[]): Promise<void>;
  /** Drops every layer but these, and those that somebody is about to use: answers with them. */
  retainLayers(layers: readonly LayerKey[]): Promise<WaitingLayers>;
  /** Bytes and inodes that the layer stands for. Errors: NOT_FOUND for a layer that dedupd does not know. */
  confirmLayer(layer: LayerKey): Promise<void>;
  layerUsage(layer: LayerKey): Promise<{ bytes: number; inodes: number }>;
  /**
   * Reads an unpacked layer, stores its content, and answers what it is from now on: once all of it is on the disk, since
   * the directory is deleted afterwards. The signal ends it and leaves nothing. STORE_FULL without any progress: nothing was
   * read, because there is no room.
   * Errors: LAYER_NOT_LAZY when it can never be done; STORE_FULL, STORE_IO, UNAVAILABLE, CANCELLED, UNIMPLEMENTED.
   */
  convertLayer(
    args: ConvertLayerArgs,
    onProgress: (progress: ConvertProgress) => void,
    signal: AbortSignal,
  ): Promise<LayerKey>;
  /** Builds the merged image of `layers`, bottom to top and nothing below, before somebody mounts it. Errors as mountImage. */
  prebuildImage(layers: readonly LayerKey[]): Promise<void>;
}

/** The mounter of a node without dedupd: every layer is ordinary, lazy ones that exist answer UNAVAILABLE. */
export function noImages(reason: string): ImageMounter {
  const unavailable = async (): Promise<never> => {
    throw new DedupError('UNAVAILABLE', `lazily loaded layers are not available: ${reason}`);
  };
  return {
    answers: async () => {},
    prepareLayer: async ({ layer }) => ({ lazy: false, reason, layer }),
    mountImage: unavailable,
    releaseImages: async () => {},
    retainLayers: async () => ({ waiting: 0, againMs: 0 }),
    confirmLayer: unavailable,
    layerUsage: unavailable,
    convertLayer: unavailable,
    prebuildImage: unavailable,
  };
}
