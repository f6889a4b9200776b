// Brings the snapshots directory and metadata.db to terms when the service starts. Called once, before anything is
// served; mounts nothing: lazy mounts come back when somebody asks for them.
import { chmod, mkdir, readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { isErrno } from './errno.ts';
import { INFO_FILE } from './info-file.ts';
import type { Metastore } from './metastore-client.ts';

/**
 * Marks directories of half-made snapshots for deletion and reports snapshots whose directory is gone. The highest
 * number in use comes back. A new database beside described snapshots means that the old one was lost; it can be rebuilt
 * from them, so they are not deleted, now or at a later start. Errors: STORE_IO.
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
  const known = new Set(await metastore.ids());
  const highest = Math.max(0, ...found);
  const orphans = [...found].filter((id) => !known.has(id));
  if ((await metastore.lastId()) === 0 && (await anyDescribed(paths, orphans))) await metastore.protect(highest);
  const protectedUpTo = await metastore.protectedUpTo();
  const spared = orphans.filter((id) => id <= protectedUpTo);
  if (spared.length > 0) {
    log.error(
      { snapshots: spared.length, database: paths.metadataDb },
      'snapshots of a lost metadata.db are left alone; restore the database or reset the root directory',
    );
  }
  for (const id of orphans) if (id > protectedUpTo) await metastore.markRemoved(id);
  for (const id of known) {
    if (!found.has(id))
      log.error({ id }, 'the directory of a snapshot is gone; containers that need it will not start');
  }
  return Math.max(await metastore.lastId(), highest);
}

async function anyDescribed(paths: RootPaths, ids: readonly number[]): Promise<boolean> {
  for (const id of ids) {
    try {
      await stat(join(paths.snapshot(id), INFO_FILE));
      return true;
    } catch (error) {
      if (!isErrno(error, 'ENOENT')) throw wrapError(error, 'looking for described snapshots', 'STORE_IO');
    }
  }
  return false;
}
