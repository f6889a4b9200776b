// The node store: one sparse file that holds each distinct chunk once, and the database that says what lies where.
// Owned by dedupd; used by image building (addresses) and the LazyLoader (presence, reads, writes). Knows no registry.
import { createHash } from 'node:crypto';
import { mkdir, readFile } from 'node:fs/promises';
import { DedupError, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../../units.ts';
import type { LayerIndex } from '../index/layer-index.ts';
import { ChunkKeeper } from './chunk-keeper.ts';
import { DirectMounts, type DirectTarget } from './direct-mounts.ts';
import { Durability, type FreshPiece } from './durability.ts';
import { IndexDb, type LayerChunk, type PlacedChunk } from './index-db.ts';
import type { ImageRecord, ImageUse, LayerRecord, LayerSourceName, StoreRange } from './index-protocol.ts';
import { countPresentBlocks } from './presence.ts';
import { SpaceReserve } from './space-reserve.ts';
import { StoreFile } from './store-file.ts';
import {
  DEFAULT_STORE_BYTES,
  FIRST_CHUNK_ADDRESS,
  HEADER_ADDRESS,
  HIGH_WATER_STEP,
  MAX_MASKED_PIECES,
  STORE_HEAD_BYTES,
  STORE_TAIL_BYTES,
} from './store-layout.ts';
import { StoreSpace } from './store-space.ts';
import type {
  AddLayerOptions,
  NodeStoreOptions,
  NodeStoreStats,
  PieceToStore,
  StoredLayer,
  StoreNative,
} from './store-types.ts';
import { takenAway } from './taken-away.ts';
import { Touched } from './touched.ts';

export type {
  AddLayerOptions,
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
  #highWater: number;
  #nextAddress: number;
  #generation: number;
  readonly #space: StoreSpace;
  readonly #touched: Touched;
  #storedBytes = 0;
  #mismatches = 0;
  #damagedReads = 0;
  /** Chain of calls that change generation or high water: one at a time. */
  #exclusive: Promise<unknown> = Promise.resolve();
  #closed = false;
  #lastHold = 0;
  #presenceLost = false;
  #direct: DirectMounts | undefined;
  /** Mounts that are pinned as such, whether they read the store themselves or not. */
  readonly #pinned = new Set<number>();
  /** Native calls that use the store's descriptors, which must not be closed, and perhaps reused, under them. */
  readonly #using = new Set<Promise<unknown>>();

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
    this.#generation = state.generation;
    this.#nextAddress = state.nextAddress;
    this.#foreignImages = state.foreignImages;
    this.#touched = new Touched(options.native.touchedCreate(file.header.storeBytes));
    this.#highWater = file.header.highWater;
    this.#reserve = new SpaceReserve(options.paths.storeReserve, options.reserveBytes ?? 16 * MiB);
    this.#durability = new Durability(
      {
        sync: () => file.sync(),
        record: async (pieces) => {
          await db.call('markDurable', pieces);
        },
        forget: (firstBlock, blocks) => this.#clear(firstBlock, blocks),
      },
      { delayMs: options.flushDelayMs ?? 2000, maxBytes: options.flushBytes ?? 64 * MiB },
      options.log,
    );
    this.#space = new StoreSpace(
      {
        file,
        db,
        presence,
        touched: this.#touched,
        durability: this.#durability,
        nextAddress: () => this.#nextAddress,
        serially: (work) => this.#serially(work),
        underGeneration: (change, how) => this.#underGeneration(change, how),
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
      dropHoles: (ranges) => this.#dropHoles(ranges),
      clearEpoch: () => this.#native.presenceClearEpoch(),
      flush: async (metadata) => {
        this.#mustBeOpen();
        // What a call has written is present before the call has returned and handed it on to be flushed.
        await Promise.allSettled(this.#using);
        await this.#durability.flush(metadata);
      },
      serially: (work) => this.#serially(work),
      strangersGone: () => this.#serially(() => this.#space.punchPostponed()),
    };
  }

  async #dropHoles(ranges: Float64Array): Promise<boolean> {
    const holes = await this.#track(this.#native.findHoles(this.fd, ranges));
    for (let i = 0; i + 1 < holes.length; i += 2) {
      this.#clear(holes[i]!, holes[i + 1]!);
      this.damaged(holes[i]! * BLOCK_BYTES, holes[i + 1]! * BLOCK_BYTES);
    }
    return holes.length > 0;
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
    this.#damagedReads++;
    this.#log.error({ address, length }, 'the disk changed bytes of the store: they are not served but fetched again');
  }

  #mustBeOpen(): void {
    if (this.#closed) throw new DedupError('CLOSED', 'the node store is closed');
  }

  #track<T>(work: Promise<T>): Promise<T> {
    this.#using.add(work);
    const settled = (): void => void this.#using.delete(work);
    work.then(settled, settled);
    return work;
  }

  /** Runs one change of generation or high water at a time. */
  #serially<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#exclusive.then(work);
    this.#exclusive = result.catch(() => undefined);
    return result;
  }

  /**
   * Records a layer and gives its chunks addresses; known chunks keep theirs. Adding the same layer again returns the
   * same addresses. Errors: INDEX_INVALID, STORE_FULL, STORE_IO, CLOSED.
   */
  async addLayer(index: LayerIndex, options: AddLayerOptions): Promise<StoredLayer> {
    this.#mustBeOpen();
    const { chunks } = index;
    const result = await this.#serially(async () => {
      await this.#raiseHighWater(this.#mostBytes(index));
      const added = await this.#db.call('addLayer', {
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
      });
      this.#nextAddress = Math.max(this.#nextAddress, added.nextAddress);
      return added;
    });
    return { layerId: result.layerId, addresses: result.addresses };
  }

  /**
   * Keeps the chunks of a layer that is being read, from before its index is known until the layer is added or the keeper
   * is disposed of: then what no layer counts is freed. For layouts that need no contiguous files.
   */
  keepChunks(options: { scope: string; chunkBytes: number; pieceBytes: number }): ChunkKeeper {
    this.#mustBeOpen();
    const hold = ++this.#lastHold;
    const { scope, pieceBytes } = options;
    return new ChunkKeeper(
      {
        hold: (digests, lengths) =>
          this.#serially(async () => {
            this.#mustBeOpen();
            let bytes = 0;
            for (const length of lengths) bytes += roundUp(length, BLOCK_BYTES);
            await this.#raiseHighWater(bytes);
            const held = await this.#db.call('holdChunks', { hold, scope, digests, lengths, pieceBytes });
            this.#nextAddress = Math.max(this.#nextAddress, held.nextAddress);
            return held.addresses;
          }),
        isPresent: (address, length) => this.isPresent(address, length),
        store: (source, pieces) => this.store(source, pieces),
        release: () => this.#releaseHold(hold),
      },
      options,
    );
  }

  async #releaseHold(hold: number): Promise<void> {
    if (this.#closed) return; // The next start frees them.
    await this.#serially(async () => {
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
    const { ranges, result } = await this.#underGeneration(change);
    await this.#space.punchFreed(ranges);
    await this.#reserve.fill();
    return result;
  }

  /**
   * Runs a change of the database under a generation of its own, so that a copy from before it is told. `reuse`: it makes
   * addresses free to be given again. To be called serially.
   */
  async #underGeneration<T>(change: (generation: number) => Promise<T>, { reuse } = { reuse: false }): Promise<T> {
    const next = this.#generation + 1;
    await this.#file.writeHeader({ pendingGeneration: next, ...(reuse ? { reuseGeneration: next } : {}) });
    const result = await change(next).catch(async (error: unknown) => {
      if (errorCode(error) !== 'STORE_FULL') throw error;
      await this.#reserve.release();
      return await change(next);
    });
    await this.#file.writeHeader({ generation: next });
    this.#generation = next;
    return result;
  }

  /** Address space that the layer takes if none of its chunks is known. */
  #mostBytes(index: LayerIndex): number {
    let bytes = 0;
    for (let i = 0; i < index.chunks.count; i++)
      bytes += Math.ceil(index.chunks.length[i]! / BLOCK_BYTES) * BLOCK_BYTES;
    return bytes;
  }

  /** Makes sure that the header admits `bytes` more of addresses before any is given. */
  async #raiseHighWater(bytes: number): Promise<void> {
    const needed = this.#nextAddress + bytes;
    if (needed <= this.#highWater) return;
    const highWater = Math.ceil(needed / HIGH_WATER_STEP) * HIGH_WATER_STEP;
    await this.#file.writeHeader({ highWater });
    this.#highWater = highWater;
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
    return this.#serially(async () => {
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
    return this.#native.presenceTest(this.presence, address / BLOCK_BYTES, Math.ceil(length / BLOCK_BYTES));
  }

  /**
   * Reads present bytes into `target`. The caller has seen, in this turn of the loop, that they are present.
   * Errors: STORE_IO, also when they were taken away meanwhile; STORE_CORRUPT when the disk changed them, and then they
   * are absent; CLOSED.
   */
  async read(target: Buffer, at: number, length: number, address: number): Promise<void> {
    this.#touched.touch(address, length);
    for (;;) {
      this.#mustBeOpen();
      const { presence } = this;
      const job = { fd: this.fd, sumsFd: this.sumsFd, presence, target, at, length, address };
      const result = await this.#track(this.#native.readStore(job));
      if (result === 'read') return;
      if (result === 'damaged') {
        this.damaged(address, length);
        throw takenAway('STORE_CORRUPT', `the disk changed bytes of the store at ${address}`);
      }
      // Something was taken away while the disk was read, here or elsewhere.
      if (!this.isPresent(address, length)) {
        throw takenAway('STORE_IO', `address ${address} of the store was taken away while it was read`);
      }
    }
  }

  /**
   * Verifies pieces that lie in `source` and stores the good ones; they are present when this returns.
   * Returns one byte per piece: 1 stored, 0 the bytes do not have their digest.
   * On a full disk others are evicted for them, where there are any that can be fetched again.
   * Errors: STORE_IO, STORE_FULL (then none of the pieces is counted as present by the caller), CLOSED.
   */
  async store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array> {
    this.#mustBeOpen();
    if (pieces.length === 0) return new Uint8Array(0);
    try {
      return await this.#space.whileWriting(pieces, () => this.#store(source, pieces));
    } catch (error) {
      const bytes = pieces.reduce((sum, { length }) => sum + length, 0);
      if (errorCode(error) !== 'STORE_FULL' || !(await this.#space.makeRoom(bytes))) throw error;
      return await this.#space.whileWriting(pieces, () => this.#store(source, pieces));
    }
  }

  async #store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array> {
    this.#mustBeOpen();
    const count = pieces.length;
    const offsets = new Float64Array(count);
    const lengths = new Uint32Array(count);
    const addresses = new Float64Array(count);
    const digests = new Uint8Array(count * 32);
    for (const [i, piece] of pieces.entries()) {
      offsets[i] = piece.offset;
      lengths[i] = piece.length;
      addresses[i] = piece.address;
      digests.set(piece.digest, i * 32);
      this.#touched.touch(piece.address, piece.length);
    }
    const failures = this.#durability.failures;
    const { presence } = this;
    const { fd } = this.#file.direct;
    const { sumsFd } = this;
    let stored: Uint8Array;
    try {
      stored = await this.#track(
        this.#native.storePieces({ fd, sumsFd, source, offsets, lengths, digests, addresses, presence }),
      );
    } catch (error) {
      // Which of them were written is not known; none may stay present without waiting for a flush.
      for (const { address, length } of pieces) this.#forget(address, length);
      throw error;
    }
    const fresh: FreshPiece[] = [];
    let bytes = 0;
    for (const [i, piece] of pieces.entries()) {
      if (stored[i] !== 1) {
        this.#mismatches++;
        continue;
      }
      const blocks = Math.ceil(piece.length / BLOCK_BYTES);
      const mask = this.#maskOf(piece);
      fresh.push({
        placementBlock: piece.chunkAddress / BLOCK_BYTES,
        mask,
        firstBlock: piece.address / BLOCK_BYTES,
        blocks,
      });
      bytes += blocks * BLOCK_BYTES;
    }
    if (this.#durability.failures !== failures) {
      // A flush failed while this was being written: the disk may have lost it.
      for (const piece of fresh) this.#clear(piece.firstBlock, piece.blocks);
      throw new DedupError('STORE_IO', 'the store could not be flushed while pieces were written');
    }
    this.#storedBytes += bytes;
    this.#durability.add(fresh, bytes);
    this.#space.stored(bytes);
    return stored;
  }

  #forget(address: number, length: number): void {
    this.#clear(address / BLOCK_BYTES, Math.ceil(length / BLOCK_BYTES));
  }

  /** Makes blocks absent: before they are punched, so that whoever reads them meanwhile can tell. */
  #clear(firstBlock: number, blocks: number): void {
    this.#native.presenceSet(this.presence, firstBlock, blocks, false);
  }

  #maskOf(piece: PieceToStore): number {
    if (piece.pieceCount <= MAX_MASKED_PIECES) return 1 << piece.piece;
    return this.isPresent(piece.chunkAddress, piece.chunkBytes) ? -1 : 0;
  }

  /**
   * Copies a file into the reserved region of the store, where the metadata of flat images lies, and makes it present.
   * `address` is a multiple of 4 KiB below the first chunk. Errors: STORE_IO, STORE_FULL, INVALID_ARGUMENT.
   */
  async placeMetadata(address: number, file: string): Promise<void> {
    this.#mustBeOpen();
    const bytes = await readFile(file);
    if (address % BLOCK_BYTES !== 0 || address < STORE_HEAD_BYTES || address + bytes.length > HEADER_ADDRESS) {
      throw new DedupError('INVALID_ARGUMENT', `metadata cannot lie at address ${address} of the store`);
    }
    // What an earlier image left there must not pass for this one's: present blocks are not written again.
    this.#forget(address, bytes.length);
    const offsets = Array.from({ length: Math.ceil(bytes.length / MiB) }, (_, i) => i * MiB);
    const parts = offsets.map((offset) => bytes.subarray(offset, offset + MiB));
    const stored = await this.#track(
      this.#native.storePieces({
        fd: this.#file.direct.fd,
        sumsFd: this.sumsFd,
        source: bytes,
        offsets: Float64Array.from(offsets),
        lengths: Uint32Array.from(parts, (part) => part.length),
        digests: Buffer.concat(parts.map((part) => createHash('sha256').update(part).digest())),
        addresses: Float64Array.from(offsets, (offset) => address + offset),
        presence: this.presence,
      }),
    );
    if (!stored.every((good) => good === 1)) throw new DedupError('STORE_IO', `metadata ${file} could not be stored`);
  }

  /** Makes everything that is present now durable. Errors: STORE_IO, STORE_FULL. */
  flush(): Promise<void> {
    this.#mustBeOpen();
    return this.#durability.flush();
  }

  /** The image with this key (a digest over its layers and layout), made when it is new: then its state is `building`. */
  createImage(key: string, layers: readonly number[], reference = ''): Promise<ImageRecord> {
    return this.#db.call('createImage', { key, layers, reference });
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
      storedBytes: this.#storedBytes,
      mismatches: this.#mismatches,
      damagedReads: this.#damagedReads,
      presentBytes: this.#space.presentBytes(),
      evictedPieces: this.#space.evictedPieces,
      evictedBytes: this.#space.evictedBytes,
      nextAddress: this.#nextAddress,
      generation: this.#generation,
    };
  }

  /** Flushes and closes file and database. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#space.close();
    await Promise.allSettled(this.#using);
    try {
      await this.#durability.flush();
    } catch {
      // Logged where it happened; what could not be flushed was never recorded.
    }
    await this.#exclusive;
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
