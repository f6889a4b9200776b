// Collects tar members as the columns of an entry table. Called by builder.ts; growth is by doubling, strings are kept
// as the reader made them.

import { emptyEntryTable, MAX_MTIME_SEC } from './entry-section.ts';
import { type EntryTable, EntryType } from './layer-index.ts';
import type { Xattr } from './tar-header.ts';
import type { TarMember } from './tar-reader.ts';

type Columns = Pick<
  EntryTable,
  | 'type'
  | 'mode'
  | 'uid'
  | 'gid'
  | 'mtimeSec'
  | 'mtimeNsec'
  | 'size'
  | 'devMajor'
  | 'devMinor'
  | 'firstChunk'
  | 'chunkCount'
  | 'xattrSet'
>;

const COLUMN_NAMES = [
  'type',
  'mode',
  'uid',
  'gid',
  'mtimeSec',
  'mtimeNsec',
  'size',
  'devMajor',
  'devMinor',
  'firstChunk',
  'chunkCount',
  'xattrSet',
] as const;

export class EntryColumns {
  #columns: Columns = emptyEntryTable(1024);
  #count = 0;
  readonly #name: string[] = [];
  readonly #link: string[] = [];
  readonly #xattrSets: (readonly Xattr[])[] = [];
  readonly #xattrNumbers = new Map<string, number>();

  /** Appends a member; its chunks, if it is a file, start at `firstChunk`. */
  add(member: TarMember, firstChunk: number, chunkBytes: number): void {
    const i = this.#count++;
    if (i === this.#columns.type.length) this.#columns = resized(this.#columns, i * 2);
    const columns = this.#columns;
    columns.type[i] = member.type;
    columns.mode[i] = member.mode;
    columns.uid[i] = member.uid;
    columns.gid[i] = member.gid;
    // Times that far from now are the epoch for containerd; the bound keeps that and stays exact.
    columns.mtimeSec[i] = Math.min(MAX_MTIME_SEC, Math.max(-MAX_MTIME_SEC, member.mtimeSec));
    columns.mtimeNsec[i] = member.mtimeNsec;
    columns.size[i] = member.size;
    columns.devMajor[i] = member.devMajor;
    columns.devMinor[i] = member.devMinor;
    columns.firstChunk[i] = firstChunk;
    columns.chunkCount[i] = member.type === EntryType.file ? Math.ceil(member.size / chunkBytes) : 0;
    if (member.xattrs !== undefined) columns.xattrSet[i] = this.#xattrSet(member.xattrs);
    this.#name.push(member.name);
    this.#link.push(member.link);
  }

  #xattrSet(set: readonly Xattr[]): number {
    const key = set.map(({ name, value }) => `${name}\0${value.length}\0${value.toString('latin1')}`).join('');
    let number = this.#xattrNumbers.get(key);
    if (number === undefined) {
      number = this.#xattrSets.push(set) - 1;
      this.#xattrNumbers.set(key, number);
    }
    return number;
  }

  finish(): EntryTable {
    const columns = resized(this.#columns, this.#count);
    return { count: this.#count, ...columns, name: this.#name, link: this.#link, xattrSets: this.#xattrSets };
  }
}

function resized(columns: Columns, count: number): Columns {
  const result = emptyEntryTable(count);
  for (const name of COLUMN_NAMES) {
    result[name].set(columns[name].length > count ? columns[name].subarray(0, count) : columns[name]);
  }
  const { type, mode, uid, gid, mtimeSec, mtimeNsec, size, devMajor, devMinor, firstChunk, chunkCount, xattrSet } =
    result;
  return { type, mode, uid, gid, mtimeSec, mtimeNsec, size, devMajor, devMinor, firstChunk, chunkCount, xattrSet };
}
