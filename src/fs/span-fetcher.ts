// Brings spans of layers into the node store: joins neighbouring wanted spans into one range request, tries sources in
// turn, hands what came to SpanStorer. One flight per span. Called by LazyLoader only.
import PQueue from 'p-queue';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import { type ByteRange, MiB } from '../units.ts';
import { LinkEstimate } from './link-estimate.ts';
import { type LayerBlobSource, type LayerMap, nameOf } from './loadable-layer.ts';
import type { BlobReader } from './registry/blob-reader.ts';
import { SpanEdges } from './span-edges.ts';
import { type LedgerStats, Priority, SpanLedger, WANTED_PRIORITY } from './span-ledger.ts';
import { type LoaderNative, type LoaderStore, type RunOutput, SpanStorer } from './span-storer.ts';

export interface FetchLimits {
  /** Parallel range requests per host, for readers. */
  readonly requestsPerHost: number;
  /** As many more for what is fetched ahead. */
  readonly aheadPerHost: number;
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
  aheadPerHost: 4,
  decodes: 2,
  maxRunBytes: 4 * MiB,
  maxRunOutputBytes: 4 * MiB,
  edgeBytes: 8 * MiB,
  attemptTimeoutMs: 25_000,
});

interface Flight {
  readonly map: LayerMap;
  readonly span: number;
  readonly key: string;
  priority: number;
  queued: boolean;
  /** Has what it waits for, if it is not queued itself, done before what is fetched ahead. */
  hurry?: (() => void) | undefined;
  readonly promise: Promise<RunOutput>;
  resolve(output: RunOutput): void;
  reject(error: unknown): void;
}

interface Run {
  readonly map: LayerMap;
  readonly first: number;
  /** Consecutive spans from `first`. */
  readonly flights: readonly Flight[];
  /** Aborted when the layer is dropped. */
  readonly dropped: AbortController;
}

export interface FetchStats extends LedgerStats {
  /** Range requests that were begun: of layer data and of windows that were not here, repeated ones included. */
  readonly requests: number;
  /** Bytes received in those requests. */
  readonly wireBytes: number;
  readonly storedPieces: number;
  readonly badPieces: number;
  readonly waiting: number;
}

/** Longest request in which a reader's spans travel with others that are fetched ahead: it waits for all of them. */
const MAX_MIXED_BYTES = MiB;

/** After a read that no plan foresaw more are expected for this long, milliseconds. */
const POLITE_MS = 1_000;

/** Neighbours are asked for together if so few others are needed between them. */
const NEAR_RANK = 4;

/** What is fetched ahead is decoded after this time all the same, milliseconds. */
const YIELD_MS = 100;

/** How long a source is tried last, after it failed for a layer. */
const DISTRUST_MS = 30_000;

export class SpanFetcher {
  readonly edges: SpanEdges;
  readonly ledger = new SpanLedger();
  /** True for a span that a plan will ask for; absent: any may be asked for. */
  foresees: ((map: LayerMap, span: number) => boolean) | undefined;
  /** Told of a span that a reader wants and that is not under way, before it is asked for: fetchBatch() may have it. */
  onWanted: ((map: LayerMap, span: number) => void) | undefined;
  readonly #storer: SpanStorer;
  readonly #limits: FetchLimits;
  readonly #log: Logger;
  readonly #flights = new Map<string, Flight>();
  /** By host: what a reader waits for, and what is fetched ahead. Neither takes a place of the other. */
  readonly #queues = new Map<string, { readonly wanted: PQueue; readonly ahead: PQueue }>();
  readonly #decodes: PQueue;
  /** Decodes of what a plan foresees: a reader does not queue behind them. */
  readonly #aheadDecodes: PQueue;
  /** Spans that readers wait for, and who waits until there are none. */
  #wanted = 0;
  #unwanted = Promise.withResolvers<void>();
  /** By host. */
  readonly #links = new Map<string, LinkEstimate>();
  readonly #distrusted = new Map<string, number>();
  /** Layers that were dropped; a number is never used twice. */
  readonly #dropped = new Set<number>();
  /** Layers for which nothing is fetched at the moment, with how many want it so. */
  readonly #suspended = new Map<number, number>();
  readonly #abort = new AbortController();
  /** Runs whose bytes are on their way, until they are stored or given up. */
  readonly #runs = new Set<Run>();
  #starting: Flight[] = [];
  #lastReadMs = Number.NEGATIVE_INFINITY;
  #requests = 0;
  #wireBytes = 0;

