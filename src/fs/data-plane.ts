// What dedupd does, as the control server and pulls ask for it: each call goes to the part of the data plane that does it, and
// open() and close() bring all of them up and down. It decides nothing about snapshots.
import { isAbsolute } from 'node:path';
import { type Digest, isDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { NumbersNow } from '../metrics.ts';
import type { WarmUp } from '../prefetch/warm-up.ts';
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
  RetainedMessage,
  SpaceMessage,
  StatsMessage,
} from './control-server.ts';
import { IdleTimes } from './idle-times.ts';
import type { ImageAhead, ManifestLayer, ReadProgress } from './image-ahead.ts';
import { listImages } from './image-list.ts';
import type { MountableBelow } from './image-metadata.ts';
import { reportNumbers, reportStats } from './numbers-report.ts';
import { openResources, type PlaneResources, type ResourceOptions } from './plane-resources.ts';
import { PlaneServices, type ServiceOptions } from './plane-services.ts';
import type { Repository } from './registry/blob-reader.ts';
import type { RepositoryName } from './registry/pool.ts';
import { collectGarbage, reportSpace } from './space-report.ts';
import { detachOrphans } from './transport/erofs-mount.ts';

export interface DataPlaneOptions extends ResourceOptions, ServiceOptions {}

export class DataPlane implements ControlledPlane, AsyncDisposable {
  readonly root: string;
  readonly #resources: PlaneResources;
  readonly #services: PlaneServices;
  readonly #idleTimes: IdleTimes;
  readonly #stop = new AbortController();

