// Gives out addresses of the store: the smallest free range that is large enough, else upwards. Used inside one
// transaction of the writer, which records where it ended.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import { FreeRanges } from './free-space.ts';
import { STORE_TAIL_BYTES } from './store-layout.ts';

export class AddressSpace {
  /** No address from here on was given yet, bytes. */
  next: number;
  readonly #free: FreeRanges;
  readonly #limit: number;

  constructor(db: Database.Database, next: number, storeBytes: number) {
    this.next = next;
    this.#free = new FreeRanges(db);
    this.#limit = storeBytes - STORE_TAIL_BYTES;
  }

  /** Takes so many bytes in one run and returns its first block. Errors: STORE_FULL. */
  take(bytes: number): number {
    const length = roundUp(bytes, BLOCK_BYTES);
    const again = this.#free.take(length / BLOCK_BYTES);
    if (again !== undefined) return again;
    if (this.next + length > this.#limit) {
      throw new DedupError('STORE_FULL', 'the address space of the store is used up', {
        hint: 'remove images and run `dedup-snapshotter gc`, or start with a new root',
      });
    }
    const block = this.next / BLOCK_BYTES;
    this.next += length;
    return block;
  }
}
