// EROFS images as the kernel and fsck.erofs see them: both layouts, the limits of the format, and what is refused.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, lstatSync, openSync, readdirSync, readFileSync, readlinkSync, readSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, test } from 'node:test';
import { DedupError } from '../../../src/errors.ts';
import { type ImageLayout, type ImageSummary, writeImage } from '../../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../../src/fs/image/merge.ts';
import { BLOCK_BYTES, GiB, MiB } from '../../../src/units.ts';
import { mountErofs, type TestMount } from '../../support/erofs-mount.ts';
import { type EntrySpec, FakeStore, type MadeLayer, makeLayer } from '../../support/layer-maker.ts';
import { assertSameRows, walkTree } from '../../support/tree-walk.ts';

let dir: string;
let store: FakeStore;
let images = 0;
const mounts: TestMount[] = [];

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'erofs-'));
  store = new FakeStore(join(dir, 'store'), 64 * GiB, 256 * MiB);
});

afterEach(() => {
  for (const mount of mounts.splice(0)) mount.close();
});

after(async () => {
  store?.close();
  await rm(dir, { recursive: true, force: true });
});

const device = (): ImageLayout => ({ kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES });

function write(layers: readonly MadeLayer[], layout: ImageLayout): { path: string; summary: ImageSummary } {
  const path = join(dir, `${images++}.erofs`);
  const fd = openSync(path, 'w');
  try {
    const tree = mergeLayers(
      layers.map(({ entries }) => entries),
      { bottom: true },
    );
    return { path, summary: writeImage(fd, tree, layers, layout) };
  } finally {
    closeSync(fd);
  }
}

function mountDevice(layers: readonly MadeLayer[]): string {
  const { path } = write(layers, device());
  execFileSync('fsck.erofs', [`--device=${store.path}`, path]);
  const mount = mountErofs(path, `${path}.mnt`, { device: store.path });
  mounts.push(mount);
  return mount.path;
}

const base = 64 * MiB;

/** Puts flat metadata into the store at `base`, as a kernel before 5.16 needs it, and mounts it from there. */
function mountFlat(layers: readonly MadeLayer[]): { path: string; image: string } {
  const { path: image } = write(layers, { kind: 'flat', baseAddress: base });
  execFileSync('fsck.erofs', [image]);
  store.write(base, readFileSync(image));
  const mount = mountErofs(store.path, `${image}.mnt`, { offset: base });
  mounts.push(mount);
  return { path: mount.path, image };
}

function refused(work: () => unknown, pattern: RegExp): void {
  assert.throws(work, (error: unknown) => {
    assert.ok(error instanceof DedupError);
    assert.equal(error.code, 'IMAGE_INVALID');
    assert.match(error.message, pattern);
    return true;
  });
}

const SAMPLE: EntrySpec[] = [
  { name: 'd', mode: 0o1777, uid: 70_000, mtime: [1_600_000_000, 1] },
  { name: 'd/file', content: 'content', mtime: [2 ** 33, 999_999_999], xattrs: { 'user.a': 'b' } },
  { name: 'd/hard', type: 'hardLink', link: 'd/file', xattrs: { 'user.a': 'b' } },
  { name: 'd/link', link: 'file' },
  { name: 'big', content: Buffer.alloc(9 * MiB + 5, 'abcdefg') },
  { name: 'null', type: 'charDevice', dev: [1, 3] },
  { name: 'empty', content: '' },
];

test('the device layout declares mtimes, chunked files and a device table, and nothing else', () => {
  const { path } = write([makeLayer(SAMPLE, store)], device());
  const head = readFileSync(path).subarray(0, 1280);
  assert.equal(head.readUInt32LE(1024), 0xe0f5e1e2);
  assert.equal(head.readUInt32LE(1024 + 4), 0, 'no checksum');
  assert.equal(head.readUInt32LE(1024 + 8), 0x2);
  assert.equal(head.readUInt32LE(1024 + 80), 0x4 | 0x8);
  assert.equal(head.readUInt16LE(1024 + 86), 1);
  assert.equal(head.readUInt16LE(1024 + 88) * 128, 1152);
  assert.equal(head.readUInt32LE(1152 + 64), store.bytes / BLOCK_BYTES);
});

test('the flat layout has feature_incompat 0, only inodes that Linux 5.4 knows, and the same tree', () => {
  const layer = makeLayer(SAMPLE, store);
  const { path, image } = mountFlat([layer]);
  const bytes = readFileSync(image);
  assert.deepEqual([...bytes.subarray(1024 + 80, 1024 + 84)], [0, 0, 0, 0]);
  assert.deepEqual([...bytes.subarray(1024 + 84, 1024 + 128)], Array(44).fill(0), 'no devices, no later fields');
  const inodeNumbers = execFileSync('find', [path, '-printf', '%i\n'], { encoding: 'utf8' }).trim().split('\n');
  for (const nid of inodeNumbers) {
    const format = bytes.readUInt16LE(Number(nid) * 32);
    assert.ok(format === 1 || format === 5, `inode ${nid} is flat (format ${format})`);
  }
  assertSameRows(walkTree(path), walkTree(mountDevice([layer])));
});