  private constructor(options: DataPlaneOptions, resources: PlaneResources) {
    this.root = options.paths.root;
    this.#resources = resources;
    this.#services = new PlaneServices(options, resources, this.#stop.signal);
    const { loader } = resources;
    const { mounts } = this.#services;
    // Images that are complete now are read without us from then on.
    this.#idleTimes = new IdleTimes(
      () => loader.stats(),
      () => void mounts.completeImages(), // Never rejects.
    );
  }

  /** Opens store, registry, transport. The caller holds the root's lock. Errors: STORE_IO, STORE_CORRUPT, KERNEL_UNSUPPORTED. */
  static async open(options: DataPlaneOptions): Promise<DataPlane> {
    let services: PlaneServices | undefined;
    const resources = await openResources(options, (imageId) => services?.mounts.layerIds(imageId) ?? []);
    try {
      const plane = new DataPlane(options, resources);
      services = plane.#services;
      const { mounts, references, retention, warmUp } = services;
      const { store } = resources;
      await store.unpinAll();
      // First: what has no metadata any more is not taken over.
      await retention.removeOrphanFiles();
      await references.resume(await mounts.resume());
      await detachOrphans(store.id, options.log);
      await store.direct.look();
      void warmUp.keepConfigured(); // Never rejects.
      return plane;
    } catch (error) {
      await resources[Symbol.asyncDispose]();
      throw error;
    }
  }

  get transportName(): string {
    return this.#resources.choice.name;
  }

  get warmUp(): WarmUp {
    return this.#services.warmUp;
  }

  giveCredentials(host: string, userAndPassword: string): void {
    this.#resources.registries.remember(host, userAndPassword);
  }

  /** A repository with the credentials (user:password) given, or those known for its host. Errors: INVALID_ARGUMENT. */
  repository(name: RepositoryName, userAndPassword = ''): Repository {
    return this.#resources.registries.repository(name, userAndPassword);
  }

  /** Makes the layers of an image ready that a pull is about to offer to containerd. */
  imageAhead(
    manifest: Digest,
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    source: RepositoryName & { readonly tag?: string | undefined },
    onRead: ReadProgress,
    wholeFrom: Promise<number>,
  ): ImageAhead {
    const from = { host: source.host, repository: source.path, tag: source.tag };
    return this.#services.ahead.ofPull(manifest, layers, config, from, onRead, wholeFrom);
  }

  async mountReference(
    request: { reference: string; directory: string; platform: string; credentials: string },
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string> {
    const { references, mounts, intake } = this.#services;
    const path = await references.mount(request, progress, AbortSignal.any([signal, this.#stop.signal]));
    // The mount keeps its layers now.
    for (const image of mounts.list()) for (const { layerId } of image.layers) intake.expected.arrived(layerId);
    return path;
  }

  unmountReference(directory: string): Promise<void> {
    return this.#services.references.unmount(directory);
  }

  prepareLayer(request: PrepareLayerMessage): Promise<{ lazy: boolean; reason: string; layer: LayerKeyMessage }> {
    const { ahead, intake } = this.#services;
    if (isDigest(request.manifest)) ahead.ofPrepare(request.manifest, request.sources);
    return intake.prepareLayer(request);
  }

  async mountImage(
    layers: readonly LayerKeyMessage[],
    bottom: boolean,
    below: readonly BelowMessage[],
  ): Promise<{ path: string; mountId: number; rootUid: number; rootGid: number }> {
    const { idle, intake, mounts } = this.#services;
    idle.asked();
    const lowers: MountableBelow[] = [];
    for (const { directory, layers } of bottom ? [] : below) {
      if (layers.length > 0) lowers.push({ kind: 'layers', layers: await intake.mountableLayers(layers) });
      else if (isAbsolute(directory)) lowers.push({ kind: 'directory', path: directory });
      else throw new DedupError('INVALID_ARGUMENT', 'what lies below an image is an absolute path, or layers');
    }
    const image = await mounts.mount(await intake.mountableLayers(layers), bottom, lowers);
    image.used = true;
    return { path: image.path, mountId: image.id, rootUid: image.rootUid, rootGid: image.rootGid };
  }

  /** Builds the file system of layers that lie on nothing, before it is mounted. Errors: NOT_FOUND, IMAGE_INVALID. */
  async prebuildImage(layers: readonly LayerKeyMessage[]): Promise<void> {
    const { intake, mounts } = this.#services;
    await mounts.prebuild(await intake.mountableLayers(layers));
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
    const row = await this.#services.ordinary.convert(
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
    return this.#services.retention.releaseImages(inUse);
  }

  retainLayers(layers: readonly LayerKeyMessage[]): Promise<RetainedMessage> {
    return this.#services.retention.retainLayers(layers);
  }

  /** What the store takes, and what each image needs of it. */
  space(): Promise<SpaceMessage> {
    const { book, choice, store } = this.#resources;
    return reportSpace({ store, mounts: this.#services.mounts, layers: () => book.all(), transport: choice.name });
  }

  /** Gives back at once what nobody uses. */
  async gc(show: (progress: GcProgressMessage) => void): Promise<void> {
    const { mounts, retention } = this.#services;
    await collectGarbage(
      {
        store: this.#resources.store,
        releaseIdle: () => mounts.releaseIdle(),
        dropUnnamed: () => retention.dropUnnamed(),
      },
      show,
    );
  }

  /** Errors: NOT_FOUND unless the layer is known and can be had: from a registry, or because all of it is here. */
  async confirmLayer(key: LayerKeyMessage): Promise<void> {
    const { book, store } = this.#resources;
    const row = book.find(key);
    if (row === undefined) throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node`);
    if (row.sources.length > 0 || (await store.confirmLayer(row.id))) return;
    throw new DedupError('NOT_FOUND', `layer ${key.digest} has no source and is not here completely`);
  }

  async layerUsage(key: LayerKeyMessage): Promise<{ bytes: number; inodes: number }> {
    const { book } = this.#resources;
    const row = book.find(key);
    if (row === undefined) throw new DedupError('NOT_FOUND', `layer ${key.digest} is not known to this node`);
    const { chunks, entries } = await book.readIndex(row.id, 'all');
    let bytes = 0;
    for (let i = 0; i < chunks.count; i++) bytes += chunks.length[i]!;
    return { bytes, inodes: entries.count };
  }

  listImages(): Promise<ImageInfoMessage[]> {
    const { book, choice, store } = this.#resources;
    return listImages({ mounts: this.#services.mounts, layers: book, store, transport: choice.name });
  }

  stats(): Promise<StatsMessage> {
    const { loader, registries, store, transport } = this.#resources;
    return reportStats({ store, loader, transport, registry: registries, traces: this.#services.prefetch });
  }

  /** What the exporter shows. Errors: CLOSED, STORE_IO. */
  numbers(): Promise<NumbersNow> {
    const { loader, registries, store, transport } = this.#resources;
    const { mounts, prefetch } = this.#services;
    return reportNumbers({ store, loader, transport, registry: registries, mounts, traces: prefetch });
  }

  /** The root is somebody else's now: close() takes nothing down by its path. */
  abandonMounts(): void {
    this.#services.references.abandon();
    this.#services.mounts.abandon();
  }

  /** Unmounts everything, answers what is outstanding, flushes the store. Idempotent. */
  async close(): Promise<void> {
    const { loader, registries, store, transport } = this.#resources;
    const { mounts, prefetch, references } = this.#services;
    this.#idleTimes.close();
    this.#stop.abort(new DedupError('CLOSED', 'dedupd is stopping'));
    // In this order, and each step whatever became of the one before: nothing may stay mounted or open.
    const steps = [
      () => prefetch.close(),
      () => references.close(),
      () => mounts.close(),
      () => loader.close(),
      () => transport.close(),
      () => store.close(),
      () => registries.close(),
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
