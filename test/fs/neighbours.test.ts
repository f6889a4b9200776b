// What is guessed from the misses of a start, and that nothing is guessed from single ones.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Neighbours } from '../../src/fs/neighbours.ts';

const nothingIsHere = () => false;

describe('Neighbours', () => {
  it('names what lies near several misses before what lies near one', () => {
    const neighbours = new Neighbours();
    for (const [i, span] of [10, 12, 50, 90].entries()) neighbours.onMiss(1, [span], 100, i);
    assert.deepEqual(neighbours.take(1, 4, nothingIsHere), [{ layerId: 1, span: 11 }]);
    const next = neighbours.take(6, 4, nothingIsHere).map(({ span }) => span);
    assert.deepEqual(
      next.toSorted((a, b) => a - b),
      [9, 13, 49, 51, 89, 91],
    );
  });

  it('names a span once, never one that was wanted, and none that is here', () => {
    const neighbours = new Neighbours();
    for (const span of [0, 1, 2, 3]) neighbours.onMiss(1, [span], 8, 0);
    const all = neighbours.take(100, 1, ({ span }) => span === 5);
    assert.deepEqual(all.map(({ span }) => span).toSorted(), [4, 6]);
    assert.deepEqual(neighbours.take(100, 1, nothingIsHere), []);
  });

  it('guesses only while misses come in a burst', () => {
    const neighbours = new Neighbours();
    for (let i = 0; i < 20; i++) {
      neighbours.onMiss(1, [i * 10], 1000, i * 500);
      assert.deepEqual(neighbours.take(8, i * 500, nothingIsHere), []);
    }
  });

  it('leaves layers alone that are not read in the burst', () => {
    const neighbours = new Neighbours();
    for (let i = 0; i < 4; i++) neighbours.onMiss(1, [i * 10], 100, i);
    for (let i = 0; i < 4; i++) neighbours.onMiss(2, [i * 10], 100, 10_000 + i);
    const layers = new Set(neighbours.take(1000, 10_004, nothingIsHere).map(({ layerId }) => layerId));
    assert.deepEqual([...layers], [2]);
  });

  it('knows nothing of a layer that was forgotten', () => {
    const neighbours = new Neighbours();
    for (let i = 0; i < 4; i++) neighbours.onMiss(1, [i * 10], 100, i);
    neighbours.forget(1);
    assert.deepEqual(neighbours.take(8, 4, nothingIsHere), []);
  });
});
