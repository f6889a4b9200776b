// Changes of index.db that the store's header has to know of: one at a time, announced in the header before and confirmed
// after, so that a copy of the database from before is told. Owned by NodeStore; docs/formats/index-db.md has the rules.
import { errorCode } from '../../errors.ts';
import type { SpaceReserve } from './space-reserve.ts';
import type { StoreFile } from './store-file.ts';
import { HIGH_WATER_STEP } from './store-layout.ts';

export class StoreChanges {
  readonly #file: StoreFile;
  readonly #reserve: SpaceReserve;
  #generation: number;
  #nextAddress: number;
  #highWater: number;
  #last: Promise<unknown> = Promise.resolve();

  constructor(
    file: StoreFile,
    reserve: SpaceReserve,
    state: { readonly generation: number; readonly nextAddress: number },
  ) {
    this.#file = file;
    this.#reserve = reserve;
    this.#generation = state.generation;
    this.#nextAddress = state.nextAddress;
    this.#highWater = file.header.highWater;
  }

  get generation(): number {
    return this.#generation;
  }

  /** First address that is not given yet. */
  get nextAddress(): number {
    return this.#nextAddress;
  }

  /** Runs one change at a time, in the order of the calls. Errors: those of `work`. */
  serially<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#last.then(work);
    this.#last = result.catch(() => undefined);
    return result;
  }

  /** Resolves when every change that was begun is over. */
  async settled(): Promise<void> {
    await this.#last;
  }

  /**
   * Runs a change of the database under a generation of its own; on a full disk once more, with the room of the reserve.
   * `reuse`: it makes addresses free to be given again. To be called serially. Errors: STORE_IO, those of `change`.
   */
  async underGeneration<T>(change: (generation: number) => Promise<T>, { reuse } = { reuse: false }): Promise<T> {
    const next = this.#generation + 1;
    await this.#file.writeHeader({ pendingGeneration: next, ...(reuse ? { reuseGeneration: next } : {}) });
    const result = await change(next).catch(async (error: unknown) => {
      if (errorCode(error) !== 'STORE_FULL') throw error;
      await this.#reserve.release();
      return await change(next);
    });
    await this.#file.writeHeader({ generation: next });
    this.#generation = next;
    return result;
  }

  /**
   * Runs a change that gives addresses to at most so many bytes, once the header admits them. To be called serially.
   * Errors: STORE_IO, those of `change`.
   */
  async givingAddresses<T extends { readonly nextAddress: number }>(
    mostBytes: number,
    change: () => Promise<T>,
  ): Promise<T> {
    const needed = this.#nextAddress + mostBytes;
    if (needed > this.#highWater) {
      const highWater = Math.ceil(needed / HIGH_WATER_STEP) * HIGH_WATER_STEP;
      await this.#file.writeHeader({ highWater });
      this.#highWater = highWater;
    }
    const given = await change();
    this.#nextAddress = Math.max(this.#nextAddress, given.nextAddress);
    return given;
  }
}