  constructor(store: LoaderStore, native: LoaderNative, limits: FetchLimits, log: Logger) {
    this.#limits = limits;
    this.#log = log;
    this.#decodes = new PQueue({ concurrency: limits.decodes });
    this.#aheadDecodes = new PQueue({ concurrency: limits.decodes });
    this.edges = new SpanEdges(limits.edgeBytes);
    this.#storer = new SpanStorer(store, native, this.edges, log);
  }

  stats(): FetchStats {
    return {
      ...this.ledger.stats(),
      requests: this.#requests,
      wireBytes: this.#wireBytes,
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
    if (priority >= WANTED_PRIORITY) this.#countWanted(flight);
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
    const [source] = this.#sources(map);
    if (source === undefined) for (const flight of flights) flight.reject(droppedError(map));
    else if (flights.length > 0) await this.#startBatch(flights, source, onBytes);
    const ended = await Promise.allSettled(promises);
    return spans.length - ended.filter(({ status }) => status === 'rejected').length;
  }

  #newFlight(map: LayerMap, span: number, key: string, priority: number, queued: boolean): Flight {
    const flight: Flight = { map, span, key, priority, queued, ...Promise.withResolvers<RunOutput>() };
    this.#flights.set(key, flight);
    const settled = (): void => void this.#flights.delete(key);
    flight.promise.then(settled, settled);
    return flight;
  }

