// What a conversion in the background costs a cold start beside it: a lazy image is started alone, and while another image,
// unpacked a moment before, is being converted. Compared is what the node's processes take until the container is ready, without
// threads at idle priority, which are the conversion's. The two images share nothing, so that it cannot spare the start any bytes.
//   node test/bench/conversion-cost.ts [--start interpreter] [--convert compiler] [--link loopback|lan] [--pairs 10] [--seed N] [--no-prefetch] [--write]
// What is fetched ahead depends on how quickly answers come, so on everything that runs beside; with --no-prefetch requests are
// those of the readers alone, and a difference is the conversion's.
import { randomInt } from 'node:crypto';
import { parseArgs } from 'node:util';
import type { BenchTarget } from '../../src/bench/contenders.ts';
import { ctr, execute } from '../../src/bench/node-commands.ts';
import { around, bytes, count, cpu, duration, ratio } from '../../src/bench/report/quantities.ts';
import { pairedRatio, type Ratio, spreadOf } from '../../src/bench/report/statistics.ts';
import { table } from '../../src/bench/report/tables.ts';
import { pairOrder } from '../../src/bench/schedule.ts';
import { coldStart, forgetImage, type StartOutcome } from '../../src/bench/start.ts';
import { MiB } from '../../src/units.ts';
import { waitFor } from '../support/containerd.ts';
import { LAN } from '../support/link/link.ts';
import { asBenchImage, type BuiltBenchImage, benchImages } from './images/bench-images.ts';
import type { ImageVersion } from './images/recipe.ts';
import { writeSection } from './section.ts';
import { conversions, underWay } from './space/conversions.ts';
import { World, type WorldImage } from './world.ts';

/** CPU seconds of the start may grow by this much. */
const TARGET = 1.1;
/** Once so many bytes of a layer were read, the conversion does what it does all the time. */
const FULL_SPEED_BYTES = 8 * MiB;

const { values } = parseArgs({
  options: {
    start: { type: 'string', default: 'interpreter' },
    convert: { type: 'string', default: 'compiler' },
    link: { type: 'string', default: 'lan' },
    pairs: { type: 'string', default: '10' },
    seed: { type: 'string' },
    'no-prefetch': { type: 'boolean', default: false },
    write: { type: 'boolean', default: false },
  },
});
const pairs = Number(values.pairs);
const seed = values.seed === undefined ? randomInt(2 ** 31) : Number(values.seed);
// Takes effect between two measurements: what was made is then removed in order.
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());
const say = (text: string): void => void process.stderr.write(`${text}\n`);

type Way = 'alone' | 'beside';

interface Measured extends StartOutcome {
  readonly way: Way;
  readonly pair: number;
  /** The conversion was under way when the clock started, and still when the start was over. */
  readonly throughout: boolean;
}

class Bench {
  readonly #world: World;
  readonly #target: BenchTarget;
  readonly #ordinary: string;

  constructor(world: World, target: BenchTarget, ordinary: string) {
    this.#world = world;
    this.#target = target;
    this.#ordinary = ordinary;
  }

