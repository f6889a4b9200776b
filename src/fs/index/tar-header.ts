// Decodes the fixed parts of a tar stream: one 512-byte header block, one PAX record list, the sparse maps. Pure
// functions on bytes, called by tar-reader.ts; they never see a stream. Facts: POSIX.1-2017 pax, GNU tar manual
// "Tar Internals", and what Go's archive/tar accepts, because containerd's own unpack reads layers with it.
import { DedupError } from '../../errors.ts';

export const TAR_BLOCK_BYTES = 512;
/** Longest PAX record list or GNU long name member that is read, bytes. */
export const MAX_META_BYTES = 1024 * 1024;
/** PATH_MAX and NAME_MAX of Linux, bytes. */
export const MAX_NAME_BYTES = 4096;
export const MAX_COMPONENT_BYTES = 255;
/** XATTR_NAME_MAX and XATTR_SIZE_MAX less one: EROFS stores the length in 16 bits. */
export const MAX_XATTR_NAME_BYTES = 255;
export const MAX_XATTR_VALUE_BYTES = 65_535;
/** Attributes of one file; the kernel lists at most 64 KiB of names. */
export const MAX_XATTRS_PER_SET = 1024;
/** Fragments of one sparse file. */
export const MAX_FRAGMENTS_PER_FILE = 1 << 20;

/** A part of a sparse file that has bytes in the tar; offsets within the file, bytes. */
export interface Fragment {
  readonly offset: number;
  readonly length: number;
}

export interface Xattr {
  /** Full name, raw bytes as latin1. */
  readonly name: string;
  readonly value: Buffer;
}

/** The fields of one header block, before PAX records and GNU long names are applied. */
export interface RawHeader {
  readonly typeflag: number;
  name: string;
  link: string;
  mode: number;
  uid: number;
  gid: number;
  size: number;
  mtimeSec: number;
  devMajor: number;
  devMinor: number;
}

export function tarError(offset: number, what: string): DedupError {
  return new DedupError('LAYER_INVALID', `tar header at byte ${offset}: ${what}`, { details: { tarOffset: offset } });
}

function isZero(block: Buffer, at: number): boolean {
  for (let i = at; i < at + TAR_BLOCK_BYTES; i += 4) {
    if ((block[i]! | block[i + 1]! | block[i + 2]! | block[i + 3]!) !== 0) return false;
  }
  return true;
}

/** A NUL-terminated field of raw bytes as latin1. */
function text(block: Buffer, from: number, length: number): string {
  let end = from;
  const limit = from + length;
  while (end < limit && block[end] !== 0) end++;
  return end === from ? '' : block.toString('latin1', from, end);
}

/**
 * A number in octal, padded with spaces or NULs, or in base 256 (GNU) when the first bit is set.
 * Errors: LAYER_INVALID for other bytes and for values that JavaScript cannot hold exactly.
 */
export function parseNumber(block: Buffer, from: number, length: number, offset: number, field: string): number {
  const first = block[from]!;
  if ((first & 0x80) !== 0) {
    let value = (first & 0x40) !== 0 ? (first & 0x7f) - 128 : first & 0x3f;
    for (let i = from + 1; i < from + length; i++) value = value * 256 + block[i]!;
    if (!Number.isSafeInteger(value)) throw tarError(offset, `${field} does not fit in 53 bits`);
    return value;
  }
  let at = from;
  const end = from + length;
  while (at < end && (block[at] === 0x20 || block[at] === 0)) at++;
  let value = 0;
  for (; at < end; at++) {
    const byte = block[at]!;
    if (byte === 0x20 || byte === 0) break;
    if (byte < 0x30 || byte > 0x37) throw tarError(offset, `${field} is not an octal number`);
    value = value * 8 + (byte - 0x30);
  }
  if (value > Number.MAX_SAFE_INTEGER) throw tarError(offset, `${field} does not fit in 53 bits`);
  return value;
}

const USTAR = 0x75737461;

/**
 * Decodes the header block at `at`; undefined for a block of zeros. `offset` is its place in the tar, for messages.
 * Errors: LAYER_INVALID when the checksum is wrong or a field is not a number.
 */
