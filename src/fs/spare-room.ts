// How much may be written for something that nobody waits for: what the disk and the quota have beside what is left for
// everybody else. Asked by ordinary-layers.ts before it reads a layer and before it stores a batch; evicts nothing.
import type { StatsFs } from 'node:fs';
import { statfs } from 'node:fs/promises';
import { DedupError } from '../errors.ts';
import { formatBytes, MiB } from '../units.ts';

export interface SpareRoomOptions {
  /** Any path on the file system of the store. */
  readonly directory: string;
  /** 0: there is none. */
  readonly quotaBytes: number;
  /** What counts against the quota. */
  readonly presentBytes: () => number;
  readonly statfs?: (path: string) => Promise<Pick<StatsFs, 'bsize' | 'blocks' | 'bfree' | 'bavail'>>;
}

/**
 * Part of a file system that is left for others, of what is used or can be, as df(1) counts it: kubelet evicts pods below it
 * (imagefs.available<15%).
 */
const FLOOR_PART = 0.15;
/** At least so much is left for others, bytes. */
const FLOOR_BYTES = 256 * MiB;

export class SpareRoom {
  readonly #options: SpareRoomOptions;

  constructor(options: SpareRoomOptions) {
    this.#options = options;
  }

  /** Errors: STORE_FULL, with `details.spare` set, when so many bytes would take what is left for others. */
  async require(bytes: number): Promise<void> {
    const { directory, quotaBytes, presentBytes, statfs: look = statfs } = this.#options;
    const { bsize, blocks, bfree, bavail } = await look(directory);
    // Without what is reserved for root.
    const usable = (blocks - bfree + bavail) * bsize;
    const floor = Math.max(FLOOR_BYTES, usable * FLOOR_PART);
    const free = Math.max(0, bavail * bsize - floor);
    if (bytes > free)
      throw noRoom('no room', bytes, free, ` beside the ${formatBytes(floor)} that are left for others`);
    if (quotaBytes === 0) return;
    const left = Math.max(0, quotaBytes - presentBytes());
    if (bytes > left) throw noRoom('no room in quota_bytes', bytes, left, '');
  }
}

function noRoom(what: string, needed: number, free: number, beside: string): DedupError {
  return new DedupError('STORE_FULL', `${what}: ${formatBytes(needed)} needed, ${formatBytes(free)} free${beside}`, {
    details: { spare: true },
  });
}

/** True for what SpareRoom throws: nothing is wrong, the work waits. */
export function isNoSpareRoom(error: unknown): boolean {
  return error instanceof DedupError && error.details.spare === true;
}
