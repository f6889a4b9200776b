// Pulls of images without an index, until the container is ready: ours, which reads all layers at once and keeps chunks, beside
// containerd's own pull with overlayfs. The starts are those of `make bench`; here also what reached the disk is counted.
//   node test/bench/eager.ts [--images a,b] [--links loopback,lan] [--pairs 10] [--seed N] [--output DIR] [--resume] [--own-disk] [--write]
// With --own-disk containerd's and our files lie on a disk of their own, so that what is written to it is exact on a busy machine;
// the times are then of a slower disk.
import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { describeMachine } from '../../src/bench/machine.ts';
import { writtenToDisks } from '../../src/bench/resources.ts';
import type { BenchLink, BenchResult } from '../../src/bench/result.ts';
import { ResultFile } from '../../src/bench/result-file.ts';
import { type BenchCell, runBench } from '../../src/bench/run.ts';
import { GiB } from '../../src/units.ts';
import { pushLayout, testCacheDir } from '../support/images.ts';
import { LAN, type LinkProfile } from '../support/link/link.ts';
import { RegistryProcess } from '../support/registry.ts';
import { eagerReport } from './eager/report.ts';
import { asBenchImage, benchImages } from './images/bench-images.ts';
import { OwnDisk } from './own-disk.ts';
import { writeSection } from './section.ts';
import { overlayfsSpace } from './space/overlayfs-space.ts';
import { World } from './world.ts';

/** Images of at least this size are what the path is for, compressed bytes. */
const LEAST_BYTES = 80e6;

const OWN_DISK_BYTES = 32 * GiB;

const LINKS: Readonly<Record<string, LinkProfile | undefined>> = { loopback: undefined, lan: LAN };

const { values } = parseArgs({
  options: {
    images: { type: 'string', default: 'interpreter,database,jvm,compiler' },
    links: { type: 'string', default: Object.keys(LINKS).join(',') },
    pairs: { type: 'string', default: '10' },
    seed: { type: 'string' },
    output: { type: 'string' },
    resume: { type: 'boolean', default: false },
    'own-disk': { type: 'boolean', default: false },
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
  images: built.map(asBenchImage),
  links: linkKeys.map((key) => benchLink(LINKS[key])),
  snapshotters: ['overlayfs', 'dedup'],
  starts: [],
  floors: [],
  resources: [],
};
const file = await ResultFile.open(resultPath, fresh, { resume: values.resume });
say(`seed ${seed}; results in ${output}`);

async function measure(profile: LinkProfile | undefined, disk: OwnDisk | undefined): Promise<void> {
  await using world = await World.start({
    ...(profile === undefined ? {} : { profile }),
    tls: false,
    peers: [],
    // An index that the first pull leaves behind would make the second one lazy.
    config: { publish_index: 'off' },
  });
  const cells: BenchCell[] = [];
  for (const image of built) {
    say(`${image.tag}: pushing`);
    const { target, layers } = await world.push(
      { image: asBenchImage(image), dir: image.dir, tag: image.tag },
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
      diskWrites: disk === undefined ? writtenToDisks : () => disk.writtenBytes(),
      enterLink: async () => {},
      say,
    },
    file,
  );
}

/** What the distinct contents of each image's files take, by its name. */
async function distinctBytes(): Promise<Map<string, number>> {
  await using registry = await RegistryProcess.start();
  const found = new Map<string, number>();
  for (const image of built) {
    const reference = await pushLayout(image.dir, image.tag, registry.host, image.tag, 'plain');
    const [space] = await overlayfsSpace([reference], say);
    found.set(asBenchImage(image).name, space!.uniqueWrittenBytes);
  }
  return found;
}

try {
  if (values['own-disk']) {
    await using disk = await OwnDisk.create(OWN_DISK_BYTES);
    // Where everything that is made from here on has its files.
    process.env.TMPDIR = disk.mountPoint;
    try {
      for (const key of linkKeys) await measure(LINKS[key], disk);
    } finally {
      delete process.env.TMPDIR;
    }
  } else for (const key of linkKeys) await measure(LINKS[key], undefined);
} catch (error) {
  if (!interrupt.signal.aborted) throw error;
  say(`interrupted; to go on, repeat it with --resume --output ${output}`);
  process.exitCode = 130;
} finally {
  if (file.result.starts.length > 0) {
    const { text, cold } = eagerReport(file.result, {
      ownDisk: values['own-disk'],
      least: await distinctBytes(),
    });
    process.stdout.write(`${text}\n`);
    if (!cold) process.exitCode = 1;
    const heading = `Pulls of images without an index${values['own-disk'] ? ', on a disk of their own' : ''}`;
    if (values.write && process.exitCode === undefined) await writeSection(heading, text);
  }
}
