// The feature layers as tar members, with what only a real tar and a real content can show beside: files of many chunks
// and pieces, PAX sparse files, access control lists, and whiteouts that act across every layer boundary.
import { bottomLayer, middleLayer, topLayer, toTarEntries } from './feature-layers.ts';
import type { LayerSource } from './images.ts';
import type { TarEntry } from './tar.ts';

const MiB = 1024 * 1024;

/** Bytes that do not compress and are the same in every run. xorshift32 (Marsaglia 2003). */
export function noise(seed: number, bytes: number): Buffer {
  const words = new Uint32Array(Math.ceil(bytes / 4));
  let x = seed * 2_654_435_761 || 1;
  for (let i = 0; i < words.length; i++) {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    words[i] = x;
  }
  return Buffer.from(words.buffer, 0, bytes);
}

/** struct posix_acl_xattr_header and its entries (linux/posix_acl_xattr.h): version 2, then tag, permissions, id. */
function acl(entries: readonly (readonly [tag: number, permissions: number, id?: number])[]): Buffer {
  const value = Buffer.alloc(4 + entries.length * 8);
  value.writeUInt32LE(2, 0);
  entries.forEach(([tag, permissions, id], i) => {
    value.writeUInt16LE(tag, 4 + i * 8);
    value.writeUInt16LE(permissions, 6 + i * 8);
    value.writeUInt32LE(id ?? 0xffffffff, 8 + i * 8);
  });
  return value;
}

const USER_OBJ = 1;
const USER = 2;
const GROUP_OBJ = 4;
const MASK = 0x10;
const OTHER = 0x20;
const ACCESS_ACL = acl([
  [USER_OBJ, 6],
  [USER, 4, 70_000],
  [GROUP_OBJ, 4],
  [MASK, 6],
  [OTHER, 4],
]);
const DEFAULT_ACL = acl([
  [USER_OBJ, 7],
  [USER, 7, 70_000],
  [GROUP_OBJ, 5],
  [MASK, 7],
  [OTHER, 5],
]);

/** A sparse file in PAX format 1.0: data of 512 bytes at each offset, holes between (GNU tar manual, "PAX 1"). */
function sparseEntry(name: string, size: number, offsets: readonly number[]): TarEntry {
  const map = [offsets.length, ...offsets.flatMap((offset) => [offset, 512])].map((n) => `${n}\n`).join('');
  const head = Buffer.alloc(Math.ceil(map.length / 512) * 512);
  head.write(map);
  return {
    name: `GNUSparseFile.0/${name.replaceAll('/', '-')}`,
    content: Buffer.concat([head, ...offsets.map((offset) => noise(offset + 7, 512))]),
    pax: {
      'GNU.sparse.major': '1',
      'GNU.sparse.minor': '0',
      'GNU.sparse.name': name,
      'GNU.sparse.realsize': String(size),
    },
  };
}

const dir = (name: string, more: Partial<TarEntry> = {}): TarEntry => ({ name: `${name}/`, type: 'dir', ...more });

/** Sizes around every boundary of blocks, pieces (1 MiB), spans and chunks (4 MiB). */
export const BOUNDARY_SIZES = [
  1,
  4095,
  4096,
  4097,
  MiB - 1,
  MiB,
  MiB + 1,
  2 * MiB + 4096,
  4 * MiB - 1,
  4 * MiB,
  4 * MiB + 1,
  9 * MiB + 123,
] as const;

