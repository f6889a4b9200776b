// Layers that containerd unpacked, turned into chunks of the store in the background: read from containerd's own copy of
// the layer where that leaves an index behind, else from the directory it was unpacked into. Called by the control server;
// decides neither which layers nor when they are used.
import { type Digest, digestOf, isDigest } from '../digest.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { LayerRecord, LayerSourceName } from './chunks/index-protocol.ts';
import type { NodeStore } from './chunks/node-store.ts';
import { type BuiltIndex, buildLayerIndex } from './index/builder.ts';
import type { OnPiece } from './index/chunker.ts';
import { EntryType } from './index/layer-index.ts';
import type { BuildLayer, LayerIntake, WantedLayer } from './layer-intake.ts';
import type { LocalBlobs } from './registry/local-blobs.ts';

/** An unpacked layer, with what its client said of it; "" where it said nothing. */
export interface OrdinaryLayer {
  /** What its directory takes on the disk, and storing it may take; 0 when not known. */
  readonly bytes: number;
  /** What containerd unpacked it into. */
  readonly directory: string;
  /** Names the snapshot: no other directory of this root ever has it. */
  readonly name: string;
  /** Of the compressed layer. */
  readonly digest: string;
  readonly sources: readonly LayerSourceName[];
  readonly manifest: string;
  readonly namespace: string;
  /** Of the layer and those below it; of those below it, undefined when there are none. */
  readonly chainId: string;
  readonly parentChainId: string | undefined;
}

/** How far a layer has come; `total` is what `bytes` may come to, 0 when not known. */
export interface OrdinaryLayerProgress {
  readonly bytes: number;
  readonly total: number;
  /** Of the directory; 0 while a blob is read. */
  readonly entries: number;
  /** Why nothing is done at the moment; "" while something is. */
  readonly held: string;
}

type Show = (change: Partial<OrdinaryLayerProgress>) => void;

export type DirectoryReader = (options: {
  readonly directory: string;
  readonly identity: Digest;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  readonly onPiece: OnPiece;
  readonly onProgress: (bytes: number, entries: number) => void;
  readonly gate: () => Promise<void> | undefined;
  readonly signal: AbortSignal;
}) => Promise<BuiltIndex>;

export interface OrdinaryLayersOptions {
  readonly store: NodeStore;
  readonly intake: Pick<LayerIntake, 'takeInBuilt' | 'addProvenSources' | 'expected' | 'scopeOf'>;
  readonly readDirectory: DirectoryReader;
  /** Absent: layers are read from their directories only. */
  readonly blobs: LocalBlobs | undefined;
  /** True where an index made of a layer is kept or published (configuration key `publish_index`). */
  readonly leaveIndex: boolean;
  /** Told of an image of which a layer was indexed out of containerd's copy. */
  readonly indexed: (manifest: Digest, source: LayerSourceName) => void;
  /** Holds the work back while somebody waits for this node. */
  readonly gate: (signal: AbortSignal) => Promise<void> | undefined;
  /** Rejects where so many bytes more would take what is left for others. Errors: STORE_FULL. */
  readonly requireRoom: (bytes: number) => Promise<void>;
  readonly log: Logger;
}

const NODE_IN_USE = 'somebody pulls, mounts or waits for a read';
const ASKS_CONTAINERD = 'containerd is asked for its copy';

export class OrdinaryLayers {
  readonly #options: OrdinaryLayersOptions;

  constructor(options: OrdinaryLayersOptions) {
    this.#options = options;
  }

