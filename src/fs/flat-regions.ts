// Where the metadata of flat images lies in the reserved part of the store, while they are mounted. Owned by MountTable; writes
// nothing there itself.
import { readdirSync, readFileSync } from 'node:fs';
import { DedupError } from '../errors.ts';
import { MiB } from '../units.ts';

/** Behind the first MiB, which stays zero. */
const FIRST = MiB;
const REGION_BYTES = 256 * MiB;
const REGIONS = 255;

export class FlatRegions {
  /** Where loop devices begin in their files. */
  readonly #loopOffsets: () => readonly number[];
  /** By image. */
  readonly #taken = new Map<number, number>();
  /** Where the search for a free region begins. */
  #next = 0;

  constructor(loopOffsets: () => readonly number[] = loopOffsetsHere) {
    this.#loopOffsets = loopOffsets;
  }

  /**
   * A free region for the metadata of an image; one given back is taken again last, and never while a loop device lies over
   * it: a process may still hold the detached mount that reads it. Errors: STORE_FULL.
   */
  take(imageId: number): number {
    const taken = new Set([...this.#taken.values(), ...this.#loopOffsets()]);
    for (let step = 0; step < REGIONS; step++) {
      const slot = (this.#next + step) % REGIONS;
      const offset = FIRST + slot * REGION_BYTES;
      if (taken.has(offset)) continue;
      this.#next = slot + 1;
      this.#taken.set(imageId, offset);
      return offset;
    }
    throw new DedupError('STORE_FULL', `more than ${REGIONS} images are mounted at once`, {
      hint: 'kernels from 5.16 on have no such limit',
    });
  }

  /** Errors: IMAGE_INVALID for metadata that would lie over that of another image, which may be mounted. */
  mustFit(metadataBytes: number): void {
    if (metadataBytes <= REGION_BYTES) return;
    throw new DedupError('IMAGE_INVALID', `${metadataBytes} bytes of metadata are more than ${REGION_BYTES}`);
  }

  /** Gives the region of an image back, if it has one. */
  release(imageId: number): void {
    this.#taken.delete(imageId);
  }
}

/** Where the loop devices of this machine begin in their files, bytes; ours go with their last user. */
function loopOffsetsHere(): number[] {
  const offsets: number[] = [];
  for (const name of readdirSync('/sys/block')) {
    if (!name.startsWith('loop')) continue;
    try {
      offsets.push(Number(readFileSync(`/sys/block/${name}/loop/offset`, 'utf8')));
    } catch {
      // Not attached: no such file.
    }
  }
  return offsets;
}
