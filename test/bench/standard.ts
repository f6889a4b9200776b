// The standard benchmark: images of real software on emulated links, overlayfs and ours and any peer in random order, with
// floors and resource lines. What `make bench` runs; `--help` says how. Results are written as they come.
import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { parsePeer } from '../../src/bench/contenders.ts';
import { describeMachine } from '../../src/bench/machine.ts';
import { splitCommand } from '../../src/bench/node-commands.ts';
import { writeReport } from '../../src/bench/report/write.ts';
import type { BenchImage, BenchLink, BenchResult, Ready } from '../../src/bench/result.ts';
import { ResultFile } from '../../src/bench/result-file.ts';
import { type BenchCell, runBench } from '../../src/bench/run.ts';
import { testCacheDir } from '../support/images.ts';
import { CONTINENT, LAN, type LinkProfile, OVERSEAS, REGION } from '../support/link/link.ts';
import { asBenchImage, BENCH_IMAGES, benchImages } from './images/bench-images.ts';
import { World, type WorldImage, type WorldPeer } from './world.ts';

const LINKS: Readonly<Record<string, LinkProfile>> = {
  lan: LAN,
  region: REGION,
  continent: CONTINENT,
  overseas: OVERSEAS,
};

/** Where a lazy start can only lose, and so must be looked at. The database at 100 ms is in the table anyway. */
const EVERYTHING_READ = 'everything-read';
const READ_EVERYTHING = ['sh', '-c', 'tar cf - --one-file-system -C / . | cat > /dev/null'];

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    help: { type: 'boolean', short: 'h', default: false },
    images: { type: 'string', default: [...BENCH_IMAGES.map(({ name }) => name), EVERYTHING_READ].join(',') },
    links: { type: 'string', default: Object.keys(LINKS).join(',') },
    pairs: { type: 'string', multiple: true, default: [] },
    seed: { type: 'string' },
    output: { type: 'string' },
    resume: { type: 'boolean', default: false },
    tls: { type: 'boolean', default: false },
    snapshotters: { type: 'string' },
    peer: { type: 'string', multiple: true, default: [] },
    'peer-service': { type: 'string', multiple: true, default: [] },
    'peer-dir': { type: 'string', multiple: true, default: [] },
    layout: { type: 'string' },
    'ready-line': { type: 'string' },
    'ready-port': { type: 'string' },
    'no-floor': { type: 'boolean', default: false },
    'no-resources': { type: 'boolean', default: false },
  },
});

const HELP = `
make bench ARGS="[options]"      the standard benchmark in a world of its own; hours for all of it

  --images a,b         of: ${BENCH_IMAGES.map(({ name }) => name).join(', ')},
                       ${EVERYTHING_READ} (web-server, all of it)
  --links a,b          of: ${Object.entries(LINKS)
    .map(([key, { name }]) => `${key} (${name})`)
    .join(', ')}
  --pairs N            how often each is measured (10; 3 for model-server); IMAGE@LINK=N or IMAGE=N for some
  --snapshotters a,b   leave out others, e.g. dedup
  --tls                the registry speaks HTTPS
  --peer NAME=SOCKET[,PULL-COMMAND]   another snapshotter, words {image} {snapshotter} {address} {namespace}
  --peer-service NAME=COMMAND         how it is started at the node's end, words {socket} {containerd} {dir} {registry}
  --peer-dir NAME=DIRECTORY           where it keeps its files
  --layout DIR:TAG [--ready-line RE | --ready-port N] [-- COMMAND…]   an image of your own instead of --images
  --seed N --output DIR --resume      repeat an order; where results go; go on with an interrupted run
  --no-floor --no-resources           measure less

Examples:
  make bench ARGS="--images interpreter,web-server --links lan,region --pairs 3"
  make bench ARGS="--images database --links overseas --tls"
  make bench ARGS="--pairs 10 --pairs model-server@overseas=2"
`;

if (values.help) {
  process.stdout.write(HELP.trimStart());
  process.exit(0);
}

function fail(text: string): never {
  process.stderr.write(`${text}; see --help\n`);
  process.exit(2);
}

function wholeNumber(option: string, text: string): number {
  return /^\d+$/.test(text) ? Number(text) : fail(`${option} ${text} is not a number`);
}

/** "NAME=VALUE" options as a map. */
function named(option: string, texts: readonly string[]): Map<string, string> {
  return new Map(
    texts.map((text) => {
      const at = text.indexOf('=');
      return at > 0 ? [text.slice(0, at), text.slice(at + 1)] : fail(`${option} ${text} is not NAME=VALUE`);
    }),
  );
}

const defaultPairs = values.pairs.findLast((text) => !text.includes('='));
const pairsOf = named(
  '--pairs',
  values.pairs.filter((text) => text.includes('=')),
);

function pairs(image: string, linkKey: string): number {
  const text = pairsOf.get(`${image}@${linkKey}`) ?? pairsOf.get(image) ?? defaultPairs;
  return text === undefined ? (image === 'model-server' ? 3 : 10) : wholeNumber('--pairs', text);
}

function linkKeys(): string[] {
  const keys = values.links.split(',');
  for (const key of keys) if (!Object.hasOwn(LINKS, key)) fail(`--links: there is no ${key}`);
  return keys;
}

function benchLink({ name, roundTripMs, bitsPerSecond, lossRate }: LinkProfile): BenchLink {
  const loss = lossRate === undefined ? {} : { lossRatio: lossRate };
  return { name: values.tls ? `${name}, TLS` : name, roundTripMs, bitsPerSecond, ...loss, tls: values.tls };
}

