import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import type Database from 'better-sqlite3';
import { DedupError } from '../../../src/errors.ts';
import { ChunkHolds, dropUnreferenced, holdChunks } from '../../../src/fs/chunks/hold-chunks.ts';
import { openSound } from '../../../src/fs/chunks/index-open.ts';
import type { ChunksToHold } from '../../../src/fs/chunks/index-protocol.ts';
import { BLOCK_BYTES, KiB } from '../../../src/units.ts';

let dir: string;
let db: Database.Database;
let nextBlock: number;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'hold-chunks-'));
  db = openSound(join(dir, 'index.db'));
  nextBlock = 1000;
});

afterEach(async () => {
  db.close();
  await rm(dir, { recursive: true, force: true });
});

function take(bytes: number): number {
  const block = nextBlock;
  nextBlock += Math.ceil(bytes / BLOCK_BYTES);
  return block;
}

function batch(hold: number, digests: readonly Buffer[], pieceBytes = 256 * KiB): ChunksToHold {
  const lengths = Uint32Array.from(digests, () => 40_000);
  return { hold, scope: '', digests: Buffer.concat(digests), lengths, pieceBytes };
}

function hold(holds: ChunkHolds, chunks: ChunksToHold): Float64Array {
  const held = db.transaction(() => holdChunks(db, holds, chunks, take, 0)).immediate();
  holds.add(chunks.hold, held.blocks, held.made);
  return held.addresses;
}

describe('held chunks', () => {
  it('write a few pages of the database for each batch, however many there are already', async () => {
    const holds = new ChunkHolds();
    const batches = 100;
    const each = 75;
    const empty = (await stat(join(dir, 'index.db-wal'))).size;
    for (let i = 0; i < batches; i++)
      hold(
        holds,
        batch(
          1,
          Array.from({ length: each }, () => randomBytes(32)),
        ),
      );
    const bytes = (await stat(join(dir, 'index.db-wal'))).size - empty;
    // 75 rows of some 60 bytes are two or three pages; an index by name would change most of a hundred more.
    assert.ok(bytes / batches < 6 * 4096, `${bytes} bytes for ${batches} batches`);
  });

  it('have one address each, whoever names them and however often', () => {
    const holds = new ChunkHolds();
    const [a, b, c] = [randomBytes(32), randomBytes(32), randomBytes(32)];
    const first = hold(holds, batch(1, [a, b, a]));
    assert.equal(first[0], first[2]);
    assert.notEqual(first[0], first[1]);
    const second = hold(holds, batch(2, [c, b]));
    assert.equal(second[1], first[1]);
    assert.throws(
      () => hold(holds, batch(2, [b], 16 * KiB)),
      (error) => error instanceof DedupError && error.code === 'INDEX_INVALID',
    );
  });

  it('are nowhere when what made them failed', () => {
    const holds = new ChunkHolds();
    const digest = randomBytes(32);
    const full = () => {
      throw new DedupError('STORE_FULL', 'no address is left');
    };
    const fail = () => db.transaction(() => holdChunks(db, holds, batch(1, [digest]), full, 0)).immediate();
    assert.throws(fail, /no address/);
    const [address] = hold(holds, batch(1, [digest]));
    assert.equal(address, 1000 * BLOCK_BYTES);
  });

  it('go when the last who held them lets go', () => {
    const holds = new ChunkHolds();
    const [a, b] = [randomBytes(32), randomBytes(32)];
    const addresses = hold(holds, batch(1, [a, b]));
    hold(holds, batch(2, [b]));
    holds.release(1);
    const first = dropUnreferenced(db, holds, 0);
    assert.deepEqual(first.ranges, [{ address: addresses[0], length: 40_960 }]);
    holds.strike(first.names);
    assert.notEqual(hold(holds, batch(2, [a]))[0], addresses[0], 'what is to be punched is nobody’s');
    holds.release(2);
    assert.equal(dropUnreferenced(db, holds, 0).names.length, 2);
  });
});
