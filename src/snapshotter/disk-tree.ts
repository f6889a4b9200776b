// Walks directory trees of snapshots whose names need not be UTF-8: how much they take, and deleting them. Called by
// the snapshotter outside containerd's locks; never follows a link and never leaves the file system it started on.
import { lstat, readdir, rmdir, unlink } from 'node:fs/promises';
import { isErrno } from './errno.ts';

const SLASH = Buffer.from('/');

function child(directory: Buffer, name: Buffer): Buffer {
  return Buffer.concat([directory, SLASH, name]);
}

/**
 * Bytes on disk and distinct inodes of a tree, as containerd's fs.DiskUsage counts them: 512-byte blocks, a hard-linked
 * file once, the root included. What vanishes meanwhile is not counted.
 */
export async function diskUsage(root: string): Promise<{ bytes: number; inodes: number }> {
  const seen = new Set<string>();
  let bytes = 0;
  const pending: Buffer[] = [Buffer.from(root)];
  for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
    const here = path;
    const stat = await lstat(here).catch(ignoreMissing);
    if (stat === undefined) continue;
    const identity = `${stat.dev}:${stat.ino}`;
    if (seen.has(identity)) continue;
    seen.add(identity);
    bytes += stat.blocks * 512;
    if (!stat.isDirectory()) continue;
    const names = await readdir(here, { encoding: 'buffer' }).catch(ignoreMissing);
    for (const name of names ?? []) pending.push(child(here, name));
  }
  return { bytes, inodes: seen.size };
}

/** Deletes a tree, its root included; nothing to do when it is gone. Errors: those of unlink(2) and rmdir(2). */
export async function deleteTree(root: string): Promise<void> {
  await deleteDirectory(Buffer.from(root), (await lstat(root).catch(ignoreMissing))?.dev);
}

async function deleteDirectory(directory: Buffer, device: number | undefined): Promise<void> {
  const entries = await readdir(directory, { encoding: 'buffer', withFileTypes: true }).catch(ignoreMissing);
  if (entries === undefined) return;
  for (const entry of entries) {
    const path = child(directory, entry.name);
    if (!entry.isDirectory()) {
      await unlink(path).catch(ignoreMissing);
      continue;
    }
    // Something mounted below a snapshot is not ours to empty; rmdir of its parent then fails and is reported.
    if ((await lstat(path).catch(ignoreMissing))?.dev === device) await deleteDirectory(path, device);
  }
  await rmdir(directory).catch(ignoreMissing);
}

function ignoreMissing(error: unknown): undefined {
  if (isErrno(error, 'ENOENT')) return undefined;
  throw error;
}
