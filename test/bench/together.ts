// Different images pulled and started at once, cold: ours without access traces and with them, beside the slowest of them alone
// and beside overlayfs doing the same. Clock and readiness are those of `make bench`.
//   node test/bench/together.ts [--images a,b] [--link lan] [--rounds 5] [--seed N] [--write]
import { randomInt } from 'node:crypto';
import { parseArgs } from 'node:util';
import type { BenchTarget, Contender } from '../../src/bench/contenders.ts';
import { epochMs } from '../../src/bench/meter.ts';
import { execute } from '../../src/bench/node-commands.ts';
import { ProcessMeter } from '../../src/bench/process-use.ts';
import { around, bytes, count, cpu, duration, ratio } from '../../src/bench/report/quantities.ts';
import { pairedRatio, spreadOf } from '../../src/bench/report/statistics.ts';
import { table } from '../../src/bench/report/tables.ts';
import { pairOrder } from '../../src/bench/schedule.ts';
import { BenchContainer, coldStart, dropCaches, forgetImage } from '../../src/bench/start.ts';
import type { AccessTrace } from '../../src/prefetch/access-trace.ts';
import { CONTINENT, LAN, type LinkProfile, REGION } from '../support/link/link.ts';
import { asBenchImage, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';
import { asOfRepository, TraceDirectory } from './traces/trace-directory.ts';
import { type PushedImage, World } from './world.ts';

const LINKS: Readonly<Record<string, LinkProfile>> = { lan: LAN, region: REGION, continent: CONTINENT };
const TIMEOUT_MS = 600_000;

const { values } = parseArgs({
  options: {
    images: { type: 'string', default: 'interpreter,web-server,database,jvm' },
    link: { type: 'string', default: 'lan' },
    rounds: { type: 'string', default: '5' },
    seed: { type: 'string' },
    write: { type: 'boolean', default: false },
  },
});
const profile = LINKS[values.link];
if (profile === undefined) throw new Error(`--link ${values.link}: ${Object.keys(LINKS)}`);
const rounds = Number(values.rounds);
const seed = values.seed === undefined ? randomInt(2 ** 31) : Number(values.seed);
// Takes effect between two measurements: what was made is then removed in order.
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());
const say = (text: string): void => void process.stderr.write(`${text}\n`);

type Way = 'overlayfs' | 'dedup' | 'dedup-trace';
const WAYS: readonly Way[] = ['overlayfs', 'dedup', 'dedup-trace'];

interface Together {
  /** Until the last one was ready, and each. */
  readonly totalMs: number;
  readonly eachMs: readonly number[];
  readonly cpuSeconds: number;
  readonly requests: number;
  readonly wireBytes: number;
}

interface Round {
  readonly way: Way;
  /** Of each image by itself, in the order of the images. */
  readonly aloneMs: readonly number[];
  readonly together: Together;
}

class Bench {
  readonly #world: World;
  readonly #directory: TraceDirectory;
  readonly #images: readonly PushedImage[];
  readonly #traces: readonly AccessTrace[];

  constructor(world: World, directory: TraceDirectory, images: readonly PushedImage[], traces: readonly AccessTrace[]) {
    this.#world = world;
    this.#directory = directory;
    this.#images = images;
    this.#traces = traces;
  }

