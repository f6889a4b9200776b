// Reads a mounted or unpacked tree into comparable rows — everything a tar layer can say about a file — and compares two
// of them. Used by tests of images and of whole containers; follows no symlinks and trusts no name to be text.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, lstatSync, openSync, readdirSync, readlinkSync, readSync } from 'node:fs';
import { parentPort, Worker, workerData } from 'node:worker_threads';

export interface TreeRow {
  /** Path below the root as latin1, one character per byte; "" is the root. */
  readonly path: string;
  readonly type: 'file' | 'directory' | 'symlink' | 'char' | 'block' | 'fifo' | 'socket';
  /** Permission bits in octal. */
  readonly mode: string;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeNs: bigint;
  /** Files and symlinks; 0 otherwise. */
  readonly size: number;
  /** Symlink target as latin1. */
  readonly target: string;
  /** Device number of a device. */
  readonly rdev: bigint;
  /** "name=hex" in order. */
  readonly xattrs: readonly string[];
  /** All paths of the same inode inside the tree, in order, for what has several links. */
  readonly links: readonly string[];
  /** SHA-256 of a file's content. */
  readonly content: string;
}

export interface WalkOptions {
  /** False: files are not read. Default true. */
  readonly content?: boolean;
}

export interface CompareOptions {
  /** Paths whose mtime is not compared: directories that no layer described. */
  readonly ignoreMtimeOf?: readonly string[] | ((path: string) => boolean);
}

const CHUNK = Buffer.allocUnsafe(1024 * 1024);

function hashFile(path: Buffer): string {
  const fd = openSync(path, 'r');
  try {
    const hash = createHash('sha256');
    for (let n = readSync(fd, CHUNK); n > 0; n = readSync(fd, CHUNK)) hash.update(CHUNK.subarray(0, n));
    return hash.digest('hex');
  } finally {
    closeSync(fd);
  }
}

/** Undoes getfattr's quoting: a backslash and three octal digits stand for one byte. */
function unquote(name: string): string {
  return name.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
}

/** All extended attributes below `root`, by path, in one run of getfattr (symlinks not followed). */
function readXattrs(root: string): Map<string, string[]> {
  const args = ['-R', '-P', '-d', '-m', '-', '-e', 'hex', '--absolute-names', '-h', root];
  const { stdout: output, stderr } = spawnSync('getfattr', args, { encoding: 'latin1', maxBuffer: 1024 * 1024 * 1024 });
  const complaints = stderr.split('\n').filter((line) => line !== '' && !line.endsWith(': No such file or directory'));
  assert.deepEqual(complaints, []);
  const prefix = Buffer.from(root).toString('latin1');
  const all = new Map<string, string[]>();
  for (const block of output.split('\n\n')) {
    const [head, ...lines] = block.split('\n');
    if (head === undefined || !head.startsWith('# file: ')) continue;
    const path = unquote(head.slice('# file: '.length));
    assert.ok(path.startsWith(prefix), `getfattr answered for ${path}, outside of ${root}`);
    all.set(
      path.slice(prefix.length + 1),
      lines
        .filter((line) => line !== '')
        .map(unquote)
        .sort(),
    );
  }
  return all;
}

function typeOf(mode: bigint): TreeRow['type'] {
  switch (mode & 0o170000n) {
    case 0o100000n:
      return 'file';
    case 0o040000n:
      return 'directory';
    case 0o120000n:
      return 'symlink';
    case 0o020000n:
      return 'char';
    case 0o060000n:
      return 'block';
    case 0o010000n:
      return 'fifo';
    case 0o140000n:
      return 'socket';
    default:
      throw new Error(`unknown file type in mode ${mode.toString(8)}`);
  }
}

