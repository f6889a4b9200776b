// Mounts that read the store file without dedupd: who they are is a committed row before the kernel gets the file, and
// stays one until its device was seen gone, across any crash. Used by NodeStore; knows devices by what it is told of them.
import { LRUCache } from 'lru-cache';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES, MiB } from '../../units.ts';
import type { DirectMount, LayerPresence } from './index-protocol.ts';

/** A device of this machine that an image of this store is read through. */
export interface ImageDevice {
  readonly imageId: number;
  readonly path: string;
  /** Its backing file is the store itself. */
  readonly direct: boolean;
}

/** What is needed of the store and its database. */
export interface DirectTarget {
  /** Errors: when it cannot be told of a device whether it reads the store. */
  devices(): Promise<readonly ImageDevice[]>;
  rows(): Promise<readonly number[]>;
  /** Gives images that are made from now on higher numbers. */
  numberAbove(imageId: number): Promise<void>;
  layerPresence(layerId: number): Promise<LayerPresence>;
  /** On the disk when it resolves. */
  add(mount: DirectMount): Promise<void>;
  drop(imageId: number): Promise<void>;
  isPresent(address: number, length: number): boolean;
  /**
   * Makes blocks absent that the disk has nothing of although they are held to be present; true when there were any.
   * Ranges are first block and number of blocks, alternating. Errors: KERNEL.
   */
  dropHoles(ranges: Float64Array): Promise<boolean>;
  /** How often blocks were made absent so far. */
  clearEpoch(): number;
  /** Everything that is present is durable; `metadata`: what lies below the chunks as well. */
  flush(metadata: boolean): Promise<void>;
  /** Runs work while nothing is removed from the store. */
  serially<T>(work: () => Promise<T>): Promise<T>;
  /** Called once no device is left that was unknown. */
  strangersGone(): Promise<void>;
}

/** An image that is to be read without dedupd. */
export interface WantedDirect extends DirectMount {
  /** True when its metadata lies in the store too (flat layout). */
  readonly metadataInStore: boolean;
}

/** Memory for where the chunks of layers lie, bytes. */
const RANGES_BYTES = 4 * MiB;

/** Blocks that are taken away while it is looked whether all are here make that begin anew, this often at most. */
const ATTEMPTS = 4;

