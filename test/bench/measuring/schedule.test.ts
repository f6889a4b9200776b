// The order of starts: random, balanced, a function of the seed.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { pairOrder } from '../../../src/bench/schedule.ts';

const NAMES = ['overlayfs', 'dedup', 'other'];

test('every pair holds every snapshotter once', () => {
  for (let pair = 0; pair < 50; pair++) {
    assert.deepEqual([...pairOrder(NAMES, 7, 'cell', pair)].sort(), [...NAMES].sort());
  }
});

test('in as many pairs as there are snapshotters, each has each place once', () => {
  for (let seed = 0; seed < 20; seed++) {
    for (let block = 0; block < 5; block++) {
      const orders = NAMES.map((_name, at) => pairOrder(NAMES, seed, 'cell', block * NAMES.length + at));
      for (let place = 0; place < NAMES.length; place++) {
        assert.equal(new Set(orders.map((order) => order[place])).size, NAMES.length);
      }
    }
  }
});

test('the same seed gives the same order, another seed or cell another one', () => {
  const run = (seed: number, cell: string) =>
    Array.from({ length: 24 }, (_none, pair) => pairOrder(NAMES, seed, cell, pair).join()).join('|');
  assert.equal(run(7, 'cell'), run(7, 'cell'));
  assert.notEqual(run(7, 'cell'), run(8, 'cell'));
  assert.notEqual(run(7, 'cell'), run(7, 'another'));
});

test('all orders occur, none much more often than another', () => {
  const counts = new Map<string, number>();
  for (let pair = 0; pair < 600; pair++) {
    const order = pairOrder(NAMES, 1, 'cell', pair).join();
    counts.set(order, (counts.get(order) ?? 0) + 1);
  }
  assert.equal(counts.size, 6);
  for (const [order, count] of counts) assert.ok(count > 60 && count < 140, `${order}: ${count}`);
});
