// native/store: pieces are verified, written padded and joined, and present only after that; SHA-256 of buffers.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  closeSync,
  constants,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import { native, type StorePiecesJob } from '../../src/fs/native.ts';
import { BLOCK_BYTES, KiB, MiB, roundUp } from '../../src/units.ts';
import { blockSums, crc32c } from '../support/block-sums.ts';
import { noise, pseudoRandom } from '../support/gzip-streams.ts';

const STORE_BYTES = 64 * MiB;

interface Piece {
  readonly bytes: Buffer;
  readonly address: number;
  /** SHA-256 of `bytes` when absent. */
  readonly digest?: Buffer;
}

function sha256(bytes: Uint8Array): Buffer {
  return createHash('sha256').update(bytes).digest();
}

interface Files {
  readonly fd: number;
  readonly sumsFd: number;
}

/** The pieces, one after the other in one source, with `gap` bytes before each. */
function jobOf({ fd, sumsFd }: Files, presence: Uint8Array, pieces: readonly Piece[], gap = 3): StorePiecesJob {
  const offsets = new Float64Array(pieces.length);
  const parts: Buffer[] = [];
  let at = 0;
  for (const [i, piece] of pieces.entries()) {
    parts.push(Buffer.alloc(gap, 0xee), piece.bytes);
    offsets[i] = at + gap;
    at += gap + piece.bytes.length;
  }
  return {
    fd,
    sumsFd,
    presence,
    source: Buffer.concat(parts),
    offsets,
    lengths: Uint32Array.from(pieces, ({ bytes }) => bytes.length),
    digests: Buffer.concat(pieces.map((piece) => piece.digest ?? sha256(piece.bytes))),
    addresses: Float64Array.from(pieces, ({ address }) => address),
  };
}

function isPresent(presence: Uint8Array, address: number, length: number): boolean {
  return native().presenceTest(presence, address / BLOCK_BYTES, roundUp(length, BLOCK_BYTES) / BLOCK_BYTES);
}

function presentBlocks(presence: Uint8Array): number {
  let count = 0;
  for (const byte of presence) for (let bits = byte; bits !== 0; bits &= bits - 1) count++;
  return count;
}

/** What the file system has, not the page cache of an open file: read with O_DIRECT into aligned memory. */
function readDirect(fd: number, address: number, length: number): Buffer {
  const buffer = native().alignedBuffer(roundUp(length, BLOCK_BYTES));
  assert.equal(readSync(fd, buffer, 0, buffer.length, address), buffer.length);
  return buffer;
}

function writeCalls(): number {
  return Number(/^syscw: (\d+)$/m.exec(readFileSync('/proc/self/io', 'latin1'))![1]);
}

