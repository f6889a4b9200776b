// Brings the snapshots directory and metadata.db to terms when the service starts. Called once, before anything is
// served; mounts nothing: lazy mounts come back when somebody asks for them.
import { chmod, mkdir, readdir } from 'node:fs/promises';
import type { Logger } from 'pino';
import { wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { removeHalfWritten, writeInfoFile } from './info-file.ts';
import type { Metastore } from './metastore-client.ts';
import { rebuild } from './rebuild.ts';

/**
 * Marks directories of half-made snapshots for deletion and sees to snapshots whose directory is gone. The highest
 * number in use comes back. A new database beside described snapshots means that the old one was lost: it is rebuilt from
 * them. Those that cannot be restored are not deleted, now or at a later start. Errors: STORE_IO.
 */
export async function restore(paths: RootPaths, metastore: Metastore, log: Logger): Promise<number> {
  const found = new Set<number>();
  try {
    await mkdir(paths.snapshots, { recursive: true, mode: 0o700 });
    await chmod(paths.snapshots, 0o700);
    for (const name of await readdir(paths.snapshots)) if (/^[1-9]\d*$/.test(name)) found.add(Number(name));
  } catch (error) {
    throw wrapError(error, `reading ${paths.snapshots}`, 'STORE_IO');
  }
  const highest = found.size === 0 ? 0 : [...found].reduce((a, b) => Math.max(a, b));
  // Before the first row is made: a start that is killed half-way through is gone on with at the next one.
  if ((await metastore.lastId()) === 0 && found.size > 0) await metastore.protect(highest);
  const lost = await metastore.protectedUpTo();
  let known = new Set(await metastore.ids());
  if (lost > 0) {
    const removed = new Set(await metastore.removedIds());
    const wanted = [...found].filter((id) => id <= lost && !known.has(id) && !removed.has(id));
    const { restored, left } = await rebuild(paths, metastore, wanted, log);
    if (left.length === 0) await metastore.unprotect();
    if (restored > 0) log.warn({ snapshots: restored, left: left.length }, 'metadata.db was lost and is made again');
    known = new Set(await metastore.ids());
  }
  const protectedUpTo = await metastore.protectedUpTo();
  const orphans = [...found].filter((id) => !known.has(id));
  const spared = orphans.filter((id) => id <= protectedUpTo);
  if (spared.length > 0) {
    log.error(
      { snapshots: spared.length, database: paths.metadataDb },
      'snapshots of a lost metadata.db that cannot be restored are left alone; reset the root directory to be rid of them',
    );
  }
  for (const id of orphans) if (id > protectedUpTo) await metastore.markRemoved(id);
  for (const id of known) {
    if (found.has(id)) removeHalfWritten(paths, id);
    else await restoreDirectory(paths, metastore, id, log);
  }
  return Math.max(await metastore.lastId(), highest);
}

/** Makes the directory of a snapshot again that has none, unless content of its own is lost with it. Errors: STORE_IO. */
async function restoreDirectory(paths: RootPaths, metastore: Metastore, id: number, log: Logger): Promise<void> {
  const [snapshot] = await metastore.list(id - 1, 1);
  if (snapshot === undefined) return;
  const { name, kind, layer, lowers } = snapshot;
  // Its content is loaded lazily, or is all below it.
  if (layer !== undefined || (kind === 'view' && lowers.length > 0)) {
    try {
      await mkdir(paths.snapshot(id), { mode: 0o700 });
      await writeInfoFile(paths, snapshot);
    } catch (error) {
      throw wrapError(error, `making ${paths.snapshot(id)} again`, 'STORE_IO');
    }
    log.warn({ id, name }, 'the directory of a snapshot was gone and is made again');
    return;
  }
  log.error({ id, name }, 'the directory of a snapshot is gone; containers that need it will not start');
}