/** Every inode below `root`, the root included, ordered by path. */
export function walkTree(root: string, options: WalkOptions = {}): TreeRow[] {
  const xattrs = readXattrs(root);
  const rootBytes = Buffer.from(root);
  const rows: (TreeRow & { readonly links: string[] })[] = [];
  const groups = new Map<string, string[]>();
  const visit = (path: string): void => {
    const full = path === '' ? rootBytes : Buffer.concat([rootBytes, Buffer.from(`/${path}`, 'latin1')]);
    const stat = lstatSync(full, { bigint: true, throwIfNoEntry: false });
    // overlayfs lists a whiteout in a directory that only one layer has, and then says that it does not exist.
    if (stat === undefined && path !== '') return;
    assert.ok(stat !== undefined, `${root} does not exist`);
    const type = typeOf(stat.mode);
    const links: string[] = [];
    if (type !== 'directory') {
      const key = `${stat.dev}:${stat.ino}`;
      const group = groups.get(key) ?? [];
      groups.set(key, group);
      group.push(path);
    }
    rows.push({
      path,
      type,
      mode: (stat.mode & 0o7777n).toString(8),
      uid: Number(stat.uid),
      gid: Number(stat.gid),
      mtimeNs: stat.mtimeNs,
      size: type === 'file' || type === 'symlink' ? Number(stat.size) : 0,
      target: type === 'symlink' ? readlinkSync(full, 'latin1') : '',
      rdev: type === 'char' || type === 'block' ? stat.rdev : 0n,
      xattrs: xattrs.get(path) ?? [],
      links,
      content: type === 'file' && options.content !== false ? hashFile(full) : '',
    });
    if (type !== 'directory') return;
    for (const name of readdirSync(full, 'latin1').sort()) visit(path === '' ? name : `${path}/${name}`);
  };
  visit('');
  const byPath = new Map(rows.map((row) => [row.path, row]));
  for (const group of groups.values()) {
    if (group.length > 1) for (const path of group) byPath.get(path)!.links.push(...group.sort());
  }
  return rows.sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** Fails with the first differences, one per line, when the two trees are not the same in every attribute. */
export function assertSameRows(
  actual: readonly TreeRow[],
  expected: readonly TreeRow[],
  options: CompareOptions = {},
): void {
  const ignore = options.ignoreMtimeOf ?? [];
  const ignored = typeof ignore === 'function' ? ignore : (path: string): boolean => ignore.includes(path);
  const wanted = new Map(expected.map((row) => [row.path, row]));
  const differences: string[] = [];
  for (const row of actual) {
    const other = wanted.get(row.path);
    wanted.delete(row.path);
    const name = JSON.stringify(row.path);
    if (other === undefined) {
      differences.push(`${name}: not expected (${row.type})`);
      continue;
    }
    for (const key of Object.keys(row) as (keyof TreeRow)[]) {
      if (key === 'mtimeNs' && ignored(row.path)) continue;
      const [a, b] = [String(row[key]), String(other[key])];
      if (a !== b) differences.push(`${name}: ${key} is ${a}, expected ${b}`);
    }
  }
  for (const path of wanted.keys()) differences.push(`${JSON.stringify(path)}: missing`);
  const shown = differences.slice(0, 40).join('\n');
  assert.equal(differences.length, 0, `${differences.length} differences:\n${shown}`);
}

/** Walks both directories and compares them; `expected` is the yardstick. */
export function assertSameTree(actual: string, expected: string, options: WalkOptions & CompareOptions = {}): void {
  assertSameRows(walkTree(actual, options), walkTree(expected, options), options);
}

/** walkTree on a thread of its own: for a tree whose bytes come through a proxy or registry that this process runs. */
export async function walkTreeApart(root: string, options: WalkOptions = {}): Promise<TreeRow[]> {
  const worker = new Worker(new URL(import.meta.url), { workerData: { walk: root, options } });
  const [rows] = (await once(worker, 'message')) as [TreeRow[]];
  return rows;
}

if (parentPort !== null && typeof workerData?.walk === 'string') {
  parentPort.postMessage(walkTree(workerData.walk, workerData.options));
}
