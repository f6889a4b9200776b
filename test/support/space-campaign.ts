// A whole node that has too little room: images that share content, lazy, read whole and converted, run and are removed in
// random order; cold pieces are evicted, everything unused is collected, processes are killed, and every byte that a container
// reads is compared. Used by a test (minutes) and by `make soak` (an hour).
import { createHash, randomInt } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { MiB } from '../../src/units.ts';
import { pidOf, sumOfFile } from './cold-container.ts';
import { waitFor } from './containerd.ts';
import { busyboxEntries, type LayerSource } from './images.ts';
import { LazyNode, NOTHING_LEFT, noise, type PublishedImage } from './lazy-node.ts';
import { seededRandom } from './random-layers.ts';

export interface SpaceCampaignOptions {
  readonly seconds: number;
  readonly seed?: number;
  readonly say: (text: string) => void;
}

export interface SpaceCampaignResult {
  readonly seed: number;
  /** Files read and compared, and how many of them failed with EIO because the daemon was away. */
  reads: number;
  eio: number;
  /** Reads out of directories, and out of images that were here in part, completely, and read by the kernel without dedupd. */
  directory: number;
  half: number;
  hydrated: number;
  direct: number;
  /** Of them, out of layers that containerd unpacked and the store took over since. */
  converted: number;
  starts: number;
  removals: number;
  kills: number;
  /** Of dedupd, while a container read that does not need it. */
  killsUnnoticed: number;
  collections: number;
  /** Bytes evicted, as far as `gc` and the log told. */
  evictions: number;
  /** What must not be: wrong bytes, errors without a cause, containers that ended, things left at the end. */
  readonly wrong: string[];
}

/** Every file has one of these contents, by number; sizes of one piece, of several, and of several chunks. */
const CONTENTS = 48;
const sizeOf = (content: number): number => [40_000, 300_000, 1_500_000, 5_000_000][content % 4]! + content * 13;
const FILES = 10;
const IMAGES = 8;
const MOST_TARGETS = 4;
const QUOTA_BYTES = 20 * MiB;
/** What reads of the registry wait, so that kills and removals meet some under way. */
const DELAY_MS = 20;

const sums = new Map<number, string>();
function sumOf(content: number): string {
  let sum = sums.get(content);
  if (sum === undefined) {
    sum = createHash('sha256')
      .update(noise(sizeOf(content), `space ${content}`))
      .digest('hex');
    sums.set(content, sum);
  }
  return sum;
}

const WAYS = ['lazy', 'read whole', 'converted'] as const;
type Way = (typeof WAYS)[number];

type Served = 'directory' | 'half' | 'hydrated' | 'direct';

/** The lower directory of a container's root, the uppermost where there are several. */
function rootLower(pid: number): string {
  const root = readFileSync(`/proc/${pid}/mountinfo`, 'utf8')
    .split('\n')
    .find((line) => line.split(' ')[4] === '/');
  return /lowerdir=([^,:]*)/.exec(root ?? '')?.[1] ?? '';
}

interface PoolImage {
  readonly published: PublishedImage;
  /** The content of each file. */
  readonly files: readonly number[];
}

interface Target {
  readonly name: string;
  readonly image: PoolImage;
  readonly way: Way;
  readonly reference: string;
  readonly pid: number;
}

export class SpaceCampaign {
  readonly #node: LazyNode;
  readonly #options: SpaceCampaignOptions;
  readonly #random: (below: number) => number;
  readonly #result: SpaceCampaignResult;
  readonly #pool: PoolImage[] = [];
  #targets: Target[] = [];
  #started = 0;
  #daemonKills: number[] = [];

  private constructor(node: LazyNode, options: SpaceCampaignOptions) {
    this.#node = node;
    this.#options = options;
    const seed = options.seed ?? randomInt(2 ** 31);
    this.#random = seededRandom(seed);
    const served = { directory: 0, half: 0, hydrated: 0, direct: 0, converted: 0 };
    const done = { starts: 0, removals: 0, kills: 0, killsUnnoticed: 0, collections: 0, evictions: 0 };
    this.#result = { seed, reads: 0, eio: 0, ...served, ...done, wrong: [] };
  }

  static async run(options: SpaceCampaignOptions): Promise<SpaceCampaignResult> {
    const node = await LazyNode.start({
      config: { convert_ordinary: true, quota_bytes: QUOTA_BYTES, publish_index: 'off', log_level: 'info' },
      containerd: { lifetimeSeconds: options.seconds + 1200 },
    });
    try {
      const campaign = new SpaceCampaign(node, options);
      options.say(`seed ${campaign.#result.seed}`);
      await campaign.#run();
      return campaign.#result;
    } finally {
      await node.stop();
    }
  }

