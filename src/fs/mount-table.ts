// The merged images that are mounted: mounts one through the transport when it is first wanted, and takes it away when nobody
// refers to it. The same layers always give the same path.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, rmdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { RootPaths } from '../paths.ts';
import { DirectImages, type DirectStore } from './direct-images.ts';
import { FlatRegions } from './flat-regions.ts';
import type { ImageBuildRequest, ImageBuildResult } from './image/build-image.ts';
import {
  ImageMetadata,
  type LayersOfImages,
  type MountableBelow,
  type MountableLayer,
  rootOwner,
} from './image-metadata.ts';
import { mountPoints } from './orphans.ts';
import { unmountErofs } from './transport/erofs-mount.ts';
import type { ErofsLayoutKind, MountSpec, Resumed, Transport } from './transport/transport.ts';

/** What the table needs of the node store. */
export interface ImageRegistry extends LayersOfImages, DirectStore {
  /**
   * Number of the image with this key; the same key gives the same number as long as the database lives. `ahead`: it is all
   * of an image, not what somebody mounts while the rest is not lazy yet.
   */
  imageFor(key: string, layerIds: readonly number[], how?: { readonly ahead: boolean }): Promise<number>;
  /** Copies the metadata of a flat image into the store's reserved region at `address`. */
  placeMetadata(address: number, file: string): Promise<void>;
  /** Keeps the chunks of these layers until unpin. */
  pin(imageId: number, layerIds: readonly number[]): Promise<void>;
  unpin(imageId: number): Promise<void>;
  /** True for an image without a row to which an address may mean another chunk than it means to the store now. */
  isForeign(imageId: number): boolean;
  /** Images made before, with their layers; only those whose layers are all known and not condemned. */
  known(): Promise<readonly { readonly id: number; readonly layers: readonly MountableLayer[] }[]>;
}

/** How long an image that nobody uses stays mounted while it is still pulled. */
const IDLE_MS = 600_000;

export interface MountTableOptions {
  readonly paths: RootPaths;
  readonly transport: Transport;
  readonly layout: ErofsLayoutKind;
  /** Images that are here completely are read by the kernel without us. */
  readonly direct: boolean;
  readonly images: ImageRegistry;
  readonly build: (request: ImageBuildRequest) => Promise<ImageBuildResult>;
  /** Told of an image that was just mounted and whose reads pass through us: nothing of it is in the page cache. */
  readonly onMounted?: (image: MountedImage) => void;
  /** Told that no more reads of an image will pass through us; its layers are here until the promise settles. Never rejects. */
  readonly onUnserved?: (imageId: number) => Promise<void>;
  readonly log: Logger;
  /** Where loop devices begin in their files; for tests. Default: those of this machine. */
  readonly loopOffsets?: () => readonly number[];
}

export interface MountedImage {
  readonly id: number;
  readonly path: string;
  readonly layers: readonly MountableLayer[];
  /** Owner of the root directory. */
  readonly rootUid: number;
  readonly rootGid: number;
  /** Directories of the CLI that show this image, and the reference each was asked for. */
  readonly holders: Map<string, string>;
  /** True once a snapshot was given this mount: release() decides then. */
  used: boolean;
  /** True when the kernel reads it from the store without us. */
  direct: boolean;
  /** When nobody was seen to use it, by performance.now(). */
  idleSinceMs: number | undefined;
}

export class MountTable {
  readonly #options: MountTableOptions;
  readonly #mounted = new Map<number, MountedImage>();
  /** Work in flight by image key: two calls for one image share it, and removal waits for it. */
  readonly #mounting = new Map<string, Promise<MountedImage>>();
  readonly #layers = new Map<number, readonly number[]>();
  readonly #metadata: ImageMetadata;
  /** Unmounts under way: the same image is mounted again only after its own has ended. */
  readonly #leaving = new Map<number, Promise<void>>();
  readonly #regions: FlatRegions;
  readonly #direct: DirectImages;
  #closed = false;

  constructor(options: MountTableOptions) {
    this.#options = options;
    this.#metadata = new ImageMetadata(options);
    this.#regions = new FlatRegions(options.loopOffsets);
    this.#direct = new DirectImages(options, this.#mounted);
  }