export function parseHeaderBlock(block: Buffer, at: number, offset: number): RawHeader | undefined {
  if (block[at] === 0 && isZero(block, at)) return undefined;
  let sum = 8 * 0x20;
  let high = 0;
  for (let i = at; i < at + 148; i++) {
    sum += block[i]!;
    high += block[i]! >> 7;
  }
  for (let i = at + 156; i < at + TAR_BLOCK_BYTES; i++) {
    sum += block[i]!;
    high += block[i]! >> 7;
  }
  const stored = parseNumber(block, at + 148, 8, offset, 'the checksum');
  // Some old writers summed signed bytes.
  if (stored !== sum && stored !== sum - high * 256) throw tarError(offset, 'the checksum is wrong');

  const typeflag = block[at + 156]!;
  const device = typeflag === 0x33 || typeflag === 0x34;
  const ustarLike = block.readUInt32BE(at + 257) === USTAR && block[at + 261] === 0x72;
  const ustar = ustarLike && block[at + 262] === 0;
  const star = ustar && block.readUInt32BE(at + 508) === 0x74617200;
  let name = text(block, at, 100);
  if (ustar && block[at + 345] !== 0) {
    const prefix = text(block, at + 345, star ? 131 : 155);
    name = `${prefix}/${name}`;
  }
  return {
    typeflag,
    name,
    link: text(block, at + 157, 100),
    mode: parseNumber(block, at + 100, 8, offset, 'mode'),
    uid: parseNumber(block, at + 108, 8, offset, 'uid'),
    gid: parseNumber(block, at + 116, 8, offset, 'gid'),
    size: parseNumber(block, at + 124, 12, offset, 'size'),
    mtimeSec: parseNumber(block, at + 136, 12, offset, 'mtime'),
    devMajor: device && ustarLike ? parseNumber(block, at + 329, 8, offset, 'devmajor') : 0,
    devMinor: device && ustarLike ? parseNumber(block, at + 337, 8, offset, 'devminor') : 0,
  };
}

/** What the PAX records of one `x` member say. Values are raw bytes as latin1. */
export interface PaxRecords {
  path?: string;
  linkpath?: string;
  size?: number;
  uid?: number;
  gid?: number;
  devMajor?: number;
  devMinor?: number;
  mtime?: { sec: number; nsec: number };
  xattrs: Map<string, Buffer>;
  sparse?: PaxSparse;
}

export interface PaxSparse {
  major?: string;
  minor?: string;
  name?: string;
  realSize?: number;
  numBlocks?: number;
  /** Numbers of a 0.x map: offset, length, offset, length, … */
  map: number[];
}

function decimal(value: string, offset: number, key: string): number {
  if (!/^\d{1,16}$/.test(value) || !Number.isSafeInteger(Number(value))) {
    throw tarError(offset, `PAX record ${key} is not a number below 2^53`);
  }
  return Number(value);
}

/** Seconds with a decimal fraction, exactly; digits below a nanosecond are dropped. */
function paxTime(value: string, offset: number): { sec: number; nsec: number } {
  const match = /^([+-]?)(\d{1,16})(?:\.(\d*))?$/.exec(value);
  if (match === null) throw tarError(offset, 'PAX record mtime is not a time');
  const nsec = Number((match[3] ?? '').slice(0, 9).padEnd(9, '0'));
  const sec = Number(match[2]);
  if (!Number.isSafeInteger(sec)) throw tarError(offset, 'PAX record mtime does not fit in 53 bits');
  if (match[1] !== '-') return { sec, nsec };
  return nsec === 0 ? { sec: 0 - sec, nsec: 0 } : { sec: -sec - 1, nsec: 1_000_000_000 - nsec };
}

const SCHILY_XATTR = 'SCHILY.xattr.';
const LIBARCHIVE_XATTR = 'LIBARCHIVE.xattr.';

/**
 * Decodes the record list of an `x` or `g` member: "<length> <key>=<value>\n", values being any bytes.
 * Errors: LAYER_INVALID for a malformed list, a bad number, a NUL in a name, or an attribute past the limits.
 */
