// The tables of traces.ts: cold starts without a trace, with one and with one of another version, beside overlayfs and the
// floor, and how far each aim is reached.
import { around, bytes, count, cpu, duration, NOTHING, ratio } from '../../../src/bench/report/quantities.ts';
import { type Pair, pairedRatio, spreadOf } from '../../../src/bench/report/statistics.ts';
import { table } from '../../../src/bench/report/tables.ts';
import type { BenchImage, BenchLink, BenchResult, ColdStartResult, Floor } from '../../../src/bench/result.ts';
import { CONTINENT, LAN, REGION } from '../../support/link/link.ts';
import { STALE, WITH, WITHOUT } from './trace-contenders.ts';

type Pick = (start: ColdStartResult) => number;

/** What a start with a trace is to reach. */
const AIMS = {
  timeToFloor: { [LAN.name]: 2, [REGION.name]: 2, [CONTINENT.name]: 1.3 } as Readonly<Record<string, number>>,
  fetchedToNeeded: 1.1,
  dataRequests: { interpreter: 12 } as Readonly<Record<string, number>>,
  growthRoundTrips: 8,
  present: { [LAN.name]: 0.9, [REGION.name]: 0.9 } as Readonly<Record<string, number>>,
  busy: { [CONTINENT.name]: 0.9 } as Readonly<Record<string, number>>,
  unused: 0.2,
  /** Of a trace of another version. */
  staleRequests: 1.05,
  staleWasted: 0.3,
} as const;

/** All starts of one snapshotter with one image on one link. */
interface Cell {
  readonly image: BenchImage;
  readonly link: BenchLink;
  readonly snapshotter: string;
  readonly starts: readonly ColdStartResult[];
  readonly floor: Floor | undefined;
}

const totalOf: Pick = ({ phases }) => phases.totalMs;
const cpuOf: Pick = ({ processes }) => processes.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0);

/** Layers and the windows of their spans; all else tells what the image is. */
const dataRequests = ({ requestTimes = [] }: ColdStartResult) =>
  requestTimes.filter(({ kind }) => kind === 'layer' || kind === 'window');
const dataCount: Pick = (start) => dataRequests(start).length;
const controlCount: Pick = (start) => start.requests - dataCount(start);
/** Of layers only, as what is needed is counted. */
const fetchedOf: Pick = (start) =>
  dataRequests(start).reduce((sum, { kind, bytes: length }) => sum + (kind === 'layer' ? length : 0), 0);

/** One counter divided by another; NaN where there is none, or nothing to divide by. */
const counterRatio =
  (above: (counters: Readonly<Record<string, number>>) => number, below: string): Pick =>
  ({ counters = {} }) => {
    const whole = counters[below] ?? 0;
    return whole > 0 ? above(counters) / whole : Number.NaN;
  };
const of = (counters: Readonly<Record<string, number>>, name: string): number => counters[name] ?? Number.NaN;
const presentOf = counterRatio((counters) => of(counters, 'asked_present_bytes'), 'asked_bytes');
const lateOf = counterRatio((counters) => of(counters, 'prefetch_late_bytes'), 'prefetch_bytes');
const unusedOf = counterRatio(
  (counters) =>
    of(counters, 'prefetch_bytes') - of(counters, 'prefetch_useful_bytes') - of(counters, 'prefetch_late_bytes'),
  'prefetch_bytes',
);
const wastedOf = counterRatio((counters) => of(counters, 'prefetch_wasted_bytes'), 'prefetch_bytes');

/** Bytes until `toMs`, as a part of what the link carries from the first data request to then. */
function busyUntil(start: ColdStartResult, toMs: number, bytesPerSecond: number): number {
  const fromMs = Math.min(...dataRequests(start).map(({ startMs }) => startMs));
  let carried = 0;
  for (const { startMs, endMs, bytes: length } of start.requestTimes ?? []) {
    const inside = Math.min(endMs, toMs) - Math.max(startMs, fromMs);
    if (inside >= 0 && endMs > startMs) carried += (length * inside) / (endMs - startMs);
  }
  return toMs > fromMs ? carried / ((bytesPerSecond * (toMs - fromMs)) / 1000) : Number.NaN;
}

/** From the first data request until ready, and until the last byte before that. */
function busyOf({ floor }: Cell): { ready: Pick; data: Pick } {
  const rate = floor?.bytesPerSecond ?? Number.NaN;
  const ready: Pick = (start) => busyUntil(start, totalOf(start), rate);
  const data: Pick = (start) => {
    const ends = dataRequests(start).map(({ endMs }) => Math.min(endMs, totalOf(start)));
    return busyUntil(start, Math.max(...ends), rate);
  };
  return { ready, data };
}

