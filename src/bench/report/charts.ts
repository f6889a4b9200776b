// Which charts a result has, and under which names.
import type { BenchResult } from '../result.ts';
import { cellOf, typicalStart } from './cells.ts';
import { overviewChart } from './overview-chart.ts';
import { renderResourceChart } from './resource-chart.ts';
import { timeLineChart } from './time-line-chart.ts';
import { totalsChart } from './totals-chart.ts';

export interface Chart {
  /** File name without extension: letters, digits and hyphens; unique within a result. */
  readonly name: string;
  readonly title: string;
  readonly kind: 'overview' | 'total' | 'start' | 'use';
  /** The link it is of; absent: of all. */
  readonly link?: string;
  readonly svg: string;
}

/** Every chart that the result has figures for, the most telling first. Each is a whole SVG file. */
export function renderCharts(result: BenchResult): Chart[] {
  const charts: Chart[] = [];
  const taken = new Set<string>();
  const add = (chart: Omit<Chart, 'name'>, ...words: readonly string[]): void => {
    charts.push({ name: unique(slug([chart.kind, ...words].join(' ')), taken), ...chart });
  };
  if (result.starts.length > 0) {
    if (result.snapshotters.length > 1) {
      add({ kind: 'overview', title: 'Ratio to the yardstick, every cell', svg: overviewChart(result) });
    }
    for (const link of result.links) {
      const title = `Time from pull to ready: ${link.name}`;
      add({ kind: 'total', title, link: link.name, svg: totalsChart(result, link) }, link.name);
    }
  }
  for (const { image, link } of places(result)) {
    const starts = result.snapshotters.flatMap((snapshotter) => {
      const cell = cellOf(result, image, link, snapshotter);
      return (cell && typicalStart(cell, (start) => (start.requestTimes ?? []).length > 0)) ?? [];
    });
    if (starts.length > 0) {
      add({ kind: 'start', title: `One start of ${image}: ${link}`, link, svg: timeLineChart(starts) }, image, link);
    }
    const traces = result.resources.filter((trace) => trace.image === image && trace.link === link);
    if (traces.length > 0) {
      const title = `What a start of ${image} uses: ${link}`;
      const svg = renderResourceChart(traces, { snapshotters: result.snapshotters, title });
      add({ kind: 'use', title, link, svg }, image, link);
    }
  }
  return charts;
}

function places(result: BenchResult): { readonly image: string; readonly link: string }[] {
  return result.links.flatMap((link) => result.images.map((image) => ({ image: image.name, link: link.name })));
}

/** "20 ms, 1 Gbit/s" → "20-ms-1-gbit-s". */
function slug(name: string): string {
  const safe = name
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, '-')
    .replace(/^-|-$/g, '');
  return safe === '' ? 'chart' : safe;
}

function unique(name: string, taken: Set<string>): string {
  let candidate = name;
  for (let next = 2; taken.has(candidate); next++) candidate = `${name}-${next}`;
  taken.add(candidate);
  return candidate;
}
