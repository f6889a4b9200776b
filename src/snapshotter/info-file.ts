// snapshots/<id>/info.json: what metadata.db knows about one snapshot, beside its content, so that a lost database can
// be rebuilt. Written by the snapshotter at Prepare, and after Commit and Update have been answered.
import { rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { RootPaths } from '../paths.ts';
import type { NewSnapshot, SnapshotRecord } from './snapshot-record.ts';

export const INFO_FILE = 'info.json';

/** Replaces the file in one step. Errors: those of node:fs. */
export async function writeInfoFile(paths: RootPaths, snapshot: NewSnapshot | SnapshotRecord): Promise<void> {
  const { id, name, kind, parent, labels, lowers, layer } = snapshot;
  const file = join(paths.snapshot(id), INFO_FILE);
  await writeFile(`${file}.new`, `${JSON.stringify({ version: 1, id, name, kind, parent, labels, lowers, layer })}\n`);
  await rename(`${file}.new`, file);
}
