// The parts of the data plane that work on what plane-resources.ts opened: intake of layers, mounts, prefetch, conversion,
// retention, put together. Made by the DataPlane, which calls them; what they tell each other is said here and nowhere else.
import type { Config } from '../config.ts';
import type { Digest } from '../digest.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { fetchImageStart } from '../prefetch/image-start.ts';
import { identityOf, Prefetch, type StartingImage } from '../prefetch/prefetch.ts';
import { findTrace } from '../prefetch/trace-artifact.ts';
import { TraceStore } from '../prefetch/trace-store.ts';
import { WarmList } from '../prefetch/warm-list.ts';
import { isConfigured, WarmUp } from '../prefetch/warm-up.ts';
import type { LayerSourceName } from './chunks/index-protocol.ts';
import { buildDirectoryIndex } from './directory/build-index.ts';
import { IdleGate } from './idle-gate.ts';
import { buildImage, prepareBuilder } from './image/build-image.ts';
import { ImagesAhead } from './image-ahead.ts';
import type { MountableLayer } from './image-metadata.ts';
import { IndexPublisher, knownIndexes } from './index/index-publisher.ts';
import { LayerIntake } from './layer-intake.ts';
import { MountTable } from './mount-table.ts';
import { OrdinaryLayers } from './ordinary-layers.ts';
import type { PlaneResources } from './plane-resources.ts';
import { ReferenceMounts } from './reference-mounts.ts';
import type { LocalBlobs } from './registry/local-blobs.ts';
import { Retention } from './retention.ts';
import { SpareRoom } from './spare-room.ts';
import { dataDeviceName } from './transport/erofs-mount.ts';

/** A trace that its registry does not give by then comes too late for the start, milliseconds. */
const TRACE_LOOK_UP_MS = 10_000;

export interface ServiceOptions {
  readonly config: Config;
  readonly paths: RootPaths;
  readonly run: RunPaths;
  readonly log: Logger;
  /** Layers in containerd's own content store; absent: those are not looked at. */
  readonly localBlobs?: LocalBlobs | undefined;
}

export class PlaneServices {
  readonly prefetch: Prefetch;
  readonly mounts: MountTable;
  readonly intake: LayerIntake;
  readonly ahead: ImagesAhead;
  readonly retention: Retention;
  readonly ordinary: OrdinaryLayers;
  readonly references: ReferenceMounts;
  readonly warmUp: WarmUp;
  /** Holds conversions back. */
  readonly idle: IdleGate;
  readonly #options: ServiceOptions;
  readonly #resources: PlaneResources;
  readonly #publisher: IndexPublisher;
  readonly #stop: AbortSignal;