const median = (starts: readonly ColdStartResult[], pick: Pick): number =>
  spreadOf(starts.map(pick).filter(Number.isFinite))?.median ?? Number.NaN;

function percent(value: number | undefined): string {
  return value === undefined || !Number.isFinite(value) ? NOTHING : `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`;
}

/** "2.31 s (2.20–2.45)". */
function spread({ starts }: Cell, pick: Pick, write: (value: number | undefined) => string): string {
  const found = spreadOf(starts.map(pick).filter(Number.isFinite));
  return found === undefined
    ? NOTHING
    : `${write(found.median)}${around(write, found.median, found.lower, found.upper)}`;
}

function cellsOf(result: BenchResult): Cell[] {
  return result.images.flatMap((image) =>
    result.links.flatMap((link) =>
      result.snapshotters.flatMap((snapshotter) => {
        const here = (one: { readonly image: string; readonly link: string }): boolean =>
          one.image === image.name && one.link === link.name;
        const starts = result.starts.filter((start) => here(start) && start.snapshotter === snapshotter);
        return starts.length === 0 ? [] : [{ image, link, snapshotter, starts, floor: result.floors.find(here) }];
      }),
    ),
  );
}

/** What a cell misses, in words; undefined where it has no aims. A figure that is not there misses nothing and is said. */
class Verdict {
  readonly #missed: string[] = [];
  readonly #unknown: string[] = [];
  #aims = 0;

  most(what: string, value: number, aim: number | undefined, write: (value: number) => string): this {
    return this.#judge(what, value, aim, value <= (aim ?? 0), write, '≤');
  }

  least(what: string, value: number, aim: number | undefined, write: (value: number) => string): this {
    return this.#judge(what, value, aim, value >= (aim ?? 0), write, '≥');
  }

