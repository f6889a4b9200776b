// A result as Markdown: what was measured on, a matrix that answers "is it faster, and where not", and per link the
// figures behind it. Every cell of image × link × snapshotter is shown, measured or not, won or lost.
import type { BenchImage, BenchLink, BenchResult, Ready } from '../result.ts';
import { type Cell, cellOf, floorParts, VERDICT_MARKS, type Verdict, verdictOf, yardstickOf } from './cells.ts';
import type { Chart } from './charts.ts';
import { around, between, bitRate, bytes, count, cpu, duration, NOTHING, ratio } from './quantities.ts';
import { LEAST_PAIRS, type Ratio, RESAMPLES, type Spread } from './statistics.ts';
import { cellText, table } from './tables.ts';

export interface MarkdownOptions {
  /** Signs before the first heading: 1 for a file of its own, more inside another page. */
  readonly level?: number;
  /** Charts to show where they belong. */
  readonly charts?: readonly Pick<Chart, 'name' | 'title' | 'kind' | 'link'>[];
  /** Where they are, relative to the page. */
  readonly chartDirectory?: string;
}

const NOT_MEASURED = 'not measured';

/** The whole report. Throws nothing for missing cells: they are written as such. */
export function renderMarkdown(result: BenchResult, options: MarkdownOptions = {}): string {
  const level = options.level ?? 1;
  const heading = (depth: number, text: string): string => `${'#'.repeat(level + depth)} ${text}\n`;
  const yardstick = yardstickOf(result) ?? 'nothing';
  const subjects = result.snapshotters.slice(1);
  const parts = [
    heading(0, `Cold starts: ${[...subjects, yardstick].map(cellText).join(', ')}`),
    introduction(result, yardstick),
    ...doubtful(result),
  ];
  for (const subject of subjects) {
    parts.push(heading(1, `${cellText(subject)} against ${cellText(yardstick)}`), summary(result, subject));
  }
  const shown = (kind: Chart['kind'], link?: string): string[] =>
    (options.charts ?? [])
      .filter((chart) => chart.kind === kind && chart.link === link)
      .map((chart) => `![${cellText(chart.title)}](${options.chartDirectory ?? 'charts'}/${chart.name}.svg)\n`);
  parts.push(...shown('overview'));
  parts.push(heading(1, 'Machine'), machineTable(result), heading(1, 'Images'), imageTable(result));
  for (const link of result.links) {
    parts.push(heading(1, `Link: ${cellText(link.name)}`), linkLine(link), ...shown('total', link.name));
    parts.push(timesTable(result, link), costsTable(result, link), floorTable(result, link));
    parts.push(...shown('start', link.name), ...shown('use', link.name));
  }
  parts.push(heading(1, 'How to read this'), legend());
  return `${parts.join('\n').trimEnd()}\n`;
}

function introduction(result: BenchResult, yardstick: string): string {
  return [
    `Begun ${cellText(result.startedAt)}, seed ${result.seed}. ${pairStatement(result)}`,
    'A cold start is from the beginning of the pull to the container being ready, with nothing of the image on the node and',
    `page caches dropped. The yardstick is ${cellText(yardstick)}: a ratio below 1 is less time than it took.\n`,
  ].join('\n');
}

/** How many starts stand behind a cell, said of all cells at once. */
function pairStatement(result: BenchResult): string {
  const counts = everyCell(result).map(({ cell }) => cell?.total.count ?? 0);
  const measured = counts.filter((each) => each > 0);
  if (measured.length === 0) return 'Nothing was measured.';
  const least = Math.min(...measured);
  const most = Math.max(...measured);
  const missing = counts.length - measured.length;
  const said = least === most ? `n = ${least} in every measured cell` : `n = ${least} to ${most}, as each row says`;
  const gaps = missing === 0 ? '' : `; ${missing} of ${counts.length} cells not measured`;
  return `Starts per cell, one of each pair: ${said}${gaps}.`;
}

/** Starts of one cell fetch nearly the same bytes, unless some were not cold. */
function doubtful(result: BenchResult): string[] {
  const places = everyCell(result).flatMap(({ cell, place }) =>
    cell !== undefined && cell.wireBytes.max > 2 * cell.wireBytes.min
      ? `${cell.snapshotter} with ${place} (${between(bytes, cell.wireBytes.min, cell.wireBytes.max)})`
      : [],
  );
  if (places.length === 0) return [];
  const named = places.map(cellText).join('; ');
  return [`**Perhaps not cold**, as starts of one cell fetched more than twice as much as others: ${named}.\n`];
}

