// Brings spans of layers into the node store: joins neighbouring wanted spans into one range request, tries sources in
// turn, decodes, verifies and stores every whole piece. One flight per span. Called by LazyLoader only.
import PQueue from 'p-queue';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import type { PieceToStore } from './chunks/node-store.ts';
import type { LayerBlobSource, LayerMap, PieceRef } from './loadable-layer.ts';
import type { BlobReader } from './registry/blob-reader.ts';
import { copyTar, SpanEdges, type TarBytes } from './span-edges.ts';

/** What loading needs of the node store. */
export interface LoaderStore {
  isPresent(address: number, length: number): boolean;
  /** One byte per piece: 1 stored, 0 not the bytes its digest names. */
  store(source: Uint8Array, pieces: readonly PieceToStore[]): Promise<Uint8Array>;
}

/** What loading needs of the native addon. */
export interface LoaderNative {
  decodeSpans(job: {
    compression: 'none' | 'gzip' | 'zstd';
    input: Uint8Array;
    spans: readonly {
      inputOffset: number;
      bits: number;
      memberStart: boolean;
      window: Uint8Array;
      outputOffset: number;
      outputLength: number;
    }[];
    outputLength: number;
  }): Promise<Buffer>;
}

export interface FetchLimits {
  /** Parallel range requests per host. */
  readonly requestsPerHost: number;
  /** Runs that are decoded, verified and written at once. */
  readonly decodes: number;
  /** Limits of one joined request: compressed and decompressed bytes. */
  readonly maxRunBytes: number;
  readonly maxRunOutputBytes: number;
  /** Memory for ends of spans, bytes. */
  readonly edgeBytes: number;
  /** One source is given up after this time. */
  readonly attemptTimeoutMs: number;
}

export const DEFAULT_FETCH_LIMITS: FetchLimits = Object.freeze({
  requestsPerHost: 4,
  decodes: 2,
  maxRunBytes: 4 * MiB,
  maxRunOutputBytes: 8 * MiB,
  edgeBytes: 24 * MiB,
  attemptTimeoutMs: 25_000,
});

/** What a finished flight gives to those who waited for one of its spans. */
export interface RunOutput extends TarBytes {
  /** Name of the source they came from. */
  readonly source: string;
  /** Addresses of pieces that were stored out of these bytes. */
  readonly stored: ReadonlySet<number>;
  /** Addresses of pieces whose bytes do not have their digest. */
  readonly bad: ReadonlySet<number>;
}

interface Flight {
  readonly map: LayerMap;
  readonly span: number;
  readonly key: string;
  priority: number;
  queued: boolean;
  readonly promise: Promise<RunOutput>;
  resolve(output: RunOutput): void;
  reject(error: unknown): void;
}

interface Run {
  readonly map: LayerMap;
  readonly first: number;
  /** Consecutive spans from `first`. */
  readonly flights: readonly Flight[];
}

export interface FetchStats {
  /** Range requests that were begun: of layer data and of windows that were not here, repeated ones included. */
  readonly requests: number;
  /** Bytes received in those requests. */
  readonly wireBytes: number;
  /** Compressed bytes of the distinct spans that were ever fetched. */
  readonly spanBytes: number;
  readonly spans: number;
  readonly storedPieces: number;
  readonly badPieces: number;
  readonly waiting: number;
}

/** How long a source is tried last, after it failed for a layer. */
const DISTRUST_MS = 30_000;

export class SpanFetcher {
  readonly edges: SpanEdges;
  readonly #store: LoaderStore;
  readonly #native: LoaderNative;
  readonly #limits: FetchLimits;
  readonly #log: Logger;
  readonly #flights = new Map<string, Flight>();
  readonly #queues = new Map<string, PQueue>();
  readonly #decodes: PQueue;
  readonly #distrusted = new Map<string, number>();
  readonly #touched = new Map<number, Uint8Array>();
  readonly #abort = new AbortController();
  #starting: Flight[] = [];
  #requests = 0;
  #wireBytes = 0;
  #spanBytes = 0;
  #spans = 0;
  #storedPieces = 0;
  #badPieces = 0;

  constructor(store: LoaderStore, native: LoaderNative, limits: FetchLimits, log: Logger) {
    this.#store = store;
    this.#native = native;
    this.#limits = limits;
    this.#log = log;
    this.#decodes = new PQueue({ concurrency: limits.decodes });
    this.edges = new SpanEdges(limits.edgeBytes);
  }

