// Address space whose chunks are gone, in the table `freed`: to be punched, in quarantine, free. A free range is given
// again; the row shrinks or goes in the transaction that inserts what lies there now. Runs in the writer's worker thread.
// When a range may leave quarantine is decided in store-space.ts (docs/decisions/0021-addresses-given-again.md).
import type Database from 'better-sqlite3';
import { BLOCK_BYTES } from '../../units.ts';
import type { StoreRange } from './index-protocol.ts';

export interface AddressSpaceUse {
  /** Bytes whose chunks are gone and that are not punched yet. */
  readonly toPunchBytes: number;
  /** Punched, and perhaps still mapped by an image that is mounted. */
  readonly quarantinedBytes: number;
  readonly freeBytes: number;
}

/** The free ranges, within one transaction. */
export class FreeRanges {
  readonly #fitting: Database.Statement;
  readonly #shrink: Database.Statement;
  readonly #remove: Database.Statement;
  /** No free range has more blocks. */
  #largest: number;

  constructor(db: Database.Database) {
    this.#fitting = db
      .prepare("SELECT block, blocks FROM freed WHERE state = 'free' AND blocks >= ? ORDER BY blocks, block LIMIT 1")
      .raw();
    this.#shrink = db.prepare('UPDATE freed SET block = block + ?, blocks = blocks - ? WHERE block = ?');
    this.#remove = db.prepare('DELETE FROM freed WHERE block = ?');
    const largest = db.prepare("SELECT max(blocks) FROM freed WHERE state = 'free'").pluck().get();
    this.#largest = (largest as number | null) ?? 0;
  }

  /** Takes so many blocks out of the smallest range that has them; undefined when none has. */
  take(blocks: number): number | undefined {
    if (blocks > this.#largest) return undefined;
    const found = this.#fitting.get(blocks) as [number, number] | undefined;
    if (found === undefined) {
      this.#largest = blocks - 1;
      return undefined;
    }
    const [block, size] = found;
    if (size === blocks) this.#remove.run(block);
    else this.#shrink.run(blocks, blocks, block);
    return block;
  }
}

/** Records that ranges were punched. */
export function beginQuarantine(db: Database.Database, ranges: readonly StoreRange[]): void {
  const update = db.prepare("UPDATE freed SET state = 'quarantine' WHERE block = ? AND state = 'to-punch'");
  for (const range of ranges) update.run(range.address / BLOCK_BYTES);
}

export function quarantined(db: Database.Database): StoreRange[] {
  return rangesIn(db, 'quarantine');
}

export function toPunch(db: Database.Database): StoreRange[] {
  return rangesIn(db, 'to-punch');
}

/**
 * Where no chunk lies, and bytes may lie all the same: those of chunks whose rows were lost with the last commits before a
 * crash. `end`: no address from there on was ever given.
 */
export function unowned(db: Database.Database, next: number, end: number): StoreRange[] {
  const ranges = [...rangesIn(db, 'free'), ...rangesIn(db, 'quarantine')];
  return end > next ? [...ranges, { address: next, length: end - next }] : ranges;
}

function rangesIn(db: Database.Database, state: string): StoreRange[] {
  const rows = db.prepare('SELECT block, blocks FROM freed WHERE state = ? ORDER BY block').raw().all(state);
  return (rows as [number, number][]).map(([block, blocks]) => ({
    address: block * BLOCK_BYTES,
    length: blocks * BLOCK_BYTES,
  }));
}

/**
 * Makes ranges free, and one of those that are neighbours. The last one before `next`, the first address that is not
 * given, is not given any more either: returns the new `next`.
 */
export function endQuarantine(db: Database.Database, ranges: readonly StoreRange[], next: number): number {
  const free = db.prepare("UPDATE freed SET state = 'free' WHERE block = ? AND state = 'quarantine'");
  for (const range of ranges) free.run(range.address / BLOCK_BYTES);
  const extend = db.prepare('UPDATE freed SET blocks = ? WHERE block = ?');
  const remove = db.prepare('DELETE FROM freed WHERE block = ?');
  const rows = db.prepare("SELECT block, blocks FROM freed WHERE state = 'free' ORDER BY block").raw().all();
  let first = -1;
  let blocks = 0;
  let joined = false;
  const finish = (): void => {
    if (joined) extend.run(blocks, first);
    joined = false;
  };
  for (const [block, count] of rows as [number, number][]) {
    if (first >= 0 && first + blocks === block) {
      remove.run(block);
      blocks += count;
      joined = true;
      continue;
    }
    finish();
    first = block;
    blocks = count;
  }
  finish();
  if (first < 0 || (first + blocks) * BLOCK_BYTES !== next) return next;
  remove.run(first);
  return first * BLOCK_BYTES;
}

/**
 * For a start: nothing is free before it was looked at anew what is mounted. A copy of the database that was taken during
 * the last run and put back is not told from its own, and what was free in it was perhaps given since; so are the
 * addresses from `next` to `end`, which are to be punched.
 */
export function quarantineAnew(db: Database.Database, next: number, end: number, nowSeconds: number): void {
  db.exec("UPDATE freed SET state = 'quarantine' WHERE state = 'free'");
  if (end <= next) return;
  db.prepare("INSERT INTO freed (block, blocks, state, since) VALUES (?, ?, 'to-punch', ?)").run(
    next / BLOCK_BYTES,
    (end - next) / BLOCK_BYTES,
    nowSeconds,
  );
}

/** For an older copy of the database: what it takes for free may be another history's. Its ranges are never given again. */
export function forgetFreed(db: Database.Database): void {
  db.exec('DELETE FROM freed; DELETE FROM evicted');
}

/**
 * For an older copy of the database whose addresses may mean other chunks to a mount that reads the store without us: all
 * that it knows of is learned again, at addresses from `end` on. What lies between `first` and `end` is to be punched, once
 * nobody unknown reads it.
 */
export function forgetChunks(db: Database.Database, first: number, end: number, nowSeconds: number): void {
  db.exec(`DELETE FROM layer_chunks; DELETE FROM placements; DELETE FROM chunks; DELETE FROM held_chunks;
    DELETE FROM sources;
    DELETE FROM pins; DELETE FROM layers`);
  db.prepare("INSERT INTO freed (block, blocks, state, since) VALUES (?, ?, 'to-punch', ?)").run(
    first / BLOCK_BYTES,
    (end - first) / BLOCK_BYTES,
    nowSeconds,
  );
}

export function addressSpaceUse(db: Database.Database): AddressSpaceUse {
  const rows = db.prepare('SELECT state, sum(blocks) FROM freed GROUP BY state').raw().all() as [string, number][];
  const bytes = new Map(rows.map(([state, blocks]) => [state, blocks * BLOCK_BYTES]));
  return {
    toPunchBytes: bytes.get('to-punch') ?? 0,
    quarantinedBytes: bytes.get('quarantine') ?? 0,
    freeBytes: bytes.get('free') ?? 0,
  };
}
