// Which compressed bytes a set of touched pages needs, with real indexes of layers made here.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { gzipSync } from 'node:zlib';
import { neededBytes, type TouchedFile } from '../../../src/bench/needed.ts';
import { lowerDirectories } from '../../../src/bench/needed-run.ts';
import { indexOf } from '../../support/build-index.ts';
import { type TarEntry, tarOf } from '../../support/tar.ts';

const PAGE = 4096;
const SPAN = 1 << 20;

async function layer(entries: readonly TarEntry[], compress = true) {
  const tar = tarOf(entries);
  const { index } = await indexOf(compress ? gzipSync(tar) : tar);
  return index;
}

/** A file of which the pages given by number are touched. */
function touched(path: string, size: number, ...numbers: number[]): TouchedFile {
  const pages = new Uint8Array(Math.ceil(size / PAGE));
  for (const number of numbers) pages[number] = 1;
  return { path, size, pages };
}

const everyPage = (size: number) => Array.from({ length: Math.ceil(size / PAGE) }, (_none, at) => at);

test('one page needs the span that holds it, and no more for its neighbours in that span', async () => {
  const size = 6 * SPAN;
  const index = await layer([{ name: 'data', content: randomBytes(size) }]);
  assert.ok(index.spans.count >= 4, `${index.spans.count} spans`);
  const one = neededBytes([index], [touched('data', size, 300)]);
  assert.equal(one.touchedBytes, PAGE);
  assert.equal(one.spans, 1);
  assert.ok(one.neededBytes > PAGE && one.neededBytes < 3 * SPAN, `${one.neededBytes} bytes`);
  const two = neededBytes([index], [touched('data', size, 300, 301)]);
  assert.equal(two.touchedBytes, 2 * PAGE);
  assert.ok(two.spans <= 2);
});

test('everything touched needs everything, once', async () => {
  const size = 3 * SPAN + 100;
  const content = randomBytes(size);
  const entries = [
    { name: 'data', content },
    { name: 'more', content: content.subarray(0, 10) },
  ];
  const index = await layer(entries);
  const all = neededBytes([index], [touched('data', size, ...everyPage(size)), touched('more', 10, 0)]);
  assert.equal(all.touchedBytes, size + 10);
  assert.equal(all.spans, index.spans.count);
  assert.equal(all.neededBytes, index.layerBytes);
});

test('the topmost layer that has a file counts', async () => {
  const below = await layer([{ name: 'etc/x', content: randomBytes(2 * SPAN) }]);
  const above = await layer([{ name: 'etc/x', content: 'short' }]);
  const result = neededBytes([below, above], [touched('etc/x', 5, 0)]);
  assert.equal(result.touchedBytes, 5);
  assert.equal(result.neededBytes, above.layerBytes);
});

test('zeros need nothing, hard links what they point at, unknown files are said', async () => {
  const index = await layer([
    { name: 'zeros', content: Buffer.alloc(64 * PAGE) },
    { name: 'file', content: randomBytes(PAGE) },
    { name: 'link', type: 'hardlink', linkname: 'file' },
  ]);
  assert.equal(neededBytes([index], [touched('zeros', 64 * PAGE, 3)]).neededBytes, 0);
  assert.equal(neededBytes([index], [touched('link', PAGE, 0)]).spans, 1);
  const unknown = neededBytes([index], [touched('elsewhere', PAGE, 0)]);
  assert.deepEqual([unknown.unknownBytes, unknown.neededBytes], [PAGE, 0]);
});

test('a layer that is not compressed needs no more than the spans, or the bytes themselves', async () => {
  const size = 5 * SPAN;
  const index = await layer([{ name: 'data', content: randomBytes(size) }], false);
  const { neededBytes: bytes } = neededBytes([index], [touched('data', size, 0)]);
  assert.ok(bytes >= PAGE && bytes <= 2 * SPAN, `${bytes} bytes`);
});

test('lower directories are taken from the mount that ctr prints', () => {
  const text =
    'mount -t overlay overlay /target -o index=off,workdir=/r/9/work,upperdir=/r/9/fs,lowerdir=/r/m/2:/r/8/fs\n';
  assert.deepEqual(lowerDirectories(text), ['/r/m/2', '/r/8/fs']);
});
