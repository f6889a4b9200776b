// A network link between two namespaces, "near" (the node) and "far" (the registry), with the delay, rate, queue and loss
// of a profile, for tests and benchmarks: the TCP over it is the kernel's. README.md says how it works. Owns the process
// that carries the packets; whoever starts a program in a namespace ends it.
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { run } from '../containerd.ts';
import { linkProgram } from './program.ts';

/** One direction; what is absent is as the profile says for both. */
export interface OneWay {
  readonly bitsPerSecond?: number;
  /** Bytes that may wait; what comes on top is dropped. Default: what the rate carries in one round trip, at least 50 ms. */
  readonly queueBytes?: number;
  /** Probability of each packet to be lost, 0 to 1. */
  readonly lossRate?: number;
}

export interface LinkProfile extends OneWay {
  /** How tables call it. */
  readonly name: string;
  /** Of an empty packet on an idle link; half of it in each direction. */
  readonly roundTripMs: number;
  /** On the wire, Ethernet's framing included, in each direction. */
  readonly bitsPerSecond: number;
  /** The same packets are lost for the same seed and traffic. Default 1. */
  readonly seed?: number;
  /** From near to far. */
  readonly up?: OneWay;
  /** From far to near. */
  readonly down?: OneWay;
}

export const LAN: LinkProfile = { name: '1 ms, 1 Gbit/s', roundTripMs: 1, bitsPerSecond: 1e9 };
export const REGION: LinkProfile = { name: '20 ms, 1 Gbit/s', roundTripMs: 20, bitsPerSecond: 1e9 };
export const CONTINENT: LinkProfile = { name: '50 ms, 100 Mbit/s', roundTripMs: 50, bitsPerSecond: 100e6 };
export const OVERSEAS: LinkProfile = { name: '100 ms, 50 Mbit/s', roundTripMs: 100, bitsPerSecond: 50e6 };
export const PROFILES: readonly LinkProfile[] = [LAN, REGION, CONTINENT, OVERSEAS];

/** Of one direction since the start. A packet has at most 1500 bytes, whatever the kernel handed over at once. */
export interface DirectionCounters {
  /** Handed over, and their bytes on the wire. */
  readonly packets: number;
  readonly bytes: number;
  /** Packets taken by random loss. */
  readonly lost: number;
  /** Packets for which the queue was full. */
  readonly dropped: number;
  /** Packets that the other end's device did not take: a fault of the emulation, so 0. */
  readonly refused: number;
}

export interface LinkCounters {
  readonly up: DirectionCounters;
  readonly down: DirectionCounters;
}

interface Ready {
  readonly near: number;
  readonly far: number;
  readonly nearAddress: string;
  readonly farAddress: string;
}

/** Command words that run a program in a namespace: `spawn(prefix[0], [...prefix.slice(1), program, ...])`. */
export type Inside = readonly [string, ...string[]];

const SHORTEST_QUEUE_SECONDS = 0.05;

/** What is missing here for an emulated link, in words; undefined when nothing is. */
export function missingForLink(): string | undefined {
  if (process.getuid?.() !== 0) return 'root, for network namespaces';
  if (!existsSync('/dev/net/tun')) return '/dev/net/tun';
  return undefined;
}

export class Link {
  /** Command words before a program that is to run at the node's end, and at the registry's. */
  readonly near: Inside;
  readonly far: Inside;
  readonly nearAddress: string;
  readonly farAddress: string;
  /** The process that carries the packets: for its CPU time. */
  readonly pid: number;
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  readonly #failure: () => string;
  #profile: LinkProfile;
  #last: Promise<unknown> = Promise.resolve();

  private constructor(
    child: ChildProcess,
    lines: AsyncIterator<string>,
    failure: () => string,
    ready: Ready,
    profile: LinkProfile,
  ) {
    this.pid = child.pid!;
    // nsenter, not `ip netns exec`: that mounts a fresh /sys, where runc finds no cgroups.
    this.near = ['nsenter', `--net=/proc/${child.pid}/fd/${ready.near}`];
    this.far = ['nsenter', `--net=/proc/${child.pid}/fd/${ready.far}`];
    this.nearAddress = ready.nearAddress;
    this.farAddress = ready.farAddress;
    this.#child = child;
    this.#lines = lines;
    this.#failure = failure;
    this.#profile = profile;
  }

