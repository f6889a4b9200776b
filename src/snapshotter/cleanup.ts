// The slow work that Remove leaves behind: has what nobody uses released, and deletes directories of removed snapshots and of
// converted layers. Called by the Cleanup method and by the snapshotter's timer.
import type { Logger } from 'pino';
import { DedupError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { deleteTree } from './disk-tree.ts';
import { removeInfoFile } from './info-file.ts';
import type { LeftoverDirectories } from './leftover-directories.ts';
import type { Metastore } from './metastore-client.ts';
import type { Release } from './release.ts';

export interface CleanerOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly release: Release;
  readonly leftovers: LeftoverDirectories;
  /** Called when directories of converted layers are still in use: a later pass looks again. */
  readonly onLeftovers: () => void;
  readonly log: Logger;
}

export class Cleaner {
  readonly #options: CleanerOptions;
  #running: Promise<unknown> = Promise.resolve();

  constructor(options: CleanerOptions) {
    this.#options = options;
  }

  /**
   * One pass after all passes asked for before. Answers why what nobody uses was not released, undefined when it was.
   * Errors: STORE_IO when a directory could not be deleted.
   */
  run(): Promise<string | undefined> {
    const previous = this.#running;
    const pass = (async () => {
      // Its caller has the error; this pass only waits its turn.
      await previous.catch(() => {});
      const notReleased = await this.#options.release.now();
      if (await this.#options.leftovers.deleteUnused()) this.#options.onLeftovers();
      await this.#deleteDirectories();
      return notReleased;
    })();
    this.#running = pass;
    return pass;
  }

  async #deleteDirectories(): Promise<void> {
    const { paths, metastore, log } = this.#options;
    const failures: unknown[] = [];
    for (const id of await metastore.removedIds()) {
      try {
        // First what describes it: a half-deleted one must never be taken for a whole one.
        await removeInfoFile(paths, id);
        await deleteTree(paths.snapshot(id));
        await metastore.forgetRemoved(id);
        log.debug({ id }, 'directory of a removed snapshot deleted');
      } catch (error) {
        failures.push(error);
        log.warn({ id, err: error }, 'the directory of a removed snapshot cannot be deleted yet');
      }
    }
    if (failures.length > 0) {
      throw new DedupError('STORE_IO', `${failures.length} directories of removed snapshots could not be deleted`, {
        cause: failures[0],
        hint: 'is something still mounted below the snapshots directory?',
      });
    }
  }
}
