// Store addresses wanted → bytes here: the one place where on-demand reads and prefetch meet. Transports call read(),
// prefetch calls ensure(). Answers with verified bytes or an error, never with anything in between.
import { LRUCache } from 'lru-cache';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { BLOCK_BYTES, type ByteRange, MiB } from '../units.ts';
import { isTakenAway, takenAway } from './chunks/taken-away.ts';
import { FetchAhead } from './fetch-ahead.ts';
import { LayerMap, type LayerProvider, nameOf, type PieceRef } from './loadable-layer.ts';
import { copyTar } from './span-edges.ts';
import { DEFAULT_FETCH_LIMITS, type FetchLimits, type FetchStats, SpanFetcher } from './span-fetcher.ts';
import { Priority, type SpanLedger } from './span-ledger.ts';
import { type LoaderNative, type LoaderStore, type RunOutput, toStore } from './span-storer.ts';

/** What the loader needs of the node store: look-ups, reads, verified writes. */
export interface ReadableStore extends LoaderStore {
  readonly storeBytes: number;
  find(address: number): { address: number; chunkId: number; size: number; pieceBytes: number } | undefined;
  layersOf(chunkId: number): { layerId: number; seq: number }[];
  read(target: Buffer, at: number, length: number, address: number): Promise<void>;
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

/** A piece that a read needs, by where it lies. */
interface Slot {
  readonly address: number;
  readonly length: number;
  readonly chunkId: number | undefined;
  readonly ref: PieceRef | undefined;
}

/** Verified bytes of a piece; undefined when they must be read from the store. */
type PieceBytes = Uint8Array | undefined;

/** A read that meets blocks which are taken away under it begins anew this often at most. */
const READ_ATTEMPTS = 4;

const ZEROS = Buffer.alloc(BLOCK_BYTES);

export class LazyLoader {
  readonly #store: ReadableStore;
  readonly #provider: LayerProvider;
  readonly #log: Logger;
  readonly #fetcher: SpanFetcher;
  readonly #deadlineMs: number;
  readonly #onWaited: ((ms: number) => void) | undefined;
  readonly #maps: LRUCache<number, LayerMap>;
  readonly #opening = new Map<number, Promise<LayerMap>>();
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
    this.#provider = options.layers;
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
      roundTripBytes: (map) => this.#fetcher.link(map).roundTripBytes,
      usefulness: (origin, nowMs) => this.#fetcher.ledger.usefulness(origin, nowMs),
      guess: options.guess ?? false,
      isPresent: (address, length) => options.store.isPresent(address, length),
      log: options.log,
    });
    const layerBytes = options.layerBytes ?? 32 * MiB;
    // A layer larger than the limit is kept too, alone.
    this.#maps = new LRUCache({
      maxSize: layerBytes,
      sizeCalculation: (map) => Math.min(map.bytes, layerBytes),
      dispose: (_map, layerId) => this.#ahead.forget(layerId),
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
    const slots = this.#locate(range, options.layers);
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
    const slots = ranges.flatMap((range) => this.#locate(range, options.layers));
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
    return await Promise.all(layerIds.map((layerId) => this.#open(layerId)));
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
      const map = this.#maps.get(layerId);
      map?.layer.windows.forget?.(0, map.spanCount);
      this.#maps.delete(layerId);
      this.#ahead.forget(layerId);
    }
    this.#drops++;
    this.#failed.clear();
    this.#fetcher.forget(layerIds);
  }

  /**
   * Until the answer is called, nothing is fetched for these layers and what was under way is given up: whoever reads them
   * gets an error instead of waiting, and nothing of it is remembered afterwards.
   */
  suspend(layerIds: readonly number[]): () => void {
    const forgetFailures = (): void => {
      this.#drops++;
      this.#failed.clear();
    };
    forgetFailures();
    const resume = this.#fetcher.suspend(layerIds);
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
    await Promise.allSettled([...this.#pieces.values(), ...this.#opening.values(), this.#fetcher.drained()]);
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

  /** The pieces that cover a range, ascending. Errors: STORE_IO when a block belongs to none. */
  #locate(range: ByteRange, layers: readonly number[]): Slot[] {
    if (range.offset % BLOCK_BYTES !== 0 || range.length % BLOCK_BYTES !== 0 || range.length <= 0) {
      throw new DedupError('INVALID_ARGUMENT', `a read of ${range.length} bytes at ${range.offset} is not in blocks`);
    }
    const open: LayerMap[] = [];
    for (const layerId of layers) {
      const map = this.#maps.get(layerId);
      if (map !== undefined) open.push(map);
    }
    const slots: Slot[] = [];
    const end = range.offset + range.length;
    let recent: LayerMap | undefined;
    for (let at = range.offset; at < end; ) {
      let slot: Slot | undefined;
      if (recent !== undefined) slot = slotIn(recent, at);
      for (let i = 0; slot === undefined && i < open.length; i++) {
        slot = slotIn(open[i]!, at);
        if (slot !== undefined) recent = open[i];
      }
      slot ??= this.#slotInStore(at);
      if (slot === undefined) throw new DedupError('STORE_IO', `nothing is assigned to address ${at} of the store`);
      slots.push(slot);
      at = slot.address + Math.ceil(slot.length / BLOCK_BYTES) * BLOCK_BYTES;
    }
    return slots;
  }

  #slotInStore(at: number): Slot | undefined {
    const placed = this.#store.find(at);
    if (placed === undefined) return undefined;
    const piece = Math.floor((at - placed.address) / placed.pieceBytes);
    return {
      address: placed.address + piece * placed.pieceBytes,
      length: Math.min(placed.pieceBytes, placed.size - piece * placed.pieceBytes),
      chunkId: placed.chunkId,
      ref: undefined,
    };
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
        return await this.#loadFrom(slot.ref, priority);
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
        const map = await this.#open(layerId);
        const ref = slotIn(map, slot.address)?.ref;
        // The layer may hold the chunk at another of its placements only.
        if (ref !== undefined) return await this.#loadFrom(ref, priority);
      } catch (error) {
        failure ??= error;
        if (!worthAnotherLayer(error)) break;
      }
    }
    throw failure ?? new DedupError('STORE_CORRUPT', `no layer delivers address ${slot.address} of the store`);
  }

  #open(layerId: number): Promise<LayerMap> {
    const known = this.#maps.get(layerId);
    if (known !== undefined) return Promise.resolve(known);
    const running = this.#opening.get(layerId);
    if (running !== undefined) return running;
    const work = this.#provider.openLayer(layerId).then((layer) => {
      if (this.#fetcher.isForgotten(layerId)) throw new DedupError('UNAVAILABLE', `layer ${layerId} was dropped`);
      const map = new LayerMap(layerId, layer);
      this.#maps.set(layerId, map);
      return map;
    });
    this.#opening.set(layerId, work);
    const settled = (): void => void this.#opening.delete(layerId);
    work.then(settled, settled);
    return work;
  }

  /** Brings a piece here from its layer. A wrong piece is asked of one other source, then given up. */
  async #loadFrom(ref: PieceRef, priority: number): Promise<PieceBytes> {
    if (await this.#copyFromOtherPlacement(ref)) return undefined;
    const bad = new Set<string>();
    let mismatch = false;
    for (let round = 0; round < 4; round++) {
      const outputs = await this.#fetchMissing(ref, priority);
      const inPlace = outputs.find((output) => output.stored.has(ref.address));
      if (inPlace !== undefined) return bytesIn(ref, inPlace);
      if (this.#store.isPresent(ref.address, ref.length)) return undefined;
      const rejected = outputs.find((output) => output.bad.has(ref.address));
      let source = rejected?.source;
      if (rejected === undefined) {
        const assembled = this.#assemble(ref, outputs);
        // Bytes that were kept have gone from memory since: once more.
        if (assembled === undefined) continue;
        const [stored] = await this.#store.store(assembled, [toStore(ref, 0)]);
        if (stored === 1) return assembled;
        source = outputs.at(-1)?.source;
      }
      mismatch = true;
      for (const span of ref.map.spansOf(ref)) {
        this.#fetcher.edges.drop(ref.map.layerId, span);
        ref.map.layer.windows.forget?.(span, 1);
      }
      // What was kept from an earlier fetch was not verified then and may be what is wrong: once more, all of it anew.
      if (outputs.length < ref.map.spansOf(ref).size) continue;
      if (source === undefined) break;
      this.#fetcher.distrust(ref.map, source);
      const others = ref.map.layer.sources().some((other) => nameOf(other) !== source && !bad.has(nameOf(other)));
      if (bad.size > 0 || !others) break;
      bad.add(source);
    }
    if (!mismatch)
      throw new DedupError('STORE_IO', `what was fetched for address ${ref.address} did not stay in memory`);
    throw new DedupError(
      'DIGEST_MISMATCH',
      `piece ${ref.piece} of chunk ${ref.chunk} of layer ${ref.map.blob.digest} is not what its index says`,
    );
  }

  /** Fetches those spans of a piece whose bytes are not kept from an earlier fetch. */
  #fetchMissing(ref: PieceRef, priority: number): Promise<RunOutput[]> {
    const { map } = ref;
    const wanted = new Set<number>();
    for (const part of map.partsOf(ref)) {
      const last = map.spanAt(part.tarOffset + part.length - 1);
      for (let span = map.spanAt(part.tarOffset); span <= last; span++) {
        const from = Math.max(part.tarOffset, map.spanStart(span));
        const to = Math.min(part.tarOffset + part.length, map.spanEnd(span));
        if (!this.#kept(map, span, from, to)) wanted.add(span);
      }
    }
    const fetches = [...wanted].map((span) => this.#fetcher.fetch(map, span, priority));
    if (priority === Priority.onDemand) this.#ahead.onMiss(map, map.spansOf(ref));
    return Promise.all(fetches);
  }

  #kept(map: LayerMap, span: number, from: number, to: number): boolean {
    const covers = (edge: { start: number; bytes: Uint8Array } | undefined): boolean =>
      edge !== undefined && edge.start <= from && edge.start + edge.bytes.length >= to;
    return covers(this.#fetcher.edges.tail(map.layerId, span)) || covers(this.#fetcher.edges.head(map.layerId, span));
  }

  /** The bytes of a piece out of what was fetched and kept; undefined when some are missing. Not verified. */
  #assemble(ref: PieceRef, outputs: readonly RunOutput[]): Buffer | undefined {
    const { map } = ref;
    const target = Buffer.alloc(ref.length);
    for (const part of map.partsOf(ref)) {
      const end = part.tarOffset + part.length;
      const last = map.spanAt(end - 1);
      for (let span = map.spanAt(part.tarOffset); span <= last; span++) {
        const from = Math.max(part.tarOffset, map.spanStart(span));
        const to = Math.min(end, map.spanEnd(span));
        const candidates = [
          ...outputs,
          this.#fetcher.edges.tail(map.layerId, span),
          this.#fetcher.edges.head(map.layerId, span),
        ];
        const at = part.at + from - part.tarOffset;
        if (!candidates.some((bytes) => bytes !== undefined && copyTar(bytes, from, to, target, at))) return undefined;
      }
    }
    return target;
  }

  /** A chunk may lie at several addresses; what is at the first one is copied, verified again, instead of fetched. */
  async #copyFromOtherPlacement(ref: PieceRef): Promise<boolean> {
    const placed = this.#store.find(ref.address);
    if (placed === undefined)
      throw new DedupError('STORE_IO', `address ${ref.address} of the store is not assigned any more`);
    const first = placed.chunkId * BLOCK_BYTES;
    if (first === placed.address) return false;
    const address = first + (ref.address - placed.address);
    if (!this.#store.isPresent(address, ref.length)) return false;
    const bytes = Buffer.allocUnsafeSlow(ref.length);
    try {
      await this.#store.read(bytes, 0, ref.length, address);
    } catch (error) {
      if (isTakenAway(error)) return false;
      throw error;
    }
    const [stored] = await this.#store.store(bytes, [toStore(ref, 0)]);
    if (stored !== 1) this.#log.error({ address }, 'a present piece does not have its digest');
    return stored === 1;
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
    this.#maps.clear();
  }
}

function slotIn(map: LayerMap, address: number): Slot | undefined {
  const chunk = map.chunkAt(address);
  if (chunk === undefined) return undefined;
  const ref = map.piece(chunk, Math.floor((address - map.layer.addresses[chunk]!) / map.layer.index.pieceBytes));
  return { address: ref.address, length: ref.length, chunkId: undefined, ref };
}

function bytesIn(ref: PieceRef, output: RunOutput): Uint8Array | undefined {
  const [part] = ref.map.partsOf(ref);
  if (part === undefined || part.length !== ref.length) return undefined;
  const at = part.tarOffset - output.start;
  return output.bytes.subarray(at, at + part.length);
}

/** True when another layer with the same chunk may succeed. */
function worthAnotherLayer(error: unknown): boolean {
  const code = errorCode(error);
  return code !== 'CLOSED' && code !== 'STORE_FULL' && code !== 'STORE_IO' && code !== 'INTERNAL';
}
