// How the report writes quantities: decimal units, since links are measured in decimal bits, and about three digits. What
// is not a number is a dash, never "NaN".

export const NOTHING = '—';

/** "84 ms", "2.92 s", "131 s". */
export function duration(ms: number | undefined): string {
  if (ms === undefined || !Number.isFinite(ms)) return NOTHING;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return `${digits(ms / 1000)} s`;
}

/** "512 B", "78.0 MB", "2.45 GB". */
export function bytes(count: number | undefined): string {
  if (count === undefined || !Number.isFinite(count)) return NOTHING;
  const { factor, unit } = byteUnit(count);
  return factor === 1 ? `${count.toFixed(0)} B` : `${digits(count / factor)} ${unit}`;
}

/** The unit that fits a quantity of this size; an axis takes one for all its ticks. */
export function byteUnit(count: number): { readonly factor: number; readonly unit: string } {
  const size = Math.abs(count);
  if (size >= 999.5e6) return { factor: 1e9, unit: 'GB' };
  if (size >= 999.5e3) return { factor: 1e6, unit: 'MB' };
  return size >= 999.5 ? { factor: 1e3, unit: 'kB' } : { factor: 1, unit: 'B' };
}

/** "1 Gbit/s", "50 Mbit/s". */
export function bitRate(bitsPerSecond: number | undefined): string {
  if (bitsPerSecond === undefined || !Number.isFinite(bitsPerSecond)) return NOTHING;
  return bitsPerSecond >= 1e9 ? `${trimmed(bitsPerSecond / 1e9)} Gbit/s` : `${trimmed(bitsPerSecond / 1e6)} Mbit/s`;
}

/** "0.012", "0.31", "1.18", "12.4". */
export function ratio(value: number | undefined): string {
  if (value === undefined || !Number.isFinite(value)) return NOTHING;
  return value < 0.1 ? value.toFixed(3) : value < 10 ? value.toFixed(2) : value.toFixed(1);
}

/** "0.31 s", of CPU. */
export function cpu(seconds: number | undefined): string {
  return seconds === undefined || !Number.isFinite(seconds) ? NOTHING : `${seconds.toFixed(2)} s`;
}

/** "29", or "29.5" between two. */
export function count(value: number | undefined): string {
  return value === undefined || !Number.isFinite(value) ? NOTHING : trimmed(value);
}

type Write = (value: number | undefined) => string;

/** "319–333 ms", "0.95–1.20 s", "950 ms–1.20 s": the unit once where it is the same. */
export function between(write: Write, low: number, high: number): string {
  const [first, last] = [write(low), write(high)];
  if (first === last) return first;
  return unitOf(first) === unitOf(last) ? `${numberOf(first)}–${last}` : `${first}–${last}`;
}

/** "(319–333)" after "324 ms"; with units where they differ from it, and nothing where all three read the same. */
export function around(write: Write, middle: number, low: number, high: number): string {
  const texts = [write(low), write(middle), write(high)];
  if (new Set(texts).size === 1) return '';
  return new Set(texts.map(unitOf)).size === 1
    ? ` (${numberOf(texts[0]!)}–${numberOf(texts[2]!)})`
    : ` (${between(write, low, high)})`;
}

function numberOf(text: string): string {
  return text.split(' ')[0]!;
}

function unitOf(text: string): string {
  return text.split(' ')[1] ?? '';
}

function digits(value: number): string {
  return value < 9.995 ? value.toFixed(2) : value < 99.95 ? value.toFixed(1) : value.toFixed(0);
}

function trimmed(value: number): string {
  return value.toFixed(1).replace(/\.0$/, '');
}
