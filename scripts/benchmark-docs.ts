// The results in docs/benchmarks.md come from one committed file, docs/benchmarks/result.json, and so do the charts beside
// it: a table cannot say anything else than its figures. As a program it takes a new result over:
//   node scripts/benchmark-docs.ts RESULT.json [LINK]
// and keeps the time lines of one link, by default the first emulated one of 20 ms or more.
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { renderCharts } from '../src/bench/report/charts.ts';
import { compactResult } from '../src/bench/report/compact.ts';
import { renderMarkdown } from '../src/bench/report/markdown.ts';
import { parseResult } from '../src/bench/report/parse.ts';
import type { BenchResult } from '../src/bench/result.ts';

/** Result and charts of the documentation. */
export const BENCHMARKS = join(import.meta.dirname, '..', 'docs', 'benchmarks');
const RESULT = join(BENCHMARKS, 'result.json');

function committedResult(): BenchResult | undefined {
  return existsSync(RESULT) ? parseResult(readFileSync(RESULT, 'utf8'), RESULT) : undefined;
}

/** What stands below the marker of docs/benchmarks.md. */
export function benchmarkPage(): string {
  const result = committedResult();
  if (result === undefined) {
    return 'No result is committed yet: `node scripts/benchmark-docs.ts RESULT.json` takes one over.\n';
  }
  return renderMarkdown(result, { level: 3, charts: renderCharts(result), chartDirectory: 'benchmarks' });
}

/** The charts that docs/benchmarks.md shows: path and text. */
export function benchmarkCharts(): (readonly [file: string, text: string])[] {
  const result = committedResult();
  if (result === undefined) return [];
  return renderCharts(result).map(({ name, svg }) => [join(BENCHMARKS, `${name}.svg`), svg] as const);
}

/** Charts in the directory that the committed result does not have. */
export function staleCharts(): string[] {
  if (!existsSync(BENCHMARKS)) return [];
  const wanted = new Set(benchmarkCharts().map(([file]) => file));
  return readdirSync(BENCHMARKS)
    .filter((name) => name.endsWith('.svg'))
    .map((name) => join(BENCHMARKS, name))
    .filter((file) => !wanted.has(file));
}

export function removeStaleCharts(): void {
  for (const file of staleCharts()) rmSync(file);
}

/** JSON with a line for each start, floor, … so that a new run reads as one in a diff; seven digits are more than enough. */
export function compactText(result: BenchResult): string {
  const short = (_key: string, value: unknown): unknown =>
    typeof value === 'number' && !Number.isInteger(value) ? Number(value.toPrecision(7)) : value;
  const members = Object.entries(result).map(([key, value]) => {
    const text = Array.isArray(value)
      ? `[\n${value.map((each) => `  ${JSON.stringify(each, short)}`).join(',\n')}\n ]`
      : JSON.stringify(value, short);
    return ` ${JSON.stringify(key)}: ${text}`;
  });
  return `{\n${members.join(',\n')}\n}\n`;
}

if (import.meta.main) {
  const [file, link] = process.argv.slice(2);
  if (file === undefined) {
    console.error('usage: node scripts/benchmark-docs.ts RESULT.json [LINK]');
    process.exitCode = 2;
  } else {
    const result = parseResult(readFileSync(file, 'utf8'), file);
    const shown = link ?? (result.links.find(({ roundTripMs }) => (roundTripMs ?? 0) >= 20) ?? result.links[0])?.name;
    mkdirSync(BENCHMARKS, { recursive: true });
    writeFileSync(RESULT, compactText(compactResult(result, (place) => place.link === shown)));
    console.log(`${RESULT} taken over; now run "make docs"`);
  }
}
