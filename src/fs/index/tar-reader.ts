// Streaming reader of a layer's tar: takes buffers as they come, holds no more than one header's metadata, and tells a
// sink about members, their content and every byte between (framing). Called by builder.ts; it must not touch files.
// Where formats leave a choice it does what containerd's unpack (Go's archive/tar) does: docs/formats/layer-index.md.
import { EntryType, type EntryTypeValue } from './layer-index.ts';
import {
  cleanPath,
  type Fragment,
  MAX_META_BYTES,
  type PaxRecords,
  parseHeaderBlock,
  parseNumber,
  parsePax,
  type RawHeader,
  readOldSparse,
  sparseMap,
  TAR_BLOCK_BYTES,
  tarError,
  type Xattr,
} from './tar-header.ts';

/** One member, its path cleaned. `size` is the logical size of a regular file, 0 for everything else. */
export interface TarMember {
  readonly type: EntryTypeValue;
  readonly name: string;
  readonly link: string;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeSec: number;
  readonly mtimeNsec: number;
  readonly size: number;
  readonly devMajor: number;
  readonly devMinor: number;
  readonly xattrs: readonly Xattr[] | undefined;
  /** Parts of a sparse file that have bytes in the tar, in order; undefined for an ordinary file. */
  readonly fragments: readonly Fragment[] | undefined;
  /** Where its content starts in the tar and how many bytes it has there. */
  readonly contentOffset: number;
  readonly contentBytes: number;
}

/** Receives a tar in order. `content` and `framing` together are called with every byte of it, once. */
export interface TarSink {
  /** A member; its content follows, then `endContent` (also when there is none). */
  member(member: TarMember): void;
  content(bytes: Buffer): void;
  endContent(): void;
  /** Bytes that are no file's content: headers, padding, the end of the archive and what follows it. */
  framing(bytes: Buffer): void;
}

type State = 'block' | 'meta' | 'sparse-extension' | 'sparse-text' | 'content' | 'skip' | 'end';

const MAX_ID = 0xffff_ffff;
/** Linux dev_t in userland's 32-bit encoding, which EROFS stores: 12 and 20 bits. */
const MAX_MAJOR = 0xfff;
const MAX_MINOR = 0xfffff;
const MAX_SYMLINK_BYTES = 4095;
/** Members of one layer. */
export const MAX_MEMBERS = 1 << 24;

const TYPES: Readonly<Record<string, EntryTypeValue>> = {
  '\0': EntryType.file,
  '0': EntryType.file,
  S: EntryType.file,
  '1': EntryType.hardLink,
  '2': EntryType.symlink,
  '3': EntryType.charDevice,
  '4': EntryType.blockDevice,
  '5': EntryType.directory,
  '6': EntryType.fifo,
};

export class TarReader {
  readonly #sink: TarSink;
  #state: State = 'block';
  /** Place in the tar of the next byte to look at. */
  #offset = 0;
  /** Place in the tar of the header being worked on, for messages. */
  #headerOffset = 0;
  #members = 0;
  /** A block that was cut by the end of a buffer, and how much of it is here. */
  readonly #carry = Buffer.alloc(TAR_BLOCK_BYTES);
  #carried = 0;
  #zeroBlocks = 0;
  /** Bytes left of content, or of padding to skip. */
  #left = 0;
  #padding = 0;
  /** The `x`, `g`, `L` or `K` member being collected. */
  #meta = Buffer.alloc(0);
  #metaFilled = 0;
  #metaBytes = 0;
  #metaType = 0;
  #pax: PaxRecords | undefined;
  #longName = '';
  #longLink = '';
  /** The sparse member whose map is being read. */
  #sparseHeader: RawHeader | undefined;
  #sparseNumbers: number[] = [];
  #sparseRealSize = 0;
  #sparseWanted = -1;
  #sparseText = '';
  #sparseTextBytes = 0;

  constructor(sink: TarSink) {
    this.#sink = sink;
  }

  /** Bytes seen so far. */
  get offset(): number {
    return this.#offset;
  }

  /** Members reported so far. */
  get members(): number {
    return this.#members;
  }

