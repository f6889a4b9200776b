// All writing SQL of index.db. Runs only in the worker thread (index-db-worker.ts): one writer per database. Says
// nothing about files other than the database itself.
import { existsSync, renameSync, rmSync, statSync } from 'node:fs';
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import { addLayer } from './add-layer.ts';
import { AddressSpace } from './address-space.ts';
import * as direct from './direct-rows.ts';
import { deleteImage, dropLayers } from './drop-layers.ts';
import { coldChunks, evict, evictedPunched } from './evictable.ts';
import {
  addressSpaceUse,
  beginQuarantine,
  endQuarantine,
  forgetChunks,
  forgetFreed,
  quarantineAnew,
  quarantined,
  toPunch,
} from './free-space.ts';
import { ChunkHolds, countUnreferenced, dropUnreferenced, holdChunks } from './hold-chunks.ts';
import { imageUse } from './image-use.ts';
import { openSound } from './index-open.ts';
import type {
  AddedLayer,
  ChunksToHold,
  ChunkTotals,
  ColdChunks,
  ColdChunksRequest,
  DirectMount,
  DroppedLayers,
  DurablePieces,
  EvictRequest,
  ImageRecord,
  ImageUse,
  LayerPresence,
  LayerRecord,
  LayerSourceName,
  LayerTrust,
  NewLayer,
  OpenAnswer,
  OpenRequest,
  StoreRange,
} from './index-protocol.ts';
import { FIRST_CHUNK_ADDRESS, STORE_TAIL_BYTES } from './store-layout.ts';

/** The write-ahead log is moved into the database file when it has grown past this many bytes. */
const CHECKPOINT_BYTES = 8 * 1024 * 1024;

const now = (): number => Math.floor(Date.now() / 1000);

/** True when what is in the database file is wrong, as opposed to what kept it from being read. */
function isDamage(cause: unknown): boolean {
  if (cause instanceof DedupError) return cause.code === 'STORE_CORRUPT';
  const code = (cause as { code?: unknown } | null)?.code;
  return typeof code === 'string' && /^SQLITE_(CORRUPT|NOTADB|SCHEMA|ERROR)/.test(code);
}

export class IndexWriter {
  readonly #db: Database.Database;
  readonly #walFile: string;
  readonly #holds = new ChunkHolds();
  readonly storeBytes: number;

  private constructor(db: Database.Database, file: string, storeBytes: number) {
    this.#db = db;
    this.#walFile = `${file}-wal`;
    this.storeBytes = storeBytes;
  }

  /**
   * Opens or makes the database and compares it with the store's header. Presence that the header contradicts is
   * dropped with a FULL commit before this returns.
   */
  static open(request: OpenRequest): { writer: IndexWriter; answer: OpenAnswer } {
    let movedTo = '';
    let db: Database.Database;
    try {
      db = openSound(request.file);
    } catch (cause) {
      // What is in index.db can be learned again from registries; a store without a database cannot be read at all. But a
      // full disk, a lock or a newer schema is no damage: with a new database every pulled image would be unknown.
      if (!isDamage(cause) || !existsSync(request.file)) throw cause;
      movedTo = `${request.file}.damaged-${Date.now()}`;
      renameSync(request.file, movedTo);
      for (const suffix of ['-wal', '-shm']) rmSync(request.file + suffix, { force: true });
      db = openSound(request.file);
    }
    const writer = new IndexWriter(db, request.file, request.storeBytes);
    const dropped = writer.#agree(request);
    return {
      writer,
      answer: {
        generation: writer.#getNumber('generation'),
        nextAddress: writer.#getNumber('next_address'),
        dropped,
        movedTo,
        durable: writer.#durableRanges(),
        toPunch: toPunch(writer.#db),
        evicted: writer.#evicted(),
        foreignImages: (writer.#get('foreign_images') as number | undefined) ?? 0,
      },
    };
  }

  #get(key: string): unknown {
    return this.#db.prepare('SELECT value FROM meta WHERE key = ?').pluck().get(key);
  }

  #getNumber(key: string): number {
    const value = this.#get(key);
    if (typeof value !== 'number') throw new DedupError('STORE_CORRUPT', `index.db has no ${key}`);
    return value;
  }