  stats(): FetchStats {
    return {
      requests: this.#requests,
      wireBytes: this.#wireBytes,
      spanBytes: this.#spanBytes,
      spans: this.#spans,
      storedPieces: this.#storedPieces,
      badPieces: this.#badPieces,
      waiting: this.#flights.size,
    };
  }

  /**
   * The decompressed bytes around a span, after every whole piece in them was stored. Joins the flight of the span if
   * there is one, and raises its priority. Errors: REGISTRY_*, DEADLINE, LAYER_INVALID, STORE_*, CLOSED.
   */
  fetch(map: LayerMap, span: number, priority: number): Promise<RunOutput> {
    if (this.#abort.signal.aborted) return Promise.reject(new DedupError('CLOSED', 'the loader is closed'));
    const key = `${map.layerId}:${span}`;
    const known = this.#flights.get(key);
    if (known !== undefined) {
      if (known.queued && priority > known.priority) this.#promote(known, priority);
      return known.promise;
    }
    const flight: Flight = { map, span, key, priority, queued: true, ...Promise.withResolvers<RunOutput>() };
    this.#flights.set(key, flight);
    const settled = (): void => void this.#flights.delete(key);
    flight.promise.then(settled, settled);
    // Started together with everything else that is wanted in this turn of the loop, so that neighbours are joined.
    if (this.#starting.push(flight) === 1) setImmediate(() => this.#startAll());
    return flight.promise;
  }

  /** Moves a span that waits further ahead. */
  promote(map: LayerMap, span: number, priority: number): void {
    const flight = this.#flights.get(`${map.layerId}:${span}`);
    if (flight?.queued === true && priority > flight.priority) this.#promote(flight, priority);
  }

  #promote(flight: Flight, priority: number): void {
    flight.priority = priority;
    if (this.#starting.includes(flight)) return;
    const [source] = this.#sources(flight.map);
    if (source === undefined) return;
    // Queued a second time, further ahead: whichever task comes first takes the flight, the other finds it taken.
    this.#enqueue(flight, source);
  }

  #startAll(): void {
    const flights = this.#starting;
    this.#starting = [];
    for (const flight of flights) {
      const [source] = this.#sources(flight.map);
      if (source === undefined) {
        flight.reject(new DedupError('UNAVAILABLE', `no source is known for layer ${flight.map.blob.digest}`));
      } else {
        this.#enqueue(flight, source);
      }
    }
  }

  #enqueue(flight: Flight, source: LayerBlobSource): void {
    const task = async (): Promise<void> => {
      if (flight.queued) await this.#attempt(this.#gather(flight), source, []);
    };
    // attempt() never rejects: every failure goes to the flights.
    void this.#queueOf(source.host).add(task, { priority: flight.priority });
  }

