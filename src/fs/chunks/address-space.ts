// Gives out addresses of the store, upwards. Used inside one transaction of the writer, which records where it ended.
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES, roundUp } from '../../units.ts';
import { STORE_TAIL_BYTES } from './store-layout.ts';

export class AddressSpace {
  /** First address that is not given yet, bytes. */
  next: number;
  readonly #limit: number;

  constructor(next: number, storeBytes: number) {
    this.next = next;
    this.#limit = storeBytes - STORE_TAIL_BYTES;
  }

  /** Takes so many bytes in one run and returns its first block. Errors: STORE_FULL. */
  take(bytes: number): number {
    if (this.next + bytes > this.#limit) {
      throw new DedupError('STORE_FULL', 'the address space of the store is used up', {
        hint: 'remove images, or start with a new root',
      });
    }
    const block = this.next / BLOCK_BYTES;
    this.next += roundUp(bytes, BLOCK_BYTES);
    return block;
  }
}
