// Finds files in an image's EROFS metadata without mounting it: path → size and where the content lies in the store.
// Reads only what writer.ts wrote: extended inodes, files as chunks of an extra device. Used to fetch ahead of a start.
import { DedupError } from '../../../errors.ts';
import { BLOCK_BYTES, type ByteRange } from '../../../units.ts';
import { DIRENT_BYTES } from './dirent.ts';
import { CHUNK_INDEX_BYTES, DataLayout, INODE_BYTES, S_IFDIR, S_IFLNK, S_IFREG } from './inode.ts';
import { MAGIC, NID_BYTES, NULL_BLOCK, SUPERBLOCK_OFFSET } from './superblock.ts';

const S_IFMT = 0o170000;
/** As the kernel: more links than these in one path are a loop (include/linux/namei.h, MAXSYMLINKS). */
const MAX_LINKS = 40;

interface Inode {
  readonly layout: number;
  readonly mode: number;
  readonly size: number;
  readonly union: number;
  /** Where what follows inode and attributes begins: inline data. */
  readonly after: number;
}

/** A regular file of an image. */
export interface ImageFile {
  /** Its path after all links were followed, without a leading "/". */
  readonly path: string;
  readonly size: number;
  /** Where bytes [offset, offset + length) of it lie in the store, in whole blocks, holes left out. */
  ranges(offset: number, length: number): ByteRange[];
}

export class ErofsReader {
  readonly #bytes: Buffer;
  readonly #root: number;

  /** `bytes`: the whole metadata file. Errors: IMAGE_INVALID. */
  constructor(bytes: Buffer) {
    if (bytes.length < SUPERBLOCK_OFFSET + 128 || bytes.readUInt32LE(SUPERBLOCK_OFFSET) !== MAGIC) {
      throw new DedupError('IMAGE_INVALID', 'this is not the metadata of an image');
    }
    this.#bytes = bytes;
    this.#root = bytes.readUInt16LE(SUPERBLOCK_OFFSET + 14);
  }

  /**
   * The regular file at `path` (latin1, as names are kept), seen from the directory `from`; undefined when there is
   * none. Errors: IMAGE_INVALID for metadata that leads nowhere.
   */
  file(path: string, from = ''): ImageFile | undefined {
    try {
      return this.#file(path, from);
    } catch (error) {
      if (error instanceof RangeError) throw new DedupError('IMAGE_INVALID', `metadata of ${path} is cut off`);
      throw error;
    }
  }

