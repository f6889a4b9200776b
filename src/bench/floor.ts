// The least a cold start can take: round trips of the control requests, then the needed bytes or one dependent miss,
// whichever takes longer, then the run itself. Each term is measured apart from the product; see docs/benchmarks.md.
import { createConnection } from 'node:net';
import type { BenchTarget, Contender } from './contenders.ts';
import { type BenchNode, ctr, execute } from './node-commands.ts';
import type { BenchLink, Floor } from './result.ts';
import { BenchContainer, forgetImage } from './start.ts';

/** Measures a link without the product. */
export interface LinkProbe {
  /** Median round trip, milliseconds. */
  roundTripMs(): Promise<number>;
  /** Rate of one large ranged GET of the target's data, bytes per second. */
  bytesPerSecond(target: BenchTarget): Promise<number>;
}

/** How many warm starts the median is of; one more before them is not counted. */
const WARM_STARTS = 5;

/**
 * Round trips before the first layer byte can be asked for, of a client that knows everything but the image: the TCP
 * handshake, TLS 1.3's, the manifest, then configuration and layer index side by side.
 */
export function controlRoundTrips(link: Pick<BenchLink, 'tls'>): number {
  return 3 + (link.tls ? 1 : 0);
}

export type FloorTerms = Omit<Floor, 'totalMs'>;

export function floorMs(terms: FloorTerms): number {
  const transferMs = (terms.neededBytes / terms.bytesPerSecond) * 1000;
  const missesMs = terms.dependentMisses * terms.roundTripMs;
  return terms.controlRoundTrips * terms.roundTripMs + Math.max(transferMs, missesMs) + terms.warmRunMs;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length % 2 === 1) return sorted[middle]!;
  return ((sorted[middle - 1] ?? Number.NaN) + (sorted[middle] ?? Number.NaN)) / 2;
}

export interface WarmSetup {
  readonly node: BenchNode;
  /** The yardstick: overlayfs. */
  readonly contender: Contender;
  readonly target: BenchTarget;
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
}

/** Median time from create to ready with the image unpacked and in the page cache, milliseconds. */
export async function warmRunMs(setup: WarmSetup): Promise<number> {
  const { node, contender, target, timeoutMs } = setup;
  await execute(contender.pullCommand(target), { timeoutMs });
  try {
    const times: number[] = [];
    for (let round = 0; round <= WARM_STARTS; round++) {
      const container = new BenchContainer(setup);
      try {
        const startedMs = performance.now();
        await container.create();
        const readyMs = await container.startAndWait();
        if (round > 0) times.push(readyMs - startedMs);
      } finally {
        await container.remove();
      }
    }
    return median(times);
  } finally {
    await forgetImage(node, contender.reference(target));
  }
}

/** Median of TCP connects, milliseconds: the time of SYN and SYN-ACK. Errors: those of connect(2), DEADLINE. */
export async function tcpRoundTripMs(host: string, port: number, attempts = 11): Promise<number> {
  const times: number[] = [];
  for (let attempt = 0; attempt < attempts; attempt++) {
    const startedMs = performance.now();
    await new Promise<void>((resolve, reject) => {
      const socket = createConnection({ host, port });
      socket.setTimeout(10_000, () => socket.destroy(new Error(`${host}:${port} does not answer`)));
      socket.once('error', reject);
      socket.once('connect', () => {
        times.push(performance.now() - startedMs);
        socket.destroy();
        resolve();
      });
    });
  }
  return median(times);
}

/** Names of snapshotters that containerd has loaded and can use. */
export async function usableSnapshotters(node: BenchNode): Promise<string[]> {
  const text = await execute(ctr(node, 'plugins', 'ls'));
  return text
    .split('\n')
    .map((line) => line.trim().split(/\s+/))
    .filter(([type, , , status]) => type === 'io.containerd.snapshotter.v1' && status === 'ok')
    .map(([, name]) => name ?? '');
}
