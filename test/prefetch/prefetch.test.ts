// Traces at work on a real store and loader, the registry in memory: what is replayed, from which trace, and what a trace
// that was made to harm can cost.
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { digestFromBytes } from '../../src/digest.ts';
import type { SeenRead } from '../../src/fs/transport/transport.ts';
import type { AccessTrace, TraceEvent } from '../../src/prefetch/access-trace.ts';
import { Prefetch, type PrefetchOptions } from '../../src/prefetch/prefetch.ts';
import { TraceStore } from '../../src/prefetch/trace-store.ts';
import { KiB, MiB } from '../../src/units.ts';
import { waitFor } from '../support/containerd.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  noise,
  quiet,
  type StoredTestLayer,
  type TestLayer,
} from '../support/lazy-store.ts';
import { traceOf } from '../support/sample-trace.ts';

const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB, compression: 'none' } as const;
const limit = { timeout: 60_000 };
const capabilities = { seesHits: true } as PrefetchOptions['transport']['capabilities'];

describe('prefetch', () => {
  let directory: string;
  let traces: TraceStore;
  let rig: LoaderRig;
  let registry: MemoryBlobs;
  let reads: SeenRead[];
  let watched: Set<number>;
  let stop: AbortController;
  let prefetch: Prefetch;

  beforeEach(async () => {
    directory = await mkdtemp(join(tmpdir(), 'prefetch-'));
    traces = new TraceStore(directory);
    registry = new MemoryBlobs();
    rig = await LoaderRig.create();
    reads = [];
    watched = new Set();
    stop = new AbortController();
    make();
  });
  afterEach(async () => {
    stop.abort();
    await prefetch.close();
    await rig.remove();
    await rm(directory, { recursive: true, force: true });
  });

  function make(more: Partial<PrefetchOptions> = {}): void {
    prefetch = new Prefetch({
      loader: rig.loader,
      transport: {
        capabilities,
        watchReads: (id, on) => void (on ? watched.add(id) : watched.delete(id)),
        takeReads: () => reads.splice(0),
      },
      traces,
      isPresent: (address, length) => rig.node.store.isPresent(address, length),
      readIndex: async (layerId) => rig.layers.get(layerId)!.layer.index,
      enabled: true,
      workers: 4,
      queueSize: 1000,
      log: quiet,
      ...more,
    });
  }

  async function added(layer: TestLayer): Promise<StoredTestLayer> {
    registry.add(layer);
    return await rig.add(layer, [{ host: 'one', reader: registry }]);
  }

  const manyFiles = (seed: string, count: number): Promise<TestLayer> =>
    layerOf(
      Array.from({ length: count }, (_, i) => ({ name: `f${i}`, content: noise(`${seed}${i}`, 128 * KiB) })),
      sizes,
    );

  const image = (layers: readonly StoredTestLayer[], tag = 'test') => ({
    layerIds: layers.map(({ layerId }) => layerId),
    identity: {
      layers: layers.map(({ layer }) => layer.index.layerDigest),
      repository: 'registry.example/team/app',
      tag,
      manifest: '',
    },
    signal: stop.signal,
  });

  const chunkOf = ({ layer }: StoredTestLayer, i: number) =>
    digestFromBytes(layer.index.chunks.digest.subarray(i * 32, i * 32 + 32));

  async function save(
    layers: readonly StoredTestLayer[],
    events: Partial<TraceEvent>[],
    more: Partial<AccessTrace> = {},
  ) {
    await traces.save(traceOf('test', events, { layers: image(layers).identity.layers, ...more }));
  }

  /** Waits until nothing is fetched any more. */
  async function quietness(): Promise<void> {
    let last = -1;
    await waitFor('prefetches to end', async () => {
      await new Promise((resolve) => setTimeout(resolve, 150));
      const { requests, waiting } = rig.loader.stats();
      const same = requests === last && waiting === 0;
      last = requests;
      return same;
    });
  }

  it('brings what the trace of the image names, and nothing else; its reads then ask for nothing', limit, async () => {
    const stored = await added(await manyFiles('own', 60));
    await save(
      [stored],
      [3, 30, 50].map((i) => ({ chunk: chunkOf(stored, i), length: 128 * KiB })),
    );
    prefetch.begin(image([stored]));
    prefetch.begin(image([stored]));
    await quietness();
    assert.equal(prefetch.replayed, 1);
    const before = registry.requests.length;
    assert.ok(before > 0);
    for (const i of [3, 30, 50]) await rig.readFile(stored, `f${i}`);
    assert.equal(registry.requests.length, before);
    assert.ok(rig.loader.stats().prefetchBytes < 12 * 128 * KiB);
  });

  it('records a start, and the next node replays it', limit, async () => {
    const stored = await added(await manyFiles('rec', 40));
    await prefetch.mounted(7, image([stored]));
    for (const i of [1, 20]) {
      await rig.readFile(stored, `f${i}`);
      reads.push({ imageId: 7, offset: stored.addresses[i]!, length: 128 * KiB, missed: true, atMs: i });
    }
    await prefetch.unmounted(7);
    assert.equal(prefetch.recorded, 1);
    const [info] = await traces.list();
    const trace = await traces.load(info!.id);
    assert.deepEqual(
      trace!.events.map(({ path, outcome }) => `${path} ${outcome}`),
      ['f1 miss', 'f20 miss'],
    );
  });

  it('does not begin to record an image that was unmounted while its layers were opened', limit, async () => {
    const stored = await added(await manyFiles('gone', 5));
    const mounting = prefetch.mounted(7, image([stored]));
    await prefetch.unmounted(7);
    await mounting;
    assert.equal(watched.size, 0);
    await prefetch.mounted(7, image([stored]));
    assert.deepEqual([...watched], [7]);
  });

  it('replays nothing when it is not enabled, and records all the same', limit, async () => {
    make({ enabled: false });
    const stored = await added(await manyFiles('off', 20));
    await save([stored], [{ chunk: chunkOf(stored, 3), length: 128 * KiB }]);
    await prefetch.mounted(7, image([stored]));
    reads.push({ imageId: 7, offset: stored.addresses[0]!, length: 4096, missed: true, atMs: 0 });
    await prefetch.unmounted(7);
    assert.equal(registry.requests.length, 0);
    assert.equal((await traces.load((await traces.list())[0]!.id))!.runs, 2);
  });

  it('takes of the latest versions the trace that says most about an image without one', limit, async () => {
    const [base, before, now] = [await manyFiles('base', 30), await manyFiles('v1', 10), await manyFiles('v2', 10)];
    const [shared, top] = [await added(base), await added(now)];
    registry.add(before);
    const gone = { layers: [base.index.layerDigest, before.index.layerDigest], tag: '1' };
    const names = [2, 12, 22];
    await save(
      [shared],
      names.map((i) => ({ chunk: chunkOf(shared, i), length: 128 * KiB })),
      gone,
    );
    await save([top], [{ chunk: chunkOf(shared, 29), length: 4096 }], {
      repository: 'registry.example/other',
      tag: '9',
    });
    prefetch.begin({ ...image([shared, top]) });
    await quietness();
    const asked = registry.requests.length;
    assert.ok(asked > 0);
    for (const i of names) await rig.readFile(shared, `f${i}`);
    assert.equal(registry.requests.length, asked);
    await rig.readFile(shared, 'f29');
    assert.ok(registry.requests.length > asked, 'another repository says nothing');
  });

  it('lets a trace that was made to harm cost no more than its bound, and readers get right bytes', limit, async () => {
    // 96 MiB, all of it named, in an order of no use; a start reads a little.
    const stored = await added(await manyFiles('big', 768));
    const events = Array.from({ length: 20_000 }, (_, i) => ({
      chunk: chunkOf(stored, (i * 7919) % 768),
      offset: (i % 9) * 16 * KiB,
      length: 63 * MiB,
      path: `../../../f${i}`,
      fileOffset: Number.MAX_SAFE_INTEGER - 64 * MiB,
    }));
    const foreign = { layers: [stored.layer.index.restart.digest], tag: 'evil' };
    await save([stored], events, foreign);
    prefetch.begin(image([stored]));
    await quietness();
    for (const i of [5, 300, 700]) {
      const read = await rig.readFile(stored, `f${i}`);
      assert.ok(read.equals(stored.layer.files[i]!.content));
    }
    await quietness();
    const { prefetchBytes } = rig.loader.stats();
    assert.ok(prefetchBytes > 30 * MiB, 'it was replayed');
    assert.ok(prefetchBytes < 66 * MiB, `${prefetchBytes / MiB} MiB for nothing`);
  });

  it('ends when the image is dropped in the middle, and the next one is replayed', limit, async () => {
    registry.delayMs = 5;
    const stored = await added(await manyFiles('drop', 200));
    await save(
      [stored],
      Array.from({ length: 200 }, (_, i) => ({ chunk: chunkOf(stored, i), length: 128 * KiB })),
    );
    prefetch.begin(image([stored]));
    await waitFor('the first bytes', () => registry.requests.length > 2);
    rig.loader.forget([stored.layerId]);
    await quietness();
    assert.equal(prefetch.queuedSpans, 0);
    const other = await added(await manyFiles('next', 20));
    await save([other], [{ chunk: chunkOf(other, 3), length: 128 * KiB }]);
    prefetch.begin(image([other]));
    await waitFor('the other image', () => registry.requests.some(({ digest }) => digest === other.layer.id.digest));
  });

  it('lives when the registry is gone, and readers are told', limit, async () => {
    const stored = await added(await manyFiles('gone', 100));
    await save(
      [stored],
      Array.from({ length: 100 }, (_, i) => ({ chunk: chunkOf(stored, i), length: 128 * KiB })),
    );
    registry.blobs.clear();
    prefetch.begin(image([stored]));
    await quietness();
    assert.equal(prefetch.queuedSpans, 0);
    await assert.rejects(rig.readFile(stored, 'f5'));
  });
});
