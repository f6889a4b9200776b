// The slow work that Remove leaves behind: deletes directories of removed snapshots and of converted layers, and tells
// dedupd which merged images and lazy layers are still in use. Called by the Cleanup method, by the snapshotter's timer and at start.
import type { Logger } from 'pino';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { deleteTree } from './disk-tree.ts';
import type { Gate } from './gate.ts';
import type { ImageMounter } from './images.ts';
import { removeInfoFile } from './info-file.ts';
import type { LeftoverDirectories } from './leftover-directories.ts';
import type { Metastore } from './metastore-client.ts';

export interface CleanerOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: ImageMounter;
  /** Shared by everything that takes a merged image or a lazy layer into use. */
  readonly gate: Gate;
  readonly leftovers: LeftoverDirectories;
  /** Called when directories of converted layers are still in use: a later pass looks again. */
  readonly onLeftovers: () => void;
  readonly log: Logger;
}

/** How long a pass waits for a moment in which nobody prepares a snapshot, milliseconds. */
const GATE_PATIENCE_MS = 10_000;

export class Cleaner {
  readonly #options: CleanerOptions;
  #running: Promise<void> = Promise.resolve();

  constructor(options: CleanerOptions) {
    this.#options = options;
  }

  /** One pass after all passes asked for before. Errors: STORE_IO when a directory could not be deleted. */
  run(): Promise<void> {
    const previous = this.#running;
    const pass = (async () => {
      // Its caller has the error; this pass only waits its turn.
      await previous.catch(() => {});
      await this.#release();
      if (await this.#options.leftovers.deleteUnused()) this.#options.onLeftovers();
      await this.#deleteDirectories();
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

  async #release(): Promise<void> {
    const { metastore, images, gate, log } = this.#options;
    try {
      const released = await gate.exclusive(async () => {
        // Snapshots of a lost database that could not be restored use what no row names.
        if ((await metastore.protectedUpTo()) > 0) return;
        const { mountIds, layers } = await metastore.inUse();
        await images.releaseImages(mountIds);
        await images.retainLayers(layers);
      }, GATE_PATIENCE_MS);
      if (!released) log.debug('snapshots are being prepared without a pause: merged images are released later');
      for (const { layer, source } of await metastore.untoldSources()) {
        await images.prepareLayer({ layer, sources: [source], manifest: '', siblings: [], budgetMs: 1000 });
        await metastore.addSource(layer.digest, source, true);
      }
    } catch (error) {
      // Nothing is lost: what is not released now is released at the next Cleanup that reaches dedupd.
      const level = errorCode(error) === 'UNAVAILABLE' ? 'debug' : 'warn';
      log[level]({ err: wrapError(error, 'releasing merged images') }, 'merged images are released later');
    }
  }
}
