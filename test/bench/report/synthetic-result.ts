// A result made up for the tests of the report: cells that win, lose and stay undecided, a peer, a missing floor, a single
// pair, a cell that was never measured. Same figures each time.
import type {
  BenchImage,
  BenchLink,
  BenchResult,
  ColdStartResult,
  Floor,
  RequestTime,
} from '../../../src/bench/result.ts';

export const YARDSTICK = 'overlayfs';
export const OURS = 'dedup';
export const PEER = 'stargz';

export const LAN: BenchLink = { name: '1 ms, 1 Gbit/s', roundTripMs: 1, bitsPerSecond: 1e9, tls: false };
export const METRO: BenchLink = { name: '20 ms, 1 Gbit/s', roundTripMs: 20, bitsPerSecond: 1e9, tls: false };
export const FAR: BenchLink = {
  name: '100 ms, 50 Mbit/s',
  roundTripMs: 100,
  bitsPerSecond: 50e6,
  lossRatio: 0.001,
  tls: true,
};

function image(name: string, compressedMB: number, composition: string): BenchImage {
  return {
    name,
    composition,
    compressedBytes: compressedMB * 1e6,
    uncompressedBytes: compressedMB * 2.7e6,
    layers: 3,
    command: ['/usr/bin/env', name, '--version | cat'],
    ready: { kind: 'line', pattern: `^${name} ready|up$` },
  };
}

export const TINY = image('tiny', 2.1, 'busybox');
export const PYTHON = image('python', 78, 'Debian bookworm, python3, python3-numpy');
export const DATABASE = image('database', 141, 'Debian bookworm, postgresql-15 <server> & client');
export const MODEL = image('model', 2900, 'Debian bookworm, python3, files of random numbers');

/** Deterministic noise around 1: a wave that no pair repeats. */
function noise(at: number): number {
  return 1 + 0.06 * Math.sin(at * 2.399) + 0.03 * Math.cos(at * 5.1);
}

interface Shape {
  readonly pullMs: number;
  readonly createMs: number;
  readonly runMs: number;
  readonly requests: number;
  readonly wireBytes: number;
}

/** Roughly what such starts take; only the proportions matter. */
function shape(kind: string, of: BenchImage, link: BenchLink): Shape {
  const roundTrip = link.roundTripMs!;
  const transfer = (bytes: number): number => (bytes * 8000) / link.bitsPerSecond!;
  if (kind === YARDSTICK) {
    const bytes = of.compressedBytes;
    const unpack = of.uncompressedBytes / 90e3;
    return {
      pullMs: 6 * roundTrip + Math.max(transfer(bytes), unpack),
      createMs: 30,
      runMs: 110,
      requests: 5,
      wireBytes: bytes,
    };
  }
  const bytes = Math.min(of.compressedBytes * 0.9, of.compressedBytes * 0.06 + 1.5e6);
  const misses = of.name === 'database' ? 55 : 14;
  const slow = kind === PEER ? 1.5 : 1;
  return {
    pullMs: (260 + 9 * roundTrip) * slow,
    createMs: 190 * slow,
    runMs: (240 + misses * roundTrip + transfer(bytes)) * slow,
    requests: 12 + misses,
    wireBytes: bytes,
  };
}

function requestTimes(of: Shape, kind: string): RequestTime[] {
  const control = of.pullMs * (kind === YARDSTICK ? 0.1 : 0.9);
  const requests: RequestTime[] = [
    { startMs: control * 0.1, endMs: control * 0.3, bytes: 1400, kind: 'manifest' },
    { startMs: control * 0.3, endMs: control * 0.5, bytes: 2900, kind: 'config' },
  ];
  if (kind === YARDSTICK) {
    for (const [at, end] of [0.6, 0.8, 0.98].entries()) {
      requests.push({ startMs: control + at, endMs: of.pullMs * end, bytes: of.wireBytes / 3, kind: 'layer' });
    }
    return requests;
  }
  requests.push({ startMs: 0, endMs: control * 0.1, bytes: 900, kind: 'token' });
  requests.push({ startMs: control * 0.5, endMs: control * 0.9, bytes: 200_000, kind: 'index' });
  const begin = of.pullMs + of.createMs;
  for (let at = 0; at < of.requests - 4; at++) {
    const startMs = begin + (of.runMs * at) / of.requests;
    requests.push({
      startMs,
      endMs: startMs + (of.runMs * 2.4) / of.requests,
      bytes: of.wireBytes / of.requests,
      kind: 'layer',
    });
  }
  return requests;
}

