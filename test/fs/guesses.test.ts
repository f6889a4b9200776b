// What is fetched around the misses of a start, that it is only where the link has room, and that guesses change no byte.
import assert from 'node:assert/strict';
import { afterEach, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { FetchAhead, type FetchAheadOptions } from '../../src/fs/fetch-ahead.ts';
import { LayerMap } from '../../src/fs/loadable-layer.ts';
import { KiB } from '../../src/units.ts';
import { LoaderRig, layerOf, MemoryBlobs, noise, quiet, type TestLayer } from '../support/lazy-store.ts';

const SPAN_BYTES = 128 * KiB;
const FILES = 96;

describe('guesses', () => {
  let layer: TestLayer;
  before(async () => {
    // Files that fill a span each.
    const content = (i: number) => noise(`guess${i}`, SPAN_BYTES - 1024);
    const files = Array.from({ length: FILES }, (_, i) => ({ name: `f${i}`, content: content(i) }));
    layer = await layerOf(files, { compression: 'none', spanBytes: SPAN_BYTES, chunkBytes: 512 * KiB });
  });

  const rigs: LoaderRig[] = [];
  afterEach(async () => {
    for (const rig of rigs.splice(0)) await rig.remove();
  });

  /** Spans that are fetched beside misses in `spans`, on a link that carries `room` spans in a round trip. */
  function guessed(
    spans: readonly number[],
    room: number,
    options: Partial<FetchAheadOptions> = {},
    prepare: (ahead: FetchAhead) => void = () => {},
  ): number[] {
    const fetched: number[] = [];
    const ahead = new FetchAhead({
      fetch: async (_map, span) => void fetched.push(span),
      roundTripBytes: () => room * SPAN_BYTES,
      guess: true,
      isPresent: () => false,
      usefulness: () => undefined,
      log: quiet,
      ...options,
    });
    const addresses = Float64Array.from({ length: layer.index.chunks.count }, (_, i) => (i + 1) * 1024 * KiB);
    const windows = { readWindows: async () => [] };
    const map = new LayerMap(1, { index: layer.index, addresses, windows, sources: () => [] });
    prepare(ahead);
    for (const span of spans) ahead.onMiss(map, new Set([span]));
    return fetched;
  }

  const START = [10, 60, 12, 80, 30];

  it('are the spans nearest to the misses of a burst, as many as a round trip carries', () => {
    assert.deepEqual(guessed(START.slice(0, 3), 5), [], 'three misses are no start');
    const four = guessed(START.slice(0, 4), 5);
    assert.equal(four.length, 5);
    assert.equal(four[0], 11, 'between two misses');
    for (const span of four) assert.ok(START.some((miss) => Math.abs(miss - span) === 1));
    assert.equal(guessed(START, 5).length, 10);
    assert.equal(guessed(START.slice(0, 4), 100).length, 8, 'never more than eight at a miss');
  });

  it('are none where a round trip carries fewer than three spans', () => {
    assert.deepEqual(guessed(START, 2.9), []);
    assert.ok(guessed(START, 3).length > 0);
  });

  it('are none when there are to be none, nor of what is here', () => {
    assert.deepEqual(guessed(START, 5, { guess: false }), []);
    assert.deepEqual(guessed(START, 5, { isPresent: () => true }), []);
  });

  it('are fewer where fewer than usual were read, none where hardly any was, and never more than the link carries', () => {
    const at = (useful: number | undefined): number =>
      guessed(START.slice(0, 4), 6, { usefulness: () => useful }).length;
    assert.deepEqual([undefined, 1, 0.4, 0.2, 0.1, 0].map(at), [6, 6, 6, 3, 0, 0]);
  });

  it('are none while a trace tells what is read, and come back when its start is over or it is not replayed', (t) => {
    let now = 1000;
    t.mock.method(performance, 'now', () => now);
    const after = (ms: number) => (ahead: FetchAhead) => {
      ahead.foresee([1, 2], true);
      now += ms;
    };
    assert.deepEqual(guessed(START, 5, {}, after(0)), []);
    assert.deepEqual(guessed(START, 5, {}, after(60_000)), []);
    assert.ok(guessed(START, 5, {}, after(121_000)).length > 0);
    const taken = (ahead: FetchAhead): void => {
      ahead.foresee([1], true);
      ahead.foresee([1], false);
    };
    assert.ok(guessed(START, 5, {}, taken).length > 0);
    const dropped = (ahead: FetchAhead): void => {
      ahead.foresee([1], true);
      ahead.forget(1);
    };
    assert.ok(guessed(START, 5, {}, dropped).length > 0);
  });

  it('change no byte of what is read', async () => {
    const registry = new MemoryBlobs(layer);
    registry.misbehave = async ({ range }) => {
      await sleep(10 + range.length / 100_000);
      return undefined;
    };
    const rig = await LoaderRig.create({ guess: true });
    rigs.push(rig);
    const stored = await rig.add(layer, [{ host: 'one', reader: registry }]);
    for (let i = 0; i < FILES; i++) {
      const file = (i * 37) % FILES;
      const read = await rig.readFile(stored, `f${file}`);
      assert.ok(read.equals(stored.layer.files[file]!.content), `f${file} differs`);
    }
  });
});
