// What becomes of spans that were fetched: each is counted once, whatever happens to it and in which order.
import assert from 'node:assert/strict';
import { afterEach, describe, it, mock } from 'node:test';
import type { LayerMap } from '../../src/fs/loadable-layer.ts';
import { Priority, SpanLedger } from '../../src/fs/span-ledger.ts';

const SPANS = 200;
const layer = (layerId: number): LayerMap =>
  ({
    layerId,
    spanCount: SPANS,
    compressedRange: (span: number) => ({ offset: 0, length: 1000 + span }),
  }) as unknown as LayerMap;
const one = layer(1);

describe('the span ledger', () => {
  afterEach(() => mock.restoreAll());

  const outcomes: [string, (ledger: SpanLedger) => void, Partial<ReturnType<SpanLedger['stats']>>][] = [
    ['read on demand', (ledger) => ledger.asked(one, 0, Priority.onDemand, false), { spans: 1, spanBytes: 1000 }],
    [
      'fetched ahead and read',
      (ledger) => {
        ledger.asked(one, 0, Priority.trace, false);
        ledger.read(1, 0);
        ledger.read(1, 0);
        ledger.settle([1]);
      },
      { aheadBytes: 1000, prefetchBytes: 1000, usefulBytes: 1000 },
    ],
    [
      'waited for while on its way, and read later',
      (ledger) => {
        ledger.asked(one, 0, Priority.trace, false);
        ledger.asked(one, 0, Priority.onDemand, true);
        ledger.asked(one, 0, Priority.onDemand, true);
        ledger.read(1, 0);
        ledger.settle([1]);
      },
      { spans: 1, spanBytes: 1000, prefetchBytes: 1000, lateBytes: 1000 },
    ],
    [
      'never read',
      (ledger) => {
        ledger.asked(one, 0, Priority.guess, false);
        ledger.settle([1, 2]);
        ledger.settle([1]);
      },
      { aheadBytes: 1000, prefetchBytes: 1000, wastedBytes: 1000 },
    ],
    [
      'never read in its start, and read after it',
      (ledger) => {
        ledger.asked(one, 0, Priority.start, false);
        ledger.settle([1]);
        ledger.read(1, 0);
      },
      { aheadBytes: 1000, prefetchBytes: 1000, wastedBytes: 1000 },
    ],
    [
      'not read in its start, evicted, and waited for by a later one that fetches it ahead again',
      (ledger) => {
        ledger.asked(one, 0, Priority.trace, false);
        ledger.settle([1]);
        ledger.asked(one, 0, Priority.trace, false);
        ledger.asked(one, 0, Priority.onDemand, true);
      },
      { spans: 1, spanBytes: 1000, prefetchBytes: 1000, wastedBytes: 1000 },
    ],
    [
      'read, evicted, and waited for again',
      (ledger) => {
        ledger.asked(one, 0, Priority.sequential, false);
        ledger.read(1, 0);
        ledger.asked(one, 0, Priority.onDemand, false);
        ledger.read(1, 0);
      },
      { spans: 1, spanBytes: 1000, prefetchBytes: 1000, usefulBytes: 1000 },
    ],
    [
      'fetched ahead and gone, or never come, when a reader wants it',
      (ledger) => {
        ledger.asked(one, 0, Priority.trace, false);
        ledger.asked(one, 0, Priority.onDemand, false);
        ledger.read(1, 0);
        ledger.settle([1]);
      },
      { spans: 1, spanBytes: 1000, prefetchBytes: 1000, wastedBytes: 1000 },
    ],
    [
      'read on demand, evicted and fetched ahead',
      (ledger) => {
        ledger.asked(one, 0, Priority.onDemand, false);
        ledger.asked(one, 0, Priority.trace, false);
        ledger.read(1, 0);
        ledger.settle([1]);
      },
      { spans: 1, spanBytes: 1000 },
    ],
    [
      'fetched ahead when its layer is dropped',
      (ledger) => {
        ledger.asked(one, 0, Priority.trace, false);
        ledger.forget(1);
        ledger.forget(1);
      },
      { aheadBytes: 1000, prefetchBytes: 1000, wastedBytes: 1000 },
    ],
    ['read without having been fetched', (ledger) => ledger.read(1, 0), {}],
  ];
  for (const [what, happen, expected] of outcomes) {
    it(`counts a span that was ${what}`, () => {
      const ledger = new SpanLedger();
      happen(ledger);
      const none = {
        spans: 0,
        spanBytes: 0,
        aheadBytes: 0,
        prefetchBytes: 0,
        usefulBytes: 0,
        lateBytes: 0,
        wastedBytes: 0,
      };
      assert.deepEqual(ledger.stats(), { ...none, ...expected });
    });
  }

  it('counts nothing twice in any order of events', () => {
    let seed = 7;
    const random = (below: number): number => {
      seed = (seed * 48_271) % 2_147_483_647;
      return seed % below;
    };
    const priorities = Object.values(Priority);
    for (let round = 0; round < 200; round++) {
      const ledger = new SpanLedger();
      const asked = new Set<number>();
      for (let step = 0; step < 300; step++) {
        const span = random(20);
        if (random(3) === 0) ledger.read(1, span);
        else if (random(30) === 0) ledger.settle([1]);
        else {
          ledger.asked(one, span, priorities[random(priorities.length)]!, asked.has(span) && random(2) === 0);
          asked.add(span);
        }
      }
      const { prefetchBytes, usefulBytes, lateBytes, wastedBytes, spanBytes, aheadBytes } = ledger.stats();
      const all = [...asked].reduce((sum, span) => sum + 1000 + span, 0);
      assert.equal(spanBytes + aheadBytes, all, 'waited for, or only fetched ahead');
      assert.ok(usefulBytes + lateBytes + wastedBytes <= prefetchBytes && prefetchBytes <= all);
      ledger.settle([1]);
      const after = ledger.stats();
      assert.equal(after.usefulBytes + after.lateBytes + after.wastedBytes, prefetchBytes, 'nothing is left open');
    }
  });

  it('tells why a span was fetched first, and whether somebody has read it or waited for it', () => {
    const ledger = new SpanLedger();
    const kinds = Object.keys(Priority) as (keyof typeof Priority)[];
    for (const [span, kind] of kinds.entries()) ledger.asked(one, span, Priority[kind], false);
    ledger.asked(one, 100, Priority.onDemand - 1, false);
    assert.deepEqual(
      kinds.map((_, span) => ledger.origin(1, span)),
      ['read', 'trace', 'start', 'sequential', 'guess', 'background'],
    );
    assert.equal(ledger.origin(1, 100), 'trace', 'a plan that goes on from a reader');
    assert.equal(ledger.origin(1, 101), undefined);
    assert.equal(ledger.wasRead(1, 0), true);
    assert.equal(ledger.wasRead(1, 1), false);
    ledger.read(1, 1);
    assert.equal(ledger.wasRead(1, 1), true);
    ledger.forget(1);
    assert.equal(ledger.origin(1, 0), undefined);
    assert.equal(ledger.wasRead(1, 0), false);
  });

  describe('usefulness', () => {
    let now = 0;
    function watched(useful: number, of: number): SpanLedger {
      now = 0;
      mock.method(performance, 'now', () => now);
      const ledger = new SpanLedger();
      ledger.watch([1], true);
      for (let span = 0; span < of; span++) {
        ledger.asked(one, span, Priority.guess, false);
        if (span < useful) ledger.read(1, span);
      }
      return ledger;
    }

    it('is the share of what was read of what was fetched for a reason, once it could be', () => {
      const ledger = watched(10, 20);
      assert.equal(ledger.usefulness('guess', 500), undefined, 'too soon');
      assert.equal(ledger.usefulness('guess', 1500), 0.5);
      assert.equal(ledger.usefulness('trace', 1500), undefined);
      assert.equal(watched(2, 11).usefulness('guess', 1500), undefined, 'too few');
    });

    it('is forgotten after a minute, so that one bad start does not end guesses for good', () => {
      const ledger = watched(0, 64);
      assert.equal(ledger.usefulness('guess', 30_000), 0);
      assert.equal(ledger.usefulness('guess', 61_000), undefined);
    });

    it('is not judged where nobody tells of reads', () => {
      const ledger = watched(0, 0);
      ledger.watch([1], true);
      ledger.watch([1], false);
      ledger.watch([1], false);
      ledger.watch([1], false);
      for (let span = 0; span < 50; span++) ledger.asked(one, span, Priority.sequential, false);
      assert.equal(ledger.usefulness('sequential', 2_000), undefined);
    });

    it('says nothing of layers that were dropped', () => {
      const ledger = watched(0, 64);
      ledger.forget(1);
      assert.equal(ledger.usefulness('guess', 2_000), undefined);
    });

    it('counts what a reader waited for as read: it was the right span', () => {
      const ledger = watched(0, 20);
      for (let span = 0; span < 20; span++) ledger.asked(one, span, Priority.onDemand, true);
      assert.equal(ledger.usefulness('guess', 2_000), 1);
    });
  });
});
