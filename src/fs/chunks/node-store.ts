// The node store: one sparse file that holds each distinct chunk once, and the database that says what lies where.
// Owned by dedupd; used by image building (addresses) and the LazyLoader (presence, reads, writes). Knows no registry.
import { mkdir } from 'node:fs/promises';
import { DedupError, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../../units.ts';
import type { LayerIndex } from '../index/layer-index.ts';
import { ChunkKeeper } from './chunk-keeper.ts';
import { DirectMounts, type DirectTarget } from './direct-mounts.ts';
import { Durability } from './durability.ts';
import { IndexDb, type LayerChunk, type PlacedChunk } from './index-db.ts';
import type { ImageRecord, ImageUse, LayerRecord, LayerSourceName, StoreRange } from './index-protocol.ts';
import { countPresentBlocks } from './presence.ts';
import { SpaceReserve } from './space-reserve.ts';
import { StoreBytes } from './store-bytes.ts';
import { StoreChanges } from './store-changes.ts';
import { StoreFile } from './store-file.ts';
import { DEFAULT_STORE_BYTES, FIRST_CHUNK_ADDRESS, STORE_HEAD_BYTES, STORE_TAIL_BYTES } from './store-layout.ts';
import { StoreSpace } from './store-space.ts';
import type {
  AddLayerOptions,
  KeepChunksOptions,
  NodeStoreOptions,
  NodeStoreStats,
  PieceToStore,
  StoredLayer,
  StoreNative,
} from './store-types.ts';
import { Touched } from './touched.ts';

export type {
  AddLayerOptions,
  KeepChunksOptions,
  NodeStoreOptions,
  NodeStoreStats,
  PieceToStore,
  StoredLayer,
  StoreNative,
} from './store-types.ts';

export class NodeStore {
  readonly storeBytes: number;
  /** One bit per 4 KiB block, shared with the transports. Set only by `storePieces` and at open, from durable rows. */
  readonly presence: Uint8Array;
  readonly headBytes = STORE_HEAD_BYTES;
  readonly tailBytes = STORE_TAIL_BYTES;
  readonly #native: StoreNative;
  readonly #log: Logger;
  readonly #file: StoreFile;
  readonly #db: IndexDb;
  readonly #durability: Durability;
  readonly #reserve: SpaceReserve;
  readonly #foreignImages: number;
  /** What dropped layers leave behind is not given to others before its promise settles. */
  #onDropped: (layerIds: readonly number[]) => Promise<void> = () => Promise.resolve();
  readonly #changes: StoreChanges;
  readonly #bytes: StoreBytes;
  readonly #space: StoreSpace;
  readonly #touched: Touched;
  #closed = false;
  #lastHold = 0;
  #presenceLost = false;
  #direct: DirectMounts | undefined;
  /** Mounts that are pinned as such, whether they read the store themselves or not. */
  readonly #pinned = new Set<number>();
  private constructor(
    options: NodeStoreOptions,
    file: StoreFile,
    db: IndexDb,
    presence: Uint8Array,
    state: { generation: number; nextAddress: number; foreignImages: number },
  ) {
    this.storeBytes = file.header.storeBytes;
    this.presence = presence;
    this.#native = options.native;
    this.#log = options.log;
    this.#file = file;
    this.#db = db;
    this.#foreignImages = state.foreignImages;
    this.#touched = new Touched(options.native.touchedCreate(file.header.storeBytes));
    this.#reserve = new SpaceReserve(options.paths.storeReserve, options.reserveBytes ?? 16 * MiB);
    this.#changes = new StoreChanges(file, this.#reserve, state);
    this.#durability = new Durability(
      {
        sync: () => file.sync(),
        record: async (pieces) => {
          await db.call('markDurable', pieces);
        },
        forget: (firstBlock, blocks) => this.#bytes.clear(firstBlock, blocks),
      },
      { delayMs: options.flushDelayMs ?? 2000, maxBytes: options.flushBytes ?? 64 * MiB },
      options.log,
    );
    this.#bytes = new StoreBytes({
      file,
      native: options.native,
      presence,
      touched: this.#touched,
      durability: this.#durability,
      log: options.log,
      mustBeOpen: () => this.#mustBeOpen(),
    });
    this.#space = new StoreSpace(
      {
        file,
        db,
        presence,
        touched: this.#touched,
        durability: this.#durability,
        nextAddress: () => this.#changes.nextAddress,
        serially: (work) => this.#changes.serially(work),
        underGeneration: (change, how) => this.#changes.underGeneration(change, how),
        reserve: this.#reserve,
        hasStrangers: () => this.hasForeignReaders(),
      },
      options,
    );
  }

  /**
   * Opens the store below `paths.root`, or makes it. Only presence that is durable, and that belongs to this very
   * store file, is believed. The caller holds the lock on the root.
   * Errors: STORE_IO, STORE_FULL, STORE_CORRUPT, FAILED_PRECONDITION for a newer schema.
   */
  static async open(options: NodeStoreOptions): Promise<NodeStore> {
    const { paths, native, log } = options;
    const storeBytes = options.storeBytes ?? DEFAULT_STORE_BYTES;
    await mkdir(paths.chunks, { recursive: true, mode: 0o700 });
    const { store: file, summed } = await StoreFile.open(paths, storeBytes, FIRST_CHUNK_ADDRESS);
    let db: IndexDb | undefined;
    try {
      // Every start has a generation: a copy of the database from before it is told, also where nothing was removed since.
      const { header } = file;
      const nextGeneration = header.pendingGeneration + 1;
      await file.writeHeader({ pendingGeneration: nextGeneration });
      const living = await options.livingImages?.(file.name);
      const livingImages = living === undefined ? undefined : [...living];
      const devices = options.devices === undefined ? [] : await options.devices(file.name);
      const directReaders = devices.some(({ direct }) => direct);
      const opened = await IndexDb.open({
        file: paths.indexDb,
        ...header,
        nextGeneration,
        livingImages,
        directReaders,
        summed,
      });
      db = opened.db;
      const { answer } = opened;
      if (answer.movedTo !== '') log.error({ movedTo: answer.movedTo }, 'index.db was damaged and is made anew');
      if (answer.dropped !== '') log.warn({ reason: answer.dropped }, 'recorded presence is not believed');
      await file.writeHeader({
        generation: answer.generation,
        pendingGeneration: answer.generation,
        highWater: Math.max(header.highWater, answer.nextAddress),
      });
      const presence = native.presenceCreate(storeBytes);
      for (let i = 0; i + 1 < answer.durable.length; i += 2) {
        native.presenceSet(presence, answer.durable[i]!, answer.durable[i + 1]!, true);
      }
      const store = new NodeStore(options, file, db, presence, answer);
      store.#presenceLost = answer.dropped !== '';
      // Before anything is punched: what an earlier process let the kernel read without it may still be read.
      store.#direct = await DirectMounts.open(store.#directTarget(options.devices), log);
      await store.#space.punchFreed(answer.toPunch);
      await store.#space.punchEvicted(answer.evicted);
      await store.#space.punchUnowned(answer.unowned);
      if (!(await store.#reserve.fill())) log.warn('the disk has no room for the space that cleaning a full one takes');
      store.#space.start();
      return store;
    } catch (error) {
      await db?.close();
      await file.close();
      throw error;
    }
  }

  #directTarget(devices: NodeStoreOptions['devices']): DirectTarget {
    const db = this.#db;
    return {
      devices: async () => (await devices?.(this.id)) ?? [],
      numberAbove: async (imageId) => void (await db.call('numberImagesAbove', { imageId })),
      rows: () => db.call('directMounts', {}),
      layerPresence: (layerId) => db.call('layerPresence', { layerId }),
      add: async (mount) => void (await db.call('addDirect', mount)),
      drop: async (imageId) => void (await db.call('dropDirect', { imageId, pinned: this.#pinned.has(imageId) })),
      isPresent: (address, length) => this.isPresent(address, length),
      dropHoles: (ranges) => this.#bytes.dropHoles(ranges),
      clearEpoch: () => this.#native.presenceClearEpoch(),
      flush: async (metadata) => {
        this.#mustBeOpen();
        // What a call has written is present before the call has returned and handed it on to be flushed.
        await this.#bytes.settled();
        await this.#durability.flush(metadata);
      },
      serially: (work) => this.#changes.serially(work),
      strangersGone: () => this.#changes.serially(() => this.#space.punchPostponed()),
    };
  }

  /** The mounts that read the store file without this process. */
  get direct(): DirectMounts {
    if (this.#direct === undefined) throw new DedupError('INTERNAL', 'the node store is not open yet');
    return this.#direct;
  }

  /**
   * True while devices read the store of which index.db does not know what they may read: nothing may be punched, evicted
   * or given another address's place. (Those it knows are in its table `direct_mounts`, their layers in `pins`.)
   */
  hasForeignReaders(): boolean {
    return this.direct.hasStrangers;
  }

  /** True when recorded presence could not be believed at this start. */
  get presenceLost(): boolean {
    return this.#presenceLost;
  }

  /** Name of the store file, of at most 42 characters, that no other file has, not even a copy of it. */
  get id(): string {
    return this.#file.name;
  }

  /** Descriptor of the store file without O_DIRECT, for a transport to read hits from. Owned by the store. */
  get fd(): number {
    return this.#file.buffered.fd;
  }

  /** Descriptor of the sums of its blocks, which hits are compared with. Owned by the store. */
  get sumsFd(): number {
    return this.#file.sums.fd;
  }

  /** When each part of the store was last used, for the transports to mark what they answer. */
  get touched(): Uint32Array {
    return this.#touched.map;
  }

  /** True for an image without a row to which an address may mean another chunk than it means to the database. */
  isForeign(imageId: number): boolean {
    return imageId <= this.#foreignImages;
  }

  /**
   * Who reads and writes for layers is told when some are dropped; what it answers settles once nobody in this process
   * can read or write what was theirs any more. One listener.
   */
  onDropped(listener: (layerIds: readonly number[]) => Promise<void>): void {
    this.#onDropped = listener;
  }

  /** Says, and counts, that a read met blocks which the disk had changed; they are absent now and will be fetched. */
  damaged(address: number, length: number): void {
    this.#bytes.damaged(address, length);
  }

  #mustBeOpen(): void {
    if (this.#closed) throw new DedupError('CLOSED', 'the node store is closed');
  }

  /**
   * Records a layer and gives its chunks addresses; known chunks keep theirs. Adding the same layer again returns the
   * same addresses. Errors: INDEX_INVALID, STORE_FULL, STORE_IO, CLOSED.
   */
  async addLayer(index: LayerIndex, options: AddLayerOptions): Promise<StoredLayer> {
    this.#mustBeOpen();
    const { chunks } = index;
    const layer = {
      scope: options.scope,
      digest: index.layerDigest,
      indexDigest: options.indexDigest,
      size: index.layerBytes,
      diffId: index.diffId,
      restartDigest: index.restart.digest,
      restartSize: index.restart.size,
      reference: options.reference ?? '',
      trust: options.trust,
      sources: options.sources,
      digests: chunks.digest.subarray(0, chunks.count * 32),
      lengths: chunks.length.subarray(0, chunks.count),
      zero: chunks.zero.subarray(0, chunks.count),
      chunkBytes: index.chunkBytes,
      pieceBytes: index.pieceBytes,
      files: options.contiguousFiles ? filesOf(index) : undefined,
    };
    const result = await this.#changes.serially(() =>
      this.#changes.givingAddresses(blockBytes(layer.lengths), () => this.#db.call('addLayer', layer)),
    );
    return { layerId: result.layerId, addresses: result.addresses };
  }

  /**
   * Keeps the chunks of a layer that is being read, from before its index is known until the layer is added or the keeper
   * is disposed of: then what no layer counts is freed. For layouts that need no contiguous files.
   */
  keepChunks(options: KeepChunksOptions): ChunkKeeper {
    this.#mustBeOpen();
    const hold = ++this.#lastHold;
    const { scope, pieceBytes, requireRoom } = options;
    const mayEvict = requireRoom === undefined;
    return new ChunkKeeper(
      {
        hold: (digests, lengths) =>
          this.#changes.serially(async () => {
            this.#mustBeOpen();
            const chunks = { hold, scope, digests, lengths, pieceBytes };
            const giving = () => this.#db.call('holdChunks', chunks);
            return (await this.#changes.givingAddresses(blockBytes(lengths), giving)).addresses;
          }),
        isPresent: (address, length) => this.isPresent(address, length),
        requireRoom,
        store: (source, pieces) => this.store(source, pieces, { mayEvict }),
        release: () => this.#releaseHold(hold),
      },
      options,
    );
  }

  async #releaseHold(hold: number): Promise<void> {
    if (this.#closed) return; // The next start frees them.
    await this.#changes.serially(async () => {
      if ((await this.#db.call('releaseHold', { hold })) === 0) return;
      await this.#free(async (generation) => {
        const ranges = await this.#db.call('dropUnreferenced', { generation });
        return { ranges, result: undefined };
      });
    });
  }

  /**
   * Runs a change that drops rows of chunks under a generation of its own, and punches what it names. What is punched has
   * no row any more on the disk. To be called serially.
   */
  async #free<T>(change: (generation: number) => Promise<{ ranges: readonly StoreRange[]; result: T }>): Promise<T> {
    const { ranges, result } = await this.#changes.underGeneration(change);
    await this.#space.punchFreed(ranges);
    await this.#reserve.fill();
    return result;
  }

  /**
   * True when the layer needs nobody any more: its row and all of its chunks are on the disk. What is present must have
   * been flushed before. For layouts that need no contiguous files.
   */
  confirmLayer(layerId: number): Promise<boolean> {
    return this.#db.call('confirmLayer', { layerId });
  }

  /** Addresses of a stored layer's chunks. Errors: NOT_FOUND. */
  layerAddresses(layerId: number): Promise<Float64Array> {
    return this.#db.call('layerAddresses', { layerId });
  }

  /** All layers with their sources. */
  layers(): Promise<LayerRecord[]> {
    return this.#db.call('layers', {});
  }

  /** Adds repositories that hold a layer; known ones are kept in their order. */
  async addSources(layerId: number, sources: readonly LayerSourceName[]): Promise<void> {
    await this.#db.call('addSources', { layerId, sources });
  }

  /** Records that a layer matched its diffID, or that its index lied. */
  async setLayerState(layerId: number, state: { verified?: boolean; condemned?: boolean }): Promise<void> {
    await this.#db.call('setLayerState', { layerId, ...state });
  }

  /**
   * Drops every layer but those named, or those a function that is asked at the last moment names, except pinned ones;
   * then punches out the chunks only they used. Their rows are gone for good before anything is punched; their addresses
   * are given again once nobody can see what was there (endQuarantine).
   * Returns the ids of the layers dropped. Errors: STORE_IO.
   */
  retainLayers(keep: readonly number[] | ((layerId: number) => boolean)): Promise<number[]> {
    this.#mustBeOpen();
    const keeps = typeof keep === 'function' ? keep : (id: number) => keep.includes(id);
    return this.#changes.serially(async () => {
      const drop = (await this.layers()).map((layer) => layer.id).filter((id) => !keeps(id));
      if (drop.length === 0) return [];
      const { dropped, pinned } = await this.#free(async (generation) => {
        const result = await this.#db.call('dropLayers', { layerIds: drop, generation });
        if (result.dropped.length > 0) this.#space.waitFor(this.#onDropped(result.dropped));
        return { ranges: result.ranges, result };
      });
      if (pinned.length > 0) this.#log.debug({ layers: pinned }, 'layers in use are kept');
      return [...dropped];
    });
  }

  /**
   * Makes addresses whose chunks are gone free to be given again, where nobody can see any more what was there; `wait`:
   * after what was freed a moment ago has rested. Returns bytes of address space. Errors: STORE_IO, STORE_FULL, CLOSED.
   */
  async endQuarantine({ wait } = { wait: false }): Promise<number> {
    this.#mustBeOpen();
    if (wait) await this.#space.quarantineOver();
    return await this.#space.endQuarantine();
  }

  /** Evicts down to 95 % of the quota, if there is more than the quota. Returns the bytes. Errors: as evict. */
  evictToQuota(): Promise<number> {
    this.#mustBeOpen();
    return this.#space.evictToQuota();
  }

  /**
   * Evicts about so many bytes of pieces that can be fetched again, those first that were not used for longest. Returns
   * the bytes. Errors: STORE_IO, STORE_FULL, CLOSED.
   */
  evict(bytes: number): Promise<number> {
    this.#mustBeOpen();
    return this.#space.evict(bytes);
  }

  /** Bytes of a chunk that are present, from the first block of its placement. */
  presentIn(block: number, bytes: number): number {
    if (this.isPresent(block * BLOCK_BYTES, bytes)) return bytes;
    const here = countPresentBlocks(this.presence, block, Math.ceil(bytes / BLOCK_BYTES)) * BLOCK_BYTES;
    return Math.min(here, bytes);
  }

  get quotaBytes(): number {
    return this.#space.quotaBytes;
  }

  /** What counts against the quota. */
  presentBytes(): number {
    return this.#space.presentBytes();
  }

  /** Bytes that the store and its sums take on the disk. Errors: STORE_IO. */
  diskBytes(): Promise<number> {
    return this.#file.diskBytes();
  }

  /** What every image that has a row needs. */
  imageUse(): Promise<ImageUse[]> {
    return this.#db.call('imageUse', {});
  }

  /** The placement that contains `address`; undefined when the address is not assigned. */
  find(address: number): PlacedChunk | undefined {
    return this.#db.find(address);
  }

  /** Every layer that contains the chunk, oldest first. */
  layersOf(chunkId: number): LayerChunk[] {
    return this.#db.layersOf(chunkId);
  }

  /** True when every block of the range is verified and present. */
  isPresent(address: number, length: number): boolean {
    return this.#bytes.isPresent(address, length);
  }

  /**
   * Reads present bytes into `target`. The caller has seen, in this turn of the loop, that they are present.
   * Errors: STORE_IO, also when they were taken away meanwhile; STORE_CORRUPT when the disk changed them, and then they
   * are absent; CLOSED.
   */
  read(target: Buffer, at: number, length: number, address: number): Promise<void> {
    return this.#bytes.read(target, at, length, address);
  }

  /**
   * Verifies pieces that lie in `source` and stores the good ones; they are present when this returns.
   * Returns one byte per piece: 1 stored, 0 the bytes do not have their digest.
   * On a full disk others are evicted for them, where there are any that can be fetched again, unless `mayEvict` is false.
   * Errors: STORE_IO, STORE_FULL (then none of the pieces is counted as present by the caller), CLOSED.
   */
  async store(
    source: Uint8Array,
    pieces: readonly PieceToStore[],
    { mayEvict } = { mayEvict: true },
  ): Promise<Uint8Array> {
    this.#mustBeOpen();
    if (pieces.length === 0) return new Uint8Array(0);
    try {
      return await this.#space.whileWriting(pieces, () => this.#store(source, pieces));
    } catch (error) {
      const bytes = pieces.reduce((sum, { length }) => sum + length, 0);
      if (errorCode(error) !== 'STORE_FULL' || !mayEvict || !(await this.#space.makeRoom(bytes))) throw error;
      return await this.#space.whileWriting(pieces, () => this.#store(source, pieces));
    }
  }

  async #store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array> {
    const { stored, bytes } = await this.#bytes.store(source, pieces);
    this.#space.stored(bytes);
    return stored;
  }

  /**
   * Copies a file into the reserved region of the store, where the metadata of flat images lies, and makes it present.
   * `address` is a multiple of 4 KiB below the first chunk. Errors: STORE_IO, STORE_FULL, INVALID_ARGUMENT.
   */
  placeMetadata(address: number, file: string): Promise<void> {
    return this.#bytes.placeMetadata(address, file);
  }

  /** Makes everything that is present now durable. Errors: STORE_IO, STORE_FULL. */
  flush(): Promise<void> {
    this.#mustBeOpen();
    return this.#durability.flush();
  }

  /** The image with this key (a digest over its layers and layout), made when it is new: then its state is `building`. */
  createImage(key: string, layers: readonly number[], { ahead } = { ahead: false }): Promise<ImageRecord> {
    return this.#db.call('createImage', { key, layers, ahead });
  }

  /** Records that the metadata file of an image is complete and on the disk. */
  async imageReady(id: number, metadataBytes: number): Promise<void> {
    await this.#db.call('imageReady', { id, metadataBytes });
  }

  images(): Promise<ImageRecord[]> {
    return this.#db.call('images', {});
  }

  async dropImage(id: number): Promise<void> {
    await this.#db.call('dropImage', { id });
  }

  /** Keeps the chunks of these layers as long as the mount is not unpinned. */
  async pin(mountId: number, layers: readonly number[]): Promise<void> {
    this.#pinned.add(mountId);
    await this.#db.call('pin', { mountId, layers });
  }

  /** Those of a mount that reads the store itself are kept until its device is seen gone. */
  async unpin(mountId: number): Promise<void> {
    this.#pinned.delete(mountId);
    this.direct.forget(mountId);
    await this.#db.call('unpin', { mountId });
  }

  /** For a start: mounts of an earlier process are pinned anew as they are taken over. */
  async unpinAll(): Promise<void> {
    await this.#db.call('unpinAll', {});
  }

  async stats(): Promise<NodeStoreStats> {
    return {
      ...(await this.#db.call('totals', {})),
      storedBytes: this.#bytes.storedBytes,
      mismatches: this.#bytes.mismatches,
      damagedReads: this.#bytes.damagedReads,
      presentBytes: this.#space.presentBytes(),
      evictedPieces: this.#space.evictedPieces,
      evictedBytes: this.#space.evictedBytes,
      nextAddress: this.#changes.nextAddress,
      generation: this.#changes.generation,
    };
  }

  /** Flushes and closes file and database. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#space.close();
    await this.#bytes.settled();
    try {
      await this.#durability.flush();
    } catch {
      // Logged where it happened; what could not be flushed was never recorded.
    }
    await this.#changes.settled();
    try {
      await this.#db.close();
    } finally {
      await this.#file.close();
    }
  }
}

/** First chunk and number of chunks of every file that has any, alternating. */
function filesOf(index: LayerIndex): Uint32Array {
  const { entries } = index;
  const files: number[] = [];
  for (let i = 0; i < entries.count; i++) {
    if (entries.chunkCount[i]! > 0) files.push(entries.firstChunk[i]!, entries.chunkCount[i]!);
  }
  return Uint32Array.from(files);
}

/** What chunks of these lengths take in the store. */
function blockBytes(lengths: Uint32Array): number {
  let bytes = 0;
  for (const length of lengths) bytes += roundUp(length, BLOCK_BYTES);
  return bytes;
}
