// Keeps writes of pieces and punches of the same blocks apart: a punch in the middle of a write would leave bytes without
// their sums, or sums without their bytes, behind a presence that is set last. Used by StoreSpace.
import type { StoreRange } from './index-protocol.ts';

interface Write {
  readonly addresses: readonly number[];
  readonly ended: Promise<void>;
}

interface Punch {
  /** Ascending. */
  readonly ranges: readonly StoreRange[];
  readonly ended: Promise<void>;
}

export class WriteGate {
  readonly #writes = new Set<Write>();
  /** Pieces that are being written, by address; how often each. */
  readonly #writing = new Map<number, number>();
  /** Single pieces that are being punched, by address. */
  readonly #punched = new Map<number, Promise<void>>();
  readonly #punches = new Set<Punch>();

  /** True while the piece at this address is being written. */
  isWriting(address: number): boolean {
    return this.#writing.has(address);
  }

  /** Runs a write of pieces, once none of them is being punched. */
  async write<T>(addresses: readonly number[], work: () => Promise<T>): Promise<T> {
    for (;;) {
      const punches = this.#punchesOf(addresses);
      if (punches.length === 0) break;
      await Promise.all(punches);
    }
    const { promise: ended, resolve } = Promise.withResolvers<void>();
    const write: Write = { addresses, ended };
    this.#writes.add(write);
    for (const address of addresses) this.#writing.set(address, (this.#writing.get(address) ?? 0) + 1);
    try {
      return await work();
    } finally {
      this.#writes.delete(write);
      for (const address of addresses) {
        const left = this.#writing.get(address)! - 1;
        if (left === 0) this.#writing.delete(address);
        else this.#writing.set(address, left);
      }
      resolve();
    }
  }

  /** Lets no write of a piece begin before `ended`, which must not reject. Nobody may be writing it. */
  closePiece(address: number, ended: Promise<void>): void {
    this.#punched.set(address, ended);
  }

  /** In the same turn of the loop as `ended` settles. */
  openPiece(address: number): void {
    this.#punched.delete(address);
  }

  /**
   * Runs a punch of ascending ranges once every write there has ended; those that come later wait for it. `hadWrites`
   * tells it whether any was waited for.
   */
  async punch<T>(ranges: readonly StoreRange[], work: (hadWrites: boolean) => Promise<T>): Promise<T> {
    const { promise: ended, resolve } = Promise.withResolvers<void>();
    const punch: Punch = { ranges, ended };
    this.#punches.add(punch);
    try {
      const writes = [...this.#writes].filter(({ addresses }) => addresses.some((address) => isIn(ranges, address)));
      await Promise.all(writes.map((write) => write.ended));
      return await work(writes.length > 0);
    } finally {
      this.#punches.delete(punch);
      resolve();
    }
  }

  #punchesOf(addresses: readonly number[]): Promise<void>[] {
    const found = new Set<Promise<void>>();
    for (const address of addresses) {
      const piece = this.#punched.get(address);
      if (piece !== undefined) found.add(piece);
      for (const { ranges, ended } of this.#punches) if (isIn(ranges, address)) found.add(ended);
    }
    return [...found];
  }
}

/** True when one of the ascending ranges contains the address. */
function isIn(ranges: readonly StoreRange[], address: number): boolean {
  let low = 0;
  let high = ranges.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const { address: start, length } = ranges[middle]!;
    if (start + length <= address) low = middle + 1;
    else high = middle;
  }
  return low < ranges.length && ranges[low]!.address <= address;
}
