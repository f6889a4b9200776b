// What a conversion in the background costs a cold start beside it: a lazy image is started alone and while another image,
// unpacked a moment before, is converted; the conversion alone is measured, too. What both together take more than each
// alone is the price. The two images share nothing, so that the conversion cannot spare the start any bytes.
//   node test/bench/conversion-cost.ts [--start interpreter] [--convert compiler] [--link loopback|lan] [--pairs 10] [--seed N] [--write]
import { randomInt } from 'node:crypto';
import { parseArgs } from 'node:util';
import type { BenchTarget, Contender } from '../../src/bench/contenders.ts';
import { ctr, execute } from '../../src/bench/node-commands.ts';
import { ProcessMeter } from '../../src/bench/process-use.ts';
import { around, bytes, count, cpu, duration, ratio } from '../../src/bench/report/quantities.ts';
import { pairedRatio, spreadOf } from '../../src/bench/report/statistics.ts';
import { table } from '../../src/bench/report/tables.ts';
import { pairOrder } from '../../src/bench/schedule.ts';
import { coldStart, dropCaches, forgetImage, type StartOutcome } from '../../src/bench/start.ts';
import { LAN } from '../support/link/link.ts';
import { asBenchImage, type BuiltBenchImage, benchImages } from './images/bench-images.ts';
import type { ImageVersion } from './images/recipe.ts';
import { writeSection } from './section.ts';
import { allConverted, conversions, underWay } from './space/conversions.ts';
import { World, type WorldImage } from './world.ts';

/** CPU seconds of the start may grow by this much. */
const TARGET = 1.1;

const { values } = parseArgs({
  options: {
    start: { type: 'string', default: 'interpreter' },
    convert: { type: 'string', default: 'compiler' },
    link: { type: 'string', default: 'lan' },
    pairs: { type: 'string', default: '10' },
    seed: { type: 'string' },
    write: { type: 'boolean', default: false },
  },
});
const pairs = Number(values.pairs);
const seed = values.seed === undefined ? randomInt(2 ** 31) : Number(values.seed);
const say = (text: string): void => void process.stderr.write(`${text}\n`);

type Way = 'start' | 'conversion' | 'both';

interface Measured {
  readonly way: Way;
  readonly pair: number;
  /** Of containerd, the service and dedupd, from the beginning to the end of what is measured, cleaning included. */
  readonly cpuSeconds: number;
  readonly start?: StartOutcome;
  /** The conversion was still under way when the start was over. */
  readonly outlasted?: boolean;
}

class Bench {
  readonly #world: World;
  readonly #ours: Contender;
  readonly #target: BenchTarget;
  readonly #ordinary: string;

  constructor(world: World, target: BenchTarget, ordinary: string) {
    this.#world = world;
    this.#ours = world.contenders[1]!;
    this.#target = target;
    this.#ordinary = ordinary;
  }

