// The text form of access traces, and how runs become one.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { type Digest, digestOf } from '../../src/digest.ts';
import { errorCode } from '../../src/errors.ts';
import {
  type AccessTrace,
  formatTrace,
  MAX_EVENTS,
  MAX_TRACE_BYTES,
  mergeRun,
  parseTrace,
  TRACE_UNIT_BYTES,
  type TraceRun,
  type TraceUnit,
  traceId,
} from '../../src/prefetch/access-trace.ts';

const layers = [digestOf('bottom'), digestOf('top')];
const identity = { layers, repository: 'registry.example:5000/team/app', tag: '1.0', manifest: digestOf('manifest') };

function unit(chunk: string, number: number, atMs: number, more: Partial<TraceUnit> = {}): TraceUnit {
  const offset = number * TRACE_UNIT_BYTES;
  const base = { chunk: digestOf(chunk), offset, length: TRACE_UNIT_BYTES, atMs, fileOffset: offset };
  return { ...base, outcome: 'miss', path: `usr/lib/${chunk}`, ...more };
}

function run(units: readonly TraceUnit[], more: Partial<TraceRun> = {}): TraceRun {
  return { identity, endedMs: 1_000, seesHits: true, units, ...more };
}

const ranges = (trace: AccessTrace): string[] =>
  trace.events.map(
    ({ path, offset, length, count }) => `${path}@${offset / TRACE_UNIT_BYTES}+${length / TRACE_UNIT_BYTES}x${count}`,
  );

