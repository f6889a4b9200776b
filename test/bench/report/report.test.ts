// The report of a benchmark: every cell is there, the figures are those of the result, lost cells are marked like won ones,
// and nothing that is not a number is written as one.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { compactText } from '../../../scripts/benchmark-docs.ts';
import { cellOf, floorParts, typicalStart, verdictOf } from '../../../src/bench/report/cells.ts';
import { renderCharts } from '../../../src/bench/report/charts.ts';
import { compactResult } from '../../../src/bench/report/compact.ts';
import { renderMarkdown } from '../../../src/bench/report/markdown.ts';
import { parseResult } from '../../../src/bench/report/parse.ts';
import { duration } from '../../../src/bench/report/quantities.ts';
import { renderFile } from '../../../src/bench/report/render.ts';
import { renderResourceChart } from '../../../src/bench/report/resource-chart.ts';
import { LEAST_PAIRS, pairedRatio, spreadOf } from '../../../src/bench/report/statistics.ts';
import { laneOf } from '../../../src/bench/report/time-line-chart.ts';
import { writeReport } from '../../../src/bench/report/write.ts';
import type { BenchResult, RequestTime } from '../../../src/bench/result.ts';
import {
  DATABASE,
  FAR,
  METRO,
  MODEL,
  OURS,
  PEER,
  PYTHON,
  syntheticResult,
  TINY,
  YARDSTICK,
} from './synthetic-result.ts';

const result = syntheticResult();
const markdown = renderMarkdown(result, { charts: renderCharts(result) });

/** Cells of the row of a table below `heading` that begins with these. */
function row(text: string, heading: string, ...begin: readonly string[]): string[] {
  const rows = text
    .slice(text.indexOf(heading))
    .split('\n')
    .filter((line) => line.startsWith('| '))
    .map((line) => line.slice(2, -2).split(/(?<!\\) \| /));
  const found = rows.find((cells) => begin.every((cell, at) => cells[at] === cell));
  assert.ok(found, `no row ${begin.join(', ')} below ${heading}`);
  return found;
}

/** Parses with an XML parser that refuses what is not well-formed. */
function assertWellFormed(documents: readonly { readonly name: string; readonly svg: string }[]): void {
  const program = [
    'import json, sys, xml.etree.ElementTree as tree',
    'for each in json.load(sys.stdin):',
    '    try: root = tree.fromstring(each["svg"])',
    '    except tree.ParseError as error: sys.exit(each["name"] + ": " + str(error))',
    '    assert root.tag == "{http://www.w3.org/2000/svg}svg", root.tag',
    '    assert root[0].tag.endswith("}title") and root[0].text and root[1].tag.endswith("}desc") and root[1].text',
  ].join('\n');
  const input = JSON.stringify(documents);
  const { status, stderr } = spawnSync('python3', ['-c', program], { input, encoding: 'utf8', maxBuffer: 1 << 26 });
  assert.equal(status, 0, stderr);
}