  async measure(way: Way, pair: number): Promise<Measured> {
    const { product, node } = this.#world;
    if (way !== 'start') await this.#unpack();
    try {
      await dropCaches();
      const taken = await this.#processorTime();
      if (way === 'conversion') {
        await conversions(product, 'resume');
        await allConverted(product);
        return { way, pair, cpuSeconds: taken() };
      }
      const prepare = async (): Promise<void> => {
        await this.#target.prepare?.();
        if (way === 'both') await conversions(product, 'resume');
      };
      const { result: start } = await coldStart({
        node,
        contender: this.#ours,
        target: { ...this.#target, prepare },
        meter: this.#world,
        timeoutMs: 600_000,
      });
      const outlasted = way === 'both' && underWay(await conversions(product, 'status'));
      if (way === 'both') await allConverted(product);
      return {
        way,
        pair,
        cpuSeconds: taken(),
        start,
        ...(way === 'both' ? { outlasted } : {}),
      };
    } finally {
      if (way !== 'start') await forgetImage(node, this.#ordinary);
    }
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

  /** Answers with what the daemons took since this call, their children included, seconds. */
  async #processorTime(): Promise<() => number> {
    const meter = new ProcessMeter(await this.#ours.daemons());
    return () => {
      // The commands are those of the start and, many more, those that look how far the conversion is.
      const daemons = meter.use().filter(({ name }) => name !== 'commands');
      if (daemons.some((daemon) => daemon.pssBytes === 0)) throw new Error('a daemon has ended');
      return daemons.reduce((sum, daemon) => sum + daemon.cpuSeconds, 0);
    };
  }
}

function report(all: readonly Measured[], images: string): string {
  const of = (way: Way): Measured[] => all.filter((one) => one.way === way).sort((a, b) => a.pair - b.pair);
  const [alone, converting, both] = [of('start'), of('conversion'), of('both')];
  const spread = (numbers: readonly number[], write: (value: number | undefined) => string): string => {
    const found = spreadOf(numbers);
    return found === undefined
      ? write(undefined)
      : `${write(found.median)}${around(write, found.median, found.lower, found.upper)}`;
  };
  const charged = both.map(({ cpuSeconds: together }, at) => together - converting[at]!.cpuSeconds);
  const subject = charged.map((seconds, at) => ({ subject: seconds, yardstick: alone[at]!.cpuSeconds }));
  const found = pairedRatio(subject, seed);
  const interval = found?.interval;
  const row = (name: string, starts: readonly Measured[], cpuTimes: readonly number[]): string[] => [
    name,
    spread(cpuTimes, cpu),
    spread(
      starts.map(({ start }) => start!.phases.totalMs),
      duration,
    ),
    spread(
      starts.map(({ start }) => start!.requests),
      count,
    ),
    spread(
      starts.map(({ start }) => start!.wireBytes),
      bytes,
    ),
  ];
  const cpuTimes = (measured: readonly Measured[]): number[] => measured.map((one) => one.cpuSeconds);
  const rows = [
    row('start alone', alone, cpuTimes(alone)),
    row('start beside a conversion', both, charged),
    ['conversion alone', spread(cpuTimes(converting), cpu), '', '', ''],
    ['both together', spread(cpuTimes(both), cpu), '', '', ''],
  ];
  const requests = (measured: readonly Measured[]): number =>
    spreadOf(measured.map(({ start }) => start!.requests))!.median;
  const more = requests(both) - requests(alone);
  const short = both.filter(({ outlasted }) => outlasted !== true).length;
  const goal = (found?.value ?? Number.NaN) <= TARGET && more <= 0;
  return `\`node test/bench/conversion-cost.ts --pairs ${pairs} --write\` (seed ${seed}): ${images}, link ${values.link}, interleaved in random order,
medians with quartiles. CPU: containerd, the service and dedupd. What a start beside a conversion takes is what both take together less what
the conversion takes alone. The conversion outlasted the start in ${both.length - short} of ${both.length} pairs.

${table(['what', 'CPU', 'until ready', 'requests', 'on the wire'], rows)}
CPU of the start, beside a conversion ÷ alone: ${ratio(found?.value)}${interval === undefined ? '' : ` (${ratio(interval.low)}–${ratio(interval.high)})`}, \
at most ${TARGET} aimed for; requests more (medians): ${count(more)}. ${goal ? 'Reached' : 'NOT REACHED'}.
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

await using world = await World.start({ ...(values.link === 'lan' ? { profile: LAN } : {}), tls: false, peers: [] });
say('pushing');
const { target } = await world.push(worldImage(startImage!));
const { target: ordinary } = await world.push(worldImage(convertImage!), { index: false });
const bench = new Bench(world, target, ordinary.plain);
const all: Measured[] = [];
for (let pair = 0; pair < pairs; pair++) {
  for (const way of pairOrder<Way>(['start', 'conversion', 'both'], seed, 'conversion-cost', pair)) {
    const measured = await bench.measure(way, pair);
    all.push(measured);
    const { start, cpuSeconds: seconds } = measured;
    const ready =
      start === undefined ? '' : `, ready after ${duration(start.phases.totalMs)}, ${start.requests} requests`;
    say(`[${all.length}/${pairs * 3}] pair ${pair + 1}, ${way}: ${cpu(seconds)} of CPU${ready}`);
  }
}
const text = report(
  all,
  `start of ${values.start}, conversion of ${convertImage!.tag} (${bytes(convertImage!.uncompressedBytes)})`,
);
process.stdout.write(`${text}\n`);
if (values.write) await writeSection('A conversion beside a cold start', text);
