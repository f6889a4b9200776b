// Plans in the background: how fast they go under a limit, that they give way, and that they tell what did not come.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import type { LayerMap } from '../../src/fs/loadable-layer.ts';
import { Priority } from '../../src/fs/span-ledger.ts';
import type { PlannedSpan } from '../../src/prefetch/planner.ts';
import { type BatchFetcher, PrefetchScheduler } from '../../src/prefetch/scheduler.ts';

const SPAN_BYTES = 100_000;
const NEVER = new AbortController().signal;

interface Batch {
  readonly layer: number;
  readonly spans: number;
  readonly atMs: number;
}

function made(fetch: (spans: number) => Promise<number> = async (spans) => spans) {
  const batches: Batch[] = [];
  const fetcher: BatchFetcher = {
    fetchBatch: async (map, spans) => {
      batches.push({ layer: map.layerId, spans: spans.length, atMs: performance.now() });
      return await fetch(spans.length);
    },
    isForgotten: () => false,
    expectWindows: () => {},
    isUnderWay: () => false,
    wasRead: () => false,
    link: () => ({ roundTripBytes: 0, bytesPerMs: 0 }),
    isPolite: false,
    isWanted: false,
    onWanted: undefined,
    foresees: undefined,
  };
  const scheduler = new PrefetchScheduler({ fetcher, workers: 2, queueSize: 1000, log: pino({ level: 'silent' }) });
  return { batches, scheduler };
}

function spans(layerId: number, count: number): Iterator<PlannedSpan> {
  const map = { layerId } as LayerMap;
  return Array.from({ length: count }, (_, span) => ({ map, span, bytes: SPAN_BYTES })).values();
}

const background = { maxUnreadBytes: Number.POSITIVE_INFINITY, priority: Priority.background, signal: NEVER };

describe('a plan in the background', () => {
  it('goes no faster than its limit, in small requests', async () => {
    const { batches, scheduler } = made();
    const startedMs = performance.now();
    await scheduler.run({ ...background, spans: spans(1, 20), bytesPerSecond: 2_000_000 });
    const tookMs = performance.now() - startedMs;
    // The first request comes at once, and each is worth half a second.
    assert.ok(tookMs > 450 && tookMs < 1500, `${tookMs} ms for 2 MB at 2 MB/s`);
    assert.ok(batches.every((batch) => batch.spans <= 10));
  });

  it('begins nothing while a plan that is needed sooner has spans to ask for', async () => {
    const { batches, scheduler } = made((spans) => sleep(5, spans));
    const slow = scheduler.run({ ...background, spans: spans(1, 400) });
    const soon = scheduler.run({ ...background, priority: Priority.trace, spans: spans(2, 400) });
    await Promise.all([slow, soon]);
    const layers = batches.map(({ layer }) => layer);
    const last = layers.lastIndexOf(2);
    // What had begun before the other came is all.
    assert.ok(layers.slice(0, last).filter((layer) => layer === 1).length <= 2, layers.join(' '));
    assert.equal(
      batches.reduce((sum, batch) => sum + batch.spans, 0),
      800,
    );
  });

  it('tells which requests did not bring all they asked for', async () => {
    const { scheduler } = made(async (spans) => spans - 1);
    const told: boolean[] = [];
    const onProgress = (_bytes: number, complete: boolean): void => void told.push(complete);
    await scheduler.run({ ...background, spans: spans(1, 3), onProgress });
    assert.deepEqual(told, [false]);
  });
});
