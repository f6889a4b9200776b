// Cold starts with and without an access trace: overlayfs, ours with no trace, with that of one earlier start, and with that of
// another version of the image. The starts are those of `make bench`; docs/benchmarks.md, "With access traces", says more.
//   node test/bench/traces.ts [--images a,b] [--links lan,region,continent] [--pairs 5] [--seed N] [--output DIR] [--resume] [--write]
// Traces are kept in DIR/traces: --resume goes on with them.
import { randomInt } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { describeMachine } from '../../src/bench/machine.ts';
import type { BenchLink, BenchResult } from '../../src/bench/result.ts';
import { ResultFile } from '../../src/bench/result-file.ts';
import { type BenchCell, runBench } from '../../src/bench/run.ts';
import { type AccessTrace, formatTrace, parseTrace } from '../../src/prefetch/access-trace.ts';
import { testCacheDir } from '../support/images.ts';
import { CONTINENT, LAN, type LinkProfile, REGION } from '../support/link/link.ts';
import { asBenchImage, type BuiltBenchImage, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';
import { tracesReport } from './traces/report.ts';
import { type TracedImage, traceContenders } from './traces/trace-contenders.ts';
import { asOfRepository, TraceDirectory } from './traces/trace-directory.ts';
import { type PushedImage, World } from './world.ts';

const LINKS: Readonly<Record<string, LinkProfile>> = { lan: LAN, region: REGION, continent: CONTINENT };

const { values } = parseArgs({
  options: {
    images: { type: 'string', default: 'interpreter,web-server,database,jvm,compiler' },
    links: { type: 'string', default: Object.keys(LINKS).join(',') },
    pairs: { type: 'string', default: '5' },
    seed: { type: 'string' },
    output: { type: 'string' },
    resume: { type: 'boolean', default: false },
    write: { type: 'boolean', default: false },
  },
});
const linkKeys = values.links.split(',');
for (const key of linkKeys) if (!Object.hasOwn(LINKS, key)) throw new Error(`--links ${key}: ${Object.keys(LINKS)}`);
const say = (text: string): void => void process.stderr.write(`${text}\n`);

function benchLink({ name, roundTripMs, bitsPerSecond }: LinkProfile): BenchLink {
  return { name, roundTripMs, bitsPerSecond, tls: false };
}

const names = values.images.split(',');
const built = await benchImages(names, ['1'], say);
const others = await benchImages(names, ['2'], say);

const startedAt = new Date().toISOString();
const output = values.output ?? join(await testCacheDir(), 'trace-results', startedAt.replace(/[:.]/g, '-'));
const resultPath = join(output, 'result.json');
const earlier = values.resume ? await ResultFile.seedOf(resultPath) : undefined;
const seed = values.seed === undefined ? (earlier ?? randomInt(2 ** 31)) : Number(values.seed);
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());

await using world = await World.start({ profile: LAN, tls: false, peers: [] });
const directory = new TraceDirectory(world.product);
const [overlayfs, ours] = [world.contenders[0]!, world.contenders[1]!];

async function push(image: BuiltBenchImage): Promise<PushedImage> {
  say(`${image.tag}: pushing and indexing`);
  return await world.push({ image: asBenchImage(image), dir: image.dir, tag: image.tag });
}

/** The trace of one start on the lan link, made unless an earlier run of the same output has it. */
async function traceOf(image: BuiltBenchImage, pushed: PushedImage): Promise<AccessTrace> {
  const file = join(output, 'traces', `${image.tag}.trace`);
  if (values.resume && existsSync(file)) return parseTrace(await readFile(file, 'latin1'), file);
  interrupt.signal.throwIfAborted();
  say(`${image.tag}: recording a start`);
  const trace = await directory.record(world, ours, pushed);
  await mkdir(join(output, 'traces'), { recursive: true });
  await writeFile(file, formatTrace(trace), 'latin1');
  say(`${image.tag}: ${trace.events.length} events`);
  return trace;
}

const cells: BenchCell[] = [];
const traced = new Map<string, TracedImage>();
let file: ResultFile | undefined;
say(`seed ${seed}; results in ${output}`);
try {
  for (const [at, image] of built.entries()) {
    const other = others[at]!;
    const { target, layers } = await push(image);
    // Who has not the other version finds it only as a trace.
    const own = asOfRepository(await traceOf(image, { target, layers }), target);
    const stale = asOfRepository(await traceOf(other, await push(other)), target);
    traced.set(target.lazy, { layers, own, stale });
    for (const key of linkKeys)
      cells.push({ target, layers, link: benchLink(LINKS[key]!), pairs: Number(values.pairs) });
  }
  const contenders = [
    overlayfs,
    ...traceContenders({
      ours,
      product: world.product,
      directory,
      imageOf: ({ lazy }) => traced.get(lazy)!,
      say,
    }),
  ];
  const fresh: BenchResult = {
    format: 'dedup-snapshotter-bench/1',
    startedAt,
    seed,
    machine: await describeMachine(),
    images: built.map(asBenchImage),
    links: linkKeys.map((key) => benchLink(LINKS[key]!)),
    snapshotters: contenders.map(({ name }) => name),
    starts: [],
    floors: [],
    resources: [],
  };
  file = await ResultFile.open(resultPath, fresh, { resume: values.resume });
  await runBench(
    {
      seed,
      cells,
      contenders,
      node: world.node,
      meter: world,
      timeoutMs: 600_000,
      signal: interrupt.signal,
      enterLink: async (link) => await world.enter(link),
      floor: { probe: world.probe(), yardstick: overlayfs, ours, indexDirectory: world.indexDirectory },
      say,
    },
    file,
  );
} catch (error) {
  if (!interrupt.signal.aborted) throw error;
  say(`interrupted; to go on, repeat it with --resume --output ${output}`);
  process.exitCode = 130;
} finally {
  if (file !== undefined && file.result.starts.length > 0) {
    const flags = `--images ${values.images} --links ${values.links} --pairs ${values.pairs}`;
    const text = tracesReport(file.result, { command: `node test/bench/traces.ts ${flags} --write` });
    process.stdout.write(`${text}\n`);
    if (values.write && process.exitCode === undefined) await writeSection('Cold starts with access traces', text);
  }
}
