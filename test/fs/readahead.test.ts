// Which spans are fetched ahead, and that a reader that jumps about causes none.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Readahead } from '../../src/fs/readahead.ts';

describe('Readahead', () => {
  it('asks for nothing after a first miss, and for a doubling window while misses follow each other', () => {
    const readahead = new Readahead();
    assert.equal(readahead.onMiss(1, 10, 10, 1000).count, 0);
    assert.deepEqual(readahead.onMiss(1, 11, 11, 1000), { from: 12, count: 1 });
    assert.deepEqual(readahead.onMiss(1, 12, 12, 1000), { from: 13, count: 2 });
    assert.deepEqual(readahead.onMiss(1, 15, 15, 1000), { from: 16, count: 4 });
    assert.deepEqual(readahead.onMiss(1, 20, 20, 1000), { from: 21, count: 8 });
    assert.deepEqual(readahead.onMiss(1, 29, 29, 1000), { from: 30, count: 8 }, 'the window does not grow for ever');
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
    assert.ok(asked.size > 190);
  });

  it('asks for nothing when misses jump about', () => {
    const readahead = new Readahead();
    for (const span of [5, 90, 17, 60, 33, 2, 71, 48]) assert.equal(readahead.onMiss(1, span, span, 100).count, 0);
  });

  it('tells several sequential readers of a layer apart, and layers from each other', () => {
    const readahead = new Readahead();
    readahead.onMiss(1, 10, 10, 1000);
    readahead.onMiss(1, 500, 500, 1000);
    readahead.onMiss(2, 11, 11, 1000);
    assert.deepEqual(readahead.onMiss(1, 501, 501, 1000), { from: 502, count: 1 });
    assert.deepEqual(readahead.onMiss(1, 11, 11, 1000), { from: 12, count: 1 });
    assert.equal(readahead.onMiss(2, 13, 13, 1000).count, 0);
  });
});
