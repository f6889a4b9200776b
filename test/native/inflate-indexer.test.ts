// The streaming half of native/inflate: output, restart points and refusals of GzipIndexer.
import assert from 'node:assert/strict';
import { before, describe, it } from 'node:test';
import { deflateSync, gunzipSync, gzipSync, inflateRawSync } from 'node:zlib';
import fc from 'fast-check';
import { DedupError } from '../../src/errors.ts';
import { native, type RestartPoint } from '../../src/fs/native.ts';
import { mixed, noise, pseudoRandom, type Stream, streams } from '../support/gzip-streams.ts';

const WINDOW_BYTES = 32768;

interface Indexed {
  readonly output: Buffer;
  readonly points: RestartPoint[];
}

/** Pushes `gzip` in the parts that `cuts` (ascending offsets) make of it. */
async function index(gzip: Buffer, spanBytes: number, cuts: readonly number[] = []): Promise<Indexed> {
  const indexer = native().gzipIndexer({ spanBytes });
  const outputs: Buffer[] = [];
  const points: RestartPoint[] = [];
  let from = 0;
  let outBytes = 0;
  try {
    for (const to of [...cuts, gzip.length]) {
      const pushed = await indexer.push(gzip.subarray(from, to));
      for (const point of pushed.points) {
        assert.ok(point.outOffset >= outBytes, 'a point lies in the output it comes with');
        assert.ok(point.outOffset <= outBytes + pushed.output.length, 'a point lies in the output it comes with');
      }
      outputs.push(pushed.output);
      points.push(...pushed.points);
      outBytes += pushed.output.length;
      from = to;
    }
    await indexer.finish();
  } finally {
    indexer.close();
  }
  return { output: Buffer.concat(outputs), points };
}

function every(step: number, length: number): number[] {
  return Array.from({ length: Math.floor((length - 1) / step) }, (_, i) => (i + 1) * step);
}

/** The output between each point and the next, inflated from the point alone. */
async function inflateFromEachPoint(gzip: Buffer, { output, points }: Indexed): Promise<void> {
  for (const [i, point] of points.entries()) {
    const length = (points[i + 1]?.outOffset ?? output.length) - point.outOffset;
    const keep = point.bits > 0 ? 1 : 0;
    const decoded = await native().decodeSpans({
      compression: 'gzip',
      input: gzip.subarray(point.inOffset - keep),
      spans: [{ ...point, inputOffset: keep, outputOffset: 0, outputLength: length }],
      outputLength: length,
    });
    const expected = output.subarray(point.outOffset, point.outOffset + length);
    assert.ok(decoded.equals(expected), `wrong bytes from the point at ${point.outOffset}`);
  }
}

async function assertInvalid(work: Promise<unknown>): Promise<void> {
  await assert.rejects(work, (error) => error instanceof DedupError && error.code === 'LAYER_INVALID');
}

