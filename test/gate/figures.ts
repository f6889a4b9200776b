// The gate's figures: what was measured, what the committed baseline says, and whether the one may follow from the other.
// Of every figure less is better. Pure, but for reading and writing the baseline's file.
import { readFileSync, writeFileSync } from 'node:fs';
import { cpus, release } from 'node:os';
import { join } from 'node:path';
import { native } from '../../src/fs/native.ts';

export const BASELINE_FILE = join(import.meta.dirname, 'baseline.json');

/**
 * "same": any change fails; for what the other figures rest on. "exact": nothing may be added. "+10 %": as much may be
 * added.
 */
export type Tolerance = string;

export type FigureUnit = 'requests' | 'reads' | 'bytes' | '× yardstick' | 'collections' | 'digest';

export interface Figure {
  readonly value: number | string;
  readonly unit: FigureUnit;
}

export type Figures = Readonly<Record<string, Figure>>;

export interface BaselineFigure extends Figure {
  readonly tolerance: Tolerance;
  /** In place of `tolerance` on machines of another kind than the baseline's. */
  readonly elsewhere?: Tolerance;
}

export interface Baseline {
  /** Kind of the machine it was measured on: processor, kernel, Node.js. */
  readonly machine: string;
  readonly figures: Readonly<Record<string, BaselineFigure>>;
}

export type Verdict = 'same' | 'better' | 'worse' | 'new' | 'missing';

export interface Comparison {
  readonly name: string;
  readonly unit: FigureUnit;
  readonly baseline: number | string | undefined;
  readonly measured: number | string | undefined;
  /** What applies on this machine. */
  readonly tolerance: Tolerance;
  readonly verdict: Verdict;
}

/** What processor time, memory and the kernel's readahead depend on. */
export function machineKind(): string {
  const text = readFileSync('/proc/cpuinfo', 'utf8');
  const field = (name: string): string => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(text)?.[1] ?? '?';
  const processor = `${cpus()[0]?.model ?? '?'} (${field('cpu family')}/${field('model')}/${field('stepping')})`;
  const kernel = release().split('.').slice(0, 2).join('.');
  const inflater = native().inflater();
  return `${cpus().length} × ${processor}, Linux ${kernel}, Node.js ${process.versions.node}, ${inflater}`;
}

/** Errors: Error for a file that is not a baseline. */
export function readBaseline(file = BASELINE_FILE): Baseline {
  const baseline = JSON.parse(readFileSync(file, 'utf8')) as Baseline;
  for (const [name, { value, tolerance, elsewhere }] of Object.entries(baseline.figures)) {
    for (const text of elsewhere === undefined ? [tolerance] : [tolerance, elsewhere]) {
      if (text !== 'same' && (typeof value !== 'number' || addedRatio(text) === undefined)) {
        throw new Error(`${file}: ${name}: tolerance ${JSON.stringify(text)} does not suit ${JSON.stringify(value)}`);
      }
    }
  }
  return baseline;
}

/** What may be added, as a part of the baseline; undefined for what is no such tolerance. */
function addedRatio(tolerance: Tolerance): number | undefined {
  if (tolerance === 'exact') return 0;
  const percent = /^\+(\d+(?:\.\d+)?) %$/.exec(tolerance)?.[1];
  return percent === undefined ? undefined : Number(percent) / 100;
}

function judge(baseline: number | string, measured: number | string, tolerance: Tolerance): Verdict {
  const ratio = addedRatio(tolerance);
  if (ratio === undefined || typeof baseline !== 'number' || typeof measured !== 'number') {
    return baseline === measured ? 'same' : 'worse';
  }
  if (measured > baseline * (1 + ratio)) return 'worse';
  return measured < baseline * (1 - ratio) ? 'better' : 'same';
}

