// From a trace to pieces and spans, on layers that the product's own builder has indexed; and with traces made to harm.
import assert from 'node:assert/strict';
import { before, describe, it } from 'node:test';
import { type Digest, digestFromBytes, digestOf } from '../../src/digest.ts';
import { LayerMap, type PieceRef } from '../../src/fs/loadable-layer.ts';
import type { AccessTrace, TraceEvent } from '../../src/prefetch/access-trace.ts';
import { type PlannedSpan, resolveByPath, resolveTrace, spansNeeded } from '../../src/prefetch/planner.ts';
import type { StartTree } from '../../src/prefetch/start-files.ts';
import { type ByteRange, GiB, KiB, MiB, roundUp } from '../../src/units.ts';
import { layerOf, layerOfTar, noise, type TestFile, type TestLayer } from '../support/lazy-store.ts';
import { traceOf } from '../support/sample-trace.ts';
import { tarOf } from '../support/tar.ts';

const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB, compression: 'none' } as const;
const never = (): boolean => false;

/** A layer opened at addresses from `base` on. */
function mapOf(layerId: number, { index }: TestLayer, base: number): LayerMap {
  const { chunks } = index;
  const addresses = new Float64Array(chunks.count);
  let at = base;
  for (let i = 0; i < chunks.count; i++) {
    if (chunks.zero[i] === 1) continue;
    addresses[i] = at;
    at += roundUp(chunks.length[i]!, 4096);
  }
  return new LayerMap(layerId, { index, addresses, windows: { readWindows: async () => [] }, sources: () => [] });
}

function chunkOf(layer: TestLayer, name: string, part = 0): Digest {
  const { entries, chunks } = layer.index;
  const chunk = entries.firstChunk[entries.name.indexOf(name)]! + part;
  return digestFromBytes(chunks.digest.subarray(chunk * 32, chunk * 32 + 32));
}

const spansOf = (pieces: Iterable<PieceRef>, isPresent = never): PlannedSpan[] => [...spansNeeded(pieces, isPresent)];

