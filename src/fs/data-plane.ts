// Everything dedupd does, put together: layers and their indexes, the node store, the LazyLoader, one transport, the
// mounted images. The control server calls it; it decides nothing about snapshots.
import { existsSync } from 'node:fs';
import { readdir, rm } from 'node:fs/promises';
import { isAbsolute, join } from 'node:path';
import { LRUCache } from 'lru-cache';
import type { Config } from '../config.ts';
import { type Digest, isDigest, parseDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { registryOptions } from '../registry-settings.ts';
import { MiB } from '../units.ts';
import type { LayerRecord, LayerSourceName, LayerTrust } from './chunks/index-protocol.ts';
import { NodeStore } from './chunks/node-store.ts';
import type {
  BelowMessage,
  ControlledPlane,
  ImageInfoMessage,
  LayerKeyMessage,
  MountProgressMessage,
  PrepareLayerMessage,
  StatsMessage,
} from './control-server.ts';
import { buildImage } from './image/build-image.ts';
import { buildLayerIndex } from './index/builder.ts';
import { IndexCatalog } from './index/discovery.ts';
import { INDEX_ANNOTATION, type LayerIndex } from './index/layer-index.ts';
import { RestartReader, WindowCache } from './index/restart-reader.ts';
import { LayerBook } from './layer-book.ts';
import { LazyLoader } from './lazy-loader.ts';
import { type MountableBelow, type MountableLayer, MountTable } from './mount-table.ts';
import { native } from './native.ts';
import { ReferenceMounts } from './reference-mounts.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';
import { type Credentials, parseUserPassword } from './registry/credentials.ts';
import { parseManifest } from './registry/image-manifest.ts';
import { RegistryPool } from './registry/pool.ts';
import { inspectMachine } from './transport/machine.ts';
import { chooseTransport, openTransport, type TransportChoice } from './transport/select.ts';
import type { ErofsLayoutKind, Transport } from './transport/transport.ts';

/** Memory for decompressed windows of gzip restart points, bytes. */
const WINDOW_CACHE_BYTES = 4 * MiB;

/** A burst of reads is over when none came for this long. */
const IDLE_CHECK_MS = 1_000;

/** How long a layer that was fetched ahead waits for its Prepare. */
const EXPECTED_MS = 600_000;

export interface DataPlaneOptions {
  readonly config: Config;
  readonly paths: RootPaths;
  readonly run: RunPaths;
  readonly log: Logger;
  /** Layout of EROFS metadata; what the kernel calls for when absent. Newer kernels mount the older layout too. */
  readonly layout?: ErofsLayoutKind;
}

/** Why a layer that no snapshot names is kept. */
interface Expectation {
  /** When it ends at the latest, by performance.now(). */
  readonly untilMs: number;
  /** Layers of the image that is being pulled: once no snapshot names one of them, the pull has ended. Empty: no pull. */
  readonly image: readonly number[];
}

/** A layer of an image as a caller names it, with where it can be read. */
export interface WantedLayer {
  readonly key: LayerKeyMessage;
  readonly sources: readonly LayerSourceName[];
  readonly manifest: string;
  readonly reference: string;
}

export class DataPlane implements ControlledPlane, AsyncDisposable {
  readonly root: string;
  readonly #options: DataPlaneOptions;
  readonly #choice: TransportChoice;
  readonly #registry: RegistryPool;
  readonly #catalog: IndexCatalog;
  readonly #store: NodeStore;
  readonly #book: LayerBook;
  readonly #loader: LazyLoader;
  readonly #transport: Transport;
  readonly #mounts: MountTable;
  readonly #references: ReferenceMounts;
  readonly #credentials: Map<string, Credentials>;
  /** Layers whose index is being fetched, by identity: calls share it, and it goes on when a budget ends. */
  readonly #adding = new Map<string, Promise<LayerRecord>>();
  /** Images that were looked at as a whole lately, by manifest and source. */
  readonly #prepared = new LRUCache<string, true>({ max: 1000, ttl: EXPECTED_MS });
  /** Layers that no snapshot names yet, kept for whoever is about to: the rest of a pull, or a standalone mount. */
  readonly #expected = new Map<number, Expectation>();
  /** When a layer was last said to be lazy, by performance.now(): a list of layers to retain may be older than that. */
  readonly #promised = new Map<number, number>();
  /** Indexes made here that are on the disk, while their layers get rows. */
  readonly #keeping = new Set<Promise<LayerRecord>>();
  /** Mount ids that keys of the snapshotter were given, as told last. */
  #inUse: ReadonlySet<number> = new Set();
  #idleTimer: NodeJS.Timeout | undefined;
  readonly #stop = new AbortController();

  private constructor(
    options: DataPlaneOptions,
    parts: {
      choice: TransportChoice;
      registry: RegistryPool;
      catalog: IndexCatalog;
      store: NodeStore;
      book: LayerBook;
      loader: LazyLoader;
      transport: Transport;
      credentials: Map<string, Credentials>;
    },
  ) {
    this.root = options.paths.root;
    this.#options = options;
    this.#choice = parts.choice;
    this.#registry = parts.registry;
    this.#catalog = parts.catalog;
    this.#store = parts.store;
    this.#book = parts.book;
    this.#loader = parts.loader;
    this.#transport = parts.transport;
    this.#credentials = parts.credentials;
    const store = parts.store;
    this.#mounts = new MountTable({
      paths: options.paths,
      transport: parts.transport,
      layout: parts.choice.layout,
      images: {
        storeBytes: store.storeBytes,
        imageFor: async (key, layerIds) => (await store.createImage(key, layerIds)).id,
        layerAddresses: (layerId) => store.layerAddresses(layerId),
        checkIndex: (layerId) => parts.book.checkIndexFile(layerId),
        placeMetadata: (address, file) => store.placeMetadata(address, file),
        pin: (imageId, layerIds) => store.pin(imageId, layerIds),
        unpin: (imageId) => store.unpin(imageId),
      },
      build: buildImage,
      log: options.log,
    });
    this.#references = new ReferenceMounts({
      repository: (reference, given) =>
        given === ''
          ? this.#repository({ host: reference.host, repository: reference.path })
          : this.#registry.repository(reference, this.#remember(reference.host, given)),
      scopeOf: (source) => this.#scopeOf(source),
      known: async (wanted, signal) => {
        const row = await this.#layer(wanted, signal);
        this.#expect(row);
        return row;
      },
      indexHere: (wanted, blob, repository, progress, signal) =>
        this.#indexHere(wanted, blob, repository, progress, signal),
      mountable: (row) => this.#mountable(row),
      mounts: this.#mounts,
    });
  }

  /** Opens store, registry, transport. The caller holds the root's lock. Errors: STORE_IO, STORE_CORRUPT, KERNEL_UNSUPPORTED. */
  static async open(options: DataPlaneOptions): Promise<DataPlane> {
    const { config, paths, run, log } = options;
    const suited = chooseTransport(inspectMachine(), config.transport);
    const choice = { ...suited, layout: options.layout ?? suited.layout };
    log.info({ transport: choice.name, layout: choice.layout, because: choice.because }, 'transport chosen');
    const credentials = new Map<string, Credentials>();
    const registry = new RegistryPool({ ...registryOptions(config), log });
    const store = await NodeStore.open({ paths, native: native(), log });
    const opened: AsyncDisposable[] = [registry, { [Symbol.asyncDispose]: () => store.close() }];
    try {
      const catalog = new IndexCatalog({ paths, trust: config.index_trust });
      const windowCache = new WindowCache(WINDOW_CACHE_BYTES);
      const repository = (source: LayerSourceName): Repository =>
        registry.repository({ host: source.host, path: source.repository }, credentials.get(source.host));
      const windows = (index: LayerIndex): RestartReader =>
        new RestartReader(index, paths.layerRestart(index.restart.digest), windowCache);
      const book = await LayerBook.open({ paths, store, repository, windows });
      const limits = { requestsPerHost: config.dedupd.workers, edgeBytes: config.span_cache_bytes };
      const loader = new LazyLoader({ store, layers: book, native: native(), log, limits });
      opened.push({ [Symbol.asyncDispose]: async () => loader.close() });
      let plane: DataPlane | undefined;
      const transport = await openTransport(choice, {
        mountDir: run.fuseMount,
        store: {
          fd: store.fd,
          bytes: store.storeBytes,
          headBytes: store.headBytes,
          tailBytes: store.tailBytes,
          presence: store.presence,
        },
        source: {
          read: (range, imageId) => loader.read(range, { layers: plane?.layersOfImage(imageId) ?? [] }),
        },
        log,
      });
      opened.push(transport);
      plane = new DataPlane(options, { choice, registry, catalog, store, book, loader, transport, credentials });
      plane.#collectWhenIdle();
      await plane.#mounts.removeLeftovers();
      await plane.#removeOrphanFiles(true);
      await store.unpinAll();
      return plane;
    } catch (error) {
      for (const resource of opened.reverse()) await resource[Symbol.asyncDispose]();
      throw error;
    }
  }

  /**
   * Collects garbage once after every burst of reads. Buffers of fetched spans are outside the JavaScript heap, which
   * alone is too small to make the engine look for them; a node has better use for that memory.
   */
  #collectWhenIdle(): void {
    const { gc } = globalThis;
    if (gc === undefined) return; // Only the launcher starts us with it.
    let collected = -1; // What starting left behind counts as the first burst.
    let seen = 0;
    this.#idleTimer = setInterval(() => {
      const { reads, waiting } = this.#loader.stats();
      if (reads === seen && reads !== collected && waiting === 0) {
        gc();
        collected = reads;
      }
      seen = reads;
    }, IDLE_CHECK_MS).unref();
  }

  get transportName(): string {
    return this.#choice.name;
  }

  #repository(source: LayerSourceName): Repository {
    return this.#registry.repository(
      { host: source.host, path: source.repository },
      this.#credentials.get(source.host),
    );
  }

  /** Layers of a mounted image, for the loader: where to fetch from first. */
  layersOfImage(imageId: number): readonly number[] {
    return this.#mounts.layerIds(imageId);
  }

  #remember(host: string, userAndPassword: string): Credentials {
    const credentials = parseUserPassword(userAndPassword);
    this.#credentials.set(host, credentials);
    return credentials;
  }

  giveCredentials(host: string, userAndPassword: string): void {
    this.#remember(host, userAndPassword);
  }

  async mountReference(
    request: { reference: string; directory: string; platform: string; credentials: string },
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string> {
    const path = await this.#references.mount(request, progress, AbortSignal.any([signal, this.#stop.signal]));
    // The mount keeps its layers now.
    for (const image of this.#mounts.list()) for (const { layerId } of image.layers) this.#expected.delete(layerId);
    return path;
  }

  unmountReference(directory: string): Promise<void> {
    return this.#references.unmount(directory);
  }

  /** The part of a chunk's identity that keeps tenants apart (configuration key `dedup_scope`). */
  #scopeOf(source: LayerSourceName): string {
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
      key: { ...key, scope: key.scope === '' ? this.#scopeOf(source) : key.scope },
      sources: request.sources,
      manifest: request.manifest,
      reference: '',
    });
    const layer = wanted(request.layer);
    if (isDigest(request.manifest)) this.#prepareImage(request.manifest, request.sources);
    const budget = AbortSignal.timeout(Math.max(1, request.budget_ms));
    try {
      const row = await abandonOn(budget, this.#layer(layer, this.#stop.signal));
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
    const key = JSON.stringify([manifest, sources[0]]);
    if (this.#prepared.has(key)) return;
    this.#prepared.set(key, true);
    this.#fetchAhead(manifest, sources).catch((error: unknown) => {
      // Nothing depends on it: every Prepare asks for its own layer, and says why if that fails too.
      this.#prepared.delete(key);
      this.#options.log.debug({ err: error, manifest }, 'preparing an image ahead failed');
    });
  }

  async #fetchAhead(manifest: Digest, sources: readonly LayerSourceName[]): Promise<void> {
    const source = sources[0];
    if (source === undefined) return;
    const { bytes } = await this.#repository(source).getManifest(manifest, this.#stop.signal);
    const { layers } = parseManifest(bytes, `manifest ${manifest}`);
    const image: number[] = [];
    const rows = await Promise.all(
      layers.map(async ({ digest, annotations }) => {
        const index = annotations[INDEX_ANNOTATION] ?? '';
        const key = { digest, index, scope: this.#scopeOf(source) };
        if (index === '') return undefined;
        const known = this.#book.find(key) !== undefined;
        const row = await this.#layer({ key, sources, manifest, reference: '' }, this.#stop.signal);
        image.push(row.id);
        if (!known) this.#expected.set(row.id, { untilMs: performance.now() + EXPECTED_MS, image });
        return row;
      }),
    );
    const lazy = rows.filter((row) => row !== undefined);
    if (lazy.length < rows.length) return;
    await this.#mounts.prebuild(await Promise.all(lazy.map((row) => this.#mountable(row))));
  }

  /** The stored layer; its index is fetched when it is not known. Errors: LAYER_NOT_LAZY with the reason, and of the registry. */
  async #layer(wanted: WantedLayer, signal: AbortSignal): Promise<LayerRecord> {
    const { index_trust } = this.#options.config;
    const known = this.#book.find(wanted.key);
    if (known?.condemned === true) throw new DedupError('LAYER_NOT_LAZY', 'its index was found to be wrong');
    if (known !== undefined && index_trust.includes(known.trust)) {
      await this.#book.addSources(known.id, wanted.sources);
      return known;
    }
    // What one image's referrers say is not another image's word, and one source's failure not another source's.
    const id = JSON.stringify([wanted.key, wanted.sources, wanted.manifest]);
    let adding = this.#adding.get(id);
    if (adding === undefined) {
      adding = this.#discover(wanted, signal).finally(() => this.#adding.delete(id));
      this.#adding.set(id, adding);
    }
    const row = await adding;
    await this.#book.addSources(row.id, wanted.sources);
    return row;
  }

  async #discover(wanted: WantedLayer, signal: AbortSignal): Promise<LayerRecord> {
    const { index_trust } = this.#options.config;
    const { key } = wanted;
    const digest = parseDigest(key.digest);
    const annotated = key.index !== '' && index_trust.includes('annotation');
    if (annotated && !isDigest(key.index)) {
      throw new DedupError('LAYER_NOT_LAZY', 'its index annotation is not a SHA-256 digest');
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
        return await this.#add(index, indexDigest, wanted, annotated ? 'annotation' : 'referrer');
      } catch (error) {
        failure = error;
      }
    }
    throw failure;
  }

  /** Reads a whole layer once to index it on this node. Errors: LAYER_NOT_LAZY, LAYER_INVALID, and of the registry. */
  async #indexHere(
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
    const { index, indexBlob, restartBlob } = await buildLayerIndex({
      stream: repository.readAll(blob, signal),
      layerDigest: blob.digest,
      layerBytes: blob.size,
      chunkBytes: this.#options.config.chunk_size,
      pieceBytes: Math.min(MiB, this.#options.config.chunk_size),
      onProgress: progress,
      signal,
    });
    const keeping = this.#catalog
      .keep(indexBlob, restartBlob)
      .then((indexDigest) => this.#add(index, indexDigest, wanted, 'local'));
    this.#keeping.add(keeping);
    try {
      const row = await keeping;
      this.#expect(row);
      return row;
    } finally {
      this.#keeping.delete(keeping);
    }
  }

  /** Keeps a layer of a standalone mount under way, which no snapshot names. */
  #expect(row: LayerRecord): void {
    this.#expected.set(row.id, { untilMs: performance.now() + EXPECTED_MS, image: [] });
  }

  async #add(index: LayerIndex, indexDigest: Digest, wanted: WantedLayer, trust: LayerTrust): Promise<LayerRecord> {
    const { layerId } = await this.#store.addLayer(index, {
      scope: wanted.key.scope,
      indexDigest,
      sources: wanted.sources,
      trust,
      reference: wanted.reference,
      contiguousFiles: this.#choice.layout === 'flat',
    });
    await this.#book.reload();
    return this.#book.get(layerId);
  }

  /** Makes sure that the layer's index is on disk. Errors: NOT_FOUND, and those of the registry. */
  async #mountable(row: LayerRecord): Promise<MountableLayer> {
    if (!existsSync(this.#book.indexPath(row))) {
      await this.#fetchIndexAgain(row);
    }
    return { layerId: row.id, digest: row.digest, indexPath: this.#book.indexPath(row) };
  }

  async #fetchIndexAgain(row: LayerRecord): Promise<void> {
    const wanted = { layerDigest: parseDigest(row.digest), indexDigest: parseDigest(row.indexDigest) };
    let failure: unknown = new DedupError('NOT_FOUND', `the index of layer ${row.digest} is gone and has no source`);
    for (const source of row.sources) {
      try {
        await this.#catalog.load(wanted, this.#repository(source), this.#stop.signal);
        return;
      } catch (error) {
        failure = error; // The next source may have it.
      }
    }
    throw failure;
  }

  async mountImage(
    layers: readonly LayerKeyMessage[],
    bottom: boolean,
    below: readonly BelowMessage[],
  ): Promise<{ path: string; mountId: number; rootUid: number; rootGid: number }> {
    const lowers: MountableBelow[] = [];
    for (const { directory, layers } of bottom ? [] : below) {
      if (layers.length > 0) lowers.push({ kind: 'layers', layers: await this.#mountableLayers(layers) });
      else if (isAbsolute(directory)) lowers.push({ kind: 'directory', path: directory });
      else throw new DedupError('INVALID_ARGUMENT', 'what lies below an image is an absolute path, or layers');
    }
    const image = await this.#mounts.mount(await this.#mountableLayers(layers), bottom, lowers);
    image.used = true;
    return { path: image.path, mountId: image.id, rootUid: image.rootUid, rootGid: image.rootGid };
  }

  /** Errors: NOT_FOUND for a layer that was dropped. */
  async #mountableLayers(keys: readonly LayerKeyMessage[]): Promise<MountableLayer[]> {
    const mountable: MountableLayer[] = [];
    for (const key of keys) {
      const row = this.#book.find(key);
      if (row === undefined) {
        throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node any more`, {
          hint: 'remove the image and pull it again',
        });
      }
      mountable.push(await this.#mountable(row));
    }
    return mountable;
  }

  async releaseImages(inUse: readonly number[]): Promise<number> {
    this.#inUse = new Set(inUse);
    return await this.#mounts.release(this.#inUse, () => true);
  }

  async retainLayers(layers: readonly LayerKeyMessage[]): Promise<number> {
    const startedMs = performance.now();
    const before = new Set(this.#book.all().map(({ id }) => id));
    for (const [id, promisedMs] of this.#promised) if (promisedMs < startedMs) this.#promised.delete(id);
    const keep = new Set<number>();
    for (const key of layers) {
      const row = this.#book.find(key);
      if (row !== undefined) keep.add(row.id);
    }
    // The caller may give up waiting and let others prepare: what they are told meanwhile is not on its list.
    const kept = (id: number): boolean => keep.has(id) || this.#promised.has(id) || !before.has(id);
    await this.#mounts.release(this.#inUse, kept);
    const named = new Set(keep);
    for (const image of this.#mounts.list()) for (const layer of image.layers) keep.add(layer.layerId);
    // Layers of an image that is just being pulled have no snapshot yet.
    for (const adding of this.#adding.values()) await adding.then((row) => keep.add(row.id)).catch(() => undefined);
    for (const [layerId, { untilMs, image }] of this.#expected) {
      // No Prepare is under way now: a pull that goes on has left a snapshot of one of its layers.
      const goesOn = image.length === 0 || image.some((id) => named.has(id));
      if (goesOn && performance.now() < untilMs) keep.add(layerId);
      else this.#expected.delete(layerId);
    }
    let asked = false;
    let dropped: number[] = [];
    try {
      dropped = await this.#store.retainLayers((id) => {
        asked = true;
        const stays = kept(id) || this.#expected.has(id);
        // Nobody is told any more that it is here.
        if (!stays) this.#book.forget(id);
        return stays;
      });
    } finally {
      if (asked) await this.#book.reload();
    }
    this.#loader.forget(dropped);
    if (dropped.length > 0) await this.#removeOrphanFiles();
    return dropped.length;
  }

  /** Deletes metadata and index files that no row names any more; at the start also what builds that died have left. */
  async #removeOrphanFiles(starting = false): Promise<void> {
    const { paths } = this.#options;
    // Files are listed before rows are looked at: one that is being made has its row by then.
    const metadata = await readdir(paths.images).catch(() => []);
    const indexes = await readdir(paths.layers).catch(() => []);
    await Promise.allSettled([...this.#adding.values(), ...this.#keeping]);
    const images = new Set((await this.#store.images()).map((image) => `${image.id}.erofs`));
    for (const name of metadata) {
      const file = /^\d+\.erofs|.*\.erofs.*/.exec(name)?.[0];
      if (file === undefined) continue;
      // N.erofs.tmp-PID is what the build of image N is writing.
      const named = images.has(starting ? name : file);
      if (!named) await rm(join(paths.images, name), { force: true });
    }
    const kept = new Set(
      this.#book
        .all()
        .flatMap((row) => [
          paths.layerIndex(row.indexDigest as Digest),
          paths.layerRestart(row.restartDigest as Digest),
        ]),
    );
    for (const name of indexes) {
      const path = join(paths.layers, name);
      if (!kept.has(path) && !name.endsWith('.tmp')) await rm(path, { force: true });
    }
  }

  async layerUsage(key: LayerKeyMessage): Promise<{ bytes: number; inodes: number }> {
    const row = this.#book.find(key);
    if (row === undefined) throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node`);
    const { chunks, entries } = await this.#book.readIndex(row.id, 'all');
    let bytes = 0;
    for (let i = 0; i < chunks.count; i++) bytes += chunks.length[i]!;
    return { bytes, inodes: entries.count };
  }

  async listImages(): Promise<ImageInfoMessage[]> {
    const found: ImageInfoMessage[] = [];
    for (const image of this.#mounts.list()) {
      const seen = new Set<number>();
      let total = 0;
      let present = 0;
      for (const layer of image.layers) {
        const { index, addresses } = await this.#book.openLayer(layer.layerId);
        for (let i = 0; i < addresses.length; i++) {
          const address = addresses[i]!;
          const length = index.chunks.length[i]!;
          if (address === 0 || seen.has(address)) continue;
          seen.add(address);
          total += length;
          if (this.#store.isPresent(address, length)) present += length;
        }
      }
      found.push({
        mount_id: image.id,
        path: [...image.holders.keys()][0] ?? image.path,
        layers: image.layers.map((layer) => layer.digest),
        total_bytes: total,
        present_bytes: present,
        transport: this.#choice.name,
        reference: [...image.holders.values()][0] ?? '',
      });
    }
    return found;
  }

  async stats(): Promise<StatsMessage> {
    const store = await this.#store.stats();
    const loader = this.#loader.stats();
    const transport = this.#transport.stats();
    const traffic = this.#registry.traffic;
    return {
      chunks: store.chunks,
      chunk_bytes: store.chunkBytes,
      present_bytes: store.presentBytes,
      requests: loader.requests,
      wire_bytes: loader.wireBytes,
      misses: loader.misses,
      hits: transport.hits,
      span_bytes: loader.spanBytes,
      control_bytes: traffic.bytes - loader.wireBytes,
      control_requests: traffic.requests - loader.requests,
      ahead_bytes: loader.aheadBytes,
    };
  }

  /** Unmounts everything, answers what is outstanding, flushes the store. Idempotent. */
  async close(): Promise<void> {
    clearInterval(this.#idleTimer);
    this.#stop.abort(new DedupError('CLOSED', 'dedupd is stopping'));
    await this.#references.close();
    await this.#mounts.close();
    this.#loader.close();
    await this.#transport.close();
    await this.#store.close();
    await this.#registry.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
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
