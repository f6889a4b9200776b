// Whose turn it is: requests and decodes of what readers wait for come before those of what is fetched ahead, which has places
// of its own. Owned by SpanFetcher and asked by SpanBatch, too; it fetches and decodes nothing itself.
import PQueue from 'p-queue';
import { Priority, WANTED_PRIORITY } from './span-ledger.ts';
import { isWanted, priorityOf, type Run } from './span-run.ts';

export interface TurnLimits {
  /** Parallel range requests per host, for readers. */
  readonly requestsPerHost: number;
  /** As many more for what is fetched ahead. */
  readonly aheadPerHost: number;
  /** Runs that are decoded, verified and written at once. */
  readonly decodes: number;
}

/** After a read that no plan foresaw more are expected for this long, milliseconds. */
const POLITE_MS = 1_000;

/** What is fetched ahead is decoded after this time all the same, milliseconds. */
const YIELD_MS = 100;

export class FetchTurns {
  readonly #limits: TurnLimits;
  /** By host: what a reader waits for, and what is fetched ahead. Neither takes a place of the other. */
  readonly #requests = new Map<string, { readonly wanted: PQueue; readonly ahead: PQueue }>();
  readonly #decodes: PQueue;
  /** Decodes of what a plan foresees: a reader does not queue behind them. */
  readonly #aheadDecodes: PQueue;
  /** Spans that readers wait for, and who waits until there are none. */
  #wanted = 0;
  #unwanted = Promise.withResolvers<void>();
  #lastReadMs = Number.NEGATIVE_INFINITY;

  constructor(limits: TurnLimits) {
    this.#limits = limits;
    this.#decodes = new PQueue({ concurrency: limits.decodes });
    this.#aheadDecodes = new PQueue({ concurrency: limits.decodes });
  }

  /** True while readers want what no plan foresaw: the link and the processors are theirs. */
  get isPolite(): boolean {
    return performance.now() - this.#lastReadMs < POLITE_MS;
  }

  /** True while a reader waits for what no plan foresaw. */
  get isWanted(): boolean {
    return this.#wanted > 0;
  }

  /** Tells of a span that a reader wants and no plan foresaw; it waits until the promise settles. */
  readerWaits(promise: Promise<unknown>): void {
    this.#lastReadMs = performance.now();
    this.#wanted++;
    const settled = (): void => {
      if (--this.#wanted > 0) return;
      this.#unwanted.resolve();
      this.#unwanted = Promise.withResolvers<void>();
    };
    promise.then(settled, settled);
  }

  /** Has a request to a host made when it is its turn. `task` never rejects. */
  request(host: string, priority: number, task: () => Promise<void>): void {
    void this.#requestsTo(host, priority).add(task, { priority });
  }

  /** The same for a run: sooner, when a reader joins it meanwhile. */
  requestRun(host: string, run: Run, task: () => Promise<void>): void {
    this.request(host, priorityOf(run), once(run, this.#requestsTo(host, WANTED_PRIORITY), task));
  }

  #requestsTo(host: string, priority: number): PQueue {
    let queues = this.#requests.get(host);
    if (queues === undefined) {
      const { requestsPerHost, aheadPerHost } = this.#limits;
      queues = {
        wanted: new PQueue({ concurrency: requestsPerHost }),
        ahead: new PQueue({ concurrency: aheadPerHost }),
      };
      this.#requests.set(host, queues);
    }
    return priority >= WANTED_PRIORITY ? queues.wanted : queues.ahead;
  }

  /** Resolves once decoding does not lag behind: until then what was fetched is not to grow. */
  decodesKeepUp(): Promise<void> {
    return this.#decodes.onSizeLessThan(this.#limits.decodes);
  }

  /** Has a run decoded when it is its turn. `work` never rejects. */
  async decode(run: Run, work: () => Promise<void>): Promise<void> {
    await this.#decodes.add(work, { priority: priorityOf(run) });
  }

  /** The same for a run that a plan foresaw: when no reader wants anything else, or a reader joins it. */
  async decodeAhead(run: Run, work: () => Promise<void>): Promise<void> {
    if (priorityOf(run) >= Priority.onDemand - 1) return await this.decode(run, work);
    const decode = once(run, this.#decodes, work);
    await this.#aheadDecodes.add(async () => {
      // Unless a reader has joined it meanwhile.
      if (!isWanted(run)) await this.#untilUnwanted();
      await decode();
    });
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

  /** Forgets requests whose turn has not come. */
  clear(): void {
    for (const { wanted, ahead } of this.#requests.values()) {
      wanted.clear();
      ahead.clear();
    }
  }
}

/** Work on a run that a reader who joins it has done in `sooner`, too: whichever comes first does it. */
function once(run: Run, sooner: PQueue, work: () => Promise<void>): () => Promise<void> {
  let begun = false;
  const atMostOnce = async (): Promise<void> => {
    if (begun) return;
    begun = true;
    for (const flight of run.flights) flight.hurry = undefined;
    await work();
  };
  for (const flight of run.flights) {
    flight.hurry = () => {
      flight.hurry = undefined;
      void sooner.add(atMostOnce, { priority: WANTED_PRIORITY });
    };
  }
  return atMostOnce;
}