  #file(path: string, from: string): ImageFile | undefined {
    const found = this.#walk(path, from);
    if (found === undefined || (found.inode.mode & S_IFMT) !== S_IFREG) return undefined;
    const { inode } = found;
    return {
      path: found.path,
      size: inode.size,
      ranges: (offset, length) => this.#ranges(inode, offset, length),
    };
  }

  /** Follows a path and every link in it, never out of the image. */
  #walk(path: string, from: string): { path: string; inode: Inode } | undefined {
    const pending = (path.startsWith('/') ? path : `${from}/${path}`).split('/').reverse();
    const names: string[] = [];
    const inodes: Inode[] = [this.#inode(this.#root)];
    for (let links = 0; pending.length > 0; ) {
      const name = pending.pop()!;
      if (name === '' || name === '.') continue;
      if (name === '..') {
        names.pop();
        if (inodes.length > 1) inodes.pop();
        continue;
      }
      const directory = inodes.at(-1)!;
      if ((directory.mode & S_IFMT) !== S_IFDIR) return undefined;
      const nid = this.#find(directory, name);
      if (nid === undefined) return undefined;
      const inode = this.#inode(nid);
      if ((inode.mode & S_IFMT) !== S_IFLNK) {
        names.push(name);
        inodes.push(inode);
        continue;
      }
      if (++links > MAX_LINKS) return undefined;
      const target = this.#content(inode).toString('latin1');
      if (target.startsWith('/')) {
        names.length = 0;
        inodes.length = 1;
      }
      pending.push(...target.split('/').reverse());
    }
    return { path: names.join('/'), inode: inodes.at(-1)! };
  }

  #inode(nid: number): Inode {
    const at = nid * NID_BYTES;
    const view = this.#bytes;
    const xattrWords = view.readUInt16LE(at + 2);
    return {
      layout: view.readUInt16LE(at) >> 1,
      mode: view.readUInt16LE(at + 4),
      size: view.readUInt32LE(at + 8) + view.readUInt32LE(at + 12) * 2 ** 32,
      union: view.readUInt32LE(at + 16),
      after: at + INODE_BYTES + (xattrWords === 0 ? 0 : 12 + (xattrWords - 1) * 4),
    };
  }

  /** Content of a directory or link: whole blocks, then the inline rest. */
  #content(inode: Inode): Buffer {
    const inline = inode.layout === DataLayout.flatInline ? inode.size % BLOCK_BYTES : 0;
    const blocks = inode.size - inline;
    const start = inode.union * BLOCK_BYTES;
    const parts = [];
    if (blocks > 0) parts.push(this.#slice(start, blocks));
    if (inline > 0) parts.push(this.#slice(inode.after, inline));
    return parts.length === 1 ? parts[0]! : Buffer.concat(parts);
  }

  #slice(start: number, length: number): Buffer {
    if (start + length > this.#bytes.length) throw new RangeError('beyond the end of the metadata');
    return this.#bytes.subarray(start, start + length);
  }

  /** Number of the inode that a directory names so. */
  #find(directory: Inode, name: string): number | undefined {
    const wanted = Buffer.from(name, 'latin1');
    // The last block whose first name is not behind the wanted one.
    let low = 0;
    let high = Math.ceil(directory.size / BLOCK_BYTES) - 1;
    while (low < high) {
      const middle = (low + high + 1) >>> 1;
      if (Buffer.compare(nameIn(this.#block(directory, middle), 0), wanted) <= 0) low = middle;
      else high = middle - 1;
    }
    return findInBlock(this.#block(directory, low), wanted);
  }

  /** Block `number` of a directory; the last one may be shorter and inline. */
  #block(directory: Inode, number: number): Buffer {
    const length = Math.min(BLOCK_BYTES, directory.size - number * BLOCK_BYTES);
    const inline = directory.layout === DataLayout.flatInline && length < BLOCK_BYTES;
    return this.#slice(inline ? directory.after : (directory.union + number) * BLOCK_BYTES, length);
  }

  #ranges(inode: Inode, offset: number, length: number): ByteRange[] {
    if (inode.layout !== DataLayout.chunkBased) return [];
    const end = Math.min(inode.size, offset + length);
    const chunkBytes = BLOCK_BYTES * 2 ** (inode.union & 0x1f);
    const indexAt = Math.ceil(inode.after / CHUNK_INDEX_BYTES) * CHUNK_INDEX_BYTES;
    const ranges: ByteRange[] = [];
    for (let at = Math.floor(offset / BLOCK_BYTES) * BLOCK_BYTES; at < end; ) {
      const chunk = Math.floor(at / chunkBytes);
      const upTo = Math.min(end, (chunk + 1) * chunkBytes);
      const block = this.#bytes.readUInt32LE(indexAt + chunk * CHUNK_INDEX_BYTES + 4);
      if (block !== NULL_BLOCK) {
        const blocks = Math.ceil((upTo - at) / BLOCK_BYTES);
        ranges.push({ offset: block * BLOCK_BYTES + (at % chunkBytes), length: blocks * BLOCK_BYTES });
      }
      at = upTo;
    }
    return ranges;
  }
}

/** Names are sorted as bytes within and over blocks. */
function findInBlock(entries: Buffer, wanted: Buffer): number | undefined {
  let low = 0;
  let high = countIn(entries) - 1;
  while (low <= high) {
    const middle = (low + high) >>> 1;
    const order = Buffer.compare(wanted, nameIn(entries, middle));
    if (order === 0) return entries.readUInt32LE(middle * DIRENT_BYTES);
    if (order < 0) high = middle - 1;
    else low = middle + 1;
  }
  return undefined;
}

/** Entries of a block: the first name stands behind them. */
function countIn(entries: Buffer): number {
  return entries.readUInt16LE(8) / DIRENT_BYTES;
}

/** A name ends where the next one begins; the last one at the first zero byte or at the end of the block. */
function nameIn(entries: Buffer, index: number): Buffer {
  const at = index * DIRENT_BYTES;
  const start = entries.readUInt16LE(at + 8);
  if (index + 1 < countIn(entries)) return entries.subarray(start, entries.readUInt16LE(at + DIRENT_BYTES + 8));
  const zero = entries.indexOf(0, start);
  return entries.subarray(start, zero < 0 ? entries.length : zero);
}
