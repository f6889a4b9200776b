// The report as files: the figures, the page, the charts.
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { BenchResult } from '../result.ts';
import { renderCharts } from './charts.ts';
import { renderMarkdown } from './markdown.ts';

/**
 * Writes `result.json`, `report.md` and `charts/*.svg` into `directory`, which is made; files of those names are replaced.
 * Resolves to the path of the page. Errors are those of node:fs.
 */
export async function writeReport(result: BenchResult, directory: string): Promise<string> {
  const charts = renderCharts(result);
  const page = join(directory, 'report.md');
  await mkdir(join(directory, 'charts'), { recursive: true });
  await writeFile(join(directory, 'result.json'), `${JSON.stringify(result, undefined, 1)}\n`);
  for (const chart of charts) await writeFile(join(directory, 'charts', `${chart.name}.svg`), chart.svg);
  await writeFile(page, renderMarkdown(result, { charts }));
  return page;
}
