// Fetches the spans of plans ahead of their readers: how many at once, how much per request, and how far ahead. Several
// plans share the places fairly. Called by replay.ts and warm-up; requests themselves are the SpanFetcher's.
import type { LayerMap } from '../fs/loadable-layer.ts';
import { Priority } from '../fs/span-ledger.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import type { PlannedSpan } from './planner.ts';

/** What the scheduler needs of the loader. */
export interface BatchFetcher {
  /**
   * Fetches spans of one layer, ascending, in one request where the registry can. Never rejects; resolves to why a span could
   * not be had, undefined when all came.
   */
  fetchBatch(map: LayerMap, spans: readonly number[], priority: number): Promise<unknown>;
  /** True for a span that is being fetched. */
  isUnderWay(map: LayerMap, span: number): boolean;
  /** True for a span that somebody has read, or waits for. */
  wasRead(map: LayerMap, span: number): boolean;
  /** What the way to a layer's registry carries; zeros as long as that is not known. */
  link(map: LayerMap): { readonly roundTripBytes: number; readonly bytesPerMs: number };
  /** True while readers want what no plan foresaw, or did a moment ago. */
  readonly isPolite: boolean;
  /** True while a reader waits for such. */
  readonly isWanted: boolean;
  /** To be told of a span that a reader wants and that is not under way. */
  onWanted: ((map: LayerMap, span: number) => void) | undefined;
}

export interface Plan {
  /** In the order of first need. */
  readonly spans: Iterator<PlannedSpan>;
  /** What was fetched and not read yet may be so much, compressed bytes: how far ahead of the reader, and the most that can be wasted. */
  readonly maxUnreadBytes: number;
  /** Bytes a second at most; absent: no limit. */
  readonly bytesPerSecond?: number;
  readonly priority?: number;
  readonly signal: AbortSignal;
  /** Told of compressed bytes after each request, and of why some of them did not come. */
  readonly onProgress?: (bytes: number, failure: unknown) => void;
}

export interface SchedulerOptions {
  readonly fetcher: BatchFetcher;
  /** Requests at once at most (configuration key `prefetch.workers`). */
  readonly workers: number;
  /** Spans that wait at most, of all plans together (`prefetch.queue_size`); what exceeds it is planned when there is room. */
  readonly queueSize: number;
  readonly log: Logger;
}

/** Longest request, compressed bytes. */
const MAX_BATCH_BYTES = 10 * MiB;
/** The first request of a plan: what is needed first is not to wait for much else. */
const FIRST_BATCH_BYTES = 4 * MiB;
/** While somebody reads what no plan foresaw: the link is not to be taken for long. */
const POLITE_BATCH_BYTES = MiB;
/** A request is not to last longer than this on a slow link, milliseconds. */
const MAX_BATCH_MS = 700;
/** The same for a request whose first bytes a reader waits for. */
const MAX_URGENT_MS = 40;
/** A request of a plan with a limit carries at most so much time's worth of it, seconds. */
const LIMITED_SECONDS = 0.5;
/**
 * A request may take what a plan has this much later from the same layer: few large requests, for a little less order. On a fast
 * link that costs nobody anything.
 */
const LOOK_AHEAD_MS = 300;
const LOOK_AHEAD_BYTES = 2 * MiB;
/** How often it is looked whether readers have come closer, milliseconds. */
const LOOK_MS = 20;

interface Running {
  readonly plan: Plan;
  readonly queue: PlannedSpan[];
  /** Fetched, and not known to have been read. */
  unread: PlannedSpan[];
  unreadBytes: number;
  batches: number;
  underWay: number;
  ended: boolean;
  /** When the rate allows the next request, by performance.now(). */
  nextMs: number;
  readonly done: PromiseWithResolvers<void>;
}

