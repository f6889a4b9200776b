// Bars with spread, one chart per link: a panel for each image with a bar for each snapshotter, its quartiles, every single
// run as a dot, and the floor. Each panel has its own linear scale from zero: bars stay honest, and a long download of one
// image does not flatten the others.
import type { BenchImage, BenchLink, BenchResult } from '../result.ts';
import { linearScale, timeAxis } from './axis.ts';
import { type Cell, cellOf, type Verdict, verdictOf, yardstickOf } from './cells.ts';
import { bytes, duration, ratio } from './quantities.ts';
import { dot, fitted, line, rect, svgDocument, text, textWidth } from './svg.ts';
import { FONT_PIXELS, seriesFill, seriesLine, styleSheet } from './theme.ts';

const WIDTH = 980;
/** Of a chart with one panel: as wide as its text needs. */
const NARROW = 720;
const MARGIN = 20;
const GAP = 36;
const LABELS = 96;
const VALUES = 108;
const ROW = 26;
const BAR = 14;
const HEAD = 58;
const FOOT = 34;
const TOP = 66;

export function totalsChart(result: BenchResult, link: BenchLink): string {
  const columns = result.images.length > 1 ? 2 : 1;
  const width = columns === 1 ? NARROW : WIDTH;
  const panelWidth = (width - 2 * MARGIN - (columns - 1) * GAP) / columns;
  const panelHeight = HEAD + result.snapshotters.length * ROW + FOOT;
  const panels = result.images.flatMap((image, at) => {
    const left = MARGIN + (at % columns) * (panelWidth + GAP);
    const top = TOP + Math.floor(at / columns) * panelHeight;
    return panel(result, link, image, { left, top, width: panelWidth });
  });
  const title = `Time from pull to ready: ${link.name}`;
  const versus = result.snapshotters.length > 1 ? ` ×: ratio to ${yardstickOf(result)}.` : '';
  const reading = `Bar: median. Whisker: quartiles. Dot: one run. Dashed: the floor.${versus} Each image has its own scale.`;
  return svgDocument(
    {
      title,
      description: `${reading} ${described(result, link)}`,
      width,
      height: TOP + Math.ceil(result.images.length / columns) * panelHeight + 8,
      body: [
        text(MARGIN, 30, fitted(title, width - 2 * MARGIN, FONT_PIXELS.title), { class: 'h' }),
        text(MARGIN, 50, reading, { class: 's' }),
        ...panels,
      ],
    },
    styleSheet(),
  );
}

function described(result: BenchResult, link: BenchLink): string {
  const sentences = result.images.map((image) => {
    const medians = result.snapshotters.map((snapshotter) => {
      const cell = cellOf(result, image.name, link.name, snapshotter);
      return `${snapshotter} ${cell === undefined ? 'not measured' : duration(cell.total.median)}`;
    });
    return `${image.name}: ${medians.join(', ')}.`;
  });
  return sentences.join(' ');
}

interface Frame {
  readonly left: number;
  readonly top: number;
  readonly width: number;
}

function panel(result: BenchResult, link: BenchLink, image: BenchImage, frame: Frame): string[] {
  const cells = result.snapshotters.map((snapshotter) => cellOf(result, image.name, link.name, snapshotter));
  const floorMs = result.floors.find((each) => each.image === image.name && each.link === link.name)?.totalMs;
  const mostMs = Math.max(1, floorMs ?? 0, ...cells.map((cell) => cell?.total.max ?? 0));
  const x = linearScale(0, mostMs * 1.02, frame.left + LABELS, frame.left + frame.width - VALUES);
  const rowsTop = frame.top + HEAD;
  const bottom = rowsTop + result.snapshotters.length * ROW;
  const subtitle = `${bytes(image.compressedBytes)} compressed, ${image.layers} ${image.layers === 1 ? 'layer' : 'layers'}`;
  const name = fitted(image.name, frame.width * 0.5, FONT_PIXELS.text);
  return [
    text(frame.left, frame.top + 22, name, { class: 'b' }),
    text(frame.left + frame.width, frame.top + 22, subtitle, { class: 's', anchor: 'end' }),
    ...timeAxis(x, mostMs, rowsTop, bottom, 4),
    ...result.snapshotters.flatMap((snapshotter, at) =>
      bar(snapshotter, cells[at], at, x, { left: frame.left, top: rowsTop + at * ROW, width: frame.width }),
    ),
    ...(floorMs === undefined ? [] : floorLine(floorMs, x, rowsTop, bottom, frame)),
  ];
}

function floorLine(floorMs: number, x: ReturnType<typeof linearScale>, top: number, bottom: number, frame: Frame) {
  const label = `floor ${duration(floorMs)}`;
  const fits = x(floorMs) + textWidth(label, FONT_PIXELS.small) < frame.left + frame.width;
  return [
    line(x(floorMs), top - 12, x(floorMs), bottom, 'floor-line'),
    text(x(floorMs) + (fits ? 4 : -4), top - 5, label, {
      class: 's floor-text',
      anchor: fits ? 'start' : 'end',
    }),
  ];
}

function bar(
  snapshotter: string,
  cell: Cell | undefined,
  place: number,
  x: ReturnType<typeof linearScale>,
  frame: Frame,
): string[] {
  const middle = frame.top + ROW / 2;
  const label = text(frame.left + LABELS - 8, middle + 4, fitted(snapshotter, LABELS - 8, FONT_PIXELS.text), {
    anchor: 'end',
  });
  if (cell === undefined)
    return [label, text(frame.left + frame.width - VALUES + 8, middle + 4, 'not measured', { class: 's' })];
  const { total } = cell;
  const end = x(total.median);
  const tip = `${snapshotter}: median ${duration(total.median)}, quartiles ${duration(total.lower)} to ${duration(total.upper)}, n = ${total.count}`;
  const value = duration(total.median);
  const share = cell.toYardstick === undefined ? '' : `× ${ratio(cell.toYardstick.value)}`;
  return [
    label,
    rect(x(0), middle - BAR / 2, end - x(0), BAR, `bar ${seriesFill(place)}`, tip),
    ...cell.starts.map((start, at) =>
      // Spread over the height of the bar, in the order of the runs: equal times stay apart, and a drift is seen.
      dot(x(start.phases.totalMs), middle + jitter(at, cell.starts.length), 2.2, `dots ${seriesFill(place)}`),
    ),
    line(end, middle - BAR / 2 - 2, end, middle + BAR / 2 + 2, `median ${seriesLine(place)}`),
    ...whisker(x(total.lower), x(total.upper), middle, total.count),
    text(frame.left + frame.width - VALUES + 8, middle + 4, value, { class: 't' }),
    text(frame.left + frame.width, middle + 4, share, { class: shareClass(cell), anchor: 'end' }),
  ];
}

/** Won and lost cells in the colours that the overview gives them. */
function shareClass(cell: Cell): string {
  const verdict: Verdict = cell.toYardstick === undefined ? 'unjudged' : verdictOf(cell.toYardstick);
  return verdict === 'faster' || verdict === 'slower' ? `m ${verdict}` : 's';
}

function whisker(from: number, to: number, middle: number, count: number): string[] {
  if (count < 2) return [];
  return [
    line(from, middle, to, middle, 'whisker'),
    line(from, middle - 4, from, middle + 4, 'whisker'),
    line(to, middle - 4, to, middle + 4, 'whisker'),
  ];
}

function jitter(at: number, count: number): number {
  return count < 2 ? 0 : (at / (count - 1) - 0.5) * (BAR - 4);
}