export function parsePax(list: Buffer, offset: number): PaxRecords {
  const records: PaxRecords = { xattrs: new Map() };
  const libarchive = new Map<string, Buffer>();
  let at = 0;
  while (at < list.length) {
    let digits = 0;
    let length = 0;
    while (at + digits < list.length && list[at + digits] !== 0x20) {
      const byte = list[at + digits]!;
      if (byte < 0x30 || byte > 0x39 || digits >= 8) throw tarError(offset, 'a PAX record has no length');
      length = length * 10 + (byte - 0x30);
      digits++;
    }
    const end = at + length;
    if (digits === 0 || length < digits + 4 || end > list.length || list[end - 1] !== 0x0a) {
      throw tarError(offset, 'a PAX record has a wrong length');
    }
    const equals = list.indexOf(0x3d, at + digits + 1);
    if (equals < 0 || equals >= end || equals === at + digits + 1) throw tarError(offset, 'a PAX record has no key');
    const key = list.toString('latin1', at + digits + 1, equals);
    if (key.includes('\0')) throw tarError(offset, 'a PAX key holds a NUL');
    applyRecord(records, libarchive, key, list.subarray(equals + 1, end - 1), offset);
    at = end;
  }
  for (const [name, value] of libarchive) if (!records.xattrs.has(name)) records.xattrs.set(name, value);
  if (records.xattrs.size > MAX_XATTRS_PER_SET) throw tarError(offset, `more than ${MAX_XATTRS_PER_SET} attributes`);
  return records;
}

function applyRecord(
  records: PaxRecords,
  libarchive: Map<string, Buffer>,
  key: string,
  raw: Buffer,
  offset: number,
): void {
  if (key.startsWith(SCHILY_XATTR)) {
    const name = key.slice(SCHILY_XATTR.length);
    checkXattr(name, raw, offset);
    records.xattrs.set(name, Buffer.from(raw));
    return;
  }
  if (key.startsWith(LIBARCHIVE_XATTR)) {
    const value = Buffer.from(raw.toString('latin1'), 'base64');
    const name = percentDecoded(key.slice(LIBARCHIVE_XATTR.length));
    checkXattr(name, value, offset);
    libarchive.set(name, value);
    return;
  }
  if (key.startsWith('GNU.sparse.')) {
    applySparse((records.sparse ??= { map: [] }), key.slice(11), raw.toString('latin1'), offset);
    return;
  }
  // An empty value takes the record back: the header block's own value counts.
  if (raw.length === 0) return;
  switch (key) {
    case 'path':
    case 'linkpath':
      if (raw.includes(0)) throw tarError(offset, `PAX record ${key} holds a NUL`);
      records[key] = raw.toString('latin1');
      return;
    case 'size':
    case 'uid':
    case 'gid':
      records[key] = decimal(raw.toString('latin1'), offset, key);
      return;
    case 'mtime':
      records.mtime = paxTime(raw.toString('latin1'), offset);
      return;
    case 'SCHILY.devmajor':
      records.devMajor = decimal(raw.toString('latin1'), offset, key);
      return;
    case 'SCHILY.devminor':
      records.devMinor = decimal(raw.toString('latin1'), offset, key);
      return;
  }
}

function applySparse(sparse: PaxSparse, key: string, value: string, offset: number): void {
  switch (key) {
    case 'major':
    case 'minor':
    case 'name':
      if (value.includes('\0')) throw tarError(offset, `PAX record GNU.sparse.${key} holds a NUL`);
      sparse[key] = value;
      return;
    case 'size':
    case 'realsize':
      sparse.realSize = decimal(value, offset, `GNU.sparse.${key}`);
      return;
    case 'numblocks':
      sparse.numBlocks = decimal(value, offset, 'GNU.sparse.numblocks');
      return;
    case 'offset':
    case 'numbytes': {
      // Format 0.0: the two keys alternate.
      if ((sparse.map.length % 2 === 0) !== (key === 'offset'))
        throw tarError(offset, 'the sparse map is out of order');
      sparse.map.push(decimal(value, offset, `GNU.sparse.${key}`));
      return;
    }
    case 'map':
      sparse.map = value === '' ? [] : value.split(',').map((part) => decimal(part, offset, 'GNU.sparse.map'));
      return;
  }
}

