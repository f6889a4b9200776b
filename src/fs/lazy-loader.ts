// Store addresses wanted → bytes here: the one place where on-demand reads and prefetch meet. Transports call read(),
// prefetch calls ensure(). Answers with verified bytes or an error, never with anything in between.
import { LRUCache } from 'lru-cache';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { BLOCK_BYTES, type ByteRange, MiB } from '../units.ts';
import { isTakenAway, takenAway } from './chunks/taken-away.ts';
import { FetchAhead } from './fetch-ahead.ts';
import type { LayerMap, LayerProvider } from './loadable-layer.ts';
import { OpenLayers, type Slot, slotIn } from './open-layers.ts';
import { type PieceBytes, PieceLoader, type PieceStore } from './piece-loader.ts';
import { DEFAULT_FETCH_LIMITS, type FetchLimits, type FetchStats, SpanFetcher } from './span-fetcher.ts';
import { Priority, type SpanLedger } from './span-ledger.ts';
import type { LoaderNative } from './span-storer.ts';

/** What the loader needs of the node store: look-ups, reads, verified writes. */
export interface ReadableStore extends PieceStore {
  readonly storeBytes: number;
  layersOf(chunkId: number): { layerId: number; seq: number }[];
}

export { Priority };

export interface LazyLoaderOptions {
  readonly store: ReadableStore;
  readonly layers: LayerProvider;
  readonly native: LoaderNative;
  readonly log: Logger;
  readonly limits?: Partial<FetchLimits>;
  /** An on-demand read fails with DEADLINE after this time; below 100 s, the kernel's patience. */
  readonly deadlineMs?: number;
  /** A failed piece fails again at once for this long. */
  readonly failureMs?: number;
  /** Memory for opened layers, bytes. */
  readonly layerBytes?: number;
  /** Fetch what lies around the misses of a start. Default false. */
  readonly guess?: boolean;
  /** Told of every read that had to wait for a fetch and was answered: how long it took, milliseconds. */
  readonly onWaited?: ((ms: number) => void) | undefined;
}

export interface ReadOptions {
  /** Numbers of the layers of the image that reads: they are preferred as the place to fetch from. */
  readonly layers: readonly number[];
  readonly signal?: AbortSignal;
}

export interface LoaderStats extends FetchStats {
  /** On-demand reads, and those of them that had to wait for a fetch. */
  readonly reads: number;
  readonly misses: number;
  readonly failedReads: number;
  /** Time that reads with a miss took, milliseconds. */
  readonly waitMs: number;
  readonly maxWaitMs: number;
  readonly edgeBytes: number;
}

/** A read that meets blocks which are taken away under it begins anew this often at most. */
const READ_ATTEMPTS = 4;

const ZEROS = Buffer.alloc(BLOCK_BYTES);

export class LazyLoader {
  readonly #store: ReadableStore;
  readonly #log: Logger;
  readonly #fetcher: SpanFetcher;
  readonly #deadlineMs: number;
  readonly #onWaited: ((ms: number) => void) | undefined;
  readonly #layers: OpenLayers;
  readonly #loader: PieceLoader;
  /** Pieces on their way, by address. */
  readonly #pieces = new Map<number, Promise<PieceBytes>>();
  readonly #failed: LRUCache<number, DedupError>;
  /** How often layers were dropped. */
  #drops = 0;
  readonly #ahead: FetchAhead;
  readonly #abort = new AbortController();
  #reads = 0;
  #misses = 0;
  #failedReads = 0;
  #waitMs = 0;
  #maxWaitMs = 0;

