// Brings spans of layers into the node store: one flight per span, whoever wants it; sources in turn, what came to SpanStorer.
// Called by LazyLoader, and for plans by the prefetch scheduler.
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import { MiB } from '../units.ts';
import { FetchTurns, type TurnLimits } from './fetch-turns.ts';
import { givenUp, LayerSources } from './layer-sources.ts';
import { type LayerBlobSource, type LayerMap, nameOf } from './loadable-layer.ts';
import { type BatchOptions, SpanBatch } from './span-batch.ts';
import { SpanEdges } from './span-edges.ts';
import { type LedgerStats, SpanLedger, WANTED_PRIORITY } from './span-ledger.ts';
import { droppedError, type Flight, gatherRun, isWanted, type Run, type RunLimits } from './span-run.ts';
import { type LoaderNative, type LoaderStore, type RunOutput, SpanStorer } from './span-storer.ts';

export interface FetchLimits extends TurnLimits, RunLimits {
  /** Memory for ends of spans, bytes. */
  readonly edgeBytes: number;
  /** One source is given up after this time. */
  readonly attemptTimeoutMs: number;
}

export const DEFAULT_FETCH_LIMITS: FetchLimits = Object.freeze({
  requestsPerHost: 4,
  aheadPerHost: 4,
  decodes: 2,
  maxRunBytes: 4 * MiB,
  maxRunOutputBytes: 4 * MiB,
  edgeBytes: 8 * MiB,
  attemptTimeoutMs: 25_000,
});

export interface FetchStats extends LedgerStats {
  /** Range requests that were begun: of layer data and of windows that were not here, repeated ones included. */
  readonly requests: number;
  /** Bytes received in those requests. */
  readonly wireBytes: number;
  readonly storedPieces: number;
  readonly badPieces: number;
  readonly waiting: number;
}

export class SpanFetcher {
  readonly edges: SpanEdges;
  readonly ledger = new SpanLedger();
  /** True for a span that a plan will ask for; absent: any may be asked for. */
  foresees: ((map: LayerMap, span: number) => boolean) | undefined;
  /** Told of a span that a reader wants and that is not under way, before it is asked for: fetchBatch() may have it. */
  onWanted: ((map: LayerMap, span: number) => void) | undefined;
  /** Which source of a layer is asked, and what the way there carries. */
  readonly sources: LayerSources;
  readonly #turns: FetchTurns;
  readonly #storer: SpanStorer;
  readonly #limits: FetchLimits;
  readonly #log: Logger;
  /** By layer and span. */
  readonly #flights = new Map<string, Flight>();
  /** Layers that were dropped; a number is never used twice. */
  readonly #dropped = new Set<number>();
  /** Each says of a layer whether nothing is to be fetched for it at the moment. */
  readonly #suspensions = new Set<(layerId: number) => boolean>();
  readonly #abort = new AbortController();
  /** Runs whose bytes are on their way, until they are stored or given up. */
  readonly #runs = new Set<Run>();
  readonly #batches: BatchOptions;
  #starting: Flight[] = [];

