// Everything dedupd does, put together: layers and their indexes, the node store, the LazyLoader, one transport, the
// mounted images. The control server calls it; it decides nothing about snapshots.
import { isAbsolute } from 'node:path';
import type { Config } from '../config.ts';
import { type Digest, isDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { NumbersNow } from '../metrics.ts';
import { orAborted } from '../or-aborted.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { fetchImageStart } from '../prefetch/image-start.ts';
import { identityOf, Prefetch, type StartingImage } from '../prefetch/prefetch.ts';
import { findTrace } from '../prefetch/trace-artifact.ts';
import { TraceStore } from '../prefetch/trace-store.ts';
import { WarmList } from '../prefetch/warm-list.ts';
import { isConfigured, WarmUp } from '../prefetch/warm-up.ts';
import { registryOptions } from '../registry-settings.ts';
import { MiB } from '../units.ts';
import type { LayerSourceName } from './chunks/index-protocol.ts';
import { NodeStore } from './chunks/node-store.ts';
import type {
  BelowMessage,
  ControlledPlane,
  ConvertLayerMessage,
  ConvertProgressMessage,
  GcProgressMessage,
  ImageInfoMessage,
  LayerKeyMessage,
  MountProgressMessage,
  PrepareLayerMessage,
  SpaceMessage,
  StatsMessage,
} from './control-server.ts';
import { buildDirectoryIndex } from './directory/build-index.ts';
import { IdleGate } from './idle-gate.ts';
import { buildImage, prepareBuilder } from './image/build-image.ts';
import { type ImageAhead, ImagesAhead, type ManifestLayer, type ReadProgress } from './image-ahead.ts';
import { IndexCatalog } from './index/discovery.ts';
import { IndexPublisher } from './index/index-publisher.ts';
import { KeptIndexes } from './index/kept-indexes.ts';
import type { LayerIndex } from './index/layer-index.ts';
import { RestartReader, WindowCache } from './index/restart-reader.ts';
import { LayerBook } from './layer-book.ts';
import { LayerIntake } from './layer-intake.ts';
import { LazyLoader } from './lazy-loader.ts';
import { type MountableBelow, type MountableLayer, MountTable } from './mount-table.ts';
import { native } from './native.ts';
import { reportNumbers } from './numbers-report.ts';
import { OrdinaryLayers } from './ordinary-layers.ts';
import { detachDeadSessions, removeHalfWritten } from './orphans.ts';
import { ReferenceMounts } from './reference-mounts.ts';
import type { Repository } from './registry/blob-reader.ts';
import { type Credentials, parseUserPassword } from './registry/credentials.ts';
import type { LocalBlobs } from './registry/local-blobs.ts';
import { RegistryPool, type RepositoryName } from './registry/pool.ts';
import { Retention } from './retention.ts';
import { collectGarbage, reportSpace } from './space-report.ts';
import { SpareRoom } from './spare-room.ts';
import { dataDeviceName, detachOrphans, imageDevices, imagesInUse } from './transport/erofs-mount.ts';
import { inspectMachine } from './transport/machine.ts';
import { chooseTransport, openTransport, type TransportChoice } from './transport/select.ts';
import type { ErofsLayoutKind, Transport } from './transport/transport.ts';
import { verifyAnew } from './verify-anew.ts';

/** Memory for decompressed windows of gzip restart points, bytes. */
const WINDOW_CACHE_BYTES = 4 * MiB;

/** A trace that its registry does not give by then comes too late for the start, milliseconds. */
const TRACE_LOOK_UP_MS = 10_000;

/** A burst of reads is over when none came for this long. */
const IDLE_CHECK_MS = 1_000;

export interface DataPlaneOptions {
  readonly config: Config;
  readonly paths: RootPaths;
  readonly run: RunPaths;
  readonly log: Logger;
  /** Layers in containerd's own content store; absent: those are not looked at. */
  readonly localBlobs?: LocalBlobs | undefined;
  /** Layout of EROFS metadata; what the kernel calls for when absent. Newer kernels mount the older layout too. */
  readonly layout?: ErofsLayoutKind;
  /** As the LazyLoader's. */
  readonly onWaited?: ((ms: number) => void) | undefined;
}

export class DataPlane implements ControlledPlane, AsyncDisposable {
  readonly root: string;
  readonly warmUp: WarmUp;
  readonly #options: DataPlaneOptions;
  readonly #choice: TransportChoice;
  readonly #registry: RegistryPool;
  /** A source with the credentials known for its host now. */
  readonly #repository: (source: LayerSourceName) => Repository;
  readonly #store: NodeStore;
  readonly #book: LayerBook;
  readonly #loader: LazyLoader;
  readonly #transport: Transport;
  readonly #mounts: MountTable;
  readonly #intake: LayerIntake;
  readonly #publisher: IndexPublisher;
  readonly #ahead: ImagesAhead;
  readonly #ordinary: OrdinaryLayers;
  readonly #prefetch: Prefetch;
  readonly #retention: Retention;
  readonly #references: ReferenceMounts;
  readonly #credentials: Map<string, Credentials>;
  #idleTimer: NodeJS.Timeout | undefined;
  /** Calls that a container or a pull waits for. */
  #mountsAsked = 0;
  readonly #stop = new AbortController();

  private constructor(
    options: DataPlaneOptions,
    parts: {
      choice: TransportChoice;
      registry: RegistryPool;
      repository: (source: LayerSourceName) => Repository;
      catalog: IndexCatalog;
      store: NodeStore;
      book: LayerBook;
      kept: KeptIndexes;
      loader: LazyLoader;
      transport: Transport;
      credentials: Map<string, Credentials>;
    },
  ) {
    this.root = options.paths.root;
    this.#options = options;
    this.#choice = parts.choice;
    this.#registry = parts.registry;
    this.#repository = parts.repository;
    this.#store = parts.store;
    this.#book = parts.book;
    this.#loader = parts.loader;
    this.#transport = parts.transport;
    this.#credentials = parts.credentials;
    const store = parts.store;
    const idle = new IdleGate(
      // A pull asks registries before anybody reads, and a mount builds before that.
      () => parts.loader.stats().misses + parts.registry.traffic.requests + this.#mountsAsked,
      () => parts.loader.stats().waiting > 0 || this.#ahead.isReading,
    );
    const { enabled, workers, queue_size, trace_dir } = options.config.prefetch;
    this.#prefetch = new Prefetch({
      loader: parts.loader,
      transport: parts.transport,
      traces: new TraceStore(trace_dir),
      isPresent: (address, length) => store.isPresent(address, length),
      readIndex: (layerId) => parts.book.readIndex(layerId, 'all'),
      enabled,
      workers,
      queueSize: queue_size,
      log: options.log,
    });
    this.#mounts = new MountTable({
      paths: options.paths,
      transport: parts.transport,
      layout: parts.choice.layout,
      direct: options.config.direct_mounts && parts.transport.capabilities.direct,
      images: {
        storeBytes: store.storeBytes,
        imageFor: async (key, layerIds) => (await store.createImage(key, layerIds)).id,
        layerAddresses: (layerId) => store.layerAddresses(layerId),
        checkIndex: (layerId) => this.#intake.checkIndex(parts.book.get(layerId)),
        placeMetadata: (address, file) => store.placeMetadata(address, file),
        pin: (imageId, layerIds) => store.pin(imageId, layerIds),
        unpin: (imageId) => store.unpin(imageId),
        isForeign: (imageId) => store.isForeign(imageId),
        admitDirect: ({ imageId, layers, metadataInStore }, attach) => {
          const loop = dataDeviceName(imageId, store.id);
          const metadata = options.paths.imageMetadata(imageId);
          return store.direct.admit({ imageId, layers, metadataInStore, loop, metadata }, attach);
        },
        lookAtDirect: (mounted) => store.direct.look(mounted),
        known: () => this.#knownImages(),
      },
      build: buildImage,
      onMounted: ({ id, layers }) => {
        const layerIds = layers.map(({ layerId }) => layerId);
        const book = new Map(parts.book.all().map((row) => [row.id, row]));
        const known = layerIds.map((layerId) => book.get(layerId)).filter((row) => row !== undefined);
        if (known.length < layerIds.length) return; // Dropped under it: nothing is worth noting.
        void this.#prefetch.mounted(id, { layerIds, identity: identityOf(known), signal: this.#stop.signal });
      },
      onUnserved: (imageId) => this.#prefetch.unmounted(imageId),
      log: options.log,
    });
    this.#intake = new LayerIntake({
      config: options.config,
      catalog: parts.catalog,
      store,
      book: parts.book,
      repository: parts.repository,
      kept: parts.kept,
      paths: options.paths,
      contiguousFiles: parts.choice.layout === 'flat',
      stop: this.#stop.signal,
      log: options.log,
    });
    this.#ahead = new ImagesAhead({
      intake: this.#intake,
      book: parts.book,
      repository: parts.repository,
      readsWhole: parts.choice.layout !== 'flat' && options.config.index_trust.includes('local'),
      expectBuild: prepareBuilder,
      prebuild: (layers, config) => this.#prebuild(layers, config),
      known: (layers, { manifest, source, tag }) => {
        const { signal } = this.#stop;
        const identity = identityOf(layers, { manifest, tag, repository: `${source.host}/${source.repository}` });
        const looked = AbortSignal.any([signal, AbortSignal.timeout(TRACE_LOOK_UP_MS)]);
        const inRegistry: StartingImage['registry'] = (digests) =>
          findTrace(parts.repository(source), manifest, digests, looked);
        const registry = options.config.registry_traces ? inRegistry : undefined;
        this.#prefetch.begin({ layerIds: layers.map(({ id }) => id), identity, registry, signal });
      },
      indexed: (manifest, source) => this.#indexed(manifest, source),
      stop: this.#stop.signal,
      log: options.log,
    });
    this.#retention = new Retention({
      paths: options.paths,
      store,
      book: parts.book,
      kept: parts.kept,
      intake: this.#intake,
      ahead: this.#ahead,
      mounts: this.#mounts,
      warmed: () => this.warmUp.kept(),
    });
    const spare = new SpareRoom({
      directory: options.paths.chunks,
      quotaBytes: store.quotaBytes,
      presentBytes: () => store.presentBytes(),
    });
    this.#ordinary = new OrdinaryLayers({
      store,
      intake: this.#intake,
      readDirectory: buildDirectoryIndex,
      blobs: options.localBlobs,
      leaveIndex: options.config.publish_index !== 'off',
      indexed: (manifest, source) => this.#indexed(manifest, source),
      gate: (signal) => idle.pass(signal),
      requireRoom: (bytes) => spare.require(bytes),
      log: options.log,
    });
    this.#publisher = new IndexPublisher({
      paths: options.paths,
      find: (digest) => parts.book.all().find((row) => row.digest === digest && row.trust === 'local'),
      stop: this.#stop.signal,
      log: options.log,
    });
    this.#references = new ReferenceMounts({
      repository: (reference, given) =>
        given === ''
          ? this.#repository({ host: reference.host, repository: reference.path })
          : this.#registry.repository(reference, this.#remember(reference.host, given)),
      scopeOf: (source) => this.#intake.scopeOf(source),
      known: async (wanted, signal) => {
        const row = await this.#intake.layer(wanted, signal);
        this.#intake.expected.forMount(row.id);
        return row;
      },
      indexHere: (wanted, blob, repository, progress, signal) =>
        this.#intake.indexHere(wanted, blob, repository, progress, signal),
      mountable: (row) => this.#intake.mountable(row),
      mounts: this.#mounts,
      file: options.run.standaloneMounts,
      log: options.log,
    });
    const settings = options.config.warm_up;
    this.warmUp = new WarmUp({
      repository: (reference, given) => this.repository(reference, given),
      remember: (host, given) => this.giveCredentials(host, given),
      scopeOf: (source) => this.#intake.scopeOf(source),
      known: (wanted, signal) =>
        // Others may wait for the same layer: it comes whatever becomes of this call.
        orAborted(this.#intake.layer(wanted, this.#stop.signal), signal, () => signal.reason),
      find: (key) => parts.book.find(key),
      mountable: (row) => this.#intake.mountable(row),
      prebuild: (layers) => this.#mounts.prebuild(layers),
      prefetch: this.#prefetch,
      loader: parts.loader,
      isPresent: (address, length) => store.isPresent(address, length),
      list: new WarmList({
        file: options.paths.warmList,
        isConfigured: (reference) => isConfigured(settings, reference),
        log: options.log,
      }),
      settings,
      registryTraces: options.config.registry_traces,
      stop: this.#stop.signal,
      log: options.log,
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
    const store = await NodeStore.open({
      paths,
      native: native(),
      quotaBytes: config.quota_bytes,
      livingImages: imagesInUse,
      devices: imageDevices,
      log,
    });
    const opened: AsyncDisposable[] = [registry, { [Symbol.asyncDispose]: () => store.close() }];
    try {
      await removeHalfWritten(paths, run, log);
      await detachDeadSessions(run, log);
      const catalog = new IndexCatalog({ paths, trust: config.index_trust });
      const windowCache = new WindowCache(WINDOW_CACHE_BYTES);
      const repository = (source: LayerSourceName): Repository =>
        registry.repository({ host: source.host, path: source.repository }, credentials.get(source.host));
      const windows = (index: LayerIndex): RestartReader =>
        new RestartReader(index, paths.layerRestart(index.restart.digest), windowCache);
      const book = await LayerBook.open({ paths, store, repository, windows });
      if (store.presenceLost) await verifyAnew(store, book, log);
      const kept = await KeptIndexes.open(paths.keptIndexes, log);
      const limits = {
        requestsPerHost: config.dedupd.workers,
        aheadPerHost: config.prefetch.workers,
        edgeBytes: config.span_cache_bytes,
      };
      const loader = new LazyLoader({
        store,
        layers: book,
        native: native(),
        log,
        limits,
        guess: config.prefetch.enabled,
        onWaited: options.onWaited,
      });
      opened.push({ [Symbol.asyncDispose]: async () => loader.close() });
      store.onDropped(async (layerIds) => {
        loader.forget(layerIds);
        await loader.drained();
      });
      let plane: DataPlane | undefined;
      const transport = await openTransport(choice, {
        mountDir: run.fuseMount,
        store,
        source: {
          read: (range, imageId) => loader.read(range, { layers: plane?.layersOfImage(imageId) ?? [] }),
        },
        log,
      });
      opened.push(transport);
      plane = new DataPlane(options, {
        choice,
        registry,
        repository,
        catalog,
        store,
        book,
        kept,
        loader,
        transport,
        credentials,
      });
      plane.#watchForIdleTimes();
      await store.unpinAll();
      // First: what has no metadata any more is not taken over.
      await plane.#retention.removeOrphanFiles();
      await plane.#references.resume(await plane.#mounts.resume());
      await detachOrphans(store.id, log);
      await store.direct.look();
      void plane.warmUp.keepConfigured(); // Never rejects.
      return plane;
    } catch (error) {
      for (const resource of opened.reverse()) await resource[Symbol.asyncDispose]();
      throw error;
    }
  }

  /**
   * After every burst of reads: images that are complete now are read without us from then on, and garbage is collected
   * once. Buffers of fetched spans are outside the JavaScript heap, which alone is too small to make the engine look for
   * them; a node has better use for that memory.
   */
  #watchForIdleTimes(): void {
    const { gc } = globalThis; // Only the launcher starts us with it.
    let collected = -1; // What starting left behind counts as the first burst.
    let seen = 0;
    this.#idleTimer = setInterval(() => {
      const { reads, waiting } = this.#loader.stats();
      const idle = reads === seen && waiting === 0;
      seen = reads;
      if (!idle) return;
      void this.#mounts.completeImages(); // Never rejects.
      if (gc === undefined || reads === collected) return;
      gc();
      collected = reads;
    }, IDLE_CHECK_MS).unref();
  }

  get transportName(): string {
    return this.#choice.name;
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

  /** Images made before that could be mounted now, whether they are or not. */
  async #knownImages(): Promise<{ id: number; layers: MountableLayer[] }[]> {
    const found: { id: number; layers: MountableLayer[] }[] = [];
    const rows = new Map(this.#book.all().map((row) => [row.id, row]));
    for (const { id, layers } of await this.#store.images()) {
      const known = layers.map((layerId) => rows.get(layerId)).filter((row) => row !== undefined && !row.condemned);
      if (known.length < layers.length) continue;
      found.push({
        id,
        layers: known.map((row) => ({ layerId: row!.id, digest: row!.digest, indexPath: this.#book.indexPath(row!) })),
      });
    }
    return found;
  }

  /** A repository with the credentials (user:password) given, or those known for its host. Errors: INVALID_ARGUMENT. */
  repository(name: RepositoryName, userAndPassword = ''): Repository {
    return userAndPassword === ''
      ? this.#repository({ host: name.host, repository: name.path })
      : this.#registry.repository(name, parseUserPassword(userAndPassword));
  }

  /** Makes the layers of an image ready that a pull is about to offer to containerd. */
  imageAhead(
    manifest: Digest,
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    source: RepositoryName & { readonly tag?: string | undefined },
    onRead: ReadProgress,
    ours: Promise<boolean>,
  ): ImageAhead {
    const from = { host: source.host, repository: source.path, tag: source.tag };
    return this.#ahead.ofPull(manifest, layers, config, from, onRead, ours);
  }

  /** Builds an image's file system ahead of its mount, and has the files of its start fetched. Errors: those of the layers. */
  async #prebuild(layers: readonly MountableLayer[], config: Promise<Buffer>): Promise<void> {
    const layerIds = layers.map(({ layerId }) => layerId);
    const opening = this.#loader.open(layerIds);
    opening.catch(() => undefined); // Whoever reads the layer opens it, and is told.
    const metadata = await this.#mounts.prebuild(layers);
    await opening;
    if (metadata === undefined || !this.#options.config.prefetch.enabled) return;
    const { log } = this.#options;
    const signal = this.#stop.signal;
    // A trace of the image knows better.
    if (await this.#prefetch.built(layerIds, metadata, signal)) return;
    await fetchImageStart({ metadata, layerIds, config: await config, loader: this.#loader, signal, log });
  }

  /** Has the indexes of an image pushed beside it, where that is wished for. */
  #indexed(manifest: Digest, source: LayerSourceName): void {
    if (this.#options.config.publish_index !== 'registry') return;
    void this.#publisher.publish(manifest, this.#repository(source));
  }

  async mountReference(
    request: { reference: string; directory: string; platform: string; credentials: string },
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string> {
    const path = await this.#references.mount(request, progress, AbortSignal.any([signal, this.#stop.signal]));
    // The mount keeps its layers now.
    for (const image of this.#mounts.list())
      for (const { layerId } of image.layers) this.#intake.expected.arrived(layerId);
    return path;
  }

  unmountReference(directory: string): Promise<void> {
    return this.#references.unmount(directory);
  }

  prepareLayer(request: PrepareLayerMessage): Promise<{ lazy: boolean; reason: string; layer: LayerKeyMessage }> {
    if (isDigest(request.manifest)) this.#ahead.ofPrepare(request.manifest, request.sources);
    return this.#intake.prepareLayer(request);
  }

  async mountImage(
    layers: readonly LayerKeyMessage[],
    bottom: boolean,
    below: readonly BelowMessage[],
  ): Promise<{ path: string; mountId: number; rootUid: number; rootGid: number }> {
    this.#mountsAsked++;
    const lowers: MountableBelow[] = [];
    for (const { directory, layers } of bottom ? [] : below) {
      if (layers.length > 0) lowers.push({ kind: 'layers', layers: await this.#intake.mountableLayers(layers) });
      else if (isAbsolute(directory)) lowers.push({ kind: 'directory', path: directory });
      else throw new DedupError('INVALID_ARGUMENT', 'what lies below an image is an absolute path, or layers');
    }
    const image = await this.#mounts.mount(await this.#intake.mountableLayers(layers), bottom, lowers);
    image.used = true;
    return { path: image.path, mountId: image.id, rootUid: image.rootUid, rootGid: image.rootGid };
  }

  /** Builds the file system of layers that lie on nothing, before it is mounted. Errors: NOT_FOUND, IMAGE_INVALID. */
  async prebuildImage(layers: readonly LayerKeyMessage[]): Promise<void> {
    await this.#mounts.prebuild(await this.#intake.mountableLayers(layers));
  }

  /**
   * Stores a layer that containerd unpacked (OrdinaryLayers.convert). It is kept for the caller, who is about to name it.
   * Errors: LAYER_NOT_LAZY when it must stay as it is, NOT_FOUND, STORE_IO, STORE_FULL, CANCELLED.
   */
  async convertLayer(
    request: ConvertLayerMessage,
    progress: (message: ConvertProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<LayerKeyMessage> {
    const { snapshot, directory, bottom, layer, manifest, sources, namespace, chain_id, parent_chain_id, bytes } =
      request;
    const row = await this.#ordinary.convert(
      {
        directory,
        name: `${snapshot} ${chain_id}`,
        digest: layer,
        sources,
        manifest,
        namespace,
        chainId: chain_id,
        parentChainId: bottom ? undefined : parent_chain_id,
        bytes,
      },
      progress,
      AbortSignal.any([signal, this.#stop.signal]),
    );
    return { digest: row.digest, index: row.indexDigest, scope: row.scope };
  }

  releaseImages(inUse: readonly number[]): Promise<number> {
    return this.#retention.releaseImages(inUse);
  }

  retainLayers(layers: readonly LayerKeyMessage[]): Promise<number> {
    return this.#retention.retainLayers(layers);
  }

  /** What the store takes, and what each image needs of it. */
  space(): Promise<SpaceMessage> {
    return reportSpace({
      store: this.#store,
      mounts: this.#mounts,
      layers: () => this.#book.all(),
      transport: this.#choice.name,
    });
  }

  /** Gives back at once what nobody uses. */
  async gc(show: (progress: GcProgressMessage) => void): Promise<void> {
    await collectGarbage(
      {
        store: this.#store,
        releaseIdle: () => this.#mounts.releaseIdle(),
        dropUnnamed: () => this.#retention.dropUnnamed(),
      },
      show,
    );
  }

  /** Errors: NOT_FOUND unless the layer is known and can be had: from a registry, or because all of it is here. */
  async confirmLayer(key: LayerKeyMessage): Promise<void> {
    const row = this.#book.find(key);
    if (row === undefined) throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node`);
    if (row.sources.length > 0 || (await this.#store.confirmLayer(row.id))) return;
    throw new DedupError('NOT_FOUND', `layer ${key.digest} has no source and is not here completely`);
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
        transport: image.direct ? 'direct' : this.#choice.name,
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
      prefetch_bytes: loader.prefetchBytes,
      prefetch_useful_bytes: loader.usefulBytes,
      prefetch_late_bytes: loader.lateBytes,
      prefetch_wasted_bytes: loader.wastedBytes,
      asked_bytes: this.#prefetch.asked.bytes,
      asked_present_bytes: this.#prefetch.asked.presentBytes,
    };
  }

  /** What the exporter shows. Errors: CLOSED, STORE_IO. */
  numbers(): Promise<NumbersNow> {
    return reportNumbers({
      store: this.#store,
      loader: this.#loader,
      transport: this.#transport,
      registry: this.#registry,
      mounts: this.#mounts,
      traces: this.#prefetch,
    });
  }

  /** The root is somebody else's now: close() takes nothing down by its path. */
  abandonMounts(): void {
    this.#references.abandon();
    this.#mounts.abandon();
  }

  /** Unmounts everything, answers what is outstanding, flushes the store. Idempotent. */
  async close(): Promise<void> {
    clearInterval(this.#idleTimer);
    this.#stop.abort(new DedupError('CLOSED', 'dedupd is stopping'));
    // In this order, and each step whatever became of the one before: nothing may stay mounted or open.
    const steps = [
      () => this.#prefetch.close(),
      () => this.#references.close(),
      () => this.#mounts.close(),
      () => this.#loader.close(),
      () => this.#transport.close(),
      () => this.#store.close(),
      () => this.#registry.close(),
    ];
    let failure: unknown;
    for (const step of steps) {
      try {
        await step();
      } catch (error) {
        failure ??= error;
      }
    }
    if (failure !== undefined) throw failure;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
