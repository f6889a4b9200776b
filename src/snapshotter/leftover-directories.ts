// The directories of converted layers: kept as long as a key that was given one exists, or a mount of the machine names it,
// then deleted. Called by cleanup.ts in each of its passes; the snapshot's own directory stays.
import { rename, rm } from 'node:fs/promises';
import type { Logger } from 'pino';
import { errorCode, wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { deleteTree } from './disk-tree.ts';
import { isErrno } from './errno.ts';
import type { Gate } from './gate.ts';
import type { ImageMounter, LayerKey } from './images.ts';
import { syncInfoFile } from './info-file.ts';
import type { Metastore } from './metastore-client.ts';
import { mountedDirectories } from './mount-users.ts';
import type { DirectoryState, SnapshotRecord } from './snapshot-record.ts';

export interface LeftoverDirectoriesOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: Pick<ImageMounter, 'confirmLayer'>;
  readonly gate: Gate;
  /** Writes what is known of a snapshot beside it. */
  readonly describe: (snapshot: SnapshotRecord) => Promise<void>;
  /** Makes converted snapshots the ordinary ones they were: dedupd does not know their layers any more. */
  readonly takeBack: (layers: readonly LayerKey[]) => Promise<unknown>;
  readonly log: Logger;
}

/** A directory that is still there, and why. */
export interface WaitingDirectory {
  readonly id: number;
  readonly name: string;
  readonly reason: string;
}

/** Why it is still there, where nothing else is known. */
const STATES: Readonly<Record<DirectoryState, string>> = {
  unproven: 'stays until an image was made of the layer',
  waits: 'is looked at in the next Cleanup',
  goes: 'is being deleted',
};

/** How long a pass waits for a moment in which nobody prepares a snapshot, milliseconds. */
const GATE_PATIENCE_MS = 10_000;

export class LeftoverDirectories {
  readonly #options: LeftoverDirectoriesOptions;
  /** Why a directory that no key holds is still there, by snapshot. */
  #reasons = new Map<number, string>();

  constructor(options: LeftoverDirectoriesOptions) {
    this.#options = options;
  }

  /** What is still there, and why. */
  async waiting(): Promise<WaitingDirectory[]> {
    const left = await this.#options.metastore.leftoverDirectories();
    return left.map(({ id, name, state, heldBy }) => ({
      id,
      name,
      reason: heldBy === undefined ? (this.#reasons.get(id) ?? STATES[state]) : `was given to ${heldBy}`,
    }));
  }

  /** Deletes what nobody uses; true when something is left to be looked at again. Never rejects. */
  async deleteUnused(): Promise<boolean> {
    const { metastore, log } = this.#options;
    const reasons = new Map<number, string>();
    try {
      for (const id of await this.#giveUpUnused(reasons)) {
        try {
          await this.#delete(id);
        } catch (error) {
          reasons.set(id, `cannot be deleted: ${(error as Error).message}`);
          log.warn({ err: error, id }, 'the directory of a converted layer cannot be deleted yet');
        }
      }
    } catch (error) {
      // Nothing is lost but room on the disk: the next pass looks again.
      log.warn({ err: error }, 'directories of converted layers are deleted later');
    }
    this.#reasons = reasons;
    return (await metastore.leftoverDirectories().catch(() => [])).length > 0;
  }

  /**
   * Numbers of directories that may be deleted now. Keys and mounts are asked in this order: a key may be gone whose mount is
   * not. Between the two nobody can come by a directory: new keys are given the layer, and a Prepare that had read the
   * chain before it was one has ended when the gate is passed.
   */
  async #giveUpUnused(reasons: Map<number, string>): Promise<number[]> {
    const { metastore, gate, images, describe, takeBack, paths } = this.#options;
    // A lost database's snapshots that could not be restored use what no row names.
    if ((await metastore.protectedUpTo()) > 0) return [];
    let free: number[] = [];
    const going: number[] = [];
    const asked = await gate.exclusive(async () => {
      for (const { id, state, heldBy } of await metastore.leftoverDirectories()) {
        if (state === 'goes') going.push(id);
        else if (state === 'waits' && heldBy === undefined) free.push(id);
      }
    }, GATE_PATIENCE_MS);
    if (!asked || free.length === 0) return going;
    const mounted = await mountedDirectories(paths).catch((error: unknown) => {
      for (const id of free) reasons.set(id, `nobody knows whether it is mounted: ${(error as Error).message}`);
      throw error;
    });
    for (const id of free) {
      const where = mounted.get(id);
      if (where !== undefined) reasons.set(id, `is part of what is mounted at ${where}`);
    }
    free = free.filter((id) => !mounted.has(id));
    for (const id of free) {
      const snapshot = await metastore.byId(id);
      if (snapshot?.layer === undefined || snapshot.directory !== 'waits') continue;
      try {
        // The last moment in which it can be had again.
        await images.confirmLayer(snapshot.layer);
      } catch (error) {
        reasons.set(id, `waits for dedupd: ${wrapError(error, 'asking for its layer').message}`);
        if (errorCode(error) === 'NOT_FOUND') await takeBack([snapshot.layer]);
        continue;
      }
      const latest = await metastore.byId(id);
      if (latest?.directory !== 'waits') continue;
      await describe(latest);
      await syncInfoFile(paths, id);
      const passed = await gate.exclusive(async () => {
        if (await metastore.giveUpDirectory(id)) going.push(id);
      }, GATE_PATIENCE_MS);
      if (!passed) return going;
    }
    return going;
  }

  async #delete(id: number): Promise<void> {
    const { paths, metastore, log } = this.#options;
    // Under its own name it must always be whole: a metadata.db that is made again takes it for such.
    await rename(paths.snapshotFs(id), paths.snapshotGoing(id)).catch((error: unknown) => {
      if (!isErrno(error, 'ENOENT')) throw error;
    });
    await deleteTree(paths.snapshotGoing(id));
    await rm(paths.snapshotWork(id), { recursive: true, force: true });
    await metastore.directoryGone(id);
    log.info({ id }, 'directory of a converted layer deleted');
  }
}
