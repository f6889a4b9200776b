// Kills the processes of a node with SIGKILL at random moments while a container's cold reads and a client's commits are
// under way, and compares every byte and every answered commit afterwards. Used by a test (few kills) and by `make soak`.
import { randomInt } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { COLD_FILES, COLD_STRIDE, ColdContainer } from './cold-container.ts';
import { waitFor } from './containerd.ts';
import { LazyNode } from './lazy-node.ts';
import { seededRandom } from './random-layers.ts';

export type Victim = 'dedupd' | 'service' | 'both';
export const VICTIMS: readonly Victim[] = ['dedupd', 'service', 'both'];

export interface CampaignOptions {
  /** Kills of each victim that found something under way; others are repeated. */
  readonly kills: Readonly<Record<Victim, number>>;
  readonly seed?: number;
  readonly say: (text: string) => void;
}

export interface CampaignResult {
  readonly seed: number;
  readonly kills: Record<Victim, number>;
  /** Kills that found neither a read nor a commit under way. */
  idle: number;
  /** Reads of whole files, and how many of them failed with EIO because the daemon was away. */
  reads: number;
  eio: number;
  /** Answered commits that were looked for afterwards. */
  commits: number;
  /** Files that did not have their bytes, and commits that were not there: what must not be. */
  readonly wrong: string[];
  readonly lost: string[];
}

/** What every answer of the registry waits: time in which a read is under way. */
const DELAY_MS = 80;
/** A service gives a dedupd up that ended five times within a minute; one that was restarted counts anew. */
const DAEMON_KILLS_PER_SERVICE = 4;

export class KillCampaign {
  readonly #node: LazyNode;
  readonly #options: CampaignOptions;
  readonly #result: CampaignResult;
  /** A whole number below the one given. */
  readonly #random: (below: number) => number;
  readonly #committed: string[] = [];
  #images = 0;
  #daemonKills = 0;
  #keys = 0;

  private constructor(node: LazyNode, options: CampaignOptions) {
    this.#node = node;
    this.#options = options;
    const seed = options.seed ?? randomInt(2 ** 31);
    this.#random = seededRandom(seed);
    const kills = { dedupd: 0, service: 0, both: 0 };
    this.#result = { seed, kills, idle: 0, reads: 0, eio: 0, commits: 0, wrong: [], lost: [] };
  }

  /** Runs one on a node of its own. Errors: whatever keeps the node from coming back. */
  static async run(options: CampaignOptions): Promise<CampaignResult> {
    // The limit of a containerd of tests is for tests; hundreds of kills take half an hour.
    const node = await LazyNode.start({ containerd: { lifetimeSeconds: 4 * 3600 } });
    try {
      const campaign = new KillCampaign(node, options);
      options.say(`seed ${campaign.#result.seed}`);
      await campaign.#run();
      return campaign.#result;
    } finally {
      await node.stop();
    }
  }

