// Makes the rows of a lost metadata.db again from the files beside the snapshots. Called by restore() before anything is
// served.
import { existsSync } from 'node:fs';
import type { Logger } from 'pino';
import type { RootPaths } from '../paths.ts';
import { readInfoFile } from './info-file.ts';
import type { Metastore } from './metastore-client.ts';
import type { NewSnapshot } from './snapshot-record.ts';

/** A converted snapshot, with what has become of its directory. It is whole as long as it has its name. */
function withDirectory(paths: RootPaths, snapshot: NewSnapshot | undefined): NewSnapshot | undefined {
  if (snapshot?.conversion !== 'done') return snapshot;
  if (existsSync(paths.snapshotFs(snapshot.id))) return { ...snapshot, directory: 'unproven' };
  return existsSync(paths.snapshotGoing(snapshot.id)) ? { ...snapshot, directory: 'goes' } : snapshot;
}

export interface Rebuilt {
  readonly restored: number;
  /** Numbers of snapshots that are described, but whose row could not be made: their directories must stay. */
  readonly left: readonly number[];
}

/**
 * Inserts a row for every described snapshot of `ids`, parents first. Snapshots that were removed but not cleaned come
 * back, too: containerd removes what it does not know. Errors: STORE_IO.
 */
export async function rebuild(
  paths: RootPaths,
  metastore: Metastore,
  ids: readonly number[],
  log: Logger,
): Promise<Rebuilt> {
  const waiting = new Map<string, NewSnapshot[]>();
  const left = new Set<number>();
  // The newest first: of two for one layer, the older one was removed and only waits for its Cleanup.
  for (const id of ids.toSorted((a, b) => b - a)) {
    try {
      const snapshot = withDirectory(paths, await readInfoFile(paths, id));
      if (snapshot === undefined) continue; // Half made: it was never answered.
      waiting.set(snapshot.parent, [...(waiting.get(snapshot.parent) ?? []), snapshot]);
      left.add(id);
    } catch (error) {
      log.error({ err: error, id }, 'a snapshot cannot be restored');
      left.add(id);
    }
  }
  let restored = 0;
  const names = [''];
  // An earlier start may have made the first rows.
  for (const parent of waiting.keys()) if ((await metastore.find(parent))?.kind === 'committed') names.push(parent);
  while (names.length > 0) {
    const parent = names.pop()!;
    for (const snapshot of waiting.get(parent) ?? []) {
      try {
        await metastore.insert(snapshot);
      } catch (error) {
        log.error({ err: error, id: snapshot.id, name: snapshot.name }, 'a snapshot cannot be restored');
        continue;
      }
      restored++;
      left.delete(snapshot.id);
      if (snapshot.kind === 'committed') names.push(snapshot.name);
    }
    waiting.delete(parent);
  }
  for (const [parent, snapshots] of waiting) {
    for (const { id, name } of snapshots) log.error({ id, name, parent }, 'a snapshot cannot be restored: no parent');
  }
  return { restored, left: [...left] };
}
