// Which spans are fetched ahead, and that a reader that jumps about causes none.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Readahead } from '../../src/fs/readahead.ts';

describe('Readahead', () => {
  it('asks for nothing in the first spans of a run, and for a doubling window while it goes on', () => {
    const readahead = new Readahead();
    for (let span = 10; span < 15; span++) assert.equal(readahead.onMiss(1, span, span, 1000).count, 0);
    assert.deepEqual(readahead.onMiss(1, 15, 15, 1000), { from: 16, count: 2 });
    assert.deepEqual(readahead.onMiss(1, 18, 18, 1000), { from: 19, count: 4 });
    assert.deepEqual(readahead.onMiss(1, 23, 23, 1000), { from: 24, count: 8 });
    assert.deepEqual(readahead.onMiss(1, 32, 32, 1000), { from: 33, count: 8 }, 'the window does not grow for ever');
  });

  it('never asks twice for a span of one reader', () => {
    const readahead = new Readahead();
    const asked = new Set<number>();
    for (let span = 0; span < 200; span++) {
      const { from, count } = readahead.onMiss(7, span, span, 200);
      for (let ahead = from; ahead < from + count; ahead++) {
        assert.ok(!asked.has(ahead), `span ${ahead} was asked for twice`);
        assert.ok(ahead < 200, 'beyond the end of the layer');
        asked.add(ahead);
      }
    }
    assert.ok(asked.size > 180);
  });

  it('asks for nothing when misses jump about', () => {
    const readahead = new Readahead();
    for (const span of [5, 90, 17, 60, 33, 2, 71, 48]) assert.equal(readahead.onMiss(1, span, span, 100).count, 0);
  });

  it('tells several sequential readers of a layer apart, and layers from each other', () => {
    const readahead = new Readahead();
    for (let step = 0; step < 5; step++) {
      readahead.onMiss(1, 10 + step, 10 + step, 1000);
      readahead.onMiss(1, 500 + step, 500 + step, 1000);
      readahead.onMiss(2, 100 * step, 100 * step, 1000);
    }
    assert.deepEqual(readahead.onMiss(1, 505, 505, 1000), { from: 506, count: 2 });
    assert.deepEqual(readahead.onMiss(1, 15, 15, 1000), { from: 16, count: 2 });
    assert.equal(readahead.onMiss(2, 15, 15, 1000).count, 0);
  });

  it('looks further ahead where nearly all of it was read, less far where half was not', () => {
    const widest = (useful: number | undefined): number => {
      const readahead = new Readahead();
      let most = 0;
      for (let span = 0; span < 300; span++) {
        const { from, count } = readahead.onMiss(1, span, span, 1000, useful);
        if (count > 0) most = Math.max(most, from + count - span - 1);
      }
      return most;
    };
    assert.equal(widest(undefined), 8);
    assert.equal(widest(0.7), 8);
    assert.equal(widest(0.95), 32);
    assert.equal(widest(0.2), 2);
  });

  it('narrows a window that was wide once it is not read', () => {
    const readahead = new Readahead();
    for (let span = 0; span < 60; span++) readahead.onMiss(1, span, span, 1000, 1);
    const asked: number[] = [];
    for (let span = 60; span < 200; span++) asked.push(readahead.onMiss(1, span, span, 1000, 0).count);
    // What was asked for is not asked for again; from there on two spans ahead.
    assert.ok(asked.every((count) => count <= 2));
  });
});
