// `trace`: what containers of an image read when they start, as files: list, look at, hand on. Needs no dedupd, which
// records and replays them. This file has the verbs that move files; trace-show.ts draws, trace-push.ts pushes.
import { readFile, rm, writeFile } from 'node:fs/promises';
import type { Command } from 'commander';
import { digestHex } from '../digest.ts';
import { DedupError, wrapError } from '../errors.ts';
import { type AccessTrace, MAX_TRACE_BYTES, parseTrace, traceId } from '../prefetch/access-trace.ts';
import { plural, shownName } from '../prefetch/shown-name.ts';
import type { TraceInfo } from '../prefetch/trace-store.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';
import { registerTracePush } from './trace-push.ts';
import { imageName, openTraces, selectTrace, shortId, type Traces } from './trace-selection.ts';
import { registerTraceShow } from './trace-show.ts';

const HELP = `
dedupd records what containers of an image read in their first seconds, and fetches it ahead at the next start
(docs/traces.md). A trace is named by its ID, by the beginning of one (4 digits at least), by the image
(nginx:1.27, registry.example.com/app@sha256:…) or by "@" and the digest of its manifest.

Examples:
  dedup-snapshotter trace ls
  dedup-snapshotter trace show nginx:1.27
  dedup-snapshotter trace export nginx:1.27 nginx.trace
  dedup-snapshotter trace import nginx.trace
  dedup-snapshotter trace push registry.example.com/app:1
  dedup-snapshotter trace rm 4fd2
`;

/** Layers that a message names. */
const LISTED_LAYERS = 6;

export function registerTraceCommand(program: Command, context: CliContext): void {
  const trace = program
    .command('trace')
    .description('what containers read when they start: ls, show, export, import, push, rm')
    .addHelpText('after', HELP);
  trace
    .command('ls')
    .description('list the traces of this node')
    .option('--json', 'as JSON')
    .addHelpText('after', '\nExample:\n  dedup-snapshotter trace ls\n')
    .action(async (flags: { json?: boolean }) => await list(await openTraces(context), flags.json === true));
  registerTraceShow(trace, context);
  trace
    .command('export')
    .description('write a trace in its text form')
    .argument('<trace>', 'ID (or its beginning) or image')
    .argument('[file]', 'where to ("-": standard output)', '-')
    .addHelpText('after', '\nExample:\n  dedup-snapshotter trace export nginx:1.27 nginx.trace\n')
    .action(async (word: string, file: string) => await exportTrace(await openTraces(context), word, file));
  trace
    .command('import')
    .description('take a trace in its text form, in place of that of the same image')
    .argument('<file>', 'where from ("-": standard input)')
    .addHelpText(
      'after',
      '\nExample:\n  ssh other dedup-snapshotter trace export nginx | dedup-snapshotter trace import -\n',
    )
    .action(async (file: string) => await importTrace(await openTraces(context), file));
  registerTracePush(trace, context);
  trace
    .command('rm')
    .description('delete traces; the next start of the image is recorded anew')
    .argument('<trace...>', 'IDs (or their beginnings) or images')
    .addHelpText('after', '\nExample:\n  dedup-snapshotter trace rm 4fd2 nginx:1.27\n')
    .action(async (words: string[]) => await remove(await openTraces(context), words));
}

interface Listed extends TraceInfo {
  /** Undefined when the file is damaged behind its head, or gone since. */
  readonly trace: AccessTrace | undefined;
}

async function list({ store, list: infos }: Traces, json: boolean): Promise<void> {
  const listed: Listed[] = [];
  for (const info of infos) listed.push({ ...info, trace: await store.read(info.file).catch(() => undefined) });
  if (json) {
    process.stdout.write(`${JSON.stringify(listed.map(jsonOf), null, 2)}\n`);
    return;
  }
  const header = ['ID', 'REPOSITORY', 'TAG', 'RUNS', 'READS', 'BYTES', 'UPDATED'];
  const rows = listed.map(({ id, repository, tag, runs, updatedMs, trace }) => [
    shortId(id),
    shownName(repository) || '-',
    shownName(tag) || '-',
    String(runs),
    trace === undefined ? 'damaged' : String(trace.events.length),
    trace === undefined ? '-' : formatBytes(bytesOf(trace)),
    new Date(updatedMs).toISOString().replace(/\.\d+Z$/, 'Z'),
  ]);
  const widths = header.map((title, at) => Math.max(title.length, ...rows.map((cells) => cells[at]!.length)));
  for (const cells of [header, ...rows])
    process.stdout.write(
      `${cells
        .map((cell, at) => cell.padEnd(widths[at]!))
        .join('  ')
        .trimEnd()}\n`,
    );
}

function bytesOf(trace: AccessTrace): number {
  return trace.events.reduce((sum, { length }) => sum + length, 0);
}

function jsonOf({ id, file, repository, tag, manifest, runs, updatedMs, trace }: Listed): object {
  const updated = new Date(updatedMs).toISOString();
  const read = { reads: trace?.events.length ?? null, bytes: trace === undefined ? null : bytesOf(trace) };
  return { id, repository, tag, manifest, runs, ...read, updated, file };
}

async function exportTrace({ store, list: infos }: Traces, word: string, file: string): Promise<void> {
  const info = selectTrace(infos, word);
  await store.read(info.file); // Nobody could import what is damaged.
  const text = await readFile(info.file);
  if (file === '-') {
    process.stdout.write(text);
    return;
  }
  await writeFile(file, text).catch((error: unknown) => {
    throw wrapError(error, `writing ${file}`, 'STORE_IO');
  });
  process.stdout.write(`wrote the trace of ${imageName(info)} to ${file}\n`);
}

async function importTrace({ store, list: infos }: Traces, file: string): Promise<void> {
  const trace = await (file === '-' ? readStandardInput() : store.read(file)).catch((cause: unknown) => {
    if (!(cause instanceof DedupError) || cause.code !== 'TRACE_INVALID') throw cause;
    throw new DedupError('TRACE_INVALID', cause.message, {
      cause,
      hint: 'give what "dedup-snapshotter trace export" wrote, as it is (docs/formats/trace.md)',
    });
  });
  const id = traceId(trace.layers);
  const before = infos.find((info) => info.id === id);
  await store.save(trace);
  const layers = trace.layers.slice(0, LISTED_LAYERS).map((layer) => digestHex(layer).slice(0, 12));
  if (trace.layers.length > LISTED_LAYERS) layers.push('…');
  const place = before === undefined ? '' : `, in place of one of ${plural(before.runs, 'run')}`;
  process.stdout.write(
    `imported ${shortId(id)}, the trace of ${imageName(trace)}: ${plural(trace.events.length, 'read')}, ` +
      `${formatBytes(bytesOf(trace))}${place}\n` +
      `  its ${plural(trace.layers.length, 'layer')}: ${layers.join(', ')}\n`,
  );
}

async function readStandardInput(): Promise<AccessTrace> {
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of process.stdin as AsyncIterable<Buffer>) {
    parts.push(part);
    bytes += part.length;
    if (bytes > MAX_TRACE_BYTES) break; // The parser says so.
  }
  return parseTrace(Buffer.concat(parts).toString('latin1'), 'standard input');
}

async function remove({ store, list: infos }: Traces, words: readonly string[]): Promise<void> {
  // All are known before the first one goes.
  const chosen = new Set(words.map((word) => selectTrace(infos, word)));
  for (const info of chosen) {
    await store.remove(info.id);
    // Put there by hand under a name of its own.
    await rm(info.file, { force: true });
    process.stdout.write(`removed ${shortId(info.id)}, the trace of ${imageName(info)}\n`);
  }
}