function everyCell(result: BenchResult): { readonly cell: Cell | undefined; readonly place: string }[] {
  return result.links.flatMap((link) =>
    result.images.flatMap((image) =>
      result.snapshotters.map((snapshotter) => ({
        cell: cellOf(result, image.name, link.name, snapshotter),
        place: `${image.name}, ${link.name}`,
      })),
    ),
  );
}

function summary(result: BenchResult, subject: string): string {
  const yardstick = yardstickOf(result)!;
  const places: Record<Verdict, Place[]> = { faster: [], slower: [], undecided: [], unjudged: [] };
  const missing: Place[] = [];
  const rows = result.images.map((image) => [
    `**${cellText(image.name)}**<br>${bytes(image.compressedBytes)}`,
    ...result.links.map((link) => {
      const cell = cellOf(result, image.name, link.name, subject);
      const place = { image: image.name, link: link.name };
      if (cell?.toYardstick === undefined) {
        missing.push(place);
        return cell === undefined ? NOT_MEASURED : `${duration(cell.total.median)}<br>no complete pair`;
      }
      places[verdictOf(cell.toYardstick)].push({ ...place, value: cell.toYardstick.value });
      const other = cellOf(result, image.name, link.name, yardstick)!;
      const times = `${duration(cell.total.median)} against ${duration(other.total.median)}`;
      const floor = cell.floor === undefined ? 'no floor' : `floor ${duration(cell.floor.totalMs)}`;
      return `${ratioText(cell.toYardstick)}<br>${times}<br>${floor}`;
    }),
  ]);
  const tell = (words: string, list: readonly Place[]): string => `- ${words}: ${listed(result, list)}.`;
  return [
    table(['image', ...result.links.map((link) => cellText(link.name))], rows),
    tell(`**${VERDICT_MARKS.slower}**`, places.slower),
    tell(`**${VERDICT_MARKS.faster}**`, places.faster),
    tell(VERDICT_MARKS.undecided, places.undecided),
    ...(places.unjudged.length > 0
      ? [tell(`${VERDICT_MARKS.unjudged}, fewer than ${LEAST_PAIRS} pairs`, places.unjudged)]
      : []),
    ...(missing.length > 0 ? [tell('Not measured, or without a complete pair', missing)] : []),
    '',
  ].join('\n');
}

interface Place {
  readonly image: string;
  readonly link: string;
  /** Ratio, where there is one. */
  readonly value?: number;
}

/** "1 ms, 1 Gbit/s: tiny (3.43), python (1.10); 20 ms, 1 Gbit/s: tiny (3.60)". */
function listed(result: BenchResult, list: readonly Place[]): string {
  const byLink = result.links.flatMap((link) => {
    const here = list.filter((place) => place.link === link.name);
    const names = here.map(({ image, value }) => cellText(image) + (value === undefined ? '' : ` (${ratio(value)})`));
    return names.length === 0 ? [] : `${cellText(link.name)}: ${names.join(', ')}`;
  });
  return byLink.length === 0 ? 'none' : byLink.join('; ');
}

/** "**0.31** (0.28–0.35) **▼ faster**". */
function ratioText(value: Ratio): string {
  const verdict = verdictOf(value);
  const mark = verdict === 'faster' || verdict === 'slower' ? `**${VERDICT_MARKS[verdict]}**` : VERDICT_MARKS[verdict];
  const interval = value.interval === undefined ? '' : ` (${ratio(value.interval.low)}–${ratio(value.interval.high)})`;
  return `**${ratio(value.value)}**${interval} ${mark}`;
}

function machineTable(result: BenchResult): string {
  const { machine } = result;
  return table(
    ['what', 'value'],
    [
      ['processor', `${machine.cores} cores, ${cellText(machine.cpuModel)}`],
      ['memory', bytes(machine.memoryBytes)],
      ['kernel', cellText(machine.kernel)],
      ...Object.entries(machine.versions).map(([name, version]) => [cellText(name), cellText(version)]),
    ],
  );
}

