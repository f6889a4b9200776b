// The metadata file of a merged image: built out of the indexes of its layers, once at a time, and what is read back from it.
// Called by MountTable, before a mount or ahead of one; mounts nothing.
import { existsSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { BLOCK_BYTES } from '../units.ts';
import type { ImageBuildRequest, ImageBuildResult } from './image/build-image.ts';

/** A layer ready to be mounted: its row in the store and its verified index on disk. */
export interface MountableLayer {
  readonly layerId: number;
  /** Digest of the layer, for lists. */
  readonly digest: string;
  readonly indexPath: string;
}

/** What lies below an image that is not at the bottom: a directory on disk, or the layers of another image (bottom to top). */
export type MountableBelow =
  | { readonly kind: 'directory'; readonly path: string }
  | { readonly kind: 'layers'; readonly layers: readonly MountableLayer[] };

/** What is built: layers bottom to top; `bottom` is true when nothing lies below, else `below` says what does, top to bottom. */
export interface ImageToBuild {
  readonly id: number;
  readonly layers: readonly MountableLayer[];
  readonly bottom: boolean;
  readonly below: readonly MountableBelow[];
  /** Where the metadata will lie in the store; undefined when it is a device of its own. */
  readonly flatOffset: number | undefined;
}

/** What a build needs to know of layers. */
export interface LayersOfImages {
  readonly storeBytes: number;
  layerAddresses(layerId: number): Promise<Float64Array>;
  /** Makes sure that a layer's index file is what it is named after. Errors: NOT_FOUND, DIGEST_MISMATCH. */
  checkIndex(layerId: number): Promise<void>;
}

export interface ImageMetadataOptions {
  readonly paths: RootPaths;
  readonly images: LayersOfImages;
  readonly build: (request: ImageBuildRequest) => Promise<ImageBuildResult>;
}

export class ImageMetadata {
  readonly #options: ImageMetadataOptions;
  /** By image. */
  readonly #building = new Map<number, Promise<void>>();

  constructor(options: ImageMetadataOptions) {
    this.#options = options;
  }

  /**
   * Resolves to the metadata file of an image once it is there; builds it at most once at a time. It is renamed into place
   * complete and synced; a number stands for addresses that stay as long as its layers. That of the flat layout counts from
   * where it lies, which may be elsewhere each time. Errors: IMAGE_INVALID, INDEX_INVALID, NOT_FOUND, DIGEST_MISMATCH.
   */
  async built(image: ImageToBuild): Promise<string> {
    const output = this.#options.paths.imageMetadata(image.id);
    let building = this.#building.get(image.id);
    if (building === undefined) {
      if (image.flatOffset === undefined && existsSync(output)) return output;
      building = this.#build(image, output).finally(() => this.#building.delete(image.id));
      this.#building.set(image.id, building);
    }
    await building;
    return output;
  }

  async #build({ layers, bottom, below, flatOffset }: ImageToBuild, output: string): Promise<void> {
    const { images } = this.#options;
    const sources: { index: string; addresses: Float64Array }[] = [];
    for (const layer of layers) {
      await images.checkIndex(layer.layerId);
      sources.push({ index: layer.indexPath, addresses: await images.layerAddresses(layer.layerId) });
    }
    try {
      await this.#options.build({
        layers: sources,
        bottom,
        below: below.map((lower) =>
          lower.kind === 'directory'
            ? lower
            : { kind: 'layers', indexes: lower.layers.map((layer) => layer.indexPath) },
        ),
        layout:
          flatOffset !== undefined
            ? { kind: 'flat', baseAddress: flatOffset }
            : { kind: 'device', deviceBlocks: images.storeBytes / BLOCK_BYTES },
        output,
      });
    } catch (error) {
      throw wrapError(error, `building the file system of ${layers.map((layer) => layer.digest).join(' + ')}`);
    }
  }
}

/** Owner of the root directory, from the metadata file itself: no path below a lazy mount is touched. */
export async function rootOwner(metadata: string): Promise<{ rootUid: number; rootGid: number }> {
  const file = await open(metadata, 'r');
  try {
    // struct erofs_super_block at 1024: root_nid at 14, meta_blkaddr at 40; struct erofs_inode_extended: i_uid at 24,
    // i_gid at 28 (fs/erofs/erofs_fs.h). An inode number counts slots of 32 bytes.
    const superblock = Buffer.alloc(128);
    await file.read(superblock, 0, superblock.length, 1024);
    const inode = Buffer.alloc(64);
    const at = superblock.readUInt32LE(40) * BLOCK_BYTES + superblock.readUInt16LE(14) * 32;
    await file.read(inode, 0, inode.length, at);
    return { rootUid: inode.readUInt32LE(24), rootGid: inode.readUInt32LE(28) };
  } finally {
    await file.close();
  }
}