function start(snapshotter: string, of: BenchImage, link: BenchLink, pair: number, order: number): ColdStartResult {
  const base = shape(snapshotter, of, link);
  const factor = noise(pair * 3 + of.name.length + snapshotter.length);
  const pullMs = base.pullMs * factor;
  const createMs = base.createMs * noise(pair + 7);
  const runMs = base.runMs * noise(pair * 2 + 1);
  return {
    snapshotter,
    image: of.name,
    link: link.name,
    order,
    pair,
    phases: {
      ...(snapshotter === YARDSTICK ? {} : { controlMs: pullMs * 0.9 }),
      pullMs,
      createMs,
      runMs,
      totalMs: pullMs + createMs + runMs,
    },
    requests: base.requests,
    wireBytes: base.wireBytes,
    processes: [
      { name: 'containerd', cpuSeconds: base.wireBytes / 40e6, pssBytes: 61e6, writtenBytes: base.wireBytes * 3 },
      ...(snapshotter === OURS
        ? [
            { name: 'dedup-snapshotter', cpuSeconds: 0.21, pssBytes: 59.5e6, writtenBytes: 0 },
            { name: 'dedupd', cpuSeconds: 0.4 * factor, pssBytes: 100.3e6, writtenBytes: base.wireBytes },
          ]
        : []),
    ],
    diskBytes: base.wireBytes * 3,
    requestTimes: requestTimes({ ...base, pullMs, createMs, runMs }, snapshotter),
  };
}

export function floorOf(of: BenchImage, link: BenchLink): Floor {
  const neededBytes = Math.round(of.compressedBytes * 0.05);
  const bytesPerSecond = link.bitsPerSecond! / 8;
  const dependentMisses = of === DATABASE ? 6 : 3;
  const roundTripMs = link.roundTripMs!;
  const transferMs = (neededBytes / bytesPerSecond) * 1000;
  return {
    image: of.name,
    link: link.name,
    roundTripMs,
    bytesPerSecond,
    controlRoundTrips: 4,
    neededBytes,
    touchedBytes: neededBytes * 2,
    dependentMisses,
    warmRunMs: 140,
    totalMs: 4 * roundTripMs + Math.max(transferMs, dependentMisses * roundTripMs) + 140,
  };
}

function trace(snapshotter: string, of: BenchImage, link: BenchLink): BenchResult['resources'][number] {
  const { pullMs, createMs, runMs } = shape(snapshotter, of, link);
  const total = pullMs + createMs + runMs;
  const samples = Array.from({ length: 60 }, (_, at) => {
    const atMs = (total * 1.1 * at) / 59;
    const busy = atMs < total ? 1 : 0.03;
    const pulling = atMs < pullMs ? 1 : 0.15;
    return {
      atMs,
      cpuCores: Math.abs(noise(at) * busy * (snapshotter === YARDSTICK ? 1.4 : 0.7)),
      memoryBytes: 160e6 + 40e6 * Math.min(1, atMs / total),
      diskWriteBytesPerSecond: Math.abs(noise(at * 3) * busy * pulling * 90e6),
      networkBytesPerSecond: Math.abs(noise(at * 5) * busy * pulling * 30e6),
    };
  });
  return {
    snapshotter,
    image: of.name,
    link: link.name,
    marks: [
      { name: 'pull', atMs: pullMs },
      { name: 'create', atMs: pullMs + createMs },
      { name: 'run', atMs: total },
    ],
    samples,
  };
}

export function syntheticResult(): BenchResult {
  const images = [TINY, PYTHON, DATABASE, MODEL];
  const links = [LAN, METRO, FAR];
  const snapshotters = [YARDSTICK, OURS, PEER];
  const starts: ColdStartResult[] = [];
  for (const link of links) {
    for (const of of images) {
      // One cell with a single pair; the peer never ran the large image on the far link.
      const pairs = of === MODEL && link === FAR ? 1 : 10;
      for (let pair = 0; pair < pairs; pair++) {
        for (const snapshotter of snapshotters) {
          if (snapshotter === PEER && of === MODEL && link === FAR) continue;
          starts.push(start(snapshotter, of, link, pair, starts.length));
        }
      }
    }
  }
  return {
    format: 'dedup-snapshotter-bench/1',
    startedAt: '2026-01-02T03:04:05Z',
    seed: 7,
    machine: {
      cores: 2,
      cpuModel: 'A Processor | with a bar',
      memoryBytes: 24e9,
      kernel: '6.12.1',
      versions: { containerd: '1.6.20', runc: '1.1.5', 'Node.js': '24.11.0' },
    },
    images,
    links,
    snapshotters,
    starts,
    // The database has no floor on the far link.
    floors: links.flatMap((link) =>
      images.filter((of) => !(of === DATABASE && link === FAR)).map((of) => floorOf(of, link)),
    ),
    resources: [YARDSTICK, OURS].map((snapshotter) => trace(snapshotter, PYTHON, METRO)),
  };
}
