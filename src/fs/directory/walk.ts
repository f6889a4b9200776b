// Walks an overlay upper directory as containerd unpacked a layer into it, and says what it holds as members of a layer:
// parents before children, names in the order of their bytes, overlayfs's whiteouts and opaque directories as a layer
// spells them. Called by indexer.ts in its own thread: every call here blocks. Follows no link and reads no content.
import { type BigIntStats, lstatSync, readdirSync, readlinkSync } from 'node:fs';
import { majorOf, minorOf } from '../../device-number.ts';
import { DedupError, wrapError } from '../../errors.ts';
import { EntryType, type EntryTypeValue } from '../index/layer-index.ts';
import type { TarMember } from '../index/tar-reader.ts';
import { native } from '../native.ts';
import { leftAlone, NO_ATTRIBUTES, type OverlayAttributes, overlayAttributes, shown } from './attributes.ts';

/** What marks names that a layer cannot have: they would be instructions. */
const WHITEOUT_PREFIX = '.wh.';
const OPAQUE_MARKER = '.wh..wh..opq';
/** PATH_MAX without its final zero. */
const MAX_PATH_BYTES = 4095;
/** First second that an image cannot show: os.Chtimes of containerd sets no later one. */
const END_OF_TIME_SEC = 9_223_372_036n;
const SECOND_NS = 1_000_000_000n;
/** Mode of the root of a snapshot as it is made, and of every merged image. */
const ROOT_MODE = 0o755;

/** One thing in the directory, as a member of the layer. */
export interface FoundMember {
  readonly member: TarMember;
  /** Of a file with content: where it lies and what it was when it was found. */
  readonly file: { readonly path: Buffer; readonly stats: BigIntStats } | undefined;
}

interface FoundDirectory {
  readonly opaque: boolean;
  /** It changes when a name comes or goes. */
  readonly mtimeNs: bigint;
}

interface Inode {
  readonly name: string;
  readonly attributes: OverlayAttributes;
}

export class DirectoryWalk {
  /** The directory's absolute path as latin1, like all names here. */
  readonly #directory: string;
  /** Device of the directory's file system. */
  #device = 0n;
  /** First name of each inode that has several. */
  readonly #links = new Map<bigint, Inode>();

  constructor(directory: string) {
    this.#directory = Buffer.from(directory).toString('latin1');
  }

