import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { wallClockMs } from '../src/clock.ts';

/** By how much the clock is off at the beginning of a millisecond; undefined when something came in between. */
function offAtTick(): number | undefined {
  const begun = Date.now();
  let now = begun;
  while (now === begun) now = Date.now();
  const fine = wallClockMs();
  return Date.now() === now ? fine - now : undefined;
}

describe('the fine wall clock', () => {
  test('stays within a part of a millisecond of the wall clock while the two run apart', async (t) => {
    const real = performance.now.bind(performance);
    const from = real();
    t.mock.method(performance, 'now', () => from + (real() - from) * 1.0005);
    const off: number[] = [];
    for (let round = 0; round < 12; round++) {
      await sleep(137);
      const found = offAtTick();
      if (found !== undefined) off.push(Math.abs(found));
    }
    assert.ok(off.length > 4);
    off.sort((a, b) => a - b);
    // Without comparing them anew it would be 0.8 at the end; the largest may have been interrupted.
    assert.ok(off[Math.floor(off.length * 0.8)]! < 0.35, `${off}`);
  });

  test('is never outside of what the wall clock says', () => {
    for (let round = 0; round < 10_000; round++) {
      const earliest = Date.now();
      const fine = wallClockMs();
      assert.ok(fine >= earliest && fine <= Date.now() + 1);
    }
  });
});