test('the same layers give the same bytes', () => {
  const layers = [makeLayer(SAMPLE, store)];
  assert.deepEqual(readFileSync(write(layers, device()).path), readFileSync(write(layers, device()).path));
});

test('a file of more than 4 GiB, nearly all holes, reads right at its end in both layouts', () => {
  const size = 4 * GiB + 12_345;
  const tail = Buffer.from('the end');
  const specs: EntrySpec[] = [
    {
      name: 'huge',
      size,
      extents: [
        { offset: 3 * GiB, data: Buffer.from('middle') },
        { offset: size - 7, data: tail },
      ],
    },
  ];
  const paths = [
    mountDevice([makeLayer(specs, store)]),
    mountFlat([makeLayer(specs, store, { zeroAddresses: true })]).path,
  ];
  for (const path of paths) {
    assert.equal(lstatSync(join(path, 'huge')).size, size);
    const fd = openSync(join(path, 'huge'), 'r');
    const buffer = Buffer.alloc(16);
    assert.equal(readSync(fd, buffer, 0, 16, size - 10), 10);
    assert.equal(buffer.subarray(0, 10).toString('latin1'), '\0\0\0the end');
    readSync(fd, buffer, 0, 16, 3 * GiB - 2);
    assert.equal(buffer.toString('latin1'), '\0\0middle\0\0\0\0\0\0\0\0');
    readSync(fd, buffer, 0, 16, 2 * GiB);
    assert.ok(buffer.equals(Buffer.alloc(16)));
    closeSync(fd);
  }
});

test('a directory of 100,000 entries lists and finds them all', () => {
  const specs: EntrySpec[] = [{ name: 'many' }];
  for (let i = 0; i < 100_000; i++) specs.push({ name: `many/entry-${i}`, content: '' });
  const path = mountDevice([makeLayer(specs, store)]);
  const names = readdirSync(join(path, 'many'));
  assert.equal(names.length, 100_000);
  assert.equal(new Set(names).size, 100_000);
  for (let i = 0; i < 100_000; i += 997) assert.ok(lstatSync(join(path, 'many', `entry-${i}`)).isFile());
});

test('directories of every fill of a block, inline or not, hold exactly their names', () => {
  const specs: EntrySpec[] = [];
  const expected = new Map<string, string[]>();
  // Around one block of entries, with and without attributes before an inline tail.
  for (let fill = 3980; fill <= 4110; fill += 5) {
    const names: string[] = [];
    for (let left = fill - 27; left > 24; ) {
      const length = Math.min(left - 12, 200);
      names.push(`${String(names.length).padStart(3, '0')}${'x'.repeat(Math.max(0, length - 3))}`);
      left -= 12 + names.at(-1)!.length;
    }
    const parent = `d${fill}`;
    specs.push({ name: parent, ...(fill % 2 === 0 ? { xattrs: { 'user.x': 'y'.repeat(fill % 64) } } : {}) });
    for (const name of names) specs.push({ name: `${parent}/${name}`, content: '' });
    expected.set(parent, names);
  }
  const path = mountDevice([makeLayer(specs, store)]);
  for (const [parent, names] of expected) assert.deepEqual(readdirSync(join(path, parent)), names, parent);
});

test('symlink targets of every length around the inline limit read back whole', () => {
  const lengths = [1, 60, 4030, 4031, 4032, 4033, 4094, 4095];
  const target = (length: number): string => `${'p/'.repeat(Math.floor(length / 2))}q`.slice(0, length);
  const path = mountDevice([
    makeLayer(
      lengths.map((length) => ({ name: `l${length}`, link: target(length) })),
      store,
    ),
  ]);
  for (const length of lengths) assert.equal(readlinkSync(join(path, `l${length}`)), target(length));
});

test('attributes up to 65,535 bytes, also across blocks, come back byte by byte', () => {
  const values = { 'user.max': Buffer.alloc(65_535, 'M'), 'user.second': Buffer.alloc(5000, 's'), 'user.z': 'end' };
  const specs: EntrySpec[] = [
    { name: 'file', content: 'data after attributes', xattrs: values },
    { name: 'dir', xattrs: values },
    { name: 'dir/inside', content: 'x', xattrs: { 'user.tiny': '' } },
  ];
  const path = mountDevice([makeLayer(specs, store)]);
  const rows = walkTree(path);
  const wanted = Object.entries(values).map(([name, value]) => `${name}=0x${Buffer.from(value).toString('hex')}`);
  for (const name of ['file', 'dir']) assert.deepEqual(rows.find((row) => row.path === name)!.xattrs, wanted);
  assert.equal(readFileSync(join(path, 'file'), 'latin1'), 'data after attributes');
  refused(() => {
    const specs = [{ name: 'f', content: '', xattrs: { 'user.x': Buffer.alloc(65_536) } }];
    return write([makeLayer(specs, store)], device());
  }, /too large/);
});

