// How plans are fetched: order, size, places, bounds; and that every plan ends, whatever becomes of its spans.
import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, it, mock } from 'node:test';
import type { LayerMap } from '../../src/fs/loadable-layer.ts';
import type { PlannedSpan } from '../../src/prefetch/planner.ts';
import { type BatchFetcher, type Plan, PrefetchScheduler } from '../../src/prefetch/scheduler.ts';
import { KiB, MiB } from '../../src/units.ts';
import { quiet } from '../support/lazy-store.ts';

const map = (layerId: number): LayerMap => ({ layerId }) as LayerMap;
const [one, two, three] = [map(1), map(2), map(3)];

interface Batch {
  readonly map: LayerMap;
  readonly spans: readonly number[];
  readonly priority: number;
  /** Ends the request; default: all of it came. */
  end(came?: number): Promise<void>;
}

/** A fetcher whose requests end when the test says so. */
class Fetcher implements BatchFetcher {
  readonly batches: Batch[] = [];
  readonly underWay = new Set<string>();
  readonly read = new Set<string>();
  readonly forgotten = new Set<number>();
  isPolite = false;
  isWanted = false;
  expectWindows(): void {}
  carries = { roundTripBytes: 0, bytesPerMs: 0 };
  onWanted: BatchFetcher['onWanted'];
  foresees: BatchFetcher['foresees'];
  /** Requests end by themselves, with so much of them. */
  auto: ((spans: readonly number[]) => number) | undefined;
  running = 0;
  mostRunning = 0;

  fetchBatch(layer: LayerMap, spans: readonly number[], priority: number): Promise<number> {
    const { promise, resolve } = Promise.withResolvers<number>();
    const keys = spans.map((span) => `${layer.layerId}:${span}`);
    for (const key of keys) this.underWay.add(key);
    this.mostRunning = Math.max(this.mostRunning, ++this.running);
    let ended = false;
    const end = async (came = spans.length): Promise<void> => {
      if (ended) return;
      ended = true;
      this.running--;
      for (const key of keys) this.underWay.delete(key);
      resolve(came);
      await settled();
    };
    this.batches.push({ map: layer, spans, priority, end });
    const { auto } = this;
    if (auto !== undefined) queueMicrotask(() => void end(auto(spans)));
    return promise;
  }

  isForgotten(layerId: number): boolean {
    return this.forgotten.has(layerId);
  }

  isUnderWay(layer: LayerMap, span: number): boolean {
    return this.underWay.has(`${layer.layerId}:${span}`);
  }

  wasRead(layer: LayerMap, span: number): boolean {
    return this.read.has(`${layer.layerId}:${span}`);
  }

  link(): { roundTripBytes: number; bytesPerMs: number } {
    return this.carries;
  }

  /** Every span that was asked for, in the order of requests. */
  get asked(): string[] {
    return this.batches.flatMap((batch) => batch.spans.map((span) => `${batch.map.layerId}:${span}`));
  }
}

/** Lets promises run; timers are the test's. */
async function settled(): Promise<void> {
  for (let i = 0; i < 20; i++) await Promise.resolve();
}

function* spans(layer: LayerMap, count: number, bytes: number = MiB, first = 0): Generator<PlannedSpan> {
  for (let span = first; span < first + count; span++) yield { map: layer, span, bytes };
}

