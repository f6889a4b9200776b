// What the data plane stands on and must close again: registries, the node store, the layers it knows, the LazyLoader, one
// transport. Opened by DataPlane.open(), in this order; mounts nothing.
import type { Config } from '../config.ts';
import type { Logger } from '../log.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { registryOptions } from '../registry-settings.ts';
import { MiB } from '../units.ts';
import { NodeStore } from './chunks/node-store.ts';
import { IndexCatalog } from './index/discovery.ts';
import { KeptIndexes } from './index/kept-indexes.ts';
import { RestartReader, WindowCache } from './index/restart-reader.ts';
import { KnownRegistries } from './known-registries.ts';
import { LayerBook } from './layer-book.ts';
import { LazyLoader } from './lazy-loader.ts';
import { native } from './native.ts';
import { detachDeadSessions, removeHalfWritten } from './orphans.ts';
import { RegistryPool } from './registry/pool.ts';
import { imageDevices, imagesInUse } from './transport/erofs-mount.ts';
import { inspectMachine } from './transport/machine.ts';
import { chooseTransport, openTransport, type TransportChoice } from './transport/select.ts';
import type { ErofsLayoutKind, Transport } from './transport/transport.ts';
import { verifyAnew } from './verify-anew.ts';

/** Memory for decompressed windows of gzip restart points, bytes. */
const WINDOW_CACHE_BYTES = 4 * MiB;

export interface ResourceOptions {
  readonly config: Config;
  readonly paths: RootPaths;
  readonly run: RunPaths;
  readonly log: Logger;
  /** Layout of EROFS metadata; what the kernel calls for when absent. Newer kernels mount the older layout too. */
  readonly layout?: ErofsLayoutKind;
  /** As the LazyLoader's. */
  readonly onWaited?: ((ms: number) => void) | undefined;
}

export interface PlaneResources extends AsyncDisposable {
  readonly choice: TransportChoice;
  readonly registries: KnownRegistries;
  readonly store: NodeStore;
  readonly catalog: IndexCatalog;
  readonly book: LayerBook;
  readonly kept: KeptIndexes;
  readonly loader: LazyLoader;
  readonly transport: Transport;
}

/**
 * `layersOfImage` tells of a mounted image from where it is fetched first. The caller holds the root's lock.
 * Errors: STORE_IO, STORE_CORRUPT, KERNEL_UNSUPPORTED; nothing stays open then.
 */
export async function openResources(
  options: ResourceOptions,
  layersOfImage: (imageId: number) => readonly number[],
): Promise<PlaneResources> {
  const { config, paths, run, log } = options;
  const suited = chooseTransport(inspectMachine(), config.transport);
  const choice = { ...suited, layout: options.layout ?? suited.layout };
  log.info({ transport: choice.name, layout: choice.layout, because: choice.because }, 'transport chosen');
  const registries = new KnownRegistries(new RegistryPool({ ...registryOptions(config), log }));
  const store = await NodeStore.open({
    paths,
    native: native(),
    quotaBytes: config.quota_bytes,
    livingImages: imagesInUse,
    devices: imageDevices,
    log,
  });
  const opened: AsyncDisposable[] = [registries, { [Symbol.asyncDispose]: () => store.close() }];
  const dispose = async (): Promise<void> => {
    for (const resource of opened.reverse()) await resource[Symbol.asyncDispose]();
  };
  try {
    await removeHalfWritten(paths, run, log);
    await detachDeadSessions(run, log);
    const catalog = new IndexCatalog({ paths, trust: config.index_trust });
    const windowCache = new WindowCache(WINDOW_CACHE_BYTES);
    const book = await LayerBook.open({
      paths,
      store,
      repository: (source) => registries.ofSource(source),
      windows: (index) => new RestartReader(index, paths.layerRestart(index.restart.digest), windowCache),
    });
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
    const transport = await openTransport(choice, {
      mountDir: run.fuseMount,
      store,
      source: { read: (range, imageId) => loader.read(range, { layers: layersOfImage(imageId) }) },
      log,
    });
    opened.push(transport);
    return {
      choice,
      registries,
      store,
      catalog,
      book,
      kept,
      loader,
      transport,
      [Symbol.asyncDispose]: dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}
