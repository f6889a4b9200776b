// The random-access half of native/inflate: decodeSpans over gzip, zstd and plain runs. Inflation from every restart
// point is tested beside the indexer.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { describe, it } from 'node:test';
import { constants, gzipSync, zstdCompressSync } from 'node:zlib';
import fc from 'fast-check';
import { DedupError } from '../../src/errors.ts';
import { type DecodeJob, native, type RestartPoint, type SpanJob } from '../../src/fs/native.ts';
import { mixed, noise, streams, text } from '../support/gzip-streams.ts';

const NO_WINDOW = new Uint8Array(0);

function startSpan(inputOffset: number, outputOffset: number, outputLength: number): SpanJob {
  return { inputOffset, bits: 0, memberStart: true, window: NO_WINDOW, outputOffset, outputLength };
}

async function pointsOf(gzip: Buffer, spanBytes: number): Promise<RestartPoint[]> {
  const indexer = native().gzipIndexer({ spanBytes });
  const { points } = await indexer.push(gzip);
  await indexer.finish();
  indexer.close();
  return points;
}

/** One job over all spans of a stream, in the order given. */
function jobOf(gzip: Buffer, points: readonly RestartPoint[], plainBytes: number): DecodeJob {
  const spans = points.map((point, i): SpanJob => {
    const end = points[i + 1]?.outOffset ?? plainBytes;
    const { bits, memberStart, window, outOffset, inOffset } = point;
    return { inputOffset: inOffset, bits, memberStart, window, outputOffset: outOffset, outputLength: end - outOffset };
  });
  return { compression: 'gzip', input: gzip, spans, outputLength: plainBytes };
}

async function assertInvalid(work: Promise<unknown>, message?: RegExp): Promise<void> {
  await assert.rejects(work, (error) => {
    assert.ok(error instanceof DedupError && error.code === 'LAYER_INVALID', String(error));
    if (message !== undefined) assert.match(error.message, message);
    return true;
  });
}