  #queueOf(host: string): PQueue {
    let queue = this.#queues.get(host);
    if (queue === undefined) {
      queue = new PQueue({ concurrency: this.#limits.requestsPerHost });
      this.#queues.set(host, queue);
    }
    return queue;
  }

  /** Sources of a layer, those that failed lately last. None when the layer was dropped meanwhile. */
  #sources(map: LayerMap): LayerBlobSource[] {
    const now = performance.now();
    const distrusted = (source: LayerBlobSource): number =>
      Number((this.#distrusted.get(`${map.layerId} ${nameOf(source)}`) ?? 0) > now);
    try {
      return map.layer.sources().toSorted((a, b) => distrusted(a) - distrusted(b));
    } catch (error) {
      this.#log.warn({ err: error, layer: map.blob.digest }, 'the sources of a layer are not known');
      return [];
    }
  }

  /** Tries this source of the layer last for a while. */
  distrust(map: LayerMap, source: string): void {
    this.#distrusted.set(`${map.layerId} ${source}`, performance.now() + DISTRUST_MS);
  }

  /** Takes a flight and its wanted neighbours that wait too, as far as one request may reach. */
  #gather(seed: Flight): Run {
    const { map } = seed;
    const flights = [seed];
    seed.queued = false;
    const tryAdd = (span: number, atFront: boolean): boolean => {
      const flight = this.#flights.get(`${map.layerId}:${span}`);
      if (flight?.queued !== true || flight.map !== map) return false;
      const first = atFront ? span : flights[0]!.span;
      const last = atFront ? flights.at(-1)!.span : span;
      if (map.compressedRange(first, last - first + 1).length > this.#limits.maxRunBytes) return false;
      if (map.spanEnd(last) - map.spanStart(first) > this.#limits.maxRunOutputBytes) return false;
      flight.queued = false;
      if (atFront) flights.unshift(flight);
      else flights.push(flight);
      return true;
    };
    for (let span = seed.span + 1; tryAdd(span, false); ) span++;
    for (let span = seed.span - 1; tryAdd(span, true); ) span--;
    return { map, first: flights[0]!.span, flights };
  }

  /** Fetches a run from one source and processes it; on failure goes on with the next source. Never rejects. */
  async #attempt(run: Run, source: LayerBlobSource, failures: readonly string[]): Promise<void> {
    let fetched: { data: Buffer; windows: readonly Uint8Array[] };
    try {
      fetched = await this.#download(run, source);
      // Holds its place in the host's queue while decoding lags behind: bounds the bytes in memory.
      await this.#decodes.onSizeLessThan(this.#limits.decodes);
    } catch (error) {
      this.#nextSource(run, source, failures, error);
      return;
    }
    const priority = Math.max(...run.flights.map((flight) => flight.priority));
    void this.#decodes.add(() => this.#process(run, source, failures, fetched.data, fetched.windows), { priority });
  }

  #nextSource(run: Run, failed: LayerBlobSource, failures: readonly string[], error: unknown): void {
    const code = errorCode(error);
    const tried = [...failures, nameOf(failed)];
    if (
      code === 'CLOSED' ||
      code === 'STORE_IO' ||
      code === 'STORE_FULL' ||
      code === 'INTERNAL' ||
      this.#abort.signal.aborted
    ) {
      const wrapped = wrapError(error, `reading layer ${run.map.blob.digest}`);
      for (const flight of run.flights) flight.reject(wrapped);
      return;
    }
    this.distrust(run.map, nameOf(failed));
    const next = this.#sources(run.map).find((source) => !tried.includes(nameOf(source)));
    this.#log.warn(
      { err: error, layer: run.map.blob.digest, source: nameOf(failed), next: next && nameOf(next) },
      'a layer source failed',
    );
    if (next === undefined) {
      const wrapped = wrapError(
        error,
        `reading spans ${run.first}+${run.flights.length} of layer ${run.map.blob.digest}`,
      );
      for (const flight of run.flights) flight.reject(wrapped);
      return;
    }
    const priority = Math.max(...run.flights.map((flight) => flight.priority));
    void this.#queueOf(next.host).add(() => this.#attempt(run, next, tried), { priority });
  }

  async #download(run: Run, source: LayerBlobSource): Promise<{ data: Buffer; windows: readonly Uint8Array[] }> {
    const { map, first, flights } = run;
    const count = flights.length;
    const range = map.compressedRange(first, count);
    const timeout = AbortSignal.timeout(this.#limits.attemptTimeoutMs);
    const failed = new AbortController();
    const signal = AbortSignal.any([timeout, this.#abort.signal, failed.signal]);
    this.#touch(run);
    const reader = this.#counted(source.reader);
    const { windowLength } = map.layer.index.spans;
    let windowBytes = 0;
    for (let span = first; span < first + count; span++) windowBytes += windowLength[span]!;
    const none = Promise.resolve(flights.map(() => new Uint8Array(0)));
    try {
      const [data, windows] = await Promise.all([
        this.#orAborted(reader.readRange(map.blob, range, signal), signal),
        windowBytes === 0 ? none : this.#orAborted(map.layer.windows.readWindows(first, count, reader, signal), signal),
      ]);
      if (data.length !== range.length) {
        throw new DedupError(
          'REGISTRY_PROTOCOL',
          `${source.host} gave ${data.length} bytes for a range of ${range.length}`,
        );
      }
      if (windows.length !== count) throw new DedupError('INTERNAL', `${windows.length} windows for ${count} spans`);
      return { data, windows };
    } catch (error) {
      failed.abort();
      if (this.#abort.signal.aborted) throw new DedupError('CLOSED', 'the loader is closed');
      if (timeout.aborted) {
        throw new DedupError('DEADLINE', `${source.host} gave no answer within ${this.#limits.attemptTimeoutMs} ms`, {
          cause: error,
        });
      }
      throw error;
    }
  }

  /** The reader with its requests and bytes counted. */
  #counted(reader: BlobReader): BlobReader {
    return {
      readRange: async (blob, range, signal) => {
        this.#requests++;
        const bytes = await reader.readRange(blob, range, signal);
        this.#wireBytes += bytes.length;
        return bytes;
      },
      readAll: (blob, signal) => reader.readAll(blob, signal),
    };
  }

  /** `work`, or a rejection as soon as the signal is aborted: a reader that ignores it must not hold a place. */
  async #orAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
    const { promise, reject } = Promise.withResolvers<never>();
    const onAbort = (): void => reject(new DedupError('CANCELLED', 'the request was given up'));
    signal.addEventListener('abort', onAbort, { once: true });
    try {
      return await Promise.race([work, promise]);
    } finally {
      signal.removeEventListener('abort', onAbort);
    }
  }

  #touch(run: Run): void {
    let touched = this.#touched.get(run.map.layerId);
    if (touched === undefined) this.#touched.set(run.map.layerId, (touched = new Uint8Array(run.map.spanCount)));
    for (const { span } of run.flights) {
      if (touched[span] === 1) continue;
      touched[span] = 1;
      this.#spans++;
      this.#spanBytes += run.map.compressedRange(span, 1).length;
    }
  }