  /**
   * Everything below the root, in order. Errors: NOT_FOUND when the directory is gone; LAYER_NOT_LAZY naming what a
   * layer or an image cannot express; FAILED_PRECONDITION when it changes meanwhile; STORE_IO.
   */
  *members(): Generator<FoundMember> {
    /** Directories being read, with the time of each when it was found, and the names that are left, the next one last. */
    const open = [{ path: '', mtimeNs: this.#checkRoot(), names: this.#list('') }];
    for (let directory = open.at(-1); directory !== undefined; directory = open.at(-1)) {
      const name = directory.names.pop();
      if (name === undefined) {
        if (this.#stat(directory.path).mtimeNs !== directory.mtimeNs) throw changed(directory.path);
        open.pop();
        continue;
      }
      const path = directory.path === '' ? name : `${directory.path}/${name}`;
      if (name.startsWith(WHITEOUT_PREFIX)) throw leftAlone(path, 'has a name that layers use for whiteouts');
      if (path.length > MAX_PATH_BYTES) throw leftAlone(path, 'has a path longer than 4,095 bytes');
      const { directory: inside, ...found } = this.#find(path);
      yield found;
      if (inside === undefined) continue;
      if (inside.opaque) yield { member: markerIn(path), file: undefined };
      open.push({ path, mtimeNs: inside.mtimeNs, names: this.#list(path) });
    }
  }

  /** Absolute path of `path`, as bytes for system calls. */
  #full(path: string): Buffer {
    return Buffer.from(path === '' ? this.#directory : `${this.#directory}/${path}`, 'latin1');
  }

  /** Names in a directory, the last in order first. */
  #list(path: string): string[] {
    return this.#reading(path, () => readdirSync(this.#full(path), 'latin1').sort().reverse());
  }

  #stat(path: string): BigIntStats {
    return this.#reading(path, () => lstatSync(this.#full(path), { bigint: true }));
  }

  #attributes(path: string): OverlayAttributes {
    return overlayAttributes(
      path,
      this.#reading(path, () => native().readXattrs(this.#full(path))),
    );
  }

  /** The root is no entry: images have that of a fresh snapshot, so it must be one. Returns its time. */
  #checkRoot(): bigint {
    const stats = this.#stat('');
    if (!stats.isDirectory()) {
      throw new DedupError('INVALID_ARGUMENT', `${this.#directoryShown()} is not a directory`);
    }
    this.#device = stats.dev;
    if (stats.uid !== 0n || stats.gid !== 0n || Number(stats.mode & 0o7777n) !== ROOT_MODE) {
      throw leftAlone('', `has mode ${(stats.mode & 0o7777n).toString(8)} and owner ${stats.uid}:${stats.gid}`);
    }
    // A label is the file system's of each mounted root, not the layer's.
    const other = this.#attributes('').xattrs?.find(({ name }) => name !== 'security.selinux');
    if (other !== undefined) throw leftAlone('', `has ${other.name}, which an image cannot have`);
    return stats.mtimeNs;
  }

  #find(path: string): FoundMember & { readonly directory?: FoundDirectory } {
    const stats = this.#stat(path);
    if (stats.dev !== this.#device) throw leftAlone(path, 'lies in another file system');
    const type = typeOf(path, stats);
    if (type === EntryType.charDevice && stats.rdev === 0n) {
      // A whiteout. overlayfs makes several of one inode.
      return { member: { ...NOTHING, type, name: path }, file: undefined };
    }
    const linked = type !== EntryType.directory && stats.nlink > 1n;
    const first = linked ? this.#links.get(stats.ino) : undefined;
    const attributes = first?.attributes ?? this.#attributes(path);
    if (linked && first === undefined) this.#links.set(stats.ino, { name: path, attributes });
    const device = first === undefined && (type === EntryType.charDevice || type === EntryType.blockDevice);
    const member: TarMember = {
      ...NOTHING,
      type: first === undefined ? type : EntryType.hardLink,
      name: path,
      link: first?.name ?? (type === EntryType.symlink ? this.#target(path) : ''),
      mode: Number(stats.mode & 0o7777n),
      uid: Number(stats.uid),
      gid: Number(stats.gid),
      ...timeOf(path, stats),
      size: first === undefined && type === EntryType.file ? Number(stats.size) : 0,
      devMajor: device ? majorOf(stats.rdev) : 0,
      devMinor: device ? minorOf(stats.rdev) : 0,
      // A link repeats them: merging drops file capabilities at a link without its own.
      xattrs: attributes.xattrs,
    };
    const { mtimeNs } = stats;
    if (type === EntryType.directory)
      return { member, file: undefined, directory: { opaque: attributes.opaque, mtimeNs } };
    return { member, file: member.size > 0 ? { path: this.#full(path), stats } : undefined };
  }

  #target(path: string): string {
    const target = this.#reading(path, () => readlinkSync(this.#full(path), 'latin1'));
    if (target === '' || target.length > MAX_PATH_BYTES) throw leftAlone(path, 'is a symlink that no layer can have');
    return target;
  }

  /** Runs a system call on `path` and gives its failure the code it deserves. */
  #reading<T>(path: string, call: () => T): T {
    try {
      return call();
    } catch (error) {
      throw this.failure(path, error);
    }
  }

  /** What a failed system call on `path` (below the root, latin1) means. */
  failure(path: string, cause: unknown): DedupError {
    const doing = `reading ${shown(path)} of the unpacked layer ${this.#directoryShown()}`;
    const { code, details } = cause as { code?: string; details?: { syscallError?: string } };
    switch (details?.syscallError ?? code) {
      case 'ENOENT':
        if (path === '' || this.#isGone()) return wrapError(cause, doing, 'NOT_FOUND');
        return wrapError(cause, `${doing}: it went meanwhile`, 'FAILED_PRECONDITION');
      case 'ELOOP':
      case 'ENOTDIR':
      case 'ENXIO':
        return wrapError(cause, `${doing}: something else took its place`, 'FAILED_PRECONDITION');
      case 'ENAMETOOLONG':
        return leftAlone(path, 'has a path that is too long');
      default:
        return wrapError(cause, doing, 'STORE_IO');
    }
  }

  #isGone(): boolean {
    return lstatSync(this.#full(''), { throwIfNoEntry: false }) === undefined;
  }

  #directoryShown(): string {
    return Buffer.from(this.#directory, 'latin1').toString();
  }
}

/** A member of which nothing is known. */
const NOTHING: Omit<TarMember, 'type' | 'name'> = {
  link: '',
  mode: 0,
  uid: 0,
  gid: 0,
  mtimeSec: 0,
  mtimeNsec: 0,
  size: 0,
  devMajor: 0,
  devMinor: 0,
  xattrs: NO_ATTRIBUTES.xattrs,
  fragments: undefined,
  contentOffset: 0,
  contentBytes: 0,
};

function markerIn(directory: string): TarMember {
  return { ...NOTHING, type: EntryType.file, name: `${directory}/${OPAQUE_MARKER}` };
}

/** The error for what is not as it was when it was found. `path` below the root, latin1. */
export function changed(path: string): DedupError {
  return new DedupError('FAILED_PRECONDITION', `the unpacked layer's ${shown(path)} changed while it was read`);
}

function typeOf(path: string, stats: BigIntStats): EntryTypeValue {
  if (stats.isFile()) return EntryType.file;
  if (stats.isDirectory()) return EntryType.directory;
  if (stats.isSymbolicLink()) return EntryType.symlink;
  if (stats.isCharacterDevice()) return EntryType.charDevice;
  if (stats.isBlockDevice()) return EntryType.blockDevice;
  if (stats.isFIFO()) return EntryType.fifo;
  throw leftAlone(path, stats.isSocket() ? 'is a socket' : 'is of an unknown type');
}

function timeOf(path: string, stats: BigIntStats): { mtimeSec: number; mtimeNsec: number } {
  const ns = stats.mtimeNs;
  if (ns < 0n || ns >= END_OF_TIME_SEC * SECOND_NS) throw leftAlone(path, 'has a time that an image cannot show');
  return { mtimeSec: Number(ns / SECOND_NS), mtimeNsec: Number(ns % SECOND_NS) };
}