describe('decodeSpans', () => {
  it('fills one result from all spans at once, each within its slice, whatever their order', async () => {
    for (const stream of await streams(300_000)) {
      const job = jobOf(stream.gzip, await pointsOf(stream.gzip, 5_000), stream.plain.length);
      assert.ok((await native().decodeSpans(job)).equals(stream.plain), stream.name);
      // Backwards a slice is filled before the one in front of it: writing too far would damage it.
      const backwards = { ...job, spans: job.spans.toReversed() };
      assert.ok((await native().decodeSpans(backwards)).equals(stream.plain), `${stream.name}, backwards`);
    }
  });

  it('stops at the length wanted, at every length, and leaves the bytes after it alone', async () => {
    const plain = mixed(40_000);
    const gzip = gzipSync(plain, { memLevel: 1 });
    const point = (await pointsOf(gzip, 10_000))[1]!;
    const rest = plain.subarray(point.outOffset);
    const span = (outputOffset: number, outputLength: number): SpanJob => {
      const { bits, memberStart, window, inOffset } = point;
      return { inputOffset: inOffset, bits, memberStart, window, outputOffset, outputLength };
    };
    for (let length = 0; length < 600; length++) {
      // The second span fills what follows the first one's slice; both write at about the same time.
      const spans = [span(length, 300), span(0, length)];
      const out = await native().decodeSpans({ compression: 'gzip', input: gzip, spans, outputLength: length + 300 });
      assert.ok(out.equals(Buffer.concat([rest.subarray(0, length), rest.subarray(0, 300)])), `length ${length}`);
    }
  });

  it('needs no more input than the wanted bytes take', async () => {
    const plain = noise(500_000);
    const gzip = gzipSync(plain);
    const out = await native().decodeSpans({
      compression: 'gzip',
      input: gzip.subarray(0, 120_000),
      spans: [startSpan(0, 0, 100_000)],
      outputLength: 100_000,
    });
    assert.ok(out.equals(plain.subarray(0, 100_000)));
  });

  it('goes on through the ends of members, empty ones too, from a header or from the middle of one', async () => {
    const all = await streams(100_000);
    const stream = all.find(({ name }) => name === 'empty members around and between')!;
    const whole = [startSpan(0, 0, stream.plain.length)];
    const job: DecodeJob = { compression: 'gzip', input: stream.gzip, spans: whole, outputLength: stream.plain.length };
    assert.ok((await native().decodeSpans(job)).equals(stream.plain));

    const parts = [text(60_000), text(10), text(60_000)];
    const gzip = Buffer.concat(parts.map((part) => gzipSync(part, { memLevel: 1 })));
    const plain = Buffer.concat(parts);
    const point = (await pointsOf(gzip, 30_000)).find(({ memberStart }) => !memberStart)!;
    const spans = jobOf(gzip, [point], plain.length).spans.map((span) => ({ ...span, outputOffset: 0 }));
    const outputLength = plain.length - point.outOffset;
    const out = await native().decodeSpans({ compression: 'gzip', input: gzip, spans, outputLength });
    assert.ok(out.equals(plain.subarray(point.outOffset)));
  });

  it('gives zeros where no span writes', async () => {
    const plain = text(5_000);
    // Memory that was in use before, if the allocator hands it out again.
    for (let i = 0; i < 20; i++) {
      const spans = [startSpan(0, 1_000, 2_000), startSpan(0, 10_000, 2_000)];
      const job: DecodeJob = { compression: 'gzip', input: gzipSync(plain), spans, outputLength: 20_000 };
      const out = await native().decodeSpans(job);
      const expected = Buffer.alloc(20_000);
      plain.copy(expected, 1_000, 0, 2_000);
      plain.copy(expected, 10_000, 0, 2_000);
      assert.ok(out.equals(expected));
    }
    assert.equal(
      (await native().decodeSpans({ compression: 'none', input: plain, spans: [], outputLength: 0 })).length,
      0,
    );
  });

  it('decodes zstd frames: several in a span, cut short, skippable, without a content size', async () => {
    const parts = [mixed(200_000), text(1), noise(50_000), Buffer.alloc(0), text(300_000)];
    const skippable = Buffer.from([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    for (const contentSize of [0, 1]) {
      const params = { [constants.ZSTD_c_contentSizeFlag]: contentSize, [constants.ZSTD_c_checksumFlag]: 1 };
      const frames = parts.map((part) => zstdCompressSync(part, { params }));
      const input = Buffer.concat([skippable, ...frames.flatMap((frame) => [frame, skippable])]);
      const plain = Buffer.concat(parts);
      for (const length of [1, 199_999, 200_000, 200_001, 200_002, 260_000, plain.length]) {
        const spans = [startSpan(0, 0, length)];
        const out = await native().decodeSpans({ compression: 'zstd', input, spans, outputLength: length });
        assert.ok(out.equals(plain.subarray(0, length)), `content size ${contentSize}, length ${length}`);
      }
      const starts = [0, skippable.length + frames[0]!.length];
      const spans = [startSpan(starts[1]!, 200_000, plain.length - 200_000), startSpan(starts[0]!, 0, 200_000)];
      const out = await native().decodeSpans({ compression: 'zstd', input, spans, outputLength: plain.length });
      assert.ok(out.equals(plain));
    }
  });

  it('copies plain spans', async () => {
    const input = noise(10_000);
    const spans = [startSpan(5_000, 0, 5_000), startSpan(0, 5_000, 5_000)];
    const out = await native().decodeSpans({ compression: 'none', input, spans, outputLength: 10_000 });
    assert.ok(out.equals(Buffer.concat([input.subarray(5_000), input.subarray(0, 5_000)])));
  });

  it('refuses input that ends too early or is damaged, naming the span', async () => {
    const plain = mixed(50_000);
    const packed = { none: plain, gzip: gzipSync(plain), zstd: zstdCompressSync(plain) };
    for (const [compression, whole] of Object.entries(packed) as [DecodeJob['compression'], Buffer][]) {
      const good = startSpan(0, 0, 100);
      const bad = startSpan(0, 100, 50_001);
      const job: DecodeJob = { compression, input: whole, spans: [good, bad], outputLength: 60_000 };
      await assertInvalid(native().decodeSpans(job), /^span 1 .*ends? too early/);
      for (const length of [0, 1, 5, 9, 20, 1_000, whole.length - 20]) {
        const input = whole.subarray(0, length);
        const spans = [startSpan(0, 0, 50_000)];
        await assertInvalid(native().decodeSpans({ compression, input, spans, outputLength: 50_000 }), /^span 0 /);
      }
      const spans = [startSpan(whole.length + 1, 0, 1)];
      await assertInvalid(native().decodeSpans({ compression, input: whole, spans, outputLength: 1 }), /^span 0 /);
    }
    const spans = [startSpan(0, 0, 100)];
    for (const compression of ['gzip', 'zstd'] as const) {
      const input = Buffer.from('this is neither gzip nor a zstd frame, but it is long enough to be one of them');
      await assertInvalid(native().decodeSpans({ compression, input, spans, outputLength: 100 }), /^span 0 /);
    }
  });

  it('refuses restart points that cannot be', async () => {
    const input = gzipSync(text(50_000), { memLevel: 1 });
    const base = { ...startSpan(20, 0, 100), memberStart: false };
    const spans: SpanJob[] = [
      { ...base, bits: 8 },
      { ...base, bits: 1, inputOffset: 0 },
      { ...base, window: new Uint8Array(32_769) },
    ];
    for (const span of spans) {
      const job: DecodeJob = { compression: 'gzip', input, spans: [span], outputLength: 100 };
      await assertInvalid(native().decodeSpans(job), /^span 0 /);
    }
  });

  it('refuses arguments that would write outside the result or twice', async () => {
    const input = gzipSync(text(1_000));
    const refused: [SpanJob[], number][] = [
      [[startSpan(0, 0, 101)], 100],
      [[startSpan(0, 101, 0)], 100],
      [[startSpan(0, 2 ** 53 - 1, 2 ** 53 - 1)], 100],
      [[startSpan(0, -1, 10)], 100],
      [[startSpan(0.5, 0, 10)], 100],
      [[startSpan(0, 0, 51), startSpan(0, 50, 50)], 100],
      [[], 2 ** 40],
    ];
    for (const [spans, outputLength] of refused) {
      const job: DecodeJob = { compression: 'gzip', input, spans, outputLength };
      await assert.rejects(async () => native().decodeSpans(job), { code: 'INVALID_ARGUMENT' });
    }
    const job = { compression: 'lzma', input, spans: [], outputLength: 0 } as unknown as DecodeJob;
    await assert.rejects(async () => native().decodeSpans(job), { code: 'INVALID_ARGUMENT' });
  });

  it('keeps input and windows alive while threads read them', async () => {
    const plain = mixed(300_000);
    const points = await pointsOf(gzipSync(plain), 50_000);
    const running: Promise<Buffer>[] = [];
    for (let i = 0; i < 20; i++) {
      const copies = points.map((point) => ({ ...point, window: Buffer.from(point.window) }));
      running.push(native().decodeSpans(jobOf(gzipSync(plain), copies, plain.length)));
      globalThis.gc?.();
    }
    for (const out of await Promise.all(running)) assert.ok(out.equals(plain));
  });

  it('answers hostile runs with bytes of the length asked or a refusal', async () => {
    const gzips = (await streams(5_000)).map(({ gzip }) => gzip);
    const zstds = [text(5_000), noise(5_000), mixed(5_000)].map((plain) => zstdCompressSync(plain));
    const hostile = fc.record({
      base: fc.nat(),
      zstd: fc.boolean(),
      edits: fc.array(fc.record({ at: fc.nat(), to: fc.nat(255) }), { maxLength: 4 }),
      inputOffset: fc.oneof(fc.constant(0), fc.nat(5_000)),
      bits: fc.nat(9),
      memberStart: fc.boolean(),
      window: fc.uint8Array({ maxLength: 40 }),
      outputLength: fc.oneof(fc.nat(100), fc.nat(9_000)),
    });
    await fc.assert(
      fc.asyncProperty(hostile, async ({ base, zstd, edits, outputLength, ...point }) => {
        const bases = zstd ? zstds : gzips;
        const input = Buffer.from(bases[base % bases.length]!);
        for (const { at, to } of edits) input[at % input.length] = to;
        const spans = [
          { ...point, outputOffset: 0, outputLength },
          { ...point, outputOffset: outputLength, outputLength: 10 },
        ];
        const job: DecodeJob = { compression: zstd ? 'zstd' : 'gzip', input, spans, outputLength: outputLength + 20 };
        try {
          const out = await native().decodeSpans(job);
          assert.equal(out.length, outputLength + 20);
          assert.ok(out.subarray(-10).equals(Buffer.alloc(10)));
        } catch (error) {
          assert.ok(error instanceof DedupError && error.code === 'LAYER_INVALID', String(error));
        }
      }),
      { numRuns: 1_000 },
    );
  });
});

// The library is optional: where it is not installed, zlib does all of it.
if (process.env.DEDUP_NO_ISAL === undefined) {
  it('decodes with ISA-L when it is there, and passes all of this with zlib alone', () => {
    assert.equal(native().inflater(), 'isa-l');
    const env: NodeJS.ProcessEnv = { ...process.env, DEDUP_NO_ISAL: '1' };
    delete env.NODE_TEST_CONTEXT;
    const { status, stdout } = spawnSync(process.execPath, ['--test', import.meta.filename], { env, encoding: 'utf8' });
    assert.equal(status, 0, stdout);
    assert.match(stdout, /pass \d\d/);
  });
} else {
  it('decodes with zlib when it is told to', () => assert.equal(native().inflater(), 'zlib'));
}