  constructor(options: LazyLoaderOptions) {
    this.#store = options.store;
    this.#log = options.log;
    this.#deadlineMs = options.deadlineMs ?? 60_000;
    this.#onWaited = options.onWaited;
    this.#fetcher = new SpanFetcher(
      options.store,
      options.native,
      { ...DEFAULT_FETCH_LIMITS, ...options.limits },
      options.log,
    );
    this.#ahead = new FetchAhead({
      fetch: (map, span, priority) => this.#fetcher.fetch(map, span, priority),
      roundTripBytes: (map) => this.#fetcher.sources.link(map).roundTripBytes,
      usefulness: (origin, nowMs) => this.#fetcher.ledger.usefulness(origin, nowMs),
      guess: options.guess ?? false,
      isPresent: (address, length) => options.store.isPresent(address, length),
      log: options.log,
    });
    this.#layers = new OpenLayers({
      provider: options.layers,
      store: options.store,
      maxBytes: options.layerBytes ?? 32 * MiB,
      isDropped: (layerId) => this.#fetcher.isForgotten(layerId),
      onClosed: (layerId) => this.#ahead.forget(layerId),
    });
    this.#loader = new PieceLoader({
      store: options.store,
      fetcher: this.#fetcher,
      onMiss: (map, spans) => this.#ahead.onMiss(map, spans),
      log: options.log,
    });
    this.#failed = new LRUCache({ max: 4096, ttl: options.failureMs ?? 1000 });
  }

  stats(): LoaderStats {
    return {
      ...this.#fetcher.stats(),
      reads: this.#reads,
      misses: this.#misses,
      failedReads: this.#failedReads,
      waitMs: this.#waitMs,
      maxWaitMs: this.#maxWaitMs,
      edgeBytes: this.#fetcher.edges.bytes,
    };
  }

  /**
   * Exactly the bytes of a range of the store, as parts one after the other. `range` is in whole blocks.
   * Errors: STORE_IO for an address that is not assigned; REGISTRY_*, DIGEST_MISMATCH, LAYER_INVALID, STORE_FULL,
   * DEADLINE, CANCELLED, CLOSED.
   */
  async read(range: ByteRange, options: ReadOptions): Promise<Buffer[]> {
    this.#mustBeOpen();
    this.#reads++;
    const started = performance.now();
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#readOnce(range, options, this.#deadlineMs - (performance.now() - started));
      } catch (error) {
        // The disk changed them, or somebody who read them beside us found that: this time they are fetched.
        if (isTakenAway(error) && attempt < READ_ATTEMPTS) continue;
        this.#failedReads++;
        throw error;
      }
    }
  }

  async #readOnce(range: ByteRange, options: ReadOptions, deadlineMs: number): Promise<Buffer[]> {
    if (this.#store.isPresent(range.offset, range.length)) return [await this.#readStore(range.offset, range.length)];
    const started = performance.now();
    this.#misses++;
    const slots = this.#layers.locate(range, options.layers);
    const work = this.#obtainAll(slots, options.layers, Priority.onDemand);
    const bytes = await this.#withDeadline(work, options.signal, deadlineMs);
    const parts = await this.#compose(range, slots, bytes);
    const waited = performance.now() - started;
    this.#waitMs += waited;
    this.#maxWaitMs = Math.max(this.#maxWaitMs, waited);
    this.#onWaited?.(waited);
    this.#logMiss(range, slots, waited);
    return parts;
  }

  #logMiss(range: ByteRange, slots: readonly Slot[], waitedMs: number): void {
    if (!this.#log.isLevelEnabled('debug')) return;
    const ref = slots.find((slot) => slot.ref !== undefined)?.ref;
    const where = ref && {
      layer: ref.map.blob.digest,
      chunk: ref.chunk,
      piece: ref.piece,
      spans: [...ref.map.spansOf(ref)],
    };
    this.#log.debug({ ...range, waitedMs, ...where }, 'a read waited for the registry');
  }

  /** Brings ranges of the store here without reading them. Errors as read(); the first one ends it. */
  async ensure(ranges: readonly ByteRange[], options: ReadOptions & { readonly priority: number }): Promise<void> {
    this.#mustBeOpen();
    options.signal?.throwIfAborted();
    const slots = ranges.flatMap((range) => this.#layers.locate(range, options.layers));
    await this.#obtainAll(slots, options.layers, options.priority);
  }

  /** The bytes of a range that ensure() brought here. Errors: STORE_IO when it is not here. */
  async readHere(range: ByteRange): Promise<Buffer> {
    if (!this.#store.isPresent(range.offset, range.length)) {
      throw new DedupError('STORE_IO', `address ${range.offset} of the store is not here`);
    }
    return await this.#readStore(range.offset, range.length);
  }

  /** Layers as they are open here: their chunks, addresses and spans. Errors: those of the provider. */
  async maps(layerIds: readonly number[]): Promise<LayerMap[]> {
    this.#mustBeOpen();
    return await Promise.all(layerIds.map((layerId) => this.#layers.open(layerId)));
  }

  /** Says whether a trace tells what will be read of layers: nothing is guessed around their misses then. */
  foresee(layerIds: readonly number[], known: boolean): void {
    this.#ahead.foresee(layerIds, known);
  }

  /** Whole spans, for plans. */
  get batches(): SpanFetcher {
    return this.#fetcher;
  }

  /** Why spans were fetched, and whether they were read. */
  get ledger(): SpanLedger {
    return this.#fetcher.ledger;
  }

  /** Opens layers that are likely to be read soon: the first read does not wait for it. Errors: those of the provider. */
  async open(layerIds: readonly number[]): Promise<void> {
    await this.maps(layerIds);
  }

  /** Forgets layers that were dropped: nothing is fetched for them any more, and what is under way is given up. */
  forget(layerIds: readonly number[]): void {
    for (const layerId of layerIds) {
      this.#layers.forget(layerId);
      this.#ahead.forget(layerId);
    }
    this.#drops++;
    this.#failed.clear();
    this.#fetcher.forget(layerIds);
  }

  /**
   * What is under way for these layers is given up, and until the answer is called nothing is fetched for those of them that
   * `goes` still says are going: whoever reads them gets an error instead of waiting, and nothing of it is remembered.
   */
  suspend(layerIds: readonly number[], goes: (layerId: number) => boolean): () => void {
    if (layerIds.length === 0) return () => undefined;
    const forgetFailures = (): void => {
      this.#drops++;
      this.#failed.clear();
    };
    forgetFailures();
    const resume = this.#fetcher.suspend(layerIds, goes);
    return () => {
      resume();
      forgetFailures();
    };
  }

  /**
   * Resolves once everything that is being read or stored now has ended. After forget(): nobody here reads or writes for
   * the layers that were dropped any more. Never rejects.
   */
  async drained(): Promise<void> {
    await Promise.allSettled([...this.#pieces.values(), this.#layers.drained(), this.#fetcher.drained()]);
  }

  #mustBeOpen(): void {
    if (this.#abort.signal.aborted) throw new DedupError('CLOSED', 'the loader is closed');
  }

  async #withDeadline<T>(work: Promise<T>, signal: AbortSignal | undefined, deadlineMs: number): Promise<T> {
    const { promise, reject } = Promise.withResolvers<never>();
    const late = (): void => reject(new DedupError('DEADLINE', `a read waited for ${this.#deadlineMs} ms`));
    const cancelled = (): void => reject(new DedupError('CANCELLED', 'the read was given up'));
    const closed = (): void => reject(new DedupError('CLOSED', 'the loader is closed'));
    const timer = setTimeout(late, deadlineMs);
    signal?.addEventListener('abort', cancelled, { once: true });
    this.#abort.signal.addEventListener('abort', closed, { once: true });
    try {
      return await Promise.race([work, promise]);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', cancelled);
      this.#abort.signal.removeEventListener('abort', closed);
    }
  }

  #obtainAll(slots: readonly Slot[], layers: readonly number[], priority: number): Promise<PieceBytes[]> {
    return Promise.all(slots.map((slot) => this.#obtain(slot, layers, priority)));
  }

  /** One flight per piece. */
  #obtain(slot: Slot, layers: readonly number[], priority: number): Promise<PieceBytes> | undefined {
    const { address } = slot;
    if (this.#store.isPresent(address, slot.length)) return undefined;
    const failed = this.#failed.get(address);
    if (failed !== undefined) return Promise.reject(failed);
    const known = this.#pieces.get(address);
    if (known !== undefined) {
      if (priority >= Priority.onDemand) this.#promote(slot);
      return known;
    }
    const drops = this.#drops;
    const work = this.#load(slot, layers, priority);
    this.#pieces.set(address, work);
    work.then(
      () => this.#pieces.delete(address),
      (error: unknown) => {
        this.#pieces.delete(address);
        // What a dropped layer made fail says nothing of the chunk that lies there next, or of another layer with this one.
        if (errorCode(error) === 'CLOSED' || this.#drops !== drops) return;
        this.#failed.set(address, error instanceof DedupError ? error : wrapError(error, `loading ${address}`));
      },
    );
    return work;
  }

  /** Moves the spans of a piece that prefetch already waits for to the front. */
  #promote(slot: Slot): void {
    if (slot.ref === undefined) return;
    for (const span of slot.ref.map.spansOf(slot.ref)) this.#fetcher.promote(slot.ref.map, span, Priority.onDemand);
  }

  /** Brings one piece here; once more where a layer was dropped under it, as another one may have come to have the chunk. */
  async #load(slot: Slot, layers: readonly number[], priority: number): Promise<PieceBytes> {
    let from = slot;
    for (let attempt = 1; ; attempt++) {
      const drops = this.#drops;
      try {
        return await this.#loadOnce(from, layers, priority);
      } catch (error) {
        const again = this.#drops !== drops && attempt < READ_ATTEMPTS && !this.#abort.signal.aborted;
        if (!again || this.#store.find(slot.address) === undefined) throw error;
        from = { ...slot, chunkId: undefined, ref: undefined };
      }
    }
  }

  /** From whichever layer can deliver it: those of the image first. */
  async #loadOnce(slot: Slot, layers: readonly number[], priority: number): Promise<PieceBytes> {
    if (slot.ref !== undefined) {
      try {
        return await this.#loader.load(slot.ref, priority);
      } catch (error) {
        if (!worthAnotherLayer(error)) throw error;
        return await this.#loadFromOthers(slot, layers, priority, slot.ref.map.layerId, error);
      }
    }
    return await this.#loadFromOthers(slot, layers, priority, undefined, undefined);
  }

  async #loadFromOthers(
    slot: Slot,
    layers: readonly number[],
    priority: number,
    tried: number | undefined,
    cause: unknown,
  ): Promise<PieceBytes> {
    const chunkId = slot.chunkId ?? this.#store.find(slot.address)?.chunkId;
    const all = chunkId === undefined ? [] : this.#store.layersOf(chunkId).map(({ layerId }) => layerId);
    const ids = [...new Set([...all.filter((id) => layers.includes(id)), ...all])].filter((id) => id !== tried);
    let failure = cause;
    for (const layerId of ids.slice(0, 4)) {
      try {
        const map = await this.#layers.open(layerId);
        const ref = slotIn(map, slot.address)?.ref;
        // The layer may hold the chunk at another of its placements only.
        if (ref !== undefined) return await this.#loader.load(ref, priority);
      } catch (error) {
        failure ??= error;
        if (!worthAnotherLayer(error)) break;
      }
    }
    throw failure ?? new DedupError('STORE_CORRUPT', `no layer delivers address ${slot.address} of the store`);
  }

  async #readStore(address: number, length: number): Promise<Buffer> {
    const target = Buffer.allocUnsafeSlow(length);
    await this.#store.read(target, 0, length, address);
    return target;
  }

  /** Cuts the range out of the pieces: from memory where a piece was just verified, else from the store. */
  async #compose(range: ByteRange, slots: readonly Slot[], bytes: readonly PieceBytes[]): Promise<Buffer[]> {
    const end = range.offset + range.length;
    const work: (Buffer | Promise<Buffer>)[] = [];
    let readFrom = -1;
    const readUpTo = (address: number): void => {
      if (readFrom >= 0) work.push(this.#readStore(readFrom, address - readFrom));
      readFrom = -1;
    };
    for (const [i, slot] of slots.entries()) {
      const from = Math.max(range.offset, slot.address);
      const to = Math.min(end, slot.address + Math.ceil(slot.length / BLOCK_BYTES) * BLOCK_BYTES);
      const piece = bytes[i];
      if (piece === undefined) {
        if (!this.#store.isPresent(from, to - from))
          throw takenAway('STORE_IO', `the store lost address ${from} while it was read`);
        if (readFrom < 0) readFrom = from;
        continue;
      }
      readUpTo(from);
      const dataEnd = Math.min(to, slot.address + slot.length);
      work.push(Buffer.from(piece.buffer, piece.byteOffset + from - slot.address, dataEnd - from));
      if (dataEnd < to) work.push(ZEROS.subarray(0, to - dataEnd));
    }
    readUpTo(end);
    const parts = await Promise.all(work);
    let total = 0;
    for (const part of parts) total += part.length;
    if (total !== range.length)
      throw new DedupError('INTERNAL', `a read of ${range.length} bytes was composed of ${total}`);
    return parts;
  }

  /** Every read that waits fails with CLOSED; nothing is fetched any more. Idempotent. */
  close(): void {
    this.#abort.abort();
    this.#fetcher.close();
    this.#layers.clear();
  }
}

/** True when another layer with the same chunk may succeed. */
function worthAnotherLayer(error: unknown): boolean {
  const code = errorCode(error);
  return code !== 'CLOSED' && code !== 'STORE_FULL' && code !== 'STORE_IO' && code !== 'INTERNAL';
}
