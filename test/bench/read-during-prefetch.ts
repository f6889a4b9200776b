// What a reader waits for cold blocks of one image while the access trace of another image is fetched at full speed, beside
// the same on an idle link. Blocks are read one after the other by this process, each from a span that is not here.
//   node test/bench/read-during-prefetch.ts [--read compiler] [--prefetch model-server] [--links lan,region] [--samples 120] [--rounds 20] [--seed N] [--write]
import { spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { closeSync, constants, openSync, readSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { quantileSorted } from 'd3-array';
import { readIndexes, withoutReadahead } from '../../src/bench/needed.ts';
import { bytes, count, duration, ratio } from '../../src/bench/report/quantities.ts';
import { table } from '../../src/bench/report/tables.ts';
import { dropCaches, forgetImage } from '../../src/bench/start.ts';
import type { AccessTrace } from '../../src/prefetch/access-trace.ts';
import { waitFor } from '../support/containerd.ts';
import { CONTINENT, LAN, type LinkProfile, REGION } from '../support/link/link.ts';
import { asBenchImage, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';
import { type ColdBlock, coldBlocks } from './traces/cold-blocks.ts';
import { asOfRepository, TraceDirectory } from './traces/trace-directory.ts';
import { type PushedImage, World } from './world.ts';

const LINKS: Readonly<Record<string, LinkProfile>> = { lan: LAN, region: REGION, continent: CONTINENT };
/** Fewer say nothing about the slowest of a hundred. */
const LEAST_SAMPLES = 100;
/** Reads on the idle link in one round. */
const IDLE_READS = 40;
/** A prefetch that has brought nothing for so long is over. */
const OVER_MS = 1500;
/** From the pull to the first prefetched byte at most. */
const BEGIN_MS = 60_000;
const CLI_TIMEOUT_MS = 600_000;

const { values } = parseArgs({
  options: {
    read: { type: 'string', default: 'compiler' },
    prefetch: { type: 'string', default: 'model-server' },
    links: { type: 'string', default: 'lan,region' },
    samples: { type: 'string', default: '120' },
    rounds: { type: 'string', default: '20' },
    seed: { type: 'string' },
    write: { type: 'boolean', default: false },
  },
});
const linkKeys = values.links.split(',');
for (const key of linkKeys) if (!Object.hasOwn(LINKS, key)) throw new Error(`--links ${key}: ${Object.keys(LINKS)}`);
const samples = Number(values.samples);
const seed = values.seed === undefined ? randomInt(2 ** 31) : Number(values.seed);
// Takes effect between two reads: what was made is then removed in order.
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());
const say = (text: string): void => void process.stderr.write(`${text}\n`);

/** Of one round: waits, and what prefetch brought meanwhile. */
interface Round {
  readonly idleMs: readonly number[];
  readonly besideMs: readonly number[];
  readonly prefetchBytes: number;
  readonly prefetchMs: number;
}

class Bench {
  readonly #world: World;
  readonly #directory: TraceDirectory;
  /** What is read. */
  readonly #read: PushedImage;
  readonly #prefetched: PushedImage;
  readonly #trace: AccessTrace;
  readonly #mount: string;

  constructor(
    world: World,
    directory: TraceDirectory,
    images: { read: PushedImage; prefetched: PushedImage; trace: AccessTrace },
  ) {
    this.#world = world;
    this.#directory = directory;
    this.#read = images.read;
    this.#prefetched = images.prefetched;
    this.#trace = images.trace;
    this.#mount = join(world.product.dir, 'mnt');
  }

  /** Both variants once, in the order that `idleFirst` says, on a node that has neither image. */
  async round(number: number, idleFirst: boolean): Promise<Round> {
    const { product, node, indexDirectory } = this.#world;
    await this.#forgotten();
    await this.#directory.set([this.#trace]);
    await mkdir(this.#mount, { recursive: true });
    await product.cli(['mount', this.#read.target.lazy, this.#mount], { timeoutMs: CLI_TIMEOUT_MS });
    try {
      const indexes = await readIndexes(indexDirectory);
      const layers = this.#read.layers.map((digest) => indexes.get(digest)!);
      const blocks = coldBlocks(layers, `${seed} ${number}`).values();
      const restore = await withoutReadahead([this.#mount]);
      try {
        await dropCaches();
        for (const { target } of [this.#read, this.#prefetched]) await target.prepare?.();
        const before = idleFirst ? await this.#idle(blocks) : [];
        const beside = await this.#beside(blocks);
        const after = idleFirst ? [] : await this.#idle(blocks);
        return { ...beside, idleMs: [...before, ...after] };
      } finally {
        await restore();
      }
    } finally {
      await product.cli(['umount', this.#mount]);
      await forgetImage(node, this.#prefetched.target.lazy);
    }
  }

  /** No snapshot names a layer, so dedupd may drop all of them. */
  async #forgotten(): Promise<void> {
    const { client } = this.#world.product;
    await waitFor(
      'the node to have forgotten both images',
      async () => {
        await client.retainLayers([]);
        return (await client.stats()).present_bytes === 0;
      },
      60_000,
    );
  }

  async #idle(blocks: Iterable<ColdBlock>): Promise<number[]> {
    const waits: number[] = [];
    for (const block of blocks) {
      const waited = await this.#wait(block);
      if (waited !== undefined) waits.push(waited.ms);
      if (waits.length >= IDLE_READS) break;
    }
    return waits;
  }

  async #beside(blocks: IterableIterator<ColdBlock>): Promise<Omit<Round, 'idleMs'>> {
    const { product, contenders } = this.#world;
    const before = (await product.stats()).prefetch_bytes;
    const [program = '', ...args] = contenders[1]!.pullCommand(this.#prefetched.target);
    const pull = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] });
    let said = '';
    pull.stderr.on('data', (data: Buffer) => {
      said += data.toString();
    });
    const pulled = new Promise<void>((resolve, reject) => {
      pull.once('error', reject);
      pull.once('exit', (code) => (code === 0 ? resolve() : reject(new Error(`rpull ended with ${code}: ${said}`))));
    });
    pulled.catch(() => undefined); // Looked at below, after the reads.
    try {
      const begunMs = await this.#begun(before);
      const found: { ms: number; prefetched: number }[] = [];
      let [last, lastMs] = [before, begunMs];
      for (let done = false; !done; ) {
        const next = blocks.next();
        const waited = next.done === true ? undefined : await this.#wait(next.value);
        const prefetched = waited?.prefetched ?? (await product.stats()).prefetch_bytes;
        if (waited !== undefined) found.push(waited);
        if (prefetched > last) [last, lastMs] = [prefetched, performance.now()];
        done = performance.now() - lastMs > OVER_MS;
        if (next.done === true) await sleep(10);
      }
      // A read counts when prefetch still brought something after it.
      const besideMs = found.filter((one) => one.prefetched < last).map(({ ms }) => ms);
      return { besideMs, prefetchBytes: last - before, prefetchMs: lastMs - begunMs };
    } finally {
      await pulled;
    }
  }

  /** When prefetch had brought its first bytes. Errors: when it brings none. */
  async #begun(before: number): Promise<number> {
    const { product } = this.#world;
    const untilMs = performance.now() + BEGIN_MS;
    while ((await product.stats()).prefetch_bytes === before) {
      if (performance.now() > untilMs)
        throw new Error(`the trace of ${this.#prefetched.target.lazy} was there, and dedupd prefetched nothing by it`);
      await sleep(5);
    }
    return performance.now();
  }

  /** The wait of one block, and what prefetch had brought after it; undefined when the block was here or has no such file. */
  async #wait({ path, length }: ColdBlock): Promise<{ ms: number; prefetched: number } | undefined> {
    interrupt.signal.throwIfAborted();
    const { product } = this.#world;
    const before = await product.stats();
    let fd: number;
    try {
      fd = openSync(Buffer.concat([Buffer.from(`${this.#mount}/`), Buffer.from(path, 'latin1')]), constants.O_RDONLY);
    } catch (error) {
      // A layer above has removed it.
      if (['ENOENT', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')) return undefined;
      throw error;
    }
    try {
      const startedMs = performance.now();
      readSync(fd, Buffer.alloc(length), 0, length, 0);
      const ms = performance.now() - startedMs;
      const after = await product.stats();
      return after.misses > before.misses ? { ms, prefetched: after.prefetch_bytes } : undefined;
    } finally {
      closeSync(fd);
    }
  }
}

async function measure(bench: Bench, key: string): Promise<Round[]> {
  const rounds: Round[] = [];
  const had = (pick: (round: Round) => readonly number[]): number =>
    rounds.reduce((sum, round) => sum + pick(round).length, 0);
  while (had(({ idleMs }) => idleMs) < samples || had(({ besideMs }) => besideMs) < samples) {
    if (rounds.length >= Number(values.rounds)) break;
    const round = await bench.round(rounds.length, rounds.length % 2 === 0);
    rounds.push(round);
    const { prefetchBytes, prefetchMs } = round;
    say(
      `${key}, round ${rounds.length}: ${had(({ idleMs }) => idleMs)} reads on the idle link, ${had(({ besideMs }) => besideMs)} ` +
        `beside a prefetch of ${bytes(prefetchBytes)} in ${duration(prefetchMs)}`,
    );
  }
  return rounds;
}

function rowsOf(key: string, rounds: readonly Round[]): string[][] {
  const sorted = (pick: (round: Round) => readonly number[]): number[] =>
    rounds.flatMap(pick).toSorted((a, b) => a - b);
  const idle = sorted(({ idleMs }) => idleMs);
  const beside = sorted(({ besideMs }) => besideMs);
  const [prefetchBytes, prefetchMs] = [
    rounds.reduce((sum, round) => sum + round.prefetchBytes, 0),
    rounds.reduce((sum, round) => sum + round.prefetchMs, 0),
  ];
  const at = (of: readonly number[], part: number): number => quantileSorted([...of], part) ?? Number.NaN;
  const row = (what: string, of: readonly number[]): string[] => [
    LINKS[key]!.name,
    what,
    `${count(of.length)}${of.length < LEAST_SAMPLES ? ', too few' : ''}`,
    duration(at(of, 0.5)),
    duration(at(of, 0.99)),
    duration(of.at(-1)),
    ...[0.5, 0.99].map((part) => (of === idle ? '1' : ratio(at(of, part) / at(idle, part)))),
    of === idle ? '—' : `${bytes((prefetchBytes / prefetchMs) * 1000)}/s`,
  ];
  return [row('idle link', idle), row('beside a prefetch', beside)];
}

await using world = await World.start({ profile: LAN, tls: false, peers: [] });
const directory = new TraceDirectory(world.product);
const [readImage, prefetchImage] = await benchImages([values.read, values.prefetch], ['1'], say);
const shared = readImage!.layers.filter(({ digest }) => prefetchImage!.layers.some((layer) => layer.digest === digest));
if (shared.length > 0) throw new Error(`${values.read} and ${values.prefetch} share ${shared.length} layers`);
const pushed: PushedImage[] = [];
for (const image of [readImage!, prefetchImage!]) {
  say(`${image.tag}: pushing and indexing`);
  pushed.push(await world.push({ image: asBenchImage(image), dir: image.dir, tag: image.tag }));
}
const [read, prefetched] = [pushed[0]!, pushed[1]!];
say(`${prefetchImage!.tag}: recording a start`);
const trace = asOfRepository(await directory.record(world, world.contenders[1]!, prefetched), prefetched.target);
const bench = new Bench(world, directory, { read, prefetched, trace });
const rows: string[][] = [];
for (const key of linkKeys) {
  const { name, roundTripMs, bitsPerSecond } = LINKS[key]!;
  await world.enter({ name, roundTripMs, bitsPerSecond, tls: false });
  rows.push(...rowsOf(key, await measure(bench, key)));
}
const head = ['link', 'reads', 'n', 'p50', 'p99', 'slowest', 'p50 ÷ idle', 'p99 ÷ idle', 'prefetched meanwhile'];
const text = `\`node test/bench/read-during-prefetch.ts --links ${values.links} --samples ${samples} --write\` (seed ${seed}): what a process waits for single blocks of
${values.read}, mounted with nothing of it here: one after the other, each in a span of its own, without the kernel's readahead. "Beside a
prefetch": while dedupd fetches what the trace of ${values.prefetch} names, after an \`rpull\` of it and before there is a container. Reads
that met no miss are left out.

${table(head, rows)}`;
process.stdout.write(`${text}\n`);
if (values.write) await writeSection('Reads beside a prefetch', text);
