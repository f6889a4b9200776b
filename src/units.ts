// Quantities and ranges. Names of variables carry the unit; ranges are always {offset, length}.

export const KiB = 1024;
export const MiB = 1024 * 1024;
export const GiB = 1024 * 1024 * 1024;
export const TiB = 1024 * GiB;

/** EROFS block size and the alignment of every chunk in the store, in bytes. */
export const BLOCK_BYTES = 4096;

/** Half-open byte range `[offset, offset + length)`. */
export interface ByteRange {
  readonly offset: number;
  readonly length: number;
}

/**
 * The value of an HTTP Range header for `ranges`, none of them empty (RFC 9110 §14.1.2). An inclusive end exists only here
 * and in parseContentRange.
 */
export function httpRange(...ranges: readonly ByteRange[]): string {
  return `bytes=${ranges.map(({ offset, length }) => `${offset}-${offset + length - 1}`).join(',')}`;
}

/** What an HTTP Content-Range header says (RFC 9110 §14.4); `size` is undefined for "*". Undefined when it is not one. */
export function parseContentRange(text: string): { range: ByteRange; size: number | undefined } | undefined {
  const match = /^bytes (\d{1,16})-(\d{1,16})\/(\d{1,16}|\*)$/i.exec(text.trim());
  if (match === null) return undefined;
  const [first, last] = [Number(match[1]), Number(match[2])];
  const size = match[3] === '*' ? undefined : Number(match[3]);
  if (!Number.isSafeInteger(last) || last < first || (size !== undefined && size <= last)) return undefined;
  return { range: { offset: first, length: last + 1 - first }, size };
}

export function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple;
}

/** "12.3 MiB" for people. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return unit === 0 ? `${value} B` : `${value.toFixed(1)} ${units[unit]}`;
}
