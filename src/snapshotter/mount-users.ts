// Which directories of snapshots are named by a mount, in any mount namespace of the machine: as a layer of an overlay, or
// as what a bind mount shows. Read from the mount tables of all processes; what cannot be judged counts as named. Called by
// leftover-directories.ts; touches no path outside /proc and the snapshots directory.
import { readdir, readFile, readlink, realpath, stat } from 'node:fs/promises';
import { basename, dirname, isAbsolute, join } from 'node:path';
import { DedupError, wrapError } from '../errors.ts';
import { type MountLine, parseMountinfo } from '../mountinfo.ts';
import type { RootPaths } from '../paths.ts';
import { isErrno } from './errno.ts';

/** Errors of a process that has ended, or is just ending, while it is looked at. */
const GONE = ['ENOENT', 'ESRCH', 'EINVAL'];

/** What two processes must have in common for their mount tables to be the same; undefined when it cannot be seen. */
async function viewOf(dir: string): Promise<string | undefined> {
  try {
    // A table shows only what lies below the process's root directory.
    return `${await readlink(join(dir, 'ns/mnt'))} ${await readlink(join(dir, 'root'))}`;
  } catch (error) {
    // Asked for are the rights of a debugger (ptrace(2)), which root may lack over a process; the table is open to all.
    if (isErrno(error, 'EACCES') || isErrno(error, 'EPERM')) return undefined;
    throw error;
  }
}

/** The different mount tables of all processes, each with one of its processes. Errors: KERNEL when one cannot be read. */
async function mountTables(): Promise<{ pid: number; lines: MountLine[] }[]> {
  const tables = new Map<string, { pid: number; lines: MountLine[] }>();
  for (const name of await readdir('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    const dir = join('/proc', name);
    try {
      const view = (await viewOf(dir)) ?? dir;
      if (tables.has(view)) continue;
      tables.set(view, { pid: Number(name), lines: parseMountinfo(await readFile(join(dir, 'mountinfo'), 'utf8')) });
    } catch (error) {
      if (!GONE.some((errno) => isErrno(error, errno))) throw wrapError(error, `reading ${dir}/mountinfo`, 'KERNEL');
    }
  }
  if (tables.size === 0) throw new DedupError('KERNEL', 'no mount table can be read: is /proc mounted?');
  return [...tables.values()];
}

/** Names that the snapshots directory may be called by in a mount table. */
async function namesOf(directory: string): Promise<Set<string>> {
  const real = await realpath(directory);
  // As the file system that it lies on calls it: what the root field of a bind mount says.
  const around = parseMountinfo(await readFile('/proc/self/mountinfo', 'utf8'))
    .filter(({ mountPoint }) => mountPoint === '/' || real === mountPoint || real.startsWith(`${mountPoint}/`))
    .reduce<MountLine | undefined>(
      // Of two on one place the later one lies on top.
      (best, line) => (best !== undefined && best.mountPoint.length > line.mountPoint.length ? best : line),
      undefined,
    );
  const inside = around === undefined ? real : join(around.root, real.slice(around.mountPoint.length));
  return new Set([directory, real, inside]);
}

/** Tells whether a directory that snapshots are in, as a mount table calls it, may be ours. Asked once a name. */
class Judge {
  readonly #paths: RootPaths;
  readonly #names: ReadonlySet<string>;
  readonly #known = new Map<string, boolean>();

  constructor(paths: RootPaths, names: ReadonlySet<string>) {
    this.#paths = paths;
    this.#names = names;
  }

  async mayBeOurs(directory: string): Promise<boolean> {
    let verdict = this.#known.get(directory);
    if (verdict === undefined)
      this.#known.set(directory, (verdict = this.#names.has(directory) || (await this.#unclear(directory))));
    return verdict;
  }

  /** False only for a directory that is there, named as other snapshotters name theirs, and is not ours. */
  async #unclear(directory: string): Promise<boolean> {
    const { root, snapshots } = this.#paths;
    if (!isAbsolute(directory) || basename(directory) !== basename(snapshots)) return true;
    if (basename(dirname(directory)) === basename(root)) return true;
    const [theirs, ours] = await Promise.all([stat(directory).catch(() => undefined), stat(snapshots)]);
    return theirs === undefined || (theirs.dev === ours.dev && theirs.ino === ours.ino);
  }
}

/**
 * Numbers of snapshots whose directory a mount names, with where it is. Another snapshotter's directory `snapshots/N/fs` is
 * told from ours; where that cannot be told it counts as ours. Errors: KERNEL, STORE_IO.
 */
export async function mountedDirectories(paths: RootPaths): Promise<Map<number, string>> {
  const names = await namesOf(paths.snapshots).catch((error: unknown) => {
    throw wrapError(error, `looking for ${paths.snapshots} among the mounts`, 'STORE_IO');
  });
  const judge = new Judge(paths, names);
  const found = new Map<number, string>();
  for (const { pid, lines } of await mountTables()) {
    for (const { root, mountPoint, fstype, options } of lines) {
      // Every piece of an overlay's options that is, or ends in, a path: cut where one might end, so that an escaped
      // separator in a name makes a piece that counts as ours.
      const named = fstype === 'overlay' ? options.split(/[,:=]/) : [];
      for (const piece of [root, ...named]) {
        for (const { 1: start = '', 2: id, index } of piece.matchAll(/(^|\/)(\d+)\/fs(?=\/|$)/g)) {
          const directory = index === 0 ? start : piece.slice(0, index);
          if (await judge.mayBeOurs(directory)) found.set(Number(id), `${mountPoint} (seen by process ${pid})`);
        }
      }
    }
  }
  return found;
}