function checkXattr(name: string, value: Buffer, offset: number): void {
  if (name.length === 0 || name.length > MAX_XATTR_NAME_BYTES || name.includes('\0')) {
    throw tarError(
      offset,
      `an extended attribute has a name of ${name.length} bytes (1 to ${MAX_XATTR_NAME_BYTES} allowed)`,
    );
  }
  if (value.length > MAX_XATTR_VALUE_BYTES) {
    throw tarError(
      offset,
      `extended attribute ${JSON.stringify(name)} has ${value.length} bytes (${MAX_XATTR_VALUE_BYTES} allowed)`,
    );
  }
}

function percentDecoded(escaped: string): string {
  return escaped.replace(/%([0-9a-fA-F]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)));
}

/**
 * Checks a list of numbers offset, length, … as the map of a sparse file of `size` bytes with `dataBytes` in the tar,
 * and drops empty fragments. Errors: LAYER_INVALID when fragments overlap, run backwards, or do not add up.
 */
export function sparseMap(numbers: readonly number[], size: number, dataBytes: number, offset: number): Fragment[] {
  if (numbers.length % 2 !== 0) throw tarError(offset, 'the sparse map is incomplete');
  if (numbers.length / 2 > MAX_FRAGMENTS_PER_FILE) throw tarError(offset, 'the sparse map is too long');
  const fragments: Fragment[] = [];
  let end = 0;
  let data = 0;
  for (let i = 0; i < numbers.length; i += 2) {
    const fragment = { offset: numbers[i]!, length: numbers[i + 1]! };
    if (fragment.offset < end || fragment.length < 0) throw tarError(offset, 'the sparse map runs backwards');
    end = fragment.offset + fragment.length;
    if (end > size) throw tarError(offset, 'the sparse map ends after the file');
    data += fragment.length;
    if (fragment.length > 0) fragments.push(fragment);
  }
  if (data !== dataBytes) throw tarError(offset, `the sparse map covers ${data} bytes of ${dataBytes}`);
  return fragments;
}

/** Reads up to `count` offset/length pairs of 12 + 12 bytes at `at` (old GNU format); stops at an unused one. */
export function readOldSparse(block: Buffer, at: number, count: number, into: number[], offset: number): void {
  for (let i = 0; i < count; i++, at += 24) {
    if (block[at] === 0) return;
    into.push(
      parseNumber(block, at, 12, offset, 'a sparse offset'),
      parseNumber(block, at + 12, 12, offset, 'a sparse length'),
    );
    if (into.length > 2 * MAX_FRAGMENTS_PER_FILE) throw tarError(offset, 'the sparse map is too long');
  }
}

/**
 * The path of a member below the root, as containerd's unpack places it: lexically cleaned under "/", so that ".."
 * cannot leave the root; "" is the root itself. Errors: LAYER_INVALID past PATH_MAX or NAME_MAX.
 */
export function cleanPath(raw: string, offset: number): string {
  if (!UNCLEAN.test(raw)) {
    if (raw.length > MAX_COMPONENT_BYTES) checkLengths(raw, offset);
    return raw;
  }
  // A bound on the work below; what remains after cleaning is checked again.
  if (raw.length > 16 * MAX_NAME_BYTES) throw tarError(offset, `a name of ${raw.length} bytes`);
  const out: string[] = [];
  for (const part of raw.split('/')) {
    if (part === '' || part === '.') continue;
    if (part === '..') out.pop();
    else out.push(part);
  }
  const name = out.join('/');
  checkLengths(name, offset);
  return name;
}

/** Matches an empty, "." or ".." component; the empty string too. */
export const UNCLEAN = /(?:^|\/)\.{0,2}(?:\/|$)/;
const LONG_COMPONENT = /[^/]{256}/;

function checkLengths(name: string, offset: number): void {
  if (name.length > MAX_NAME_BYTES)
    throw tarError(offset, `a name of ${name.length} bytes (${MAX_NAME_BYTES} allowed)`);
  // The length first: the search looks at every component from every place in it.
  if (name.length > MAX_COMPONENT_BYTES && LONG_COMPONENT.test(name))
    throw tarError(offset, `a name component of more than ${MAX_COMPONENT_BYTES} bytes`);
}
