// Images that are here completely, which the kernel reads from the store without us: at their mount, or once they have become
// complete. Owned by MountTable; what may be read so the node store decides.
import type { Logger } from '../log.ts';
import type { MountableLayer } from './image-metadata.ts';
import type { ErofsLayoutKind, MountSpec, Transport } from './transport/transport.ts';

/** What the node store says of reading without us. */
export interface DirectStore {
  /**
   * Runs `attach`, which has the kernel read the store without us, if all of the image is here for good. False: it is not,
   * and nothing was run. Errors: STORE_IO, STORE_FULL, and those of `attach`.
   */
  admitDirect(
    image: { readonly imageId: number; readonly layers: readonly number[]; readonly metadataInStore: boolean },
    attach: () => Promise<void>,
  ): Promise<boolean>;
  /** Looks whether the devices of images that read the store without us are gone; those of `mounted` ones are not. */
  lookAtDirect(mounted: (imageId: number) => boolean): Promise<void>;
}

/** What is known here of a mounted image. */
export interface DirectImage {
  readonly id: number;
  readonly layers: readonly MountableLayer[];
  /** True when the kernel reads it from the store without us. */
  direct: boolean;
}

export interface DirectImagesOptions {
  /** False: no image is read without us. */
  readonly direct: boolean;
  readonly transport: Pick<Transport, 'mount' | 'complete'>;
  readonly layout: ErofsLayoutKind;
  readonly images: DirectStore;
  /** As MountTableOptions says. */
  readonly onUnserved?: (imageId: number) => Promise<void>;
  readonly log: Logger;
}

/** After this time it is tried again to have an image read without us where that failed, milliseconds. */
const RETRY_MS = 30_000;

export class DirectImages {
  readonly #options: DirectImagesOptions;
  /** Those that are mounted, by number; the table's own. */
  readonly #mounted: ReadonlyMap<number, DirectImage>;
  /** Images that could not be switched to the store, until when. */
  readonly #retryAt = new Map<number, number>();
  #completing: Promise<void> | undefined;
  #closed = false;

  constructor(options: DirectImagesOptions, mounted: ReadonlyMap<number, DirectImage>) {
    this.#options = options;
    this.#mounted = mounted;
  }

  /** Mounts an image that is here completely on the store itself; false when it must be mounted otherwise. Errors: none. */
  async mount(spec: MountSpec, layers: readonly number[]): Promise<boolean> {
    const { transport, images, direct, log } = this.#options;
    if (!direct) return false;
    const image = { imageId: spec.imageId, layers, metadataInStore: spec.layout === 'flat' };
    try {
      return await images.admitDirect(image, () => transport.mount({ ...spec, direct: true }));
    } catch (error) {
      // It is no less right with us in between, where what is wrong with it is told.
      log.warn(
        { err: error, image: spec.imageId },
        'an image that is here completely is not mounted on the store itself',
      );
      return false;
    }
  }

  /** Has images that have become complete since they were mounted read the store without us. Errors: none. */
  complete(): Promise<void> {
    this.#completing ??= this.#completeAll().finally(() => {
      this.#completing = undefined;
    });
    return this.#completing;
  }

  async #completeAll(): Promise<void> {
    for (const image of [...this.#mounted.values()]) {
      const wait = (this.#retryAt.get(image.id) ?? 0) > performance.now();
      if (!image.direct && !wait && !this.#closed) await this.#complete(image);
    }
  }

  async #complete(image: DirectImage): Promise<void> {
    const { transport, images, layout, direct, log } = this.#options;
    if (!direct || this.#mounted.get(image.id) !== image) return;
    const layers = image.layers.map(({ layerId }) => layerId);
    const wanted = { imageId: image.id, layers, metadataInStore: layout === 'flat' };
    try {
      image.direct = await images.admitDirect(wanted, () => transport.complete(image.id));
      this.#retryAt.delete(image.id);
      if (image.direct) await this.#options.onUnserved?.(image.id);
    } catch (error) {
      this.#retryAt.set(image.id, performance.now() + RETRY_MS);
      log.warn({ err: error, image: image.id }, 'an image that is here completely goes on being read through dedupd');
    }
  }

  /** Forgets images read without us that are mounted no more, and whose devices are gone. Errors: none. */
  look(): Promise<void> {
    return this.#options.images.lookAtDirect((id) => this.#mounted.get(id)?.direct === true);
  }

  /** Tells that an image was unmounted. */
  forget(imageId: number): void {
    this.#retryAt.delete(imageId);
  }

  /** Switches no more images; resolves once the one under way has ended. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#completing;
  }
}