describe('gzip indexer', () => {
  let all: Stream[];
  before(async () => {
    all = await streams(200_000);
  });

  it('gives the bytes of every kind of stream, and inflation from every restart point gives them again', async () => {
    for (const stream of all) {
      const indexed = await index(stream.gzip, 20_000, every(10_007, stream.gzip.length));
      assert.ok(indexed.output.equals(stream.plain), stream.name);
      await inflateFromEachPoint(stream.gzip, indexed);
    }
  });

  it('places points at the start, then at the first boundary after each span, with the whole window', async () => {
    for (const stream of all) {
      const { output, points } = await index(stream.gzip, 20_000);
      const first = points[0];
      assert.ok(first?.memberStart && first.outOffset === 0 && first.inOffset === 0 && first.bits === 0, stream.name);
      for (let i = 1; i < points.length; i++) {
        const point = points[i]!;
        assert.ok(point.outOffset - points[i - 1]!.outOffset >= 20_000, `${stream.name}: points too near`);
        assert.ok(point.outOffset < output.length, `${stream.name}: a span without bytes`);
        assert.ok(point.bits <= 7);
        assert.equal(point.window.length === 0, point.memberStart, stream.name);
        const start = point.outOffset - point.window.length;
        assert.ok(point.window.equals(output.subarray(start, point.outOffset)), `${stream.name}: window`);
        assert.ok(point.window.length <= WINDOW_BYTES);
      }
    }
    const flushes = all.find((stream) => stream.name === 'sync flushes')!;
    const { points } = await index(flushes.gzip, 20_000);
    assert.ok(points.length >= 8, 'boundaries every 7,001 bytes give a point every 21,003');
  });

  it('uses a boundary that lies exactly one span after the last point', async () => {
    const flushes = all.find((stream) => stream.name === 'sync flushes')!;
    const expected = Array.from({ length: Math.ceil(flushes.plain.length / 7_001) }, (_, i) => i * 7_001);
    for (const cuts of [[], every(1_000, flushes.gzip.length)]) {
      const { points } = await index(flushes.gzip, 7_001, cuts);
      assert.deepEqual(
        points.map(({ outOffset }) => outOffset),
        expected,
      );
    }
  });

  it('gives points from which an inflater that is not ours reads on, where they are byte-aligned', async () => {
    let aligned = 0;
    for (const stream of all) {
      if (stream.name.includes('member')) continue;
      const { points } = await index(stream.gzip, 5_000);
      for (const point of points.filter(({ bits, memberStart }) => bits === 0 && !memberStart)) {
        const tail = inflateRawSync(stream.gzip.subarray(point.inOffset, -8), { dictionary: point.window });
        assert.ok(tail.equals(stream.plain.subarray(point.outOffset)), stream.name);
        aligned++;
      }
    }
    assert.ok(aligned > 3, 'stored blocks end at whole bytes');
  });

  it('uses points without a window where members start, and no window reaches into an earlier member', async () => {
    const small = all.find((stream) => stream.name === 'many small members')!;
    const { points } = await index(small.gzip, 10_000);
    assert.ok(points.length > 10);
    assert.ok(points.every((point) => point.memberStart && point.window.length === 0));
    const large = all.find((stream) => stream.name === 'two large members')!;
    const second = Math.floor(large.plain.length / 3);
    const found = (await index(large.gzip, 5_000)).points.filter((point) => point.outOffset > second);
    assert.ok(found.length > 3);
    for (const point of found) assert.equal(point.window.length, Math.min(WINDOW_BYTES, point.outOffset - second));
  });

  it('gives the same bytes and points however the input is split', async () => {
    for (const stream of await streams(40_000)) {
      const whole = await index(stream.gzip, 4_096);
      for (const step of [1, 13, 101, 1000]) {
        if (stream.gzip.length / step > 1_500) continue;
        const split = await index(stream.gzip, 4_096, every(step, stream.gzip.length));
        assert.ok(split.output.equals(whole.output), `${stream.name}, parts of ${step}`);
        assert.deepEqual(split.points, whole.points, `${stream.name}, parts of ${step}`);
      }
    }
  });

  it('takes a cut at every byte of a small stream of several members', async () => {
    const plain = mixed(20_000).subarray(11_000, 13_000);
    const parts = [plain.subarray(0, 700), plain.subarray(700, 701), plain.subarray(701)];
    const gzip = Buffer.concat(parts.map((part) => gzipSync(part, { memLevel: 1 })));
    const whole = await index(gzip, 256);
    assert.ok(whole.output.equals(plain));
    for (let cut = 0; cut <= gzip.length; cut++) assert.deepEqual(await index(gzip, 256, [cut]), whole);
  });

  it('returns everything one push gives, also when that is a thousand times the input', async () => {
    const gzip = gzipSync(Buffer.alloc(64 << 20), { level: 9 });
    assert.ok(gzip.length < 70_000);
    const { output, points } = await index(gzip, 1 << 20);
    assert.equal(output.length, 64 << 20);
    assert.ok(points.length > 1);
    assert.ok(output.equals(Buffer.alloc(64 << 20)));
  });

  it('refuses a stream that ends too early, at every byte', async () => {
    const gzip = Buffer.concat([gzipSync('a first member of this stream'), gzipSync('and a second one')]);
    const first = gzipSync('a first member of this stream').length;
    for (let length = 0; length < gzip.length; length++) {
      if (length !== first) await assertInvalid(index(gzip.subarray(0, length), 1000));
    }
    assert.equal((await index(gzip.subarray(0, first), 1000)).output.toString(), 'a first member of this stream');
  });

  it('refuses a wrong CRC, a wrong length, and anything after the last member, zeros too', async () => {
    const gzip = gzipSync(mixed(50_000));
    for (const back of [1, 4, 5, 8]) {
      const bad = Buffer.from(gzip);
      bad[bad.length - back]! ^= 0x10;
      await assertInvalid(index(bad, 1000));
    }
    for (const tail of [Buffer.alloc(1), Buffer.alloc(512), Buffer.from('garbage'), gzip.subarray(0, 20)]) {
      await assertInvalid(index(Buffer.concat([gzip, tail]), 1000));
    }
  });

  it('refuses what is not gzip, and a zlib stream', async () => {
    await assertInvalid(index(Buffer.from('this is not a gzip stream'), 1000));
    await assertInvalid(index(deflateSync('content'), 1000));
    await assertInvalid(index(Buffer.alloc(4096), 1000));
  });

  it('stays failed after bad input, and says CLOSED after close', async () => {
    const indexer = native().gzipIndexer({ spanBytes: 1000 });
    await assertInvalid(indexer.push(Buffer.from('not gzip')));
    await assertInvalid(indexer.push(gzipSync('good')));
    await assertInvalid(indexer.finish());
    indexer.close();
    indexer.close();
    await assert.rejects(async () => indexer.push(gzipSync('good')), { code: 'CLOSED' });
    await assert.rejects(async () => indexer.finish(), { code: 'CLOSED' });
  });

  it('works on queued pushes in order, refuses too many, and survives a close while they wait', async () => {
    const plain = mixed(4_000_000);
    const gzip = gzipSync(plain);
    const indexer = native().gzipIndexer({ spanBytes: 100_000 });
    const step = Math.ceil(gzip.length / 4);
    const queued = [0, 1, 2, 3].map((i) => indexer.push(gzip.subarray(i * step, (i + 1) * step)));
    const ending = indexer.finish();
    const more = Array.from({ length: 20 }, () => assert.rejects(async () => indexer.push(Buffer.alloc(1_000))));
    await assert.rejects(async () => indexer.push(Buffer.alloc(1)), { code: 'INVALID_ARGUMENT' });
    indexer.close();
    const outputs = await Promise.all(queued);
    await ending;
    assert.ok(Buffer.concat(outputs.map(({ output }) => output)).equals(plain));
    await Promise.all(more);
  });

  it('writes output to memory it is given, again and again, and to its own when that is too small', async () => {
    const plain = mixed(1_000_000);
    const gzip = Buffer.concat([gzipSync(plain), gzipSync(Buffer.alloc(3_000_000)), gzipSync(plain)]);
    const expected = await index(gzip, 100_000);
    const indexer = native().gzipIndexer({ spanBytes: 100_000 });
    const memory = Buffer.alloc(WINDOW_BYTES + 300_000, 0xee);
    const outputs: Buffer[] = [];
    const points: RestartPoint[] = [];
    const used = { given: 0, own: 0 };
    for (let at = 0; at < gzip.length; at += 20_000) {
      const pushed = await indexer.push(gzip.subarray(at, at + 20_000), memory);
      if (pushed.output === undefined) {
        assert.equal(pushed.start, WINDOW_BYTES);
        outputs.push(Buffer.from(memory.subarray(pushed.start, pushed.start + pushed.length!)));
        used.given++;
      } else {
        outputs.push(pushed.output);
        used.own++;
      }
      points.push(...pushed.points);
    }
    await indexer.finish();
    const small = native().gzipIndexer({ spanBytes: 100_000 });
    assert.ok((await small.push(gzipSync(plain), Buffer.alloc(100))).output!.equals(plain));
    assert.ok(used.given > 1 && used.own > 0, JSON.stringify(used));
    assert.ok(Buffer.concat(outputs).equals(expected.output));
    assert.deepEqual(points, expected.points);
    await assert.rejects(async () => small.push(Buffer.alloc(1), 'text' as unknown as Buffer), {
      code: 'INVALID_ARGUMENT',
    });
  });

  it('refuses options that make no sense', async () => {
    for (const spanBytes of [0, -1, 1.5, Number.NaN]) {
      assert.throws(() => native().gzipIndexer({ spanBytes }), { code: 'INVALID_ARGUMENT' });
    }
  });

  it('accepts a damaged stream only if it still gives what another inflater finds in it', async () => {
    const bases = (await streams(6_000)).map((stream) => stream.gzip);
    const mutation = fc.record({
      base: fc.nat(bases.length - 1),
      edits: fc.array(fc.record({ at: fc.nat(), to: fc.nat(255) }), { minLength: 1, maxLength: 4 }),
      cut: fc.option(fc.nat(), { freq: 4 }),
      splitAt: fc.nat(),
    });
    await fc.assert(
      fc.asyncProperty(mutation, async ({ base, edits, cut, splitAt }) => {
        let gzip = Buffer.from(bases[base]!);
        for (const { at, to } of edits) gzip[at % gzip.length] = to;
        if (cut !== null) gzip = gzip.subarray(0, cut % gzip.length);
        let indexed: Indexed;
        try {
          indexed = await index(gzip, 500, [splitAt % (gzip.length + 1)]);
        } catch (error) {
          assert.ok(error instanceof DedupError && error.code === 'LAYER_INVALID', String(error));
          return;
        }
        assert.ok(indexed.output.equals(gunzipSync(gzip)));
        await inflateFromEachPoint(gzip, indexed);
      }),
      { numRuns: 300 },
    );
  });

  it('never does more than refuse random bytes', async () => {
    for (let i = 0; i < 300; i++) {
      const bytes = noise(1 + pseudoRandom(500));
      await assertInvalid(index(bytes, 100));
      await assertInvalid(index(Buffer.concat([Buffer.from([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]), bytes]), 100));
    }
  });
});
