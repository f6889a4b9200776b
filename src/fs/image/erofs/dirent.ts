// EROFS directory blocks: entries and names, sorted as bytes. Used by writer and reader. Layout: fs/erofs/erofs_fs.h.
import { BLOCK_BYTES } from '../../../units.ts';
import { EntryType } from '../../index/layer-index.ts';
import type { InodeKind } from '../tree.ts';
import { WHITEOUT } from '../tree.ts';

export const DIRENT_BYTES = 12;

/** EROFS_FT_*, by kind. */
export function direntType(kind: InodeKind): number {
  switch (kind) {
    case EntryType.file:
      return 1;
    case EntryType.directory:
      return 2;
    case EntryType.charDevice:
    case WHITEOUT:
      return 3;
    case EntryType.blockDevice:
      return 4;
    case EntryType.fifo:
      return 5;
    case EntryType.symlink:
      return 7;
  }
}

/** The names of a directory with "." and "..", in the order of their bytes (latin1 strings sort so). */
export function sortedNames(children: Iterable<string>): string[] {
  return ['.', '..', ...children].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
}

/** Size of a directory: whole blocks, then what is used of the last one. Names never span blocks. */
export function directoryBytes(names: readonly string[]): number {
  let blocks = 0;
  let used = 0;
  for (const name of names) {
    const need = DIRENT_BYTES + name.length;
    if (used + need > BLOCK_BYTES) {
      blocks++;
      used = 0;
    }
    used += need;
  }
  return blocks * BLOCK_BYTES + used;
}

/** How many of `names`, from `first`, go into one block. */
export function namesInBlock(names: readonly string[], first: number): number {
  let used = 0;
  let i = first;
  for (; i < names.length; i++) {
    used += DIRENT_BYTES + names[i]!.length;
    if (used > BLOCK_BYTES) break;
  }
  return i - first;
}

/**
 * Writes the block that holds `names[first … first + count)` at `at`. A name's end is the start of the next one; the last
 * one ends at the block's end or at the first zero byte.
 */
export function writeDirectoryBlock(
  bytes: Uint8Array,
  view: DataView,
  at: number,
  names: readonly string[],
  first: number,
  count: number,
  entryOf: (name: string) => { readonly nid: number; readonly type: number },
): void {
  let nameAt = count * DIRENT_BYTES;
  for (let i = 0; i < count; i++) {
    const name = names[first + i]!;
    const entry = entryOf(name);
    const direntAt = at + i * DIRENT_BYTES;
    view.setUint32(direntAt, entry.nid, true);
    view.setUint16(direntAt + 8, nameAt, true);
    bytes[direntAt + 10] = entry.type;
    for (let c = 0; c < name.length; c++) bytes[at + nameAt + c] = name.charCodeAt(c);
    nameAt += name.length;
  }
}
