// All writing SQL of index.db. Runs only in the worker thread (index-db-worker.ts): one writer per database. Says
// nothing about files other than the database itself.
import { existsSync, renameSync, rmSync, statSync } from 'node:fs';
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { addLayer } from './add-layer.ts';
import { AddressSpace } from './address-space.ts';
import { compare, endOfAddresses, makeAgree } from './agreement.ts';
import * as direct from './direct-rows.ts';
import { deleteImage, dropLayers } from './drop-layers.ts';
import { durableRanges, evictedRanges, markDurable } from './durable-rows.ts';
import { coldChunks, evict, evictedPunched } from './evictable.ts';
import { addressSpaceUse, beginQuarantine, endQuarantine, quarantined, toPunch, unowned } from './free-space.ts';
import { ChunkHolds, countUnreferenced, dropUnreferenced, holdChunks } from './hold-chunks.ts';
import { createImage, imageReady, imageRecords } from './image-rows.ts';
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
  NewLayer,
  OpenAnswer,
  OpenRequest,
  StoreRange,
} from './index-protocol.ts';
import { addSources, layerAddresses, layerRecords, setLayerState } from './layer-rows.ts';
import { Settings } from './settings.ts';

/** The write-ahead log is moved into the database file when it has grown past this many bytes. */
const CHECKPOINT_BYTES = 8 * 1024 * 1024;

const now = (): number => Math.floor(Date.now() / 1000);

/** True when what is in the database file is wrong, as opposed to what kept it from being read. */
function isDamage(cause: unknown): boolean {
  if (cause instanceof DedupError) return cause.code === 'STORE_CORRUPT';
  const code = (cause as { code?: unknown } | null)?.code;
  return typeof code === 'string' && /^SQLITE_(CORRUPT|NOTADB|SCHEMA|ERROR)/.test(code);
}

function isFull(error: unknown): boolean {
  return (error as { code?: string } | null)?.code?.startsWith('SQLITE_FULL') === true;
}

export class IndexWriter {
  readonly #db: Database.Database;
  readonly #walFile: string;
  readonly #settings: Settings;
  readonly #holds = new ChunkHolds();
  readonly storeBytes: number;

  private constructor(db: Database.Database, file: string, storeBytes: number) {
    this.#db = db;
    this.#settings = new Settings(db);
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
    const agreement = compare(writer.#settings, request);
    writer.#full(() => {
      makeAgree(db, writer.#settings, request, agreement, now());
      // Of layers that were being read when the last process ended.
      dropUnreferenced(db, writer.#holds, now());
    });
    return {
      writer,
      answer: {
        generation: writer.#settings.number('generation'),
        nextAddress: writer.#settings.number('next_address'),
        dropped: agreement.dropped,
        movedTo,
        durable: durableRanges(writer.#db),
        toPunch: toPunch(writer.#db),
        unowned: agreement.closed ? [] : unowned(db, writer.#settings.number('next_address'), endOfAddresses(request)),
        evicted: evictedRanges(writer.#db),
        foreignImages: (writer.#settings.get('foreign_images') as number | undefined) ?? 0,
      },
    };
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

  addLayer(layer: NewLayer): AddedLayer {
    const added = this.#db
      .transaction(() => {
        const space = this.#addressSpace();
        const result = addLayer(this.#db, layer, space, this.#holds, now());
        this.#settings.set('next_address', space.next);
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
        this.#settings.set('next_address', space.next);
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
      this.#settings.set('generation', generation);
      return dropUnreferenced(this.#db, this.#holds, now());
    });
    this.#holds.strike(names);
    return ranges;
  }

  #addressSpace(): AddressSpace {
    return new AddressSpace(this.#db, this.#settings.number('next_address'), this.storeBytes);
  }

  layers(): LayerRecord[] {
    return layerRecords(this.#db);
  }

  confirmLayer(layerId: number): boolean {
    const exists = this.#db.prepare('SELECT 1 FROM layers WHERE id = ?');
    return this.#full(() => {
      if (exists.get(layerId) === undefined || this.layerPresence(layerId).missing.length > 0) return false;
      // Something must be written for the log to be synced, with all that was committed before.
      this.#settings.set('clean', 0);
      return true;
    });
  }

  layerAddresses(layerId: number): Float64Array {
    return layerAddresses(this.#db, layerId);
  }

  addSources(layerId: number, sources: readonly LayerSourceName[]): void {
    this.#db.transaction(() => addSources(this.#db, layerId, sources))();
  }

  setLayerState(layerId: number, state: { verified?: boolean; condemned?: boolean }): void {
    setLayerState(this.#db, layerId, state);
  }

  /** Drops layers that no mount pins, and the chunks only they used. Their ranges are listed for punching. */
  dropLayers(layerIds: readonly number[], generation: number): DroppedLayers {
    const result = this.#full(() => {
      this.#settings.set('generation', generation);
      return dropLayers(this.#db, layerIds, (id) => this.#holds.has(id), now());
    });
    this.#maybeCheckpoint();
    return result;
  }

  punched(ranges: readonly StoreRange[]): void {
    this.#db.transaction(() => beginQuarantine(this.#db, ranges))();
  }

  markDurable(pieces: DurablePieces): void {
    this.#db.transaction(() => markDurable(this.#db, pieces, now())).immediate();
    this.#maybeCheckpoint();
  }

  quarantined(): StoreRange[] {
    return quarantined(this.#db);
  }

  /** Makes ranges free. A copy of the database from before this is told by its generation. */
  endQuarantine(ranges: readonly StoreRange[], generation: number): void {
    this.#full(() => {
      this.#settings.set('next_address', endQuarantine(this.#db, ranges, this.#settings.number('next_address')));
      this.#settings.set('generation', generation);
    });
  }

  coldChunks(request: ColdChunksRequest): ColdChunks {
    return this.#db.transaction(() => coldChunks(this.#db, request, (id) => this.#holds.has(id))).immediate();
  }

  evict(request: EvictRequest): Uint8Array {
    const taken = this.#full(() => {
      this.#settings.set('generation', request.generation);
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

  createImage(key: string, layers: readonly number[], ahead: boolean): ImageRecord {
    return this.#db.transaction(() => createImage(this.#db, key, layers, ahead, now())).immediate();
  }

  imageReady(id: number, metadataBytes: number): void {
    imageReady(this.#db, id, metadataBytes);
  }

  images(): ImageRecord[] {
    return imageRecords(this.#db);
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
    if (bytes <= CHECKPOINT_BYTES) return;
    try {
      this.#db.pragma('wal_checkpoint(TRUNCATE)');
    } catch (error) {
      // What was to be done is committed: on a full disk the log keeps it.
      if (!isFull(error)) throw error;
    }
  }

  /** Writes everything into the one file, if there is room; the log keeps what does not fit. */
  close(): void {
    try {
      this.#settings.set('clean', 1);
      this.#db.pragma('wal_checkpoint(TRUNCATE)');
    } catch (error) {
      if (!isFull(error)) throw error;
    } finally {
      this.#db.close();
    }
  }
}