describe('the planner', () => {
  let [lower, upper]: TestLayer[] = [];
  let [low, up]: LayerMap[] = [];
  const files: TestFile[] = [
    { name: 'small', content: noise('small', 100) },
    { name: 'big', content: noise('big', 1500 * KiB) },
    { name: 'zeros', content: Buffer.alloc(600 * KiB) },
  ];
  before(async () => {
    lower = await layerOf(files, sizes);
    upper = await layerOf([{ name: 'own', content: noise('own', 700 * KiB) }, files[1]!], sizes);
    low = mapOf(1, lower, MiB);
    up = mapOf(2, upper, GiB);
  });

  const resolved = (events: readonly Partial<TraceEvent>[], more: Partial<AccessTrace> = {}) =>
    resolveTrace(traceOf('test', events, more), [low!, up!]);

  it('finds exactly the pieces that a read touched, and the spans that hold them', () => {
    const chunk = chunkOf(lower!, 'big', 1);
    const { pieces, unknown } = resolved([{ chunk, offset: 100 * KiB, length: 64 * KiB }]);
    assert.deepEqual(unknown, []);
    assert.deepEqual(
      pieces.map(({ piece }) => piece),
      [1, 2],
    );
    const planned = spansOf(pieces);
    const wanted = new Set(pieces.flatMap((ref) => [...low!.spansOf(ref)]));
    assert.deepEqual(new Set(planned.map(({ span }) => span)), wanted);
    for (const { span, map, bytes } of planned) assert.equal(bytes, map.compressedRange(span, 1).length);
  });

  it('keeps the order of first need across layers, and names no span twice', () => {
    const events = [
      { chunk: chunkOf(upper!, 'own', 1), offset: 0, length: 64 * KiB },
      { chunk: chunkOf(lower!, 'small'), offset: 0, length: 100 },
      { chunk: chunkOf(upper!, 'own'), offset: 0, length: 512 * KiB },
      { chunk: chunkOf(lower!, 'small'), offset: 0, length: 100 },
    ];
    const planned = spansOf(resolved(events).pieces);
    assert.equal(planned[0]!.map, up);
    assert.equal(planned[0]!.span, [...up!.spansOf(resolved(events).pieces[0]!)][0]);
    assert.equal(new Set(planned.map(({ map, span }) => `${map.layerId} ${span}`)).size, planned.length);
    const layers = planned.map(({ map }) => map.layerId);
    assert.ok(layers.indexOf(1) < layers.lastIndexOf(2), 'the small file before the rest of the other layer');
  });

  it('leaves out what is here, as of when it is asked for', () => {
    const { pieces } = resolved([{ chunk: chunkOf(lower!, 'big'), offset: 0, length: 512 * KiB }]);
    let here = false;
    const planned = spansNeeded(pieces, () => here);
    assert.equal(planned.next().done, false);
    here = true;
    assert.ok([...planned].length <= 1, 'at most the other span of the same piece');
    assert.deepEqual(
      spansOf(pieces, () => true),
      [],
    );
  });

  it('takes a chunk that several layers have from one of them, and names what no layer has', () => {
    const shared = chunkOf(lower!, 'big');
    const gone = digestOf('changed');
    const { pieces, unknown } = resolved([
      { chunk: shared, length: 512 * KiB },
      { chunk: gone, path: 'usr/lib/changed' },
    ]);
    assert.equal(pieces.length, 8);
    assert.ok(pieces.every(({ map }) => map === low));
    assert.deepEqual(
      unknown.map(({ path }) => path),
      ['usr/lib/changed'],
    );
    assert.equal(resolveTrace(traceOf('test', [{ chunk: shared }]), [up!]).pieces[0]!.map, up);
  });

  it('passes over what few runs have read', () => {
    const chunk = chunkOf(lower!, 'small');
    assert.equal(resolved([{ chunk, count: 1 }], { runs: 4 }).pieces.length, 0);
    assert.equal(resolved([{ chunk, count: 2 }], { runs: 4 }).pieces.length, 1);
  });

  it('needs nothing for chunks of zeros, and only what there is of sparse ones', async () => {
    const zeros = chunkOf(lower!, 'zeros');
    assert.deepEqual(resolved([{ chunk: zeros, length: 512 * KiB }]).pieces, []);
    const map = ['GNU.sparse.major', 'GNU.sparse.minor', 'GNU.sparse.name', 'GNU.sparse.realsize'];
    const data = noise('sparse', 4096);
    const head = Buffer.alloc(512);
    head.write(`1\n${300 * KiB}\n4096\n`);
    const pax = Object.fromEntries(map.map((key, i) => [key, ['1', '0', 'hole', String(400 * KiB)][i]!]));
    const tar = tarOf([{ name: 'hole', content: Buffer.concat([head, data]), pax }]);
    const sparse = await layerOfTar(tar, [], sizes);
    const opened = mapOf(3, sparse, 2 * GiB);
    const { pieces } = resolveTrace(traceOf('s', [{ chunk: chunkOf(sparse, 'hole'), length: 400 * KiB }]), [opened]);
    const planned = spansOf(pieces);
    assert.ok(planned.length >= 1 && planned.length <= 2, `${planned.length} spans`);
  });

  /** The tree of an image in which `new/big` is what the upper layer has as `own`. */
  const tree: StartTree = {
    file: (path) => {
      if (path === 'broken') throw new RangeError('metadata');
      if (path === 'torn') return { path, size: 100, ranges: () => assert.fail('metadata') };
      if (path !== 'new/big') return undefined;
      return {
        path,
        size: 700 * KiB,
        ranges: (offset, length): ByteRange[] => [
          {
            offset: GiB + Math.floor(offset / 4096) * 4096,
            length: roundUp(offset + length, 4096) - Math.floor(offset / 4096) * 4096,
          },
        ],
      };
    },
  };
  const byPath = (events: readonly Partial<TraceEvent>[]): PieceRef[] =>
    resolveByPath(traceOf('test', events).events, tree, [low!, up!]);

  it('finds changed files by their names, in the same places', () => {
    const pieces = byPath([{ path: 'new/big', fileOffset: 130 * KiB, length: 64 * KiB }]);
    assert.deepEqual(
      pieces.map(({ chunk, piece }) => [chunk, piece]),
      [
        [0, 2],
        [0, 3],
      ],
    );
    const across = byPath([{ path: 'new/big', fileOffset: 500 * KiB, length: 64 * KiB }]);
    assert.deepEqual(
      across.map(({ chunk, piece }) => [chunk, piece]),
      [
        [0, 7],
        [1, 0],
      ],
    );
  });

  it('finds nothing where there is nothing: no name, no file, beyond its end, in damaged metadata', () => {
    const nowhere = ['', 'none', 'broken', 'torn', '../../etc/shadow', '\0', 'a/'.repeat(2000)];
    assert.deepEqual(byPath(nowhere.map((path) => ({ path }))), []);
    assert.deepEqual(byPath([{ path: 'new/big', fileOffset: 700 * KiB }]), []);
    assert.deepEqual(byPath([{ path: 'new/big', fileOffset: Number.MAX_SAFE_INTEGER, length: 64 * MiB }]), []);
  });

  it('stays within a chunk whatever offsets and lengths a trace names', () => {
    const chunk = chunkOf(lower!, 'big', 2);
    const hostile = [0, 1, 64 * KiB, 476 * KiB, 477 * KiB, 64 * MiB, 2 ** 40].flatMap((offset) =>
      [1, 64 * MiB, 2 ** 40].map((length) => ({ chunk, offset, length })),
    );
    for (const { map, piece, length, address } of resolved(hostile).pieces) {
      assert.ok(length > 0 && piece * 64 * KiB < 476 * KiB + 1);
      assert.notEqual(map.chunkAt(address), undefined);
    }
  });

  it('is done with a hostile trace in bounded time and memory', { timeout: 30_000 }, () => {
    const chunk = chunkOf(lower!, 'big');
    const start = digestFromBytes(Buffer.alloc(32)).slice(0, -8);
    const events: Partial<TraceEvent>[] = Array.from({ length: 20_000 }, (_, i) => ({
      // Digests that all begin alike; long reads of one chunk; one file again and again.
      chunk: i % 2 === 0 ? chunk : (`${start}${i.toString(16).padStart(8, '0')}` as Digest),
      length: 64 * MiB,
      path: 'new/big',
      fileOffset: 0,
    }));
    const before = performance.now();
    const { pieces, unknown } = resolved(events);
    const found = resolveByPath(unknown, tree, [low!, up!]);
    const planned = spansOf([...pieces, ...found]);
    assert.ok(performance.now() - before < 5_000);
    assert.ok(pieces.length < 250_000 && found.length < 250_000);
    assert.ok(planned.length <= low!.spanCount + up!.spanCount);
  });

  describe('the chunks of an address range', () => {
    it('are those with a byte in it, ascending', () => {
      const chunks = (start: number, end: number): number[] => [...low!.chunksIn(start, end)];
      const { addresses } = low!.layer;
      assert.deepEqual(chunks(0, MiB), []);
      assert.deepEqual(chunks(0, MiB + 1), [0]);
      assert.deepEqual(chunks(addresses[1]!, addresses[1]! + 1), [1]);
      assert.deepEqual(chunks(addresses[1]! - 1, addresses[1]!), [], 'the rest of a block');
      assert.deepEqual(chunks(addresses[1]!, addresses[2]! + 4096), [1, 2]);
      assert.deepEqual(chunks(0, 2 ** 50), [0, 1, 2, 3]);
      assert.deepEqual(chunks(GiB, 2 * GiB), []);
    });
  });
});
