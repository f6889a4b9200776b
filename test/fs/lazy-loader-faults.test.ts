import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import { native } from '../../src/fs/native.ts';
import { KiB, MiB } from '../../src/units.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  noise,
  prose,
  type StoredTestLayer,
  type TestLayer,
} from '../support/lazy-store.ts';

const rigs: LoaderRig[] = [];
const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;
const code = (expected: string) => (error: unknown) => error instanceof DedupError && error.code === expected;
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

async function rig(...args: Parameters<typeof LoaderRig.create>): Promise<LoaderRig> {
  const made = await LoaderRig.create(...args);
  rigs.push(made);
  return made;
}

afterEach(async () => {
  for (const made of rigs.splice(0)) await made.remove();
});

const files = Array.from({ length: 12 }, (_, i) => ({ name: `f${i}`, content: prose(`x${i}`, 90 * KiB + i) }));
let gzip: TestLayer;
let plain: TestLayer;

/** No block of the layer's chunks may be present, and reading the file itself agrees: nothing was written either. */
function nothingPresent(test: LoaderRig, { layer, addresses }: StoredTestLayer): void {
  for (let i = 0; i < layer.index.chunks.count; i++)
    assert.equal(test.node.store.isPresent(addresses[i]!, 4096), false);
}

describe('LazyLoader with a registry that misbehaves', () => {
  before(async () => {
    gzip = await layerOf(files, sizes);
    plain = await layerOf(files, { ...sizes, compression: 'none' });
  });

  const faults: [string, (bytes: Buffer) => Buffer | Error, string | RegExp, 'both' | 'plain' | 'gzip'][] = [
    ['other bytes of the same length', (bytes) => noise('evil', bytes.length), /DIGEST_MISMATCH|LAYER_INVALID/, 'both'],
    ['zeros', (bytes) => Buffer.alloc(bytes.length), /DIGEST_MISMATCH|LAYER_INVALID/, 'both'],
    ['a short body', (bytes) => bytes.subarray(0, bytes.length - 1), 'REGISTRY_PROTOCOL', 'both'],
    ['a long body', (bytes) => Buffer.concat([bytes, bytes]), 'REGISTRY_PROTOCOL', 'both'],
    ['an empty body', () => Buffer.alloc(0), 'REGISTRY_PROTOCOL', 'both'],
    ['not found', () => new DedupError('REGISTRY_NOT_FOUND', 'gone'), 'REGISTRY_NOT_FOUND', 'both'],
    ['a refusal', () => new DedupError('REGISTRY_AUTH', 'no'), 'REGISTRY_AUTH', 'both'],
    ['an error of no known kind', () => new TypeError('oops'), 'INTERNAL', 'both'],
  ];
  for (const [what, change, expected] of faults) {
    for (const kind of ['gzip', 'plain'] as const) {
      const misbehave = ({ bytes }: { bytes: Buffer }): Buffer => {
        const changed = change(bytes);
        if (changed instanceof Error) throw changed;
        return changed;
      };
      it(`fails a read of a ${kind} layer that is answered with ${what}, and stores nothing`, async () => {
        const layer = kind === 'gzip' ? gzip : plain;
        const registry = new MemoryBlobs(layer);
        registry.misbehave = misbehave;
        const test = await rig();
        const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
        await assert.rejects(
          test.readFile(stored, 'f5'),
          (error) => error instanceof DedupError && new RegExp(expected).test(error.code),
        );
        nothingPresent(test, stored);
      });

      if (what !== 'an error of no known kind') {
        it(`reads a ${kind} layer from its second source when the first answers with ${what}`, async () => {
          const layer = kind === 'gzip' ? gzip : plain;
          const bad = new MemoryBlobs(layer);
          bad.misbehave = misbehave;
          const good = new MemoryBlobs(layer);
          const test = await rig();
          const stored = await test.add(layer, [
            { host: 'bad', reader: bad },
            { host: 'good', reader: good },
          ]);
          assert.ok((await test.readFile(stored, 'f5')).equals(files[5]!.content));
          await test.mustEqual(stored);
          assert.ok(bad.requests.length <= 3, `the bad source was asked ${bad.requests.length} times`);
        });
      }
    }
  }

  it('fails only the pieces that are wrong, and keeps their neighbours', async () => {
    const registry = new MemoryBlobs(plain);
    const wrongAt = plain.index.chunks.tarOffset[5]! + 1000;
    registry.misbehave = ({ range, bytes }) => {
      if (wrongAt < range.offset || wrongAt >= range.offset + range.length) return undefined;
      bytes[wrongAt - range.offset]! ^= 1;
      return bytes;
    };
    const test = await rig();
    const stored = await test.add(plain, [{ host: 'one', reader: registry }]);
    for (const [i, file] of files.entries()) {
      if (i === 5) await assert.rejects(test.readFile(stored, file.name), code('DIGEST_MISMATCH'));
      else assert.ok((await test.readFile(stored, file.name)).equals(file.content));
    }
    assert.equal(test.node.store.isPresent(stored.addresses[5]!, 64 * KiB), false);
  });

  it('asks anew for bytes that were kept from an earlier fetch and turn out wrong', async () => {
    const registry = new MemoryBlobs(plain);
    const { tarOffset, length } = plain.index.chunks;
    // The file that lies across the first border of spans, and the one behind it.
    const across = [...tarOffset].findIndex((at, i) => at < sizes.spanBytes && at + length[i]! > sizes.spanBytes);
    assert.ok(across >= 0, 'no file crosses the border');
    const wrongAt = sizes.spanBytes + 10;
    registry.misbehave = ({ range, bytes }) => {
      if (wrongAt >= range.offset && wrongAt < range.offset + range.length) bytes[wrongAt - range.offset]! ^= 1;
      return bytes;
    };
    const test = await rig();
    const stored = await test.add(plain, [{ host: 'one', reader: registry }]);
    const behind = files[across + 1]!;
    assert.ok((await test.readFile(stored, behind.name)).equals(behind.content));
    registry.misbehave = undefined;
    assert.ok((await test.readFile(stored, files[across]!.name)).equals(files[across]!.content));
  });

  it('decodes the good spans of a joined request by themselves when one is damaged', async () => {
    const layer = await layerOf([{ name: 'big', content: prose('big', 3 * MiB) }], sizes);
    const registry = new MemoryBlobs(layer);
    const { inOffset } = layer.index.spans;
    // From the middle of span 2 to its end.
    const from = Math.floor((inOffset[2]! + inOffset[3]!) / 2);
    registry.misbehave = ({ range, bytes }) => {
      for (let at = from; at < inOffset[3]! - 2; at++) {
        if (at >= range.offset && at < range.offset + range.length) bytes[at - range.offset] = 0xff;
      }
      return bytes;
    };
    const test = await rig({ failureMs: 60_000 });
    const { layerId, addresses } = await test.add(layer, [{ host: 'one', reader: registry }]);
    const reads: Promise<string>[] = [];
    for (let piece = 0; piece < 16; piece++) {
      const range = { offset: addresses[0]! + piece * 64 * KiB, length: 64 * KiB };
      if (piece >= 8) range.offset = addresses[1]! + (piece - 8) * 64 * KiB;
      const expected = layer.files[0]!.content.subarray(piece * 64 * KiB, (piece + 1) * 64 * KiB);
      reads.push(
        test.loader.read(range, { layers: [layerId] }).then(
          (parts) => (Buffer.concat(parts).equals(expected) ? 'right' : 'wrong'),
          (error: DedupError) => error.code,
        ),
      );
    }
    const results = await Promise.all(reads);
    assert.ok(!results.includes('wrong'));
    assert.ok(results.filter((result) => result === 'right').length >= 9, results.join(' '));
    assert.ok(results.includes('LAYER_INVALID') || results.includes('DIGEST_MISMATCH'), results.join(' '));
  });

  it('remembers a failed piece for a while, then asks again', async () => {
    const registry = new MemoryBlobs(gzip);
    registry.misbehave = () => {
      throw new DedupError('REGISTRY_HTTP', '503');
    };
    const test = await rig({ failureMs: 200 });
    const stored = await test.add(gzip, [{ host: 'one', reader: registry }]);
    for (let i = 0; i < 10; i++) await assert.rejects(test.readFile(stored, 'f5'), code('REGISTRY_HTTP'));
    assert.equal(registry.requests.length, 1);
    registry.misbehave = undefined;
    await sleep(250);
    assert.ok((await test.readFile(stored, 'f5')).equals(files[5]!.content));
  });

  it('gives up a stalled source after its time and reads from the next one', async () => {
    const stalled = new MemoryBlobs(gzip);
    stalled.misbehave = () => new Promise(() => undefined);
    const test = await rig({ limits: { attemptTimeoutMs: 100 } });
    const stored = await test.add(gzip, [
      { host: 'stalled', reader: stalled },
      { host: 'good', reader: new MemoryBlobs(gzip) },
    ]);
    assert.ok((await test.readFile(stored, 'f5')).equals(files[5]!.content));
  });

  it('ends a read at its deadline, or when the reader gives up', async () => {
    const stalled = new MemoryBlobs(gzip);
    stalled.misbehave = () => new Promise(() => undefined);
    const test = await rig({ deadlineMs: 80 });
    const { layerId, addresses } = await test.add(gzip, [{ host: 'one', reader: stalled }]);
    const range = { offset: addresses[5]!, length: 4096 };
    await assert.rejects(test.loader.read(range, { layers: [layerId] }), code('DEADLINE'));
    const given = new AbortController();
    const reading = test.loader.read(range, { layers: [layerId], signal: given.signal });
    given.abort();
    await assert.rejects(reading, code('CANCELLED'));
  });

  it('tries every repository of one host', async () => {
    const test = await rig();
    const stored = await test.add(gzip, [
      { host: 'one', name: 'one/gone', reader: new MemoryBlobs() },
      { host: 'one', name: 'one/here', reader: new MemoryBlobs(gzip) },
    ]);
    assert.ok((await test.readFile(stored, 'f5')).equals(files[5]!.content));
  });

  it('fails a read, and nothing else, when the layer was dropped meanwhile', async () => {
    const test = await rig();
    const stored = await test.add(gzip, [{ host: 'one', reader: new MemoryBlobs(gzip) }]);
    await test.readFile(stored, 'f5');
    test.sources.get(stored.layerId)!.toSorted = () => {
      throw new DedupError('NOT_FOUND', 'no such layer');
    };
    await assert.rejects(test.readFile(stored, 'f11'), code('UNAVAILABLE'));
  });

  it('gives right bytes or an error to many readers at once, whatever the registry and the disk do', async () => {
    const names = Array.from({ length: 24 }, (_, i) => ({
      name: `f${i}`,
      content: prose(`r${i}`, (i % 5) * 70_000 + 11),
    }));
    const one = await layerOf(names, sizes);
    const two = await layerOf([...names.slice(8), { name: 'f0', content: prose('other', 200_000) }], sizes);
    let seed = 12345;
    const random = (below: number): number => {
      seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0;
      return (seed >>> 8) % below;
    };
    const registry = new MemoryBlobs(one, two);
    registry.misbehave = async ({ bytes }) => {
      await sleep(random(4));
      const dice = random(8);
      if (dice === 0) throw new DedupError('REGISTRY_HTTP', 'reset');
      if (dice === 1) bytes[random(bytes.length)]! ^= 1 << random(8);
      if (dice === 2) return bytes.subarray(0, random(bytes.length));
      return bytes;
    };
    const test = await rig({ failureMs: 5, limits: { edgeBytes: 96 * KiB } });
    const layers = [
      await test.add(one, [{ host: 'a', reader: registry }]),
      await test.add(two, [{ host: 'b', reader: registry }]),
    ];
    const handle = await open(test.node.paths.indexDb);
    const prototype = Object.getPrototypeOf(handle) as { datasync(): Promise<void> };
    await handle.close();
    const datasync = prototype.datasync;
    let right = 0;
    let failed = 0;
    const reader = async (): Promise<void> => {
      for (let i = 0; i < 25; i++) {
        const stored = layers[random(2)]!;
        const file = stored.layer.files[random(stored.layer.files.length)]!;
        let read: Buffer;
        try {
          read = await test.readFile(stored, file.name, 1 + random(40));
        } catch (error) {
          assert.ok(error instanceof DedupError, String(error));
          assert.notEqual(error.code, 'INTERNAL', error.message);
          assert.notEqual(error.code, 'INVALID_ARGUMENT', error.message);
          failed++;
          await sleep(random(8));
          continue;
        }
        assert.ok(read.equals(file.content), `${file.name} differs`);
        right++;
      }
    };
    try {
      prototype.datasync = () => Promise.reject(Object.assign(new Error('EIO'), { code: 'EIO' }));
      const flushing = setInterval(() => test.node.store.flush().catch(() => undefined), 20);
      await Promise.all(Array.from({ length: 12 }, reader));
      clearInterval(flushing);
    } finally {
      prototype.datasync = datasync;
    }
    assert.ok(right > 20 && failed > 5, `${right} right, ${failed} failed`);
  });

  it('says so when a layer has no source', async () => {
    const test = await rig();
    const stored = await test.add(gzip, []);
    await assert.rejects(test.readFile(stored, 'f5'), code('UNAVAILABLE'));
  });

  it('fetches what is taken away under a read that waits for something else', async () => {
    const layer = await layerOf([{ name: 'wide', content: noise('wide', 512 * KiB) }], sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const [address = 0] = stored.addresses;
    const [first] = await test.loader.read({ offset: address, length: 4 * KiB }, { layers: [stored.layerId] });
    assert.ok(first!.equals(layer.files[0]!.content.subarray(0, 4 * KiB)));
    const gate = Promise.withResolvers<undefined>();
    registry.misbehave = () => gate.promise;
    const reading = test.readFile(stored, 'wide', 128);
    while (registry.running === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    // Another reader has found that the disk changed it.
    native().presenceSet(test.node.store.presence, address / 4096, 1, false);
    gate.resolve(undefined);
    assert.ok((await reading).equals(layer.files[0]!.content));
  });

  it('reads again what the store lost between two reads', async () => {
    const registry = new MemoryBlobs(gzip);
    const test = await rig();
    const stored = await test.add(gzip, [{ host: 'one', reader: registry }]);
    await test.mustEqual(stored);
    const handle = await open(test.node.paths.indexDb);
    const prototype = Object.getPrototypeOf(handle) as { datasync(): Promise<void> };
    await handle.close();
    const datasync = prototype.datasync;
    prototype.datasync = () => Promise.reject(Object.assign(new Error('EIO'), { code: 'EIO' }));
    await assert.rejects(test.node.store.flush(), code('STORE_IO'));
    prototype.datasync = datasync;
    nothingPresent(test, stored);
    await test.mustEqual(stored);
  });
});

describe('LazyLoader on a full disk', () => {
  let dir = '';
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedup-full-'));
    execFileSync('truncate', ['-s', '24M', join(dir, 'disk')]);
    execFileSync('mkfs.ext4', ['-q', '-m', '0', '-O', '^has_journal', join(dir, 'disk')]);
    execFileSync('mkdir', [join(dir, 'mnt')]);
    execFileSync('mount', ['-o', 'loop', join(dir, 'disk'), join(dir, 'mnt')]);
  });
  after(async () => {
    try {
      execFileSync('umount', [join(dir, 'mnt')]);
    } finally {
      await rm(dir, { recursive: true, force: true });
    }
  });

  it('fails the reads that find no room, loses nothing, and goes on when there is room', async () => {
    const many = Array.from({ length: 500 }, (_, i) => ({ name: `m${i}`, content: Buffer.from(`many ${i}`) }));
    const big = Array.from({ length: 40 }, (_, i) => ({ name: `f${i}`, content: noise(`full${i}`, 800 * KiB) }));
    const layer = await layerOf(big, { compression: 'none' });
    const made = await LoaderRig.create({ failureMs: 50 }, { reserveBytes: MiB }, join(dir, 'mnt'));
    try {
      const stored = await made.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
      const other = await made.add(await layerOf(files, sizes), []);
      const right: string[] = [];
      let full = 0;
      for (const file of big) {
        try {
          assert.ok((await made.readFile(stored, file.name)).equals(file.content));
          right.push(file.name);
        } catch (error) {
          assert.ok(code('STORE_FULL')(error), String(error));
          full++;
        }
      }
      assert.ok(right.length > 10 && full > 5, `${right.length} read, ${full} without room`);
      made.loader.close();
      made.start();
      for (const name of right)
        assert.ok((await made.readFile(stored, name)).equals(big.find((file) => file.name === name)!.content));
      await assert.rejects(made.add(await layerOf(many, sizes), []), code('STORE_FULL'));
      assert.deepEqual(await made.node.store.retainLayers([other.layerId]), [stored.layerId]);
      const again = await made.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
      assert.ok((await made.readFile(again, 'f39')).equals(big[39]!.content));
    } finally {
      made.loader.close();
      await made.node.store.close();
    }
  });
});
