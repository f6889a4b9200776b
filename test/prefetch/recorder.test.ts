// What is noted of the reads of starting containers: on layers of the product's own builder, with clocks of the test's.
import assert from 'node:assert/strict';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, before, beforeEach, describe, it, mock } from 'node:test';
import { type Digest, digestFromBytes, digestOf } from '../../src/digest.ts';
import { LayerMap } from '../../src/fs/loadable-layer.ts';
import { Priority, SpanLedger } from '../../src/fs/span-ledger.ts';
import type { SeenRead } from '../../src/fs/transport/transport.ts';
import { type AccessTrace, MAX_UNITS, TRACE_UNIT_BYTES, traceId } from '../../src/prefetch/access-trace.ts';
import { type ChunkFile, Recorder, type RecorderOptions } from '../../src/prefetch/recorder.ts';
import { TraceStore } from '../../src/prefetch/trace-store.ts';
import { GiB, KiB, MiB, roundUp } from '../../src/units.ts';
import { layerOf, noise, quiet, type TestFile, type TestLayer } from '../support/lazy-store.ts';

const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB, compression: 'none' } as const;

/** Layers one after the other in the store; a chunk that was placed keeps its address. */
class Store {
  readonly #placed = new Map<string, number>();
  #next = MiB;

  open(layerId: number, { index }: TestLayer): LayerMap {
    const { chunks } = index;
    const addresses = new Float64Array(chunks.count);
    for (let i = 0; i < chunks.count; i++) {
      if (chunks.zero[i] === 1) continue;
      const digest = digestOfChunk({ index } as TestLayer, i);
      if (!this.#placed.has(digest)) {
        this.#placed.set(digest, this.#next);
        this.#next += roundUp(chunks.length[i]!, 4096);
      }
      addresses[i] = this.#placed.get(digest)!;
    }
    return new LayerMap(layerId, { index, addresses, windows: { readWindows: async () => [] }, sources: () => [] });
  }
}

function digestOfChunk({ index }: TestLayer, chunk: number): Digest {
  return digestFromBytes(index.chunks.digest.subarray(chunk * 32, chunk * 32 + 32));
}

class Reads {
  readonly capabilities = { seesHits: true } as RecorderOptions['transport']['capabilities'];
  readonly watched = new Set<number>();
  pending: SeenRead[] = [];

  watchReads(imageId: number, on: boolean): void {
    if (on) this.watched.add(imageId);
    else this.watched.delete(imageId);
  }

  takeReads(): SeenRead[] {
    const { pending } = this;
    this.pending = [];
    return pending;
  }

  add(imageId: number, offset: number, length: number, atMs: number, missed = false): void {
    this.pending.push({ imageId, offset, length, atMs, missed });
  }
}