function imageTable(result: BenchResult): string {
  return table(
    ['image', 'made of', 'layers', 'compressed', 'unpacked', 'command', 'ready when'],
    result.images.map((image) => [
      cellText(image.name),
      cellText(image.composition),
      count(image.layers),
      bytes(image.compressedBytes),
      image.uncompressedBytes > 0 ? bytes(image.uncompressedBytes) : NOTHING,
      commandText(image),
      readyText(image.ready),
    ]),
  );
}

function commandText(image: BenchImage): string {
  const line = image.command.join(' ');
  return cellText(line.length > 100 ? `${line.slice(0, 99)}…` : line);
}

function readyText(ready: Ready): string {
  switch (ready.kind) {
    case 'exit':
      return 'it has ended';
    case 'line':
      return `it prints /${cellText(ready.pattern)}/`;
    case 'port':
      return `it listens on port ${ready.port}`;
  }
}

function linkLine(link: BenchLink): string {
  const parts = [
    link.roundTripMs === undefined ? undefined : `round trip ${duration(link.roundTripMs)}`,
    link.bitsPerSecond === undefined ? undefined : `${bitRate(link.bitsPerSecond)} in each direction`,
    link.lossRatio === undefined || link.lossRatio === 0 ? undefined : `loss ${(link.lossRatio * 100).toFixed(2)} %`,
    link.tls ? 'TLS' : 'plain HTTP',
  ].filter((part) => part !== undefined);
  const emulated = link.roundTripMs !== undefined || link.bitsPerSecond !== undefined;
  return `${emulated ? 'Emulated' : 'The network as it is'}: ${parts.join(', ')}.\n`;
}

/** "0.92 s (0.88–0.97)". */
function withQuartiles(spread: Spread | undefined, write: (value: number | undefined) => string): string {
  if (spread === undefined) return NOTHING;
  return write(spread.median) + quartiles(spread, write);
}

function timesTable(result: BenchResult, link: BenchLink): string {
  const head = ['image', 'snapshotter', 'n', 'total (quartiles)', 'min–max', 'of pull: control', 'pull', 'create'];
  const rows = result.images.flatMap((image) => [
    ...result.snapshotters.map((snapshotter) => {
      const cell = cellOf(result, image.name, link.name, snapshotter);
      const first = [cellText(image.name), cellText(snapshotter)];
      if (cell === undefined) return [...first, '0', NOT_MEASURED, ...Array<string>(7).fill(NOTHING)];
      return [
        ...first,
        String(cell.total.count),
        `**${duration(cell.total.median)}**${quartiles(cell.total, duration)}`,
        between(duration, cell.total.min, cell.total.max),
        duration(cell.control?.median),
        withQuartiles(cell.pull, duration),
        withQuartiles(cell.create, duration),
        withQuartiles(cell.run, duration),
        snapshotter === yardstickOf(result)
          ? 'yardstick'
          : cell.toYardstick === undefined
            ? 'no complete pair'
            : ratioText(cell.toYardstick) +
              (cell.toYardstick.pairs === cell.total.count ? '' : `, ${cell.toYardstick.pairs} pairs`),
        ratio(cell.toFloor),
      ];
    }),
    floorRow(result, image, link),
  ]);
  return `Times, medians:\n\n${table([...head, 'run to ready', 'ratio to yardstick (95 %)', '÷ floor'], rows)}`;
}

function quartiles(spread: Spread, write: (value: number | undefined) => string): string {
  return spread.count < 2 ? '' : around(write, spread.median, spread.lower, spread.upper);
}

function floorRow(result: BenchResult, image: BenchImage, link: BenchLink): string[] {
  const floor = result.floors.find((each) => each.image === image.name && each.link === link.name);
  const first = [cellText(image.name), '*floor*'];
  if (floor === undefined) return [...first, NOTHING, NOT_MEASURED, ...Array<string>(7).fill(NOTHING)];
  const terms = floorParts(floor);
  return [
    ...first,
    NOTHING,
    `*${duration(floor.totalMs)}*`,
    NOTHING,
    `*${duration(terms.controlMs)}*`,
    `*bytes ${duration(terms.transferMs)}, misses ${duration(terms.missesMs)}: the larger*`,
    NOTHING,
    `*${duration(terms.warmRunMs)} with create*`,
    NOTHING,
    '1',
  ];
}

