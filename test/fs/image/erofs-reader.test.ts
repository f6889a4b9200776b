// Looking into an image's metadata without mounting it gives what the kernel gives: the same files, the same bytes.
import assert from 'node:assert/strict';
import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { DedupError } from '../../../src/errors.ts';
import { ErofsReader, type ImageFile } from '../../../src/fs/image/erofs/reader.ts';
import { writeImage } from '../../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../../src/fs/image/merge.ts';
import { BLOCK_BYTES, GiB, MiB } from '../../../src/units.ts';
import { type EntrySpec, FakeStore, makeLayer } from '../../support/layer-maker.ts';

let dir: string;
let store: FakeStore;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'erofs-reader-'));
  store = new FakeStore(join(dir, 'store'), 8 * GiB);
});

after(async () => {
  store?.close();
  await rm(dir, { recursive: true, force: true });
});

function metadataOf(specs: readonly EntrySpec[]): Buffer {
  const layer = makeLayer(specs, store);
  const path = join(dir, 'image.erofs');
  writeFileSync(path, '');
  const fd = openSync(path, 'r+');
  try {
    const tree = mergeLayers([layer.entries], { bottom: true });
    writeImage(fd, tree, [layer], { kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES });
  } finally {
    closeSync(fd);
  }
  return readFileSync(path);
}

function contentOf(file: ImageFile, offset = 0, length = file.size): Buffer {
  const fd = openSync(store.path, 'r');
  try {
    const parts = file.ranges(offset, length).map((range) => {
      const part = Buffer.alloc(range.length);
      readSync(fd, part, 0, range.length, range.offset);
      return part;
    });
    return Buffer.concat(parts).subarray(offset % BLOCK_BYTES, (offset % BLOCK_BYTES) + length);
  } finally {
    closeSync(fd);
  }
}

test('a file is found by its path, with its bytes in the store', () => {
  const big = Buffer.alloc(9 * MiB + 17, 'abcdefg');
  const reader = new ErofsReader(
    metadataOf([
      { name: 'usr/bin/tool', content: big, mode: 0o755 },
      { name: 'etc/passwd', content: 'root:x:0:0', xattrs: { 'user.note': 'an attribute before the chunks' } },
      { name: 'empty', content: '' },
    ]),
  );
  const tool = reader.file('/usr/bin/tool')!;
  assert.equal(tool.size, big.length);
  assert.ok(contentOf(tool).equals(big));
  assert.ok(contentOf(tool, 4 * MiB - 5, 100).equals(big.subarray(4 * MiB - 5, 4 * MiB + 95)), 'over a chunk border');
  const passwd = reader.file('etc/passwd')!;
  assert.equal(contentOf(passwd).toString(), 'root:x:0:0');
  assert.deepEqual(reader.file('empty')!.ranges(0, 10), []);
});

test('links are followed within the image only', () => {
  const reader = new ErofsReader(
    metadataOf([
      { name: 'bin', type: 'symlink', link: 'usr/bin' },
      { name: 'usr/bin/python3', type: 'symlink', link: 'python3.11' },
      { name: 'usr/bin/python3.11', content: 'elf' },
      { name: 'usr/bin/outside', type: 'symlink', link: '../../../../../usr/bin/python3.11' },
      { name: 'usr/bin/absolute', type: 'symlink', link: `/${'./'.repeat(100)}usr/bin/python3` },
      { name: 'long', type: 'symlink', link: `/${'./'.repeat(2030)}usr/bin/python3` },
      { name: 'loop', type: 'symlink', link: 'loop' },
      { name: 'dangling', type: 'symlink', link: 'nowhere' },
    ]),
  );
  for (const path of ['bin/python3', '/bin/outside', 'bin/absolute', 'long', '/../bin/python3'])
    assert.equal(reader.file(path)?.path, 'usr/bin/python3.11', path);
  assert.equal(reader.file('python3', 'usr/bin')?.path, 'usr/bin/python3.11', 'a relative path has a directory');
  for (const path of ['loop', 'dangling', 'bin', 'usr/bin/python3.11/x', 'nothing'])
    assert.equal(reader.file(path), undefined, path);
});

test('every name of a directory of several blocks is found', () => {
  const names = Array.from({ length: 3000 }, (_, i) => `d/${'x'.repeat(i % 40)}${i}`);
  const reader = new ErofsReader(metadataOf(names.map((name) => ({ name, content: name }))));
  for (const name of names) assert.equal(contentOf(reader.file(name)!).toString(), name);
  assert.equal(reader.file('d/y'), undefined);
});

test('a hole has no range', () => {
  const data = Buffer.alloc(BLOCK_BYTES, 1);
  const specs: EntrySpec[] = [{ name: 'sparse', size: 9 * MiB, extents: [{ offset: 8 * MiB, data }] }];
  const [range, ...others] = new ErofsReader(metadataOf(specs)).file('sparse')!.ranges(0, 9 * MiB);
  assert.deepEqual(others, []);
  assert.equal(range?.length, MiB);
});

test('what is not an image, or was cut off, is refused', () => {
  const bytes = metadataOf([{ name: 'f', content: 'x' }]);
  const invalid = (error: unknown): boolean => error instanceof DedupError && error.code === 'IMAGE_INVALID';
  assert.throws(() => new ErofsReader(Buffer.alloc(8192)), invalid);
  assert.throws(() => new ErofsReader(bytes.subarray(0, 1200)).file('f'), invalid);
});
