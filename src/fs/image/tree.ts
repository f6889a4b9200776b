// The merged tree of an image segment: one row per inode in typed-array columns, names in one map per directory.
// merge.ts fills it, erofs/writer.ts reads it. It knows neither tar nor EROFS.
import type { EntryTypeValue } from '../index/layer-index.ts';
import { EntryType } from '../index/layer-index.ts';

/** A set of extended attributes: full names as latin1, raw values. Never changed once shared. */
export type XattrSet = readonly { readonly name: string; readonly value: Uint8Array }[];

/** Value of `kind` for a name that hides what lower layers have: only in trees that are not the bottom segment. */
export const WHITEOUT = 255;
export type InodeKind = Exclude<EntryTypeValue, 1> | typeof WHITEOUT;

/** Ownership, permission bits and attributes that a directory made without a tar entry takes from a lower one. */
export interface DirectoryAttributes {
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeSec: number;
  readonly mtimeNsec: number;
  readonly xattrs: XattrSet | undefined;
}

/** Inodes as columns; a name is an edge in `children` of its directory, so hard links are two edges to one row. */
export class ImageTree {
  count = 0;
  /** Row of the root directory; rows of removed inodes stay in the table, unreachable. */
  root = 0;
  kind: Uint8Array;
  mode: Uint16Array;
  uid: Uint32Array;
  gid: Uint32Array;
  mtimeSec: Float64Array;
  mtimeNsec: Uint32Array;
  size: Float64Array;
  devMajor: Uint32Array;
  devMinor: Uint32Array;
  /** Which layer (number in the list that was merged) holds the content of a file, and its chunks there. */
  layer: Uint16Array;
  firstChunk: Uint32Array;
  chunkCount: Uint32Array;
  /** Directories: 1 when no tar entry described it (its mtime is then ours to choose). */
  implicit: Uint8Array;
  /** Directories: 1 when nothing of lower layers may shine through. */
  opaque: Uint8Array;
  readonly link: (string | undefined)[] = [];
  readonly xattrs: (XattrSet | undefined)[] = [];
  readonly children: (Map<string, number> | undefined)[] = [];

  constructor(capacity: number) {
    const rows = Math.max(16, capacity);
    this.kind = new Uint8Array(rows);
    this.mode = new Uint16Array(rows);
    this.uid = new Uint32Array(rows);
    this.gid = new Uint32Array(rows);
    this.mtimeSec = new Float64Array(rows);
    this.mtimeNsec = new Uint32Array(rows);
    this.size = new Float64Array(rows);
    this.devMajor = new Uint32Array(rows);
    this.devMinor = new Uint32Array(rows);
    this.layer = new Uint16Array(rows);
    this.firstChunk = new Uint32Array(rows);
    this.chunkCount = new Uint32Array(rows);
    this.implicit = new Uint8Array(rows);
    this.opaque = new Uint8Array(rows);
  }

  /** A new row of `kind`, all else zero. */
  add(kind: InodeKind): number {
    if (this.count === this.kind.length) this.grow();
    const inode = this.count++;
    this.kind[inode] = kind;
    this.link.push(undefined);
    this.xattrs.push(undefined);
    this.children.push(kind === EntryType.directory ? new Map() : undefined);
    return inode;
  }

  /** A directory that no tar entry describes: 0755, root, time 0. */
  addImplicitDirectory(): number {
    const inode = this.add(EntryType.directory);
    this.mode[inode] = 0o755;
    this.implicit[inode] = 1;
    return inode;
  }

  isDirectory(inode: number): boolean {
    return this.kind[inode] === EntryType.directory;
  }

  isWhiteout(inode: number): boolean {
    return this.kind[inode] === WHITEOUT;
  }

  /** Names of a directory. Only for rows of directories. */
  childrenOf(directory: number): Map<string, number> {
    const children = this.children[directory];
    if (children === undefined) throw new TypeError(`inode ${directory} is not a directory`);
    return children;
  }

  copyDirectoryAttributes(to: number, from: number): void {
    this.setDirectoryAttributes(to, this.directoryAttributes(from));
  }

  directoryAttributes(inode: number): DirectoryAttributes {
    return {
      mode: this.mode[inode]!,
      uid: this.uid[inode]!,
      gid: this.gid[inode]!,
      mtimeSec: this.mtimeSec[inode]!,
      mtimeNsec: this.mtimeNsec[inode]!,
      xattrs: this.xattrs[inode],
    };
  }

  setDirectoryAttributes(to: number, attributes: DirectoryAttributes): void {
    this.mode[to] = attributes.mode;
    this.uid[to] = attributes.uid;
    this.gid[to] = attributes.gid;
    this.mtimeSec[to] = attributes.mtimeSec;
    this.mtimeNsec[to] = attributes.mtimeNsec;
    this.xattrs[to] = attributes.xattrs;
  }

  private grow(): void {
    const rows = this.kind.length * 2;
    const bytes = (old: Uint8Array): Uint8Array => {
      const fresh = new Uint8Array(rows);
      fresh.set(old);
      return fresh;
    };
    const halves = (old: Uint16Array): Uint16Array => {
      const fresh = new Uint16Array(rows);
      fresh.set(old);
      return fresh;
    };
    const words = (old: Uint32Array): Uint32Array => {
      const fresh = new Uint32Array(rows);
      fresh.set(old);
      return fresh;
    };
    const doubles = (old: Float64Array): Float64Array => {
      const fresh = new Float64Array(rows);
      fresh.set(old);
      return fresh;
    };
    this.kind = bytes(this.kind);
    this.mode = halves(this.mode);
    this.uid = words(this.uid);
    this.gid = words(this.gid);
    this.mtimeSec = doubles(this.mtimeSec);
    this.mtimeNsec = words(this.mtimeNsec);
    this.size = doubles(this.size);
    this.devMajor = words(this.devMajor);
    this.devMinor = words(this.devMinor);
    this.layer = halves(this.layer);
    this.firstChunk = words(this.firstChunk);
    this.chunkCount = words(this.chunkCount);
    this.implicit = bytes(this.implicit);
    this.opaque = bytes(this.opaque);
  }
}
