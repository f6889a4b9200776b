// From the layer a caller names to the layer this node knows: finds its index, or makes one, and gives its chunks a place
// in the store. Keeps what nobody's snapshot names yet. Called by data-plane.ts; mounts nothing.
import { existsSync } from 'node:fs';
import type { Config } from '../config.ts';
import { type Digest, isDigest, parseDigest } from '../digest.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import type { RootPaths } from '../paths.ts';
import type { LayerRecord, LayerSourceName, LayerTrust } from './chunks/index-protocol.ts';
import type { KeepChunksOptions, NodeStore } from './chunks/node-store.ts';
import type { LayerKeyMessage, PrepareLayerMessage } from './control-server.ts';
import { ExpectedLayers } from './expected-layers.ts';
import type { MountableLayer } from './image-metadata.ts';
import { holdsIndex } from './index/artifact.ts';
import { type BuiltIndex, buildLayerIndex, pieceBytesFor } from './index/builder.ts';
import type { OnPiece } from './index/chunker.ts';
import type { IndexCatalog } from './index/discovery.ts';
import type { KeptIndexes } from './index/kept-indexes.ts';
import type { LayerIndex } from './index/layer-index.ts';
import type { LayerBook } from './layer-book.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';

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
  /** Layers that no snapshot names yet. */
  readonly expected = new ExpectedLayers();
  /** When a layer was last said to be lazy, by performance.now(): a list of layers to retain may be older than that. */
  readonly #promised = new Map<number, number>();
  /** Indexes made here that are on the disk, while their layers get rows. */
  readonly #keeping = new Set<Promise<LayerRecord>>();

  constructor(options: LayerIntakeOptions) {
    this.#options = options;
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
    const budget = AbortSignal.timeout(Math.max(1, request.budget_ms));
    try {
      // The work goes on for whoever asks next.
      const usedUp = () => new DedupError('CANCELLED', 'the budget is used up');
      const row = await orAborted(this.layer(layer, this.#options.stop), budget, usedUp);
      // From here on the snapshotter names it among those to retain.
      this.expected.arrived(row.id);
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

  /** The stored layer; its index is fetched when it is not known. Errors: LAYER_NOT_LAZY with the reason, and of the registry. */
  async layer(wanted: WantedLayer, signal: AbortSignal): Promise<LayerRecord> {
    const { index_trust } = this.#options.config;
    const known = this.#book.find(wanted.key);
    if (known?.condemned === true) throw new DedupError('LAYER_NOT_LAZY', 'its index was found to be wrong');
    if (known !== undefined && index_trust.includes(known.trust)) {
      this.#promised.set(known.id, performance.now());
      // One that was made here may be here completely, and its sources never asked.
      if (known.trust === 'local') void this.addProvenSources(known, wanted.sources);
      else await this.#book.addSources(known.id, wanted.sources);
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
      if (row.trust !== 'local') await this.#book.addSources(row.id, wanted.sources);
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
      const sources = await this.#proven(digest, wanted.sources, signal);
      if (sources.length === 0)
        throw new DedupError('LAYER_NOT_LAZY', 'its index is kept, but its registry does not give it');
      storing();
      return await this.#add(kept, kept.indexDigest, { ...wanted, sources }, 'local');
    }
    if (!annotated && !(index_trust.includes('referrer') && isDigest(wanted.manifest))) {
      const reason = key.index === '' ? 'it has no index annotation' : '"index_trust" does not include "annotation"';
      throw new DedupError('LAYER_NOT_LAZY', reason);
    }
    let failure: unknown;
    // An annotation names its index by digest, wherever that lies. A referrer is believed because it is in the image's own
    // repository, which comes first; other repositories with the same layer are other people's.
    for (const source of annotated ? wanted.sources : wanted.sources.slice(0, 1)) {
      const repository = this.#repository(source);
      try {
        const indexDigest = annotated
          ? parseDigest(key.index)
          : ((await this.#catalog.referrerIndexes(parseDigest(wanted.manifest), repository, signal)).get(digest) ??
            (await this.#knownIn(repository, key, signal)));
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

  /**
   * The index by which a layer of another image is known here, if it lies in this image's repository, too: whoever put it
   * there might have made it a referrer of this image, and those are trusted.
   */
  async #knownIn(repository: Repository, key: LayerKeyMessage, signal: AbortSignal): Promise<Digest | undefined> {
    const { index_trust } = this.#options.config;
    for (const row of this.#book.all()) {
      if (row.digest !== key.digest || row.scope !== key.scope) continue;
      if (row.condemned || !index_trust.includes(row.trust)) continue;
      if (await holdsIndex(repository, row, signal)) return parseDigest(row.indexDigest);
    }
    return undefined;
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

  /** Those of the sources that have the layer and give it to this node. */
  async #proven(layer: Digest, sources: readonly LayerSourceName[], signal: AbortSignal): Promise<LayerSourceName[]> {
    const has = await Promise.all(
      sources.map((source) =>
        this.#repository(source)
          .hasBlob(layer, signal)
          .catch(() => false),
      ),
    );
    return sources.filter((_, i) => has[i]);
  }

  /** Adds sources to a layer that was made here, once they have shown that they have it. Never rejects. */
  async addProvenSources(row: LayerRecord, sources: readonly LayerSourceName[]): Promise<void> {
    const fresh = sources.filter(
      ({ host, repository }) => !row.sources.some((known) => known.host === host && known.repository === repository),
    );
    if (fresh.length === 0) return;
    try {
      const proven = await this.#proven(parseDigest(row.digest), fresh, this.#options.stop);
      await this.#book.addSources(row.id, proven);
    } catch (error) {
      // It was dropped meanwhile, or the daemon stops.
      this.#options.log.debug({ err: error, layer: row.digest }, 'sources of a layer are not added');
    }
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
   * whoever is about to use it; `forSnapshot`: for a moment (ExpectedLayers). Errors: LAYER_NOT_LAZY, LAYER_INVALID, STORE_IO, STORE_FULL, and those of the stream.
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
    return this.takeInBuilt(wanted, build, { forSnapshot, ofRegistry: true });
  }

  /**
   * The same for what `build` reads, in whatever form; `ofRegistry`: a layer that a registry may have; `requireRoom`: nobody
   * waits for it (KeepChunksOptions).
   */
  async takeInBuilt(
    wanted: WantedLayer,
    build: BuildLayer,
    {
      forSnapshot,
      ofRegistry,
      requireRoom,
    }: {
      readonly forSnapshot: boolean;
      readonly ofRegistry: boolean;
      readonly requireRoom?: KeepChunksOptions['requireRoom'];
    },
  ): Promise<LayerRecord> {
    const chunkBytes = this.#options.config.chunk_size;
    const sizes = { chunkBytes, pieceBytes: pieceBytesFor(chunkBytes) };
    // Files in one run each have no place before their size in the store is known.
    const keeper = this.#options.contiguousFiles
      ? undefined
      : this.#store.keepChunks({ scope: wanted.key.scope, ...sizes, requireRoom });
    try {
      const { index, indexBlob, restartBlob } = await build(sizes, keeper?.onPiece);
      await keeper?.settled();
      const keeping = this.#catalog
        .keep(indexBlob, restartBlob)
        .then((indexDigest) => this.#add(index, indexDigest, wanted, 'local'));
      this.#keeping.add(keeping);
      try {
        const row = await keeping;
        if (forSnapshot) this.expected.forAMoment(row.id);
        else this.expected.forMount(row.id);
        if (ofRegistry) await this.#keepIndex(row, indexBlob.length + restartBlob.length);
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
}