function costsTable(result: BenchResult, link: BenchLink): string {
  const head = ['image', 'snapshotter', 'requests', 'on the wire', 'needed', 'CPU, all', 'CPU seconds by process'];
  const rows = result.images.flatMap((image) =>
    result.snapshotters.map((snapshotter) => {
      const cell = cellOf(result, image.name, link.name, snapshotter);
      const first = [cellText(image.name), cellText(snapshotter)];
      if (cell === undefined) return [...first, NOT_MEASURED, ...Array<string>(7).fill(NOTHING)];
      const each = (processes: Cell['processes'], write: (process: Cell['processes'][number]) => string): string =>
        processes.map((process) => `${cellText(process.name)} ${write(process)}`).join('<br>') || NOTHING;
      // What has ended before the container is ready, such as a pull command, has no memory then.
      const living = cell.processes.filter((process) => process.pssBytes.max > 0);
      const needed =
        cell.floor === undefined
          ? NOTHING
          : `${bytes(cell.floor.neededBytes)}${cell.floor.neededBytes > 0 ? `, fetched ${ratio(cell.wireBytes.median / cell.floor.neededBytes)} ×` : ''}`;
      return [
        ...first,
        withQuartiles(cell.requests, count),
        withQuartiles(cell.wireBytes, bytes),
        needed,
        withQuartiles(cell.cpuSeconds, cpu),
        each(cell.processes, (process) => cpu(process.cpuSeconds.median)),
        each(living, (process) => bytes(process.pssBytes.median)),
        bytes(cell.writtenBytes.median),
        bytes(cell.diskBytes.median),
      ];
    }),
  );
  return `Costs of one start, medians:\n\n${table([...head, 'PSS when ready', 'written', 'kept on disk'], rows)}`;
}

function floorTable(result: BenchResult, link: BenchLink): string {
  const head = [
    'image',
    'round trip',
    'control',
    'bytes ÷ rate',
    'misses × round trip',
    'warm run',
    'floor',
    'touched',
  ];
  const rows = result.images.map((image) => {
    const floor = result.floors.find((each) => each.image === image.name && each.link === link.name);
    if (floor === undefined) return [cellText(image.name), NOT_MEASURED, ...Array<string>(6).fill(NOTHING)];
    const terms = floorParts(floor);
    // A total that is not the sum of its terms must not pass silently: the terms are what a reader can check.
    const off = Math.abs(terms.totalMs - floor.totalMs) > Math.max(1, floor.totalMs * 0.01);
    return [
      cellText(image.name),
      duration(floor.roundTripMs),
      `${count(floor.controlRoundTrips)} round trips: ${duration(terms.controlMs)}`,
      `${bytes(floor.neededBytes)} at ${bytes(floor.bytesPerSecond)}/s: ${duration(terms.transferMs)}`,
      `${count(floor.dependentMisses)}: ${duration(terms.missesMs)}`,
      duration(floor.warmRunMs),
      `**${duration(floor.totalMs)}**${off ? ` (its terms give ${duration(terms.totalMs)})` : ''}`,
      bytes(floor.touchedBytes),
    ];
  });
  return `The floor: control + the larger of bytes ÷ rate and misses × round trip + warm run:\n\n${table(head, rows)}`;
}

function legend(): string {
  return [
    `- ${VERDICT_MARKS.faster} and ${VERDICT_MARKS.slower}: the whole 95 % interval of the ratio lies below or above 1. ${VERDICT_MARKS.undecided}: the interval`,
    `  holds 1. ${VERDICT_MARKS.unjudged}: fewer than ${LEAST_PAIRS} complete pairs, so there is no interval.`,
    `- A ratio is the quotient of two medians over the same pairs; its interval is a percentile bootstrap over whole pairs`,
    `  (${RESAMPLES} resamples, the seed above), so the same result file always gives the same digits.`,
    '- Of many intervals of 95 %, one in twenty misses by chance: a single narrow cell proves less than a row of them.',
    '- Medians of phases are taken phase by phase and need not add up to the median of the total.',
    '- Units are decimal: 1 MB is 1,000,000 bytes. `—` is "does not apply" or "was not measured".',
    '- `docs/benchmarks.md` says how each figure is measured, and what is fair about the comparison and what is not.',
    '',
  ].join('\n');
}
