// A file of real blocks that is given up when the disk is full, so that the database can still record what is to be
// freed. Used by NodeStore.
import { type FileHandle, open, rm, stat } from 'node:fs/promises';
import { MiB } from '../../units.ts';

export class SpaceReserve {
  readonly #file: string;
  readonly #bytes: number;

  constructor(file: string, bytes: number) {
    this.#file = file;
    this.#bytes = bytes;
  }

  /** Makes the reserve if it is not there. False when there is no room for it. */
  async fill(): Promise<boolean> {
    let handle: FileHandle | undefined;
    try {
      const size = (await stat(this.#file).catch(() => undefined))?.size ?? 0;
      if (size === this.#bytes) return true;
      handle = await open(this.#file, 'w', 0o600);
      const zeros = Buffer.alloc(Math.min(MiB, this.#bytes));
      for (let at = 0; at < this.#bytes; at += zeros.length) {
        await handle.write(zeros, 0, Math.min(zeros.length, this.#bytes - at), at);
      }
      // Blocks that are not allocated yet reserve nothing.
      await handle.datasync();
      return true;
    } catch {
      await this.release();
      return false;
    } finally {
      await handle?.close();
    }
  }

  /** Gives the space back to the file system. */
  async release(): Promise<void> {
    await rm(this.#file, { force: true });
  }
}
