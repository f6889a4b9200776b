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

/** The value of an HTTP Range header for `range` (RFC 9110 §14.1.2). The only place where an inclusive end exists. */
export function httpRange(range: ByteRange): string {
  return `bytes=${range.offset}-${range.offset + range.length - 1}`;
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
