// A removed image stops its downloads at once: on real connections to a real registry, whose proxy counts what it sends.
import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import { RegistryPool } from '../../src/fs/registry/pool.ts';
import { KiB, MiB } from '../../src/units.ts';
import { FaultProxy } from '../support/fault-proxy.ts';
import { LoaderRig, layerOf, MemoryBlobs, noise, type TestLayer } from '../support/lazy-store.ts';
import { RegistryProcess } from '../support/registry.ts';

const sizes = { spanBytes: 512 * KiB, chunkBytes: 512 * KiB, pieceBytes: 512 * KiB } as const;
/** How long the proxy stops in the middle of a body, milliseconds. */
const STALL_MS = 1_000;

describe('the downloads of a layer that is dropped', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let pool: RegistryPool;
  let layer: TestLayer;
  const shared = { name: 'shared', content: noise('shared', 500 * KiB) };

  before(async () => {
    registry = await RegistryProcess.start();
    proxy = await FaultProxy.start(`http://${registry.host}`);
    pool = new RegistryPool();
    const files = Array.from({ length: 8 }, (_, i) => ({ name: `f${i}`, content: noise(`f${i}`, 2 * MiB) }));
    layer = await layerOf([shared, ...files], sizes);
    const begun = await fetch(`http://${registry.host}/v2/app/blobs/uploads/`, { method: 'POST' });
    const upload = new URL(begun.headers.get('location')!, `http://${registry.host}`);
    upload.searchParams.set('digest', layer.id.digest);
    const put = await fetch(upload, { method: 'PUT', body: new Uint8Array(layer.blob) });
    assert.equal(put.status, 201);
  });
  after(async () => {
    await pool?.close();
    await proxy?.stop();
    await registry?.stop();
  });

  it('end at once, those under way and those that wait, and what another layer holds is read from there', async () => {
    const test = await LoaderRig.create({ limits: { requestsPerHost: 2, maxRunBytes: MiB } });
    try {
      const dropped: Promise<void>[] = [];
      test.node.store.onDropped((layerIds) => {
        test.loader.forget(layerIds);
        dropped.push(test.loader.drained());
        return dropped.at(-1)!;
      });
      const reader = pool.repository({ host: proxy.host, path: 'app' });
      const stored = await test.add(layer, [{ host: proxy.host, reader }]);
      const other = await layerOf([shared], sizes);
      const kept = await test.add(other, [{ host: 'other', reader: new MemoryBlobs(other) }]);
      proxy.setRules({ path: /blobs/, fault: { kind: 'stall', afterBytes: 64 * KiB, ms: STALL_MS } });
      const reads = layer.files.map(({ name }) => test.readFile(stored, name));
      const outcomes = Promise.allSettled(reads);
      const blobs = { method: 'GET', path: /blobs/ };
      while (proxy.count(blobs).bytes < 2 * 64 * KiB) await new Promise((resolve) => setTimeout(resolve, 5));
      const { requests, bytes } = proxy.count(blobs);
      assert.deepEqual(await test.node.store.retainLayers([kept.layerId]), [stored.layerId]);
      await Promise.all(dropped);
      const [first, ...others] = await outcomes;
      assert.ok(first?.status === 'fulfilled' && first.value.equals(shared.content), 'the shared file is right');
      for (const one of others) assert.ok(one.status === 'rejected' && one.reason instanceof DedupError);
      // As long as the proxy waits before it goes on sending, and once more.
      await new Promise((resolve) => setTimeout(resolve, 2 * STALL_MS));
      assert.equal(proxy.count(blobs).requests, requests, 'nothing is asked for any more');
      assert.ok(proxy.count(blobs).bytes - bytes <= 2 * 64 * KiB, 'only what was on its way came');
      assert.equal(test.loader.stats().waiting, 0);
    } finally {
      await test.remove();
    }
  });

  it('end at once as well while nothing may be fetched for it, and begin again afterwards', async () => {
    const test = await LoaderRig.create({ limits: { requestsPerHost: 2, maxRunBytes: MiB } });
    try {
      const reader = pool.repository({ host: proxy.host, path: 'app' });
      const stored = await test.add(layer, [{ host: proxy.host, reader }]);
      proxy.reset();
      proxy.setRules({ path: /blobs/, fault: { kind: 'stall', afterBytes: 64 * KiB } });
      const reads = layer.files.map(({ name }) => test.readFile(stored, name));
      const outcomes = Promise.allSettled(reads);
      while (proxy.active < 2) await new Promise((resolve) => setTimeout(resolve, 5));
      // Two who want it, as two calls of which one was given up.
      let goes = true;
      const suspend = () => test.loader.suspend([stored.layerId], () => goes);
      const resumes = [suspend(), suspend()];
      for (const one of await outcomes) assert.ok(one.status === 'rejected' && one.reason instanceof DedupError);
      while (proxy.active > 0) await new Promise((resolve) => setTimeout(resolve, 5));
      proxy.reset();
      resumes[0]!();
      await assert.rejects(test.readFile(stored, 'f0'));
      assert.equal(proxy.count().requests, 0, 'nothing is asked for');
      goes = false;
      const promised = layer.files.find(({ name }) => name === 'f1')!;
      assert.ok(
        (await test.readFile(stored, 'f1')).equals(promised.content),
        'somebody was promised the layer meanwhile',
      );
      goes = true;
      resumes[1]!();
      const { content } = layer.files.find(({ name }) => name === 'f0')!;
      assert.ok((await test.readFile(stored, 'f0')).equals(content), 'no failure is remembered');
    } finally {
      await test.remove();
    }
  });
});
