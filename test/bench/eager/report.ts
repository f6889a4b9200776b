// The tables of eager.ts: pairs of pulls without an index, overlayfs and ours, with ratios of medians and their intervals.
import { around, bytes, count, cpu, duration, ratio } from '../../../src/bench/report/quantities.ts';
import { type Pair, pairedRatio, spreadOf } from '../../../src/bench/report/statistics.ts';
import { table } from '../../../src/bench/report/tables.ts';
import type { BenchResult, ColdStartResult } from '../../../src/bench/result.ts';

/** Ours ÷ overlayfs: time until ready, and bytes written. */
const TARGET = 0.6;
/** Who fetches less of an image than this read some of it from where an earlier start had left it. */
const COLD_RATIO = 0.98;

type Pick = (start: ColdStartResult) => number;

const cpuOf: Pick = ({ processes }) => processes.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0);
const writtenOf: Pick = ({ processes }) => processes.reduce((sum, { writtenBytes }) => sum + writtenBytes, 0);
const deviceOf: Pick = ({ deviceBytes }) => deviceBytes ?? Number.NaN;

/** One image on one link: starts of both, the same pairs in the same order. */
interface Row {
  readonly image: string;
  readonly link: string;
  readonly theirs: readonly ColdStartResult[];
  readonly ours: readonly ColdStartResult[];
}

function rowsOf(result: BenchResult): Row[] {
  return result.images.flatMap(({ name: image }) =>
    result.links.flatMap(({ name: link }) => {
      const of = (snapshotter: string): ColdStartResult[] =>
        result.starts.filter(
          (start) => start.image === image && start.link === link && start.snapshotter === snapshotter,
        );
      const ours = new Map(of('dedup').map((start) => [start.pair, start]));
      const theirs = of('overlayfs').filter(({ pair }) => ours.has(pair));
      if (theirs.length === 0) return [];
      return [{ image, link, theirs, ours: theirs.map(({ pair }) => ours.get(pair)!) }];
    }),
  );
}

function medianOf(starts: readonly ColdStartResult[], pick: Pick): number {
  return spreadOf(starts.map(pick))?.median ?? Number.NaN;
}

/** "2.31 s (2.20–2.45)". */
function spread(starts: readonly ColdStartResult[], pick: Pick, write: (value: number | undefined) => string): string {
  const of = spreadOf(starts.map(pick));
  return of === undefined ? write(undefined) : `${write(of.median)}${around(write, of.median, of.lower, of.upper)}`;
}

/** "0.52 (0.50–0.55)". */
function ratioOf(row: Row, pick: Pick, seed: number): string {
  const pairs = row.ours.map((start, at): Pair => ({ subject: pick(start), yardstick: pick(row.theirs[at]!) }));
  const found = pairedRatio(pairs, seed);
  if (found?.interval === undefined) return ratio(found?.value);
  return `${ratio(found.value)} (${ratio(found.interval.low)}–${ratio(found.interval.high)})`;
}

/** `least`: bytes of the distinct contents of an image's files, in whole blocks. `cold`: no start found a part of its image on the node. */
export function eagerReport(
  result: BenchResult,
  { ownDisk, least }: { readonly ownDisk: boolean; readonly least: ReadonlyMap<string, number> },
): { readonly text: string; readonly cold: boolean } {
  const { seed } = result;
  const rows = rowsOf(result);
  const both = (row: Row, pick: Pick, write: (value: number | undefined) => string): string[] => [
    spread(row.theirs, pick, write),
    spread(row.ours, pick, write),
  ];
  const total: Pick = ({ phases }) => phases.totalMs;
  const leastRatio = (row: Row): number => (least.get(row.image) ?? Number.NaN) / medianOf(row.theirs, deviceOf);
  const times = table(
    [
      'image',
      'link',
      'overlayfs: until ready',
      'ours',
      'ratio',
      'pull',
      'ours',
      'create',
      'ours',
      'start to ready',
      'ours',
    ],
    rows.map((row) => [
      row.image,
      row.link,
      ...both(row, total, duration),
      ratioOf(row, total, seed),
      ...both(row, ({ phases }) => phases.pullMs, duration),
      ...both(row, ({ phases }) => phases.createMs, duration),
      ...both(row, ({ phases }) => phases.runMs, duration),
    ]),
  );
  const costs = table(
    [
      'image',
      'link',
      'overlayfs: to the disk',
      'ours',
      'ratio',
      'distinct file contents',
      'their ratio',
      'by processes',
      'ours',
      'ratio',
      'CPU',
      'ours',
      'ratio',
      'on the wire',
      'ours',
      'requests',
      'ours',
    ],
    rows.map((row) => [
      row.image,
      row.link,
      ...both(row, deviceOf, bytes),
      ratioOf(row, deviceOf, seed),
      bytes(least.get(row.image)),
      ratio(leastRatio(row)),
      ...both(row, writtenOf, bytes),
      ratioOf(row, writtenOf, seed),
      ...both(row, cpuOf, cpu),
      ratioOf(row, cpuOf, seed),
      ...both(row, ({ wireBytes }) => wireBytes, bytes),
      ...both(row, ({ requests }) => requests, count),
    ]),
  );
  const sizes = new Map(result.images.map(({ name, compressedBytes }) => [name, compressedBytes]));
  const warm = result.starts.filter(({ image, wireBytes }) => wireBytes < (sizes.get(image) ?? 0) * COLD_RATIO);
  const missed = rows.flatMap((row) => {
    const of = (what: string, pick: Pick): string[] => {
      const value = pairedRatio(
        row.ours.map((start, at) => ({ subject: pick(start), yardstick: pick(row.theirs[at]!) })),
        seed,
      )?.value;
      return value !== undefined && value <= TARGET ? [] : [`${row.image}, ${row.link}: ${what} ${ratio(value)}`];
    };
    return [...of('time', total), ...of('written', deviceOf)];
  });
  const pairs = Math.max(0, ...rows.map((row) => row.ours.length));
  const images = result.images.map(({ name, compressedBytes }) => `${name} ${bytes(compressedBytes)}`).join(', ');
  const text = `\`node test/bench/eager.ts --pairs ${pairs}${ownDisk ? ' --own-disk' : ''} --write\` (seed ${seed}): images as they are in the registry, without an index (compressed: ${images});
\`ctr image pull --snapshotter overlayfs\` against \`rpull\`, then create and start until ready, nothing of the image on the node, caches dropped,
interleaved pairs in random order, \`publish_index\` off, so that no pull leaves an index to the next. Medians with quartiles; ratios of medians with 95 % intervals.

${times}
"To the disk": what reached ${ownDisk ? 'a disk with nothing else on it' : "the machine's disks, whoever wrote it,"} from the beginning of the pull to the end of
a \`sync\` after the container was ready, the file system's own writes included. "By processes": \`write_bytes\` of containerd and of ours (proc(5), io).
Container's own files count for both. "Distinct file contents": each content of the image's files once, in blocks of 4 KiB: what any store
that has all of an image, as it is read, must write.

${costs}
At most ${TARGET} aimed for, time and bytes to the disk: ${missed.length === 0 ? 'reached everywhere' : `MISSED by ${missed.join('; ')}`}.
${warm.length === 0 ? '' : `NOT COLD: ${warm.map(({ snapshotter, image, link, pair }) => `${snapshotter} ${image} ${link} pair ${pair}`).join('; ')}\n`}`;
  return { text, cold: warm.length === 0 };
}
