// Quantities as people write them on a command line: rates and times. Refuses what it does not understand, with an example.
import { DedupError } from '../errors.ts';
import { GiB, KiB, MiB } from '../units.ts';

const BYTES: Readonly<Record<string, number>> = {
  b: 1,
  k: 1e3,
  kb: 1e3,
  kib: KiB,
  m: 1e6,
  mb: 1e6,
  mib: MiB,
  g: 1e9,
  gb: 1e9,
  gib: GiB,
};
const MS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
/** Longest time that is taken, milliseconds: ten years. */
const MAX_MS = 3650 * 86_400_000;

/** Bytes per second of "20MB/s", "512 KiB/s", "1.5G". Errors: INVALID_ARGUMENT. */
export function parseRate(text: string): number {
  const [, number = '', unit = ''] = /^(\d+(?:\.\d+)?)\s*([a-z]+)(?:\/s)?$/i.exec(text.trim()) ?? [];
  const rate = Math.round(Number(number) * (BYTES[unit.toLowerCase()] ?? Number.NaN));
  if (number !== '' && rate >= 1 && Number.isSafeInteger(rate)) return rate;
  throw new DedupError('INVALID_ARGUMENT', `${JSON.stringify(text)} is not a rate`, {
    hint: 'write it like 20MB/s or 512KiB/s',
  });
}

/** Milliseconds of "90s", "30m", "24h", "7d". Errors: INVALID_ARGUMENT. */
export function parseTime(text: string): number {
  const [, number = '', unit = ''] = /^(\d+(?:\.\d+)?)\s*([smhd])$/i.exec(text.trim()) ?? [];
  const ms = Math.round(Number(number) * (MS[unit.toLowerCase()] ?? Number.NaN));
  if (number !== '' && ms >= 1 && ms <= MAX_MS) return ms;
  throw new DedupError('INVALID_ARGUMENT', `${JSON.stringify(text)} is not a time`, {
    hint: 'write it like 30m, 24h or 7d',
  });
}