  /** `stop` is aborted when dedupd stops. */
  constructor(options: ServiceOptions, resources: PlaneResources, stop: AbortSignal) {
    this.#options = options;
    this.#resources = resources;
    this.#stop = stop;
    const { config, paths, log } = options;
    const { book, catalog, choice, kept, loader, registries, store } = resources;
    const repository = (source: LayerSourceName) => registries.ofSource(source);
    this.idle = new IdleGate(
      // A pull asks registries before anybody reads, and a mount, which is told of, builds before that.
      () => loader.stats().misses + registries.traffic.requests,
      () => loader.stats().waiting > 0 || this.ahead.isReading,
    );
    this.prefetch = this.#makePrefetch();
    this.mounts = this.#makeMounts();
    this.intake = new LayerIntake({
      config,
      catalog,
      store,
      book,
      repository,
      kept,
      paths,
      contiguousFiles: choice.layout === 'flat',
      stop,
      log,
    });
    this.ahead = this.#makeAhead();
    this.retention = new Retention({
      paths,
      store,
      book,
      kept,
      intake: this.intake,
      ahead: this.ahead,
      mounts: this.mounts,
      warmed: () => this.warmUp.kept(),
      suspend: (layerIds, goes) => loader.suspend(layerIds, goes),
    });
    const spare = new SpareRoom({
      directory: paths.chunks,
      quotaBytes: store.quotaBytes,
      presentBytes: () => store.presentBytes(),
    });
    this.ordinary = new OrdinaryLayers({
      store,
      intake: this.intake,
      readDirectory: buildDirectoryIndex,
      blobs: options.localBlobs,
      leaveIndex: config.publish_index !== 'off',
      indexed: (manifest, source) => this.#indexed(manifest, source),
      gate: (signal) => this.idle.pass(signal),
      requireRoom: (bytes) => spare.require(bytes),
      log,
    });
    this.#publisher = new IndexPublisher({
      paths,
      find: (digest) => knownIndexes(digest, book.all(), kept.find(digest), config.index_trust),
      stop,
      log,
    });
    this.references = this.#makeReferences();
    this.warmUp = this.#makeWarmUp();
  }

  #makePrefetch(): Prefetch {
    const { book, loader, store, transport } = this.#resources;
    const { enabled, workers, queue_size, trace_dir } = this.#options.config.prefetch;
    return new Prefetch({
      loader,
      transport,
      traces: new TraceStore(trace_dir),
      isPresent: (address, length) => store.isPresent(address, length),
      readIndex: (layerId) => book.readIndex(layerId, 'all'),
      enabled,
      workers,
      queueSize: queue_size,
      log: this.#options.log,
    });
  }

  #makeMounts(): MountTable {
    const { config, paths, log } = this.#options;
    const { book, choice, store, transport } = this.#resources;
    return new MountTable({
      paths,
      transport,
      layout: choice.layout,
      direct: config.direct_mounts && transport.capabilities.direct,
      images: {
        storeBytes: store.storeBytes,
        imageFor: async (key, layerIds, how) => (await store.createImage(key, layerIds, how)).id,
        layerAddresses: (layerId) => store.layerAddresses(layerId),
        checkIndex: (layerId) => this.intake.checkIndex(book.get(layerId)),
        placeMetadata: (address, file) => store.placeMetadata(address, file),
        pin: (imageId, layerIds) => store.pin(imageId, layerIds),
        unpin: (imageId) => store.unpin(imageId),
        isForeign: (imageId) => store.isForeign(imageId),
        admitDirect: ({ imageId, layers, metadataInStore }, attach) => {
          const loop = dataDeviceName(imageId, store.id);
          const metadata = paths.imageMetadata(imageId);
          return store.direct.admit({ imageId, layers, metadataInStore, loop, metadata }, attach);
        },
        lookAtDirect: (mounted) => store.direct.look(mounted),
        known: () => this.#knownImages(),
      },
      build: buildImage,
      onMounted: ({ id, layers }) => {
        const layerIds = layers.map(({ layerId }) => layerId);
        const rows = new Map(book.all().map((row) => [row.id, row]));
        const known = layerIds.map((layerId) => rows.get(layerId)).filter((row) => row !== undefined);
        if (known.length < layerIds.length) return; // Dropped under it: nothing is worth noting.
        void this.prefetch.mounted(id, { layerIds, identity: identityOf(known), signal: this.#stop });
      },
      onUnserved: (imageId) => this.prefetch.unmounted(imageId),
      log,
    });
  }

  /** Images made before that could be mounted now, whether they are or not. */
  async #knownImages(): Promise<{ id: number; layers: MountableLayer[] }[]> {
    const { book, store } = this.#resources;
    const found: { id: number; layers: MountableLayer[] }[] = [];
    const rows = new Map(book.all().map((row) => [row.id, row]));
    for (const { id, layers } of await store.images()) {
      const known = layers.map((layerId) => rows.get(layerId)).filter((row) => row !== undefined && !row.condemned);
      if (known.length < layers.length) continue;
      found.push({
        id,
        layers: known.map((row) => ({ layerId: row!.id, digest: row!.digest, indexPath: book.indexPath(row!) })),
      });
    }
    return found;
  }

  #makeAhead(): ImagesAhead {
    const { config, log } = this.#options;
    const { book, choice, registries } = this.#resources;
    const signal = this.#stop;
    return new ImagesAhead({
      intake: this.intake,
      book,
      repository: (source) => registries.ofSource(source),
      readsWhole: choice.layout !== 'flat' && config.index_trust.includes('local'),
      expectBuild: prepareBuilder,
      prebuild: (layers, imageConfig) => this.#prebuild(layers, imageConfig),
      known: (layers, { manifest, source, tag }) => {
        const identity = identityOf(layers, { manifest, tag, repository: `${source.host}/${source.repository}` });
        const looked = AbortSignal.any([signal, AbortSignal.timeout(TRACE_LOOK_UP_MS)]);
        const inRegistry: StartingImage['registry'] = (digests) =>
          findTrace(registries.ofSource(source), manifest, digests, looked);
        const registry = config.registry_traces ? inRegistry : undefined;
        this.prefetch.begin({ layerIds: layers.map(({ id }) => id), identity, registry, signal });
      },
      indexed: (manifest, source) => this.#indexed(manifest, source),
      stop: signal,
      log,
    });
  }

  /** Builds an image's file system ahead of its mount, and has the files of its start fetched. Errors: those of the layers. */
  async #prebuild(layers: readonly MountableLayer[], imageConfig: Promise<Buffer>): Promise<void> {
    const { config, log } = this.#options;
    const { loader } = this.#resources;
    const layerIds = layers.map(({ layerId }) => layerId);
    const opening = loader.open(layerIds);
    opening.catch(() => undefined); // Whoever reads the layer opens it, and is told.
    const metadata = await this.mounts.prebuild(layers);
    await opening;
    if (metadata === undefined || !config.prefetch.enabled) return;
    const signal = this.#stop;
    // A trace of the image knows better.
    if (await this.prefetch.built(layerIds, metadata, signal)) return;
    await fetchImageStart({ metadata, layerIds, config: await imageConfig, loader, signal, log });
  }

  /** Has the indexes of an image pushed beside it, where that is wished for. */
  #indexed(manifest: Digest, source: LayerSourceName): void {
    if (this.#options.config.publish_index !== 'registry') return;
    void this.#publisher.publish(manifest, this.#resources.registries.ofSource(source));
  }

  #makeReferences(): ReferenceMounts {
    const { run, log } = this.#options;
    const { registries } = this.#resources;
    const { intake } = this;
    return new ReferenceMounts({
      repository: (reference, given) => {
        if (given !== '') registries.remember(reference.host, given);
        return registries.repository(reference);
      },
      scopeOf: (source) => intake.scopeOf(source),
      known: async (wanted, signal) => {
        const row = await intake.layer(wanted, signal);
        intake.expected.forMount(row.id);
        return row;
      },
      indexHere: (wanted, blob, repository, progress, signal) =>
        intake.indexHere(wanted, blob, repository, progress, signal),
      mountable: (row) => intake.mountable(row),
      mounts: this.mounts,
      file: run.standaloneMounts,
      log,
    });
  }

  #makeWarmUp(): WarmUp {
    const { config, paths, log } = this.#options;
    const { book, loader, registries, store } = this.#resources;
    const { intake } = this;
    const settings = config.warm_up;
    return new WarmUp({
      repository: (reference, given) => registries.repository(reference, given),
      remember: (host, given) => registries.remember(host, given),
      scopeOf: (source) => intake.scopeOf(source),
      known: (wanted, signal) =>
        // Others may wait for the same layer: it comes whatever becomes of this call.
        orAborted(intake.layer(wanted, this.#stop), signal, () => signal.reason),
      find: (key) => book.find(key),
      mountable: (row) => intake.mountable(row),
      prebuild: (layers) => this.mounts.prebuild(layers),
      prefetch: this.prefetch,
      loader,
      isPresent: (address, length) => store.isPresent(address, length),
      list: new WarmList({
        file: paths.warmList,
        isConfigured: (reference) => isConfigured(settings, reference),
        log,
      }),
      settings,
      registryTraces: config.registry_traces,
      stop: this.#stop,
      log,
    });
  }
}
