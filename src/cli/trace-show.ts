// `trace show`: the reads of a start as a picture, as an SVG file, or as figures for programs.
import { writeFile } from 'node:fs/promises';
import type { Command } from 'commander';
import { DedupError, wrapError } from '../errors.ts';
import { type AccessTrace, traceId } from '../prefetch/access-trace.ts';
import { traceChart } from '../prefetch/trace-chart.ts';
import { LEAST_WIDTH, tracePicture } from '../prefetch/trace-picture.ts';
import { type Amount, summarize } from '../prefetch/trace-summary.ts';
import type { CliContext } from './context.ts';
import { openTraces, selectTrace } from './trace-selection.ts';

/** Of a line, where nobody says how long one is. */
const USUAL_WIDTH = 100;
const MOST_WIDTH = 400;

const HELP = `
From left to right runs the time since the first read, from top to bottom lie the files, in the order of their first read.
A read shows how it met its bytes in the latest run that had it: "hit" and "ahead" did not wait, "late" and "miss" did.

Examples:
  dedup-snapshotter trace show nginx:1.27
  dedup-snapshotter trace show 4fd2 --svg start.svg
  dedup-snapshotter trace show 4fd2 --json | jq .outcomes.miss
`;

interface ShowFlags {
  readonly svg?: string;
  readonly width?: string;
  readonly json?: boolean;
}

export function registerTraceShow(trace: Command, context: CliContext): void {
  trace
    .command('show')
    .description('draw what a start reads, when, and what it waits for')
    .argument('<trace>', 'ID (or its beginning) or image')
    .option('--svg <file>', 'write an SVG file instead ("-": to standard output)')
    .option('--width <characters>', `of a line, at least ${LEAST_WIDTH} (default: that of the terminal)`)
    .option('--json', 'the figures as JSON')
    .addHelpText('after', HELP)
    .action(async (word: string, flags: ShowFlags) => {
      const width = widthOf(flags.width);
      const { store, list } = await openTraces(context);
      const shown = await store.read(selectTrace(list, word).file);
      if (flags.svg !== undefined && flags.svg !== '-') await writeSvg(flags.svg, shown);
      else process.stdout.write(textOf(shown, flags, width));
    });
}

function textOf(trace: AccessTrace, flags: ShowFlags, width: number): string {
  if (flags.svg === '-') return traceChart(trace);
  if (flags.json === true) return `${JSON.stringify(figures(trace), null, 2)}\n`;
  // https://no-color.org: set and not empty.
  return tracePicture(trace, { width, colour: process.stdout.isTTY && !process.env.NO_COLOR });
}

async function writeSvg(file: string, trace: AccessTrace): Promise<void> {
  await writeFile(file, traceChart(trace)).catch((error: unknown) => {
    throw wrapError(error, `writing ${file}`, 'STORE_IO');
  });
  process.stdout.write(`wrote ${file}\n`);
}

/** Errors: INVALID_ARGUMENT. */
function widthOf(text: string | undefined): number {
  if (text === undefined) return Math.max(LEAST_WIDTH, Math.min(process.stdout.columns ?? USUAL_WIDTH, MOST_WIDTH));
  const width = Number(text);
  if (Number.isInteger(width) && width >= LEAST_WIDTH && width <= MOST_WIDTH) return width;
  throw new DedupError('INVALID_ARGUMENT', `--width ${JSON.stringify(text)} is not a number of characters`, {
    hint: `give a number from ${LEAST_WIDTH} to ${MOST_WIDTH}`,
  });
}

/** Bytes and milliseconds. */
function figures(trace: AccessTrace): object {
  const { reads, bytes, durationMs, outcomes, presentShare, files, fileCount, buckets } = summarize(trace);
  const plain = (amount: Amount) => ({ reads: amount.reads, bytes: amount.bytes });
  return {
    id: traceId(trace.layers),
    repository: trace.repository,
    tag: trace.tag,
    manifest: trace.manifest,
    layers: trace.layers,
    runs: trace.runs,
    updated: new Date(trace.updatedMs).toISOString(),
    sees_hits: trace.seesHits,
    reads,
    bytes,
    duration_ms: durationMs,
    outcomes,
    present_share: presentShare ?? null,
    file_count: fileCount,
    files: files.map((file) => ({ name: file.name, ...plain(file) })),
    misses: buckets.map(({ fromMs, toMs, outcomes }) => ({ from_ms: fromMs, to_ms: toMs, ...plain(outcomes.miss) })),
  };
}