describe('storePieces', () => {
  let dir: string;
  let fd: number;
  let files: Files;
  let presence: Uint8Array;

  before(() => {
    dir = mkdtempSync(join(tmpdir(), 'store-pieces-'));
  });
  after(() => {
    rmSync(dir, { recursive: true });
  });
  beforeEach(() => {
    fd = openSync(join(dir, 'store'), constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC | constants.O_DIRECT);
    files = { fd, sumsFd: openSync(join(dir, 'sums'), constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC) };
    ftruncateSync(fd, STORE_BYTES);
    presence = native().presenceCreate(STORE_BYTES);
  });
  afterEach(() => {
    closeSync(fd);
    closeSync(files.sumsFd);
  });

  it('writes pieces of any length at their addresses, padded with zeros to whole blocks', async () => {
    // Dirt first: what a piece does not cover in its last block must be overwritten too.
    const dirt: Piece = { bytes: Buffer.alloc(4 * MiB, 0xff), address: 0 };
    await native().storePieces(jobOf(files, native().presenceCreate(STORE_BYTES), [dirt]));
    const lengths = [1, 4095, 4096, 4097, 8 * KiB, 100_000, 1 * MiB, 1 * MiB + 1];
    let address = 0;
    const pieces = lengths.map((length): Piece => {
      const piece = { bytes: noise(length), address };
      address += roundUp(length, BLOCK_BYTES);
      return piece;
    });
    const result = await native().storePieces(jobOf(files, presence, pieces));
    assert.deepEqual(
      [...result],
      pieces.map(() => 1),
    );
    for (const { bytes, address: at } of pieces) {
      const found = readDirect(fd, at, bytes.length);
      assert.ok(found.subarray(0, bytes.length).equals(bytes));
      assert.ok(found.subarray(bytes.length).equals(Buffer.alloc(found.length - bytes.length)), 'padding is zeros');
      assert.ok(isPresent(presence, at, bytes.length));
    }
    assert.equal(presentBlocks(presence), address / BLOCK_BYTES);
    assert.ok(readDirect(fd, address, 1 * MiB).equals(Buffer.alloc(1 * MiB, 0xff)), 'nothing after the last piece');
  });

  it('never writes a piece with another digest, nor marks it, and writes its neighbours', async () => {
    const pieces = [0, 1, 2, 3].map((i): Piece => ({ bytes: noise(10_000), address: (100 + i * 3) * BLOCK_BYTES }));
    pieces[0] = { ...pieces[0]!, digest: sha256(pieces[1]!.bytes) };
    pieces[2] = { ...pieces[2]!, digest: Buffer.alloc(32) };
    const result = await native().storePieces(jobOf(files, presence, pieces));
    assert.deepEqual([...result], [0, 1, 0, 1]);
    for (const [i, { bytes, address }] of pieces.entries()) {
      const found = readDirect(fd, address, bytes.length).subarray(0, bytes.length);
      assert.ok(found.equals(i % 2 === 1 ? bytes : Buffer.alloc(bytes.length)));
      assert.equal(isPresent(presence, address, BLOCK_BYTES), i % 2 === 1);
    }
    assert.equal(presentBlocks(presence), 6);
  });

  it('joins neighbours into few writes, whatever their order in the job', async () => {
    const pieces = Array.from({ length: 500 }, (_, i): Piece => ({ bytes: noise(8_000), address: i * 8 * KiB }));
    for (let i = pieces.length - 1; i > 0; i--) {
      const other = pseudoRandom(i + 1);
      [pieces[i], pieces[other]] = [pieces[other]!, pieces[i]!];
    }
    const counts: number[] = [];
    let result: Uint8Array = new Uint8Array();
    for (let attempt = 0; attempt < 10; attempt++) {
      const job = jobOf(files, native().presenceCreate(STORE_BYTES), pieces);
      const before = writeCalls();
      result = await native().storePieces(job);
      counts.push(writeCalls() - before);
      // Threads of the runtime that wake the event loop, and the test runner's reporter, write as well, now and then
      // hundreds of times; without joining no attempt has fewer than 500.
      if (counts.at(-1)! < 100) break;
    }
    assert.ok(Math.min(...counts) < 100, `writes of each attempt: ${counts}`);
    assert.ok(result.every((one) => one === 1));
    for (const { bytes, address } of pieces) assert.ok(readDirect(fd, address, 8_000).subarray(0, 8_000).equals(bytes));
  });

  it('accepts one piece several times, also when one of the copies is damaged', async () => {
    const bytes = noise(6_000);
    const digest = sha256(bytes);
    const damaged = Buffer.from(bytes);
    damaged[5_999]! ^= 1;
    const copies = [bytes, damaged, bytes, damaged].map((copy): Piece => ({ bytes: copy, address: 0, digest }));
    for (const pieces of [copies, copies.toReversed()]) {
      const fresh = native().presenceCreate(STORE_BYTES);
      const result = await native().storePieces(jobOf(files, fresh, pieces));
      assert.deepEqual(
        [...result],
        pieces.map((piece) => (piece.bytes === bytes ? 1 : 0)),
      );
      assert.ok(readDirect(fd, 0, 6_000).subarray(0, 6_000).equals(bytes));
      assert.equal(presentBlocks(fresh), 2);
    }
  });

  it('does not write again what is present', async () => {
    const piece: Piece = { bytes: noise(BLOCK_BYTES), address: 8 * BLOCK_BYTES };
    native().presenceSet(presence, 8, 1, true);
    assert.deepEqual([...(await native().storePieces(jobOf(files, presence, [piece])))], [1]);
    assert.ok(readDirect(fd, piece.address, BLOCK_BYTES).equals(Buffer.alloc(BLOCK_BYTES)), 'the file is untouched');
  });

  it('refuses jobs that cannot be right before it writes anything', async () => {
    const good: Piece = { bytes: noise(BLOCK_BYTES), address: 0 };
    const bytes = noise(5_000);
    const bad: Piece[] = [
      { bytes, address: 4_095 },
      { bytes, address: STORE_BYTES },
      { bytes, address: STORE_BYTES - BLOCK_BYTES },
      { bytes, address: 2 ** 53 - 4096 },
      { bytes, address: -4096 },
      { bytes, address: Number.NaN },
      { bytes, address: Number.POSITIVE_INFINITY },
      { bytes: Buffer.alloc(0), address: 8192 },
      { bytes: Buffer.alloc(4 * MiB + 1), address: 8192 },
      { bytes, address: 0 },
    ];
    for (const piece of bad) {
      const work = async () => native().storePieces(jobOf(files, presence, [good, piece]));
      await assert.rejects(work, { code: 'INVALID_ARGUMENT' }, `address ${piece.address}`);
    }
    const job = jobOf(files, presence, [good]);
    const wrong: Partial<StorePiecesJob>[] = [
      { offsets: Float64Array.of(4) },
      { offsets: Float64Array.of(-1) },
      { offsets: Float64Array.of(2 ** 60) },
      { lengths: Uint32Array.of(2 ** 32 - 1) },
      { lengths: Uint32Array.of(1, 2) },
      { addresses: new Float64Array(0) },
      { digests: Buffer.alloc(31) },
      { presence: new Uint8Array(100).subarray(1) },
      { fd: -1 },
    ];
    for (const change of wrong) {
      const work = async () => native().storePieces({ ...job, ...change });
      await assert.rejects(work, { code: 'INVALID_ARGUMENT' }, Object.keys(change)[0]);
    }
    assert.equal(presentBlocks(presence), 0);
    assert.ok(readDirect(fd, 0, BLOCK_BYTES).equals(Buffer.alloc(BLOCK_BYTES)));
  });

  it('says STORE_IO when the store cannot be written, and marks nothing', async () => {
    const readOnly = openSync(join(dir, 'store'), constants.O_RDONLY | constants.O_DIRECT);
    try {
      const job = jobOf({ ...files, fd: readOnly }, presence, [{ bytes: noise(5_000), address: 0 }]);
      await assert.rejects(native().storePieces(job), { code: 'STORE_IO' });
      assert.equal(presentBlocks(presence), 0);
    } finally {
      closeSync(readOnly);
    }
  });

  it('writes from many jobs at once', async () => {
    const pieces = Array.from({ length: 200 }, (_, i): Piece => ({ bytes: noise(20_000), address: i * 20 * KiB }));
    const jobs: Promise<Uint8Array>[] = [];
    for (let i = 0; i < pieces.length; i += 10) {
      jobs.push(native().storePieces(jobOf(files, presence, pieces.slice(i, i + 10))));
      globalThis.gc?.();
    }
    for (const result of await Promise.all(jobs)) assert.ok(result.every((one) => one === 1));
    for (const { bytes, address } of pieces)
      assert.ok(readDirect(fd, address, 20_000).subarray(0, 20_000).equals(bytes));
    assert.equal(presentBlocks(presence), 1000);
  });

  it('writes the sum of every block, and reads back only what agrees with it', async () => {
    const pieces = Array.from({ length: 9 }, (_, i): Piece => ({ bytes: noise(1 + i * 1_300), address: i * 16 * KiB }));
    await native().storePieces(jobOf(files, presence, pieces));
    const read = (address: number, target: Buffer) =>
      native().readStore({ ...files, presence, target, at: 0, length: target.length, address });
    for (const { bytes, address } of pieces) {
      const blocks = Buffer.alloc(roundUp(bytes.length, BLOCK_BYTES));
      bytes.copy(blocks);
      const sums = Buffer.alloc(blocks.length / 1024);
      readSync(files.sumsFd, sums, 0, sums.length, address / 1024);
      assert.deepEqual(sums, blockSums(blocks));
      const target = Buffer.alloc(blocks.length);
      // The store is open for direct reads here, which want whole aligned blocks of memory.
      const aligned = native().alignedBuffer(target.length);
      assert.equal(await read(address, aligned), 'read');
      assert.ok(aligned.equals(blocks));
    }
    const { address } = pieces[8]!;
    const block = readDirect(fd, address + BLOCK_BYTES, BLOCK_BYTES);
    for (const bit of [0, 1, 8 * 2_000 + 3, 8 * 4096 - 1]) {
      block[bit >> 3]! ^= 1 << (bit & 7);
      writeSync(fd, block, 0, BLOCK_BYTES, address + BLOCK_BYTES);
      native().presenceSet(presence, address / BLOCK_BYTES, 3, true);
      assert.equal(await read(address, native().alignedBuffer(3 * BLOCK_BYTES)), 'damaged');
      assert.ok(!isPresent(presence, address + BLOCK_BYTES, BLOCK_BYTES), 'it is not served any more');
      assert.ok(isPresent(presence, address, BLOCK_BYTES), 'its neighbour is');
      assert.equal(await read(address, native().alignedBuffer(3 * BLOCK_BYTES)), 'absent');
      block[bit >> 3]! ^= 1 << (bit & 7);
    }
    // A hole that is said to be present: the sum of a block of zeros is not 0.
    native().presenceSet(presence, (8 * MiB) / BLOCK_BYTES, 1, true);
    assert.equal(await read(8 * MiB, native().alignedBuffer(BLOCK_BYTES)), 'damaged');
    assert.equal(crc32c(Buffer.from('123456789')), 0xe3069283, 'the check value of CRC-32C');
  });

  it('computes the same sums without the instruction of newer processors', async () => {
    const bytes = noise(60_000);
    const source = `
      import { openSync } from 'node:fs';
      import { native } from ${JSON.stringify(join(import.meta.dirname, '../../src/fs/native.ts'))};
      const fd = openSync(process.argv[1], 'w');
      const sumsFd = openSync(process.argv[2], 'w');
      const source = Buffer.from(process.argv[3], 'base64');
      const digests = await native().sha256(source);
      await native().storePieces({ fd, sumsFd, source, offsets: Float64Array.of(0), lengths: Uint32Array.of(source.length),
        digests, addresses: Float64Array.of(0), presence: native().presenceCreate(${STORE_BYTES}) });`;
    const args = [
      '--input-type=module',
      '-e',
      source,
      join(dir, 'plain'),
      join(dir, 'plain-sums'),
      bytes.toString('base64'),
    ];
    execFileSync(process.execPath, args, { env: { ...process.env, DEDUP_NO_SSE42: '1' } });
    const blocks = Buffer.alloc(roundUp(bytes.length, BLOCK_BYTES));
    bytes.copy(blocks);
    assert.deepEqual(readFileSync(join(dir, 'plain-sums')), blockSums(blocks));
  });

  it('does nothing for no pieces', async () => {
    assert.equal((await native().storePieces(jobOf(files, presence, []))).length, 0);
  });
});