function imageNames(): string[] {
  const names = values.images.split(',');
  const known = [...BENCH_IMAGES.map(({ name }) => name), EVERYTHING_READ];
  for (const name of names) if (!known.includes(name)) fail(`--images: there is no ${name}`);
  return names;
}

/** A tiny image can only lose, most of all where the link is no obstacle; elsewhere it says nothing more. */
function measured(image: string, linkKey: string): boolean {
  if (process.argv.some((word) => word.startsWith('--images'))) return true;
  if (image === 'tiny') return linkKey === 'lan';
  return image !== EVERYTHING_READ || linkKey === 'lan' || linkKey === 'region';
}

function ownReady(): Ready {
  const port = values['ready-port'];
  if (port !== undefined) return { kind: 'port', port: wholeNumber('--ready-port', port) };
  const pattern = values['ready-line'];
  return pattern === undefined ? { kind: 'exit' } : { kind: 'line', pattern };
}

async function worldImages(say: (text: string) => void): Promise<WorldImage[]> {
  if (values.layout !== undefined) {
    const [, dir = '', tag = ''] = /^(.*):([^:/]+)$/.exec(values.layout) ?? fail('--layout is not DIR:TAG');
    const sizes = { compressedBytes: 0, uncompressedBytes: 0, layers: 0 };
    const image: BenchImage = { name: tag, composition: dir, ...sizes, command: positionals, ready: ownReady() };
    return [{ image, dir, tag }];
  }
  const names = imageNames();
  const sources = [...new Set(names.map((name) => (name === EVERYTHING_READ ? 'web-server' : name)))];
  const built = await benchImages(sources, ['1'], say);
  return names.map((name) => {
    const one = built[sources.indexOf(name === EVERYTHING_READ ? 'web-server' : name)]!;
    const everything = name === EVERYTHING_READ;
    const known = asBenchImage(one);
    const image: BenchImage = everything
      ? {
          ...known,
          name,
          composition: `web-server: ${known.composition}`,
          command: READ_EVERYTHING,
          ready: { kind: 'exit' },
        }
      : known;
    return { image, dir: one.dir, tag: one.tag };
  });
}

function worldPeers(): WorldPeer[] {
  const services = named('--peer-service', values['peer-service']);
  const directories = named('--peer-dir', values['peer-dir']);
  return values.peer.map((text) => {
    const spec = parsePeer(text);
    const service = services.get(spec.name);
    const directory = directories.get(spec.name);
    return {
      spec,
      ...(service === undefined ? {} : { service: splitCommand(service) }),
      directories: directory === undefined ? [] : [directory],
    };
  });
}

const say = (text: string): void => void process.stderr.write(`${text}\n`);
const keys = linkKeys();
const peers = worldPeers();
const startedAt = new Date().toISOString();
const output = values.output ?? join(await testCacheDir(), 'bench-results', startedAt.replace(/[:.]/g, '-'));
const resultPath = join(output, 'result.json');
const earlier = values.resume ? await ResultFile.seedOf(resultPath) : undefined;
const seed = values.seed === undefined ? (earlier ?? randomInt(2 ** 31)) : wholeNumber('--seed', values.seed);
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => interrupt.abort());
}

const images = await worldImages(say);
await using world = await World.start({ profile: LINKS[keys[0]!]!, tls: values.tls, peers });
const wantedNames = values.snapshotters?.split(',');
const contenders = world.contenders.filter(({ name }) => wantedNames?.includes(name) ?? true);
if (contenders.length === 0) fail(`--snapshotters: there are ${world.contenders.map(({ name }) => name).join(', ')}`);

const cells: BenchCell[] = [];
for (const image of images) {
  const { name } = image.image;
  const links = keys.filter((key) => measured(name, key));
  if (links.length === 0) continue;
  say(`${name}: pushing and indexing`);
  const { target, layers } = await world.push(image);
  for (const key of links) cells.push({ target, layers, link: benchLink(LINKS[key]!), pairs: pairs(name, key) });
}
const fresh: BenchResult = {
  format: 'dedup-snapshotter-bench/1',
  startedAt,
  seed,
  machine: await describeMachine(),
  images: [...new Set(cells.map(({ target }) => target.image))],
  links: keys.map((key) => benchLink(LINKS[key]!)),
  snapshotters: contenders.map(({ name }) => name),
  starts: [],
  floors: [],
  resources: [],
};
const file = await ResultFile.open(resultPath, fresh, { resume: values.resume });
const [yardstick, ours] = world.contenders;
say(`seed ${seed}; results in ${output}`);
try {
  await runBench(
    {
      seed,
      cells,
      contenders,
      node: world.node,
      meter: world,
      timeoutMs: 1_800_000,
      signal: interrupt.signal,
      enterLink: async (link) => await world.enter(link),
      ...(values['no-floor']
        ? {}
        : {
            floor: {
              probe: world.probe(),
              yardstick: yardstick!,
              ours: ours!,
              indexDirectory: world.indexDirectory,
            },
          }),
      ...(values['no-resources']
        ? {}
        : {
            sampler: {
              intervalMs: 100,
              networkBytes: () => world.receivedBytes,
              foreign: () => [world.link?.pid, world.registry.pid].filter((pid) => pid !== undefined),
            },
          }),
      say,
    },
    file,
  );
} catch (error) {
  if (!interrupt.signal.aborted) throw error;
  say(`interrupted; to go on, repeat it with --resume --output ${output}`);
  process.exitCode = 130;
} finally {
  if (file.result.starts.length > 0) process.stdout.write(`${await writeReport(file.result, output)}\n`);
}
