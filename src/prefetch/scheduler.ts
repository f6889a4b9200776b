// Fetches the spans of plans ahead of their readers: how many at once, how much per request, and how far ahead. Several
// plans share the places fairly. Called by prefetch.ts and warm-up; requests themselves are the SpanFetcher's.
import type { LayerMap } from '../fs/loadable-layer.ts';
import { Priority } from '../fs/span-ledger.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import type { PlannedSpan } from './planner.ts';

/** What the scheduler needs of the loader. */
export interface BatchFetcher {
  /** Fetches spans of one layer, in this order, in one request where the registry can; how many came. Never rejects. */
  fetchBatch(
    map: LayerMap,
    spans: readonly number[],
    priority: number,
    onBytes: (bytes: number) => void,
  ): Promise<number>;
  /** True for a layer that was dropped: nothing is fetched for it any more. */
  isForgotten(layerId: number): boolean;
  /** Has what decoding spans of a layer needs beside their bytes brought here together: a hint. */
  expectWindows(map: LayerMap, spans: readonly number[]): void;
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
  /** To ask whether a plan will ask for a span. */
  foresees: ((map: LayerMap, span: number) => boolean) | undefined;
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
  /** Told of compressed bytes after each request, and whether all of them came. */
  readonly onProgress?: (bytes: number, complete: boolean) => void;
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
const MAX_BATCH_BYTES = 16 * MiB;
/** The first request of a plan: what is needed first is not to wait for much else. */
const FIRST_BATCH_BYTES = 4 * MiB;
/** While somebody reads what no plan foresaw: the link is not to be taken for long. */
const POLITE_BATCH_BYTES = MiB;
/**
 * A request takes the link for so long at most, milliseconds. On a slow link that is less than the most: several travel side by
 * side then, for a connection that has lost a packet does not fill a long link by itself for seconds, and small ones come more
 * nearly in the order of need.
 */
const MAX_BATCH_MS = 175;
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
/** The same as long as nobody knows the link, in requests. */
const UNKNOWN_LOOK_AHEAD = 5;
/**
 * The next request is begun when so much of the ones before is still to come: a connection that was idle takes some round trips to
 * fill the link, and decoding takes time where there is no round trip.
 */
const OVERLAP_ROUND_TRIPS = 12;
const OVERLAP_MS = 50;
const UNKNOWN_COMING_BYTES = 8 * MiB;
/** Windows of so many spans are brought together: about 2.5 MB. */
const EXPECTED_SPANS = 256;
/** How often it is looked whether readers have come closer, milliseconds. */
const LOOK_MS = 20;
/** A plan whose reader has not come closer for so long is given up: nobody starts, or the trace is wrong. Milliseconds. */
const GIVE_UP_MS = 120_000;
/** So many requests after each other of which nothing came end a plan: readers ask again for what they need. */
const MAX_FAILURES = 3;

interface Running {
  readonly plan: Plan;
  readonly queue: PlannedSpan[];
  /** Fetched, and not known to have been read. */
  unread: PlannedSpan[];
  unreadBytes: number;
  batches: number;
  underWay: number;
  ended: boolean;
  /** Requests without any bytes since the last one with some. */
  failures: number;
  /** When its latest request began, or its reader had come closer; by performance.now(). */
  movedMs: number;
  /** When the rate allows the next request, by performance.now(). */
  nextMs: number;
  /** Spans whose windows were asked for, as layer and span. */
  readonly expected: Set<string>;
  readonly done: PromiseWithResolvers<void>;
}

export class PrefetchScheduler {
  readonly #options: SchedulerOptions;
  readonly #running: Running[] = [];
  #requests = 0;
  /** Bytes that requests under way are still to bring. */
  #coming = 0;
  #timer: NodeJS.Timeout | undefined;
  #pumping: NodeJS.Immediate | undefined;
  #closed = false;

  constructor(options: SchedulerOptions) {
    this.#options = options;
    options.fetcher.onWanted = (map, span) => this.#urge(map, span);
    options.fetcher.foresees = (map, span) =>
      this.#running.some(({ queue }) => queue.some((planned) => isSpan(planned, map, span)));
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
      failures: 0,
      movedMs: performance.now(),
      nextMs: 0,
      expected: new Set(),
      done: Promise.withResolvers<void>(),
    };
    this.#running.push(running);
    const aborted = (): void => this.#pump();
    plan.signal.addEventListener('abort', aborted, { once: true });
    this.#pump();
    return running.done.promise.finally(() => plan.signal.removeEventListener('abort', aborted));
  }

