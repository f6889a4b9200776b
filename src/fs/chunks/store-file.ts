// The sparse store file and its header: identity, generation and how far addresses were ever given. Used by NodeStore.
// The header is what tells a copied or restored index.db from the one that belongs to the file as it is now.
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { digestOf } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import type { RootPaths } from '../../paths.ts';
import { HEADER_ADDRESS } from './store-layout.ts';

const HEADER_BYTES = 4096;
const MAGIC = 'dedup-store 1';

/** What the header records; see docs/formats/index-db.md, "The store's header". */
export interface StoreHeader {
  readonly magic: string;
  /** Random name of this store file. */
  readonly storeId: string;
  readonly storeBytes: number;
  /** Generation of the last removal that the database committed. */
  readonly generation: number;
  /** Generation that is being committed; equal to `generation` at rest. */
  readonly pendingGeneration: number;
  /** No address at or above this one was ever given. */
  readonly highWater: number;
  /**
   * Generation in which addresses whose chunks were gone were last made free to be given again; 0: never. On the disk
   * before the first of them is given.
   */
  readonly reuseGeneration: number;
}

export class StoreFile {
  /** Open O_RDWR | O_DIRECT: pieces are written through it. */
  readonly direct: FileHandle;
  /** Open O_RDWR without O_DIRECT: the header, reads of present pieces and fdatasync. */
  readonly buffered: FileHandle;
  /** Sums of the blocks, by which those that the disk changed are told. */
  readonly sums: FileHandle;
  #header: StoreHeader;
  /** Device and inode number. */
  readonly #place: string;
  #closed = false;

  private constructor(
    files: { direct: FileHandle; buffered: FileHandle; sums: FileHandle },
    header: StoreHeader,
    place: string,
  ) {
    this.#place = place;
    this.direct = files.direct;
    this.buffered = files.buffered;
    this.sums = files.sums;
    this.#header = header;
  }

  /**
   * Opens the store at `file` and its sums, or makes them, mode 0600. `summed` is false when the sums are new: then
   * nothing in the store can be served. Errors: STORE_IO; STORE_CORRUPT when the file has another size or a damaged header; STORE_FULL.
   */
  static async open(
    { store: file, storeSums }: RootPaths,
    storeBytes: number,
    firstHighWater: number,
  ): Promise<{ store: StoreFile; summed: boolean }> {
    let buffered: FileHandle | undefined;
    let direct: FileHandle | undefined;
    let sums: FileHandle | undefined;
    try {
      buffered = await open(file, constants.O_RDWR | constants.O_CREAT, 0o600);
      const { size, dev, ino } = await buffered.stat();
      if (size === 0) await buffered.truncate(storeBytes);
      else if (size !== storeBytes) {
        throw new DedupError('STORE_CORRUPT', `${file} has ${size} bytes, not the recorded ${storeBytes}`, {
          hint: 'the size of a store never changes; start with a new root to change it',
        });
      }
      direct = await open(file, constants.O_RDWR | constants.O_DIRECT);
      const found = await readHeader(buffered, file);
      sums = await open(storeSums, constants.O_RDWR | constants.O_CREAT, 0o600);
      const summed = (await sums.stat()).size > 0;
      const header: StoreHeader = found ?? {
        magic: MAGIC,
        storeId: randomBytes(16).toString('hex'),
        storeBytes,
        generation: 0,
        pendingGeneration: 0,
        highWater: firstHighWater,
        reuseGeneration: 0,
      };
      const store = new StoreFile({ direct, buffered, sums }, header, `${dev.toString(16)}.${ino.toString(16)}`);
      if (found === undefined) await store.writeHeader({});
      return { store, summed };
    } catch (cause) {
      await sums?.close();
      await direct?.close();
      await buffered?.close();
      throw cause instanceof DedupError ? cause : ioError(cause, `opening the store ${file}`);
    }
  }

  /** What no other file is called, not even a copy of this one: random id, device, inode. Stays for the file's life. */
  get name(): string {
    return `${this.#header.storeId.slice(0, 16)}.${this.#place}`;
  }

  get header(): StoreHeader {
    return this.#header;
  }

  /** Changes fields of the header; on the disk when this returns. Errors: STORE_IO, STORE_FULL. */
  async writeHeader(change: Partial<Omit<StoreHeader, 'magic' | 'storeId' | 'storeBytes'>>): Promise<void> {
    const header = { ...this.#header, ...change };
    const json = JSON.stringify(header);
    const block = Buffer.alloc(HEADER_BYTES);
    block.write(`${json}\n${digestOf(json)}\n`, 'latin1');
    try {
      await this.buffered.write(block, 0, block.length, HEADER_ADDRESS);
      await this.buffered.datasync();
    } catch (cause) {
      throw ioError(cause, "writing the store's header");
    }
    this.#header = header;
  }

  /** Everything written so far is on the disk when this returns. Errors: STORE_IO, STORE_FULL. */
  async sync(): Promise<void> {
    try {
      await Promise.all([this.direct.datasync(), this.sums.datasync()]);
    } catch (cause) {
      throw ioError(cause, 'fdatasync of the store');
    }
  }

  /** Bytes of real blocks of the store and its sums, as du(1) counts them. Errors: STORE_IO. */
  async diskBytes(): Promise<number> {
    try {
      const [store, sums] = await Promise.all([this.buffered.stat(), this.sums.stat()]);
      // stat(2): st_blocks counts 512 bytes each, whatever the file system's blocks.
      return (store.blocks + sums.blocks) * 512;
    } catch (cause) {
      throw ioError(cause, 'looking at the store');
    }
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.sums.close();
    await this.direct.close();
    await this.buffered.close();
  }
}

async function readHeader(handle: FileHandle, file: string): Promise<StoreHeader | undefined> {
  const block = Buffer.alloc(HEADER_BYTES);
  await handle.read(block, 0, HEADER_BYTES, HEADER_ADDRESS);
  if (block.every((byte) => byte === 0)) return undefined;
  const [json = '', digest = ''] = block.toString('latin1').split('\n');
  if (digestOf(json) !== digest) {
    throw new DedupError('STORE_CORRUPT', `the header of ${file} is damaged`, {
      hint: 'move the chunks folder and index.db aside: everything lazy is fetched again',
    });
  }
  // Headers of before addresses were given again say nothing of it.
  const header = { reuseGeneration: 0, ...JSON.parse(json) } as StoreHeader;
  if (header.magic !== MAGIC) throw new DedupError('STORE_CORRUPT', `${file} is not a store of this version`);
  return header;
}

/** STORE_FULL for ENOSPC and EDQUOT, STORE_IO for everything else. */
export function ioError(cause: unknown, doing: string): DedupError {
  const code = (cause as NodeJS.ErrnoException | null)?.code;
  return wrapError(cause, doing, code === 'ENOSPC' || code === 'EDQUOT' ? 'STORE_FULL' : 'STORE_IO');
}
