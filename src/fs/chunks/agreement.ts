// Compares index.db with the header of the store it lies beside, at every start, and takes out of the database what the store
// contradicts (docs/formats/index-db.md). Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import * as direct from './direct-rows.ts';
import { forgetChunks, forgetFreed, quarantineAnew } from './free-space.ts';
import type { OpenRequest } from './index-protocol.ts';
import type { Settings } from './settings.ts';
import { FIRST_CHUNK_ADDRESS, STORE_TAIL_BYTES } from './store-layout.ts';

export interface Agreement {
  /** Why recorded presence is not believed; empty when it is. */
  readonly dropped: string;
  readonly generation: number;
  /** The database is new. */
  readonly fresh: boolean;
  /** The last process that wrote it closed it: nothing that it committed can be missing. */
  readonly closed: boolean;
  /** The database is of another history than the store: another file's, or a copy of before or after. */
  readonly replaced: boolean;
  /** No address has meant two chunks since the two parted. */
  readonly addressesKept: boolean;
}

/** What the header says of the database. */
export function compare(settings: Settings, request: OpenRequest): Agreement {
  const storeId = settings.get('store_id');
  if (storeId === undefined) {
    return { dropped: '', generation: 0, fresh: true, closed: true, replaced: false, addressesKept: true };
  }
  const generation = settings.number('generation');
  // The header announces a generation before the database commits it and confirms it afterwards; whoever died in
  // between leaves one of those.
  const announced = generation <= request.pendingGeneration;
  let dropped = '';
  if (storeId !== request.storeId) dropped = 'the database belongs to another store file';
  else if (settings.number('store_bytes') !== request.storeBytes) dropped = 'the store has another size';
  else if (generation < request.generation) dropped = 'the database is older than the store';
  else if (!announced) dropped = 'the store is older than the database';
  const replaced = dropped !== '';
  // Of an older database beside this store it is known whether addresses were given again since; of all others not.
  const addressesKept =
    !replaced || (storeId === request.storeId && announced && request.reuseGeneration <= generation);
  if (!replaced && !request.summed) dropped = 'the sums of its blocks are missing';
  const closed = settings.get('clean') === 1;
  return { dropped, generation, fresh: false, closed, replaced, addressesKept };
}

/** Makes the database agree. To be called in a transaction that is on the disk before anything is read or written. */
export function makeAgree(
  db: Database.Database,
  settings: Settings,
  request: OpenRequest,
  { dropped, generation, fresh, replaced, addressesKept }: Agreement,
  nowSeconds: number,
): void {
  if (dropped !== '') {
    db.exec('UPDATE chunks SET durable = 0 WHERE durable <> 0; UPDATE placements SET durable = 0 WHERE durable <> 0');
  }
  // Numbers and files of images are another history's; who dies before the files are gone finds no row for them.
  if (replaced) {
    db.exec('DELETE FROM image_layers; DELETE FROM images');
    direct.forgetDirect(db);
  }
  const next = fresh ? FIRST_CHUNK_ADDRESS : settings.number('next_address');
  settings.set('store_id', request.storeId);
  settings.set('store_bytes', request.storeBytes);
  settings.set('generation', Math.max(generation, request.nextGeneration));
  // Addresses given after this copy of the database was taken may still be mapped by a mounted image.
  const end = Math.max(next, endOfAddresses(request));
  const inUse = fresh || replaced || mayBeInUse(db, request.livingImages);
  settings.set('next_address', inUse ? end : next);
  settings.set('clean', 0);
  if (replaced) forgetFreed(db);
  // Of a store whose database is new nobody can read what lies there but who reads it without us.
  else if (inUse) quarantineAnew(db, next, end, nowSeconds);
  // What is read without us there is another history's, and must be written by nobody.
  if (!addressesKept && request.directReaders) forgetChunks(db, FIRST_CHUNK_ADDRESS, end, nowSeconds);
  const last = neverNumber(db, request.livingImages ?? []);
  if (!addressesKept) settings.set('foreign_images', last);
}

/** No address from there on was ever given. */
export function endOfAddresses({ highWater, storeBytes }: OpenRequest): number {
  return Math.min(highWater, storeBytes - STORE_TAIL_BYTES);
}

/** True unless every image that is in use has a row: then what has no chunk is mapped by none. */
function mayBeInUse(db: Database.Database, living: readonly number[] | undefined): boolean {
  const known = new Set(db.prepare('SELECT id FROM images').pluck().all());
  return living === undefined || living.some((id) => !known.has(id));
}

/**
 * Gives none of these numbers to an image, and answers the last that was given: by its number an image of another
 * history, which somebody still has mounted, is told from those to come.
 */
function neverNumber(db: Database.Database, images: readonly number[]): number {
  direct.numberImagesAbove(db, Math.max(0, ...images));
  return db.prepare("SELECT seq FROM sqlite_sequence WHERE name = 'images'").pluck().get() as number;
}