describe('the recorder', () => {
  const files: TestFile[] = [
    { name: 'a', content: noise('a', 100) },
    { name: 'b', content: noise('b', 5000) },
    { name: 'big', content: noise('big', 1200 * KiB) },
  ];
  const shared: TestFile[] = [
    { name: 'same', content: files[2]!.content },
    { name: 'twice/one', content: noise('twice', 9000) },
    { name: 'twice/two', content: noise('twice', 9000) },
    { name: 'own', content: noise('own', 200 * KiB) },
  ];
  let [lower, upper]: TestLayer[] = [];
  let [low, up]: LayerMap[] = [];
  let directory: string;
  let traces: TraceStore;
  let reads: Reads;
  let ledger: SpanLedger;
  let recorder: Recorder;
  let now = 0;

  before(async () => {
    lower = await layerOf(files, sizes);
    upper = await layerOf(shared, sizes);
  });
  beforeEach(async () => {
    const store = new Store();
    low = store.open(1, lower!);
    up = store.open(2, upper!);
    directory = await mkdtemp(join(tmpdir(), 'recorder-'));
    now = 50_000;
    mock.timers.enable({ apis: ['setInterval'] });
    mock.method(performance, 'now', () => now);
    make();
  });
  afterEach(async () => {
    await recorder.close();
    mock.timers.reset();
    mock.restoreAll();
    await rm(directory, { recursive: true, force: true });
  });

  function make(more: Partial<RecorderOptions> = {}): void {
    traces = new TraceStore(directory);
    reads = new Reads();
    ledger = new SpanLedger();
    const filesOf = async (map: LayerMap, chunks: ReadonlySet<number>): Promise<Map<number, ChunkFile>> => {
      const { entries } = (map === low ? lower! : upper!).index;
      const found = new Map<number, ChunkFile>();
      for (let i = 0; i < entries.count; i++)
        for (let part = 0; part < entries.chunkCount[i]!; part++)
          if (chunks.has(entries.firstChunk[i]! + part))
            found.set(entries.firstChunk[i]! + part, { path: entries.name[i]!, offset: part * 512 * KiB });
      return found;
    };
    recorder = new Recorder({ transport: reads, ledger, traces, filesOf, log: quiet, ...more });
  }

  const identity = (name: string) => ({ layers: [digestOf(name)], repository: 'host/app', tag: name, manifest: '' });
  const begin = (imageId: number, name = `image${imageId}`, maps = [low!, up!]): void =>
    recorder.begin({ imageId, identity: identity(name), maps });
  const traceOf = async (name: string): Promise<AccessTrace | undefined> => traces.load(traceId([digestOf(name)]));

  function pass(ms: number): void {
    for (let left = ms; left > 0; left -= 100) {
      now += 100;
      mock.timers.tick(100);
    }
  }

  const address = (map: LayerMap, chunk: number): number => map.layer.addresses[chunk]!;
  const lines = (trace: AccessTrace | undefined): string[] =>
    (trace?.events ?? []).map(
      ({ path, fileOffset, length, outcome, atMs }) => `${atMs} ${path} ${fileOffset}+${length} ${outcome}`,
    );

  it('notes a read under every chunk it touches, with its time since the first one, its place and its file', async () => {
    begin(1);
    assert.deepEqual([...reads.watched], [1]);
    reads.add(1, address(low!, 0), 4096, 1000, true);
    reads.add(1, address(low!, 0), 16 * KiB, 1030);
    reads.add(1, address(low!, 2) + 500 * KiB, 64 * KiB, 1100);
    await recorder.end(1);
    // Of one read, in whatever order.
    assert.deepEqual(lines(await traceOf('image1')).sort(), [
      '0 a 0+100 miss',
      '100 big 458752+65536 hit',
      '100 big 524288+65536 hit',
      '30 b 0+5000 hit',
      '30 big 0+65536 hit',
    ]);
    assert.equal(recorder.recorded, 1);
    assert.equal(reads.watched.size, 0);
  });

  it('notes reads over several layers, whichever was read before', async () => {
    const store = new Store();
    const layers = await Promise.all(
      ['x', 'y', 'z'].map((seed) => layerOf([{ name: seed, content: noise(seed, 4096) }], sizes)),
    );
    const maps = layers.map((layer, i) => store.open(10 + i, layer));
    for (const first of [0, 1, 2]) {
      make({ filesOf: async () => new Map() });
      begin(1, `order${first}`, maps);
      reads.add(1, address(maps[first]!, 0), 4096, 0);
      reads.add(1, address(maps[0]!, 0), 3 * 4096, 1);
      await recorder.end(1);
      const chunks = (await traceOf(`order${first}`))!.events.map(({ chunk }) => chunk);
      assert.deepEqual(new Set(chunks), new Set(layers.map((layer) => digestOfChunk(layer, 0))), `after ${first}`);
    }
  });

  it('counts a chunk once that two layers share, or one layer has twice', async () => {
    begin(1);
    reads.add(1, address(low!, 2), 128 * KiB, 0);
    reads.add(1, address(up!, 3), 12 * KiB, 10);
    await recorder.end(1);
    const trace = await traceOf('image1');
    assert.ok(trace!.events.every(({ count }) => count === 1));
    assert.equal(recorder.askedBytes, 128 * KiB + 9000);
    assert.equal(recorder.presentBytes, recorder.askedBytes);
  });

  it('counts runs of the same image', async () => {
    for (let run = 1; run <= 3; run++) {
      begin(1);
      reads.add(1, address(low!, 1), 8192, 0);
      await recorder.end(1);
    }
    const trace = await traceOf('image1');
    assert.equal(trace!.runs, 3);
    assert.deepEqual(
      trace!.events.map(({ count }) => count),
      [3],
    );
  });

  it('believes no place in a file that a trace of somebody else cannot have right', async () => {
    const chunk = digestOfChunk(lower!, 1);
    const event = { atMs: 0, chunk, offset: 4096, length: 100, outcome: 'miss', count: 1, path: 'evil' } as const;
    const before = { ...identity('image1'), runs: 1, updatedMs: 0, seesHits: true };
    await traces.save({ ...before, events: [{ ...event, fileOffset: 0 }] });
    begin(1);
    reads.add(1, address(low!, 1), 8192, 0);
    await recorder.end(1);
    assert.ok(lines(await traceOf('image1')).includes('0 b 0+5000 hit'));
  });

  it('keeps two images apart, also where they share layers', async () => {
    begin(1);
    begin(2, 'image2', [up!]);
    reads.add(1, address(low!, 0), 4096, 100);
    reads.add(2, address(up!, 5), 4096, 500);
    reads.add(3, address(up!, 5), 4096, 500);
    reads.add(1, address(low!, 1), 4096, 160);
    reads.add(2, address(up!, 0), 4096, 505);
    await Promise.all([recorder.end(1), recorder.end(2)]);
    assert.deepEqual(lines(await traceOf('image1')), ['0 a 0+100 hit', '60 b 0+5000 hit']);
    assert.equal((await traceOf('image2'))!.events.length, 2);
    assert.equal((await readdir(directory)).length, 2);
  });

  it('ends when nothing was read for five seconds, and hears no reads after it', async () => {
    begin(1);
    reads.add(1, address(low!, 0), 4096, 0);
    pass(4_000);
    reads.add(1, address(low!, 1), 4096, 4_000);
    pass(4_900);
    assert.equal(reads.watched.size, 1);
    pass(300);
    assert.equal(reads.watched.size, 0);
    reads.add(1, address(low!, 2), 4096, 10_000);
    await recorder.end(1);
    assert.equal((await traceOf('image1'))!.events.length, 2);
  });

  it('ends thirty seconds after the first read, however much is read', () => {
    begin(1);
    pass(60_000);
    for (let ms = 0; ms < 29_000; ms += 1000) {
      reads.add(1, address(low!, 0), 4096, ms);
      pass(1000);
    }
    assert.equal(reads.watched.size, 1, 'the first read counts, not the mount');
    for (let ms = 0; ms < 2_000; ms += 1000) {
      reads.add(1, address(low!, 0), 4096, ms);
      pass(1000);
    }
    assert.equal(reads.watched.size, 0);
  });

  it('waits ten minutes for the first read, and writes nothing without one', async () => {
    begin(1);
    pass(590_000);
    assert.equal(reads.watched.size, 1);
    pass(20_000);
    assert.equal(reads.watched.size, 0);
    await recorder.close();
    assert.deepEqual(await readdir(directory), []);
  });

  it('begins anew with a number that was used before: reads of its earlier life are nobody’s', async () => {
    begin(1);
    reads.add(1, address(low!, 0), 4096, 0);
    await recorder.end(1);
    reads.add(1, address(low!, 2), 4096, 5);
    begin(1, 'later');
    reads.add(1, address(low!, 1), 4096, 100_000);
    await recorder.end(1);
    assert.deepEqual(lines(await traceOf('later')), ['0 b 0+5000 hit']);
  });

  it('keeps what it has when the layers of the image are dropped meanwhile', async () => {
    make({ filesOf: async () => Promise.reject(new Error('dropped')) });
    begin(1);
    reads.add(1, address(low!, 1), 4096, 0);
    ledger.forget(1);
    await recorder.end(1);
    assert.deepEqual(lines(await traceOf('image1')), ['0  0+5000 hit']);
  });

  it('lives when its trace cannot be kept', async () => {
    await rm(directory, { recursive: true });
    await writeFile(directory, 'a file');
    begin(1);
    reads.add(1, address(low!, 1), 4096, 0);
    await recorder.end(1);
    assert.equal(recorder.recorded, 0);
  });

  it('passes over addresses that are nobody’s', async () => {
    begin(1);
    for (const [offset, length] of [
      [0, 4096],
      [GiB * 100, MiB],
      [address(low!, 0) - 8192, 8192],
    ] as const)
      reads.add(1, offset, length, 0);
    await recorder.end(1);
    assert.deepEqual(await readdir(directory), []);
  });

  it('keeps no more ranges than a start has', { timeout: 60_000 }, async () => {
    // A layer of the largest chunks, whose bytes nobody needs.
    const count = Math.ceil(MAX_UNITS / 1024) + 10;
    const chunk = 64 * MiB;
    const index = structuredClone({ ...lower!.index, entries: undefined }) as unknown as TestLayer['index'];
    Object.assign(index, { chunkBytes: chunk, pieceBytes: 4 * MiB });
    Object.assign(index.chunks, {
      count,
      digest: new Uint8Array(noise('digests', count * 32)),
      length: new Uint32Array(count).fill(chunk),
      tarOffset: new Float64Array(count),
      fragmentStart: new Uint32Array(count + 1),
      zero: new Uint8Array(count),
    });
    const addresses = Float64Array.from({ length: count }, (_, i) => GiB + i * chunk);
    const huge = new LayerMap(9, { index, addresses, windows: { readWindows: async () => [] }, sources: () => [] });
    mock.method(huge, 'spansOf', () => new Set<number>());
    make({ filesOf: async () => new Map() });
    begin(1, 'huge', [huge]);
    for (let i = 0; i < count; i++) reads.add(1, addresses[i]!, chunk, i);
    pass(100);
    assert.equal(reads.watched.size, 0, 'it has ended');
    assert.equal(recorder.askedBytes, MAX_UNITS * TRACE_UNIT_BYTES);
    await recorder.end(1);
    assert.notEqual(await traceOf('huge'), undefined);
  });

  it('tells how reads met their bytes, and the ledger of what was read', async () => {
    const [first, last] = [[...low!.spansOf(low!.piece(0, 0))][0]!, [...up!.spansOf(up!.piece(5, 0))].at(-1)!];
    begin(1);
    ledger.asked(low!, first, Priority.trace, false);
    ledger.asked(up!, last, Priority.trace, false);
    ledger.asked(up!, 1, Priority.guess, false);
    reads.add(1, address(low!, 0), 4096, 0);
    reads.add(1, address(up!, 5), 4096, 200, true);
    reads.add(1, address(low!, 3), 4096, 300, true);
    await recorder.end(1);
    assert.deepEqual(
      (await traceOf('image1'))!.events.map(({ outcome }) => outcome),
      ['ahead', 'late', 'miss'],
    );
    const { usefulBytes, wastedBytes, prefetchBytes } = ledger.stats();
    assert.ok(usefulBytes > 0);
    assert.equal(wastedBytes, prefetchBytes - usefulBytes, 'the start is over');
  });

  it('judges nothing where the transport does not show hits', async () => {
    Object.assign(reads.capabilities, { seesHits: false });
    begin(1);
    for (let span = 0; span < up!.spanCount; span++) ledger.asked(up!, span, Priority.trace, false);
    reads.add(1, address(low!, 0), 4096, 0, true);
    await recorder.end(1);
    assert.equal(ledger.stats().wastedBytes, 0);
    assert.equal((await traceOf('image1'))!.seesHits, false);
  });

  it('keeps what it has when it is closed', async () => {
    begin(1);
    begin(2, 'image2');
    reads.add(1, address(low!, 0), 4096, 0);
    reads.add(2, address(low!, 0), 4096, 0);
    await recorder.close();
    assert.equal((await readdir(directory)).length, 2);
  });
});