  /** Consecutive spans together, as far as they are decoded at once. */
  #runsOf(map: LayerMap, flights: readonly Flight[], rank?: ReadonlyMap<number, number>): Run[] {
    const dropped = new AbortController();
    const runs: (Run & { flights: Flight[] })[] = [];
    for (const flight of flights) {
      const last = runs.at(-1);
      const count = (last?.flights.length ?? 0) + 1;
      const joins =
        last !== undefined &&
        last.first + last.flights.length === flight.span &&
        // A neighbour that is needed much later would hold up what is needed before it.
        (rank === undefined || Math.abs(rank.get(flight.span)! - rank.get(flight.span - 1)!) <= NEAR_RANK) &&
        map.spanEnd(flight.span) - map.spanStart(last.first) <= this.#limits.maxRunOutputBytes &&
        map.compressedRange(last.first, count).length <= this.#limits.maxRunBytes;
      if (joins) last.flights.push(flight);
      else runs.push({ map, first: flight.span, flights: [flight], dropped });
    }
    return runs;
  }

  /**
   * Begins the request of several spans of one layer, which is to bring them in this order; resolves when its last byte is
   * here, or it has failed. Never rejects.
   */
  async #startBatch(
    wanted: readonly Flight[],
    source: LayerBlobSource,
    onBytes: (bytes: number) => void,
  ): Promise<void> {
    const rank = new Map(wanted.map(({ span }, i) => [span, i]));
    const map = wanted[0]!.map;
    const runs = this.#runsOf(
      map,
      wanted.toSorted((a, b) => a.span - b.span),
      rank,
    );
    for (const run of runs) this.#follow(run);
    const { dropped } = runs[0]!;
    const whole = runs.map(({ first, flights }) => map.compressedRange(first, flights.length));
    const ranges = withoutOverlap(whole);
    // Each part has the time of a request of its own: readers may wait for it who have another source.
    const stalled = new AbortController();
    let timer: NodeJS.Timeout | undefined;
    const goesOn = (): void => {
      clearTimeout(timer);
      timer = setTimeout(() => stalled.abort(), this.#limits.attemptTimeoutMs).unref();
    };
    goesOn();
    const failed = new AbortController();
    const signal = AbortSignal.any([stalled.signal, this.#abort.signal, failed.signal, dropped.signal]);
    const reader = this.#counted(source);
    map.layer.windows.expect?.([...rank.keys()], reader, signal);
    const firstRank = runs.map(({ flights }) => Math.min(...flights.map(({ span }) => rank.get(span)!)));
    const order = [...runs.keys()].sort((a, b) => firstRank[a]! - firstRank[b]!);
    const parts: Buffer[] = [];
    const begun = new Set<number>();
    const begin = (i: number): void => {
      const [data, before] = [parts[i], parts[i - 1]];
      if (data === undefined || begun.has(i)) return;
      const shared = whole[i]!.offset < ranges[i]!.offset;
      if (shared && before === undefined) return; // Its first bits are still to come.
      begun.add(i);
      const bytes = shared ? Buffer.concat([before!.subarray(-1), data]) : data;
      void this.#processLater(runs[i]!, source, bytes, reader, signal);
    };
    const take = (i: number, data: Buffer): void => {
      if (failed.signal.aborted) return;
      if (data.length !== ranges[i]?.length) throw wrongLength(source, data.length, ranges[i]?.length ?? 0);
      goesOn();
      parts[i] = data;
      onBytes(data.length);
      begin(i);
      begin(i + 1);
    };
    try {
      const inOrder = order.map((i) => ranges[i]!);
      const reading = reader.readRanges(map.blob, inOrder, signal, (place, data) => take(order[place]!, data));
      await orAborted(reading, signal, givenUp);
      if (begun.size < runs.length) throw wrongLength(source, begun.size, runs.length);
    } catch (error) {
      failed.abort();
      const late = new DedupError('DEADLINE', `${source.host} gave no answer in time`, { cause: error });
      const failure = stalled.signal.aborted ? late : error;
      if (!this.#abort.signal.aborted && !dropped.signal.aborted)
        this.#log.warn({ err: failure, layer: map.blob.digest, source: nameOf(source) }, 'fetching ahead failed');
      for (const [i, run] of runs.entries()) if (!begun.has(i)) this.#afterBatch(run, source, failure);
    }
  }

  /**
   * Goes on with a run of a batch that failed. Readers may have joined it, who would have asked by themselves, with attempts
   * of their own: where no other source is left, what they wait for is asked of the same one again, and nothing else.
   */
  #afterBatch(run: Run, source: LayerBlobSource, error: unknown): void {
    const others = this.#sources(run.map).some((other) => nameOf(other) !== nameOf(source));
    const gone = this.#abort.signal.aborted || run.dropped.signal.aborted;
    if (others || gone) {
      this.#nextSource(run, source, [], error);
      return;
    }
    const [wanted, rest] = [[], []] as [Flight[], Flight[]];
    for (const flight of run.flights) (flight.priority >= WANTED_PRIORITY ? wanted : rest).push(flight);
    if (rest.length > 0) this.#nextSource({ ...run, flights: rest }, source, [], error);
    for (const { first, flights } of this.#runsOf(run.map, wanted)) {
      const again = { ...run, first, flights };
      void this.#queueOf(source.host, WANTED_PRIORITY).add(() => this.#attempt(again, source, []), {
        priority: WANTED_PRIORITY,
      });
    }
  }

  /** Decodes a run of a batch once its windows are here. Never rejects. */
  async #processLater(
    run: Run,
    source: LayerBlobSource,
    data: Buffer,
    reader: BlobReader,
    signal: AbortSignal,
  ): Promise<void> {
    try {
      const reading = run.map.layer.windows.readWindows(run.first, run.flights.length, reader, signal);
      const own = await orAborted(reading, signal, givenUp);
      const priority = Math.max(...run.flights.map((flight) => flight.priority));
      if (priority >= Priority.onDemand - 1) {
        await this.#decodes.add(() => this.#process(run, source, [], data, own), { priority });
        return;
      }
      const decode = this.#once(run, this.#decodes, () => this.#process(run, source, [], data, own));
      await this.#aheadDecodes.add(async () => {
        // Unless a reader has joined it meanwhile.
        if (run.flights.every((flight) => flight.priority < WANTED_PRIORITY)) await this.#untilUnwanted();
        await decode();
      });
    } catch (error) {
      this.#afterBatch(run, source, error);
    }
  }

  /** Has the windows of spans that will be asked for brought here together. */
  expectWindows(map: LayerMap, spans: readonly number[]): void {
    const [source] = this.#sources(map);
    if (source === undefined || this.#abort.signal.aborted || this.#refuses(map)) return;
    map.layer.windows.expect?.(spans, this.#counted(source), this.#abort.signal);
  }

  /** Resolves once no reader waits for a span that no plan foresaw, or after a moment all the same. */
  async #untilUnwanted(): Promise<void> {
    // Both cores are the readers' then.
    this.#aheadDecodes.concurrency = this.isPolite ? 1 : this.#limits.decodes;
    if (this.#wanted === 0) return;
    const timer = Promise.withResolvers<void>();
    const timeout = setTimeout(timer.resolve, YIELD_MS);
    await Promise.race([this.#unwanted.promise, timer.promise]);
    clearTimeout(timeout);
  }

  /** True while readers want what no plan foresaw: the link and the processors are theirs. */
  get isPolite(): boolean {
    return performance.now() - this.#lastReadMs < POLITE_MS;
  }

  /** True while a reader waits for what no plan foresaw. */
  get isWanted(): boolean {
    return this.#wanted > 0;
  }

  #countWanted(flight: Flight): void {
    this.#lastReadMs = performance.now();
    this.#wanted++;
    const settled = (): void => {
      if (--this.#wanted > 0) return;
      this.#unwanted.resolve();
      this.#unwanted = Promise.withResolvers<void>();
    };
    flight.promise.then(settled, settled);
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
      if (flight.queued) await this.#start(this.#gather(flight), source);
    };
    // attempt() never rejects: every failure goes to the flights.
    void this.#queueOf(source.host, flight.priority).add(task, { priority: flight.priority });
  }

  #queueOf(host: string, priority: number): PQueue {
    let queues = this.#queues.get(host);
    if (queues === undefined) {
      const { requestsPerHost, aheadPerHost } = this.#limits;
      queues = {
        wanted: new PQueue({ concurrency: requestsPerHost }),
        ahead: new PQueue({ concurrency: aheadPerHost }),
      };
      this.#queues.set(host, queues);
    }
    return priority >= WANTED_PRIORITY ? queues.wanted : queues.ahead;
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
    const now = performance.now();
    for (const [key, until] of this.#distrusted) if (until <= now) this.#distrusted.delete(key);
  }

  /** Ends requests for these layers at once, and begins none for them until the answer is called. */
  suspend(layerIds: readonly number[]): () => void {
    for (const id of layerIds) this.#suspended.set(id, (this.#suspended.get(id) ?? 0) + 1);
    this.#giveUp(layerIds);
    return () => {
      for (const id of layerIds) {
        const others = (this.#suspended.get(id) ?? 1) - 1;
        if (others === 0) this.#suspended.delete(id);
        else this.#suspended.set(id, others);
      }
    };
  }

  #refuses({ layerId }: LayerMap): boolean {
    return this.#dropped.has(layerId) || this.#suspended.has(layerId);
  }

  #giveUp(layerIds: readonly number[]): void {
    for (const flight of this.#flights.values()) {
      if (!flight.queued || !layerIds.includes(flight.map.layerId)) continue;
      flight.queued = false;
      flight.reject(droppedError(flight.map));
    }
    for (const run of this.#runs) if (layerIds.includes(run.map.layerId)) run.dropped.abort();
  }

  /** Takes a flight and its wanted neighbours that wait too, as far as one request may reach. */
  #gather(seed: Flight): Run {
    const { map } = seed;
    const flights = [seed];
    seed.queued = false;
    let mixed = false;
    const tryAdd = (span: number, atFront: boolean): boolean => {
      const flight = this.#flights.get(`${map.layerId}:${span}`);
      if (flight?.queued !== true || flight.map !== map) return false;
      const joins = mixed || flight.priority >= WANTED_PRIORITY !== seed.priority >= WANTED_PRIORITY;
      const first = atFront ? span : flights[0]!.span;
      const last = atFront ? flights.at(-1)!.span : span;
      const maxBytes = joins ? Math.min(MAX_MIXED_BYTES, this.#limits.maxRunBytes) : this.#limits.maxRunBytes;
      if (map.compressedRange(first, last - first + 1).length > maxBytes) return false;
      if (map.spanEnd(last) - map.spanStart(first) > this.#limits.maxRunOutputBytes) return false;
      flight.queued = false;
      mixed = joins;
      if (atFront) flights.unshift(flight);
      else flights.push(flight);
      return true;
    };
    for (let span = seed.span + 1; tryAdd(span, false); ) span++;
    for (let span = seed.span - 1; tryAdd(span, true); ) span--;
    return { map, first: flights[0]!.span, flights, dropped: new AbortController() };
  }

  /** Begins a run and follows it to its end: a flight of it settles when what it brought is stored, or is not to be. */
  async #start(run: Run, source: LayerBlobSource): Promise<void> {
    this.#follow(run);
    await this.#attempt(run, source, []);
  }

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
      this.#abort.signal.aborted ||
      run.dropped.signal.aborted
    ) {
      const dropped = run.dropped.signal.aborted ? droppedError(run.map) : undefined;
      const wrapped = dropped ?? wrapError(error, `reading layer ${run.map.blob.digest}`);
      for (const flight of run.flights) flight.reject(wrapped);
      return;
    }
    this.distrust(run.map, nameOf(failed));
    const next = this.#sources(run.map).find((source) => !tried.includes(nameOf(source)));
    // What nobody waits for fails quietly: a batch has many runs, and whoever wants one asks again and is told.
    const wanted = run.flights.some((flight) => flight.priority >= WANTED_PRIORITY);
    this.#log[wanted ? 'warn' : 'debug'](
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
    const attempt = this.#once(run, this.#queueOf(next.host, WANTED_PRIORITY), () => this.#attempt(run, next, tried));
    void this.#queueOf(next.host, priority).add(attempt, { priority });
  }

  /** Work on a run that a reader who joins it has done in `sooner`, too: whichever comes first does it. */
  #once(run: Run, sooner: PQueue, work: () => Promise<void>): () => Promise<void> {
    let begun = false;
    const once = async (): Promise<void> => {
      if (begun) return;
      begun = true;
      for (const flight of run.flights) flight.hurry = undefined;
      await work();
    };
    for (const flight of run.flights) {
      flight.hurry = () => {
        flight.hurry = undefined;
        void sooner.add(once, { priority: WANTED_PRIORITY });
      };
    }
    return once;
  }

  async #download(run: Run, source: LayerBlobSource): Promise<{ data: Buffer; windows: readonly Uint8Array[] }> {
    const { map, first, flights } = run;
    const count = flights.length;
    const range = map.compressedRange(first, count);
    const timeout = AbortSignal.timeout(this.#limits.attemptTimeoutMs);
    const failed = new AbortController();
    const signal = AbortSignal.any([timeout, this.#abort.signal, failed.signal, run.dropped.signal]);
    const reader = this.#counted(source);
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
    const [source] = this.#sources(map);
    if (source === undefined) return { roundTripBytes: 0, bytesPerMs: 0 };
    const link = this.#linkTo(source.host);
    const nowMs = performance.now();
    return { roundTripBytes: link.roundTripBytes(nowMs), bytesPerMs: link.bytesPerMs(nowMs) };
  }

  #linkTo(host: string): LinkEstimate {
    let link = this.#links.get(host);
    if (link === undefined) this.#links.set(host, (link = new LinkEstimate()));
    return link;
  }

  /** The reader with its requests and bytes counted. */
  #counted({ host, reader }: LayerBlobSource): BlobReader {
    return {
      readRange: async (blob, range, signal) => {
        this.#requests++;
        const startedMs = performance.now();
        const bytes = await reader.readRange(blob, range, signal);
        const nowMs = performance.now();
        this.#linkTo(host).add(nowMs - startedMs, bytes.length, nowMs);
        this.#wireBytes += bytes.length;
        return bytes;
      },
      readRanges: async (blob, ranges, signal, onPart) => {
        this.#requests++;
        const startedMs = performance.now();
        let length = 0;
        await reader.readRanges(blob, ranges, signal, (index, bytes) => {
          length += bytes.length;
          this.#wireBytes += bytes.length;
          this.#linkTo(host).received(bytes.length, performance.now());
          onPart(index, bytes);
        });
        const nowMs = performance.now();
        this.#linkTo(host).add(nowMs - startedMs, length, nowMs);
      },
      readAll: (blob, signal) => reader.readAll(blob, signal),
    };
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
      const wanted = run.flights.some(({ priority }) => priority >= WANTED_PRIORITY);
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
    for (const { wanted, ahead } of this.#queues.values()) {
      wanted.clear();
      ahead.clear();
    }
    for (const flight of [...this.#flights.values()]) flight.reject(new DedupError('CLOSED', 'the loader is closed'));
    this.edges.clear();
  }
}

function wrongLength(source: LayerBlobSource, got: number, wanted: number): DedupError {
  return new DedupError('REGISTRY_PROTOCOL', `${source.host} answered with ${got} instead of ${wanted}`);
}

/** Spans begin within the last byte of the one before: that byte is asked for once. */
function withoutOverlap(ranges: readonly ByteRange[]): ByteRange[] {
  return ranges.map(({ offset, length }, i) => {
    const before = ranges[i - 1];
    const cut = before === undefined ? 0 : Math.max(0, before.offset + before.length - offset);
    return { offset: offset + cut, length: length - cut };
  });
}

/** For those who wait for a layer that is dropped: another one with the same chunk may still be asked. */
function droppedError(map: LayerMap): DedupError {
  return new DedupError('UNAVAILABLE', `layer ${map.blob.digest} was dropped`);
}

/** For a reader that ignores its signal: it must not hold a place. */
function givenUp(): DedupError {
  return new DedupError('CANCELLED', 'the request was given up');
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
