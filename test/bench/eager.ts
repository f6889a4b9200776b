// Pulls of images without an index, until the container is ready: ours, which reads all layers at once and keeps chunks, beside
// containerd's own pull with overlayfs. The starts are those of `make bench`; here also what reached the disk is counted.
//   node test/bench/eager.ts [--images a,b] [--links loopback,lan] [--pairs 10] [--seed N] [--output DIR] [--resume] [--write]
import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { describeMachine } from '../../src/bench/machine.ts';
import type { BenchLink, BenchResult } from '../../src/bench/result.ts';
import { ResultFile } from '../../src/bench/result-file.ts';
import { type BenchCell, runBench } from '../../src/bench/run.ts';
import { testCacheDir } from '../support/images.ts';
import { LAN, type LinkProfile } from '../support/link/link.ts';
import { eagerReport } from './eager/report.ts';
import { type BuiltBenchImage, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';
import { World } from './world.ts';

/** Images of at least this size are what the path is for, compressed bytes. */
const LEAST_BYTES = 80e6;

const LINKS: Readonly<Record<string, LinkProfile | undefined>> = { loopback: undefined, lan: LAN };

const { values } = parseArgs({
  options: {
    images: { type: 'string', default: 'interpreter,database,jvm,compiler' },
    links: { type: 'string', default: Object.keys(LINKS).join(',') },
    pairs: { type: 'string', default: '10' },
    seed: { type: 'string' },
    output: { type: 'string' },
    resume: { type: 'boolean', default: false },
    write: { type: 'boolean', default: false },
  },
});
const linkKeys = values.links.split(',');
for (const key of linkKeys) if (!Object.hasOwn(LINKS, key)) throw new Error(`--links ${key}: ${Object.keys(LINKS)}`);
const say = (text: string): void => void process.stderr.write(`${text}\n`);

function benchLink(profile: LinkProfile | undefined): BenchLink {
  if (profile === undefined) return { name: 'loopback', tls: false };
  const { name, roundTripMs, bitsPerSecond } = profile;
  return { name, roundTripMs, bitsPerSecond, tls: false };
}

const built = await benchImages(values.images.split(','), ['1'], say);
for (const { tag, compressedBytes } of built) {
  if (compressedBytes < LEAST_BYTES)
    say(`${tag} has less than ${LEAST_BYTES / 1e6} MB: it says nothing about the goal`);
}

function imageOf({ spec, compressedBytes, uncompressedBytes, layers }: BuiltBenchImage): BenchResult['images'][number] {
  const { name, composition, command, ready } = spec;
  return { name, composition, compressedBytes, uncompressedBytes, layers: layers.length, command, ready };
}

const startedAt = new Date().toISOString();
const output = values.output ?? join(await testCacheDir(), 'eager-results', startedAt.replace(/[:.]/g, '-'));
const resultPath = join(output, 'result.json');
const earlier = values.resume ? await ResultFile.seedOf(resultPath) : undefined;
const seed = values.seed === undefined ? (earlier ?? randomInt(2 ** 31)) : Number(values.seed);
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());

const fresh: BenchResult = {
  format: 'dedup-snapshotter-bench/1',
  startedAt,
  seed,
  machine: await describeMachine(),
  images: built.map(imageOf),
  links: linkKeys.map((key) => benchLink(LINKS[key])),
  snapshotters: ['overlayfs', 'dedup'],
  starts: [],
  floors: [],
  resources: [],
};
const file = await ResultFile.open(resultPath, fresh, { resume: values.resume });
say(`seed ${seed}; results in ${output}`);

async function measure(profile: LinkProfile | undefined): Promise<void> {
  await using world = await World.start({ ...(profile === undefined ? {} : { profile }), tls: false, peers: [] });
  const cells: BenchCell[] = [];
  for (const image of built) {
    say(`${image.tag}: pushing`);
    const { target, layers } = await world.push(
      { image: imageOf(image), dir: image.dir, tag: image.tag },
      { index: false },
    );
    cells.push({ target, layers, link: benchLink(profile), pairs: Number(values.pairs) });
  }
  await runBench(
    {
      seed,
      cells,
      contenders: world.contenders,
      node: world.node,
      meter: world,
      timeoutMs: 600_000,
      signal: interrupt.signal,
      writeBack: true,
      enterLink: async () => {},
      say,
    },
    file,
  );
}

try {
  for (const key of linkKeys) await measure(LINKS[key]);
} catch (error) {
  if (!interrupt.signal.aborted) throw error;
  say(`interrupted; to go on, repeat it with --resume --output ${output}`);
  process.exitCode = 130;
} finally {
  if (file.result.starts.length > 0) {
    const { text, cold } = eagerReport(file.result);
    process.stdout.write(`${text}\n`);
    if (!cold) process.exitCode = 1;
    if (values.write && process.exitCode === undefined) await writeSection('Pulls of images without an index', text);
  }
}