  async #run(): Promise<void> {
    const { kills, say } = this.#options;
    const left = (): Victim[] => VICTIMS.filter((victim) => this.#result.kills[victim] < kills[victim]);
    while (left().length > 0) {
      const target = await this.#newTarget();
      for (let i = 0; i < COLD_FILES && left().length > 0; i += COLD_STRIDE) {
        const victims = left();
        const victim = victims[this.#random(victims.length)]!;
        await this.#round(target, i, victim);
      }
      await this.#checkAll(target);
      say(JSON.stringify(this.#result));
      await target.remove();
    }
  }

  /** An image that nothing is here of, and a container of it that runs. */
  async #newTarget(): Promise<ColdContainer> {
    const seed = `campaign ${this.#result.seed} ${++this.#images}`;
    this.#node.proxy.setRules();
    const { containerd } = this.#node;
    const list = ['snapshots', '--snapshotter', 'dedup', 'ls'];
    // Its client waits up to three seconds before it looks for a service that was killed.
    await waitFor('containerd to have found the service', async () => {
      return (await containerd.ctr(list, { allowFailure: true })).code === 0;
    });
    const target = await ColdContainer.start(this.#node, `campaign-${this.#images}`, seed);
    this.#node.proxy.setRules({ path: /\/blobs\//, fault: { kind: 'delay', ms: DELAY_MS } });
    return target;
  }

  async #round(target: ColdContainer, i: number, victim: Victim): Promise<void> {
    if (victim === 'dedupd' && ++this.#daemonKills > DAEMON_KILLS_PER_SERVICE) {
      await this.#node.product.stopService();
      await this.#node.product.start();
      this.#daemonKills = 1;
    }
    if (victim !== 'dedupd') this.#daemonKills = 0;
    let reading = true;
    let committing = true;
    const reader = target.read(i).finally(() => {
      reading = false;
    });
    const committer = this.#commit().finally(() => {
      committing = false;
    });
    reader.catch(() => undefined); // Awaited below.
    await sleep(this.#random(DELAY_MS * 1.5));
    const daemon = victim === 'service' ? undefined : await this.#node.product.daemonPid();
    const underWay = reading || (victim !== 'dedupd' && committing);
    if (daemon !== undefined) process.kill(daemon, 'SIGKILL');
    if (victim !== 'dedupd') await this.#node.product.stopService('SIGKILL');
    if (underWay) this.#result.kills[victim]++;
    else this.#result.idle++;
    const early = await reader;
    await committer;
    if (victim !== 'dedupd') await this.#node.product.start();
    await waitFor(
      'dedupd to be back',
      async () => {
        const pid = await this.#node.product.daemonPid().catch(() => undefined);
        return pid !== undefined && pid !== daemon;
      },
      30_000,
    );
    this.#judge(target, i, early, victim !== 'service');
    if (early === 'EIO') this.#judge(target, i, await target.read(i), false);
    // One that nobody has read, and one that was read before.
    this.#judge(target, i + 1, await target.read(i + 1), false);
    const before = this.#random(i / COLD_STRIDE + 1) * COLD_STRIDE;
    this.#judge(target, before, await target.read(before), false);
    if (!(await target.runs())) this.#result.lost.push(`${target.name} was started anew`);
    await this.#checkCommits();
  }

  #judge(target: ColdContainer, i: number, sum: string, mayFail: boolean): void {
    this.#result.reads++;
    if (sum === 'EIO') this.#result.eio++;
    if (sum === target.sumOf(i) || (sum === 'EIO' && mayFail)) return;
    this.#result.wrong.push(`${target.name}, f${i}: ${sum}`);
  }

  /** Prepares and commits a snapshot; what was answered is remembered. Never rejects. */
  async #commit(): Promise<void> {
    const client = this.#node.snapshots();
    try {
      for (let n = 0; n < 20; n++) {
        const key = `campaign/${++this.#keys}/key`;
        const name = `campaign/${this.#keys}/layer`;
        await client.prepare(key);
        await client.commit(name, key);
        this.#committed.push(name);
      }
    } catch {
      // The service was killed: this one was never answered.
    } finally {
      client.close();
    }
  }

  async #checkCommits(): Promise<void> {
    const client = this.#node.snapshots();
    try {
      const names = new Set(await client.names());
      for (const name of this.#committed) if (!names.has(name)) this.#result.lost.push(name);
      this.#result.commits += this.#committed.length;
      // containerd does not know them; a collection of its own may remove them from now on.
      for (const name of names) if (name.startsWith('campaign/')) await client.remove(name);
      this.#committed.length = 0;
    } finally {
      client.close();
    }
  }

  /** Every byte of the image, with nothing of it in the page cache. */
  async #checkAll(target: ColdContainer): Promise<void> {
    this.#node.proxy.setRules();
    await writeFile('/proc/sys/vm/drop_caches', '1');
    for (let i = 0; i < COLD_FILES; i++) this.#judge(target, i, await target.read(i), false);
  }
}