describe('access trace', () => {
  it('reads what it wrote, whatever bytes a path has', () => {
    const path = 'etc/a b%\n\u00ff\u0000é#';
    const trace = mergeRun(undefined, run([unit('a', 0, 3, { path }), unit('b', 7, 9, { outcome: 'ahead' })]));
    assert.deepEqual(parseTrace(formatTrace(trace)), trace);
    assert.match(formatTrace(trace), /^[\n -~]*$/);
  });

  it('keeps order and joins neighbours that were read together', () => {
    const trace = mergeRun(
      undefined,
      run([unit('b', 1, 50), unit('a', 0, 0), unit('a', 1, 0), unit('b', 0, 30), unit('a', 2, 500)]),
    );
    assert.deepEqual(ranges(trace), ['usr/lib/a@0+2x1', 'usr/lib/b@0+2x1', 'usr/lib/a@2+1x1']);
    assert.deepEqual(
      trace.events.map(({ atMs }) => atMs),
      [0, 30, 500],
    );
  });

  it('counts runs, and takes the mean of their times', () => {
    const first = mergeRun(undefined, run([unit('a', 0, 10), unit('b', 0, 100)]));
    const second = mergeRun(first, run([unit('a', 0, 30), unit('c', 0, 5)], { endedMs: 2_000 }));
    assert.equal(second.runs, 2);
    assert.equal(second.updatedMs, 2_000);
    assert.deepEqual(ranges(second), ['usr/lib/c@0+1x1', 'usr/lib/a@0+1x2', 'usr/lib/b@0+1x1']);
    assert.equal(second.events.find(({ path }) => path === 'usr/lib/a')!.atMs, 20);
  });

  it('forgets in time what is read no more, and stays of the same size however often an image starts', () => {
    let trace = mergeRun(undefined, run([unit('old', 0, 0), unit('a', 0, 1)]));
    for (let i = 0; i < 100; i++) trace = mergeRun(trace, run([unit('a', 0, 1)]));
    assert.deepEqual(
      trace.events.map(({ path }) => path),
      ['usr/lib/a'],
    );
    assert.ok(trace.runs <= 16 && trace.events[0]!.count <= trace.runs);
    const many = Array.from({ length: MAX_EVENTS + 10 }, (_, i) => unit(`chunk ${i}`, 0, i * 100));
    assert.equal(mergeRun(trace, run(many)).events.length, MAX_EVENTS);
  });

  it('names an image by its layers alone', () => {
    assert.equal(traceId(layers), traceId([...layers]));
    assert.notEqual(traceId(layers), traceId(layers.toReversed()));
  });

  it('passes over lines that a later version may write, and refuses what is no trace', () => {
    const text = formatTrace(mergeRun(undefined, run([unit('a', 0, 0)])));
    assert.deepEqual(parseTrace(`${text}later words here\n`), parseTrace(text));
    const refused = [
      '',
      'dedup-trace 2\n',
      'dedup-trace 1\nruns 1\n',
      text.replace('runs 1', 'runs 0'),
      text.replace(/^read 0/m, 'read -1'),
      text.replace(' 65536 miss', ' 999999999999 miss'),
      text.replace(' miss ', ' gone '),
      text.replace('sha256:', 'md5:'),
      text.replace(/^(read .*)$/m, '$1 more words'),
      `${text}${'read 1 x\n'}`,
    ];
    for (const wrong of refused) {
      assert.throws(
        () => parseTrace(wrong),
        (error) => errorCode(error) === 'TRACE_INVALID',
        wrong.slice(0, 60),
      );
    }
    const line = text.split('\n').find((l) => l.startsWith('read'))!;
    assert.throws(() => parseTrace(text + `${line}\n`.repeat(MAX_EVENTS)), /more than/);
  });

  it('keeps chunk digests as they are', () => {
    const chunk: Digest = digestOf('a');
    assert.ok(formatTrace(mergeRun(undefined, run([unit('a', 0, 0)]))).includes(chunk.slice(7)));
  });

  it('counts a run once for a range that it names twice', () => {
    const first = mergeRun(undefined, run([unit('a', 0, 0), unit('a', 0, 7)]));
    const second = mergeRun(first, run([unit('a', 0, 0), unit('a', 0, 7)]));
    assert.deepEqual(ranges(first), ['usr/lib/a@0+1x1']);
    assert.deepEqual(ranges(second), ['usr/lib/a@0+1x2']);
  });

  it('writes no more than it reads, and leaves out what came last', () => {
    const name = 'node_modules/'.repeat(60);
    const units = Array.from({ length: MAX_EVENTS }, (_, i) => unit(`${i}`, 0, i * 50, { path: `${name}${i}` }));
    const trace = mergeRun(undefined, run(units));
    const text = formatTrace(trace);
    assert.ok(text.length <= MAX_TRACE_BYTES);
    const read = parseTrace(text);
    assert.ok(read.events.length > 1000 && read.events.length < MAX_EVENTS);
    assert.deepEqual(read.events, trace.events.slice(0, read.events.length));
  });

  it('is merged in bounded time and memory with a trace that was made to take much of both', {
    timeout: 20_000,
  }, () => {
    const line = `read 0 ${'ab'.repeat(32)} 0 ${64 * 1024 * 1024} miss 1 0 big`;
    const head = `dedup-trace 1\nlayer ${layers[0]}\n`;
    const hostile = parseTrace(`${head}${`${line}\n`.repeat(MAX_EVENTS)}`);
    const many = { ...hostile, events: hostile.events.map((event, i) => ({ ...event, chunk: digestOf(`${i}`) })) };
    for (const before of [hostile, many]) {
      const merged = mergeRun(before, run([unit('a', 0, 0)]));
      assert.ok(merged.events.length <= MAX_EVENTS);
      assert.ok(
        merged.events.some(({ chunk }) => chunk === digestOf('a')),
        'the run is in it',
      );
    }
  });

  it('counts no more runs than there were, whatever a trace of somebody else says', () => {
    const hostile = mergeRun(undefined, run([unit('a', 0, 0), unit('b', 0, 5)]));
    const boasting = { ...hostile, events: hostile.events.map((event) => ({ ...event, count: 1_000_000 })) };
    for (const runs of [1, 16, 1_000_000]) {
      const merged = mergeRun(parseTrace(formatTrace({ ...boasting, runs })), run([unit('a', 0, 0)]));
      assert.deepEqual(parseTrace(formatTrace(merged)), merged);
      assert.ok(merged.events.every(({ count }) => count <= merged.runs));
    }
    // A name that would not be read again is not written, and not read from others.
    assert.equal(parseTrace(formatTrace({ ...hostile, tag: 'x'.repeat(100_000) })).tag, '');
    const named = formatTrace(hostile).replace('tag 1.0', `tag ${'x'.repeat(100_000)}`);
    assert.throws(
      () => parseTrace(named),
      (error) => errorCode(error) === 'TRACE_INVALID',
    );
  });

  it('refuses events that end where none can, and so reads whatever it has merged', () => {
    const head = `dedup-trace 1\nlayer ${layers[0]}\n`;
    const event = (offset: number, length: number, fileOffset: number): string =>
      `${head}read 0 ${'ab'.repeat(32)} ${offset} ${length} miss 1 ${fileOffset} big\n`;
    const most = 64 * 1024 * 1024;
    for (const text of [event(most, 1, 0), event(1, most, 0), event(0, 2, Number.MAX_SAFE_INTEGER - 1)])
      assert.throws(
        () => parseTrace(text),
        (error) => errorCode(error) === 'TRACE_INVALID',
      );
    for (const text of [event(most - 1, 1, 0), event(0, most, 0), event(3, most - 3, Number.MAX_SAFE_INTEGER - most)]) {
      const merged = mergeRun(parseTrace(text), run([unit('a', 0, 0)]));
      assert.deepEqual(parseTrace(formatTrace(merged)), merged);
    }
  });
});