export class DirectMounts {
  readonly #target: DirectTarget;
  readonly #log: Logger;
  /** Images with a row; another token for each time it was made. */
  readonly #rows = new Map<number, object>();
  /** Images whose row may be older than their device, and how often that is so. */
  readonly #underWay = new Map<number, number>();
  /** The blocks of layers, which never change: looking for them takes a few microseconds a chunk. */
  readonly #ranges = new LRUCache<number, Float64Array>({
    maxSize: RANGES_BYTES,
    sizeCalculation: (ranges) => Math.min(ranges.byteLength + 64, RANGES_BYTES),
  });
  /** Blocks that an image was found to lack. */
  readonly #lacks = new Map<number, { readonly address: number; readonly length: number }>();
  /** Devices that read the store, of images that no row names. */
  #strangers: readonly ImageDevice[] = [];

  private constructor(target: DirectTarget, log: Logger) {
    this.#target = target;
    this.#log = log;
  }

  /** Every row counts as alive until its device is seen to be gone. Errors: STORE_IO, KERNEL. */
  static async open(target: DirectTarget, log: Logger): Promise<DirectMounts> {
    const direct = new DirectMounts(target, log);
    for (const imageId of await target.rows()) direct.#rows.set(imageId, {});
    const devices = await target.devices();
    // A device whose image index.db has forgotten must never pass for another image's, now or after the next start.
    if (devices.length > 0) await target.numberAbove(Math.max(...devices.map(({ imageId }) => imageId)));
    const readers = devices.filter(({ direct }) => direct);
    await direct.#seen(new Map(direct.#rows), devices, readers);
    if (direct.hasStrangers) {
      log.warn(
        { devices: direct.#strangers },
        'index.db does not know images that are read from the store: nothing of it is freed until they are gone',
      );
    }
    return direct;
  }

  /**
   * True while a device reads the store of which no row says what it may read (index.db was lost or is an older copy):
   * then no address may be punched, evicted or given again.
   */
  get hasStrangers(): boolean {
    return this.#strangers.length > 0;
  }

  /**
   * Lets the kernel read an image without us, if all of it is here and on the disk: commits its row, then runs `attach`.
   * False, and nothing is run, when something is missing. Errors: STORE_IO, STORE_FULL, and those of `attach`; after
   * those of `attach` the row stays until the device is seen gone.
   */
  async admit(wanted: WantedDirect, attach: () => Promise<void>): Promise<boolean> {
    const { imageId } = wanted;
    const lack = this.#lacks.get(imageId);
    if (lack !== undefined && !this.#target.isPresent(lack.address, lack.length)) return false;
    this.#underWay.set(imageId, (this.#underWay.get(imageId) ?? 0) + 1);
    try {
      if (!(await this.#claim(wanted))) return false;
      await attach();
      return true;
    } finally {
      const left = this.#underWay.get(imageId)! - 1;
      if (left === 0) this.#underWay.delete(imageId);
      else this.#underWay.set(imageId, left);
    }
  }

  async #claim(wanted: WantedDirect): Promise<boolean> {
    const target = this.#target;
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const epoch = target.clearEpoch();
      const ranges = await this.#presentRanges(wanted);
      if (ranges === undefined) return false;
      // Covers every byte that was just seen to be present, whenever it was written.
      await target.flush(wanted.metadataInStore);
      if (ranges === 'unrecorded') continue; // Recorded now, unless that failed.
      // Nobody compares with sums any more what is read: at least no zeros may stand for bytes.
      let holes = false;
      for (const ofLayer of ranges) holes = (await target.dropHoles(ofLayer)) || holes;
      if (holes) continue;
      const claimed = await target.serially(async () => {
        if (target.clearEpoch() !== epoch) return false;
        await target.add(wanted);
        this.#rows.set(wanted.imageId, {});
        return true;
      });
      if (claimed) return true;
    }
    return false;
  }

  /** The blocks of the image's layers, all present; 'unrecorded' where index.db does not know so; undefined: some are absent. */
  async #presentRanges({ imageId, layers }: WantedDirect): Promise<Float64Array[] | 'unrecorded' | undefined> {
    const found: Float64Array[] = [];
    let unrecorded = false;
    for (const layerId of layers) {
      let ranges = this.#ranges.get(layerId);
      if (ranges === undefined) {
        const presence = await this.#target.layerPresence(layerId);
        if (this.#anyAbsent(imageId, presence.missing)) return undefined;
        if (presence.missing.length > 0) {
          unrecorded = true;
          continue;
        }
        ranges = presence.ranges;
        this.#ranges.set(layerId, ranges);
      }
      if (this.#anyAbsent(imageId, ranges)) return undefined;
      found.push(ranges);
    }
    return unrecorded ? 'unrecorded' : found;
  }

  #anyAbsent(imageId: number, ranges: Float64Array): boolean {
    for (let i = 0; i + 1 < ranges.length; i += 2) {
      const range = { address: ranges[i]! * BLOCK_BYTES, length: ranges[i + 1]! * BLOCK_BYTES };
      if (this.#target.isPresent(range.address, range.length)) continue;
      this.#lacks.set(imageId, range);
      return true;
    }
    this.#lacks.delete(imageId);
    return false;
  }

  /** Forgets what was seen of an image that is not mounted any more. */
  forget(imageId: number): void {
    this.#lacks.delete(imageId);
  }

  /**
   * Drops the rows of images whose devices are gone. Those that `mounted` names are known to be there. Errors: none; what
   * cannot be told is looked at again.
   */
  async look(mounted: (imageId: number) => boolean = () => false): Promise<void> {
    const asked = new Map([...this.#rows].filter(([id]) => !mounted(id) && !this.#underWay.has(id)));
    const hadStrangers = this.hasStrangers;
    if (asked.size === 0 && !hadStrangers) return;
    try {
      // Of whatever kind: a switch that took too long may still happen.
      const devices = await this.#target.devices();
      await this.#seen(asked, devices, devices);
      if (hadStrangers && !this.hasStrangers) await this.#target.strangersGone();
    } catch (error) {
      this.#log.error({ err: error }, 'devices that read the store cannot be looked at');
    }
  }

  /** `holding`: devices whose images keep their rows. */
  async #seen(
    asked: ReadonlyMap<number, object>,
    devices: readonly ImageDevice[],
    holding: readonly ImageDevice[],
  ): Promise<void> {
    // Devices of our own had their rows before they were attached.
    this.#strangers = devices.filter(({ direct, imageId }) => direct && !this.#rows.has(imageId));
    const alive = new Set(holding.map(({ imageId }) => imageId));
    for (const [imageId, token] of asked) {
      // A row made meanwhile belongs to a device that was attached after the list was made.
      if (alive.has(imageId) || this.#underWay.has(imageId) || this.#rows.get(imageId) !== token) continue;
      await this.#target.drop(imageId);
      if (this.#rows.get(imageId) === token) this.#rows.delete(imageId);
    }
  }
}
