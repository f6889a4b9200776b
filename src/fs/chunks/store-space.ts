// Gives disk and address space of the store back: punches out what is freed, evicts what was not used for longest when
// the quota or the disk is full, and ends quarantines. Owned by NodeStore, whose turns it takes. Every loss of presence is
// committed before anything is punched, and nothing is punched that is being written.
import { DedupError, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../../units.ts';
import { type ColdPiece, ColdPieces } from './cold-pieces.ts';
import type { Durability } from './durability.ts';
import type { IndexDb } from './index-db.ts';
import type { ColdChunks, ColdChunksRequest, StoreRange } from './index-protocol.ts';
import { countPresent, isAnyPresent } from './presence.ts';
import type { SpaceReserve } from './space-reserve.ts';
import type { StoreFile } from './store-file.ts';
import { BYTES_PER_SUM, FIRST_CHUNK_ADDRESS } from './store-layout.ts';
import type { NodeStoreOptions, PieceToStore } from './store-types.ts';
import type { Touched } from './touched.ts';
import { WriteGate } from './write-gate.ts';

/** What it needs of its store. */
export interface SpaceParts {
  readonly file: StoreFile;
  readonly db: IndexDb;
  readonly presence: Uint8Array;
  readonly touched: Touched;
  readonly durability: Durability;
  /** First address that is not given yet. */
  nextAddress(): number;
  /** Runs one change of generation at a time. */
  serially<T>(work: () => Promise<T>): Promise<T>;
  /** Runs a change of the database under a generation of its own; to be called serially. */
  underGeneration<T>(change: (generation: number) => Promise<T>, options?: { reuse: boolean }): Promise<T>;
  /** True while somebody reads the store of whom it is not known what: nothing may be punched, evicted or given again. */
  hasStrangers(): boolean;
  /** Room that is given up when the disk is full, for the database to record what is to be freed. */
  readonly reserve: SpaceReserve;
}

type SpaceOptions = Pick<
  NodeStoreOptions,
  'native' | 'log' | 'quotaBytes' | 'keepUsedMs' | 'quarantineMs' | 'livingImages'
>;

/** Mask of a chunk that is recorded as a whole only. */
const WHOLE = -1;
/** Bytes that are evicted with one commit at most. */
const BATCH_BYTES = 64 * MiB;
/** Chunks looked at at once. */
const PAGE_CHUNKS = 4096;
/** Part of the quota that is left after it was exceeded. */
const QUOTA_LEFT = 0.95;
/** How often what could not be done is tried again. */
const RETRY_MS = 10_000;
/** A timer may fire a little early. */
const TIMER_MS = 5;
/** Least that is evicted when the disk is full. */
const FULL_DISK_BYTES = 64 * MiB;

export class StoreSpace {
  readonly #parts: SpaceParts;
  readonly #native: NodeStoreOptions['native'];
  readonly #log: Logger;
  readonly #quotaBytes: number;
  readonly #keepUsedMs: number;
  readonly #quarantineMs: number;
  readonly #livingImages: NodeStoreOptions['livingImages'];
  readonly #gate = new WriteGate();
  /** Ranges that are punched once no stranger reads the store. */
  #postponed: StoreRange[] = [];
  /** Ends of readers and writers of chunks that were dropped. */
  readonly #leaving = new Set<Promise<void>>();
  #evicting: Promise<unknown> = Promise.resolve();
  #freedAtMs = Number.NEGATIVE_INFINITY;
  #presentBytes = Number.POSITIVE_INFINITY;
  #checking = false;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;
  evictedPieces = 0;
  evictedBytes = 0;

  constructor(parts: SpaceParts, options: SpaceOptions) {
    this.#parts = parts;
    this.#native = options.native;
    this.#log = options.log;
    this.#quotaBytes = options.quotaBytes ?? 0;
    this.#keepUsedMs = options.keepUsedMs ?? 10_000;
    this.#quarantineMs = options.quarantineMs ?? 5_000;
    this.#livingImages = options.livingImages;
  }

  get quotaBytes(): number {
    return this.#quotaBytes;
  }

  /** Bytes that may be served, in whole blocks. */
  presentBytes(): number {
    return countPresent(this.#parts.presence, FIRST_CHUNK_ADDRESS, this.#parts.nextAddress());
  }

  #mustBeOpen(): void {
    if (this.#closed) throw new DedupError('CLOSED', 'the node store is closed');
  }

  // --- Writers -------------------------------------------------------------------------------------------------------

  /** Runs a write of pieces: none of them is taken away meanwhile, and none that is being punched is written. */
  whileWriting<T>(pieces: readonly PieceToStore[], write: () => Promise<T>): Promise<T> {
    return this.#gate.write(
      pieces.map(({ address }) => address),
      write,
    );
  }

  /** Counts what was stored, and evicts in the background when there is too much. */
  stored(bytes: number): void {
    if (this.#quotaBytes === 0) return;
    this.#presentBytes += bytes;
    if (this.#presentBytes > this.#quotaBytes) void this.checkQuota();
  }

  // --- What has no chunk any more ------------------------------------------------------------------------------------

  /** Frees the disk space of ranges whose rows are gone; then they are in quarantine. */
  async punchFreed(ranges: readonly StoreRange[]): Promise<void> {
    if (ranges.length === 0) return;
    const done: StoreRange[] = [];
    for (const range of ranges) this.#takeAway(range);
    if (this.#parts.hasStrangers()) {
      this.#postponed.push(...ranges);
      return;
    }
    const ascending = ranges.toSorted((a, b) => a.address - b.address);
    await this.#gate.punch(ascending, async (hadWrites) => {
      // For a layer that was dropped meanwhile.
      if (hadWrites) for (const range of ranges) this.#takeAway(range);
      for (const range of ranges) {
        // What cannot be punched stays recorded and is punched at the next start; it is not given again meanwhile.
        if (await this.#punch(range)) done.push(range);
      }
    });
    this.#freedAtMs = performance.now();
    if (done.length === 0) return;
    await this.#parts.db.call('punched', { ranges: done });
    this.#retryLater(this.#quarantineMs + TIMER_MS);
  }

  /** Punches what could not be while strangers read the store. */
  punchPostponed(): Promise<void> {
    return this.punchFreed(this.#postponed.splice(0));
  }

  /** Frees what an earlier process evicted and did not come to punch. */
  async punchEvicted(ranges: readonly StoreRange[]): Promise<void> {
    const { presence, db } = this.#parts;
    const done: number[] = [];
    // The next start tries again.
    if (this.#parts.hasStrangers()) return;
    for (const range of ranges) {
      const firstBlock = range.address / BLOCK_BYTES;
      // Stored again since, and it could not be recorded that it had been punched.
      if (isAnyPresent(presence, firstBlock, range.length / BLOCK_BYTES) || (await this.#punch(range)))
        done.push(firstBlock);
    }
    if (done.length > 0) await db.call('evictedPunched', { blocks: Float64Array.from(done) });
  }

  /** Frees what a crash left where no chunk lies; at a start, before any address is given. */
  async punchUnowned(ranges: readonly StoreRange[]): Promise<void> {
    // The next start tries again.
    if (this.#parts.hasStrangers()) return;
    for (const range of ranges) await this.#punch(range);
  }

  /** Makes a range absent, for good: what waits to be recorded as durable there is not. */
  #takeAway({ address, length }: StoreRange): void {
    const { presence, durability } = this.#parts;
    const first = address / BLOCK_BYTES;
    const blocks = length / BLOCK_BYTES;
    durability.forget((piece) => piece.firstBlock < first + blocks && piece.firstBlock + piece.blocks > first);
    this.#native.presenceSet(presence, first, blocks, false);
  }

  async #punch({ address, length }: StoreRange): Promise<boolean> {
    const { file } = this.#parts;
    try {
      await this.#native.punchHole(file.buffered.fd, address, length);
      await this.#native.punchHole(file.sums.fd, address / BYTES_PER_SUM, length / BYTES_PER_SUM);
      return true;
    } catch (error) {
      this.#log.warn({ err: error, address, length }, 'a range of the store could not be freed');
      return false;
    }
  }

  /** No address is given again before this has settled: somebody may still read or write what was dropped. */
  waitFor(leaving: Promise<void>): void {
    const settled = leaving
      .catch((error: unknown) => {
        // It ended all the same, which is all that is waited for.
        this.#log.warn({ err: error }, 'waiting for the users of dropped layers');
      })
      .finally(() => this.#leaving.delete(settled));
    this.#leaving.add(settled);
  }

  /**
   * Ends the quarantine of every range, if nobody can see what was there: no image that is mounted anywhere and has no row
   * (one that has a row uses only chunks that have rows, which are elsewhere), nobody in this process. Returns the bytes of
   * address space that are free now and were not. Errors: STORE_IO, STORE_FULL, CLOSED, those of `livingImages`.
   */
  endQuarantine(): Promise<number> {
    return this.#parts.serially(async () => {
      this.#mustBeOpen();
      const { db, presence } = this.#parts;
      if (this.#leaving.size > 0 || this.#livingImages === undefined || this.#parts.hasStrangers()) return 0;
      if (performance.now() - this.#freedAtMs < this.#quarantineMs) return 0;
      const ranges = await db.call('quarantined', {});
      if (ranges.length === 0) return 0;
      // In this order: an image that is made now has no chunk in these ranges, and its row may be missing here.
      const known = new Set((await db.call('images', {})).map(({ id }) => id));
      const unknown = [...(await this.#livingImages(this.#parts.file.name))].filter((id) => !known.has(id));
      if (unknown.length > 0) {
        this.#log.debug({ images: unknown }, 'images that were removed are still mounted: no address is given again');
        return 0;
      }
      const free: StoreRange[] = [];
      for (const range of ranges) {
        // Written by somebody who had begun before the range was punched.
        const late = isAnyPresent(presence, range.address / BLOCK_BYTES, range.length / BLOCK_BYTES);
        this.#takeAway(range);
        if (!late || (await this.#punch(range))) free.push(range);
      }
      await this.#parts.underGeneration((generation) => db.call('endQuarantine', { ranges: free, generation }), {
        reuse: true,
      });
      return free.reduce((sum, { length }) => sum + length, 0);
    });
  }

  // --- Eviction ------------------------------------------------------------------------------------------------------

  /** Evicts down to 95 % of the quota when there is more than the quota. Never rejects. */
  async checkQuota(): Promise<void> {
    if (this.#checking || this.#quotaBytes === 0) return;
    this.#checking = true;
    try {
      for (;;) {
        this.#presentBytes = this.presentBytes();
        if (this.#presentBytes <= this.#quotaBytes) return;
        if ((await this.evictToQuota()) > 0) continue;
        // What is left was used just now, or must stay.
        this.#presentBytes = Number.NEGATIVE_INFINITY;
        this.#retryLater(RETRY_MS);
        return;
      }
    } catch (error) {
      if (errorCode(error) !== 'CLOSED') this.#log.warn({ err: error }, 'eviction failed');
      this.#presentBytes = Number.NEGATIVE_INFINITY;
      this.#retryLater(RETRY_MS);
    } finally {
      this.#checking = false;
    }
  }

  /** Bytes evicted because of the quota. Errors: as evict. */
  async evictToQuota(): Promise<number> {
    if (this.#quotaBytes === 0) return 0;
    const excess = this.presentBytes() - this.#quotaBytes;
    if (excess <= 0) return 0;
    return await this.evict(excess + this.#quotaBytes * (1 - QUOTA_LEFT));
  }

  /** Makes room on a full disk for a write of so many bytes. False when nothing could be evicted. */
  async makeRoom(bytes: number): Promise<boolean> {
    try {
      const freed = await this.evict(Math.max(FULL_DISK_BYTES, 4 * bytes));
      if (freed === 0) return false;
      this.#log.warn({ freed }, 'the disk is full: what was not used for longest was evicted');
      // A file system gives freed blocks out again once it has written down that they are free.
      await this.#parts.durability.flush();
      return true;
    } catch (error) {
      this.#log.warn({ err: error }, 'no room could be made on a full disk');
      return false;
    } finally {
      // Where there is room for it again.
      await this.#parts.reserve.fill();
    }
  }

  /**
   * Evicts about so many bytes of pieces that can be fetched again, those first that were not used for longest; fewer when
   * there are not as many. Returns the bytes evicted, in whole blocks. Errors: STORE_IO, STORE_FULL, CLOSED.
   */
  evict(wantedBytes: number): Promise<number> {
    const run = this.#evicting.then(() => this.#evict(wantedBytes));
    this.#evicting = run.catch(() => undefined);
    return run;
  }

  async #evict(wantedBytes: number): Promise<number> {
    // What is not durable yet is in no order.
    await this.#parts.durability.flush();
    const cold = new ColdPieces({
      page: (request) => this.#page(request),
      latestUse: (address, length) => this.#parts.touched.latest(address, length),
      isPresent: (address, length) =>
        isAnyPresent(this.#parts.presence, address / BLOCK_BYTES, roundUp(length, BLOCK_BYTES) / BLOCK_BYTES),
      usedBefore: Math.floor((Date.now() - this.#keepUsedMs) / 1000),
      pageChunks: PAGE_CHUNKS,
    });
    let freed = 0;
    while (freed < wantedBytes) {
      this.#mustBeOpen();
      const batch = await cold.take(Math.min(wantedBytes - freed, BATCH_BYTES));
      if (batch.length === 0 || this.#parts.hasStrangers()) break;
      freed += await this.#evictBatch(batch);
    }
    await cold.finish();
    return freed;
  }

  async #page(request: ColdChunksRequest): Promise<ColdChunks> {
    const { db, reserve } = this.#parts;
    return await db.call('coldChunks', request).catch(async (error: unknown) => {
      if (errorCode(error) !== 'STORE_FULL') throw error;
      await reserve.release();
      return await db.call('coldChunks', request);
    });
  }

  /** Commits the loss of pieces, makes them absent, and punches them. */
  #evictBatch(batch: readonly ColdPiece[]): Promise<number> {
    const { db, durability } = this.#parts;
    return this.#parts.serially(async () => {
      this.#mustBeOpen();
      if (this.#parts.hasStrangers()) return 0;
      const first = new Set(batch.map(({ firstBlock }) => firstBlock));
      const wholes = new Set(batch.filter(({ mask }) => mask === WHOLE).map(({ placementBlock }) => placementBlock));
      // Before the commit: what is recorded afterwards would be durable again.
      durability.forget(({ firstBlock, placementBlock }) => first.has(firstBlock) || wholes.has(placementBlock));
      const punched = Promise.withResolvers<void>();
      const gone: ColdPiece[] = [];
      const stays: ColdPiece[] = [];
      try {
        await this.#parts.underGeneration(async (generation) => {
          const taken = await db.call('evict', {
            blocks: Float64Array.from(batch, ({ placementBlock }) => placementBlock),
            masks: Int32Array.from(batch, ({ mask }) => mask),
            ranges: Float64Array.from(batch.flatMap(({ firstBlock, blocks }) => [firstBlock, blocks])),
            generation,
          });
          // In this turn: whoever holds one of these chunks after us finds it absent.
          for (const [i, piece] of batch.entries())
            if (taken[i] === 1) this.#makeAbsent(piece, punched.promise, gone, stays);
        });
        if (stays.length > 0)
          await db.call('evictedPunched', { blocks: Float64Array.from(stays, ({ firstBlock }) => firstBlock) });
        return await this.#punchGone(gone);
      } finally {
        for (const { firstBlock } of gone) this.#gate.openPiece(firstBlock * BLOCK_BYTES);
        punched.resolve();
      }
    });
  }

  #makeAbsent(piece: ColdPiece, punched: Promise<void>, gone: ColdPiece[], stays: ColdPiece[]): void {
    const { presence, durability } = this.#parts;
    const { firstBlock, blocks } = piece;
    const address = firstBlock * BLOCK_BYTES;
    if (this.#gate.isWriting(address)) {
      // Somebody found it here a moment ago, or is writing it: it stays, and is recorded again.
      if (piece.mask !== WHOLE) durability.add([piece], blocks * BLOCK_BYTES);
      stays.push(piece);
      return;
    }
    // What was stored anew while the loss was committed is lost, too.
    durability.forget((fresh) => fresh.firstBlock === firstBlock);
    this.#gate.closePiece(address, punched);
    this.#native.presenceSet(presence, firstBlock, blocks, false);
    gone.push(piece);
  }

  async #punchGone(gone: readonly ColdPiece[]): Promise<number> {
    const { db } = this.#parts;
    let freed = 0;
    const done: number[] = [];
    const sorted = gone.toSorted((a, b) => a.firstBlock - b.firstBlock);
    for (let i = 0; i < sorted.length; ) {
      const { firstBlock } = sorted[i]!;
      let end = firstBlock;
      const members: number[] = [];
      for (; i < sorted.length && sorted[i]!.firstBlock === end; i++) {
        members.push(end);
        end += sorted[i]!.blocks;
      }
      const range = { address: firstBlock * BLOCK_BYTES, length: (end - firstBlock) * BLOCK_BYTES };
      if (!(await this.#punch(range))) continue;
      freed += range.length;
      done.push(...members);
    }
    if (done.length > 0) await db.call('evictedPunched', { blocks: Float64Array.from(done) });
    await this.#parts.reserve.fill();
    this.evictedPieces += done.length;
    this.evictedBytes += freed;
    return freed;
  }

  // --- In the background ---------------------------------------------------------------------------------------------

  /** Begins what has to be done after a start. */
  start(): void {
    this.#retryLater(this.#quarantineMs + TIMER_MS);
    void this.checkQuota();
  }

  #retryLater(ms: number): void {
    if (this.#closed || this.#timer !== undefined) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      void this.#retry();
    }, ms).unref();
  }

  async #retry(): Promise<void> {
    try {
      await this.endQuarantine();
      await this.checkQuota();
      if (this.#closed || (await this.#parts.db.call('quarantined', {})).length === 0) return;
      const restsMs = this.#quarantineMs - (performance.now() - this.#freedAtMs);
      this.#retryLater(restsMs > 0 ? restsMs + TIMER_MS : RETRY_MS);
    } catch (error) {
      if (errorCode(error) === 'CLOSED') return;
      this.#log.warn({ err: error }, 'space is given back later');
      this.#retryLater(RETRY_MS);
    }
  }

  /** Resolves when the quarantine of what was freed so far may end: some seconds at most. */
  async quarantineOver(): Promise<void> {
    await Promise.all(this.#leaving);
    const leftMs = this.#quarantineMs - (performance.now() - this.#freedAtMs);
    if (leftMs > 0) await new Promise((resolve) => setTimeout(resolve, leftMs));
  }

  /** Begins nothing any more. What is under way ends by itself. */
  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }
}
