// What an earlier dedupd of this root that was killed in the middle of something has left in the file system: found and
// removed when the next one starts. Its loop devices: transport/erofs-mount.ts; its mounts: mount-table.ts. Only what
// carries a name that dedupd gives, in a place that belongs to dedupd alone, is touched.
import { readdir, readFile, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import type { Logger } from '../log.ts';
import { type MountLine, parseMountinfo } from '../mountinfo.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { MNT_DETACH, native } from './native.ts';

/** The mounts of this process, oldest first. Errors: those of node:fs. */
export async function mountPoints(): Promise<MountLine[]> {
  return parseMountinfo(await readFile('/proc/self/mountinfo', 'utf8'));
}

/**
 * Detaches FUSE sessions that were mounted in the run directory by a dedupd that ended before it hid them: they are dead,
 * and stat(2) of the directory fails. Call before a session is mounted there. Errors: KERNEL.
 */
export async function detachDeadSessions(run: RunPaths, log: Logger): Promise<void> {
  for (const { mountPoint: path, fstype } of await mountPoints()) {
    // "fuse.dedup" of our own sessions (native/fuse/session.cc), "fuse" of fuse-native's.
    const session = path === run.fuseMount && /^fuse(\.|$)/.test(fstype);
    // One that was killed while it ended a connection (transport/connections.ts): alive, and of no use.
    const control = path === run.fuseControl && fstype === 'fusectl';
    if (!session && !control) continue;
    await native().umount(path, MNT_DETACH);
    if (control) continue;
    log.info({ path }, 'detached the FUSE session of a dedupd that ended while it started');
  }
}

/** Names of files that are being written: image/atomic-file.ts, index/discovery.ts. */
const HALF_WRITTEN = /\.(tmp-\d+|\d+\.\d+\.tmp)$/;

/** Deletes files that a dedupd was writing when it ended. Call before this one writes any. Errors: those of node:fs. */
export async function removeHalfWritten(paths: RootPaths, run: RunPaths, log: Logger): Promise<void> {
  const record = basename(run.standaloneMounts);
  const places: [directory: string, mine: (name: string) => boolean][] = [
    [paths.images, (name) => /^\d+\.erofs\./.test(name)],
    [paths.layers, (name) => /^[0-9a-f]+\.(index|restart)\./.test(name)],
    [dirname(run.standaloneMounts), (name) => name.startsWith(`${record}.`)],
  ];
  for (const [directory, mine] of places) {
    for (const name of await readdir(directory).catch(ignoreMissing)) {
      if (!mine(name) || !HALF_WRITTEN.test(name)) continue;
      await rm(join(directory, name), { force: true });
      log.info({ file: join(directory, name) }, 'removed a file that an earlier dedupd was writing when it ended');
    }
  }
}

function ignoreMissing(error: NodeJS.ErrnoException): string[] {
  if (error.code === 'ENOENT') return [];
  throw error;
}
