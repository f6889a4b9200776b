// From the layer a caller names to the layer this node knows: finds its index, or makes one, and gives its chunks a place
// in the store. Keeps what nobody's snapshot names yet. Called by data-plane.ts; mounts nothing.
import { existsSync } from 'node:fs';
import { LRUCache } from 'lru-cache';
import type { Config } from '../config.ts';
import { type Digest, isDigest, parseDigest } from '../digest.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { RootPaths } from '../paths.ts';
import { MiB } from '../units.ts';
import type { LayerRecord, LayerSourceName, LayerTrust } from './chunks/index-protocol.ts';
import type { NodeStore } from './chunks/node-store.ts';
import type { LayerKeyMessage, PrepareLayerMessage } from './control-server.ts';
import { EagerLayers } from './eager-layers.ts';
import { type BuiltIndex, buildLayerIndex } from './index/builder.ts';
import type { OnPiece } from './index/chunker.ts';
import type { IndexCatalog } from './index/discovery.ts';
import type { KeptIndexes } from './index/kept-indexes.ts';
import { INDEX_ANNOTATION, type LayerIndex } from './index/layer-index.ts';
import { classifyLayer } from './index/media-types.ts';
import type { LayerBook } from './layer-book.ts';
import type { MountableLayer } from './mount-table.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';
import { MAX_JSON_BYTES, parseManifest } from './registry/image-manifest.ts';

/** How long a layer that was fetched ahead waits for its Prepare. */
const EXPECTED_MS = 600_000;

/** How long a converted layer waits for its snapshot to name it. One that is late finds its directory still there. */
const SWITCH_MS = 10_000;

/** Why a layer that no snapshot names is kept. */
interface Expectation {
  /** When it ends at the latest, by performance.now(). */
  readonly untilMs: number;
  /** Layers of the image that is being pulled: once no snapshot names one of them, the pull has ended. Empty: no pull. */
  readonly image: readonly number[];
  /** True while the pull is one of our own and goes on. */
  readonly underWay: () => boolean;
  /** It is kept for a snapshot that exists: once that names it, it has arrived. */
  readonly forSnapshot: boolean;
}

const NO_PULL: Pick<Expectation, 'underWay' | 'forSnapshot'> = { underWay: () => false, forSnapshot: false };

/** What became of a layer that was made ready. */
export type Readiness =
  | { readonly kind: 'lazy' }
  /** It was read whole; `diffId` is what its bytes decompress to. */
  | { readonly kind: 'stored'; readonly diffId: string }
  | { readonly kind: 'declined'; readonly reason: string };

/** An image whose layers are made ready before anybody asks for them. */
export interface ImageAhead {
  /** For each layer of the manifest: what became of it, never rejected. Absent: it is an ordinary one. */
  readonly layers: readonly (Promise<Readiness> | undefined)[];
  /** Says that the pull has ended: what nobody's snapshot names is not kept for it any more. */
  ended(): void;
}

/** A layer as a manifest lists it. */
export interface ManifestLayer {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly annotations: Readonly<Record<string, string>>;
}

/** Told how many compressed bytes of a layer, by its position, have been read; for layers that are read whole. */
export type ReadProgress = (position: number, bytesDone: number) => void;

/** A layer of an image as a caller names it, with where it can be read. */
export interface WantedLayer {
  readonly key: LayerKeyMessage;
  readonly sources: readonly LayerSourceName[];
  readonly manifest: string;
  readonly reference: string;
}

/** The bytes of a layer; `verifiedStream`: it ends with DIGEST_MISMATCH by itself when they are wrong. */
export interface LayerStream {
  readonly stream: AsyncIterable<Buffer>;
  readonly verifiedStream: boolean;
}

/** Reads a layer once, cut into chunks and pieces of these sizes; `onPiece` absent: only its index is wanted. */
export type BuildLayer = (
  sizes: { readonly chunkBytes: number; readonly pieceBytes: number },
  onPiece: OnPiece | undefined,
) => Promise<BuiltIndex>;

/** A layer on its way into the store. */
interface Adding {
  readonly work: Promise<LayerRecord>;
  /** Digest of the index that is fetched; "" while nobody knows it. */
  readonly index: string;
  /** True once its index is here and its row is being made: a moment. Before that a registry may take its time. */
  storing: boolean;
}

