// A result seen as cells: one image, on one link, with one snapshotter. The tables and the charts take their figures from
// here, so that they cannot disagree.
import type { BenchResult, ColdStartResult, Floor, ProcessUse } from '../result.ts';
import { pairedRatio, type Ratio, type Spread, spreadOf } from './statistics.ts';

/** `faster` and `slower`: the whole interval lies on that side of 1. `undecided`: it holds 1. `unjudged`: no interval. */
export type Verdict = 'faster' | 'slower' | 'undecided' | 'unjudged';

export interface ProcessSpread {
  readonly name: string;
  readonly cpuSeconds: Spread;
  readonly pssBytes: Spread;
  readonly writtenBytes: Spread;
}

/** Times in milliseconds. */
export interface Cell {
  readonly image: string;
  readonly link: string;
  readonly snapshotter: string;
  readonly starts: readonly ColdStartResult[];
  readonly total: Spread;
  readonly control?: Spread;
  readonly pull: Spread;
  readonly create: Spread;
  readonly run: Spread;
  readonly requests: Spread;
  readonly wireBytes: Spread;
  readonly diskBytes: Spread;
  /** Sum over the processes of each start. */
  readonly cpuSeconds: Spread;
  readonly writtenBytes: Spread;
  readonly processes: readonly ProcessSpread[];
  /** Undefined for the yardstick itself and where no pair is complete. */
  readonly toYardstick?: Ratio;
  readonly floor?: Floor;
  /** Median total ÷ floor. */
  readonly toFloor?: number;
}

/** The first snapshotter of a result: all ratios are against it. */
export function yardstickOf(result: BenchResult): string | undefined {
  return result.snapshotters[0];
}

/** Cells by result: a table and several charts ask for the same ones, and an interval costs thousands of resamples. */
const known = new WeakMap<BenchResult, Map<string, Cell | undefined>>();

/** Undefined where nothing was measured for this combination. */
export function cellOf(result: BenchResult, image: string, link: string, snapshotter: string): Cell | undefined {
  const cells = known.get(result) ?? new Map<string, Cell | undefined>();
  known.set(result, cells);
  // A run under way adds to its result: what was asked before must not be the answer then.
  const key = JSON.stringify([image, link, snapshotter, result.starts.length, result.floors.length]);
  if (!cells.has(key)) cells.set(key, makeCell(result, image, link, snapshotter));
  return cells.get(key);
}

function makeCell(result: BenchResult, image: string, link: string, snapshotter: string): Cell | undefined {
  const starts = startsOf(result, image, link, snapshotter);
  const over = (pick: (start: ColdStartResult) => number): Spread | undefined => spreadOf(starts.map(pick));
  const total = over((start) => start.phases.totalMs);
  if (total === undefined) return undefined;
  const control = spreadOf(starts.flatMap((start) => start.phases.controlMs ?? []));
  const floor = result.floors.find((each) => each.image === image && each.link === link);
  const toYardstick = ratioOf(result, starts, image, link, snapshotter);
  return {
    image,
    link,
    snapshotter,
    starts,
    total,
    ...(control === undefined ? {} : { control }),
    pull: over((start) => start.phases.pullMs)!,
    create: over((start) => start.phases.createMs)!,
    run: over((start) => start.phases.runMs)!,
    requests: over((start) => start.requests)!,
    wireBytes: over((start) => start.wireBytes)!,
    diskBytes: over((start) => start.diskBytes)!,
    cpuSeconds: over((start) => sum(start.processes, (process) => process.cpuSeconds))!,
    writtenBytes: over((start) => sum(start.processes, (process) => process.writtenBytes))!,
    processes: processesOf(starts),
    ...(toYardstick === undefined ? {} : { toYardstick }),
    ...(floor === undefined ? {} : { floor }),
    ...(floor === undefined || !(floor.totalMs > 0) ? {} : { toFloor: total.median / floor.totalMs }),
  };
}

export function verdictOf(ratio: Ratio): Verdict {
  if (ratio.interval === undefined) return 'unjudged';
  if (ratio.interval.high < 1) return 'faster';
  return ratio.interval.low > 1 ? 'slower' : 'undecided';
}

export const VERDICT_MARKS: Readonly<Record<Verdict, string>> = {
  faster: '▼ faster',
  slower: '▲ slower',
  undecided: '◇ no difference shown',
  unjudged: '? not judged',
};

/** The start whose total is nearest to the cell's median, among those that `has` accepts. */
export function typicalStart(
  cell: Cell,
  has: (start: ColdStartResult) => boolean = () => true,
): ColdStartResult | undefined {
  const distance = (start: ColdStartResult): number => Math.abs(start.phases.totalMs - cell.total.median);
  return cell.starts.filter(has).sort((a, b) => distance(a) - distance(b) || a.order - b.order)[0];
}

/** A floor's terms in milliseconds; the larger of `transferMs` and `missesMs` counts, because one hides behind the other. */
export interface FloorParts {
  readonly controlMs: number;
  readonly transferMs: number;
  readonly missesMs: number;
  readonly warmRunMs: number;
  readonly totalMs: number;
}

export function floorParts(floor: Floor): FloorParts {
  const controlMs = floor.controlRoundTrips * floor.roundTripMs;
  const transferMs = floor.bytesPerSecond > 0 ? (floor.neededBytes / floor.bytesPerSecond) * 1000 : 0;
  const missesMs = floor.dependentMisses * floor.roundTripMs;
  const totalMs = controlMs + Math.max(transferMs, missesMs) + floor.warmRunMs;
  return { controlMs, transferMs, missesMs, warmRunMs: floor.warmRunMs, totalMs };
}

function startsOf(result: BenchResult, image: string, link: string, snapshotter: string): ColdStartResult[] {
  return result.starts.filter(
    (start) => start.image === image && start.link === link && start.snapshotter === snapshotter,
  );
}

function ratioOf(
  result: BenchResult,
  starts: readonly ColdStartResult[],
  image: string,
  link: string,
  snapshotter: string,
): Ratio | undefined {
  const yardstick = yardstickOf(result);
  if (yardstick === undefined || yardstick === snapshotter) return undefined;
  const partners = new Map(startsOf(result, image, link, yardstick).map((start) => [start.pair, start]));
  const pairs = starts.flatMap((start) => {
    const partner = partners.get(start.pair);
    return partner === undefined ? [] : { subject: start.phases.totalMs, yardstick: partner.phases.totalMs };
  });
  return pairedRatio(pairs, result.seed);
}

function processesOf(starts: readonly ColdStartResult[]): ProcessSpread[] {
  const names = new Set(starts.flatMap((start) => start.processes.map((process) => process.name)));
  return [...names].map((name) => {
    const uses = starts.flatMap((start) => start.processes.filter((process) => process.name === name));
    const over = (pick: (use: ProcessUse) => number): Spread => spreadOf(uses.map(pick))!;
    return {
      name,
      cpuSeconds: over((use) => use.cpuSeconds),
      pssBytes: over((use) => use.pssBytes),
      writtenBytes: over((use) => use.writtenBytes),
    };
  });
}

function sum<T>(items: readonly T[], pick: (item: T) => number): number {
  return items.reduce((total, item) => total + pick(item), 0);
}