const root = process.getuid?.() === 0;
describe('storePieces on a full disk', { skip: root ? false : 'needs root to mount a small file system' }, () => {
  let fd: number;
  let files: Files;
  before(() => {
    const dir = mkdtempSync(join(tmpdir(), 'store-full-'));
    const [image, mountPoint] = [join(dir, 'image'), join(dir, 'mnt')];
    try {
      execFileSync('truncate', ['-s', '8M', image]);
      execFileSync('mkfs.ext4', ['-q', '-b', '4096', '-m', '0', '-O', '^has_journal', image]);
      mkdirSync(mountPoint);
      execFileSync('mount', ['-o', 'loop', image, mountPoint]);
      try {
        fd = openSync(join(mountPoint, 'store'), constants.O_RDWR | constants.O_CREAT | constants.O_DIRECT);
        files = { fd, sumsFd: openSync(join(mountPoint, 'sums'), constants.O_RDWR | constants.O_CREAT) };
      } finally {
        // The descriptor holds it from here: file system and loop device go with this process, however it ends.
        execFileSync('umount', ['--lazy', mountPoint]);
      }
    } finally {
      rmSync(dir, { recursive: true });
    }
    ftruncateSync(fd, STORE_BYTES);
  });
  after(() => {
    closeSync(fd);
    closeSync(files.sumsFd);
  });

  it('says STORE_FULL; what is marked present is there, and the rest is not marked', async () => {
    const presence = native().presenceCreate(STORE_BYTES);
    const pieces = Array.from({ length: 16 }, (_, i): Piece => ({ bytes: noise(1 * MiB), address: i * MiB }));
    await assert.rejects(native().storePieces(jobOf(files, presence, pieces)), (error) => {
      assert.ok(error instanceof DedupError);
      assert.equal(error.code, 'STORE_FULL');
      assert.match(error.message, /No space left/);
      return true;
    });
    const present = pieces.filter(({ address }) => isPresent(presence, address, MiB));
    assert.ok(present.length >= 4 && present.length < 8, `${present.length} pieces`);
    assert.equal(presentBlocks(presence), (present.length * MiB) / BLOCK_BYTES);
    for (const { bytes, address } of present) assert.ok(readDirect(fd, address, MiB).equals(bytes));
  });
});

describe('sha256', () => {
  it('agrees with node:crypto', async () => {
    for (const length of [0, 1, 55, 56, 63, 64, 65, 4096, 1_000_003]) {
      const bytes = noise(length);
      assert.ok((await native().sha256(bytes)).equals(sha256(bytes)), `${length} bytes`);
    }
    await assert.rejects(async () => native().sha256('text' as unknown as Uint8Array), { code: 'INVALID_ARGUMENT' });
  });
});