export interface LayerIntakeOptions {
  readonly config: Config;
  readonly catalog: IndexCatalog;
  readonly store: NodeStore;
  readonly book: LayerBook;
  readonly kept: KeptIndexes;
  readonly paths: RootPaths;
  readonly repository: (source: LayerSourceName) => Repository;
  /** True for the layout of kernels before 5.16: every file in one run of the store. */
  readonly contiguousFiles: boolean;
  /** Gets ready to build a file system, while indexes are on their way. */
  readonly expectBuild: () => void;
  /**
   * Builds the file system of an image whose indexes are all here, before anyone mounts it, and begins to fetch what its
   * start will read; `config` are the bytes of its configuration.
   */
  readonly prebuild: (layers: readonly MountableLayer[], config: Promise<Buffer>) => Promise<void>;
  /** Told of an image of which layers were indexed here. */
  readonly indexed: (manifest: Digest, source: LayerSourceName) => void;
  /** Aborted when the daemon stops. */
  readonly stop: AbortSignal;
  readonly log: Logger;
}

export class LayerIntake {
  readonly #options: LayerIntakeOptions;
  readonly #catalog: IndexCatalog;
  readonly #store: NodeStore;
  readonly #book: LayerBook;
  /** Layers that are being added, by identity: calls share the work, and it goes on when a budget ends. */
  readonly #adding = new Map<string, Adding>();
  /** Images that were looked at as a whole lately, by manifest and source. */
  readonly #prepared = new LRUCache<string, true>({ max: 1000, ttl: EXPECTED_MS });
  /** Layers that no snapshot names yet, kept for whoever is about to: the rest of a pull, or a standalone mount. */
  readonly #expected = new Map<number, Expectation>();
  /** When a layer was last said to be lazy, by performance.now(): a list of layers to retain may be older than that. */
  readonly #promised = new Map<number, number>();
  /** Indexes made here that are on the disk, while their layers get rows. */
  readonly #keeping = new Set<Promise<LayerRecord>>();

  readonly #eager: EagerLayers;