  /** Makes the namespaces and the link. Needs root and /dev/net/tun; errors say what was refused. */
  static async start(profile: LinkProfile): Promise<Link> {
    const child = spawn(await linkProgram(), [], { stdio: ['pipe', 'pipe', 'pipe'] });
    let errors = '';
    child.stderr.on('data', (data: Buffer) => {
      errors += data.toString();
    });
    // Writing to a process that has ended is reported by the answer that does not come.
    child.stdin.on('error', () => undefined);
    await once(child, 'spawn');
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const failure = () => `the emulated link ended: ${errors.trim() || `exit ${child.exitCode}`}`;
    const first = await lines.next();
    if (first.done === true) {
      await ended(child);
      throw new Error(failure());
    }
    const link = new Link(child, lines, failure, JSON.parse(first.value) as Ready, profile);
    try {
      await link.set(profile);
      await link.#useCubic();
    } catch (error) {
      await link.stop();
      throw error;
    }
    return link;
  }

  get profile(): LinkProfile {
    return this.#profile;
  }

  /** Holds for packets sent from now on; those under way keep their times. Packets never overtake each other. */
  async set(profile: LinkProfile): Promise<void> {
    for (const direction of ['up', 'down'] as const) {
      const way = { ...profile, ...profile[direction] };
      const atLeast = Math.max(profile.roundTripMs / 1000, SHORTEST_QUEUE_SECONDS);
      const queueBytes = way.queueBytes ?? (way.bitsPerSecond / 8) * atLeast;
      const delayNs = Math.round((profile.roundTripMs / 2) * 1e6);
      const seed = (profile.seed ?? 1) * 2 + (direction === 'up' ? 0 : 1);
      await this.#ask(
        `set ${direction} rate ${way.bitsPerSecond} delay ${delayNs} queue ${queueBytes} ` +
          `loss ${way.lossRate ?? 0} seed ${seed}`,
      );
    }
    this.#profile = profile;
  }

  /** Holds everything for `durationMs`, what is under way and what comes; then it goes on as if no time had passed. */
  async stall(durationMs: number, directions: readonly ('up' | 'down')[] = ['up', 'down']): Promise<void> {
    for (const direction of directions) await this.#ask(`stall ${direction} ${Math.round(durationMs * 1e6)}`);
  }

  async counters(): Promise<LinkCounters> {
    return (await this.#ask('counters')) as LinkCounters;
  }

  /** Ends the link. The namespaces go with the last program in them. Safe to call twice. */
  async stop(): Promise<void> {
    this.#child.stdin?.end();
    await ended(this.#child);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }

  /** One command and its answer; the next waits for it. */
  #ask(command: string): Promise<unknown> {
    const answer = this.#last.then(async () => {
      this.#child.stdin?.write(`${command}\n`);
      const line = await this.#lines.next();
      if (line.done === true) throw new Error(this.#failure());
      const value = JSON.parse(line.value) as { error?: string };
      if (value.error !== undefined) throw new Error(`the emulated link refused "${command}": ${value.error}`);
      return value;
    });
    this.#last = answer.catch(() => undefined);
    return answer;
  }

  /**
   * Gives both ends the kernel's own default congestion control, where the machine's administrator chose another: by
   * route, because a namespace may choose for itself only among the algorithms that the whole machine allows to anybody.
   */
  async #useCubic(): Promise<void> {
    for (const [inside, device, from, to] of [
      [this.near, 'near', this.nearAddress, this.farAddress],
      [this.far, 'far', this.farAddress, this.nearAddress],
    ] as const) {
      const route = ['ip', 'route', 'replace', to, 'dev', device, 'src', from, 'congctl', 'cubic'];
      await run(inside[0], [...inside.slice(1), ...route]);
    }
  }
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
}