  async #run(): Promise<void> {
    await this.#makePool();
    this.#node.proxy.setRules({ path: /\/blobs\//, fault: { kind: 'delay', ms: DELAY_MS } });
    const until = performance.now() + this.#options.seconds * 1000;
    let saidMs = performance.now();
    while (performance.now() < until) {
      await this.#step();
      if (performance.now() - saidMs < 60_000) continue;
      saidMs = performance.now();
      this.#options.say(JSON.stringify(this.#result));
    }
    await this.#finish();
  }

  async #makePool(): Promise<void> {
    const bottom: LayerSource = { entries: await busyboxEntries(['sh', 'sleep']) };
    for (let i = 0; i < IMAGES; i++) {
      const files = Array.from({ length: FILES }, () => this.#random(CONTENTS));
      const entries = files.map((content, at) => ({
        name: `data/f${at}`,
        content: noise(sizeOf(content), `space ${content}`),
      }));
      // A lazy image with a file that nobody reads is never here completely: dedupd serves it for as long as it is mounted.
      const unread = i % 2 === 0 ? [] : [{ name: 'data/unread', content: noise(200_000, `unread ${i}`) }];
      const half = FILES / 2;
      // Every layer has its own digest; what it holds others hold, too.
      const layers: LayerSource[] = [
        bottom,
        { entries: [{ name: `mark-${i}`, content: `${i}` }, ...entries.slice(0, half)] },
        { entries: [...entries.slice(half), ...unread] },
      ];
      this.#pool.push({ published: await this.#node.publish(`space/${i}`, layers), files });
    }
  }

  async #step(): Promise<void> {
    const target = this.#targets[this.#random(Math.max(1, this.#targets.length))];
    const dice = this.#random(100);
    if (target === undefined || (dice < 8 && this.#targets.length < MOST_TARGETS)) return await this.#start();
    if (dice < 60) return await this.#read(target, this.#random(FILES));
    if (dice < 70) return await this.#readAll(target);
    if (dice < 78) return await writeFile('/proc/sys/vm/drop_caches', '1');
    if (dice < 84) return await this.#remove(target);
    if (dice < 90) return await this.#collect();
    if (dice < 94) return await this.#kill('service', target);
    return await this.#kill('dedupd', target);
  }

  async #start(): Promise<void> {
    const image = this.#pool[this.#random(IMAGES)]!;
    const way = WAYS[this.#random(WAYS.length)]!;
    const name = `space-${++this.#started}`;
    const { containerd } = this.#node;
    const reference = way === 'lazy' ? image.published.lazy : image.published.plain;
    try {
      if (way === 'converted') {
        const args = ['images', 'pull', '--plain-http', '--snapshotter', 'dedup', reference];
        await containerd.ctr(args, { timeoutMs: 120_000 });
      } else {
        await this.#node.rpull(reference);
      }
      await containerd.ctr(['run', '-d', '--snapshotter', 'dedup', reference, name, '/bin/sleep', '1000000']);
      const pid = await pidOf(this.#node, name);
      if (pid === undefined) throw new Error('it does not run');
      this.#targets.push({ name, image, way, reference, pid });
      this.#result.starts++;
    } catch (error) {
      this.#result.wrong.push(`${name} (${way}) did not start: ${(error as Error).message}`);
    }
  }

  /** How the files of a container were served when it was asked: by a directory, or by an image in which state. */
  async #served({ pid }: Target): Promise<Served | undefined> {
    const mount = rootLower(pid);
    if (!/\/mounts\/\d+$/.test(mount)) return 'directory';
    // Nobody answers while the daemon is away.
    const images = await this.#node.product.client.listImages().catch(() => []);
    const image = images.find(({ path }) => path === mount);
    if (image === undefined) return undefined;
    if (image.transport === 'direct') return 'direct';
    return image.present_bytes < image.total_bytes ? 'half' : 'hydrated';
  }

  async #read(target: Target, file: number): Promise<void> {
    const served = await this.#served(target);
    if (served !== undefined) this.#result[served]++;
    if (target.way === 'converted' && served !== undefined && served !== 'directory') this.#result.converted++;
    this.#judge(target, file, await sumOfFile(`/proc/${target.pid}/root/data/f${file}`), false);
  }

  async #readAll(target: Target): Promise<void> {
    for (let file = 0; file < FILES; file++) await this.#read(target, file);
  }

  #judge({ name, way, image }: Target, file: number, sum: string, mayFail: boolean): void {
    this.#result.reads++;
    if (sum === 'EIO') this.#result.eio++;
    const content = image.files[file]!;
    if (sum === sumOf(content) || (sum === 'EIO' && mayFail)) return;
    const zeros = createHash('sha256')
      .update(Buffer.alloc(sizeOf(content)))
      .digest('hex');
    this.#result.wrong.push(`${name} (${way}), f${file}: ${sum === zeros ? 'ZEROS' : sum}`);
  }

  async #remove(target: Target): Promise<void> {
    const { containerd } = this.#node;
    this.#targets = this.#targets.filter((other) => other !== target);
    if ((await pidOf(this.#node, target.name)) !== target.pid)
      this.#result.wrong.push(`${target.name} ended by itself`);
    await containerd.ctr(['task', 'kill', '-s', 'SIGKILL', target.name]);
    await waitFor('the container to end', async () => (await pidOf(this.#node, target.name)) === undefined);
    await containerd.ctr(['task', 'rm', target.name]);
    await containerd.ctr(['container', 'rm', target.name]);
    this.#result.removals++;
    // Another container of the same image goes on without its record.
    if (this.#random(3) > 0) await containerd.ctr(['images', 'rm', '--sync', target.reference], { allowFailure: true });
  }

  async #collect(): Promise<void> {
    await this.#node.containerd.gc();
    const { stdout } = await this.#node.product.cli(['gc', '--json']);
    const { steps } = JSON.parse(stdout) as { steps: { step: string; count: number }[] };
    this.#result.evictions += steps.find(({ step }) => step === 'evict')?.count ?? 0;
    this.#result.collections++;
  }

  /** Kills while a container reads; what it reads then may fail, and must not once the process is back. */
  async #kill(victim: 'service' | 'dedupd', target: Target): Promise<void> {
    const { product } = this.#node;
    const now = performance.now();
    // A service gives a dedupd up that ended five times within a minute.
    this.#daemonKills = this.#daemonKills.filter((atMs) => now - atMs < 60_000);
    if (victim === 'dedupd' && this.#daemonKills.length >= 3) return;
    const served = await this.#served(target);
    const file = this.#random(FILES);
    await writeFile('/proc/sys/vm/drop_caches', '1');
    const reading = sumOfFile(`/proc/${target.pid}/root/data/f${file}`);
    await sleep(this.#random(DELAY_MS * 2));
    if (victim === 'service') {
      await product.stopService('SIGKILL');
      this.#judge(target, file, await reading, false);
      await product.start();
    } else {
      const pid = await product.daemonPid();
      process.kill(pid, 'SIGKILL');
      this.#daemonKills.push(now);
      const sum = await reading;
      const alone = served === 'direct' || served === 'directory';
      if (alone) this.#result.killsUnnoticed++;
      this.#judge(target, file, sum, !alone);
      await waitFor('dedupd to be back', async () => {
        const other = await product.daemonPid().catch(() => undefined);
        return other !== undefined && other !== pid;
      });
    }
    this.#result.kills++;
    await this.#serviceFound();
    await this.#read(target, file);
  }

  /** containerd's client waits up to three seconds before it looks for a service that was killed. */
  async #serviceFound(): Promise<void> {
    const list = ['snapshots', '--snapshotter', 'dedup', 'ls'];
    await waitFor('containerd to have found the service', async () => {
      return (await this.#node.containerd.ctr(list, { allowFailure: true })).code === 0;
    });
  }

  async #finish(): Promise<void> {
    const { containerd } = this.#node;
    await writeFile('/proc/sys/vm/drop_caches', '1');
    for (const target of this.#targets) await this.#readAll(target);
    for (const target of [...this.#targets]) await this.#remove(target);
    for (const { published } of this.#pool) {
      for (const reference of [published.lazy, published.plain])
        await containerd.ctr(['images', 'rm', '--sync', reference], { allowFailure: true });
    }
    await waitFor(
      'nothing to be left',
      async () => {
        await this.#node.collect();
        return JSON.stringify(await this.#node.leftovers()) === JSON.stringify(NOTHING_LEFT);
      },
      60_000,
    ).catch(async () => {
      this.#result.wrong.push(`left: ${JSON.stringify(await this.#node.leftovers())}`);
    });
    const present = (await this.#node.product.stats()).present_bytes;
    if (present !== 0) this.#result.wrong.push(`${present} bytes are still in the store`);
  }
}