  #contender(way: Way): Contender {
    return this.#world.contenders[way === 'overlayfs' ? 0 : 1]!;
  }

  async #prepare(way: Way): Promise<void> {
    await this.#directory.set(way === 'dedup-trace' ? this.#traces : []);
  }

  async alone(way: Way, { target }: PushedImage): Promise<number> {
    const { node } = this.#world;
    const contender = { ...this.#contender(way), prepare: async () => await this.#prepare(way) };
    const setup = { node, contender, target, meter: this.#world, timeoutMs: TIMEOUT_MS, signal: interrupt.signal };
    const { result } = await coldStart(setup);
    return result.phases.totalMs;
  }

  async together(way: Way): Promise<Together> {
    const { node } = this.#world;
    const contender = this.#contender(way);
    const targets = this.#images.map(({ target }) => target);
    await this.#prepare(way);
    await dropCaches();
    for (const target of targets) await target.prepare?.();
    const daemons = await contender.daemons();
    const setups = targets.map((target) => ({
      node,
      contender,
      target,
      timeoutMs: TIMEOUT_MS,
      signal: interrupt.signal,
    }));
    const containers = setups.map((setup) => new BenchContainer(setup));
    const use = new ProcessMeter(daemons);
    const startedMs = performance.now();
    const one = async (target: BenchTarget, container: BenchContainer): Promise<number> => {
      await execute(contender.pullCommand(target), { timeoutMs: TIMEOUT_MS });
      await container.create();
      return (await container.startAndWait()) - startedMs;
    };
    // Nothing is taken down before all have ended, whichever way.
    const ends = await Promise.allSettled(targets.map((target, at) => one(target, containers[at]!)));
    try {
      const cpuSeconds = use.use().reduce((sum, process) => sum + process.cpuSeconds, 0);
      const eachMs = ends.map((end) => {
        if (end.status === 'rejected') throw end.reason;
        return end.value;
      });
      const totalMs = Math.max(...eachMs);
      for (const container of containers) await container.remove();
      const requests = await this.#world.requests(epochMs(startedMs), epochMs(startedMs + totalMs));
      const wireBytes = requests.reduce((sum, request) => sum + request.bytes, 0);
      return { totalMs, eachMs, cpuSeconds, requests: requests.length, wireBytes };
    } finally {
      for (const container of containers) await container.remove();
      for (const target of targets) await forgetImage(node, contender.reference(target));
    }
  }
}

function report(all: readonly Round[], names: readonly string[]): string {
  const of = (way: Way): Round[] => all.filter((round) => round.way === way);
  const spread = (values: readonly number[], write: (value: number | undefined) => string): string => {
    const found = spreadOf(values);
    return found === undefined
      ? write(undefined)
      : `${write(found.median)}${around(write, found.median, found.lower, found.upper)}`;
  };
  const divided = (subjects: readonly number[], yardsticks: readonly number[]): string => {
    const found = pairedRatio(
      subjects.map((subject, at) => ({ subject, yardstick: yardsticks[at]! })),
      seed,
    );
    if (found?.interval === undefined) return ratio(found?.value);
    return `${ratio(found.value)} (${ratio(found.interval.low)}–${ratio(found.interval.high)})`;
  };
  const totals = (way: Way): number[] => of(way).map(({ together }) => together.totalMs);
  const rows = WAYS.map((way) => {
    const mine = of(way);
    const slowest = mine.map(({ aloneMs }) => Math.max(...aloneMs));
    return [
      way,
      `**${spread(totals(way), duration)}**`,
      ...names.map((_name, at) =>
        [mine.map(({ together }) => together.eachMs[at]!), mine.map(({ aloneMs }) => aloneMs[at]!)]
          .map((values) => duration(spreadOf(values)?.median))
          .join(', '),
      ),
      divided(totals(way), slowest),
      way === 'overlayfs' ? '1' : divided(totals(way), totals('overlayfs')),
      spread(
        mine.map(({ together }) => together.requests),
        count,
      ),
      spread(
        mine.map(({ together }) => together.wireBytes),
        bytes,
      ),
      spread(
        mine.map(({ together }) => together.cpuSeconds),
        cpu,
      ),
    ];
  });
  const head = [
    'start',
    'all ready',
    ...names.map((name) => `${name}: together, alone`),
    '÷ the slowest alone',
    '÷ overlayfs together',
    'requests',
    'on the wire',
    'CPU',
  ];
  return `\`node test/bench/together.ts --images ${names.join()} --link ${values.link} --rounds ${rounds} --write\` (seed ${seed}): ${names.length} images pulled and
started at the same moment, nothing of them on the node, link ${profile!.name}; medians with quartiles of ${rounds} rounds in random order. \`dedup-trace\`: the
trace of one earlier start of each is there. "The slowest alone": of the same round, one after the other, each cold.

${table(head, rows)}`;
}

await using world = await World.start({ profile, tls: false, peers: [] });
const directory = new TraceDirectory(world.product);
const built = await benchImages(values.images.split(','), ['1'], say);
const images: PushedImage[] = [];
const traces: AccessTrace[] = [];
for (const image of built) {
  say(`${image.tag}: pushing, indexing and recording a start`);
  const pushed = await world.push({ image: asBenchImage(image), dir: image.dir, tag: image.tag });
  images.push(pushed);
  traces.push(asOfRepository(await directory.record(world, world.contenders[1]!, pushed), pushed.target));
}
const bench = new Bench(world, directory, images, traces);
const all: Round[] = [];
for (let round = 0; round < rounds; round++) {
  for (const way of pairOrder<Way>(WAYS, seed, 'together', round)) {
    interrupt.signal.throwIfAborted();
    const aloneMs: number[] = [];
    for (const image of images) aloneMs.push(await bench.alone(way, image));
    const together = await bench.together(way);
    all.push({ way, aloneMs, together });
    const alone = aloneMs.map((ms) => duration(ms)).join(', ');
    say(
      `[${all.length}/${rounds * WAYS.length}] ${way}: all ready after ${duration(together.totalMs)}; alone ${alone}`,
    );
  }
}
const text = report(
  all,
  built.map(({ spec }) => spec.name),
);
process.stdout.write(`${text}\n`);
if (values.write) await writeSection('Several images at once', text);
