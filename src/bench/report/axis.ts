// Scales and their ticks. A scale maps a quantity to pixels; ticks stand at round values, in one unit per axis.
import { ticks } from 'd3-array';
import { line, text } from './svg.ts';

export interface Scale {
  (value: number): number;
  readonly from: number;
  readonly to: number;
}

/** Linear, from `least` at pixel `from` to `most` at pixel `to`; an empty domain is widened to something drawable. */
export function linearScale(least: number, most: number, from: number, to: number): Scale {
  const extent = most > least ? most - least : 1;
  return Object.assign((value: number) => from + ((value - least) / extent) * (to - from), { from, to });
}

/** Logarithmic: equal distances are equal ratios. Both ends above zero. */
export function logScale(least: number, most: number, from: number, to: number): Scale {
  const linear = linearScale(Math.log(least), Math.log(most), from, to);
  return Object.assign((value: number) => linear(Math.log(value)), { from, to });
}

/** Round values from 0 to `most`, about `count` of them. */
export function roundTicks(most: number, count: number): number[] {
  return most > 0 ? ticks(0, most, count) : [0];
}

/** Ticks of a time axis with one unit for all: milliseconds below two seconds, minutes above twenty of them. */
export function timeTicks(mostMs: number, count: number): { readonly at: number; readonly label: string }[] {
  const [factor, unit] = mostMs < 2000 ? [1, 'ms'] : mostMs < 1_200_000 ? [1000, 's'] : [60_000, 'min'];
  return roundTicks(mostMs / factor, count).map((value) => ({
    at: value * factor,
    label: `${Number(value.toFixed(6))} ${unit}`,
  }));
}

/** Time axis below a plot: grid lines up to `top`, a base line, labels under it unless another plot follows below. */
export function timeAxis(
  scale: Scale,
  mostMs: number,
  top: number,
  bottom: number,
  count: number,
  labelled = true,
): string[] {
  const marks = timeTicks(mostMs, count);
  return [
    ...marks.map(({ at }) => line(scale(at), top, scale(at), bottom, 'grid')),
    line(scale.from, bottom, scale.to, bottom, 'axis'),
    ...(labelled ? marks : []).map(({ at, label }) =>
      text(scale(at), bottom + 14, label, { anchor: 'middle', class: 's' }),
    ),
  ];
}
