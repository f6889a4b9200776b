import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import { Priority } from '../../src/fs/lazy-loader.ts';
import { KiB, MiB } from '../../src/units.ts';
import { LoaderRig, layerOf, layerOfTar, MemoryBlobs, noise, prose, type TestFile } from '../support/lazy-store.ts';

const rigs: LoaderRig[] = [];

async function rig(...args: Parameters<typeof LoaderRig.create>): Promise<LoaderRig> {
  const made = await LoaderRig.create(...args);
  rigs.push(made);
  return made;
}

afterEach(async () => {
  for (const made of rigs.splice(0)) await made.remove();
});

function someFiles(seed: string): TestFile[] {
  return [
    { name: 'small', content: prose(`${seed}small`, 100) },
    { name: 'exact', content: prose(`${seed}exact`, 8192) },
    { name: 'large', content: prose(`${seed}large`, 700 * KiB + 13) },
    { name: 'hole', content: Buffer.alloc(300 * KiB) },
    ...Array.from({ length: 40 }, (_, i) => ({ name: `f${i}`, content: prose(`${seed}${i}`, 1 + i * 997) })),
    { name: 'random', content: noise(`${seed}random`, 400 * KiB) },
  ];
}

const small = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;
const code = (expected: string) => (error: unknown) => error instanceof DedupError && error.code === expected;