test('a time before 1970 is stored with its sign', () => {
  const layer = makeLayer([{ name: 'old', content: '' }], store);
  const tree = mergeLayers([layer.entries], { bottom: true });
  tree.mtimeSec[tree.childrenOf(tree.root).get('old')!] = -5_000_000_000;
  const path = join(dir, `${images++}.erofs`);
  const fd = openSync(path, 'w');
  writeImage(fd, tree, [layer], device());
  closeSync(fd);
  const mount = mountErofs(path, `${path}.mnt`, { device: store.path });
  mounts.push(mount);
  assert.equal(lstatSync(join(mount.path, 'old'), { bigint: true }).mtimeNs, -5_000_000_000n * 1_000_000_000n);
});

test('layers with different chunk sizes live in one image', () => {
  const content = (seed: string): Buffer => Buffer.alloc(3 * MiB + 17, seed);
  const small = makeLayer([{ name: 'small', content: content('abc') }], store, { chunkBytes: 64 * 1024 });
  const large = makeLayer([{ name: 'large', content: content('xyz!') }], store, { chunkBytes: 8 * MiB });
  const path = mountDevice([small, large]);
  assert.ok(readFileSync(join(path, 'small')).equals(content('abc')));
  assert.ok(readFileSync(join(path, 'large')).equals(content('xyz!')));
});

test('a hard link to a file of a lower layer shares its inode', () => {
  const lower = makeLayer([{ name: 'a', content: 'shared' }], store);
  const upper = makeLayer(
    [
      { name: 'b', type: 'hardLink', link: 'a', mode: 0o600 },
      { name: '.wh.c', content: '' },
    ],
    store,
  );
  const path = mountDevice([lower, upper]);
  const [a, b] = [lstatSync(join(path, 'a')), lstatSync(join(path, 'b'))];
  assert.equal(a.ino, b.ino);
  assert.equal(a.nlink, 2);
  assert.equal(a.mode & 0o7777, 0o600);
});

test('in a segment that is not the bottom one, whiteouts and opaque directories stay', () => {
  const specs: EntrySpec[] = [
    { name: 'd' },
    { name: 'd/.wh..wh..opq', content: '' },
    { name: '.wh.gone', content: '' },
  ];
  const layer = makeLayer(specs, store);
  const path = join(dir, `${images++}.erofs`);
  const fd = openSync(path, 'w');
  writeImage(fd, mergeLayers([layer.entries], { bottom: false }), [layer], device());
  closeSync(fd);
  const mount = mountErofs(path, `${path}.mnt`, { device: store.path });
  mounts.push(mount);
  const rows = new Map(walkTree(mount.path).map((row) => [row.path, row]));
  assert.deepEqual(rows.get('d')?.xattrs, ['trusted.overlay.opaque=0x79']);
  assert.deepEqual([rows.get('gone')?.type, rows.get('gone')?.rdev], ['char', 0n]);
});

test('what cannot be an image is refused', () => {
  const layer = (...specs: EntrySpec[]): MadeLayer => makeLayer(specs, store);
  const file: EntrySpec = { name: 'f', content: Buffer.alloc(5 * MiB, 1) };
  refused(() => write([layer({ name: 'x', type: 'hardLink', link: 'nowhere' })], device()), /hard link to "nowhere"/);
  refused(() => write([layer({ name: 'f', content: '' }, { name: 'f/x', content: '' })], device()), /not a directory/);
  refused(() => write([layer({ name: 'n'.repeat(256), content: '' })], device()), /longer than 255/);
  refused(() => write([layer({ name: '.wh.', content: '' })], device()), /whiteout of a name/);
  for (const name of ['..', '.', 'a\0b', '../x', 'x/../y', 'x//y']) {
    refused(() => write([layer({ name, content: '' })], device()), /no directory can hold/);
  }
  for (const link of ['a\0b', 'x'.repeat(4096)]) refused(() => write([layer({ name: 'l', link })], device()), /target/);
  refused(() => write([layer({ name: `${'a/'.repeat(2048)}b`, content: '' })], device()), /path longer/);
  refused(
    () => write([layer({ name: 'a', link: 'b' }, { name: 'b', link: 'a' }, { name: 'a/x', content: '' })], device()),
    /too many symbolic links/,
  );
  for (const address of [-1, 1, Number.NaN, store.bytes, 2 ** 32 * BLOCK_BYTES]) {
    const bad = layer(file);
    bad.addresses[0] = address;
    refused(() => write([bad], device()), /cannot be part of this image/);
  }
  const apart = layer(file);
  apart.addresses[1]! += BLOCK_BYTES;
  refused(() => write([apart], { kind: 'flat', baseAddress: base }), /one contiguous run/);
  refused(() => write([layer(file)], { kind: 'flat', baseAddress: store.bytes }), /cannot be part of this image/);
  const wrongSize = layer(file);
  wrongSize.entries.size[0]! += 4 * MiB;
  refused(() => write([wrongSize], device()), /does not have 2 chunks/);
  const wrongChunk = layer(file);
  wrongChunk.chunks.length[1]! += 1;
  refused(() => write([wrongChunk], device()), /is not 1048576 bytes long/);
});
