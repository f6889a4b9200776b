// snapshots/<id>/info.json: what metadata.db knows about one snapshot, beside its content, so that a lost database can
// be rebuilt. Written by the snapshotter at Prepare, and after Commit and Update have been answered.
import { rmSync } from 'node:fs';
import { open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { isErrno } from './errno.ts';
import type { NewSnapshot, SnapshotRecord } from './snapshot-record.ts';

const INFO_FILE = 'info.json';
const HALF_WRITTEN_FILE = `${INFO_FILE}.new`;

const layerKey = z.object({ digest: z.string(), index: z.string(), scope: z.string() });
const id = z.int().min(1);
const lower = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('normal'), id }),
  z.object({
    kind: z.literal('lazy'),
    layers: z.array(layerKey),
    bottom: z.boolean(),
    mountId: z.int(),
    path: z.string(),
  }),
]);
const info = z.object({
  version: z.literal(1),
  id,
  name: z.string().min(1),
  kind: z.enum(['active', 'view', 'committed']),
  parent: z.string(),
  labels: z.record(z.string(), z.string()),
  lowers: z.array(lower),
  layer: layerKey.optional(),
  origin: z.object({ unpacked: z.boolean(), boot: z.string() }).optional(),
  conversion: z.literal('done').optional(),
  usage: z.object({ bytes: z.number(), inodes: z.number() }).optional(),
});

/** Replaces the file in one step. Errors: those of node:fs. */
export async function writeInfoFile(paths: RootPaths, snapshot: NewSnapshot | SnapshotRecord): Promise<void> {
  const { id, name, kind, parent, labels, lowers, layer, origin } = snapshot;
  // Of an ordinary one it can be found out again.
  const converted = snapshot.conversion === 'done' ? { conversion: 'done', usage: snapshot.usage } : {};
  const file = join(paths.snapshot(id), INFO_FILE);
  const half = join(paths.snapshot(id), HALF_WRITTEN_FILE);
  const text = JSON.stringify({ version: 1, id, name, kind, parent, labels, lowers, layer, origin, ...converted });
  await writeFile(half, `${text}\n`);
  await rename(half, file);
}

/** Makes sure that the file outlives a power cut. Errors: those of node:fs. */
export async function syncInfoFile(paths: RootPaths, number: number): Promise<void> {
  for (const path of [join(paths.snapshot(number), INFO_FILE), paths.snapshot(number)]) {
    const handle = await open(path, 'r');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  }
}

/** Removes what a service that ended was writing. Blocks; called before anything is served. Errors: those of node:fs. */
export function removeHalfWritten(paths: RootPaths, number: number): void {
  rmSync(join(paths.snapshot(number), HALF_WRITTEN_FILE), { force: true });
}

/** Errors: those of node:fs, but for a file that is not there. */
export async function removeInfoFile(paths: RootPaths, number: number): Promise<void> {
  await rm(join(paths.snapshot(number), INFO_FILE), { force: true });
}

/** What the file of snapshot `number` says; undefined when there is none. Errors: STORE_CORRUPT, STORE_IO. */
export async function readInfoFile(paths: RootPaths, number: number): Promise<NewSnapshot | undefined> {
  const file = join(paths.snapshot(number), INFO_FILE);
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    if (isErrno(error, 'ENOENT')) return undefined;
    throw wrapError(error, `reading ${file}`, 'STORE_IO');
  }
  try {
    const found = info.parse(JSON.parse(text));
    if (found.id !== number) throw new Error(`it describes snapshot ${found.id}`);
    return found;
  } catch (error) {
    throw wrapError(error, `${file} does not describe a snapshot`, 'STORE_CORRUPT');
  }
}