  #set(key: string, value: string | number): void {
    this.#db
      .prepare('INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value')
      .run(key, value);
  }

  #agree(request: OpenRequest): string {
    const storeId = this.#get('store_id');
    const fresh = storeId === undefined;
    const generation = fresh ? 0 : this.#getNumber('generation');
    let dropped = '';
    let replaced = false;
    let addressesKept = true;
    if (!fresh) {
      // The header announces a generation before the database commits it and confirms it afterwards; whoever died in
      // between leaves one of those.
      const announced = generation <= request.pendingGeneration;
      if (storeId !== request.storeId) dropped = 'the database belongs to another store file';
      else if (this.#getNumber('store_bytes') !== request.storeBytes) dropped = 'the store has another size';
      else if (generation < request.generation) dropped = 'the database is older than the store';
      else if (!announced) dropped = 'the store is older than the database';
      replaced = dropped !== '';
      // Of an older database beside this store it is known whether addresses were given again since; of all others not.
      addressesKept = !replaced || (storeId === request.storeId && announced && request.reuseGeneration <= generation);
      if (!replaced && !request.summed) dropped = 'the sums of its blocks are missing';
    }
    this.#full(() => {
      if (dropped !== '') {
        this.#db.exec(
          'UPDATE chunks SET durable = 0 WHERE durable <> 0; UPDATE placements SET durable = 0 WHERE durable <> 0',
        );
      }
      // Numbers and files of images are another history's; who dies before the files are gone finds no row for them.
      if (replaced) {
        this.#db.exec('DELETE FROM image_layers; DELETE FROM images');
        direct.forgetDirect(this.#db);
      }
      const next = fresh ? FIRST_CHUNK_ADDRESS : this.#getNumber('next_address');
      this.#set('store_id', request.storeId);
      this.#set('store_bytes', request.storeBytes);
      this.#set('generation', Math.max(generation, request.nextGeneration));
      // Addresses given after this copy of the database was taken may still be mapped by a mounted image.
      const end = Math.min(Math.max(next, request.highWater), this.storeBytes - STORE_TAIL_BYTES);
      const inUse = fresh || replaced || this.#mayBeInUse(request.livingImages);
      this.#set('next_address', inUse ? Math.max(next, end) : next);
      this.#set('clean', 0);
      if (replaced) forgetFreed(this.#db);
      else if (!fresh && inUse) quarantineAnew(this.#db, next, end, now());
      // What is read without us there is another history's, and must be written by nobody.
      if (!addressesKept && request.directReaders) forgetChunks(this.#db, FIRST_CHUNK_ADDRESS, end, now());
      const last = this.#neverNumber(request.livingImages ?? []);
      if (!addressesKept) this.#set('foreign_images', last);
      // Of layers that were being read when the last process ended.
      dropUnreferenced(this.#db, this.#holds, now());
    });
    return dropped;
  }

  /** True unless every image that is in use has a row: then what has no chunk is mapped by none. */
  #mayBeInUse(living: readonly number[] | undefined): boolean {
    const known = new Set(this.#db.prepare('SELECT id FROM images').pluck().all());
    return living === undefined || living.some((id) => !known.has(id));
  }

  /**
   * Gives none of these numbers to an image, and answers the last that was given: by its number an image of another
   * history, which somebody still has mounted, is told from those to come.
   */
  #neverNumber(images: readonly number[]): number {
    direct.numberImagesAbove(this.#db, Math.max(0, ...images));
    return this.#db.prepare("SELECT seq FROM sqlite_sequence WHERE name = 'images'").pluck().get() as number;
  }

  /** Runs `work` in a transaction that is on the disk when this returns (synchronous=FULL). */
  #full<T>(work: () => T): T {
    this.#db.pragma('synchronous = FULL');
    try {
      return this.#db.transaction(work).immediate();
    } finally {
      this.#db.pragma('synchronous = NORMAL');
    }
  }

  #durableRanges(): Float64Array {
    const rows = this.#db
      .prepare(
        `SELECT id AS block, size, piece_bytes, durable FROM chunks WHERE durable <> 0
         UNION ALL SELECT p.block, c.size, c.piece_bytes, p.durable FROM placements p JOIN chunks c ON c.id = p.chunk_id WHERE p.durable <> 0
         ORDER BY 1`,
      )
      .raw()
      .iterate() as IterableIterator<[number, number, number, number]>;
    const ranges: number[] = [];
    let start = -1;
    let end = -1;
    const add = (block: number, bytes: number): void => {
      const blocks = Math.ceil(bytes / BLOCK_BYTES);
      if (block !== end) {
        if (start >= 0) ranges.push(start, end - start);
        start = block;
      }
      end = block + blocks;
    };
    for (const [block, size, pieceBytes, mask] of rows) {
      if (mask === -1) {
        add(block, size);
        continue;
      }
      for (let piece = 0, at = 0; at < size; piece++, at += pieceBytes) {
        if (mask & (1 << piece)) add(block + at / BLOCK_BYTES, Math.min(pieceBytes, size - at));
      }
    }
    if (start >= 0) ranges.push(start, end - start);
    return Float64Array.from(ranges);
  }

  #evicted(): StoreRange[] {
    const rows = this.#db.prepare('SELECT block, blocks FROM evicted ORDER BY block').raw().all() as [number, number][];
    return rows.map(([block, blocks]) => ({ address: block * BLOCK_BYTES, length: blocks * BLOCK_BYTES }));
  }

  addLayer(layer: NewLayer): AddedLayer {
    const added = this.#db
      .transaction(() => {
        const space = this.#addressSpace();
        const result = addLayer(this.#db, layer, space, this.#holds, now());
        this.#set('next_address', space.next);
        return { ...result, nextAddress: space.next };
      })
      .immediate();
    const { counted, ...answer } = added;
    this.#holds.strike(counted);
    this.#maybeCheckpoint();
    return answer;
  }

  /** Gives chunks of a layer that is being read addresses, and holds them. */
  holdChunks(chunks: ChunksToHold): { addresses: Float64Array; nextAddress: number } {
    const { held, nextAddress } = this.#db
      .transaction(() => {
        const space = this.#addressSpace();
        const held = holdChunks(this.#db, this.#holds, chunks, (bytes) => space.take(bytes), now());
        this.#set('next_address', space.next);
        return { held, nextAddress: space.next };
      })
      .immediate();
    this.#holds.add(chunks.hold, held.blocks, held.made);
    this.#maybeCheckpoint();
    return { addresses: held.addresses, nextAddress };
  }

  releaseHold(hold: number): number {
    this.#holds.release(hold);
    return countUnreferenced(this.#db, this.#holds);
  }

  dropUnreferenced(generation: number): StoreRange[] {
    const { ranges, names } = this.#full(() => {
      this.#set('generation', generation);
      return dropUnreferenced(this.#db, this.#holds, now());
    });
    this.#holds.strike(names);
    return ranges;
  }

  #addressSpace(): AddressSpace {
    return new AddressSpace(this.#db, this.#getNumber('next_address'), this.storeBytes);
  }

  layers(): LayerRecord[] {
    const sources = new Map<number, LayerSourceName[]>();
    const sourceRows = this.#db
      .prepare('SELECT layer_id, host, repository FROM sources ORDER BY layer_id, position')
      .raw()
      .all();
    for (const [layerId, host, repository] of sourceRows as [number, string, string][]) {
      const list = sources.get(layerId) ?? [];
      list.push({ host, repository });
      sources.set(layerId, list);
    }
    const rows = this.#db
      .prepare('SELECT l.*, s.name AS scope_name FROM layers l JOIN scopes s ON s.id = l.scope ORDER BY l.id')
      .all();
    return (rows as Record<string, string | number>[]).map((row) => ({
      id: row.id as number,
      scope: row.scope_name as string,
      digest: row.digest as string,
      size: row.size as number,
      diffId: row.diff_id as string,
      indexDigest: row.index_digest as string,
      restartDigest: row.restart_digest as string,
      restartSize: row.restart_size as number,
      chunkCount: row.chunk_count as number,
      contiguous: row.contiguous === 1,
      reference: row.reference as string,
      trust: row.trust as LayerTrust,
      verified: row.verified === 1,
      condemned: row.condemned === 1,
      sources: sources.get(row.id as number) ?? [],
    }));
  }

  confirmLayer(layerId: number): boolean {
    const exists = this.#db.prepare('SELECT 1 FROM layers WHERE id = ?');
    return this.#full(() => {
      if (exists.get(layerId) === undefined || this.layerPresence(layerId).missing.length > 0) return false;
      // Something must be written for the log to be synced, with all that was committed before.
      this.#set('clean', 0);
      return true;
    });
  }

  layerAddresses(layerId: number): Float64Array {
    const count = this.#db.prepare('SELECT chunk_count FROM layers WHERE id = ?').pluck().get(layerId) as
      | number
      | undefined;
    if (count === undefined) throw new DedupError('NOT_FOUND', `layer ${layerId} is not in the store`);
    const addresses = new Float64Array(count);
    const rows = this.#db
      .prepare('SELECT seq, ifnull(placement, chunk_id) FROM layer_chunks WHERE layer_id = ?')
      .raw()
      .iterate(layerId) as IterableIterator<[number, number]>;
    for (const [seq, block] of rows) addresses[seq] = block * BLOCK_BYTES;
    return addresses;
  }

  addSources(layerId: number, sources: readonly LayerSourceName[]): void {
    const insert = this.#db.prepare(
      `INSERT INTO sources (layer_id, host, repository, position)
       SELECT ?, ?, ?, (SELECT count(*) FROM sources WHERE layer_id = ?) WHERE true ON CONFLICT DO NOTHING`,
    );
    this.#db.transaction(() => {
      for (const { host, repository } of sources) insert.run(layerId, host, repository, layerId);
    })();
  }

  setLayerState(layerId: number, state: { verified?: boolean; condemned?: boolean }): void {
    const set = this.#db.prepare(
      'UPDATE layers SET verified = ifnull(?, verified), condemned = ifnull(?, condemned) WHERE id = ?',
    );
    const flag = (value: boolean | undefined): number | null => (value === undefined ? null : Number(value));
    set.run(flag(state.verified), flag(state.condemned), layerId);
  }

  /** Drops layers that no mount pins, and the chunks only they used. Their ranges are listed for punching. */
  dropLayers(layerIds: readonly number[], generation: number): DroppedLayers {
    const result = this.#full(() => {
      this.#set('generation', generation);
      return dropLayers(this.#db, layerIds, (id) => this.#holds.has(id), now());
    });
    this.#maybeCheckpoint();
    return result;
  }

  punched(ranges: readonly StoreRange[]): void {
    this.#db.transaction(() => beginQuarantine(this.#db, ranges))();
  }

  markDurable(pieces: DurablePieces): void {
    const chunk = this.#db.prepare('UPDATE chunks SET durable = durable | ?, last_used = ? WHERE id = ?');
    const held = this.#db.prepare('UPDATE held_chunks SET durable = durable | ? WHERE block = ?');
    const extra = this.#db.prepare('UPDATE placements SET durable = durable | ? WHERE block = ?');
    const at = now();
    this.#db
      .transaction(() => {
        for (let i = 0; i < pieces.blocks.length; i++) {
          const block = pieces.blocks[i]!;
          const mask = pieces.masks[i]!;
          if (chunk.run(mask, at, block).changes > 0) continue;
          if (held.run(mask, block).changes === 0) extra.run(mask, block);
        }
      })
      .immediate();
    this.#maybeCheckpoint();
  }

  quarantined(): StoreRange[] {
    return quarantined(this.#db);
  }

  /** Makes ranges free. A copy of the database from before this is told by its generation. */
  endQuarantine(ranges: readonly StoreRange[], generation: number): void {
    this.#full(() => {
      this.#set('next_address', endQuarantine(this.#db, ranges, this.#getNumber('next_address')));
      this.#set('generation', generation);
    });
  }

  coldChunks(request: ColdChunksRequest): ColdChunks {
    return this.#db.transaction(() => coldChunks(this.#db, request, (id) => this.#holds.has(id))).immediate();
  }

  evict(request: EvictRequest): Uint8Array {
    const taken = this.#full(() => {
      this.#set('generation', request.generation);
      return evict(this.#db, request, (id) => this.#holds.has(id));
    });
    this.#maybeCheckpoint();
    return taken;
  }

  evictedPunched(blocks: Float64Array): void {
    this.#db.transaction(() => evictedPunched(this.#db, blocks))();
  }

  imageUse(): ImageUse[] {
    return imageUse(this.#db);
  }

  createImage(key: string, layers: readonly number[], reference: string): ImageRecord {
    return this.#db
      .transaction(() => {
        const known = this.#images('WHERE key = ?', key)[0];
        if (known !== undefined) return known;
        const exists = this.#db.prepare('SELECT 1 FROM layers WHERE id = ?');
        // An image that has a row has only layers with rows (docs/decisions/0021-addresses-given-again.md).
        for (const layerId of layers)
          if (exists.get(layerId) === undefined)
            throw new DedupError('NOT_FOUND', `layer ${layerId} is not in the store`);
        const insert = this.#db.prepare(
          "INSERT INTO images (key, state, reference, created_at) VALUES (?, 'building', ?, ?)",
        );
        const id = Number(insert.run(key, reference, now()).lastInsertRowid);
        const layer = this.#db.prepare('INSERT INTO image_layers (image_id, position, layer_id) VALUES (?, ?, ?)');
        for (const [position, layerId] of layers.entries()) layer.run(id, position, layerId);
        return { id, key, state: 'building' as const, metadataBytes: 0, reference, layers: [...layers] };
      })
      .immediate();
  }

  imageReady(id: number, metadataBytes: number): void {
    this.#db.prepare("UPDATE images SET state = 'ready', metadata_bytes = ? WHERE id = ?").run(metadataBytes, id);
  }

  images(): ImageRecord[] {
    return this.#images('');
  }

  #images(where: string, ...args: unknown[]): ImageRecord[] {
    const layersOf = this.#db.prepare('SELECT layer_id FROM image_layers WHERE image_id = ? ORDER BY position').pluck();
    const rows = this.#db
      .prepare(`SELECT id, key, state, metadata_bytes, reference FROM images ${where} ORDER BY id`)
      .all(...args);
    return (
      rows as { id: number; key: string; state: 'building' | 'ready'; metadata_bytes: number; reference: string }[]
    ).map((row) => ({
      id: row.id,
      key: row.key,
      state: row.state,
      metadataBytes: row.metadata_bytes,
      reference: row.reference,
      layers: layersOf.all(row.id) as number[],
    }));
  }

  dropImage(id: number): void {
    this.#db.transaction(() => deleteImage(this.#db, id))();
  }

  pin(mountId: number, layers: readonly number[]): void {
    this.#db.transaction(() => direct.pin(this.#db, mountId, layers))();
  }

  unpin(mountId: number): void {
    direct.unpin(this.#db, mountId);
  }

  unpinAll(): void {
    direct.unpin(this.#db);
  }

  layerPresence(layerId: number): LayerPresence {
    return direct.layerPresence(this.#db, layerId);
  }

  addDirect(mount: DirectMount): void {
    this.#full(() => direct.addDirect(this.#db, mount, now()));
  }

  dropDirect(imageId: number, pinned: boolean): void {
    this.#db.transaction(() => direct.dropDirect(this.#db, imageId, pinned))();
  }

  numberImagesAbove(imageId: number): void {
    this.#db.transaction(() => direct.numberImagesAbove(this.#db, imageId))();
  }

  directMounts(): number[] {
    return direct.directMounts(this.#db);
  }

  totals(): ChunkTotals {
    const row = this.#db
      .prepare(
        `SELECT count(*), ifnull(sum(size), 0), count(*) FILTER (WHERE ref_count > 1),
                ifnull(sum(size) FILTER (WHERE ref_count > 1), 0), ifnull(sum(size * ref_count), 0) FROM chunks`,
      )
      .raw()
      .get() as [number, number, number, number, number];
    const [chunks, chunkBytes, sharedChunks, sharedBytes, referencedBytes] = row;
    return { chunks, chunkBytes, sharedChunks, sharedBytes, referencedBytes, freed: addressSpaceUse(this.#db) };
  }

  /** Moves the write-ahead log into the database file. */
  checkpoint(): void {
    this.#db.pragma('wal_checkpoint(PASSIVE)');
  }

  #maybeCheckpoint(): void {
    const bytes = statSync(this.#walFile, { throwIfNoEntry: false })?.size ?? 0;
    if (bytes > CHECKPOINT_BYTES) this.#db.pragma('wal_checkpoint(TRUNCATE)');
  }

  /** Writes everything into the one file, if there is room; the log keeps what does not fit. */
  close(): void {
    try {
      this.#set('clean', 1);
      this.#db.pragma('wal_checkpoint(TRUNCATE)');
    } catch (error) {
      if (!(error as { code?: string }).code?.startsWith('SQLITE_FULL')) throw error;
    } finally {
      this.#db.close();
    }
  }
}