/** What a missing value looks like when it was written without looking. */
function assertClean(text: string, name: string): void {
  for (const word of [/\bNaN\b/, /Infinity/, /undefined/, /\bnull\b/, /\[object/]) {
    assert.doesNotMatch(text, word, name);
  }
}

describe('statistics', () => {
  test('quartiles are interpolated and do not depend on the order', () => {
    assert.deepEqual(spreadOf([4, 1, 3, 2]), { count: 4, min: 1, lower: 1.75, median: 2.5, upper: 3.25, max: 4 });
    assert.deepEqual(spreadOf([10, 9]), { count: 2, min: 9, lower: 9.25, median: 9.5, upper: 9.75, max: 10 });
    assert.equal(spreadOf([]), undefined);
  });

  const pairs = Array.from({ length: 12 }, (_, at) => ({ subject: 10 + (at % 5), yardstick: 30 + ((at * 7) % 11) }));

  test('the ratio is that of the medians and lies in its interval', () => {
    const ratio = pairedRatio(pairs, 1)!;
    assert.equal(
      ratio.value,
      spreadOf(pairs.map((pair) => pair.subject))!.median / spreadOf(pairs.map((p) => p.yardstick))!.median,
    );
    assert.ok(ratio.interval!.low <= ratio.value && ratio.value <= ratio.interval!.high);
    assert.ok(ratio.interval!.low < ratio.interval!.high);
  });

  test('the same seed gives the same interval, digit by digit', () => {
    assert.deepEqual(pairedRatio(pairs, 5), pairedRatio(pairs, 5));
    // Many pairs: the medians of few take few values, and two seeds may well agree on them.
    const wide = Array.from({ length: 80 }, (_, at) => ({
      subject: 5 + ((at * 37) % 80) ** 1.1,
      yardstick: 9 + ((at * 23) % 80) ** 1.2,
    }));
    assert.notDeepEqual(pairedRatio(wide, 5)!.interval, pairedRatio(wide, 6)!.interval);
  });

  test('an interval is of whole pairs: what slows both members does not widen it', () => {
    const drifting = Array.from({ length: 10 }, (_, at) => ({ subject: 2 ** at, yardstick: 2 * 2 ** at }));
    const { interval } = pairedRatio(drifting, 3)!;
    assert.deepEqual(interval, { low: 0.5, high: 0.5 });
  });

  test('few pairs have a ratio and no interval; none have no ratio', () => {
    const few = pairedRatio(pairs.slice(0, LEAST_PAIRS - 1), 1)!;
    assert.equal(few.interval, undefined);
    assert.equal(verdictOf(few), 'unjudged');
    assert.equal(pairedRatio([], 1), undefined);
    assert.equal(pairedRatio([{ subject: 1, yardstick: 0 }], 1), undefined);
  });

  test('a verdict needs the whole interval on one side', () => {
    const value = { value: 0.9, pairs: 10 };
    assert.equal(verdictOf({ ...value, interval: { low: 0.8, high: 0.99 } }), 'faster');
    assert.equal(verdictOf({ ...value, interval: { low: 0.8, high: 1 } }), 'undecided');
    assert.equal(verdictOf({ ...value, interval: { low: 1.01, high: 1.2 } }), 'slower');
  });

  test('pairs are matched by number: a start without its partner counts for the median and not for the ratio', () => {
    const without = {
      ...result,
      starts: result.starts.filter((start) => !(start.snapshotter === YARDSTICK && start.pair === 3)),
    };
    const cell = cellOf(without, PYTHON.name, METRO.name, OURS)!;
    assert.equal(cell.total.count, 10);
    assert.equal(cell.toYardstick!.pairs, 9);
  });
});

describe('report', () => {
  test('every image and snapshotter has its rows on every link, measured or not', () => {
    for (const link of result.links) {
      for (const image of result.images) {
        for (const snapshotter of result.snapshotters) {
          const cell = cellOf(result, image.name, link.name, snapshotter);
          const times = row(markdown, `## Link: ${link.name}`, image.name, snapshotter);
          assert.equal(times[2], String(cell?.total.count ?? 0));
          if (cell === undefined) assert.equal(times[3], 'not measured');
          else assert.ok(times[3]!.startsWith(`**${duration(cell.total.median)}**`), times[3]);
        }
        const floor = result.floors.find((each) => each.image === image.name && each.link === link.name);
        const shown = row(markdown, `## Link: ${link.name}`, image.name, '*floor*')[3];
        assert.equal(shown, floor === undefined ? 'not measured' : `*${duration(floor.totalMs)}*`);
      }
    }
    assert.equal(cellOf(result, MODEL.name, FAR.name, PEER), undefined);
  });

  test('the matrix says won, lost, unjudged and unmeasured cells in words', () => {
    const ours = `## ${OURS} against ${YARDSTICK}`;
    const column = 1 + result.links.findIndex((link) => link.name === METRO.name);
    const cell = (image: { readonly name: string }, heading: string): string[] =>
      row(
        markdown,
        heading,
        `**${image.name}**<br>${image === TINY ? '2.10 MB' : image === PYTHON ? '78.0 MB' : '2.90 GB'}`,
      );
    assert.match(cell(PYTHON, ours)[column]!, /^\*\*0\.\d\d\*\* \(0\.\d\d–0\.\d\d\) \*\*▼ faster\*\*<br>/);
    assert.match(cell(TINY, ours)[column]!, /^\*\*3\.\d\d\*\* \(3\.\d\d–3\.\d\d\) \*\*▲ slower\*\*<br>/);
    assert.match(cell(MODEL, ours)[3]!, /\? not judged/);
    assert.equal(cell(MODEL, `## ${PEER} against ${YARDSTICK}`)[3], 'not measured');
    assert.match(markdown, /^- \*\*▲ slower\*\*: .*20 ms, 1 Gbit\/s: tiny \(3\.\d\d\)/m);
  });

  test('a cell that shows no difference is neither won nor lost', () => {
    const starts = result.starts.map((start) => {
      if (start.snapshotter !== OURS || start.image !== PYTHON.name || start.link !== METRO.name) return start;
      const other = result.starts.find(
        (each) =>
          each.snapshotter === YARDSTICK &&
          each.image === start.image &&
          each.link === start.link &&
          each.pair === start.pair,
      )!;
      return {
        ...start,
        phases: { ...start.phases, totalMs: other.phases.totalMs * (start.pair % 2 === 0 ? 0.9 : 1.11) },
      };
    });
    const text = renderMarkdown({ ...result, starts });
    assert.match(text, /^- ◇ no difference shown: 20 ms, 1 Gbit\/s: python \(/m);
  });

  test('a floor whose terms do not add up to it is shown with what they give', () => {
    const [first, ...others] = result.floors;
    const wrong = { ...first!, totalMs: first!.totalMs / 2 };
    assert.ok(Math.abs(floorParts(first!).totalMs - first!.totalMs) < 1e-6);
    assert.doesNotMatch(markdown, /its terms give/);
    const text = renderMarkdown({ ...result, floors: [wrong, ...others] });
    assert.ok(text.includes(`(its terms give ${duration(first!.totalMs)})`));
  });

  test('a cell whose starts fetched very different amounts is doubted', () => {
    const warm = result.starts.find((start) => start.snapshotter === OURS && start.image === MODEL.name)!;
    const starts = result.starts.map((start) =>
      start === warm ? { ...start, wireBytes: start.wireBytes / 3 } : start,
    );
    assert.doesNotMatch(markdown, /Perhaps not cold/);
    assert.match(
      renderMarkdown({ ...result, starts }),
      /\*\*Perhaps not cold\*\*.*: dedup with model, 1 ms, 1 Gbit\/s \(/,
    );
  });

  test('names from the result cannot break a table or become markup', () => {
    assert.ok(markdown.includes('A Processor \\| with a bar'));
    assert.ok(markdown.includes('postgresql-15 &lt;server&gt; & client'));
    const widths = new Map<string, number>();
    for (const block of markdown.split('\n\n').filter((part) => part.startsWith('| '))) {
      for (const line of block.trim().split('\n')) widths.set(line, line.split(/(?<!\\)\|/).length);
      assert.equal(
        new Set(
          block
            .trim()
            .split('\n')
            .map((line) => widths.get(line)),
        ).size,
        1,
        block.slice(0, 200),
      );
    }
  });

  test('a result without starts, floors or a second snapshotter is still a report', () => {
    const empty: BenchResult = { ...result, starts: [], floors: [], resources: [] };
    const alone: BenchResult = { ...result, snapshotters: [YARDSTICK] };
    const none: BenchResult = { ...empty, images: [], links: [], snapshotters: [] };
    for (const each of [empty, alone, none]) {
      const charts = renderCharts(each);
      assertClean(renderMarkdown(each, { charts }), 'report');
      if (charts.length > 0) assertWellFormed(charts);
    }
    assert.match(renderMarkdown(empty), /Nothing was measured/);
  });

  test('zero bytes, zero times and a floor of zero are figures, not faults', () => {
    const zero = result.starts.map((start) => ({
      ...start,
      phases: { pullMs: 0, createMs: 0, runMs: 0, totalMs: 0 },
      wireBytes: 0,
      processes: [],
      requestTimes: [],
    }));
    const floors = result.floors.map((floor) => ({ ...floor, bytesPerSecond: 0, neededBytes: 0, totalMs: 0 }));
    const each = { ...result, starts: zero, floors };
    const charts = renderCharts(each);
    assertWellFormed(charts);
    for (const text of [renderMarkdown(each, { charts }), ...charts.map(({ svg }) => svg)]) assertClean(text, 'zero');
  });
});

describe('charts', () => {
  const charts = renderCharts(result);

  test('are well-formed, titled, described, and load nothing', () => {
    assertWellFormed(charts);
    for (const { name, svg } of charts) {
      assertClean(svg, name);
      assert.doesNotMatch(svg, /<script|href|@import|url\(/, name);
      assert.match(svg, /prefers-color-scheme: dark/, name);
    }
  });

  test('names are files’ names, each once, and the report shows each', () => {
    assert.equal(new Set(charts.map(({ name }) => name)).size, charts.length);
    for (const { name } of charts) {
      assert.match(name, /^[a-z0-9-]+$/);
      assert.ok(markdown.includes(`](charts/${name}.svg)`), name);
    }
    const same = { ...result, links: [METRO, { ...METRO, name: '20 ms; 1 Gbit/s' }] };
    const names = renderCharts(same).map(({ name }) => name);
    assert.equal(new Set(names).size, names.length);
  });

  test('bars show every run as a dot and every median as text', () => {
    const { svg } = charts.find(({ kind, link }) => kind === 'total' && link === METRO.name)!;
    const runs = result.starts.filter((start) => start.link === METRO.name);
    assert.equal(svg.match(/<circle/g)!.length, runs.length);
    for (const image of result.images) {
      const cell = cellOf(result, image.name, METRO.name, OURS)!;
      assert.ok(svg.includes(`>${duration(cell.total.median)}</text>`), image.name);
    }
  });

  test('nothing is drawn outside of its picture', () => {
    for (const { name, svg } of charts) {
      const [, width, height] = /<svg [^>]*width="([\d.]+)" height="([\d.]+)"/.exec(svg)!.map(Number);
      for (const [, key, value] of svg.matchAll(/ (x|y|x1|x2|y1|y2|cx|cy)="(-?[\d.]+)"/g)) {
        const limit = key!.includes('x') ? width! : height!;
        assert.ok(Number(value) >= 0 && Number(value) <= limit, `${name}: ${key}=${value} of ${limit}`);
      }
    }
  });

  test('requests that overlap lie in different lanes, others share one', () => {
    const request = (startMs: number, endMs: number): RequestTime => ({ startMs, endMs, bytes: 1, kind: 'layer' });
    assert.deepEqual(
      laneOf([request(0, 10), request(5, 15), request(10, 20), request(14, 16), request(15, 30)]),
      [0, 1, 0, 2, 1],
    );
    assert.deepEqual(laneOf([]), []);
  });

  test('the time line of a start draws each of its requests', () => {
    const { svg } = charts.find(
      ({ kind, title }) => kind === 'start' && title === `One start of database: ${METRO.name}`,
    )!;
    for (const snapshotter of result.snapshotters) {
      const start = typicalStart(cellOf(result, DATABASE.name, METRO.name, snapshotter)!)!;
      assert.ok(svg.includes(`${snapshotter}: ${duration(start.phases.totalMs)}, ${start.requests} requests`));
    }
    const requests = result.snapshotters.map(
      (each) => typicalStart(cellOf(result, DATABASE.name, METRO.name, each)!)!.requestTimes!.length,
    );
    const drawn = svg.match(/<rect [^>]*class="q-[a-z]+"><title>/g)!.length;
    assert.ok(drawn >= requests.reduce((sum, each) => sum + each, 0), `${drawn} bars`);
  });

  test('resource curves need traces and nothing else of a benchmark', () => {
    const svg = renderResourceChart(result.resources);
    assertWellFormed([{ name: 'resources', svg }]);
    assert.equal(svg.match(/<polyline/g)!.length, 8);
    const none = [renderResourceChart([]), renderResourceChart([{ ...result.resources[0]!, samples: [], marks: [] }])];
    assertWellFormed(none.map((each) => ({ name: 'empty', svg: each })));
    for (const each of none) assertClean(each, 'empty');
  });
});

describe('files', () => {
  const directory = mkdtempSync(join(tmpdir(), 'report-'));
  after(() => rmSync(directory, { recursive: true }));

  test('a report drawn anew from its figures is the same', async () => {
    const first = join(directory, 'first');
    const second = join(directory, 'second');
    const page = await writeReport(result, first);
    assert.equal(await renderFile(join(first, 'result.json'), second), join(second, 'report.md'));
    assert.equal(readFileSync(page, 'utf8'), readFileSync(join(second, 'report.md'), 'utf8'));
    const names = readdirSync(join(first, 'charts'));
    assert.deepEqual(
      names.sort(),
      renderCharts(result)
        .map(({ name }) => `${name}.svg`)
        .sort(),
    );
    for (const name of names) {
      assert.equal(
        readFileSync(join(first, 'charts', name), 'utf8'),
        readFileSync(join(second, 'charts', name), 'utf8'),
      );
    }
  });

  test('what is not a result is refused with the place of what is wrong', () => {
    const [first, ...others] = result.starts;
    const broken = { ...result, starts: [{ ...first!, phases: { ...first!.phases, totalMs: Number.NaN } }, ...others] };
    assert.throws(
      () => parseResult(JSON.stringify(broken), 'file.json'),
      /file\.json is no benchmark result.*totalMs/s,
    );
    assert.throws(() => parseResult('{', 'file.json'), /file\.json is not JSON/);
    assert.throws(() => parseResult(JSON.stringify({ ...result, format: 'other/2' }), 'file.json'), /format/);
  });

  test('the compact form says the same in every table', () => {
    const shown = (place: { readonly link: string }): boolean => place.link === METRO.name;
    const compact = parseResult(compactText(compactResult(result, shown)), 'compact');
    assert.equal(renderMarkdown(compact), renderMarkdown(result));
    const kept = compact.starts.filter((start) => start.requestTimes !== undefined);
    assert.equal(kept.length, result.images.length * result.snapshotters.length);
    const chart = (of: BenchResult): string[] =>
      renderCharts(of)
        .filter(({ kind, link }) => kind === 'start' && link === METRO.name)
        .map(({ title }) => title);
    assert.deepEqual(chart(compact), chart(result));
  });

  test('a long trace is thinned to its means, so the sum stays', () => {
    const [trace] = result.resources;
    const samples = Array.from({ length: 1600 }, (_, at) => ({
      ...trace!.samples[0]!,
      atMs: at,
      cpuCores: at % 10 === 0 ? 2 : 0,
    }));
    const compact = compactResult({ ...result, resources: [{ ...trace!, samples }] }, () => false);
    assert.equal(compact.resources[0]!.samples.length, 160);
    for (const sample of compact.resources[0]!.samples) assert.equal(sample.cpuCores, 0.2);
  });
});
