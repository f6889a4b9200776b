import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { gzipSync } from 'node:zlib';
import { type Digest, digestOf } from '../../../src/digest.ts';
import { DedupError, type ErrorCode } from '../../../src/errors.ts';
import { IndexCatalog } from '../../../src/fs/index/discovery.ts';
import {
  INDEX_ARTIFACT_TYPE,
  INDEX_LAYER_MEDIA_TYPE,
  INDEXED_LAYER_ANNOTATION,
} from '../../../src/fs/index/layer-index.ts';
import { RestartReader, WindowCache } from '../../../src/fs/index/restart-reader.ts';
import type { BlobReader, Repository } from '../../../src/fs/registry/blob-reader.ts';
import { OciLayout } from '../../../src/fs/registry/oci-layout.ts';
import { RootPaths } from '../../../src/paths.ts';
import { type ByteRange, MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import { noise } from '../../support/gzip-streams.ts';
import { tarOf } from '../../support/tar.ts';

const top = await mkdtemp(join(tmpdir(), 'discovery-'));
after(() => rm(top, { recursive: true, force: true }));

const layer = gzipSync(
  tarOf([
    { name: 'a', content: noise(5 * MiB) },
    { name: 'b', content: Buffer.alloc(2 * MiB, 'text ') },
  ]),
);
const built = await indexOf(layer);
const layerDigest = digestOf(layer);
const indexDigest = digestOf(built.indexBlob);
const signal = (): AbortSignal => AbortSignal.timeout(10_000);

/** A layout that counts and can hold up reads of blobs. */
async function repository(gate?: Promise<void>): Promise<Repository & { reads: number }> {
  const layout = await OciLayout.open(await mkdtemp(join(top, 'layout-')), { create: true });
  await layout.putBlob(indexDigest, built.indexBlob, signal());
  await layout.putBlob(built.index.restart.digest, built.restartBlob, signal());
  const readBlob = layout.readBlob.bind(layout);
  const counted = Object.assign(layout, {
    reads: 0,
    readBlob: async (digest: Digest, maxBytes: number, abort: AbortSignal) => {
      counted.reads++;
      await gate;
      abort.throwIfAborted();
      return await readBlob(digest, maxBytes, abort);
    },
  });
  return counted;
}

async function catalog(
  trust?: ('annotation' | 'local' | 'referrer')[],
): Promise<{ catalog: IndexCatalog; paths: RootPaths }> {
  const paths = new RootPaths(await mkdtemp(join(top, 'root-')));
  return { catalog: new IndexCatalog({ paths, ...(trust === undefined ? {} : { trust }) }), paths };
}

function fails(promise: Promise<unknown>, code: ErrorCode): Promise<void> {
  return assert.rejects(promise, (error: unknown) => error instanceof DedupError && error.code === code);
}

describe('the index catalog', () => {
  test('fetches an index once for all who ask, keeps it, and reads it from disk later', async () => {
    const source = await repository();
    const { catalog: first, paths } = await catalog();
    const wanted = { layerDigest, indexDigest };
    const all = await Promise.all(Array.from({ length: 8 }, () => first.load(wanted, source, signal())));
    for (const index of all) assert.deepEqual(index, built.index);
    assert.equal(source.reads, 1);
    assert.deepEqual(await readFile(paths.layerIndex(indexDigest)), built.indexBlob);
    assert.deepEqual(await readdir(paths.layers), [`${indexDigest.slice(7)}.index`], 'no temporary files');

    const second = new IndexCatalog({ paths });
    assert.deepEqual(await second.load(wanted, source, signal()), built.index);
    assert.equal((await second.loadLocal(wanted, 'chunks'))?.entries.count, 0);
    assert.equal(source.reads, 1);
  });

  test('fetches a damaged local file anew', async () => {
    const source = await repository();
    const { catalog: indexes, paths } = await catalog();
    await indexes.keep(built.indexBlob, built.restartBlob);
    const damaged = Buffer.from(built.indexBlob);
    damaged[300]! ^= 1;
    await writeFile(paths.layerIndex(indexDigest), damaged);
    await fails(indexes.loadLocal({ layerDigest, indexDigest }), 'DIGEST_MISMATCH');
    assert.deepEqual(await indexes.load({ layerDigest, indexDigest }, source, signal()), built.index);
    assert.equal(source.reads, 1);
  });

  test('refuses the index of another layer and keeps the file for the right one', async () => {
    const source = await repository();
    const { catalog: indexes } = await catalog();
    const other = digestOf('another layer');
    await fails(indexes.load({ layerDigest: other, indexDigest }, source, signal()), 'INDEX_INVALID');
    await indexes.load({ layerDigest, indexDigest }, source, signal());
    await fails(indexes.load({ layerDigest: other, indexDigest }, source, signal()), 'INDEX_INVALID');
    assert.notEqual(await indexes.loadLocal({ layerDigest, indexDigest }), undefined);
  });

  test('refuses a blob that is no index, and one that the registry does not have', async () => {
    const source = await repository();
    const junk = Buffer.from('not an index');
    await source.putBlob(digestOf(junk), junk, signal());
    const { catalog: indexes, paths } = await catalog();
    await fails(indexes.load({ layerDigest, indexDigest: digestOf(junk) }, source, signal()), 'INDEX_INVALID');
    await fails(
      indexes.load({ layerDigest, indexDigest: digestOf('nowhere') }, source, signal()),
      'REGISTRY_NOT_FOUND',
    );
    await assert.rejects(readdir(paths.layers), { code: 'ENOENT' }, 'nothing was kept');
  });

  test('loads all layers of an image and puts an error in the place of the one that fails', async () => {
    const source = await repository();
    const { catalog: indexes } = await catalog();
    const results = await indexes.loadAll(
      [
        { layerDigest, indexDigest },
        { layerDigest, indexDigest: digestOf('nowhere') },
      ],
      source,
      signal(),
    );
    assert.deepEqual(results[0], built.index);
    assert.ok(results[1] instanceof DedupError && results[1].code === 'REGISTRY_NOT_FOUND');
  });

  test('one who gives up leaves the fetch to the others; the last one ends it', async () => {
    let open = (): void => {};
    const source = await repository(new Promise((resolve) => (open = resolve)));
    const { catalog: indexes } = await catalog();
    const impatient = new AbortController();
    const first = indexes.load({ layerDigest, indexDigest }, source, impatient.signal);
    const second = indexes.load({ layerDigest, indexDigest }, source, signal());
    impatient.abort();
    await fails(first, 'CANCELLED');
    open();
    assert.deepEqual(await second, built.index);
    assert.equal(source.reads, 1);
  });

  test('looks at referrers only when they are trusted', async () => {
    const source = await repository();
    const subject = digestOf('image manifest');
    const blob = { digest: indexDigest, size: built.indexBlob.length };
    const artifact = Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        artifactType: INDEX_ARTIFACT_TYPE,
        config: { mediaType: 'application/vnd.oci.empty.v1+json', digest: digestOf('{}'), size: 2 },
        layers: [
          { mediaType: INDEX_LAYER_MEDIA_TYPE, ...blob, annotations: { [INDEXED_LAYER_ANNOTATION]: layerDigest } },
          { mediaType: 'application/other', ...blob, annotations: { [INDEXED_LAYER_ANNOTATION]: digestOf('x') } },
        ],
        subject: { mediaType: 'application/vnd.oci.image.manifest.v1+json', digest: subject, size: 1 },
      }),
    );
    const digest = digestOf(artifact);
    const listing: Repository = Object.assign(source, {
      referrers: async () => [{ digest, size: artifact.length, mediaType: 'm' }],
      getManifest: async () => ({ digest, mediaType: 'm', bytes: artifact }),
    });
    const trusting = await catalog(['annotation', 'referrer']);
    assert.deepEqual(
      [...(await trusting.catalog.referrerIndexes(subject, listing, signal()))],
      [[layerDigest, indexDigest]],
    );
    const careful = await catalog();
    assert.equal((await careful.catalog.referrerIndexes(subject, listing, signal())).size, 0);
  });
});

