// The merged images that are mounted: builds the metadata of one when it is first wanted, mounts it through the
// transport, and takes it away when nobody refers to it. The same layers always give the same path.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { DedupError, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { RootPaths } from '../paths.ts';
import { BLOCK_BYTES } from '../units.ts';
import type { ImageBuildRequest, ImageBuildResult } from './image/build-image.ts';
import { unmountErofs } from './transport/erofs-mount.ts';
import type { ErofsLayoutKind, MountSpec, Transport } from './transport/transport.ts';

/** A layer ready to be mounted: its row in the store and its verified index on disk. */
export interface MountableLayer {
  readonly layerId: number;
  /** Digest of the layer, for lists. */
  readonly digest: string;
  readonly indexPath: string;
}

/** What the table needs of the node store. */
export interface ImageRegistry {
  readonly storeBytes: number;
  /** Number of the image with this key; the same key gives the same number as long as the database lives. */
  imageFor(key: string, layerIds: readonly number[]): Promise<number>;
  layerAddresses(layerId: number): Promise<Float64Array>;
  /** Copies the metadata of a flat image into the store's reserved region; its offset, bytes. */
  placeMetadata(imageId: number, file: string): Promise<number>;
}

export interface MountTableOptions {
  readonly paths: RootPaths;
  readonly transport: Transport;
  readonly layout: ErofsLayoutKind;
  readonly images: ImageRegistry;
  readonly build: (request: ImageBuildRequest) => Promise<ImageBuildResult>;
  readonly log: Logger;
}

export interface MountedImage {
  readonly id: number;
  readonly path: string;
  readonly layers: readonly MountableLayer[];
  /** Directories of the CLI that show this image, and the reference each was asked for. */
  readonly holders: Map<string, string>;
}

export class MountTable {
  readonly #options: MountTableOptions;
  readonly #mounted = new Map<number, MountedImage>();
  /** Work in flight by image key: two calls for one image share it, and removal waits for it. */
  readonly #mounting = new Map<string, Promise<MountedImage>>();
  #closed = false;

  constructor(options: MountTableOptions) {
    this.#options = options;
  }

  /**
   * Mounts the image of `layers` (bottom to top); `bottom` is true when nothing lies below it. Idempotent and shared.
   * Errors: IMAGE_INVALID, INDEX_INVALID, KERNEL, STORE_IO.
   */
  mount(layers: readonly MountableLayer[], bottom: boolean): Promise<MountedImage> {
    if (this.#closed) throw new DedupError('CLOSED', 'dedupd is stopping');
    if (layers.length === 0) throw new DedupError('INVALID_ARGUMENT', 'an image needs at least one layer');
    const key = createHash('sha256')
      .update(JSON.stringify([this.#options.layout, bottom, layers.map((layer) => layer.layerId)]))
      .digest('hex');
    const running = this.#mounting.get(key);
    if (running !== undefined) return running;
    const started = this.#mount(key, layers, bottom).finally(() => this.#mounting.delete(key));
    this.#mounting.set(key, started);
    return started;
  }

  async #mount(key: string, layers: readonly MountableLayer[], bottom: boolean): Promise<MountedImage> {
    const { paths, images, transport, layout, log } = this.#options;
    const id = await images.imageFor(
      key,
      layers.map((layer) => layer.layerId),
    );
    const known = this.#mounted.get(id);
    if (known !== undefined) return known;
    const startedMs = performance.now();
    const metadata = paths.imageMetadata(id);
    // Metadata is renamed into place complete and synced; a key stands for addresses that never change.
    if (!existsSync(metadata)) await this.#build(metadata, layers, bottom);
    const builtMs = performance.now();
    const path = paths.mountPoint(id);
    await mkdir(path, { recursive: true, mode: 0o700 });
    const flatOffset = layout === 'flat' ? await images.placeMetadata(id, metadata) : undefined;
    const spec: MountSpec = { imageId: id, metadata, layout, flatOffset, target: path };
    await transport.mount(spec);
    const image: MountedImage = { id, path, layers, holders: new Map() };
    this.#mounted.set(id, image);
    log.debug(
      { image: id, layers: layers.length, buildMs: builtMs - startedMs, mountMs: performance.now() - builtMs },
      'image mounted',
    );
    return image;
  }

  async #build(output: string, layers: readonly MountableLayer[], bottom: boolean): Promise<void> {
    const { images, layout } = this.#options;
    const sources: { index: string; addresses: Float64Array }[] = [];
    for (const layer of layers) {
      sources.push({ index: layer.indexPath, addresses: await images.layerAddresses(layer.layerId) });
    }
    try {
      await this.#options.build({
        layers: sources,
        bottom,
        layout:
          layout === 'flat'
            ? { kind: 'flat', baseAddress: 0 }
            : { kind: 'device', deviceBlocks: images.storeBytes / BLOCK_BYTES },
        output,
      });
    } catch (error) {
      throw wrapError(error, `building the file system of ${layers.map((layer) => layer.digest).join(' + ')}`);
    }
  }

  list(): MountedImage[] {
    return [...this.#mounted.values()];
  }

  get(id: number): MountedImage | undefined {
    return this.#mounted.get(id);
  }

  /** Unmounts every image that is neither in `inUse` nor held by a directory of the CLI; the number unmounted. */
  async release(inUse: ReadonlySet<number>): Promise<number> {
    let unmounted = 0;
    await Promise.allSettled(this.#mounting.values());
    for (const image of this.list()) {
      if (inUse.has(image.id) || image.holders.size > 0) continue;
      await this.#unmount(image);
      unmounted++;
    }
    return unmounted;
  }

  async #unmount(image: MountedImage): Promise<void> {
    this.#mounted.delete(image.id);
    await this.#options.transport.unmount(image.path);
    await rmdir(image.path);
    this.#options.log.debug({ image: image.id }, 'image unmounted');
  }

  /** Detaches what a previous daemon left mounted: its session is gone, so those mounts can only answer EIO. */
  async removeLeftovers(): Promise<void> {
    const { paths, log } = this.#options;
    await mkdir(paths.mounts, { recursive: true, mode: 0o700 });
    const mounts = (await readFile('/proc/self/mountinfo', 'utf8'))
      .split('\n')
      .map((line) => line.split(' ')[4] ?? '')
      .filter((path) => path.startsWith(`${paths.mounts}/`));
    for (const path of mounts.reverse()) {
      log.info({ path }, 'detaching an image of an earlier dedupd');
      await unmountErofs(path);
    }
    for (const name of await readdir(paths.mounts)) await rmdir(join(paths.mounts, name));
  }

  /** Unmounts everything. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    await Promise.allSettled(this.#mounting.values());
    for (const image of this.list()) await this.#unmount(image);
  }
}