const BOTTOM: readonly TarEntry[] = [
  dir('big'),
  ...BOUNDARY_SIZES.map((bytes): TarEntry => ({ name: `big/${bytes}`, content: noise(bytes, bytes) })),
  { name: 'big/zeros', content: Buffer.alloc(5 * MiB + 17) },
  { name: 'big/half-zeros', content: Buffer.concat([noise(3, MiB + 5), Buffer.alloc(3 * MiB), noise(4, 10)]) },
  sparseEntry('big/sparse', 6 * MiB, [0, 4096 * 3, 5 * MiB]),
  sparseEntry('big/sparse-end', 2 * MiB + 1, [512]),
  dir('acl'),
  { name: 'acl/file', mode: 0o664, content: 'guarded', xattrs: { 'system.posix_acl_access': ACCESS_ACL } },
  dir('acl/default', { xattrs: { 'system.posix_acl_default': DEFAULT_ACL } }),
  dir('same'),
  { name: 'same/one', content: noise(77, 2 * MiB + 99) },
  { name: 'same/two', content: noise(77, 2 * MiB + 99) },
  dir('many'),
  ...Array.from({ length: 700 }, (_, i): TarEntry => ({ name: `many/entry-number-${i}`, content: `${i}` })),
  { name: 'symlink-to-dir', type: 'symlink', linkname: 'many' },
  dir('dir-to-symlink'),
  { name: 'dir-to-symlink/inside', content: 'inside' },
  dir('across'),
  ...['a', 'b', 'c', 'd'].map((name): TarEntry => ({ name: `across/${name}`, content: `${name} of the bottom` })),
  dir('across/tree'),
  { name: 'across/tree/below', content: 'below' },
  dir('across/deep'),
  dir('across/deep/er'),
  { name: 'across/deep/er/file', content: 'deep' },
  dir('across/attrs', { mode: 0o2771, uid: 33, gid: 44, xattrs: { 'user.from': 'bottom' } }),
  { name: 'across/attrs/x', content: 'x' },
];

const SECOND: readonly TarEntry[] = [
  dir('symlink-to-dir', { mode: 0o750 }),
  { name: 'symlink-to-dir/own', content: 'a directory took the place of a symlink' },
  { name: 'dir-to-symlink', type: 'symlink', linkname: 'many/entry-number-3' },
  dir('across'),
  { name: 'across/.wh.a', content: '' },
  { name: 'across/e', content: 'e of the second' },
  dir('across/tree'),
  { name: 'across/tree/.wh..wh..opq', content: '' },
  { name: 'across/tree/second', content: 'second' },
  dir('across/second-only', { mode: 0o1731, uid: 55, xattrs: { 'user.from': 'second' } }),
  { name: 'across/second-only/f', content: 'f' },
  { name: 'same-again', content: noise(77, 2 * MiB + 99) },
  // No entry for across/attrs: it keeps what the bottom said.
  { name: 'across/attrs/y', content: 'y' },
];

const THIRD: readonly TarEntry[] = [
  dir('across'),
  { name: 'across/a', content: 'a came back' },
  { name: 'across/.wh.e', content: '' },
  { name: 'across/.wh.deep', content: '' },
  dir('across/tree'),
  { name: 'across/tree/.wh.second', content: '' },
  { name: 'across/tree/third', content: noise(9, MiB + 1) },
  { name: 'across/second-only/g', content: 'its directory is described by the second layer only' },
  { name: 'across/attrs/z', content: 'z' },
];

const TOP: readonly TarEntry[] = [
  dir('across'),
  { name: 'across/.wh.a', content: '' },
  { name: 'across/.wh.b', content: '' },
  dir('across/deep'),
  { name: 'across/deep/new', content: 'a new directory of an old name' },
  { name: 'across/tree/.wh.third', content: '' },
  { name: 'across/tree', type: 'symlink', linkname: 'deep' },
  { name: 'across/second-only/.wh.f', content: '' },
  { name: 'across/attrs/.wh..wh..opq', content: '' },
  { name: 'across/attrs/only', content: 'only this' },
  { name: 'big/.wh.1', content: '' },
  { name: 'many/.wh.entry-number-699', content: '' },
];

/** Four layers, bottom to top, each compressed in another way. */
export function featureLayers(): LayerSource[] {
  return [
    { entries: [...toTarEntries(bottomLayer()), ...BOTTOM] },
    { entries: [...toTarEntries(middleLayer()), ...SECOND], compression: 'zstd-frames' },
    { entries: [...toTarEntries(topLayer()), ...THIRD], compression: 'none' },
    { entries: TOP },
  ];
}