  /** Takes the next bytes of the tar. The sink may keep views of `bytes`. Errors: LAYER_INVALID. */
  push(bytes: Buffer): void {
    let at = 0;
    let framingFrom = 0;
    while (at < bytes.length) {
      if (this.#state === 'content') {
        const length = Math.min(this.#left, bytes.length - at);
        if (framingFrom < at) this.#sink.framing(bytes.subarray(framingFrom, at));
        this.#sink.content(bytes.subarray(at, at + length));
        at += length;
        framingFrom = at;
        this.#offset += length;
        this.#left -= length;
        if (this.#left === 0) this.#finishContent();
      } else if (this.#state === 'skip') {
        const length = Math.min(this.#left, bytes.length - at);
        at += length;
        this.#offset += length;
        this.#left -= length;
        if (this.#left === 0) this.#state = 'block';
      } else if (this.#state === 'meta') {
        const length = Math.min(this.#meta.length - this.#metaFilled, bytes.length - at);
        bytes.copy(this.#meta, this.#metaFilled, at, at + length);
        at += length;
        this.#offset += length;
        this.#metaFilled += length;
        if (this.#metaFilled === this.#meta.length) this.#finishMeta();
      } else if (this.#state === 'end') {
        this.#offset += bytes.length - at;
        at = bytes.length;
      } else if (this.#carried === 0 && bytes.length - at >= TAR_BLOCK_BYTES) {
        const blockAt = at;
        at += TAR_BLOCK_BYTES;
        this.#offset += TAR_BLOCK_BYTES;
        this.#block(bytes, blockAt);
      } else {
        const length = Math.min(TAR_BLOCK_BYTES - this.#carried, bytes.length - at);
        bytes.copy(this.#carry, this.#carried, at, at + length);
        at += length;
        this.#offset += length;
        this.#carried += length;
        if (this.#carried === TAR_BLOCK_BYTES) {
          this.#carried = 0;
          this.#block(this.#carry, 0);
        }
      }
    }
    if (framingFrom < at) this.#sink.framing(bytes.subarray(framingFrom, at));
  }

  /**
   * Declares the end. A tar that stops between two members without end-of-archive blocks is accepted, as containerd
   * does: that it is complete is known from its digest. Errors: LAYER_INVALID when it stops anywhere else.
   */
  finish(): void {
    if (this.#state === 'end') return;
    const pending = this.#pax !== undefined || this.#longName !== '' || this.#longLink !== '';
    if (this.#state !== 'block' || this.#carried > 0 || pending) {
      throw tarError(this.#headerOffset, `the tar is cut off at byte ${this.#offset}`);
    }
  }

  #block(block: Buffer, at: number): void {
    if (this.#state === 'sparse-extension') {
      this.#sparseExtension(block, at);
      return;
    }
    if (this.#state === 'sparse-text') {
      this.#sparseTextBlock(block, at);
      return;
    }
    const headerOffset = this.#offset - TAR_BLOCK_BYTES;
    this.#headerOffset = headerOffset;
    const header = parseHeaderBlock(block, at, headerOffset);
    if (header === undefined) {
      if (++this.#zeroBlocks === 2) this.#state = 'end';
      return;
    }
    if (this.#zeroBlocks > 0) throw tarError(headerOffset, 'a member follows a block of zeros');
    switch (header.typeflag) {
      case 0x78: // x: PAX records of the next member
      case 0x67: // g: global PAX records
      case 0x4c: // L: GNU long name
      case 0x4b: // K: GNU long link
        this.#startMeta(header);
        return;
    }
    const type = TYPES[String.fromCharCode(header.typeflag)];
    if (type === undefined) {
      throw tarError(
        headerOffset,
        `member type ${JSON.stringify(String.fromCharCode(header.typeflag))} is not supported`,
      );
    }
    this.#apply(header);
    if (header.typeflag === 0x53) {
      readOldSparse(block, at + 386, 4, this.#sparseNumbers, headerOffset);
      this.#sparseRealSize = parseNumber(block, at + 483, 12, headerOffset, 'the real size');
      this.#sparseHeader = header;
      if (block[at + 482] !== 0) this.#state = 'sparse-extension';
      else this.#finishSparse(header.size);
      return;
    }
    const sparse = this.#pax?.sparse;
    const version = sparse === undefined ? undefined : `${sparse.major ?? ''}.${sparse.minor ?? ''}`;
    if (
      sparse !== undefined &&
      (version === '1.0' || version === '0.0' || version === '0.1' || (version === '.' && sparse.map.length > 0))
    ) {
      if (type !== EntryType.file) throw tarError(headerOffset, 'a member that is no file has a sparse map');
      this.#sparseRealSize = sparse.realSize ?? header.size;
      this.#sparseHeader = header;
      if (version === '1.0') {
        this.#state = 'sparse-text';
        this.#sparseWanted = -1;
        return;
      }
      if (sparse.numBlocks !== undefined && sparse.numBlocks * 2 !== sparse.map.length) {
        throw tarError(headerOffset, 'the sparse map is incomplete');
      }
      this.#sparseNumbers = sparse.map;
      this.#finishSparse(header.size);
      return;
    }
    this.#emit(header, type, undefined, header.size, header.size);
  }

  #startMeta(header: RawHeader): void {
    if (header.size < 0 || header.size > MAX_META_BYTES) {
      throw tarError(this.#headerOffset, `metadata of ${header.size} bytes (${MAX_META_BYTES} allowed)`);
    }
    this.#metaType = header.typeflag;
    this.#metaBytes = header.size;
    this.#metaFilled = 0;
    this.#meta = Buffer.alloc(padded(header.size));
    this.#state = 'meta';
    if (header.size === 0) this.#finishMeta();
  }

  #finishMeta(): void {
    const bytes = this.#meta.subarray(0, this.#metaBytes);
    this.#state = 'block';
    switch (this.#metaType) {
      case 0x78:
        this.#pax = parsePax(bytes, this.#headerOffset);
        return;
      case 0x67:
        // Checked, and not applied: Go's reader hands global records to containerd, which ignores them.
        parsePax(bytes, this.#headerOffset);
        return;
      case 0x4c:
        this.#longName = untilNul(bytes);
        return;
      case 0x4b:
        this.#longLink = untilNul(bytes);
        return;
    }
  }

  /** Applies PAX records, then GNU long names, to the header they precede. */
  #apply(header: RawHeader): void {
    const pax = this.#pax;
    if (pax !== undefined) {
      header.name = pax.path ?? header.name;
      if (pax.sparse?.name !== undefined && pax.sparse.name !== '') header.name = pax.sparse.name;
      header.link = pax.linkpath ?? header.link;
      header.size = pax.size ?? header.size;
      header.uid = pax.uid ?? header.uid;
      header.gid = pax.gid ?? header.gid;
      header.devMajor = pax.devMajor ?? header.devMajor;
      header.devMinor = pax.devMinor ?? header.devMinor;
    }
    if (this.#longName !== '') header.name = this.#longName;
    if (this.#longLink !== '') header.link = this.#longLink;
    if (header.size < 0) throw tarError(this.#headerOffset, 'size is negative');
  }

  #sparseExtension(block: Buffer, at: number): void {
    readOldSparse(block, at, 21, this.#sparseNumbers, this.#headerOffset);
    if (block[at + 504] === 0) this.#finishSparse(this.#sparseHeader!.size);
  }

  /** Format 1.0: the map stands before the content, as lines of decimal numbers: their count, then offset, length, … */
  #sparseTextBlock(block: Buffer, at: number): void {
    this.#sparseTextBytes += TAR_BLOCK_BYTES;
    if (this.#sparseTextBytes > this.#sparseHeader!.size)
      throw tarError(this.#headerOffset, 'the sparse map is cut off');
    const lines = (this.#sparseText + block.toString('latin1', at, at + TAR_BLOCK_BYTES)).split('\n');
    this.#sparseText = lines.pop()!;
    for (const line of lines) {
      if (!/^\d{1,16}$/.test(line)) throw tarError(this.#headerOffset, 'the sparse map is not a list of numbers');
      const value = Number(line);
      if (this.#sparseWanted >= 0) this.#sparseNumbers.push(value);
      else this.#sparseWanted = value * 2;
      if (this.#sparseNumbers.length === this.#sparseWanted) {
        this.#finishSparse(this.#sparseHeader!.size - this.#sparseTextBytes);
        return;
      }
    }
    if (this.#sparseText.length > 32) throw tarError(this.#headerOffset, 'the sparse map is not a list of numbers');
  }

  #finishSparse(dataBytes: number): void {
    const header = this.#sparseHeader!;
    const size = this.#sparseRealSize;
    if (size < 0) throw tarError(this.#headerOffset, 'the real size is negative');
    const fragments = sparseMap(this.#sparseNumbers, size, dataBytes, this.#headerOffset);
    this.#sparseHeader = undefined;
    this.#sparseNumbers = [];
    this.#sparseText = '';
    this.#sparseTextBytes = 0;
    this.#emit(header, EntryType.file, fragments, size, dataBytes);
  }

  #emit(
    header: RawHeader,
    entryType: EntryTypeValue,
    fragments: Fragment[] | undefined,
    size: number,
    dataBytes: number,
  ): void {
    const at = this.#headerOffset;
    // Before POSIX, directories were files whose names end in a slash.
    const type = header.typeflag === 0 && header.name.endsWith('/') ? EntryType.directory : entryType;
    if (++this.#members > MAX_MEMBERS) throw tarError(at, `more than ${MAX_MEMBERS} members`);
    if (header.uid < 0 || header.uid > MAX_ID) throw tarError(at, `uid ${header.uid} does not fit in 32 bits`);
    if (header.gid < 0 || header.gid > MAX_ID) throw tarError(at, `gid ${header.gid} does not fit in 32 bits`);
    const device = type === EntryType.charDevice || type === EntryType.blockDevice;
    if (device && !(inRange(header.devMajor, MAX_MAJOR) && inRange(header.devMinor, MAX_MINOR))) {
      throw tarError(at, `device number ${header.devMajor}:${header.devMinor} does not exist on Linux`);
    }
    const name = cleanPath(header.name, at);
    let link = '';
    if (type === EntryType.hardLink) {
      link = cleanPath(header.link, at);
      if (link === '') throw tarError(at, 'a hard link has no target');
    } else if (type === EntryType.symlink) {
      link = header.link;
      if (link.length === 0 || link.length > MAX_SYMLINK_BYTES)
        throw tarError(at, `a symlink target of ${link.length} bytes`);
    }
    // Only files have content; a size given for anything else says nothing, as in Go's reader.
    const contentBytes = type === EntryType.file ? dataBytes : 0;
    if (this.#offset + padded(contentBytes) > Number.MAX_SAFE_INTEGER)
      throw tarError(at, 'size does not fit in 53 bits');
    const pax = this.#pax;
    const member: TarMember = {
      type,
      name,
      link,
      mode: header.mode & 0o7777,
      uid: header.uid,
      gid: header.gid,
      mtimeSec: pax?.mtime?.sec ?? header.mtimeSec,
      mtimeNsec: pax?.mtime?.nsec ?? 0,
      size: type === EntryType.file ? size : 0,
      devMajor: device ? header.devMajor : 0,
      devMinor: device ? header.devMinor : 0,
      xattrs: pax === undefined || pax.xattrs.size === 0 ? undefined : sortedXattrs(pax.xattrs),
      fragments,
      contentOffset: this.#offset,
      contentBytes,
    };
    this.#pax = undefined;
    this.#longName = '';
    this.#longLink = '';
    this.#padding = padded(contentBytes) - contentBytes;
    this.#left = contentBytes;
    // What resolves to the root and is no directory is passed over by containerd; its bytes are framing.
    if (name === '' && type !== EntryType.directory) {
      this.#left += this.#padding;
      this.#state = this.#left > 0 ? 'skip' : 'block';
      return;
    }
    this.#sink.member(member);
    if (contentBytes > 0) this.#state = 'content';
    else this.#finishContent();
  }

  #finishContent(): void {
    this.#sink.endContent();
    this.#left = this.#padding;
    this.#state = this.#left > 0 ? 'skip' : 'block';
  }
}

function padded(bytes: number): number {
  return Math.ceil(bytes / TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES;
}

function inRange(value: number, max: number): boolean {
  return value >= 0 && value <= max;
}

function untilNul(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return bytes.toString('latin1', 0, end < 0 ? bytes.length : end);
}

/** Sorted by name, so that equal sets are recognised whatever order they were written in. */
function sortedXattrs(map: ReadonlyMap<string, Buffer>): Xattr[] {
  const list = [...map].map(([name, value]) => ({ name, value }));
  return list.sort((a, b) => (a.name < b.name ? -1 : 1));
}