export class PrefetchScheduler {
  readonly #options: SchedulerOptions;
  readonly #running: Running[] = [];
  #requests = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: SchedulerOptions) {
    this.#options = options;
    options.fetcher.onWanted = (map, span) => this.#urge(map, span);
  }

  /** Spans that wait to be asked for. */
  get queuedSpans(): number {
    return this.#running.reduce((sum, { queue }) => sum + queue.length, 0);
  }

  /** Fetches a plan. Resolves when all of it is here, could not be had, or `signal` is aborted; never rejects. */
  run(plan: Plan): Promise<void> {
    const running: Running = {
      plan,
      queue: [],
      unread: [],
      unreadBytes: 0,
      batches: 0,
      underWay: 0,
      ended: false,
      nextMs: 0,
      done: Promise.withResolvers<void>(),
    };
    this.#running.push(running);
    plan.signal.addEventListener('abort', () => this.#pump(), { once: true });
    this.#pump();
    return running.done.promise;
  }

  #fill(running: Running): void {
    let room = this.#options.queueSize - this.queuedSpans;
    while (!running.ended && room > 0) {
      const next = running.plan.spans.next();
      if (next.done === true) running.ended = true;
      else {
        running.queue.push(next.value);
        room--;
      }
    }
  }

  #pump(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    let progress = true;
    while (progress) {
      progress = false;
      for (const running of [...this.#running]) {
        if (running.plan.signal.aborted) {
          running.queue.length = 0;
          running.ended = true;
        } else if (running.queue.length < this.#options.queueSize / 2) this.#fill(running);
        if (this.#startOne(running)) progress = true;
        if (running.ended && running.queue.length === 0 && running.underWay === 0) this.#finish(running);
      }
      // Each plan in turn.
      const first = this.#running.shift();
      if (first !== undefined) this.#running.push(first);
    }
    // Readers come closer without telling.
    if (this.#running.some(({ queue }) => queue.length > 0))
      this.#timer = setTimeout(() => this.#pump(), LOOK_MS).unref();
  }

  #finish(running: Running): void {
    const at = this.#running.indexOf(running);
    if (at >= 0) this.#running.splice(at, 1);
    running.done.resolve();
  }

  /** A reader has caught up with a plan: it goes on from there at once, beyond its places. */
  #urge(map: LayerMap, span: number): void {
    for (const running of this.#running) {
      const at = running.queue.findIndex((planned) => planned.span === span && planned.map.layerId === map.layerId);
      if (at < 0) continue;
      const { bytesPerMs } = this.#options.fetcher.link(map);
      const bytes = Math.min(MAX_BATCH_BYTES, Math.max(POLITE_BATCH_BYTES, bytesPerMs * MAX_URGENT_MS));
      this.#start(running, this.#take(running, at, bytes), Priority.onDemand - 1);
      return;
    }
  }

  /** Begins the next request of a plan, if there is a place and it is not too far ahead. */
  #startOne(running: Running): boolean {
    const { fetcher } = this.#options;
    const { queue, plan } = running;
    while (queue.length > 0 && fetcher.isUnderWay(queue[0]!.map, queue[0]!.span)) queue.shift();
    const head = queue[0];
    const now = performance.now();
    if (head === undefined || now < running.nextMs || this.#requests >= this.#places(head.map)) return false;
    if (this.#yields(running, now)) return false;
    const room = this.#room(running);
    if (room <= 0) return false;
    const batch = this.#take(running, 0, Math.min(room, this.#batchBytes(running, head.map)));
    this.#start(running, batch, plan.priority ?? Priority.trace);
    return true;
  }

  #start(running: Running, batch: readonly PlannedSpan[], priority: number): void {
    const { fetcher, log } = this.#options;
    const { plan, queue } = running;
    const now = performance.now();
    const bytes = batch.reduce((sum, span) => sum + span.bytes, 0);
    running.batches++;
    running.underWay++;
    running.unread.push(...batch);
    running.unreadBytes += bytes;
    if (plan.bytesPerSecond !== undefined)
      running.nextMs = Math.max(now, running.nextMs) + (bytes / plan.bytesPerSecond) * 1000;
    this.#requests++;
    const spans = batch.map(({ span }) => span).sort((a, b) => a - b);
    void fetcher.fetchBatch(batch[0]!.map, spans, priority).then((failure) => {
      const ms = Math.round(performance.now() - now);
      log.debug({ spans: spans.length, bytes, ms, queued: queue.length }, 'a part of a plan was fetched');
      this.#requests--;
      running.underWay--;
      plan.onProgress?.(bytes, failure);
      this.#pump();
    });
  }

  /** True while a plan that somebody is closer to needing could begin a request: those in the background take what it leaves. */
  #yields({ plan }: Running, now: number): boolean {
    const priority = plan.priority ?? Priority.trace;
    return this.#running.some(
      (other) =>
        (other.plan.priority ?? Priority.trace) > priority &&
        other.queue.length > 0 &&
        now >= other.nextMs &&
        this.#room(other) > 0,
    );
  }

  /** Requests that may be under way at once: enough for the link to be full, no more. */
  #places(map: LayerMap): number {
    const { workers, fetcher } = this.#options;
    if (fetcher.isPolite) return fetcher.isWanted ? 0 : 1;
    return Math.min(workers, 1 + Math.max(1, Math.ceil(fetcher.link(map).roundTripBytes / (2 * MiB))));
  }

  #batchBytes(running: Running, map: LayerMap): number {
    const { fetcher } = this.#options;
    // A limited plan spreads its bytes: a large request would take the whole link for a while, and then nothing for long.
    const limited = (running.plan.bytesPerSecond ?? Number.POSITIVE_INFINITY) * LIMITED_SECONDS;
    if (fetcher.isPolite) return Math.min(POLITE_BATCH_BYTES, limited);
    const { bytesPerMs } = fetcher.link(map);
    const most = bytesPerMs === 0 ? MAX_BATCH_BYTES : Math.max(POLITE_BATCH_BYTES, bytesPerMs * MAX_BATCH_MS);
    return Math.min(MAX_BATCH_BYTES, most, limited, FIRST_BATCH_BYTES * 2 ** running.batches);
  }

  /** Bytes by which a plan may go on now. */
  #room(running: Running): number {
    const { maxUnreadBytes } = running.plan;
    if (running.unreadBytes >= maxUnreadBytes) {
      const { fetcher } = this.#options;
      running.unread = running.unread.filter(({ map, span }) => !fetcher.wasRead(map, span));
      running.unreadBytes = running.unread.reduce((sum, { bytes }) => sum + bytes, 0);
    }
    return maxUnreadBytes - running.unreadBytes;
  }

  /** Takes the span at a place of the queue and what soon follows it of the same layer, at least one, at most `bytes`. */
  #take({ queue }: Running, from: number, bytes: number): PlannedSpan[] {
    const { fetcher } = this.#options;
    const { map } = queue[from]!;
    const batch: PlannedSpan[] = [];
    const most = bytes + Math.max(LOOK_AHEAD_BYTES, fetcher.link(map).bytesPerMs * LOOK_AHEAD_MS);
    let [taken, looked] = [0, 0];
    for (let at = from; at < queue.length && looked < most; ) {
      const span = queue[at]!;
      looked += span.bytes;
      if (span.map !== map) {
        at++;
        continue;
      }
      if (taken > 0 && taken + span.bytes > bytes) break;
      queue.splice(at, 1);
      if (fetcher.isUnderWay(map, span.span)) continue;
      batch.push(span);
      taken += span.bytes;
    }
    return batch;
  }

  close(): void {
    clearTimeout(this.#timer);
  }
}
