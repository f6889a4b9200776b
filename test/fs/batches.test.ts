// Batches of plans in the loader: every order of parts, every failure half-way, readers that join, layers that go.
import assert from 'node:assert/strict';
import { afterEach, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { DedupError } from '../../src/errors.ts';
import type { LayerMap } from '../../src/fs/loadable-layer.ts';
import type { BlobId, OnPart } from '../../src/fs/registry/blob-reader.ts';
import { Priority } from '../../src/fs/span-ledger.ts';
import type { ByteRange } from '../../src/units.ts';
import { KiB } from '../../src/units.ts';
import { LoaderRig, layerOf, MemoryBlobs, prose, type StoredTestLayer, type TestLayer } from '../support/lazy-store.ts';

const sizes = { spanBytes: 64 * KiB, chunkBytes: 512 * KiB, pieceBytes: 32 * KiB } as const;
const limit = { timeout: 20_000 };

/** A registry that answers several ranges of a layer in an order of the test's. */
class BatchBlobs extends MemoryBlobs {
  /** Numbers of ranges that were asked for together. */
  readonly batches: ByteRange[][] = [];
  /** Order in which parts are told; default ascending. */
  order: (count: number) => number[] = (count) => Array.from({ length: count }, (_, i) => i);
  /** Called before each part; may wait or throw. */
  beforePart: ((told: number, signal: AbortSignal) => Promise<void> | void) | undefined;
  changePart: ((bytes: Buffer, index: number) => Buffer) | undefined;

  override async readRanges(
    blob: BlobId,
    ranges: readonly ByteRange[],
    signal: AbortSignal,
    onPart: OnPart,
  ): Promise<void> {
    this.batches.push([...ranges]);
    let told = 0;
    for (const i of this.order(ranges.length)) {
      await this.beforePart?.(told++, signal);
      const { offset, length } = ranges[i]!;
      const bytes = Buffer.from(this.blobs.get(blob.digest)!.subarray(offset, offset + length));
      onPart(i, this.changePart?.(bytes, i) ?? bytes);
    }
  }
}

const everyOther = (map: LayerMap): number[] =>
  Array.from({ length: map.spanCount }, (_, i) => i).filter((i) => i % 3 !== 1);
const all = (map: LayerMap): number[] => Array.from({ length: map.spanCount }, (_, i) => i);

describe('a batch of spans', () => {
  const rigs: LoaderRig[] = [];
  let gzip: TestLayer;
  let plain: TestLayer;
  before(async () => {
    const files = Array.from({ length: 20 }, (_, i) => ({ name: `f${i}`, content: prose(`b${i}`, 70 * KiB + i * 7) }));
    gzip = await layerOf(files, sizes);
    plain = await layerOf(files, { ...sizes, compression: 'none' });
    assert.ok(
      gzip.index.spans.bits.some((bits) => bits > 0),
      'spans that share a byte',
    );
  });
  afterEach(async () => {
    for (const rig of rigs.splice(0)) await rig.remove();
  });

  async function prepared(
    layer: TestLayer,
    registries: readonly MemoryBlobs[],
    limits = {},
  ): Promise<{ rig: LoaderRig; stored: StoredTestLayer; map: LayerMap }> {
    const rig = await LoaderRig.create({ limits: { maxRunOutputBytes: 128 * KiB, ...limits } });
    rigs.push(rig);
    const stored = await rig.add(
      layer,
      registries.map((reader, i) => ({ host: `host${i}`, reader })),
    );
    const [map] = await rig.loader.maps([stored.layerId]);
    return { rig, stored, map: map! };
  }

  const orders: [string, (count: number) => number[]][] = [
    ['in order', (count) => Array.from({ length: count }, (_, i) => i)],
    ['backwards', (count) => Array.from({ length: count }, (_, i) => count - 1 - i)],
    [
      'odd ones first',
      (count) => Array.from({ length: count }, (_, i) => i).sort((a, b) => (b % 2) - (a % 2) || a - b),
    ],
  ];
  for (const kind of ['gzip', 'none'] as const) {
    for (const [name, order] of orders) {
      it(`of a ${kind} layer whose parts come ${name} is stored, and nothing is asked for again`, limit, async () => {
        const layer = kind === 'gzip' ? gzip : plain;
        const registry = new BatchBlobs(layer);
        registry.order = order;
        const { rig, stored, map } = await prepared(layer, [registry]);
        const came = await rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
        assert.equal(came, map.spanCount);
        assert.equal(registry.batches.length, 1, 'one request');
        assert.ok(registry.batches[0]!.length > 2, 'of several runs');
        const bytes = registry.batches[0]!.reduce((sum, { length }) => sum + length, 0);
        assert.equal(bytes, layer.blob.length - map.compressedRange(0, 1).offset, 'no byte twice');
        await rig.mustEqual(stored);
        assert.equal(registry.requests.length, 0);
      });
    }
  }

  it('that leaves spans out brings the others alone', limit, async () => {
    const registry = new BatchBlobs(gzip);
    const { rig, stored, map } = await prepared(gzip, [registry]);
    const spans = everyOther(map);
    assert.equal(await rig.loader.batches.fetchBatch(map, spans, Priority.trace), spans.length);
    assert.equal(
      rig.loader.stats().aheadBytes,
      spans.reduce((sum, span) => sum + map.compressedRange(span, 1).length, 0),
    );
    await rig.mustEqual(stored);
  });

  it('asks for what is needed first first, and stores all of it in any order of need', limit, async () => {
    for (const turn of [1, 7, 13]) {
      const registry = new BatchBlobs(gzip);
      const { rig, stored, map } = await prepared(gzip, [registry]);
      const spans = all(map).map((i) => (i * 7 + turn) % map.spanCount);
      assert.equal(new Set(spans).size, map.spanCount);
      assert.equal(await rig.loader.batches.fetchBatch(map, spans, Priority.trace), map.spanCount);
      const [first] = registry.batches[0]!;
      const wanted = map.compressedRange(spans[0]!, 1);
      assert.ok(first!.offset <= wanted.offset + 1 && first!.offset + first!.length >= wanted.offset + wanted.length);
      await rig.mustEqual(stored);
      assert.equal(registry.requests.length, 0);
    }
  });

  it('twice at once is fetched once', limit, async () => {
    const registry = new BatchBlobs(gzip);
    registry.beforePart = () => sleep(5);
    const { rig, map } = await prepared(gzip, [registry]);
    const came = await Promise.all([
      rig.loader.batches.fetchBatch(map, all(map), Priority.trace),
      rig.loader.batches.fetchBatch(map, all(map), Priority.trace),
    ]);
    assert.deepEqual(came, [map.spanCount, map.spanCount]);
    assert.equal(registry.batches.length, 1);
  });

  const failures: [string, (registry: BatchBlobs) => void][] = [
    [
      'breaks half-way',
      (registry) => {
        registry.beforePart = (told) => {
          if (told === 3) throw new DedupError('REGISTRY_HTTP', 'broken');
        };
      },
    ],
    [
      'breaks before the first part',
      (registry) => {
        registry.beforePart = () => {
          throw new DedupError('REGISTRY_HTTP', 'broken');
        };
      },
    ],
    ['ends without its last parts', (registry) => void (registry.order = (count) => [0, 1].filter((i) => i < count))],
    ['answers with parts that are too short', (registry) => void (registry.changePart = (bytes) => bytes.subarray(1))],
    [
      'answers with parts that are too long',
      (registry) => void (registry.changePart = (bytes) => Buffer.concat([bytes, bytes])),
    ],
    [
      'fails with no error of ours',
      (registry) => void (registry.beforePart = () => Promise.reject(new TypeError('no'))),
    ],
  ];
  for (const [what, arrange] of failures) {
    it(`that ${what} ends, and its readers get their bytes of the same registry`, limit, async () => {
      const registry = new BatchBlobs(gzip);
      arrange(registry);
      const failing = registry.beforePart;
      registry.beforePart = async (told, signal) => {
        await sleep(20);
        await failing?.(told, signal);
      };
      const { rig, stored, map } = await prepared(gzip, [registry]);
      const batch = rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
      const names = ['f1', 'f9', 'f19'];
      const read = await Promise.all(names.map((name) => rig.readFile(stored, name)));
      for (const [i, name] of names.entries())
        assert.ok(read[i]!.equals(gzip.files.find((file) => file.name === name)!.content), name);
      assert.ok((await batch) < map.spanCount, 'what nobody waited for is given up');
      assert.equal(rig.loader.stats().waiting, 0);
      assert.ok(registry.requests.length > 0 && registry.requests.length <= 8);
    });

    if (what === 'fails with no error of ours') continue; // A bug of ours: no source is to blame.
    it(`that ${what} goes on at the second source`, limit, async () => {
      const [registry, second] = [new BatchBlobs(gzip), new MemoryBlobs(gzip)];
      arrange(registry);
      const { rig, stored, map } = await prepared(gzip, [registry, second]);
      assert.equal(await rig.loader.batches.fetchBatch(map, all(map), Priority.trace), map.spanCount);
      const asked = second.requests.length;
      assert.ok(asked > 0);
      await rig.mustEqual(stored);
      assert.equal(second.requests.length, asked);
    });
  }

  it('with bytes that are wrong stores none of them, and they are asked for anew', limit, async () => {
    const registry = new BatchBlobs(plain);
    registry.changePart = (bytes, index) => (index === 1 ? Buffer.alloc(bytes.length) : bytes);
    const { rig, stored, map } = await prepared(plain, [registry]);
    await rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
    registry.changePart = undefined;
    await rig.mustEqual(stored);
  });

  it('that stalls is given up after its time, and a reader gets its bytes', limit, async () => {
    const registry = new BatchBlobs(gzip);
    registry.beforePart = () => new Promise(() => {});
    const { rig, stored, map } = await prepared(gzip, [registry], { attemptTimeoutMs: 200 });
    const batch = rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
    assert.ok((await rig.readFile(stored, 'f5')).equals(gzip.files[5]!.content));
    await batch;
  });

  it('that stalls half-way is given up after the time of one part, however many there are', limit, async () => {
    const [registry, second] = [new BatchBlobs(gzip), new MemoryBlobs(gzip)];
    registry.beforePart = (told) => (told === 2 ? new Promise<void>(() => {}) : undefined);
    const limits = { attemptTimeoutMs: 300, maxRunBytes: 32 * KiB };
    const { rig, stored, map } = await prepared(gzip, [registry, second], limits);
    const before = performance.now();
    const batch = rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
    assert.ok((await rig.readFile(stored, 'f15')).equals(gzip.files[15]!.content));
    assert.ok(registry.batches[0]!.length > 10, `${registry.batches[0]!.length} parts`);
    assert.ok(performance.now() - before < 1_500);
    assert.equal(await batch, map.spanCount);
  });

  for (const windows of ['fail', 'never come'] as const) {
    it(`whose windows ${windows} ends, and its readers get their bytes`, limit, async () => {
      const registry = new BatchBlobs(gzip);
      const { rig, stored, map } = await prepared(gzip, [registry], { attemptTimeoutMs: 300 });
      const { windows: reader } = map.layer;
      const readWindows = reader.readWindows.bind(reader);
      const until = performance.now() + 100;
      let failed = 0;
      Object.assign(reader, {
        readWindows: async (...args: Parameters<typeof readWindows>) => {
          if (performance.now() > until) return await readWindows(...args);
          failed++;
          if (windows === 'never come') return await new Promise(() => {});
          await sleep(120);
          throw new DedupError('INDEX_INVALID', 'damaged');
        },
      });
      const batch = rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
      assert.ok((await rig.readFile(stored, 'f7')).equals(gzip.files[7]!.content));
      await batch;
      assert.ok(failed > 0);
      assert.equal(rig.loader.stats().waiting, 0);
    });
  }

  it('ends at once when its layer is dropped, or the loader closed, and later ones do nothing', limit, async () => {
    for (const end of ['drop', 'close'] as const) {
      const registry = new BatchBlobs(gzip);
      registry.beforePart = (told) => (told > 1 ? new Promise<void>(() => {}) : undefined);
      const { rig, stored, map } = await prepared(gzip, [registry]);
      const batch = rig.loader.batches.fetchBatch(map, all(map), Priority.trace);
      const reader = rig.readFile(stored, 'f19');
      const outcome = assert.rejects(reader);
      await sleep(50);
      if (end === 'drop') rig.loader.forget([stored.layerId]);
      else rig.loader.close();
      assert.ok((await batch) < map.spanCount);
      if (end === 'close') await outcome;
      else outcome.catch(() => undefined);
      assert.equal(await rig.loader.batches.fetchBatch(map, all(map), Priority.trace), 0);
      assert.equal(registry.batches.length, 1);
    }
  });

  it('of a layer without a source ends', limit, async () => {
    const { rig, map } = await prepared(gzip, []);
    assert.equal(await rig.loader.batches.fetchBatch(map, all(map), Priority.trace), 0);
  });

  it('is begun for a reader that catches up with a plan, which then asks for nothing itself', limit, async () => {
    const registry = new BatchBlobs(gzip);
    const { rig, stored, map } = await prepared(gzip, [registry]);
    const { batches } = rig.loader;
    const wanted: number[] = [];
    batches.onWanted = (layer, span) => {
      wanted.push(span);
      void batches.fetchBatch(layer, all(layer).slice(span), Priority.onDemand - 1);
    };
    assert.ok((await rig.readFile(stored, 'f3')).equals(gzip.files[3]!.content));
    assert.equal(wanted.length, 1);
    assert.equal(registry.requests.length, 0);
    assert.equal(registry.batches.length, 1);
    const { prefetchBytes, lateBytes, spanBytes, aheadBytes } = rig.loader.stats();
    assert.ok(lateBytes > 0 && lateBytes === spanBytes);
    assert.equal(aheadBytes + spanBytes, prefetchBytes);
    assert.ok(map.spanCount > 0);
  });

  it('gives right bytes to readers that come at any time, whatever fails', { timeout: 60_000 }, async () => {
    let seed = 1;
    const random = (): number => {
      seed = (seed * 48_271) % 2_147_483_647;
      return seed / 2_147_483_647;
    };
    for (let round = 0; round < 25; round++) {
      const registry = new BatchBlobs(gzip);
      registry.order = (count) => Array.from({ length: count }, (_, i) => i).sort(() => random() - 0.5);
      registry.beforePart = async () => {
        await sleep(random() * 4);
        if (random() < 0.1) throw new DedupError('REGISTRY_HTTP', 'broken');
      };
      registry.changePart = (bytes) => (random() < 0.05 ? bytes.subarray(0, bytes.length >> 1) : bytes);
      const { rig, stored, map } = await prepared(gzip, [registry]);
      const batches = [everyOther(map), all(map)].map((spans) =>
        rig.loader.batches.fetchBatch(map, spans, Priority.trace),
      );
      await Promise.all(
        Array.from({ length: 8 }, async () => {
          await sleep(random() * 10);
          const file = gzip.files[Math.floor(random() * gzip.files.length)]!;
          assert.ok((await rig.readFile(stored, file.name)).equals(file.content));
        }),
      );
      await Promise.all(batches);
      // What was fetched ahead of the readers may still be on its way; it must end, too.
      for (let turn = 0; rig.loader.stats().waiting > 0; turn++) {
        assert.ok(turn < 1_000, 'a span is waited for without end');
        await sleep(10);
      }
    }
  });
});
