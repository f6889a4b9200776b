// When each part of the store was last used: written by the threads that answer the kernel and by whoever stores or
// reads, asked by the eviction. One 32-bit number of seconds (since 1970) for each MiB of the store: a hit costs a
// comparison, and a plain store once a second; 4 TiB need 16 MiB at most, and pages that nothing touched none. A MiB is a
// piece of a large file; small files that lie together, which came from one directory, are used together.
import { MiB } from '../../units.ts';

export class Touched {
  /** From `touchedCreate`; given to the FUSE session too. */
  readonly map: Uint32Array;

  constructor(map: Uint32Array) {
    this.map = map;
  }

  touch(address: number, length: number): void {
    const now = Math.floor(Date.now() / 1000);
    const last = Math.floor((address + length - 1) / MiB);
    for (let region = Math.floor(address / MiB); region <= last; region++) this.map[region] = now;
  }

  /** The latest use of any byte near the range, seconds since 1970; 0 when there was none since the start. */
  latest(address: number, length: number): number {
    let latest = 0;
    const last = Math.floor((address + length - 1) / MiB);
    for (let region = Math.floor(address / MiB); region <= last; region++)
      latest = Math.max(latest, this.map[region] ?? 0);
    return latest;
  }
}
