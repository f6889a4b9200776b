// The SVG of a trace: well-formed whatever the trace names, with words for those who do not see it.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { TraceEvent } from '../../src/prefetch/access-trace.ts';
import { OUTCOMES } from '../../src/prefetch/access-trace.ts';
import { traceChart } from '../../src/prefetch/trace-chart.ts';
import { pythonStart, traceOf } from '../support/sample-trace.ts';

/** Fails on what an XML parser would refuse in the subset that charts use: every tag closed, text and values escaped. */
function assertWellFormed(svg: string): void {
  const open: string[] = [];
  let at = 0;
  const tag = /<(\/?)([a-zA-Z]+)((?: [a-zA-Z][a-zA-Z0-9-]*="[^"<]*")*)(\/?)>/y;
  while (at < svg.length) {
    const next = svg.indexOf('<', at);
    const text = svg.slice(at, next < 0 ? undefined : next);
    // A style sheet has no entities; its text has neither "<" nor "&".
    assert.doesNotMatch(text, /&(?!#\d+;)/, text.slice(0, 100));
    if (next < 0) break;
    tag.lastIndex = next;
    const match = tag.exec(svg);
    assert.ok(match, svg.slice(next, next + 100));
    const [whole, closes, name, attributes, empty] = match;
    assert.doesNotMatch(attributes!, /&(?!#\d+;)/);
    if (closes === '/') assert.equal(open.pop(), name);
    else if (empty === '') open.push(name!);
    at = next + whole.length;
  }
  assert.deepEqual(open, []);
  assert.doesNotMatch(svg, /NaN|undefined|Infinity/);
}

describe('chart of a trace', () => {
  it('is one well-formed file with title, description, a legend and a mark of each outcome', () => {
    const svg = traceChart(pythonStart());
    assertWellFormed(svg);
    assert.match(svg, /^<svg xmlns="http:\/\/www\.w3\.org\/2000\/svg" .*role="img" aria-labelledby="title desc"/);
    assert.match(svg, /<title id="title">Reads of a start of registry\.example\/team\/app:3\.12<\/title>/);
    assert.match(svg, /<desc id="desc">4 runs: 20\.3 MiB in 528 reads of 306 files within 1\.95 s; 54 % were here/);
    assert.match(svg, /@media \(prefers-color-scheme: dark\)/);
    for (const outcome of OUTCOMES) {
      assert.ok(svg.includes(`.o-${outcome} {`));
      assert.match(svg, new RegExp(`class="o-${outcome}"><title>`));
    }
    assert.match(svg, /<title>usr\/lib\/x86_64-linux-gnu\/libc\.so\.6: 64\.0 KiB at 12 ms, ahead<\/title>/);
  });

  it('escapes every name', () => {
    const names = { repository: '<script>alert(1)</script>', tag: `"'&]]>` };
    const svg = traceChart(traceOf('x', [{ path: '</title><script>&amp;"\x00\x1b\ud800' }], names));
    assertWellFormed(svg);
    assert.doesNotMatch(svg, /<script/);
    assert.doesNotMatch(svg.replaceAll('\n', ''), /\p{Cc}/u, 'XML cannot carry them');
  });

  it('draws one read, reads at one time, and says of none that there is none', () => {
    assertWellFormed(traceChart(traceOf('one', [{}])));
    const same = Array.from({ length: 50 }, (_, i): Partial<TraceEvent> => ({ path: `f${i}`, atMs: 0 }));
    assertWellFormed(traceChart(traceOf('same', same)));
    const none = traceChart(traceOf('none'));
    assertWellFormed(none);
    assert.match(none, /No read was recorded/);
  });

  it('stays a file that a browser opens, however many reads there are', () => {
    const many = Array.from(
      { length: 20_000 },
      (_, i): Partial<TraceEvent> => ({
        path: `dir${i % 7}/file${i % 500}`,
        offset: (i >> 9) * 65536,
        atMs: i,
        outcome: OUTCOMES[i & 3]!,
      }),
    );
    const before = performance.now();
    const svg = traceChart(traceOf('many', many));
    assert.ok(performance.now() - before < 5000);
    assert.ok(svg.length < 4 << 20, `${svg.length} bytes`);
    assertWellFormed(svg);
  });
});