  #judge(
    what: string,
    value: number,
    aim: number | undefined,
    reached: boolean,
    write: (value: number) => string,
    sign: string,
  ): this {
    if (aim === undefined) return this;
    this.#aims++;
    if (!Number.isFinite(value)) this.#unknown.push(what);
    else if (!reached) this.#missed.push(`${what} ${write(value)}, ${sign} ${write(aim)}`);
    return this;
  }

  get text(): string {
    if (this.#aims === 0) return NOTHING;
    const parts = [
      ...(this.#missed.length > 0 ? [`MISSED: ${this.#missed.join('; ')}`] : []),
      ...(this.#unknown.length > 0 ? [`not measured: ${this.#unknown.join(', ')}`] : []),
    ];
    return parts.length === 0 ? 'reached' : parts.join('; ');
  }
}

export function tracesReport(result: BenchResult, { command }: { readonly command: string }): string {
  const cells = cellsOf(result);
  const sibling = (cell: Cell, snapshotter: string): Cell | undefined =>
    cells.find((one) => one.image === cell.image && one.link === cell.link && one.snapshotter === snapshotter);

  const toYardstick = (cell: Cell): string => {
    const yardstick = sibling(cell, result.snapshotters[0]!);
    if (yardstick === undefined || yardstick === cell) return NOTHING;
    const others = new Map(yardstick.starts.map((start) => [start.pair, totalOf(start)]));
    const pairs = cell.starts.flatMap((start): Pair[] => {
      const other = others.get(start.pair);
      return other === undefined ? [] : [{ subject: totalOf(start), yardstick: other }];
    });
    const found = pairedRatio(pairs, result.seed);
    if (found?.interval === undefined) return ratio(found?.value);
    return `${ratio(found.value)} (${ratio(found.interval.low)}–${ratio(found.interval.high)})`;
  };
  const toFloor = (cell: Cell): number => median(cell.starts, totalOf) / (cell.floor?.totalMs ?? Number.NaN);
  const toNeeded = (cell: Cell): number => median(cell.starts, fetchedOf) / (cell.floor?.neededBytes ?? Number.NaN);
  const toTouched = (cell: Cell): number => median(cell.starts, fetchedOf) / (cell.floor?.touchedBytes ?? Number.NaN);

  const verdict = (cell: Cell): string => {
    const { image, link, snapshotter, starts } = cell;
    const found = new Verdict();
    if (snapshotter === WITH) {
      found
        .most('÷ floor', toFloor(cell), AIMS.timeToFloor[link.name], ratio)
        .most('fetched', toNeeded(cell), AIMS.fetchedToNeeded, ratio)
        .most('data requests', median(starts, dataCount), AIMS.dataRequests[image.name], count)
        .least('present', median(starts, presentOf), AIMS.present[link.name], percent)
        .least('link busy', median(starts, busyOf(cell).ready), AIMS.busy[link.name], percent)
        .most('unused', median(starts, unusedOf), AIMS.unused, percent);
    }
    if (snapshotter === STALE) {
      const without = sibling(cell, WITHOUT);
      const requests: Pick = (start) => start.requests;
      const more = median(starts, requests) / median(without?.starts ?? [], requests);
      found
        .most('requests ÷ without', more, AIMS.staleRequests, ratio)
        .most('wasted', median(starts, wastedOf), AIMS.staleWasted, percent);
    }
    return found.text;
  };

  const times = table(
    [
      'image',
      'link',
      'start',
      'n',
      'until ready',
      '÷ floor',
      '÷ overlayfs',
      'data requests',
      'control',
      'link busy',
      'CPU',
    ],
    cells.map((cell) => {
      const busy = busyOf(cell);
      const ends = percent(median(cell.starts, busy.data));
      return [
        cell.image.name,
        cell.link.name,
        cell.snapshotter,
        count(cell.starts.length),
        `**${spread(cell, totalOf, duration)}**`,
        ratio(toFloor(cell)),
        toYardstick(cell),
        spread(cell, dataCount, count),
        spread(cell, controlCount, count),
        `${percent(median(cell.starts, busy.ready))}, ${ends}`,
        spread(cell, cpuOf, cpu),
      ];
    }),
  );
  const costs = table(
    [
      'image',
      'link',
      'start',
      'fetched',
      '÷ needed',
      '÷ touched pages',
      'present when asked',
      'prefetched',
      'late',
      'unused',
      'wasted',
      'aims',
    ],
    cells.map((cell) => [
      cell.image.name,
      cell.link.name,
      cell.snapshotter,
      spread(cell, fetchedOf, bytes),
      ratio(toNeeded(cell)),
      ratio(toTouched(cell)),
      percent(median(cell.starts, presentOf)),
      bytes(median(cell.starts, ({ counters = {} }) => counters.prefetch_bytes || Number.NaN)),
      ...[lateOf, unusedOf, wastedOf].map((pick) => percent(median(cell.starts, pick))),
      verdict(cell),
    ]),
  );

  const growth = result.images.flatMap(({ name }) => growthOf(cells, name));
  const pairs = Math.max(0, ...cells.map(({ starts }) => starts.length));
  const floors = result.floors.map(
    ({ image, link, totalMs, neededBytes, touchedBytes }) =>
      `${image}, ${link}: ${duration(totalMs)}, needed ${bytes(neededBytes)}, touched ${bytes(touchedBytes)}`,
  );
  return `\`${command}\` (seed ${result.seed}): cold starts, at most ${pairs} pairs a cell, interleaved in random order. \`${WITHOUT}\`: no trace on the node;
\`${WITH}\`: that of one earlier start of the image; \`${STALE}\`: that of one start of the image's other version. How to read it is in
[benchmarks.md](benchmarks.md), "With access traces". Medians with quartiles.

${times}
${costs}
Growth of the time from lan to region, in round trips added:

${growth.length === 0 ? `- not measured: both links are needed\n` : `${growth.join('\n')}\n`}
Floors: ${floors.length === 0 ? 'not measured' : floors.join('; ')}.
`;
}

/** "- interpreter: …": how many of the round trips that region has more than lan a start takes. */
function growthOf(cells: readonly Cell[], image: string): string[] {
  const added = REGION.roundTripMs - LAN.roundTripMs;
  const parts = [...new Set(cells.map(({ snapshotter }) => snapshotter))].flatMap((snapshotter) => {
    const [near, far] = [LAN, REGION].map(({ name }) => {
      const found = cells.find(
        (cell) => cell.image.name === image && cell.link.name === name && cell.snapshotter === snapshotter,
      );
      return found === undefined ? undefined : median(found.starts, totalOf);
    });
    if (near === undefined || far === undefined) return [];
    const growth = (far - near) / added;
    const judged = snapshotter !== WITH ? '' : growth <= AIMS.growthRoundTrips ? ', reached' : ', MISSED';
    const aim = snapshotter === WITH ? ` (≤ ${AIMS.growthRoundTrips}${judged})` : '';
    return [`${snapshotter} ${count(growth)}${aim}`];
  });
  return parts.length === 0 ? [] : [`- ${image}: ${parts.join('; ')}`];
}