describe('the scheduler of prefetches', () => {
  let fetcher: Fetcher;
  let stop: AbortController;
  let now = 0;

  beforeEach(() => {
    fetcher = new Fetcher();
    stop = new AbortController();
    now = 1_000_000;
    mock.timers.enable({ apis: ['setTimeout'] });
    mock.method(performance, 'now', () => now);
  });
  afterEach(() => {
    mock.timers.reset();
    mock.restoreAll();
  });

  const scheduler = (options: { workers?: number; queueSize?: number } = {}): PrefetchScheduler =>
    new PrefetchScheduler({ fetcher, workers: 4, queueSize: 1000, log: quiet, ...options });

  const plan = (planned: Iterator<PlannedSpan>, more: Partial<Plan> = {}): Plan => ({
    spans: planned,
    maxUnreadBytes: 1024 * MiB,
    signal: stop.signal,
    ...more,
  });

  /** Begins a plan; `ended()` tells whether it has ended. */
  function begun(of: PrefetchScheduler, what: Plan): { ended(): Promise<boolean> } {
    let over = false;
    void of.run(what).then(() => {
      over = true;
    });
    return {
      ended: async () => {
        await settled();
        return over;
      },
    };
  }

  async function pass(ms: number): Promise<void> {
    for (let left = ms; left > 0; left -= 50) {
      now += 50;
      mock.timers.tick(50);
      await settled();
    }
  }

  it('asks for what is needed first in small, then in larger requests, and ends with the last one', async () => {
    fetcher.carries = { roundTripBytes: KiB, bytesPerMs: MiB };
    const running = begun(scheduler(), plan(spans(one, 40)));
    assert.deepEqual(
      fetcher.batches.map((batch) => batch.spans.length),
      [4, 8, 16, 12],
    );
    for (let i = 0; i < fetcher.batches.length; i++) {
      assert.equal(await running.ended(), false);
      await fetcher.batches[i]!.end();
    }
    assert.equal(await running.ended(), true);
    assert.ok(fetcher.batches.every((batch) => batch.spans.length <= 16));
    assert.deepEqual(
      fetcher.asked,
      Array.from({ length: 40 }, (_, i) => `1:${i}`),
    );
  });

  it('puts spans of one layer into one request although those of another lie between, and forgets none', async () => {
    fetcher.auto = (asked) => asked.length;
    const mixed = function* (): Generator<PlannedSpan> {
      for (let span = 19; span >= 0; span--)
        for (const layer of [one, two, three]) yield { map: layer, span, bytes: MiB };
    };
    assert.equal(await begun(scheduler(), plan(mixed())).ended(), true);
    assert.deepEqual(fetcher.batches[0]!.spans, [19, 18, 17, 16], 'what is needed first');
    assert.equal(fetcher.batches[1]!.map, two, 'the layer that is needed next');
    assert.equal(new Set(fetcher.asked).size, 60);
    assert.equal(fetcher.asked.length, 60);
  });

  it('makes short requests while somebody reads what no plan foresaw, and on a slow link', async () => {
    fetcher.isPolite = true;
    const polite = begun(scheduler({ workers: 1 }), plan(spans(one, 3)));
    assert.equal(fetcher.batches[0]!.spans.length, 1);
    fetcher.isPolite = false;
    fetcher.carries = { roundTripBytes: 0, bytesPerMs: (2 * MiB) / 175 };
    await fetcher.batches[0]!.end();
    assert.equal(fetcher.batches[1]!.spans.length, 2, '175 ms of the link');
    await fetcher.batches[1]!.end();
    assert.equal(await polite.ended(), true);
  });

  it('keeps to its workers, and to as many requests as fill the link', async () => {
    begun(scheduler({ workers: 3 }), plan(spans(one, 100)));
    assert.equal(fetcher.running, 2, '8 MiB while nobody knows the link');
    fetcher.carries = { roundTripBytes: KiB, bytesPerMs: MiB / 100 };
    await fetcher.batches[0]!.end();
    assert.equal(fetcher.running, 1, 'one fills a link without a round trip');
    fetcher.carries = { roundTripBytes: 100 * MiB, bytesPerMs: 10 * MiB };
    await fetcher.batches[1]!.end();
    assert.equal(fetcher.running, 3);
    assert.equal(fetcher.mostRunning, 3);
  });

  it('has no more spans waiting than the queue holds, of all plans together, and gives each plan its turn', async () => {
    for (const queueSize of [1, 2, 7, 100]) {
      fetcher = new Fetcher();
      const queue = scheduler({ queueSize, workers: 2 });
      const plans = [one, two, three].map((layer) => begun(queue, plan(spans(layer, 60))));
      const firstOf = new Map<number, number>();
      for (let i = 0; i < fetcher.batches.length; i++) {
        assert.ok(queue.queuedSpans <= queueSize, `${queue.queuedSpans} of ${queueSize}`);
        const { layerId } = fetcher.batches[i]!.map;
        if (!firstOf.has(layerId)) firstOf.set(layerId, i);
        await fetcher.batches[i]!.end();
        if (i + 1 === fetcher.batches.length) await pass(100);
      }
      for (const each of plans) assert.equal(await each.ended(), true, `queue of ${queueSize}`);
      assert.equal(new Set(fetcher.asked).size, 180);
      assert.equal(fetcher.asked.length, 180);
      if (queueSize === 100)
        assert.ok(
          [...firstOf.values()].every((at) => at < 8),
          `first turns: ${[...firstOf.values()]}`,
        );
    }
  });

  it('lets a plan go on although another one waits for its reader with a full queue', async () => {
    fetcher.auto = (asked) => asked.length;
    const queue = scheduler({ queueSize: 10 });
    const blocked = begun(queue, plan(spans(one, 1000), { maxUnreadBytes: 20 * MiB }));
    await pass(1000);
    assert.equal(await blocked.ended(), false);
    const other = begun(queue, plan(spans(two, 50)));
    await pass(1000);
    assert.equal(await other.ended(), true);
  });

  it('wastes no more than a plan may, and goes on as its reader does', async () => {
    fetcher.auto = (asked) => asked.length;
    const running = begun(scheduler(), plan(spans(one, 200), { maxUnreadBytes: 50 * MiB }));
    await pass(1000);
    assert.equal(fetcher.asked.length, 50);
    for (let span = 0; span < 10; span++) fetcher.read.add(`1:${span}`);
    await pass(100);
    assert.equal(fetcher.asked.length, 60);
    for (let span = 0; span < 200; span++) {
      fetcher.read.add(`1:${span}`);
      await pass(50);
    }
    assert.equal(fetcher.asked.length, 200);
    assert.equal(await running.ended(), true);
  });

  it('keeps to that also when readers want spans of the plan', async () => {
    fetcher.auto = (asked) => asked.length;
    begun(scheduler(), plan(spans(one, 900, MiB), { maxUnreadBytes: 30 * MiB }));
    await pass(500);
    // Every reader's span draws what a wrong trace names beside it.
    for (let span = 30; span < 500; span += 10) {
      fetcher.onWanted?.(one, span);
      await settled();
    }
    assert.ok(fetcher.asked.length <= 31, `${fetcher.asked.length} spans`);
  });

  it('gives a plan up whose reader does not come, so that it holds nothing for ever', async () => {
    fetcher.auto = (asked) => asked.length;
    const queue = scheduler();
    const running = begun(queue, plan(spans(one, 500), { maxUnreadBytes: 10 * MiB }));
    await pass(100_000);
    assert.equal(await running.ended(), false, 'a start may take its time');
    await pass(30_000);
    assert.equal(await running.ended(), true);
    assert.equal(queue.queuedSpans, 0);
    assert.equal(fetcher.asked.length, 10);
  });

  it('goes on from a reader that has caught up with it, at once and beyond its places', async () => {
    begun(scheduler({ workers: 1 }), plan(spans(one, 100)));
    assert.equal(fetcher.running, 1);
    fetcher.carries = { roundTripBytes: 0, bytesPerMs: (3 * MiB) / 40 };
    fetcher.onWanted?.(one, 50);
    assert.deepEqual(fetcher.batches[1]!.spans, [50, 51, 52]);
    assert.ok(fetcher.batches[1]!.priority < 100 && fetcher.batches[1]!.priority > fetcher.batches[0]!.priority);
    fetcher.onWanted?.(one, 500);
    fetcher.onWanted?.(two, 60);
    assert.equal(fetcher.batches.length, 2, 'what no plan has is its reader’s own');
    for (let i = 0; i < fetcher.batches.length; i++) await fetcher.batches[i]!.end();
    assert.equal(fetcher.asked.length, 100);
    assert.equal(new Set(fetcher.asked).size, 100);
  });

  it('keeps to bytes a second', async () => {
    fetcher.auto = (asked) => asked.length;
    const progress: number[] = [];
    const slow = plan(spans(one, 60), { bytesPerSecond: 2 * MiB, onProgress: (bytes) => void progress.push(bytes) });
    const running = begun(scheduler(), slow);
    await pass(10_000);
    assert.ok(fetcher.asked.length >= 18 && fetcher.asked.length <= 30, `${fetcher.asked.length} MiB in 10 s`);
    await pass(30_000);
    assert.equal(await running.ended(), true);
    assert.equal(
      progress.reduce((sum, bytes) => sum + bytes, 0),
      60 * MiB,
    );
  });

  it('ends an aborted plan once its request has ended, gives its places back, and listens no longer', async () => {
    const own = new AbortController();
    const queue = scheduler({ workers: 1 });
    const running = begun(queue, plan(spans(one, 100), { signal: own.signal }));
    own.abort();
    assert.equal(queue.queuedSpans, 0);
    assert.equal(await running.ended(), false, 'its request is under way');
    await fetcher.batches[0]!.end();
    assert.equal(await running.ended(), true);
    const next = begun(queue, plan(spans(two, 1)));
    await fetcher.batches[1]!.end();
    assert.equal(await next.ended(), true);
    const late = begun(queue, plan(spans(one, 100), { signal: own.signal }));
    assert.equal(await late.ended(), true);
    assert.equal(fetcher.batches.length, 2);
  });

  it('ends a plan when its layer is dropped, and goes on with those of other layers', async () => {
    const queue = scheduler({ workers: 1 });
    const mixed = function* (): Generator<PlannedSpan> {
      yield* spans(one, 3000);
      yield* spans(two, 2);
    };
    const running = begun(queue, plan(mixed(), { maxUnreadBytes: 20 * MiB }));
    fetcher.forgotten.add(1);
    await fetcher.batches[0]!.end(0);
    assert.deepEqual(fetcher.batches[1]!.map, two);
    await fetcher.batches[1]!.end();
    assert.equal(await running.ended(), true);
    assert.equal(fetcher.batches.length, 2);
  });

  it('ends a plan all of whose spans are being fetched by others', async () => {
    for (let span = 0; span < 3000; span++) fetcher.underWay.add(`1:${span}`);
    for (const queueSize of [1, 1000])
      assert.equal(await begun(scheduler({ queueSize }), plan(spans(one, 3000))).ended(), true);
    // Also when they come to be under way while they wait.
    fetcher.underWay.clear();
    const queue = scheduler({ queueSize: 10, workers: 1 });
    const first = begun(queue, plan(spans(two, 5)));
    const second = begun(queue, plan(spans(one, 100)));
    for (let span = 0; span < 100; span++) fetcher.underWay.add(`1:${span}`);
    for (let i = 0; i < fetcher.batches.length; i++) await fetcher.batches[i]!.end();
    await pass(200);
    assert.equal(await first.ended(), true);
    assert.equal(await second.ended(), true);
  });

  it('ends a plan of which nothing comes after three requests', async () => {
    fetcher.auto = () => 0;
    const queue = scheduler({ workers: 1 });
    assert.equal(await begun(queue, plan(spans(one, 1000))).ended(), true);
    assert.equal(fetcher.batches.length, 3);
    assert.equal(queue.queuedSpans, 0);
  });

  it('does not count what could not be had as waiting for its reader', async () => {
    let requests = 0;
    fetcher.auto = (asked) => (++requests % 2 === 0 ? asked.length : 0);
    begun(scheduler({ workers: 1 }), plan(spans(one, 1000), { maxUnreadBytes: 100 * MiB }));
    await pass(500);
    assert.ok(fetcher.asked.length > 150, `${fetcher.asked.length} MiB`);
  });

  it('ends a plan that fails to say what it wants', async () => {
    fetcher.auto = (asked) => asked.length;
    const broken = function* (): Generator<PlannedSpan> {
      yield* spans(one, 5);
      throw new Error('the store is closed');
    };
    assert.equal(await begun(scheduler(), plan(broken())).ended(), true);
    assert.equal(fetcher.asked.length, 5);
  });

  it('ends every plan when it is closed, and begins no other', async () => {
    const queue = scheduler({ workers: 1 });
    const running = [one, two].map((layer) => begun(queue, plan(spans(layer, 100))));
    queue.close();
    await fetcher.batches[0]!.end();
    for (const each of running) assert.equal(await each.ended(), true);
    assert.equal(await begun(queue, plan(spans(three, 1))).ended(), true);
    assert.equal(fetcher.batches.length, 1);
  });

  it('asks for a span that is larger than what a plan may waste, but for no more', async () => {
    fetcher.auto = (asked) => asked.length;
    begun(scheduler(), plan(spans(one, 10, 30 * MiB), { maxUnreadBytes: 20 * MiB }));
    await pass(500);
    assert.equal(fetcher.asked.length, 1);
  });
});