  constructor(store: LoaderStore, native: LoaderNative, limits: FetchLimits, log: Logger) {
    this.#limits = limits;
    this.#log = log;
    this.sources = new LayerSources(log);
    this.#turns = new FetchTurns(limits);
    this.edges = new SpanEdges(limits.edgeBytes);
    this.#storer = new SpanStorer(store, native, this.edges, log);
    this.#batches = {
      runs: {
        store: (run, source, data, windows) => this.#process(run, source, [], data, windows),
        fetchElsewhere: (run, failed, error) => this.#nextSource(run, failed, [], error),
        fetchAgain: (run, source) =>
          this.#turns.request(source.host, WANTED_PRIORITY, () => this.#attempt(run, source, [])),
      },
      sources: this.sources,
      turns: this.#turns,
      limits,
      closed: this.#abort.signal,
      log,
    };
  }

  stats(): FetchStats {
    return {
      ...this.ledger.stats(),
      requests: this.sources.requests,
      wireBytes: this.sources.wireBytes,
      storedPieces: this.#storer.storedPieces,
      badPieces: this.#storer.badPieces,
      waiting: this.#flights.size,
    };
  }

  /**
   * The decompressed bytes around a span, after every whole piece in them was stored. Joins the flight of the span if
   * there is one, and raises its priority. Errors: REGISTRY_*, DEADLINE, LAYER_INVALID, STORE_*, CLOSED.
   */
  fetch(map: LayerMap, span: number, priority: number): Promise<RunOutput> {
    if (this.#abort.signal.aborted) return Promise.reject(new DedupError('CLOSED', 'the loader is closed'));
    // Also for who had begun to read before: nothing may come to be under way after `drained` was asked.
    if (this.#refuses(map)) return Promise.reject(droppedError(map));
    const key = `${map.layerId}:${span}`;
    // A reader that has caught up with a plan: the plan goes on from there, and the reader waits for its part of that.
    if (priority >= WANTED_PRIORITY && !this.#flights.has(key)) this.onWanted?.(map, span);
    const known = this.#flights.get(key);
    this.ledger.asked(map, span, priority, known !== undefined);
    if (known !== undefined) {
      if (priority > known.priority) this.#promote(known, priority);
      return known.promise;
    }
    const flight = this.#newFlight(map, span, key, priority, true);
    if (priority >= WANTED_PRIORITY) this.#turns.readerWaits(flight.promise);
    // Started together with everything else that is wanted in this turn of the loop, so that neighbours are joined.
    if (this.#starting.push(flight) === 1) setImmediate(() => this.#startAll());
    return flight.promise;
  }

  /**
   * Fetches spans of a layer that a plan foresees, in one request where the registry can: each is stored as soon as its bytes
   * are here. Spans that are under way are left to whoever fetches them. Resolves when all have ended, to the number of spans
   * that came or were under way; never rejects.
   */
  async fetchBatch(
    map: LayerMap,
    spans: readonly number[],
    priority: number,
    onBytes: (bytes: number) => void = () => undefined,
  ): Promise<number> {
    if (this.#abort.signal.aborted || this.#refuses(map)) return 0;
    const flights: Flight[] = [];
    for (const span of spans) {
      const key = `${map.layerId}:${span}`;
      if (this.#flights.has(key)) continue;
      this.ledger.asked(map, span, priority, false);
      flights.push(this.#newFlight(map, span, key, priority, false));
    }
    const promises = flights.map(({ promise }) => promise);
    // Whoever joins one sees its failure; nobody else is interested.
    for (const promise of promises) promise.catch(() => undefined);
    const [source] = this.sources.of(map);
    if (source === undefined) for (const flight of flights) flight.reject(droppedError(map));
    else if (flights.length > 0) {
      const batch = new SpanBatch(this.#batches, flights, source);
      for (const run of batch.runs) this.#follow(run);
      await batch.bring(onBytes);
    }
    const ended = await Promise.allSettled(promises);
    return spans.length - ended.filter(({ status }) => status === 'rejected').length;
  }

  #newFlight(map: LayerMap, span: number, key: string, priority: number, queued: boolean): Flight {
    const flight: Flight = { map, span, priority, queued, ...Promise.withResolvers<RunOutput>() };
    this.#flights.set(key, flight);
    const settled = (): void => void this.#flights.delete(key);
    flight.promise.then(settled, settled);
    return flight;
  }

  /** Has the windows of spans that will be asked for brought here together. */
  expectWindows(map: LayerMap, spans: readonly number[]): void {
    const [source] = this.sources.of(map);
    if (source === undefined || this.#abort.signal.aborted || this.#refuses(map)) return;
    map.layer.windows.expect?.(spans, this.sources.counted(source), this.#abort.signal);
  }

  /** True while readers want what no plan foresaw: the link and the processors are theirs. */
  get isPolite(): boolean {
    return this.#turns.isPolite;
  }

  /** True while a reader waits for what no plan foresaw. */
  get isWanted(): boolean {
    return this.#turns.isWanted;
  }

  /** Moves a span that waits further ahead. */
  promote(map: LayerMap, span: number, priority: number): void {
    const flight = this.#flights.get(`${map.layerId}:${span}`);
    if (flight !== undefined && priority > flight.priority) this.#promote(flight, priority);
  }

  #promote(flight: Flight, priority: number): void {
    flight.priority = priority;
    // On its way: it is decoded sooner, and asked for once more when it does not come.
    if (priority >= WANTED_PRIORITY) flight.hurry?.();
    if (!flight.queued || this.#starting.includes(flight)) return;
    const [source] = this.sources.of(flight.map);
    if (source === undefined) return;
    // Queued a second time, further ahead: whichever task comes first takes the flight, the other finds it taken.
    this.#enqueue(flight, source);
  }

  #startAll(): void {
    const flights = this.#starting;
    this.#starting = [];
    for (const flight of flights) {
      const [source] = this.sources.of(flight.map);
      if (source === undefined) {
        flight.reject(new DedupError('UNAVAILABLE', `no source is known for layer ${flight.map.blob.digest}`));
      } else {
        this.#enqueue(flight, source);
      }
    }
  }

  #enqueue(flight: Flight, source: LayerBlobSource): void {
    const task = async (): Promise<void> => {
      if (!flight.queued) return;
      const run = gatherRun(flight, (span) => this.#flights.get(`${flight.map.layerId}:${span}`), this.#limits);
      this.#follow(run);
      await this.#attempt(run, source, []);
    };
    // attempt() never rejects: every failure goes to the flights.
    this.#turns.request(source.host, flight.priority, task);
  }

  /** True for a layer that was dropped. */
  isForgotten(layerId: number): boolean {
    return this.#dropped.has(layerId);
  }

  /** Forgets layers that were dropped, whose requests end at once, and distrust that has ended. */
  forget(layerIds: readonly number[]): void {
    for (const layerId of layerIds) {
      this.ledger.forget(layerId);
      this.#dropped.add(layerId);
    }
    this.#giveUp(layerIds);
    this.sources.sweep();
  }

  /**
   * Ends requests for these layers at once, and until the answer is called begins none for those of them that `goes` still
   * says are going.
   */
  suspend(layerIds: readonly number[], goes: (layerId: number) => boolean): () => void {
    const suspends = (layerId: number): boolean => layerIds.includes(layerId) && goes(layerId);
    this.#suspensions.add(suspends);
    this.#giveUp(layerIds);
    return () => void this.#suspensions.delete(suspends);
  }

  #refuses({ layerId }: LayerMap): boolean {
    if (this.#dropped.has(layerId)) return true;
    for (const suspends of this.#suspensions) if (suspends(layerId)) return true;
    return false;
  }

  #giveUp(layerIds: readonly number[]): void {
    for (const flight of this.#flights.values()) {
      if (!flight.queued || !layerIds.includes(flight.map.layerId)) continue;
      flight.queued = false;
      flight.reject(droppedError(flight.map));
    }
    for (const run of this.#runs) if (layerIds.includes(run.map.layerId)) run.dropped.abort();
  }

  /** Follows a run to its end: a flight of it settles when what it brought is stored, or is not to be. */
  #follow(run: Run): void {
    this.#runs.add(run);
    void Promise.allSettled(run.flights.map(({ promise }) => promise)).then(() => this.#runs.delete(run));
  }

  /** Resolves once every run that is under way now has ended. Never rejects. */
  async drained(): Promise<void> {
    await Promise.allSettled([...this.#runs].flatMap(({ flights }) => flights.map(({ promise }) => promise)));
  }

  /** Fetches a run from one source and processes it; on failure goes on with the next source. Never rejects. */
  async #attempt(run: Run, source: LayerBlobSource, failures: readonly string[]): Promise<void> {
    let fetched: { data: Buffer; windows: readonly Uint8Array[] };
    try {
      fetched = await this.#download(run, source);
      // Holds its place in the host's queue while decoding lags behind: bounds the bytes in memory.
      await this.#turns.decodesKeepUp();
    } catch (error) {
      this.#nextSource(run, source, failures, error);
      return;
    }
    void this.#turns.decode(run, () => this.#process(run, source, failures, fetched.data, fetched.windows));
  }

  #nextSource(run: Run, failed: LayerBlobSource, failures: readonly string[], error: unknown): void {
    const code = errorCode(error);
    const tried = [...failures, nameOf(failed)];
    if (
      code === 'CLOSED' ||
      code === 'STORE_IO' ||
      code === 'STORE_FULL' ||
      code === 'INTERNAL' ||
      this.#abort.signal.aborted ||
      run.dropped.signal.aborted
    ) {
      const dropped = run.dropped.signal.aborted ? droppedError(run.map) : undefined;
      const wrapped = dropped ?? wrapError(error, `reading layer ${run.map.blob.digest}`);
      for (const flight of run.flights) flight.reject(wrapped);
      return;
    }
    this.sources.distrust(run.map, nameOf(failed));
    const next = this.sources.of(run.map).find((source) => !tried.includes(nameOf(source)));
    // What nobody waits for fails quietly: a batch has many runs, and whoever wants one asks again and is told.
    this.#log[isWanted(run) ? 'warn' : 'debug'](
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
    this.#turns.requestRun(next.host, run, () => this.#attempt(run, next, tried));
  }

  async #download(run: Run, source: LayerBlobSource): Promise<{ data: Buffer; windows: readonly Uint8Array[] }> {
    const { map, first, flights } = run;
    const count = flights.length;
    const range = map.compressedRange(first, count);
    const timeout = AbortSignal.timeout(this.#limits.attemptTimeoutMs);
    const failed = new AbortController();
    const signal = AbortSignal.any([timeout, this.#abort.signal, failed.signal, run.dropped.signal]);
    const reader = this.sources.counted(source);
    const { windowLength } = map.layer.index.spans;
    let windowBytes = 0;
    for (let span = first; span < first + count; span++) windowBytes += windowLength[span]!;
    const none = Promise.resolve(flights.map(() => new Uint8Array(0)));
    try {
      const [data, windows] = await Promise.all([
        orAborted(reader.readRange(map.blob, range, signal), signal, givenUp),
        windowBytes === 0
          ? none
          : orAborted(map.layer.windows.readWindows(first, count, reader, signal), signal, givenUp),
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
      if (run.dropped.signal.aborted) throw droppedError(map);
      if (timeout.aborted) {
        throw new DedupError('DEADLINE', `${source.host} gave no answer within ${this.#limits.attemptTimeoutMs} ms`, {
          cause: error,
        });
      }
      throw error;
    }
  }

  /** True for a span that somebody has read, or waited for. */
  wasRead(map: LayerMap, span: number): boolean {
    return this.ledger.wasRead(map.layerId, span);
  }

  /** True for a span that is being fetched, or waits for that. */
  isUnderWay(map: LayerMap, span: number): boolean {
    return this.#flights.has(`${map.layerId}:${span}`);
  }

  /** What the way to the first source of a layer carries; zeros as long as that is not known. */
  link(map: LayerMap): { roundTripBytes: number; bytesPerMs: number } {
    return this.sources.link(map);
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
      // A layer that was dropped while its bytes came: nothing must be written where they belonged.
      if (run.dropped.signal.aborted || isDropped(run.map)) throw droppedError(run.map);
      const wanted = isWanted(run);
      // A plan brings many spans whose neighbours nobody wants: their ends would drive out those that are needed.
      const keeps = (span: number): boolean =>
        wanted || this.isUnderWay(run.map, span) || (this.foresees?.(run.map, span) ?? true);
      const output = await this.#storer.decodeAndStore(run.map, run.first, nameOf(source), data, windows, keeps);
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
        await this.#process({ ...run, first: flight.span, flights: [flight] }, source, failures, part, [windows[i]!]);
      }
    }
  }

  /** Gives up everything that waits or runs. Idempotent. */
  close(): void {
    if (this.#abort.signal.aborted) return;
    this.#abort.abort();
    this.#turns.clear();
    for (const flight of [...this.#flights.values()]) flight.reject(new DedupError('CLOSED', 'the loader is closed'));
    this.edges.clear();
  }
}

/** True when the layer is not known to the node any more. */
function isDropped(map: LayerMap): boolean {
  try {
    map.layer.sources();
    return false;
  } catch {
    return true;
  }
}