describe('the restart reader', () => {
  const withWindow = [...built.index.spans.windowLength].flatMap((length, span) => (length > 0 ? [span] : []));

  /** Serves ranges of the restart blob and notes them. */
  function reader(blob = built.restartBlob): BlobReader & { ranges: ByteRange[] } {
    const ranges: ByteRange[] = [];
    return {
      ranges,
      readRange: async (_blob, range) => {
        ranges.push(range);
        return Buffer.from(blob.subarray(range.offset, range.offset + range.length));
      },
      readRanges: () => assert.fail('windows are read one range at a time'),
      readAll: () => assert.fail('windows are read by range'),
    };
  }

  test('joins neighbouring windows into one range, and asks once for each', async () => {
    assert.ok(withWindow.length >= 4, `${withWindow.length} windows`);
    const source = reader();
    const windows = new RestartReader(built.index, join(top, 'nowhere'), new WindowCache(16 * MiB));
    const all = await windows.readWindows(0, built.index.spans.count, source, signal());
    assert.equal(source.ranges.length, 1);
    for (const [span, window] of all.entries()) assert.equal(window.length > 0, withWindow.includes(span));
    assert.deepEqual(await windows.readWindows(0, built.index.spans.count, source, signal()), all);
    assert.equal(source.ranges.length, 1);
  });

  test('brings the windows of a group together, and drops them together', async () => {
    const { windowOffset, windowLength } = built.index.spans;
    const source = reader();
    const windows = new RestartReader(built.index, join(top, 'nowhere'), new WindowCache(16 * MiB));
    const inGroup = withWindow.filter((span) => span < 4);
    const [first = 0, last = 0] = [inGroup[0], inGroup.at(-1)];
    assert.ok(inGroup.length >= 2, `${inGroup.length} windows in the first group`);
    const [window] = await windows.readWindows(first, 1, source, signal());
    assert.ok((window?.length ?? 0) > 0);
    const offset = windowOffset[first]!;
    const group = { offset, length: windowOffset[last]! + windowLength[last]! - offset };
    assert.deepEqual(source.ranges, [group]);
    for (const span of inGroup) await windows.readWindows(span, 1, source, signal());
    assert.equal(source.ranges.length, 1, 'all of them are here');
    // One that gave wrong bytes came with the others: all are asked for again.
    windows.forget(last, 1);
    await windows.readWindows(first, 1, source, signal());
    assert.deepEqual(source.ranges, [group, group]);
  });

  test('reads the local file where there is one, and the registry behind its end', async () => {
    const file = join(top, 'local.restart');
    await writeFile(file, built.restartBlob);
    const source = reader();
    await new RestartReader(built.index, file, new WindowCache(MiB)).readWindows(
      0,
      built.index.spans.count,
      source,
      signal(),
    );
    assert.equal(source.ranges.length, 0);
    await writeFile(file, built.restartBlob.subarray(0, built.index.restart.framingLength + 10));
    await new RestartReader(built.index, file, new WindowCache(MiB)).readWindows(
      0,
      built.index.spans.count,
      source,
      signal(),
    );
    assert.equal(source.ranges.length, 1);
  });

  /** The same with several ranges a request, told in an order of its own. */
  function manyReader(blob = built.restartBlob): BlobReader & { requests: ByteRange[][] } {
    const requests: ByteRange[][] = [];
    return {
      requests,
      readRange: () => assert.fail('windows of a batch are read together'),
      readRanges: async (_blob, ranges, _signal, onPart) => {
        requests.push([...ranges]);
        for (const [i, { offset, length }] of [...ranges.entries()].reverse())
          onPart(i, Buffer.from(blob.subarray(offset, offset + length)));
      },
      readAll: () => assert.fail('windows are read by range'),
    };
  }

  const all = Array.from({ length: built.index.spans.count }, (_, span) => span);
  const none = () => new RestartReader(built.index, join(top, 'nowhere'), new WindowCache(16 * MiB));
  const right = none().readWindows(0, all.length, reader(), signal());

  test('has windows that are expected in one request, and gives each when it is read; none that is here or not needed', async () => {
    const windows = none();
    const [first = 0] = withWindow;
    await windows.readWindows(first, 1, reader(), signal());
    const source = manyReader();
    windows.expect(all, source, signal());
    windows.expect(all, source, signal());
    windows.expect([], source, signal());
    assert.equal(source.requests.length, 1);
    const kept = withWindow.filter((span) => span < 4);
    assert.equal(source.requests[0]!.length, withWindow.length - kept.length);
    for (const span of all)
      assert.deepEqual(await windows.readWindows(span, 1, source, signal()), [(await right)[span]]);
    assert.deepEqual(await windows.readWindows(0, all.length, source, signal()), await right, 'they are kept');
    assert.equal(source.requests.length, 1);
  });

  test('asks nobody for expected windows when there is a local file', async () => {
    const file = join(top, 'many.restart');
    await writeFile(file, built.restartBlob);
    const source = manyReader();
    const windows = new RestartReader(built.index, file, new WindowCache(MiB));
    windows.expect(withWindow, source, signal());
    assert.equal(source.requests.length, 0);
    assert.deepEqual(await windows.readWindows(0, all.length, source, signal()), await right);
  });

  for (const [what, expecting] of [
    ['do not come', { ...manyReader(), readRanges: () => Promise.reject(new DedupError('REGISTRY_HTTP', 'gone')) }],
    ['come in part', { ...manyReader(), readRanges: async () => {} }],
    ['are damaged', manyReader(Buffer.alloc(built.restartBlob.length, 7))],
  ] as const) {
    test(`reads windows by itself when expected ones ${what}`, async () => {
      const windows = none();
      windows.expect(all, expecting, signal());
      const source = reader();
      assert.deepEqual(await windows.readWindows(0, all.length, source, signal()), await right);
      assert.ok(source.ranges.length > 0);
    });
  }

  test('reads windows by itself when expected ones take too long, and does not wait for them again', async (t) => {
    t.mock.timers.enable({ apis: ['setTimeout'] });
    const windows = none();
    windows.expect(all, { ...manyReader(), readRanges: () => new Promise(() => {}) }, signal());
    const source = reader();
    const reading = windows.readWindows(0, all.length, source, new AbortController().signal);
    await Promise.resolve();
    assert.equal(source.ranges.length, 0);
    t.mock.timers.tick(6_000);
    assert.deepEqual(await reading, await right);
    windows.forget(0, all.length);
    assert.deepEqual(await windows.readWindows(0, all.length, source, new AbortController().signal), await right);
  });

  test('refuses windows that do not decompress', async () => {
    const bad = Buffer.alloc(built.restartBlob.length, 7);
    const windows = new RestartReader(built.index, join(top, 'nowhere'), new WindowCache(MiB));
    await fails(windows.readWindows(0, built.index.spans.count, reader(bad), signal()), 'INDEX_INVALID');
  });
});
