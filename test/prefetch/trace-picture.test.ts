// The terminal picture of a trace, its layout and its figures: what a person reads off them.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { stripVTControlCharacters } from 'node:util';
import { layOut } from '../../src/prefetch/trace-layout.ts';
import { tracePicture } from '../../src/prefetch/trace-picture.ts';
import { summarize } from '../../src/prefetch/trace-summary.ts';
import { KiB } from '../../src/units.ts';
import { pythonStart, traceOf } from '../support/sample-trace.ts';

describe('layout of a trace', () => {
  it('gives large files a band of their own, gathers small ones by directory, and orders all by their first read', () => {
    const { bands } = layOut(pythonStart(), 16);
    assert.deepEqual(
      bands.map(({ label }) => label),
      [
        'usr/local/bin/python3.12',
        'usr/lib/x86_64-linux-gnu/libc.so.6',
        '22 other files',
        'usr/local/lib/python3.12/asyncio/ (160 files)',
        'usr/lib/x86_64-linux-gnu/libcrypto.so.3',
        'app/venv/lib/site-packages/django/core/ (120 files)',
        'app/data/köln <&> "catalogue".db',
      ],
    );
    const total = bands.reduce((sum, { bytes }) => sum + bytes, 0);
    assert.equal(total, summarize(pythonStart()).bytes);
  });

  it('has no more bands than there is room for, and every mark within its band', () => {
    const paths = Array.from({ length: 300 }, (_, i) => ({
      path: `d${i % 40}/${'x/'.repeat(i % 30)}f${i}`,
      length: 1 + i,
    }));
    for (const most of [2, 3, 7, 20]) {
      const { bands, marks } = layOut(traceOf('many', paths), most);
      assert.ok(bands.length <= most, `${bands.length} of ${most}`);
      for (const { band, from, length } of marks) assert.ok(from >= 0 && from + length <= bands[band]!.bytes);
    }
  });

  it('puts a range that is read twice, in two parts, at one place', () => {
    const reads = [
      { path: 'a', offset: 128 * KiB },
      { path: 'a', offset: 0, length: 160 * KiB },
    ];
    const { bands, marks } = layOut(traceOf('twice', reads), 4);
    assert.deepEqual(bands, [{ label: 'a', bytes: 192 * KiB }]);
    assert.deepEqual(
      marks.map(({ from }) => from),
      [128 * KiB, 0],
    );
  });
});

describe('figures of a trace', () => {
  it('add up by outcome and by time', () => {
    const summary = summarize(pythonStart());
    const sum = (of: readonly { bytes: number }[]) => of.reduce((total, { bytes }) => total + bytes, 0);
    assert.equal(sum(Object.values(summary.outcomes)), summary.bytes);
    assert.equal(sum(summary.buckets.flatMap(({ outcomes }) => Object.values(outcomes))), summary.bytes);
    assert.ok(summary.buckets.length <= 12 && summary.buckets.at(-1)!.toMs > summary.durationMs);
    assert.equal(summary.files.length, 10);
    assert.equal(summary.files[0]!.name, 'app/data/köln <&> "catalogue".db');
    const { hit, ahead } = summary.outcomes;
    assert.equal(summary.presentShare, (hit.bytes + ahead.bytes) / summary.bytes);
  });

  it('do not say what was present where only misses are seen', () => {
    const trace = traceOf('blind', [{}], { seesHits: false });
    assert.equal(summarize(trace).presentShare, undefined);
    assert.match(tracePicture(trace, { width: 80, colour: false }), /Reads of present bytes are not in this trace/);
  });
});

describe('terminal picture of a trace', () => {
  it('shows name, bands, a time axis, a legend and the figures', () => {
    const text = tracePicture(pythonStart(), { width: 120, colour: false });
    assert.match(text, /^registry\.example\/team\/app:3\.12\n4 runs, .*528 reads of 306 files, 20\.3 MiB in 1\.95 s\n/);
    assert.match(text, /usr\/local\/bin\/python3\.12 +2\.5 MiB ┤[#+]/);
    assert.match(text, /└┴─+┴/);
    assert.match(text, /0 ms +500 ms +1000 ms/);
    assert.match(text, /# miss: was fetched for the read/);
    assert.match(text, /miss +139 +6\.1 MiB +30 %/);
    assert.match(text, /Here when asked for: 54 % of the bytes\./);
    assert.match(text, /1800–2000 ms +20 .*█/);
  });

  it('keeps to the width it is given, and says the same in colours', () => {
    for (const width of [60, 80, 133, 300]) {
      const plain = tracePicture(pythonStart(), { width, colour: false });
      const coloured = tracePicture(pythonStart(), { width, colour: true });
      assert.ok(coloured.includes('\x1b[1;31m') && /[\u2801-\u28ff]/.test(coloured));
      assert.ok(!plain.includes('\x1b'));
      for (const text of [plain, stripVTControlCharacters(coloured)]) {
        const lines = text.split('\n').slice(2); // the head is a sentence
        const longest = Math.max(...lines.map((line) => Array.from(line).length));
        assert.ok(longest <= width, `${longest} of ${width}`);
      }
    }
  });

  it('draws one read, and says of none that there is none', () => {
    const one = tracePicture(traceOf('one', [{ path: 'bin/sh' }]), { width: 80, colour: false });
    assert.match(one, /1 read of 1 file, 64\.0 KiB/);
    assert.match(one, /bin\/sh +64\.0 KiB ┤#\n/);
    assert.doesNotMatch(one, /NaN|undefined|Infinity/);
    const none = tracePicture(traceOf('none'), { width: 80, colour: true });
    assert.match(none, /No read was recorded/);
    assert.doesNotMatch(none, /NaN|undefined|Infinity/);
  });

  it('shows the worst of several outcomes that meet at one place', () => {
    const reads = (['miss', 'hit', 'late'] as const).map((outcome, at) => ({
      path: 'a',
      offset: at,
      length: 1,
      atMs: 0,
      outcome,
    }));
    const text = tracePicture(traceOf('met', [...reads, { path: 'b', atMs: 60_000 }]), { width: 60, colour: false });
    assert.match(text, /^a .*┤#$/m);
  });

  it('does not let names of a trace steer the terminal', () => {
    const trace = traceOf('evil', [{ path: 'bin/\x1b[2Jx\u009bm\nz' }], {
      repository: 'r\x1b]0;title\x07',
      tag: '\r1',
    });
    const text = tracePicture(trace, { width: 80, colour: false });
    assert.doesNotMatch(text.replaceAll('\n', ''), /\p{Cc}/u);
  });
});
