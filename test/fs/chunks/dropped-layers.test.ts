// Layers that are dropped while somebody reads or writes for them: neither what lies there next nor another layer with the
// same chunk is harmed by it, and no block is left whose sum is another's.
import assert from 'node:assert/strict';
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { DedupError } from '../../../src/errors.ts';
import { BYTES_PER_SUM } from '../../../src/fs/chunks/store-layout.ts';
import { native } from '../../../src/fs/native.ts';
import { KiB } from '../../../src/units.ts';
import { LoaderRig, layerOf, MemoryBlobs, nativeWith, noise, type TestLayer } from '../../support/lazy-store.ts';

const BYTES = 64 * KiB;
const sizes = { spanBytes: 128 * KiB, chunkBytes: 256 * KiB, pieceBytes: BYTES } as const;
const file = (seed: string) => ({ name: seed, content: noise(seed, BYTES) });
const sourceOf = (layer: TestLayer) => [{ host: 'one', reader: new MemoryBlobs(layer) }];

const undo: (() => Promise<unknown> | unknown)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
});

async function rig(options: Parameters<typeof LoaderRig.create>[1] = {}): Promise<LoaderRig> {
  const store = { quarantineMs: 0, livingImages: async () => new Set<number>(), ...options };
  const made = await LoaderRig.create({ failureMs: 60_000 }, store);
  undo.push(() => made.remove());
  made.node.store.onDropped(async (layerIds) => {
    made.loader.forget(layerIds);
    await made.loader.drained();
  });
  return made;
}

describe('a layer that is dropped', () => {
  it('is punched when what is being written there is whole, and leaves no bytes without their sums', async () => {
    const order: string[] = [];
    const half = Promise.withResolvers<void>();
    const gate = Promise.withResolvers<void>();
    const test = await rig({
      native: nativeWith({
        punchHole: async (...args) => {
          order.push('punch');
          await native().punchHole(...args);
        },
        // As native/store/piece_writer.cc: the bytes, the sums, the presence.
        storePieces: async (job) => {
          const aside = openSync(join(test.node.root, 'aside'), 'w+');
          const presence = native().presenceCreate(test.node.store.storeBytes);
          const stored = await native().storePieces({ ...job, sumsFd: aside, presence });
          half.resolve();
          await gate.promise;
          const sums = Buffer.alloc(BYTES / BYTES_PER_SUM);
          readSync(aside, sums, 0, sums.length, job.addresses[0]! / BYTES_PER_SUM);
          closeSync(aside);
          writeSync(job.sumsFd, sums, 0, sums.length, job.addresses[0]! / BYTES_PER_SUM);
          native().presenceSet(job.presence, job.addresses[0]! / 4096, BYTES / 4096, true);
          order.push('written');
          return stored;
        },
      }),
    });
    undo.push(gate.resolve);
    const layer = await layerOf([file('a')], sizes);
    const stored = await test.add(layer, sourceOf(layer));
    const reading = test.readFile(stored, 'a').catch(() => undefined);
    await half.promise;
    const dropping = test.node.store.retainLayers([]);
    while (test.node.store.find(stored.addresses[0]!) !== undefined) await sleep(1);
    await sleep(100);
    assert.deepEqual(order, [], 'half of it is written');
    gate.resolve();
    await dropping;
    await reading;
    assert.deepEqual(order, ['written', 'punch', 'punch']);
    assert.equal(test.node.store.isPresent(stored.addresses[0]!, 4096), false);
    await assert.rejects(test.loader.readHere({ offset: stored.addresses[0]!, length: BYTES }));
    assert.equal((await test.node.store.stats()).damagedReads, 0);
  });

  it('is written by nobody while it is punched', async () => {
    const order: string[] = [];
    const punching = Promise.withResolvers<void>();
    const punched = Promise.withResolvers<void>();
    const decoding = Promise.withResolvers<void>();
    const decoded = Promise.withResolvers<void>();
    const test = await rig({
      native: nativeWith({
        punchHole: async (...args) => {
          punching.resolve();
          await punched.promise;
          order.push('punch');
          await native().punchHole(...args);
        },
        storePieces: async (job) => {
          order.push('store');
          return await native().storePieces(job);
        },
      }),
    });
    undo.push(punched.resolve);
    test.stop();
    test.start({
      native: {
        decodeSpans: async (job) => {
          decoding.resolve();
          await decoded.promise;
          return await native().decodeSpans(job);
        },
      },
    });
    const layer = await layerOf([file('a')], sizes);
    const stored = await test.add(layer, sourceOf(layer));
    const reading = test.readFile(stored, 'a').catch(() => undefined);
    await decoding.promise;
    const dropping = test.node.store.retainLayers([]);
    await punching.promise;
    decoded.resolve();
    await sleep(100);
    assert.deepEqual(order, [], 'the bytes are here, and wait');
    punched.resolve();
    await dropping;
    await reading;
    assert.deepEqual(order, ['punch', 'punch', 'store']);
    await test.node.store.endQuarantine();
    assert.equal(test.node.store.isPresent(stored.addresses[0]!, 4096), false, 'what came late is gone');
  });

  it('fails no read of the layer that is given its addresses', async () => {
    const test = await rig();
    const layer = await layerOf([file('a')], sizes);
    const registry = new MemoryBlobs(layer);
    const asked = Promise.withResolvers<void>();
    registry.misbehave = () => {
      asked.resolve();
      return new Promise(() => undefined);
    };
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const reading = assert.rejects(test.readFile(stored, 'a'), /was dropped|nothing is assigned/);
    await asked.promise;
    await test.node.store.retainLayers([]);
    await reading;
    await test.node.store.endQuarantine({ wait: true });
    const next = await layerOf([file('b')], sizes);
    const there = await test.add(next, sourceOf(next));
    assert.equal(there.addresses[0], stored.addresses[0]);
    await test.mustEqual(there);
  });

  it('fails no read of a layer that came to have the same chunk', async () => {
    const test = await rig();
    const opening = Promise.withResolvers<void>();
    const gate = Promise.withResolvers<void>();
    const [one, two] = [await layerOf([file('a')], sizes), await layerOf([file('a'), file('b')], sizes)];
    const first = await test.add(one, sourceOf(one));
    let held = true;
    const { store } = test.node;
    const made = test.node.store.layerAddresses.bind(store);
    store.layerAddresses = async (layerId) => {
      if (layerId === first.layerId && held) {
        held = false;
        opening.resolve();
        await gate.promise;
      }
      return await made(layerId);
    };
    const reading = test.readFile(first, 'a').catch((error: DedupError) => error.code);
    await opening.promise;
    const second = await test.add(two, sourceOf(two));
    assert.equal(second.addresses[0], first.addresses[0]);
    const joined = test.readFile(second, 'a');
    joined.catch(() => undefined);
    await store.retainLayers([second.layerId]);
    gate.resolve();
    assert.ok((await joined).equals(two.files[0]!.content));
    await reading;
    await test.mustEqual(second);
  });
});