  constructor(options: LayerIntakeOptions) {
    this.#options = options;
    this.#eager = new EagerLayers({
      // The pull that waits for it keeps it from then on; when none does any more, nothing has to.
      takeIn: (wanted, blob, source, progress, signal) => this.takeIn(wanted, blob, source, progress, signal, true),
      stop: options.stop,
    });
    this.#catalog = options.catalog;
    this.#store = options.store;
    this.#book = options.book;
  }

  #repository(source: LayerSourceName): Repository {
    return this.#options.repository(source);
  }

  /** The part of a chunk's identity that keeps tenants apart (configuration key `dedup_scope`). */
  scopeOf(source: LayerSourceName): string {
    switch (this.#options.config.dedup_scope) {
      case 'node':
        return '';
      case 'registry':
        return source.host;
      case 'repository':
        return `${source.host}/${source.repository}`;
    }
  }

  async prepareLayer(request: PrepareLayerMessage): Promise<{ lazy: boolean; reason: string; layer: LayerKeyMessage }> {
    const source = request.sources[0];
    if (source === undefined) return { lazy: false, reason: 'no source of the layer is known', layer: request.layer };
    const wanted = (key: LayerKeyMessage): WantedLayer => ({
      key: { ...key, scope: key.scope === '' ? this.scopeOf(source) : key.scope },
      sources: request.sources,
      manifest: request.manifest,
      reference: '',
    });
    const layer = wanted(request.layer);
    if (isDigest(request.manifest)) this.#prepareImage(request.manifest, request.sources);
    const budget = AbortSignal.timeout(Math.max(1, request.budget_ms));
    try {
      const row = await abandonOn(budget, this.layer(layer, this.#options.stop));
      // From here on the snapshotter names it among those to retain.
      this.#expected.delete(row.id);
      this.#promised.set(row.id, performance.now());
      return { lazy: true, reason: '', layer: { digest: row.digest, index: row.indexDigest, scope: row.scope } };
    } catch (error) {
      const reason = budget.aborted
        ? `its index did not arrive within ${request.budget_ms} ms`
        : error instanceof Error
          ? error.message
          : String(error);
      return { lazy: false, reason, layer: layer.key };
    }
  }

  /**
   * At the first call that names an image: the indexes of all its layers are fetched together, and if every layer is
   * lazy its file system is built, while the client still asks for one layer after the other.
   */
  #prepareImage(manifest: Digest, sources: readonly LayerSourceName[]): void {
    const source = sources[0];
    const key = imageKey(manifest, source);
    if (source === undefined || this.#prepared.has(key)) return;
    this.#prepared.set(key, true);
    const fetchAhead = async (): Promise<void> => {
      const { bytes } = await this.#repository(source).getManifest(manifest, this.#options.stop);
      const { layers, config } = parseManifest(bytes, `manifest ${manifest}`);
      const rows = this.#addLayers(manifest, layers, sources, NO_PULL.underWay);
      await this.#build(rows, this.#repository(source).readBlob(config.digest, MAX_JSON_BYTES, this.#options.stop));
    };
    fetchAhead().catch((error: unknown) => this.#aheadFailed(manifest, source, error));
  }

  /** The same for a pull of our own, which has the manifest in its hands and waits for each layer without a budget. */
  imageAhead(
    manifest: Digest,
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    source: LayerSourceName,
    onRead: ReadProgress,
    ours: Promise<boolean>,
  ): ImageAhead {
    const end = new AbortController();
    const underWay = (): boolean => !end.signal.aborted;
    const stored = new Set<number>();
    const rows = this.#addLayers(manifest, layers, [source], underWay, (wanted, position) => {
      const { mediaType, digest, size } = layers[position]!;
      if (this.#options.contiguousFiles || !this.#options.config.index_trust.includes('local')) return undefined;
      if (!classifyLayer({ mediaType }).lazy) return undefined;
      const progress = (bytesDone: number): void => onRead(position, bytesDone);
      const signal = AbortSignal.any([end.signal, this.#options.stop]);
      const readWhole = async (): Promise<LayerRecord> => {
        if (!(await ours)) throw new DedupError('LAYER_NOT_LAZY', 'it is for another snapshotter');
        stored.add(position);
        return this.#eager.read(wanted, { digest, size }, this.#repository(source), progress, signal);
      };
      // An index may be kept here of an earlier pull, or be found as a referrer.
      return this.layer(wanted, signal).catch(async (error: unknown) => {
        if (errorCode(error) !== 'LAYER_NOT_LAZY') throw error;
        return await readWhole();
      });
    });
    this.#prepared.set(imageKey(manifest, source), true);
    const building = this.#build(rows, config);
    building.catch((error: unknown) => this.#aheadFailed(manifest, source, error));
    Promise.all(rows).then(
      () => stored.size > 0 && this.#options.indexed(manifest, source),
      () => undefined, // Told by its layer.
    );
    return {
      layers: rows.map((row, position) =>
        row?.then(
          ({ diffId }): Readiness => (stored.has(position) ? { kind: 'stored', diffId } : { kind: 'lazy' }),
          // Where an index was named, its Prepare says why it is not lazy.
          (error: unknown): Readiness => ({
            kind: 'declined',
            reason: error instanceof Error ? error.message : String(error),
          }),
        ),
      ),
      ended: () => end.abort(new DedupError('CANCELLED', 'the pull has ended')),
    };
  }

  /** Nothing depends on it: every Prepare asks for its own layer, and says why if that fails too. */
  #aheadFailed(manifest: Digest, source: LayerSourceName, error: unknown): void {
    this.#prepared.delete(imageKey(manifest, source));
    this.#options.log.debug({ err: error, manifest }, 'preparing an image ahead failed');
  }

  /** `readWhole`: what to do with a layer that nothing names an index of; absent, or without an answer: nothing. */
  #addLayers(
    manifest: Digest,
    layers: readonly Pick<ManifestLayer, 'digest' | 'annotations'>[],
    sources: readonly LayerSourceName[],
    underWay: () => boolean,
    readWhole?: (wanted: WantedLayer, position: number) => Promise<LayerRecord> | undefined,
  ): (Promise<LayerRecord> | undefined)[] {
    const scope = sources[0] === undefined ? '' : this.scopeOf(sources[0]);
    const image: number[] = [];
    return layers.map(({ digest, annotations }, position) => {
      const index = annotations[INDEX_ANNOTATION] ?? '';
      const key = { digest, index, scope };
      const wanted = { key, sources, manifest, reference: '' };
      const known = this.#book.find(key) !== undefined;
      let row = index === '' && !known ? undefined : this.layer(wanted, this.#options.stop);
      if (index === '' && !known) row = readWhole?.(wanted, position);
      return row?.then((row) => {
        image.push(row.id);
        if (!known)
          this.#expected.set(row.id, { untilMs: performance.now() + EXPECTED_MS, image, underWay, forSnapshot: false });
        return row;
      });
    });
  }

  /** Builds the file system of an image of which every layer is lazy. Errors: those of the layers. */
  async #build(layers: readonly (Promise<LayerRecord> | undefined)[], config: Promise<Buffer>): Promise<void> {
    config.catch(() => undefined); // Looked at once the layers are here.
    if (layers.every((layer) => layer !== undefined)) this.#options.expectBuild();
    const rows = await Promise.all(layers);
    const lazy = rows.filter((row) => row !== undefined);
    if (lazy.length < rows.length) return;
    await this.#options.prebuild(await Promise.all(lazy.map((row) => this.mountable(row))), config);
  }

  /** The stored layer; its index is fetched when it is not known. Errors: LAYER_NOT_LAZY with the reason, and of the registry. */
  async layer(wanted: WantedLayer, signal: AbortSignal): Promise<LayerRecord> {
    const { index_trust } = this.#options.config;
    const known = this.#book.find(wanted.key);
    if (known?.condemned === true) throw new DedupError('LAYER_NOT_LAZY', 'its index was found to be wrong');
    if (known !== undefined && index_trust.includes(known.trust)) {
      this.#promised.set(known.id, performance.now());
      await this.#book.addSources(known.id, wanted.sources);
      return known;
    }
    // What one image's referrers say is not another image's word, and one source's failure not another source's.
    const id = JSON.stringify([wanted.key, wanted.sources, wanted.manifest]);
    const running = this.#adding.get(id);
    if (running !== undefined) return await running.work;
    const discover = async (): Promise<LayerRecord> => {
      const row = await this.#discover(wanted, signal, () => {
        adding.storing = true;
      });
      this.#promised.set(row.id, performance.now());
      await this.#book.addSources(row.id, wanted.sources);
      return row;
    };
    const work = Promise.resolve()
      .then(discover)
      .finally(() => this.#adding.delete(id));
    const adding: Adding = { work, index: index_trust.includes('annotation') ? wanted.key.index : '', storing: false };
    this.#adding.set(id, adding);
    return await work;
  }

  /** `storing` is called when only the row is left to be made. */
  async #discover(wanted: WantedLayer, signal: AbortSignal, storing: () => void): Promise<LayerRecord> {
    const { index_trust } = this.#options.config;
    const { key } = wanted;
    const digest = parseDigest(key.digest);
    const annotated = key.index !== '' && index_trust.includes('annotation');
    if (annotated && !isDigest(key.index)) {
      throw new DedupError('LAYER_NOT_LAZY', 'its index annotation is not a SHA-256 digest');
    }
    const kept = annotated || !index_trust.includes('local') ? undefined : await this.#kept(digest);
    if (kept !== undefined) {
      storing();
      return await this.#add(kept, kept.indexDigest, wanted, 'local');
    }
    if (!annotated && !(index_trust.includes('referrer') && isDigest(wanted.manifest))) {
      const reason = key.index === '' ? 'it has no index annotation' : '"index_trust" does not include "annotation"';
      throw new DedupError('LAYER_NOT_LAZY', reason);
    }
    let failure: unknown;
    for (const source of wanted.sources) {
      const repository = this.#repository(source);
      try {
        const indexDigest = annotated
          ? parseDigest(key.index)
          : (await this.#catalog.referrerIndexes(parseDigest(wanted.manifest), repository, signal)).get(digest);
        if (indexDigest === undefined)
          throw new DedupError('LAYER_NOT_LAZY', 'no artifact in the registry has its index');
        const index = await this.#catalog.load({ layerDigest: digest, indexDigest }, repository, signal);
        storing();
        return await this.#add(index, indexDigest, wanted, annotated ? 'annotation' : 'referrer');
      } catch (error) {
        failure = error;
      }
    }
    throw failure;
  }

  /** The index that this node once made of a layer, if it is still here and right. */
  async #kept(digest: Digest): Promise<(LayerIndex & { readonly indexDigest: Digest }) | undefined> {
    const known = this.#options.kept.find(digest);
    if (known === undefined) return undefined;
    try {
      const index = await this.#catalog.loadLocal({ layerDigest: digest, indexDigest: known.index });
      if (index !== undefined && existsSync(this.#options.paths.layerRestart(known.restart)))
        return { ...index, indexDigest: known.index };
    } catch (error) {
      this.#options.log.warn({ err: error, layer: digest }, 'an index that was kept is not usable any more');
    }
    await this.#options.kept.forget(digest);
    return undefined;
  }

  /** Reads a whole layer once to index it on this node. Errors: LAYER_NOT_LAZY, LAYER_INVALID, and of the registry. */
  async indexHere(
    wanted: WantedLayer,
    blob: BlobId,
    repository: Repository,
    progress: (bytesDone: number) => void,
    signal: AbortSignal,
  ): Promise<LayerRecord> {
    if (!this.#options.config.index_trust.includes('local')) {
      throw new DedupError(
        'LAYER_NOT_LAZY',
        `layer ${blob.digest} has no index, and "index_trust" allows none made here`,
        {
          hint: 'add "local" to "index_trust", or give the image an index: dedup-snapshotter index',
        },
      );
    }
    const stream = repository.readAll(blob, signal);
    return await this.takeIn(wanted, blob, { stream, verifiedStream: true }, progress, signal);
  }

  /**
   * Reads a whole layer from `source`: indexes it, keeps its chunks where the layout allows, and adds it. It is kept for
   * whoever is about to use it; `forSnapshot`: for a moment, as expect() says. Errors: LAYER_NOT_LAZY, LAYER_INVALID, STORE_IO, STORE_FULL, and those of the stream.
   */
  takeIn(
    wanted: WantedLayer,
    blob: BlobId,
    source: LayerStream,
    progress: (bytesDone: number) => void,
    signal: AbortSignal,
    forSnapshot = false,
  ): Promise<LayerRecord> {
    const build: BuildLayer = (sizes, onPiece) =>
      buildLayerIndex({
        ...source,
        ...sizes,
        layerDigest: blob.digest,
        layerBytes: blob.size,
        onProgress: progress,
        onPiece,
        signal,
      });
    return this.takeInBuilt(wanted, build, forSnapshot);
  }

  /** The same for what `build` reads, in whatever form. */
  async takeInBuilt(wanted: WantedLayer, build: BuildLayer, forSnapshot = false): Promise<LayerRecord> {
    const chunkBytes = this.#options.config.chunk_size;
    const sizes = { chunkBytes, pieceBytes: Math.min(MiB, chunkBytes) };
    // Files in one run each have no place before their size in the store is known.
    const keeper = this.#options.contiguousFiles
      ? undefined
      : this.#store.keepChunks({ scope: wanted.key.scope, ...sizes });
    try {
      const { index, indexBlob, restartBlob } = await build(sizes, keeper?.onPiece);
      await keeper?.settled();
      const keeping = this.#catalog
        .keep(indexBlob, restartBlob)
        .then((indexDigest) => this.#add(index, indexDigest, wanted, 'local'));
      this.#keeping.add(keeping);
      try {
        const row = await keeping;
        this.expect(row, forSnapshot);
        if (wanted.sources.length > 0) await this.#keepIndex(row, indexBlob.length + restartBlob.length);
        return row;
      } finally {
        this.#keeping.delete(keeping);
      }
    } finally {
      await keeper?.[Symbol.asyncDispose]();
    }
  }

  /** What was learned of a registry's layer serves the next pull of it, too. */
  async #keepIndex(row: LayerRecord, bytes: number): Promise<void> {
    if (this.#options.config.publish_index === 'off') return;
    const { digest, indexDigest, restartDigest } = row;
    await this.#options.kept.keep({
      layer: parseDigest(digest),
      index: parseDigest(indexDigest),
      restart: parseDigest(restartDigest),
      bytes,
    });
  }

  /** True while layers are read whole for a pull. */
  get isReading(): boolean {
    return this.#eager.isReading;
  }

  /** Keeps a layer that no snapshot names: of a standalone mount under way, or of a snapshot that is about to name it. */
  expect(row: LayerRecord, forSnapshot = false): void {
    const untilMs = performance.now() + (forSnapshot ? SWITCH_MS : EXPECTED_MS);
    this.#expected.set(row.id, { untilMs, image: [], ...NO_PULL, forSnapshot });
  }

  async #add(index: LayerIndex, indexDigest: Digest, wanted: WantedLayer, trust: LayerTrust): Promise<LayerRecord> {
    const { layerId } = await this.#store.addLayer(index, {
      scope: wanted.key.scope,
      indexDigest,
      sources: wanted.sources,
      trust,
      reference: wanted.reference,
      contiguousFiles: this.#options.contiguousFiles,
    });
    await this.#book.reload();
    return this.#book.get(layerId);
  }

  /** Makes sure that the layer's index is on disk. Errors: NOT_FOUND, and those of the registry. */
  async mountable(row: LayerRecord): Promise<MountableLayer> {
    if (!existsSync(this.#book.indexPath(row))) {
      await this.#fetchIndexAgain(row);
    }
    return { layerId: row.id, digest: row.digest, indexPath: this.#book.indexPath(row) };
  }

  /** Makes sure that the layer's index file is what it is named after; a damaged one is fetched again. Errors as mountable. */
  async checkIndex(row: LayerRecord): Promise<void> {
    try {
      await this.#book.checkIndexFile(row.id);
    } catch (error) {
      if (errorCode(error) !== 'DIGEST_MISMATCH') throw error;
      this.#options.log.warn({ err: error, layer: row.digest }, 'an index file is damaged and fetched again');
      await this.#catalog.remove(parseDigest(row.indexDigest));
      await this.#fetchIndexAgain(row);
    }
  }

  async #fetchIndexAgain(row: LayerRecord): Promise<void> {
    const wanted = { layerDigest: parseDigest(row.digest), indexDigest: parseDigest(row.indexDigest) };
    let failure: unknown = new DedupError('NOT_FOUND', `the index of layer ${row.digest} is gone and has no source`);
    for (const source of row.sources) {
      try {
        await this.#catalog.load(wanted, this.#repository(source), this.#options.stop);
        return;
      } catch (error) {
        failure = error; // The next source may have it.
      }
    }
    throw failure;
  }

  /** Errors: NOT_FOUND for a layer that was dropped. */
  async mountableLayers(keys: readonly LayerKeyMessage[]): Promise<MountableLayer[]> {
    const mountable: MountableLayer[] = [];
    for (const key of keys) {
      const row = this.#book.find(key);
      if (row === undefined) {
        throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node any more`, {
          hint: 'remove the image and pull it again',
        });
      }
      if (row.condemned)
        throw new DedupError('DIGEST_MISMATCH', `layer ${row.digest} is blocked: its index does not describe it`);
      mountable.push(await this.mountable(row));
    }
    return mountable;
  }

  /** Layers whose rows are being made; no registry is waited for. */
  underWay(): Promise<LayerRecord>[] {
    const storing = [...this.#adding.values()].filter((adding) => adding.storing);
    return [...storing.map(({ work }) => work), ...this.#keeping];
  }

  /** Digests of indexes that are being fetched, which have no row yet; undefined while not all of them are known. */
  arriving(): ReadonlySet<string> | undefined {
    const indexes = new Set([...this.#adding.values()].map(({ index }) => index));
    return indexes.has('') ? undefined : indexes;
  }

  /** True while a layer may be on nobody's list although its Prepare was told that it is lazy. */
  isPromised(layerId: number): boolean {
    return this.#promised.has(layerId);
  }

  /** Forgets what was promised before `startedMs` (performance.now()): lists made since name it. */
  forgetPromisesBefore(startedMs: number): void {
    for (const [id, promisedMs] of this.#promised) if (promisedMs < startedMs) this.#promised.delete(id);
  }

  isExpected(layerId: number): boolean {
    return this.#expected.has(layerId);
  }

  /** Layers kept for a pull or a mount that goes on; `named` are those that snapshots name. Forgets the others. */
  stillExpected(named: ReadonlySet<number>): number[] {
    for (const [layerId, { untilMs, image, underWay, forSnapshot }] of this.#expected) {
      // No Prepare is under way now: somebody else's pull that goes on has left a snapshot of one of its layers.
      const goesOn = image.length === 0 || underWay() || image.some((id) => named.has(id));
      const arrived = forSnapshot && named.has(layerId);
      if (!goesOn || arrived || performance.now() >= untilMs) this.#expected.delete(layerId);
    }
    return [...this.#expected.keys()];
  }

  /** Says that layers were dropped: an image that had them is prepared anew when it is pulled again. */
  dropped(): void {
    this.#prepared.clear();
  }

  /** Says that something else keeps these layers now. */
  arrived(layerIds: readonly number[]): void {
    for (const layerId of layerIds) this.#expected.delete(layerId);
  }
}

function imageKey(manifest: Digest, source: LayerSourceName | undefined): string {
  return `${manifest} ${source?.host}/${source?.repository}`;
}

/** The promise, or CANCELLED when the signal comes first; the work goes on for whoever asks next. */
async function abandonOn<T>(signal: AbortSignal, work: Promise<T>): Promise<T> {
  const { promise, reject } = Promise.withResolvers<never>();
  const stop = (): void => reject(new DedupError('CANCELLED', 'the budget is used up'));
  signal.addEventListener('abort', stop, { once: true });
  work.catch(() => undefined); // Its error is told to whoever waits; after the budget nobody does.
  try {
    return await Promise.race([work, promise]);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}
