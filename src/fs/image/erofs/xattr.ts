// EROFS inline extended attributes: the area between an inode and its data. Used by the writer only. Layout:
// fs/erofs/erofs_fs.h (struct erofs_xattr_ibody_header, struct erofs_xattr_entry).
import { DedupError } from '../../../errors.ts';
import type { XattrSet } from '../tree.ts';

/** struct erofs_xattr_ibody_header without shared entries. */
export const XATTR_HEADER_BYTES = 12;
const ENTRY_BYTES = 4;
const MAX_VALUE_BYTES = 65_535;
/** i_xattr_icount has 16 bits. */
const MAX_AREA_BYTES = XATTR_HEADER_BYTES + (65_535 - 1) * 4;

/** Name prefixes that are numbers on disk (EROFS_XATTR_INDEX_*); the rest of the name is stored. */
const PREFIXES: readonly (readonly [string, number])[] = [
  ['user.', 1],
  ['system.posix_acl_access', 2],
  ['system.posix_acl_default', 3],
  ['trusted.', 4],
  ['security.', 6],
];

function split(name: string): { index: number; suffix: string } {
  for (const [prefix, index] of PREFIXES) {
    if (name.startsWith(prefix)) return { index, suffix: name.slice(prefix.length) };
  }
  throw new DedupError('IMAGE_INVALID', `EROFS has no prefix for the extended attribute ${JSON.stringify(name)}`);
}

/** Length of the xattr area of an inode, 0 without attributes. Errors: IMAGE_INVALID for what does not fit. */
export function xattrAreaBytes(set: XattrSet | undefined): number {
  if (set === undefined || set.length === 0) return 0;
  let bytes = XATTR_HEADER_BYTES;
  for (const { name, value } of set) {
    const { suffix } = split(name);
    if (suffix.length > 255 || value.length > MAX_VALUE_BYTES) {
      throw new DedupError('IMAGE_INVALID', `the extended attribute ${JSON.stringify(name)} is too large for EROFS`);
    }
    bytes += roundUp4(ENTRY_BYTES + suffix.length + value.length);
  }
  if (bytes > MAX_AREA_BYTES) {
    throw new DedupError(
      'IMAGE_INVALID',
      `extended attributes of one file take ${bytes} bytes, EROFS holds ${MAX_AREA_BYTES}`,
    );
  }
  return bytes;
}

/** Writes the area of a non-empty set at `at`; its bytes must be zero before. Sorted by name, so that order is fixed. */
export function writeXattrArea(bytes: Uint8Array, view: DataView, at: number, set: XattrSet): void {
  let entryAt = at + XATTR_HEADER_BYTES;
  const sorted = [...set].sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
  for (const { name, value } of sorted) {
    const { index, suffix } = split(name);
    bytes[entryAt] = suffix.length;
    bytes[entryAt + 1] = index;
    view.setUint16(entryAt + 2, value.length, true);
    for (let i = 0; i < suffix.length; i++) bytes[entryAt + ENTRY_BYTES + i] = suffix.charCodeAt(i);
    bytes.set(value, entryAt + ENTRY_BYTES + suffix.length);
    entryAt += roundUp4(ENTRY_BYTES + suffix.length + value.length);
  }
}

function roundUp4(value: number): number {
  return (value + 3) & ~3;
}