/** In the order of `measured`, then what is in the baseline only. */
export function compare(baseline: Baseline, measured: Figures, machine = machineKind()): Comparison[] {
  const found = Object.entries(measured).map(([name, { value, unit }]): Comparison => {
    const known = baseline.figures[name];
    if (known === undefined) {
      return { name, unit, baseline: undefined, measured: value, tolerance: '', verdict: 'new' };
    }
    const tolerance = machine === baseline.machine ? known.tolerance : (known.elsewhere ?? known.tolerance);
    const verdict = judge(known.value, value, tolerance);
    return { name, unit, baseline: known.value, measured: value, tolerance, verdict };
  });
  for (const [name, { value, unit, tolerance }] of Object.entries(baseline.figures)) {
    if (measured[name] === undefined) {
      found.push({ name, unit, baseline: value, measured: undefined, tolerance, verdict: 'missing' });
    }
  }
  return found;
}

/** The lesser value of each figure: what disturbs a measurement adds to it. */
export function least(a: Figures, b: Figures): Figures {
  const merged: Record<string, Figure> = { ...a };
  for (const [name, figure] of Object.entries(b)) {
    const known = merged[name];
    if (known === undefined || figure.value < known.value) merged[name] = figure;
  }
  return merged;
}

/** What to commit now. Figures within their tolerance keep their value, so that small steps cannot add up unseen. */
export function updated(baseline: Baseline, measured: Figures, machine = machineKind()): Baseline {
  const elsewhere = machine !== baseline.machine;
  const figures: Record<string, BaselineFigure> = {};
  for (const { name, verdict } of compare(baseline, measured, machine)) {
    const known = baseline.figures[name];
    const now = measured[name];
    if (now === undefined) continue;
    if (known === undefined) figures[name] = { ...now, tolerance: typeof now.value === 'number' ? 'exact' : 'same' };
    else if (elsewhere || verdict !== 'same') figures[name] = { ...known, ...now };
    else figures[name] = known;
  }
  return { machine, figures };
}

export function writeBaseline(baseline: Baseline, file = BASELINE_FILE): void {
  writeFileSync(file, `${JSON.stringify(baseline, null, 2)}\n`);
}

const FIX = 'if that is intended, run `make gate ARGS=--update` and commit test/gate/baseline.json with the reason';

/** Why a figure does not pass, and what to do; undefined for one that does. */
export function complaint(comparison: Comparison): string | undefined {
  const { name, unit, verdict, tolerance } = comparison;
  switch (verdict) {
    case 'same':
    case 'better':
      return undefined;
    case 'worse':
      return `${name}: measured ${show(comparison.measured, unit)}, the baseline is ${show(comparison.baseline, unit)} (${tolerance}); ${FIX}`;
    case 'new':
      return `${name}: measured ${show(comparison.measured, unit)}, the baseline has no such figure; ${FIX}`;
    case 'missing':
      return `${name}: in the baseline, but not measured any more; ${FIX}`;
  }
}

function show(value: number | string | undefined, unit: FigureUnit): string {
  if (value === undefined) return '–';
  if (typeof value === 'string') return value.slice(0, 19);
  return unit === '× yardstick' ? `${value.toFixed(3)} ${unit}` : `${value.toLocaleString('en')} ${unit}`;
}

/** One line a figure, for people. */
export function table(comparisons: readonly Comparison[]): string {
  const rows = comparisons.map(({ name, unit, baseline, measured, tolerance, verdict }) => {
    const change =
      typeof baseline === 'number' && typeof measured === 'number' && baseline !== measured
        ? baseline === 0
          ? 'from 0'
          : `${measured > baseline ? '+' : ''}${(100 * (measured / baseline - 1)).toFixed(1)} %`
        : '';
    return [name, show(baseline, unit), show(measured, unit), change, tolerance, verdict === 'same' ? '' : verdict];
  });
  const all = [['figure', 'baseline', 'measured', 'change', 'allowed', ''], ...rows];
  const widths = all[0]!.map((_, column) => Math.max(...all.map((row) => row[column]!.length)));
  const lines = all.map((row) =>
    row
      .map((cell, column) =>
        column >= 1 && column <= 3 ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!),
      )
      .join('  ')
      .trimEnd(),
  );
  return lines.join('\n');
}