describe('LazyLoader', () => {
  for (const compression of ['gzip', 'none'] as const) {
    for (const sizes of [small, { spanBytes: 64 * KiB, chunkBytes: 512 * KiB, pieceBytes: 256 * KiB }]) {
      it(`reads every byte of a ${compression} layer with pieces of ${sizes.pieceBytes / KiB} KiB and spans of ${sizes.spanBytes / KiB} KiB`, async () => {
        const layer = await layerOf(someFiles('a'), { ...sizes, compression });
        const registry = new MemoryBlobs(layer);
        const test = await rig();
        const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
        await test.mustEqual(stored);
        const { aheadBytes, wireBytes, requests, ...stats } = test.loader.stats();
        const spanBytes = stats.spanBytes + aheadBytes;
        // Reading in order fetches each span once: what crosses a border is kept.
        assert.ok(spanBytes <= layer.blob.length + layer.index.spans.count);
        assert.ok(
          registry.bytes <= spanBytes * 1.02,
          `${registry.bytes} bytes in ${requests} requests for spans of ${spanBytes}`,
        );
        assert.ok(wireBytes >= registry.bytes);
        const before = registry.requests.length;
        await test.mustEqual(stored);
        assert.equal(registry.requests.length, before);
      });
    }
  }

  it('fetches a piece once for many readers at once', async () => {
    const layer = await layerOf(someFiles('a'), small);
    const registry = new MemoryBlobs(layer);
    registry.delayMs = 20;
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const files = await Promise.all(Array.from({ length: 20 }, () => test.readFile(stored, 'small')));
    assert.equal(registry.requests.length, 1);
    for (const file of files) assert.ok(file.equals(layer.files[0]!.content));
  });

  it('joins neighbouring wanted spans into one request', async () => {
    const layer = await layerOf([{ name: 'big', content: noise('big', 2 * MiB) }], small);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const read = await test.readFile(stored, 'big', 128);
    assert.ok(read.equals(layer.files[0]!.content));
    // Four chunks of four spans, each chunk read at once.
    assert.ok(registry.requests.length <= 4, `${registry.requests.length} requests`);
  });

  it('serves 16 misses of 50 ms each in less than 0.4 s', async () => {
    const files = Array.from({ length: 64 }, (_, i) => ({ name: `f${i}`, content: noise(`p${i}`, 128 * KiB) }));
    const layer = await layerOf(files, small);
    const registry = new MemoryBlobs(layer);
    registry.delayMs = 50;
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.readFile(stored, 'f63');
    registry.requests.length = 0;
    const started = performance.now();
    const names = Array.from({ length: 16 }, (_, i) => i * 4);
    const read = await Promise.all(names.map((i) => test.readFile(stored, `f${i}`)));
    const took = performance.now() - started;
    for (const [at, i] of names.entries()) assert.ok(read[at]!.equals(files[i]!.content));
    assert.ok(took < 400, `${took} ms for ${registry.requests.length} requests`);
    assert.ok(registry.mostRunning <= 4);
  });

  it('fetches nothing for a layer whose chunks another layer brought', async () => {
    const files = someFiles('a');
    const one = await layerOf(files, small);
    const two = await layerOf([{ name: 'new', content: prose('new', 5000) }, ...files], small);
    const registry = new MemoryBlobs(one, two);
    const test = await rig();
    const first = await test.add(one, [{ host: 'one', reader: registry }]);
    await test.mustEqual(first);
    const second = await test.add(two, [{ host: 'two', reader: registry }]);
    registry.requests.length = 0;
    for (const file of files) assert.ok((await test.readFile(second, file.name)).equals(file.content));
    assert.equal(registry.requests.length, 0);
    assert.ok((await test.readFile(second, 'new')).equals(two.files[0]!.content));
    assert.equal(registry.requests.length, 1);
  });

  it('fetches again for a layer of another scope', async () => {
    const layer = await layerOf(someFiles('a'), small);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const first = await test.add(layer, [{ host: 'one', reader: registry }], { scope: 'one' });
    const second = await test.add(layer, [{ host: 'two', reader: registry }], { scope: 'two' });
    await test.mustEqual(first);
    const bytes = registry.bytes;
    await test.mustEqual(second);
    assert.ok(registry.bytes >= 2 * bytes * 0.98);
  });

  it('reads a chunk from another layer that has it when its own has no source left', async () => {
    const files = someFiles('a');
    const one = await layerOf(files, small);
    const two = await layerOf([...files, { name: 'new', content: prose('new', 5000) }], small);
    const test = await rig();
    const first = await test.add(one, [{ host: 'gone', reader: new MemoryBlobs() }]);
    await test.add(two, [{ host: 'two', reader: new MemoryBlobs(two) }]);
    assert.ok((await test.readFile(first, 'large')).equals(files[2]!.content));
  });

  it('asks for the prefetched last when a reader waits', async () => {
    const files = Array.from({ length: 60 }, (_, i) => ({ name: `f${i}`, content: noise(`q${i}`, 128 * KiB) }));
    const layer = await layerOf(files, small);
    const registry = new MemoryBlobs(layer);
    registry.delayMs = 10;
    const test = await rig({ limits: { requestsPerHost: 1, aheadPerHost: 1, maxRunBytes: 1 } });
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const range = (file: number) => ({ offset: stored.addresses[file]!, length: 4096 });
    const wanted = Array.from({ length: 20 }, (_, i) => range(i * 2));
    const prefetch = Promise.all(
      wanted.map((one) => test.loader.ensure([one], { layers: [stored.layerId], priority: Priority.guess })),
    );
    await new Promise((resolve) => setTimeout(resolve, 15));
    assert.ok((await test.readFile(stored, 'f59')).equals(files[59]!.content));
    const requestsUntilRead = registry.requests.length;
    // Already queued by prefetch, and now wanted by a reader: it moves to the front.
    assert.ok((await test.readFile(stored, 'f38')).equals(files[38]!.content));
    // Prefetch goes on beside the reader, one request at a time; 20 wait.
    const requestsForRead = registry.requests.length - requestsUntilRead;
    assert.ok(requestsForRead <= 6, `${requestsForRead} requests first`);
    assert.ok(requestsUntilRead <= 8, `${requestsUntilRead} requests before the reader's`);
    await prefetch;
  });

  it('answers a present range at once while another read of the layer is stalled', async () => {
    const layer = await layerOf(someFiles('a'), small);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.readFile(stored, 'small');
    registry.misbehave = ({ signal }) =>
      new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason)));
    const stalled = test.readFile(stored, 'random');
    stalled.catch(() => undefined);
    await new Promise((resolve) => setTimeout(resolve, 20));
    const first = await Promise.race([
      test.readFile(stored, 'small').then(() => 'present'),
      stalled.then(() => 'stalled'),
    ]);
    assert.equal(first, 'present');
    test.loader.close();
    await assert.rejects(stalled, code('CLOSED'));
    await assert.rejects(test.readFile(stored, 'small'), code('CLOSED'));
  });

  it('refuses an address that belongs to no chunk', async () => {
    const layer = await layerOf(someFiles('a'), small);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    const { nextAddress } = await test.node.store.stats();
    const options = { layers: [stored.layerId] };
    await assert.rejects(test.loader.read({ offset: nextAddress, length: 4096 }, options), code('STORE_IO'));
    await assert.rejects(test.loader.read({ offset: nextAddress - 4096, length: 8192 }, options), code('STORE_IO'));
    await assert.rejects(test.loader.read({ offset: MiB, length: 4096 }, options), code('STORE_IO'));
    await assert.rejects(
      test.loader.read({ offset: nextAddress - 4096, length: 100 }, options),
      code('INVALID_ARGUMENT'),
    );
  });

  it('reads sparse files made by GNU tar', async () => {
    const dir = await mkdtemp(join(tmpdir(), 'dedup-sparse-'));
    try {
      const file = await open(join(dir, 'sparse'), 'w');
      const content = Buffer.alloc(3 * MiB);
      for (const at of [0, 100 * KiB, 600 * KiB + 4096, 2 * MiB + 8192, 3 * MiB - 4096]) {
        const data = noise(`s${at}`, 20 * KiB).subarray(0, Math.min(20 * KiB, content.length - at));
        data.copy(content, at);
        await file.write(data, 0, data.length, at);
      }
      await file.truncate(content.length);
      await file.close();
      const tar = execFileSync('tar', ['--sparse', '--format=pax', '-cf', '-', '-C', dir, 'sparse'], {
        maxBuffer: 64 * MiB,
      });
      const layer = await layerOfTar(tar, [{ name: 'sparse', content }], { ...small, compression: 'gzip' });
      assert.ok(layer.index.chunks.fragmentLength.length > 1, 'tar made no sparse member');
      const registry = new MemoryBlobs(layer);
      const test = await rig();
      const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
      await test.mustEqual(stored);
      const flat = await test.add(layer, [{ host: 'one', reader: registry }], { contiguousFiles: true });
      await test.mustEqual(flat);
    } finally {
      await rm(dir, { recursive: true });
    }
  });

  it('fills contiguous placements from chunks that are here instead of fetching them', async () => {
    const big = noise('big', 2 * MiB + 700);
    const one = await layerOf(
      [
        { name: 'x', content: big.subarray(512 * KiB, MiB) },
        { name: 'big', content: big },
      ],
      small,
    );
    const registry = new MemoryBlobs(one);
    const test = await rig();
    const spread = await test.add(one, [{ host: 'one', reader: registry }]);
    await test.mustEqual(spread);
    const two = await layerOf(
      [
        { name: 'zeros', content: Buffer.alloc(MiB) },
        { name: 'big', content: big },
      ],
      small,
    );
    registry.add(two);
    const flat = await test.add(two, [{ host: 'one', reader: registry }], { contiguousFiles: true });
    const { entries, chunks } = two.index;
    for (let i = 0; i < entries.count; i++) {
      for (let k = 1; k < entries.chunkCount[i]!; k++) {
        const chunk = entries.firstChunk[i]! + k;
        assert.equal(flat.addresses[chunk], flat.addresses[chunk - 1]! + chunks.length[chunk - 1]!);
      }
    }
    registry.requests.length = 0;
    await test.mustEqual(flat);
    assert.equal(registry.requests.length, 0);
  });

  it('tells how long a read waited for a fetch, and nothing of reads that did not wait', async () => {
    const layer = await layerOf(someFiles('a'), small);
    const registry = new MemoryBlobs(layer);
    registry.delayMs = 20;
    const waits: number[] = [];
    const test = await rig({ onWaited: (ms) => waits.push(ms) });
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.readFile(stored, 'small');
    assert.equal(waits.length, 1);
    // Timers may end a millisecond early.
    assert.ok(waits[0]! >= 19, `${waits[0]} ms`);
    await test.readFile(stored, 'small');
    assert.equal(waits.length, 1);
  });
});
