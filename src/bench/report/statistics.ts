// The statistics of the report: quartiles of a cell's runs, and the ratio of two snapshotters over pairs with an interval.
// Deterministic: the same figures and the same seed give the same digits.
import { quantileSorted } from 'd3-array';

/** Five numbers of one quantity over the runs of a cell. Quartiles are interpolated linearly (Hyndman and Fan, type 7). */
export interface Spread {
  readonly count: number;
  readonly min: number;
  readonly lower: number;
  readonly median: number;
  readonly upper: number;
  readonly max: number;
}

/** Undefined where there is no value. */
export function spreadOf(values: readonly number[]): Spread | undefined {
  const sorted = ascending(values);
  if (sorted.length === 0) return undefined;
  const at = (share: number): number => quantileSorted(sorted, share) ?? Number.NaN;
  return { count: sorted.length, min: at(0), lower: at(0.25), median: at(0.5), upper: at(0.75), max: at(1) };
}

/** One pair: the same image on the same link, both snapshotters after each other. Any unit, the same for both. */
export interface Pair {
  readonly subject: number;
  readonly yardstick: number;
}

export interface Ratio {
  /** Median of the subject ÷ median of the yardstick. Below 1: less time than the yardstick. */
  readonly value: number;
  readonly pairs: number;
  /** 95 % interval; undefined below `LEAST_PAIRS` pairs, where resampling says nothing. */
  readonly interval?: { readonly low: number; readonly high: number };
}

/** Below this number of pairs no interval is given. */
export const LEAST_PAIRS = 5;
export const RESAMPLES = 5000;

/**
 * Ratio of medians with a percentile bootstrap over whole pairs: what happened to the machine during a pair hits both of
 * its members, and stays together. Undefined without pairs or where the yardstick's median is not above zero.
 */
export function pairedRatio(pairs: readonly Pair[], seed: number): Ratio | undefined {
  const value = ratioOfMedians(pairs);
  if (value === undefined) return undefined;
  if (pairs.length < LEAST_PAIRS) return { value, pairs: pairs.length };
  const random = generator(seed);
  const ratios: number[] = [];
  for (let round = 0; round < RESAMPLES; round++) {
    const drawn = pairs.map(() => pairs[Math.floor(random() * pairs.length)]!);
    const ratio = ratioOfMedians(drawn);
    if (ratio !== undefined) ratios.push(ratio);
  }
  const sorted = ascending(ratios);
  const low = quantileSorted(sorted, 0.025);
  const high = quantileSorted(sorted, 0.975);
  if (low === undefined || high === undefined) return { value, pairs: pairs.length };
  return { value, pairs: pairs.length, interval: { low, high } };
}

function ratioOfMedians(pairs: readonly Pair[]): number | undefined {
  const subject = quantileSorted(ascending(pairs.map((pair) => pair.subject)), 0.5);
  const yardstick = quantileSorted(ascending(pairs.map((pair) => pair.yardstick)), 0.5);
  return subject === undefined || yardstick === undefined || !(yardstick > 0) ? undefined : subject / yardstick;
}

function ascending(values: readonly number[]): number[] {
  return values.toSorted((a, b) => a - b);
}

/** Numbers in [0, 1): a counter through the finishing step of MurmurHash3, which needs no library and no warm-up. */
function generator(seed: number): () => number {
  let counter = seed | 0;
  return () => {
    counter = (counter + 0x9e3779b9) | 0;
    let word = counter;
    word = Math.imul(word ^ (word >>> 16), 0x85ebca6b);
    word = Math.imul(word ^ (word >>> 13), 0xc2b2ae35);
    return ((word ^ (word >>> 16)) >>> 0) / 0x1_0000_0000;
  };
}
