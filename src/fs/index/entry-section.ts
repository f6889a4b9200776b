// The `entries` section of a layer index: tar members as columns, names front-coded. Called by format.ts; it knows
// nothing of chunks but how many a file of a given size has.
import { type EntryTable, EntryType, type EntryTypeValue } from './layer-index.ts';
import {
  MAX_COMPONENT_BYTES,
  MAX_NAME_BYTES,
  MAX_XATTR_NAME_BYTES,
  MAX_XATTR_VALUE_BYTES,
  MAX_XATTRS_PER_SET,
  UNCLEAN,
} from './tar-header.ts';
import { indexError, type WireReader, type WireWriter } from './wire.ts';

/** On the wire an empty file has a type of its own, because only the others are listed in the `files` section. */
const WIRE_EMPTY_FILE = 7;
const MAX_SYMLINK_BYTES = 4095;
const NO_XATTRS = 0xffff_ffff;
const LONG_COMPONENT = new RegExp(`[^/]{${MAX_COMPONENT_BYTES + 1}}`);
/** Bound on |mtime| in seconds: keeps differences exact. */
export const MAX_MTIME_SEC = 2 ** 50;

function isDevice(type: number): boolean {
  return type === EntryType.charDevice || type === EntryType.blockDevice;
}

function isLink(type: number): boolean {
  return type === EntryType.hardLink || type === EntryType.symlink;
}

export function encodeEntries(entries: EntryTable, out: WireWriter): void {
  const { count, type } = entries;
  for (let i = 0; i < count; i++) {
    out.u8(type[i] === EntryType.file && entries.size[i] === 0 ? WIRE_EMPTY_FILE : type[i]!);
  }
  for (let i = 0; i < count; i++) out.varint(entries.mode[i]!);
  for (let i = 0; i < count; i++) out.varint(entries.uid[i]!);
  for (let i = 0; i < count; i++) out.varint(entries.gid[i]!);
  let before = 0;
  for (let i = 0; i < count; i++) {
    out.signed(entries.mtimeSec[i]! - before);
    before = entries.mtimeSec[i]!;
  }
  for (let i = 0; i < count; i++) out.varint(entries.mtimeNsec[i]!);
  for (let i = 0; i < count; i++) out.varint((entries.xattrSet[i]! + 1) >>> 0);
  for (let i = 0; i < count; i++) {
    if (!isDevice(type[i]!)) continue;
    out.varint(entries.devMajor[i]!);
    out.varint(entries.devMinor[i]!);
  }
  const shared = new Uint16Array(count);
  let last = '';
  for (let i = 0; i < count; i++) {
    const name = entries.name[i]!;
    const limit = Math.min(last.length, name.length);
    let same = 0;
    while (same < limit && last.charCodeAt(same) === name.charCodeAt(same)) same++;
    shared[i] = same;
    last = name;
  }
  for (let i = 0; i < count; i++) out.varint(shared[i]!);
  for (let i = 0; i < count; i++) out.varint(entries.name[i]!.length - shared[i]!);
  for (let i = 0; i < count; i++) out.latin1(entries.name[i]!.slice(shared[i]!));
  for (let i = 0; i < count; i++) if (isLink(type[i]!)) out.varint(entries.link[i]!.length);
  for (let i = 0; i < count; i++) if (isLink(type[i]!)) out.latin1(entries.link[i]!);
  for (const set of entries.xattrSets) {
    out.varint(set.length);
    for (const { name, value } of set) {
      out.varint(name.length);
      out.latin1(name);
      out.varint(value.length);
      out.raw(value);
    }
  }
}

/**
 * Decodes `count` entries. `fileSize` are the sizes of the non-empty files in order.
 * Errors: INDEX_INVALID naming the field.
 */
export function decodeEntries(
  reader: WireReader,
  count: number,
  xattrSetCount: number,
  fileSize: Float64Array,
  chunkBytes: number,
): EntryTable {
  const table = emptyEntryTable(count);
  const { type, size, firstChunk, chunkCount } = table;
  let file = 0;
  let chunk = 0;
  for (let i = 0; i < count; i++) {
    const wire = reader.u8('type');
    if (wire > WIRE_EMPTY_FILE) throw indexError('entries.type', `unknown type ${wire}`);
    type[i] = wire === WIRE_EMPTY_FILE ? EntryType.file : (wire as EntryTypeValue);
    firstChunk[i] = chunk;
    if (wire !== EntryType.file) continue;
    if (file >= fileSize.length) throw indexError('entries.type', 'there are more files than sizes');
    size[i] = fileSize[file++]!;
    chunkCount[i] = Math.ceil(size[i]! / chunkBytes);
    chunk += chunkCount[i]!;
  }
  if (file !== fileSize.length) throw indexError('entries.type', 'there are fewer files than sizes');
  for (let i = 0; i < count; i++) table.mode[i] = reader.varint('mode', 0o7777);
  for (let i = 0; i < count; i++) table.uid[i] = reader.varint('uid', 0xffff_ffff);
  for (let i = 0; i < count; i++) table.gid[i] = reader.varint('gid', 0xffff_ffff);
  let before = 0;
  for (let i = 0; i < count; i++) {
    before += reader.signed('mtime');
    if (Math.abs(before) > MAX_MTIME_SEC) throw indexError('entries.mtime', 'a time is out of range');
    table.mtimeSec[i] = before;
  }
  for (let i = 0; i < count; i++) table.mtimeNsec[i] = reader.varint('mtimeNsec', 999_999_999);
  for (let i = 0; i < count; i++) {
    const set = reader.varint('xattrSet', xattrSetCount);
    table.xattrSet[i] = set === 0 ? NO_XATTRS : set - 1;
  }
  for (let i = 0; i < count; i++) {
    if (!isDevice(type[i]!)) continue;
    table.devMajor[i] = reader.varint('devMajor', 0xfff);
    table.devMinor[i] = reader.varint('devMinor', 0xfffff);
  }
  const name = decodeNames(reader, count);
  for (let i = 0; i < count; i++) {
    if (name[i] === '' && type[i] !== EntryType.directory)
      throw indexError('entries.name', 'the root is not a directory');
  }
  const link = decodeLinks(reader, type);
  const xattrSets = decodeXattrSets(reader, xattrSetCount);
  reader.end();
  return { ...table, name, link, xattrSets };
}