  /** Decodes, verifies and stores a run. Never rejects. */
  async #process(
    run: Run,
    source: LayerBlobSource,
    failures: readonly string[],
    data: Buffer,
    windows: readonly Uint8Array[],
  ): Promise<void> {
    try {
      const output = await this.#decodeAndStore(run, source, data, windows);
      for (const flight of run.flights) flight.resolve(output);
    } catch (error) {
      run.map.layer.windows.forget?.(run.first, run.flights.length);
      if (errorCode(error) !== 'LAYER_INVALID' || run.flights.length === 1) {
        this.#nextSource(run, source, failures, error);
        return;
      }
      // One damaged span must not fail its neighbours: each is decoded by itself out of the same bytes.
      const { map, first } = run;
      const base = map.compressedRange(first, run.flights.length).offset;
      for (const [i, flight] of run.flights.entries()) {
        const range = map.compressedRange(flight.span, 1);
        const part = data.subarray(range.offset - base, range.offset - base + range.length);
        await this.#process({ map, first: flight.span, flights: [flight] }, source, failures, part, [windows[i]!]);
      }
    }
  }

  async #decodeAndStore(
    run: Run,
    source: LayerBlobSource,
    data: Buffer,
    windows: readonly Uint8Array[],
  ): Promise<RunOutput> {
    const { map, first, flights } = run;
    const { layerId } = map;
    const last = first + flights.length - 1;
    const before = first > 0 ? this.edges.tail(layerId, first - 1) : undefined;
    const after = last + 1 < map.spanCount ? this.edges.head(layerId, last + 1) : undefined;
    const start = before?.start ?? map.spanStart(first);
    const wanted = this.#decodeEnd(map, map.spanStart(first), map.spanEnd(last));
    const whole = wanted === map.spanEnd(last);
    const end = whole && after !== undefined ? after.start + after.bytes.length : wanted;
    const base = map.compressedRange(first, flights.length).offset;
    const { spans, compression } = map.layer.index;
    const bytes = await this.#native.decodeSpans({
      compression,
      input: data,
      spans: flights.map(({ span }, i) => ({
        inputOffset: spans.inOffset[span]! - base,
        bits: spans.bits[span]!,
        memberStart: spans.memberStart[span] === 1,
        window: windows[i]!,
        outputOffset: map.spanStart(span) - start,
        outputLength: Math.min(map.spanEnd(span), wanted) - map.spanStart(span),
      })),
      outputLength: end - start,
    });
    if (before !== undefined) bytes.set(before.bytes, 0);
    if (whole && after !== undefined) bytes.set(after.bytes, after.start - start);
    const output = { start, bytes, source: nameOf(source), stored: new Set<number>(), bad: new Set<number>() };
    await this.#storeWhole(map, output);
    if (output.bad.size > 0) map.layer.windows.forget?.(first, flights.length);
    this.#keepEdges(map, first, last, output, whole);
    return output;
  }

  /** Where decoding may stop: behind the last byte of an absent piece. */
  #decodeEnd(map: LayerMap, start: number, end: number): number {
    if (map.hasSparse(start, end)) return end;
    let needed = start;
    for (const { ref, tarOffset } of map.ordinaryPieces(start, end)) {
      if (!this.#store.isPresent(ref.address, ref.length)) needed = tarOffset + ref.length;
    }
    // Nothing absent: it came from elsewhere meanwhile, but whoever waits may still look into the bytes.
    return needed === start ? end : Math.min(needed, end);
  }

  /** Stores every absent piece that lies whole in the output. */
  async #storeWhole(
    map: LayerMap,
    output: TarBytes & { source: string; stored: Set<number>; bad: Set<number> },
  ): Promise<void> {
    const { start, bytes } = output;
    const end = start + bytes.length;
    const pieces: PieceToStore[] = [];
    for (const { ref, tarOffset } of map.ordinaryPieces(start, end)) {
      if (tarOffset < start || tarOffset + ref.length > end) continue;
      if (!this.#store.isPresent(ref.address, ref.length)) pieces.push(toStore(ref, tarOffset - start));
    }
    this.#note(map, output, pieces, await this.#store.store(bytes, pieces));
    for (const { ref, parts } of map.sparsePieces(start, end)) {
      if (this.#store.isPresent(ref.address, ref.length)) continue;
      const assembled = Buffer.alloc(ref.length);
      for (const part of parts) copyTar(output, part.tarOffset, part.tarOffset + part.length, assembled, part.at);
      const piece = toStore(ref, 0);
      this.#note(map, output, [piece], await this.#store.store(assembled, [piece]), false);
    }
  }

  #note(
    map: LayerMap,
    output: { source: string; stored: Set<number>; bad: Set<number> },
    pieces: readonly PieceToStore[],
    result: Uint8Array,
    inPlace = true,
  ): void {
    for (const [i, piece] of pieces.entries()) {
      if (result[i] === 1) {
        this.#storedPieces++;
        if (inPlace) output.stored.add(piece.address);
      } else {
        this.#badPieces++;
        output.bad.add(piece.address);
        const details = { layer: map.blob.digest, source: output.source, address: piece.address };
        this.#log.warn(details, 'bytes of a layer do not have the digest its index names');
      }
    }
  }

  /** Keeps the bytes of pieces that reach over the borders of the run. */
  #keepEdges(map: LayerMap, first: number, last: number, output: TarBytes, whole: boolean): void {
    const { start, bytes } = output;
    const { layerId } = map;
    const end = start + bytes.length;
    const spanStart = map.spanStart(first);
    const spanEnd = map.spanEnd(last);
    if (first > 0) {
      for (const { ref, tarOffset } of map.ordinaryPieces(spanStart, spanStart + 1)) {
        if (tarOffset >= spanStart || this.#store.isPresent(ref.address, ref.length)) continue;
        const to = Math.min(tarOffset + ref.length, end);
        this.edges.keepHead(layerId, first, spanStart, bytes.subarray(spanStart - start, to - start));
      }
    }
    if (whole && last + 1 < map.spanCount) {
      for (const { ref, tarOffset } of map.ordinaryPieces(spanEnd - 1, spanEnd)) {
        if (tarOffset + ref.length <= spanEnd || this.#store.isPresent(ref.address, ref.length)) continue;
        const from = Math.max(tarOffset, start);
        this.edges.keepTail(layerId, last, from, bytes.subarray(from - start, spanEnd - start));
      }
    }
  }

  /** Gives up everything that waits or runs. Idempotent. */
  close(): void {
    if (this.#abort.signal.aborted) return;
    this.#abort.abort();
    for (const queue of this.#queues.values()) queue.clear();
    for (const flight of [...this.#flights.values()]) flight.reject(new DedupError('CLOSED', 'the loader is closed'));
    this.edges.clear();
  }
}

/** The name that tells a source from the others of its layer. */
export function nameOf(source: LayerBlobSource): string {
  return source.name ?? source.host;
}

/** The store's job for a piece whose bytes lie at `offset` of the source. */
export function toStore(ref: PieceRef, offset: number): PieceToStore {
  const { map, chunk, piece } = ref;
  return {
    chunkAddress: map.layer.addresses[chunk]!,
    piece,
    pieceCount: map.pieceCount(chunk),
    chunkBytes: map.layer.index.chunks.length[chunk]!,
    address: ref.address,
    offset,
    length: ref.length,
    digest: map.pieceDigest(ref),
  };
}