  /**
   * Mounts the image of `layers` (bottom to top); `bottom` is true when nothing lies below it, else `below` says what
   * does, top to bottom. Idempotent and shared. Errors: IMAGE_INVALID, INDEX_INVALID, KERNEL, STORE_IO.
   */
  mount(
    layers: readonly MountableLayer[],
    bottom: boolean,
    below: readonly MountableBelow[] = [],
  ): Promise<MountedImage> {
    if (this.#closed) throw new DedupError('CLOSED', 'dedupd is stopping');
    if (layers.length === 0) throw new DedupError('INVALID_ARGUMENT', 'an image needs at least one layer');
    // What lies below is part of an image: directories of its own take attributes from there.
    const lowers = below.map((lower) => (lower.kind === 'directory' ? lower.path : lower.layers.map(idOf)));
    const identity = [this.#options.layout, bottom, layers.map(idOf), ...(bottom ? [] : lowers)];
    const key = imageKey(identity);
    const running = this.#mounting.get(key);
    if (running !== undefined) return running;
    const started = this.#mount(key, layers, bottom, below).finally(() => this.#mounting.delete(key));
    this.#mounting.set(key, started);
    return started;
  }

  async #mount(
    key: string,
    layers: readonly MountableLayer[],
    bottom: boolean,
    below: readonly MountableBelow[],
  ): Promise<MountedImage> {
    const { paths, images, transport, layout, log } = this.#options;
    const id = await images.imageFor(
      key,
      layers.map((layer) => layer.layerId),
    );
    // Its failure is told to whoever wanted the unmount.
    await this.#leaving.get(id)?.catch(() => undefined);
    const known = this.#mounted.get(id);
    if (known !== undefined) {
      // Whoever asks is about to use it, and release() has not been told of that yet.
      known.idleSinceMs = undefined;
      return known;
    }
    const startedMs = performance.now();
    const metadata = paths.imageMetadata(id);
    const flatOffset = layout === 'flat' ? this.#regions.take(id) : undefined;
    const layerIds = layers.map((layer) => layer.layerId);
    await images.pin(id, layerIds);
    this.#layers.set(id, layerIds);
    let direct = false;
    try {
      await this.#metadata.built({ id, layers, bottom, below, flatOffset });
      if (flatOffset !== undefined) {
        this.#regions.mustFit((await stat(metadata)).size);
        await images.placeMetadata(flatOffset, metadata);
      }
      const builtMs = performance.now();
      const path = paths.mountPoint(id);
      await mkdir(path, { recursive: true, mode: 0o700 });
      const spec: MountSpec = { imageId: id, metadata, layout, flatOffset, target: path };
      direct = await this.#direct.mount(spec, layerIds);
      if (!direct) await transport.mount(spec);
      const mountMs = performance.now() - builtMs;
      log.debug({ image: id, layers: layers.length, direct, buildMs: builtMs - startedMs, mountMs }, 'image mounted');
    } catch (error) {
      this.#regions.release(id);
      this.#layers.delete(id);
      await images.unpin(id);
      throw error;
    }
    const path = paths.mountPoint(id);
    const image: MountedImage = {
      id,
      path,
      layers,
      ...(await rootOwner(metadata)),
      holders: new Map(),
      used: false,
      direct,
      idleSinceMs: undefined,
    };
    this.#mounted.set(id, image);
    if (!direct) this.#options.onMounted?.(image);
    return image;
  }

  /** Has images that have become complete since they were mounted read the store without us. Errors: none. */
  completeImages(): Promise<void> {
    return this.#direct.complete();
  }

  /**
   * Builds the metadata of an image that is likely to be mounted soon: a pull does it while the rest of it goes on.
   * Answers with its file, or undefined where it cannot be built before it is mounted. Errors as mount.
   */
  async prebuild(layers: readonly MountableLayer[]): Promise<string | undefined> {
    // Flat metadata counts from where it is mounted, which is not known yet.
    if (this.#closed || this.#options.layout === 'flat' || layers.length === 0) return undefined;
    const ids = layers.map(idOf);
    const id = await this.#options.images.imageFor(imageKey([this.#options.layout, true, ids]), ids, { ahead: true });
    return await this.#metadata.built({ id, layers, bottom: true, below: [], flatOffset: undefined });
  }

  list(): MountedImage[] {
    return [...this.#mounted.values()];
  }

  /**
   * Unmounts images that nobody uses: neither a key of the snapshotter (`inUse`) nor a directory of the CLI. One whose
   * layers are all `kept` stays for a while: the next container of an image is near, and its page cache is warm.
   * Returns the number unmounted. Errors: KERNEL.
   */
  async release(inUse: ReadonlySet<number>, kept: (layerId: number) => boolean): Promise<number> {
    await Promise.allSettled(this.#mounting.values());
    let unmounted = 0;
    for (const image of this.list()) {
      if (inUse.has(image.id) || image.holders.size > 0) {
        image.idleSinceMs = undefined;
        continue;
      }
      image.idleSinceMs ??= performance.now();
      const warm = performance.now() - image.idleSinceMs < IDLE_MS;
      if (warm && image.layers.every((layer) => kept(layer.layerId))) continue;
      await this.#unmount(image);
      unmounted++;
    }
    await this.#direct.look();
    return unmounted;
  }

  /** Unmounts at once what the last release() found unused and nobody has asked for since. Returns how many. */
  async releaseIdle(): Promise<number> {
    let unmounted = 0;
    for (const image of this.list()) {
      if (image.idleSinceMs === undefined || image.holders.size > 0) continue;
      await this.#unmount(image);
      unmounted++;
    }
    await this.#direct.look();
    return unmounted;
  }

  #unmount(image: MountedImage): Promise<void> {
    this.#mounted.delete(image.id);
    const left = this.#takeDown(image).finally(() => this.#leaving.delete(image.id));
    this.#leaving.set(image.id, left);
    return left;
  }

  async #takeDown(image: MountedImage): Promise<void> {
    await this.#options.onUnserved?.(image.id);
    try {
      await this.#options.transport.unmount(image.path);
    } catch (error) {
      this.#mounted.set(image.id, image); // It still is.
      throw error;
    }
    this.#regions.release(image.id);
    this.#layers.delete(image.id);
    this.#direct.forget(image.id);
    await rmdir(image.path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error; // Whoever emptied the root has removed it.
    });
    await this.#options.images.unpin(image.id);
    this.#options.log.debug({ image: image.id }, 'image unmounted');
  }

  /** Unmounts one image that nobody holds. */
  async drop(id: number): Promise<void> {
    const image = this.#mounted.get(id);
    if (image === undefined || image.holders.size > 0) return;
    await this.#unmount(image);
    await this.#direct.look();
  }

  /** Layers of an image that is mounted or being mounted (mount(2) itself reads through us). */
  layerIds(id: number): readonly number[] {
    return this.#layers.get(id) ?? [];
  }

  /**
   * Takes over what an earlier daemon left: the devices of images in use are moved to this session, their mounts belong
   * to this table from then on. What cannot be taken over is detached, standalone mounts included: it only answers EIO.
   * Returns where else the images that were taken over are mounted, by image. Errors: KERNEL.
   */
  async resume(): Promise<ReadonlyMap<number, readonly string[]>> {
    const { transport, layout, images, log } = this.#options;
    const known = new Map((await images.known()).map((image) => [image.id, image.layers]));
    const resumed = await transport.resume((id) => {
      const layers = known.get(id);
      // Flat metadata counts from the region it was built for, and its file may have been built for another one since.
      if (layout === 'flat') return false;
      // An image that no row names any more (index.db was restored) is read on all the same, unless its addresses may
      // have been given again: then its readers go on getting EIO.
      if (layers === undefined && images.isForeign(id)) {
        log.warn({ image: id }, 'an image in use was made with a newer index.db than this one: it is not read on');
        return false;
      }
      // The first read may come before the device has been moved.
      if (layers !== undefined) this.#layers.set(id, layers.map(idOf));
      return true;
    });
    const elsewhere = await this.#takeMounts(resumed, known);
    // Moved, but mounted nowhere we can see: a container holds it. It reads on; nothing is kept for it.
    const counts = { images: resumed.images.size, direct: resumed.direct.size, mounted: this.#mounted.size };
    log.debug(counts, 'images of an earlier dedupd taken over');
    return elsewhere;
  }

  async #takeMounts(
    resumed: Resumed,
    known: ReadonlyMap<number, readonly MountableLayer[]>,
  ): Promise<Map<number, string[]>> {
    const { paths, images, log } = this.#options;
    await mkdir(paths.mounts, { recursive: true, mode: 0o700 });
    const all = await mountPoints();
    const devices = new Map<string, number>();
    for (const { device, mountPoint: path } of all) {
      if (path.startsWith(`${paths.mounts}/`)) devices.set(device, Number(path.slice(paths.mounts.length + 1)));
    }
    const elsewhere = new Map<number, string[]>();
    for (const { device, mountPoint: path } of all.filter(({ device }) => devices.has(device)).reverse()) {
      const id = devices.get(device)!;
      const layers = known.get(id);
      if (!resumed.images.has(id) || layers === undefined || !existsSync(paths.imageMetadata(id))) {
        log.info({ path }, 'detaching an image of an earlier dedupd');
        await unmountErofs(path);
      } else if (path === paths.mountPoint(id)) {
        await images.pin(id, layers.map(idOf));
        const owner = await rootOwner(paths.imageMetadata(id));
        // Whoever uses it is told to release() before anything is unmounted.
        const direct = resumed.direct.has(id);
        const rest = { holders: new Map<string, string>(), used: true, direct, idleSinceMs: undefined };
        this.#mounted.set(id, { id, path, layers, ...owner, ...rest });
      } else {
        elsewhere.set(id, [...(elsewhere.get(id) ?? []), path]);
      }
    }
    for (const name of await readdir(paths.mounts)) {
      if (!/^\d+$/.test(name) || this.#mounted.has(Number(name))) continue;
      await rmdir(join(paths.mounts, name)).catch((error: unknown) => {
        // Somebody put something there: images of other numbers can be mounted all the same.
        log.warn({ err: error, image: name }, 'the directory of an image of an earlier dedupd stays');
      });
    }
    return elsewhere;
  }

  /** Unmounts everything. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    await Promise.allSettled([...this.#mounting.values(), this.#direct.close()]);
    const failures: unknown[] = [];
    for (const image of this.list()) await this.#unmount(image).catch((error: unknown) => failures.push(error));
    // What a container still reads keeps its row: the next start looks again.
    await this.#direct.look();
    if (failures.length > 0) throw failures[0];
  }

  /** Leaves every mount where it is, for whoever serves this root now. */
  abandon(): void {
    this.#closed = true;
    void this.#direct.close(); // Never rejects.
    this.#mounted.clear();
  }
}

function idOf(layer: MountableLayer): number {
  return layer.layerId;
}

/** The same layers, layout and surroundings give the same key. */
function imageKey(identity: readonly unknown[]): string {
  return createHash('sha256').update(JSON.stringify(identity)).digest('hex');
}