  async measure(way: Way, pair: number): Promise<Measured> {
    const { product, node } = this.#world;
    if (way === 'alone') return { ...(await this.#start()), way, pair, throughout: false };
    await this.#unpack();
    try {
      const start = await this.#start(async () => await this.#convert());
      const throughout = underWay(await conversions(product, 'status'));
      return { ...start, way, pair, throughout };
    } finally {
      await conversions(product, 'pause');
      await forgetImage(node, this.#ordinary);
    }
  }

  async #start(prepare?: () => Promise<void>): Promise<StartOutcome> {
    const { node, contenders } = this.#world;
    const { result } = await coldStart({
      node,
      contender: contenders[1]!,
      target: {
        ...this.#target,
        prepare: async () => {
          await this.#target.prepare?.();
          await prepare?.();
        },
      },
      meter: this.#world,
      timeoutMs: 600_000,
    });
    return result;
  }

  /** Leaves layers that wait for their conversion. */
  async #unpack(): Promise<void> {
    const { node, product } = this.#world;
    await conversions(product, 'pause');
    const pull = ctr(node, 'image', 'pull', ...node.pullFlags, '--snapshotter', 'dedup', this.#ordinary);
    await execute(pull, { timeoutMs: 600_000 });
    const { pending } = await conversions(product, 'status');
    if (pending === 0) throw new Error(`${this.#ordinary} was unpacked, and nothing waits for its conversion`);
  }

  /** Returns when the conversion is at full speed. */
  async #convert(): Promise<void> {
    const { product } = this.#world;
    await conversions(product, 'resume');
    await waitFor(
      'the conversion to read',
      async () => ((await conversions(product, 'status')).current?.bytes ?? 0) > FULL_SPEED_BYTES,
      60_000,
    );
  }
}

function report(all: readonly Measured[], images: string): string {
  const of = (way: Way): Measured[] => all.filter((one) => one.way === way).sort((a, b) => a.pair - b.pair);
  const [alone, beside] = [of('alone'), of('beside')];
  const spread = (
    starts: readonly Measured[],
    pick: (start: Measured) => number,
    write: (value: number | undefined) => string,
  ): string => {
    const found = spreadOf(starts.map(pick));
    return found === undefined
      ? write(undefined)
      : `${write(found.median)}${around(write, found.median, found.lower, found.upper)}`;
  };
  const ratioOf = (pick: (start: Measured) => number): Ratio | undefined =>
    pairedRatio(
      beside.map((start, at) => ({ subject: pick(start), yardstick: pick(alone[at]!) })),
      seed,
    );
  const ratioText = (found: Ratio | undefined): string =>
    found?.interval === undefined
      ? ratio(found?.value)
      : `${ratio(found.value)} (${ratio(found.interval.low)}–${ratio(found.interval.high)})`;
  const cpuOf = ({ processes }: Measured): number => processes.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0);
  const idleOf = ({ processes }: Measured): number =>
    processes.reduce((sum, { idleCpuSeconds = 0 }) => sum + idleCpuSeconds, 0);
  const chargedOf = (start: Measured): number => cpuOf(start) - idleOf(start);
  const timeOf = ({ phases }: Measured): number => phases.totalMs;
  const requestsOf = ({ requests }: Measured): number => requests;
  const names = alone[0]!.processes.map(({ name }) => name);
  const cpuOfProcess = (wanted: string) => (start: Measured) =>
    start.processes.find(({ name }) => name === wanted)?.cpuSeconds ?? 0;
  const row = (what: string, starts: readonly Measured[]): string[] => [
    what,
    spread(starts, chargedOf, cpu),
    spread(starts, idleOf, cpu),
    ...names.map((name) => spread(starts, cpuOfProcess(name), cpu)),
    spread(starts, timeOf, duration),
    spread(starts, requestsOf, count),
    spread(starts, ({ wireBytes }) => wireBytes, bytes),
  ];
  const head = [
    'start',
    'CPU until ready',
    'and idle threads',
    ...names.map((name) => `of it ${name}`),
    'until ready',
    'requests',
    'on the wire',
  ];
  const cpuRatio = ratioOf(chargedOf);
  const more = spreadOf(beside.map(requestsOf))!.median - spreadOf(alone.map(requestsOf))!.median;
  const throughout = beside.filter((start) => start.throughout).length;
  const reached = (cpuRatio?.value ?? Number.NaN) <= TARGET && more <= 0 && throughout === beside.length;
  return `\`node test/bench/conversion-cost.ts --pairs ${pairs}${values['no-prefetch'] ? ' --no-prefetch' : ''} --write\` (seed ${seed}): ${images}, link ${values.link}, interleaved in random order,
medians with quartiles. The conversion was at full speed when the clock started, and not at its end when the container was ready, in ${throughout} of ${beside.length}
pairs. CPU is all that the processes took in that time less what threads took that run only when nobody else wants the processor
(SCHED_IDLE): those are the conversion's. What it does elsewhere counts as the start's.

${table(head, [row('alone', alone), row('beside a conversion', beside)])}
Beside a conversion ÷ alone: CPU ${ratioText(cpuRatio)}, at most ${TARGET} aimed for (idle threads included ${ratioText(ratioOf(cpuOf))}); time ${ratioText(ratioOf(timeOf))}; requests more (medians): ${count(more)}. \
${reached ? 'Reached' : 'NOT REACHED'}.
`;
}

const version: ImageVersion = '1';
const [startImage] = await benchImages([values.start], [version], say);
// Version 2 of the compiler stands on another base than the other images do.
const [convertImage] = await benchImages([values.convert], ['2'], say);
const shared = startImage!.layers.filter(({ digest }) => convertImage!.layers.some((layer) => layer.digest === digest));
if (shared.length > 0) throw new Error(`${values.start} and ${values.convert} share ${shared.length} layers`);

const worldImage = (image: BuiltBenchImage): WorldImage => ({
  image: asBenchImage(image),
  dir: image.dir,
  tag: image.tag,
});

const config = values['no-prefetch'] ? { prefetch: { enabled: false } } : {};
await using world = await World.start({
  ...(values.link === 'lan' ? { profile: LAN } : {}),
  tls: false,
  peers: [],
  config,
});
say('pushing');
const { target } = await world.push(worldImage(startImage!));
const { target: ordinary } = await world.push(worldImage(convertImage!), { index: false });
const bench = new Bench(world, target, ordinary.plain);
const all: Measured[] = [];
// Once uncounted: what runs for the first time is compiled first.
for (const way of ['alone', 'beside'] as const) await bench.measure(way, -1);
for (let pair = 0; pair < pairs; pair++) {
  for (const way of pairOrder<Way>(['alone', 'beside'], seed, 'conversion-cost', pair)) {
    interrupt.signal.throwIfAborted();
    const measured = await bench.measure(way, pair);
    all.push(measured);
    const { phases, requests, processes } = measured;
    const seconds = processes.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0);
    say(
      `[${all.length}/${pairs * 2}] pair ${pair + 1}, ${way}: ${cpu(seconds)} of CPU, ready after ` +
        `${duration(phases.totalMs)}, ${requests} requests`,
    );
  }
}
const text = report(
  all,
  `start of ${values.start}, conversion of ${convertImage!.tag} (${bytes(convertImage!.uncompressedBytes)})`,
);
process.stdout.write(`${text}\n`);
if (values.write)
  await writeSection(`A conversion beside a cold start${values['no-prefetch'] ? ', nothing fetched ahead' : ''}`, text);