  /**
   * Stores the layer; when this returns all of it is on the disk, its row too, and the directory is needed no more. An
   * interrupted call leaves nothing that counts: the next one begins anew, and writes only what is missing. Where there is no
   * room for it nothing is read, and it takes nobody's.
   * Errors: LAYER_NOT_LAZY when it must stay as it is, NOT_FOUND for the directory, STORE_IO, STORE_FULL, CANCELLED.
   */
  async convert(
    layer: OrdinaryLayer,
    progress: (progress: OrdinaryLayerProgress) => void,
    signal: AbortSignal,
  ): Promise<LayerRecord> {
    const { store, requireRoom } = this.#options;
    await requireRoom(layer.bytes);
    let latest: OrdinaryLayerProgress = { bytes: 0, total: layer.bytes, entries: 0, held: '' };
    const show: Show = (change) => {
      latest = { ...latest, held: '', ...change };
      progress(latest);
    };
    // A piece that was here may have been taken away before the layer counted it: the second reading brings it back.
    for (let attempt = 1; ; attempt++) {
      const row = (await this.#fromBlob(layer, show, signal)) ?? (await this.#fromDirectory(layer, show, signal));
      await store.flush();
      if (await store.confirmLayer(row.id)) {
        this.#options.intake.expected.forAMoment(row.id);
        return row;
      }
      if (attempt === 3) throw new DedupError('STORE_IO', `pieces of ${layer.name} do not stay in the store`);
    }
  }

  /** Undefined when containerd does not have the layer, or it cannot be indexed. */
  async #fromBlob(layer: OrdinaryLayer, show: Show, signal: AbortSignal): Promise<LayerRecord | undefined> {
    const { leaveIndex, blobs, intake, requireRoom, log } = this.#options;
    const { digest, namespace, sources, manifest } = layer;
    const [source] = sources;
    if (!leaveIndex || blobs === undefined || !isDigest(digest) || source === undefined) return undefined;
    try {
      show({ held: ASKS_CONTAINERD });
      await using blob = await blobs(namespace, digest, signal);
      if (blob === undefined) return undefined;
      show({ bytes: 0, total: blob.size });
      const wanted: WantedLayer = {
        key: { digest, index: '', scope: intake.scopeOf(source) },
        // Nobody has read from them yet.
        sources: [],
        manifest,
        reference: '',
      };
      const row = await intake.takeInBuilt(
        wanted,
        async (sizes, onPiece) => {
          const built = await buildLayerIndex({
            stream: this.#held(blob.stream, show, signal),
            layerDigest: digest,
            layerBytes: blob.size,
            ...sizes,
            onPiece,
            onProgress: (bytes) => show({ bytes }),
            signal,
          });
          requireUnpacked(built, layer);
          requireSelfContained(built);
          return built;
        },
        { forSnapshot: true, ofRegistry: true, requireRoom },
      );
      void intake.addProvenSources(row, sources); // Nobody waits for registries here.
      if (isDigest(manifest)) this.#options.indexed(manifest, source);
      return row;
    } catch (error) {
      if (signal.aborted || ['STORE_FULL', 'CLOSED'].includes(errorCode(error))) throw error;
      // Collected meanwhile, or nothing to restart decompression at: what was unpacked is as good.
      log.debug({ err: error, layer: digest }, "containerd's copy of a layer cannot be used, its directory is read");
      return undefined;
    }
  }

  /** As the gate; says so while it holds the work back. */
  #gate(show: Show, signal: AbortSignal): Promise<void> | undefined {
    const open = this.#options.gate(signal);
    if (open !== undefined) show({ held: NODE_IN_USE });
    return open;
  }

  async *#held(stream: AsyncIterable<Buffer>, show: Show, signal: AbortSignal): AsyncGenerator<Buffer> {
    for await (const bytes of stream) {
      await this.#gate(show, signal);
      yield bytes;
    }
  }

  async #fromDirectory(layer: OrdinaryLayer, show: Show, signal: AbortSignal): Promise<LayerRecord> {
    const { intake, requireRoom } = this.#options;
    show({ bytes: 0, total: layer.bytes });
    // Never the name of a blob of a registry: this content has no source.
    const identity = digestOf(`directory ${layer.name}`);
    const [source] = layer.sources;
    const wanted: WantedLayer = {
      key: { digest: identity, index: '', scope: source === undefined ? '' : intake.scopeOf(source) },
      sources: [],
      manifest: '',
      reference: '',
    };
    const { directory } = layer;
    const gate = (): Promise<void> | undefined => this.#gate(show, signal);
    const build: BuildLayer = (sizes, onPiece) => {
      if (onPiece === undefined) throw new DedupError('LAYER_NOT_LAZY', 'kernels before 5.16 keep ordinary layers');
      return this.#options.readDirectory({
        directory,
        identity,
        ...sizes,
        onPiece,
        onProgress: (bytes, entries) => show({ bytes, entries }),
        gate,
        signal,
      });
    };
    return await intake.takeInBuilt(wanted, build, { forSnapshot: true, ofRegistry: false, requireRoom });
  }
}

/**
 * What lies below may stay a directory, into which an image has no hard links: containerd copied the file when it unpacked
 * the layer. Errors: LAYER_NOT_LAZY for a link to anything but an earlier entry of the layer.
 */
function requireSelfContained({ index: { entries } }: BuiltIndex): void {
  const names = new Set<string>();
  for (let i = 0; i < entries.count; i++) {
    if (entries.type[i] === EntryType.hardLink && !names.has(entries.link[i]!)) {
      throw new DedupError('LAYER_NOT_LAZY', `${JSON.stringify(entries.name[i])} is a link into a layer below`);
    }
    names.add(entries.name[i]!);
  }
}

/**
 * Labels name the blob; what was unpacked is named by the chain ID. Errors: LAYER_NOT_LAZY when they are not the same.
 * Source: OCI image spec, config.md, "Layer ChainID".
 */
function requireUnpacked({ index: { diffId } }: BuiltIndex, { chainId, parentChainId }: OrdinaryLayer): void {
  const unpacked = parentChainId === undefined ? diffId : digestOf(`${parentChainId} ${diffId}`);
  if (unpacked === chainId) return;
  throw new DedupError('LAYER_NOT_LAZY', 'the blob that its labels name is not what was unpacked');
}
