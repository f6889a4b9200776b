// Which spans are guessed from misses that lie close together.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { LinkEstimate } from '../../src/fs/link-estimate.ts';
import { Neighbours } from '../../src/fs/neighbours.ts';

const SPANS = 100;

describe('neighbours of misses', () => {
  it('guesses nothing from one miss, nor from two that lie far apart', () => {
    const neighbours = new Neighbours();
    assert.deepEqual(neighbours.onMiss(1, 50, 50, SPANS, 4), []);
    assert.deepEqual(neighbours.onMiss(1, 80, 80, SPANS, 4), []);
  });

  it('guesses what lies between two misses and around them, nearest to the new one first', () => {
    const neighbours = new Neighbours();
    neighbours.onMiss(1, 10, 10, SPANS, 2);
    assert.deepEqual(neighbours.onMiss(1, 14, 15, SPANS, 2), [13, 16, 12, 17, 11, 10, 9, 8]);
  });

  it('stays within the layer', () => {
    const neighbours = new Neighbours();
    neighbours.onMiss(1, 1, 1, 4, 4);
    assert.deepEqual(neighbours.onMiss(1, 3, 3, 4, 4), [2, 1, 0]);
  });

  it('tells layers apart, and forgets', () => {
    const neighbours = new Neighbours();
    neighbours.onMiss(1, 10, 10, SPANS, 4);
    assert.deepEqual(neighbours.onMiss(2, 12, 12, SPANS, 4), []);
    neighbours.forget(1);
    assert.deepEqual(neighbours.onMiss(1, 12, 12, SPANS, 4), []);
  });

  it('looks further when its guesses were read, and less far when they were not', () => {
    const neighbours = new Neighbours();
    const reach = (): number => {
      neighbours.forget(9);
      neighbours.onMiss(1, 50, 50, 1000, 0);
      const spans = neighbours.onMiss(1, 51, 51, 1000, 0);
      return Math.max(...spans) - 51;
    };
    assert.equal(reach(), 1);
    for (let i = 0; i < 12; i++) neighbours.judge(1, true);
    assert.equal(reach(), 8);
    for (let i = 0; i < 4; i++) neighbours.judge(1, false);
    assert.equal(reach(), 4);
    for (let i = 0; i < 400; i++) neighbours.judge(1, i % 4 === 0);
    assert.equal(reach(), 4, 'one in four is neither');
    for (let i = 0; i < 400; i++) neighbours.judge(1, true);
    assert.equal(reach(), 32, 'there is an end to it');
  });

  it('does not take a repeated miss for a second one', () => {
    const neighbours = new Neighbours();
    neighbours.onMiss(1, 10, 10, SPANS, 4);
    assert.deepEqual(neighbours.onMiss(1, 10, 10, SPANS, 4), []);
  });
});

describe('an estimate of the link', () => {
  it('is bandwidth times round trip', () => {
    const link = new LinkEstimate();
    assert.equal(link.bandwidthDelayBytes, 0);
    link.add(20, 500);
    assert.equal(link.bandwidthDelayBytes, 0, 'a small answer says nothing about bandwidth');
    link.add(30, 1_000_000);
    assert.equal(link.bandwidthDelayBytes, 2_000_000);
  });

  it('follows a link that changes', () => {
    const link = new LinkEstimate();
    link.add(1, 500);
    for (let i = 0; i < 30; i++) {
      link.add(100, 500);
      link.add(200, 500_000);
    }
    assert.equal(link.bandwidthDelayBytes, 500_000);
  });
});