function checkPath(path: string, field: string): void {
  if (path !== '' && UNCLEAN.test(path))
    throw indexError(field, `${JSON.stringify(path.slice(0, 200))} is not a clean path`);
  if (path.includes('\0')) throw indexError(field, 'a path holds a NUL');
  if (path.length > MAX_COMPONENT_BYTES && LONG_COMPONENT.test(path))
    throw indexError(field, 'a path component is too long');
}

function decodeNames(reader: WireReader, count: number): string[] {
  const shared = new Uint16Array(count);
  const added = new Uint16Array(count);
  for (let i = 0; i < count; i++) shared[i] = reader.varint('namePrefix', MAX_NAME_BYTES);
  for (let i = 0; i < count; i++) added[i] = reader.varint('nameLength', MAX_NAME_BYTES);
  const names: string[] = new Array(count);
  const scratch = Buffer.alloc(MAX_NAME_BYTES);
  let length = 0;
  let last = '';
  for (let i = 0; i < count; i++) {
    if (shared[i]! > length) throw indexError('entries.namePrefix', 'a name shares more than the name before it has');
    if (added[i] !== 0 || shared[i] !== length) {
      length = shared[i]! + added[i]!;
      if (length > MAX_NAME_BYTES) throw indexError('entries.nameLength', `a name of ${length} bytes`);
      reader.raw('name', added[i]!).copy(scratch, shared[i]!);
      last = scratch.toString('latin1', 0, length);
      checkPath(last, 'entries.name');
    }
    names[i] = last;
  }
  return names;
}

function decodeLinks(reader: WireReader, type: Uint8Array): string[] {
  const links: string[] = new Array(type.length).fill('');
  const lengths = new Uint16Array(type.length);
  for (let i = 0; i < type.length; i++) {
    if (!isLink(type[i]!)) continue;
    lengths[i] = reader.varint('linkLength', type[i] === EntryType.symlink ? MAX_SYMLINK_BYTES : MAX_NAME_BYTES);
    if (lengths[i] === 0) throw indexError('entries.linkLength', 'a link has no target');
  }
  for (let i = 0; i < type.length; i++) {
    if (lengths[i] === 0) continue;
    const link = reader.raw('link', lengths[i]!).toString('latin1');
    if (type[i] === EntryType.hardLink) checkPath(link, 'entries.link');
    else if (link.includes('\0')) throw indexError('entries.link', 'a symlink target holds a NUL');
    links[i] = link;
  }
  return links;
}

function decodeXattrSets(reader: WireReader, count: number): { name: string; value: Buffer }[][] {
  const sets: { name: string; value: Buffer }[][] = [];
  for (let i = 0; i < count; i++) {
    const attributes = reader.varint('xattrs.count', MAX_XATTRS_PER_SET);
    if (attributes === 0) throw indexError('entries.xattrs.count', 'an attribute set is empty');
    const set: { name: string; value: Buffer }[] = [];
    for (let k = 0; k < attributes; k++) {
      const nameLength = reader.varint('xattrs.nameLength', MAX_XATTR_NAME_BYTES);
      const name = reader.raw('xattrs.name', nameLength).toString('latin1');
      if (name === '' || name.includes('\0'))
        throw indexError('entries.xattrs.name', 'an attribute has no proper name');
      if (k > 0 && set[k - 1]!.name >= name) throw indexError('entries.xattrs.name', 'attributes are not in order');
      const valueLength = reader.varint('xattrs.valueLength', MAX_XATTR_VALUE_BYTES);
      set.push({ name, value: Buffer.from(reader.raw('xattrs.value', valueLength)) });
    }
    sets.push(set);
  }
  return sets;
}

/** Columns for `count` entries, all zero, without names, links and attributes. */
export function emptyEntryTable(count: number): EntryTable {
  return {
    count,
    type: new Uint8Array(count),
    name: [],
    link: [],
    mode: new Uint16Array(count),
    uid: new Uint32Array(count),
    gid: new Uint32Array(count),
    mtimeSec: new Float64Array(count),
    mtimeNsec: new Uint32Array(count),
    size: new Float64Array(count),
    devMajor: new Uint32Array(count),
    devMinor: new Uint32Array(count),
    firstChunk: new Uint32Array(count),
    chunkCount: new Uint32Array(count),
    xattrSet: new Uint32Array(count).fill(NO_XATTRS),
    xattrSets: [],
  };
}