  /** Takes spans of a plan: half of what others leave, so that a plan that comes later, or one beside a plan that waits, has room. */
  #fill(running: Running): void {
    const { queue, plan } = running;
    const free = this.#options.queueSize - this.queuedSpans;
    const most = Math.ceil((free + queue.length) / 2);
    try {
      for (let room = Math.min(free, most - queue.length); !running.ended && room > 0; ) {
        const next = plan.spans.next();
        if (next.done === true) running.ended = true;
        else if (this.#isWanted(next.value)) {
          queue.push(next.value);
          room--;
        }
      }
    } catch (error) {
      // A plan is a hint; what it still had to say is read later.
      this.#options.log.debug({ err: error }, 'a plan ends early');
      running.ended = true;
    }
  }

  /** False for what is being fetched already, or cannot be any more. */
  #isWanted({ map, span }: PlannedSpan): boolean {
    const { fetcher } = this.#options;
    return !fetcher.isForgotten(map.layerId) && !fetcher.isUnderWay(map, span);
  }

  #pump(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const { queueSize } = this.#options;
    let progress = true;
    while (progress) {
      progress = false;
      for (const running of [...this.#running]) {
        if (this.#closed || running.plan.signal.aborted || this.#isHopeless(running)) {
          running.queue.length = 0;
          running.ended = true;
        } else this.#fill(running);
        if (this.#startOne(running)) progress = true;
        // What it had was being fetched by others, or its layer has gone: there may be more.
        else if (!running.ended && running.queue.length === 0 && this.queuedSpans < queueSize) progress = true;
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

  /** True for a plan whose reader does not come, or whose bytes do not. */
  #isHopeless({ plan, queue, failures, underWay, movedMs }: Running): boolean {
    const late = underWay === 0 && performance.now() - movedMs > GIVE_UP_MS;
    if (failures < MAX_FAILURES && !late) return false;
    if (queue.length > 0) this.#options.log.debug({ failures, unread: plan.maxUnreadBytes }, 'a plan is given up');
    return true;
  }

  #finish(running: Running): void {
    const at = this.#running.indexOf(running);
    if (at >= 0) this.#running.splice(at, 1);
    running.done.resolve();
  }

  /** A reader has caught up with a plan: it goes on from there at once, beyond its places. */
  #urge(map: LayerMap, span: number): void {
    for (const running of this.#running) {
      const at = running.queue.findIndex((planned) => isSpan(planned, map, span));
      if (at < 0) continue;
      const room = this.#room(running);
      if (room <= 0) return; // The reader fetches it.
      const { bytesPerMs } = this.#options.fetcher.link(map);
      const bytes = Math.min(room, MAX_BATCH_BYTES, Math.max(POLITE_BATCH_BYTES, bytesPerMs * MAX_URGENT_MS));
      this.#start(running, this.#take(running, at, bytes), Priority.onDemand - 1);
      return;
    }
  }

  /** Begins the next request of a plan, if there is a place and it is not too far ahead. */
  #startOne(running: Running): boolean {
    const { queue, plan } = running;
    while (queue.length > 0 && !this.#isWanted(queue[0]!)) queue.shift();
    const head = queue[0];
    const now = performance.now();
    if (head === undefined) return false;
    if (now < running.nextMs || !this.#hasPlace(head.map) || this.#yields(running, now)) {
      running.movedMs = now; // It is not its reader that it waits for.
      return false;
    }
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
    running.movedMs = now;
    running.unread.push(...batch);
    running.unreadBytes += bytes;
    if (plan.bytesPerSecond !== undefined)
      running.nextMs = Math.max(now, running.nextMs) + (bytes / plan.bytesPerSecond) * 1000;
    this.#requests++;
    if (plan.bytesPerSecond === undefined) this.#expectWindows(running, batch);
    const spans = batch.map(({ span }) => span);
    let left = bytes;
    this.#coming += bytes;
    const arrived = (part: number): void => {
      const counted = Math.min(left, part);
      left -= counted;
      this.#coming -= counted;
      this.#pumpSoon();
    };
    void fetcher.fetchBatch(batch[0]!.map, spans, priority, arrived).then((came) => {
      arrived(left);
      const ms = Math.round(performance.now() - now);
      log.debug({ spans: spans.length, bytes, ms, queued: queue.length }, 'a part of a plan was fetched');
      this.#requests--;
      running.underWay--;
      running.failures = came > 0 ? 0 : running.failures + 1;
      if (came === 0) this.#forgetUnread(running, new Set(batch));
      plan.onProgress?.(bytes, came === spans.length);
      this.#pump();
    });
  }

  /** Asks for the windows of a request together with those of the next ones of the same layer. */
  #expectWindows({ queue, expected }: Running, batch: readonly PlannedSpan[]): void {
    const { map } = batch[0]!;
    const keyOf = (span: number): string => `${map.layerId}:${span}`;
    if (batch.every(({ span }) => expected.has(keyOf(span)))) return;
    const following = queue.filter((planned) => planned.map === map).slice(0, EXPECTED_SPANS);
    const spans = [...batch, ...following].map(({ span }) => span).filter((span) => !expected.has(keyOf(span)));
    for (const span of spans) expected.add(keyOf(span));
    this.#options.fetcher.expectWindows(map, spans);
  }

  /**
   * Whether one more request may be begun: when what is still to come takes the link no longer than a new one needs to fill it.
   * More would share the link, and what is needed first would come later.
   */
  #hasPlace(map: LayerMap): boolean {
    const { workers, fetcher } = this.#options;
    if (this.#requests >= workers) return false;
    const { roundTripBytes, bytesPerMs } = fetcher.link(map);
    if (fetcher.isPolite) {
      if (fetcher.isWanted) return false;
      // On a long link one request of that size leaves it idle for most of the time.
      return this.#requests < 1 + Math.floor(roundTripBytes / (POLITE_BATCH_BYTES / 4));
    }
    if (bytesPerMs === 0) return this.#coming < UNKNOWN_COMING_BYTES;
    return this.#coming <= Math.max(roundTripBytes * OVERLAP_ROUND_TRIPS, bytesPerMs * OVERLAP_MS);
  }

  /** Once for all parts that come in one turn of the loop. */
  #pumpSoon(): void {
    if (this.#pumping !== undefined) return;
    this.#pumping = setImmediate(() => {
      this.#pumping = undefined;
      this.#pump();
    });
  }

  #batchBytes(running: Running, map: LayerMap): number {
    const { fetcher } = this.#options;
    // A limited plan spreads its bytes: a large request would take the whole link for a while, and then nothing for long.
    const limited = (running.plan.bytesPerSecond ?? Number.POSITIVE_INFINITY) * LIMITED_SECONDS;
    if (fetcher.isPolite) return Math.min(POLITE_BATCH_BYTES, limited);
    const { bytesPerMs } = fetcher.link(map);
    // On a link that nobody knows the longest request could take many seconds, and what is needed first come late.
    const most = bytesPerMs === 0 ? FIRST_BATCH_BYTES : Math.max(POLITE_BATCH_BYTES, bytesPerMs * MAX_BATCH_MS);
    return Math.min(MAX_BATCH_BYTES, most, limited, FIRST_BATCH_BYTES * 2 ** running.batches);
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

  /** Bytes by which a plan may go on now. */
  #room(running: Running): number {
    const { maxUnreadBytes } = running.plan;
    if (running.unreadBytes >= maxUnreadBytes) {
      const { fetcher } = this.#options;
      const read = running.unread.filter(({ map, span }) => fetcher.wasRead(map, span));
      if (read.length > 0) {
        running.movedMs = performance.now();
        this.#forgetUnread(running, new Set(read));
      }
    }
    return maxUnreadBytes - running.unreadBytes;
  }

  /** Tells that these are no longer what is waiting to be read. */
  #forgetUnread(running: Running, gone: ReadonlySet<PlannedSpan>): void {
    running.unread = running.unread.filter((span) => !gone.has(span));
    running.unreadBytes = running.unread.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** Takes the span at a place of the queue and what soon follows it of the same layer, at least one, at most `bytes`. */
  #take({ queue }: Running, from: number, bytes: number): PlannedSpan[] {
    const { fetcher } = this.#options;
    const { map } = queue[from]!;
    const batch: PlannedSpan[] = [];
    const { bytesPerMs } = fetcher.link(map);
    const later =
      bytesPerMs === 0 ? bytes * UNKNOWN_LOOK_AHEAD : Math.max(LOOK_AHEAD_BYTES, bytesPerMs * LOOK_AHEAD_MS);
    const most = bytes + later;
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
      if (!this.#isWanted(span)) continue;
      batch.push(span);
      taken += span.bytes;
    }
    return batch;
  }

  /** Ends every plan: those with a request under way when that has ended. Idempotent. */
  close(): void {
    this.#closed = true;
    this.#pump();
  }
}

/** By the layer's number: its map may have been opened anew since. */
function isSpan(planned: PlannedSpan, map: LayerMap, span: number): boolean {
  return planned.span === span && planned.map.layerId === map.layerId;
}
