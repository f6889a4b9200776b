// Every cell in one picture: the ratio of each snapshotter to the yardstick with its interval, on a logarithmic axis where
// twice as fast and twice as slow are equally far from 1. What lies right of the line is slower, and looks it.
import type { BenchResult } from '../result.ts';
import { logScale, type Scale } from './axis.ts';
import { type Cell, cellOf, VERDICT_MARKS, verdictOf, yardstickOf } from './cells.ts';
import { duration, ratio } from './quantities.ts';
import { dot, fitted, line, svgDocument, text } from './svg.ts';
import { FONT_PIXELS, seriesFill, seriesLine, styleSheet } from './theme.ts';

const WIDTH = 980;
const MARGIN = 20;
const LABELS = 230;
const VALUES = 300;
const ROW = 20;
const GROUP = 30;
const TOP = 92;

export function overviewChart(result: BenchResult): string {
  const yardstick = yardstickOf(result) ?? 'nothing';
  const subjects = result.snapshotters.slice(1);
  const groups = result.links.map((link) => ({
    link: link.name,
    rows: result.images.flatMap((image) =>
      subjects.map((snapshotter) => ({
        label: subjects.length > 1 ? `${image.name}, ${snapshotter}` : image.name,
        snapshotter,
        cell: cellOf(result, image.name, link.name, snapshotter),
        yardstickMs: cellOf(result, image.name, link.name, yardstick)?.total.median,
      })),
    ),
  }));
  const { least, most } = domain(groups.flatMap((group) => group.rows));
  const x = logScale(least, most, MARGIN + LABELS, WIDTH - MARGIN - VALUES);
  const body: string[] = [];
  let y = TOP;
  for (const group of groups) {
    body.push(text(MARGIN, y + 18, fitted(group.link, LABELS, FONT_PIXELS.text), { class: 'b' }));
    y += GROUP;
    for (const row of group.rows) {
      body.push(...rowOf(row, x, y, result.snapshotters.indexOf(row.snapshotter)));
      y += ROW;
    }
  }
  const bottom = y + 4;
  const title = `Time from pull to ready, divided by that of ${yardstick}`;
  const reading =
    'Dot: ratio of medians. Bar: 95 % interval. Dashed: the floor. Left of 1 is faster; the axis is logarithmic.';
  return svgDocument(
    {
      title,
      description: `${reading} ${groups.flatMap((group) => group.rows.map((row) => `${row.label} at ${group.link}: ${valueText(row.cell)}.`)).join(' ')}`,
      width: WIDTH,
      height: bottom + 32,
      body: [
        text(MARGIN, 30, fitted(title, WIDTH - 2 * MARGIN, FONT_PIXELS.title), { class: 'h' }),
        text(MARGIN, 50, reading, { class: 's' }),
        ...axis(x, least, most, TOP - 6, bottom),
        text(x(1) - 8, TOP - 14, '◂ faster', { class: 's', anchor: 'end' }),
        text(x(1) + 8, TOP - 14, 'slower ▸', { class: 's' }),
        ...body,
      ],
    },
    styleSheet(),
  );
}

interface Row {
  readonly label: string;
  readonly snapshotter: string;
  readonly cell: Cell | undefined;
  readonly yardstickMs: number | undefined;
}

/** Room for every dot, interval and floor, and for 1 with something on both of its sides. */
function domain(rows: readonly Row[]): { readonly least: number; readonly most: number } {
  const values = rows.flatMap((row) => {
    const value = row.cell?.toYardstick;
    const all = [value?.value, value?.interval?.low, value?.interval?.high, floorShare(row)];
    return all.filter((each) => each !== undefined && each > 0);
  }) as number[];
  return { least: Math.min(0.5, ...values) / 1.15, most: Math.max(2, ...values) * 1.15 };
}

function floorShare(row: Row): number | undefined {
  const floorMs = row.cell?.floor?.totalMs;
  if (floorMs === undefined || row.yardstickMs === undefined || !(floorMs > 0) || !(row.yardstickMs > 0))
    return undefined;
  return floorMs / row.yardstickMs;
}

function rowOf(row: Row, x: Scale, top: number, place: number): string[] {
  const middle = top + ROW / 2;
  const floor = floorShare(row);
  const value = row.cell?.toYardstick;
  const label = fitted(row.label, LABELS - 24, FONT_PIXELS.text);
  return [
    text(MARGIN + 12, middle + 4, label),
    line(x.from, middle, x.to, middle, 'grid'),
    ...(floor === undefined ? [] : [line(x(floor), middle - 7, x(floor), middle + 7, 'floor-line')]),
    ...(value?.interval === undefined
      ? []
      : [line(x(value.interval.low), middle, x(value.interval.high), middle, `thick ${seriesLine(place)}`)]),
    ...(value === undefined
      ? []
      : [dot(x(value.value), middle, 4.2, `dots ${seriesFill(place)}`, `${row.label}: ${valueText(row.cell)}`)]),
    text(x.to + 16, middle + 4, valueText(row.cell), { class: verdictClass(row.cell) }),
    text(WIDTH - MARGIN, middle + 4, row.cell === undefined ? '' : duration(row.cell.total.median), {
      class: 's',
      anchor: 'end',
    }),
  ];
}

function valueText(cell: Cell | undefined): string {
  if (cell === undefined) return 'not measured';
  const value = cell.toYardstick;
  if (value === undefined) return 'no complete pair';
  const interval = value.interval === undefined ? '' : ` (${ratio(value.interval.low)}–${ratio(value.interval.high)})`;
  return `${ratio(value.value)}${interval} ${VERDICT_MARKS[verdictOf(value)]}`;
}

function verdictClass(cell: Cell | undefined): string {
  if (cell?.toYardstick === undefined) return 's';
  const verdict = verdictOf(cell.toYardstick);
  return verdict === 'slower' ? 'm slower' : verdict === 'faster' ? 'm faster' : 's';
}

/** Ticks at halves and doubles. */
function axis(x: Scale, least: number, most: number, top: number, bottom: number): string[] {
  const drawn: string[] = [];
  for (let power = Math.ceil(Math.log2(least)); 2 ** power <= most; power++) {
    const value = 2 ** power;
    const label = value >= 1 ? `${value}` : `1/${1 / value}`;
    drawn.push(line(x(value), top, x(value), bottom, value === 1 ? 'one' : 'grid'));
    drawn.push(text(x(value), bottom + 15, label, { anchor: 'middle', class: 's' }));
  }
  return [...drawn, line(x.from, bottom, x.to, bottom, 'axis')];
}
