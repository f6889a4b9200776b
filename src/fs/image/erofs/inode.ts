// EROFS extended inodes and chunk indexes, as bytes. Used by writer and reader. Layout: fs/erofs/erofs_fs.h.
import { EntryType } from '../../index/layer-index.ts';
import type { InodeKind } from '../tree.ts';
import { WHITEOUT } from '../tree.ts';
import { NULL_BLOCK } from './superblock.ts';

/** Size and alignment of an extended inode. Aligned so, none crosses a block. */
export const INODE_BYTES = 64;
export const CHUNK_INDEX_BYTES = 8;

/** Where the content of an inode is (EROFS_INODE_*). */
export const DataLayout = { flatPlain: 0, flatInline: 2, chunkBased: 4 } as const;
export type DataLayoutValue = (typeof DataLayout)[keyof typeof DataLayout];

const EXTENDED = 1;
const CHUNK_FORMAT_INDEXES = 0x20;
const BLOCK_BITS = 12;

const S_IFIFO = 0o010000;
const S_IFCHR = 0o020000;
export const S_IFDIR = 0o040000;
const S_IFBLK = 0o060000;
export const S_IFREG = 0o100000;
export const S_IFLNK = 0o120000;

/** File type bits of st_mode. */
export function modeType(kind: InodeKind): number {
  switch (kind) {
    case EntryType.file:
      return S_IFREG;
    case EntryType.symlink:
      return S_IFLNK;
    case EntryType.charDevice:
    case WHITEOUT:
      return S_IFCHR;
    case EntryType.blockDevice:
      return S_IFBLK;
    case EntryType.directory:
      return S_IFDIR;
    case EntryType.fifo:
      return S_IFIFO;
  }
}

/** Device number as the kernel's new_encode_dev() packs it; higher bits are cut, as mknod(2) cuts them. */
export function encodeDevice(major: number, minor: number): number {
  return ((minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)) >>> 0;
}

/** The i_u field of a chunk-based inode. `chunkBytes`: a power of two, at least one block. */
export function chunkFormat(chunkBytes: number): number {
  return CHUNK_FORMAT_INDEXES | (Math.log2(chunkBytes) - BLOCK_BITS);
}

export interface InodeFields {
  readonly layout: DataLayoutValue;
  /** Length of the xattr area that follows, bytes. */
  readonly xattrBytes: number;
  /** Type and permission bits. */
  readonly mode: number;
  readonly size: number;
  /** Block address, device number or chunk format, by layout and type. */
  readonly union: number;
  readonly inodeNumber: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeSec: number;
  readonly mtimeNsec: number;
  readonly links: number;
}

/** Writes an inode at `at`; its bytes must be zero before. */
export function writeInode(view: DataView, at: number, fields: InodeFields): void {
  view.setUint16(at, EXTENDED | (fields.layout << 1), true);
  view.setUint16(at + 2, xattrCount(fields.xattrBytes), true);
  view.setUint16(at + 4, fields.mode, true);
  view.setUint32(at + 8, fields.size % 2 ** 32, true);
  view.setUint32(at + 12, Math.floor(fields.size / 2 ** 32), true);
  view.setUint32(at + 16, fields.union, true);
  view.setUint32(at + 20, fields.inodeNumber, true);
  view.setUint32(at + 24, fields.uid, true);
  view.setUint32(at + 28, fields.gid, true);
  // Seconds are 64 bit two's complement; before 1970 they are negative.
  const low = ((fields.mtimeSec % 2 ** 32) + 2 ** 32) % 2 ** 32;
  view.setUint32(at + 32, low, true);
  view.setInt32(at + 36, Math.floor(fields.mtimeSec / 2 ** 32), true);
  view.setUint32(at + 40, fields.mtimeNsec, true);
  view.setUint32(at + 44, fields.links, true);
}

/** i_xattr_icount: words of the xattr area after its 12-byte header, plus one; 0 for none. */
function xattrCount(xattrBytes: number): number {
  return xattrBytes === 0 ? 0 : (xattrBytes - 12) / 4 + 1;
}

/** Writes a chunk index: `block` on the store, or a hole when undefined. */
export function writeChunkIndex(view: DataView, at: number, block: number | undefined): void {
  view.setUint16(at + 2, block === undefined ? 0 : 1, true);
  view.setUint32(at + 4, block ?? NULL_BLOCK, true);
}
