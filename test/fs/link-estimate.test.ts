// What a link is taken for, from answers as links give them.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { LinkEstimate } from '../../src/fs/link-estimate.ts';
import { KiB, MiB } from '../../src/units.ts';

/** Milliseconds of an answer: the round trip, the transfer, and what it waited behind others. */
function tookMs(link: { roundTripMs: number; bytesPerMs: number }, bytes: number, waitedMs = 0): number {
  return link.roundTripMs + bytes / link.bytesPerMs + waitedMs;
}

function estimate(link: { roundTripMs: number; bytesPerMs: number }, waits: boolean): number {
  const made = new LinkEstimate();
  for (let i = 0; i < 30; i++) {
    const bytes = i % 3 === 0 ? 4 * KiB : 400 * KiB;
    made.add(tookMs(link, bytes, waits && i % 5 !== 0 ? i * 7 : 0), bytes, i);
  }
  return made.roundTripBytes(30);
}

describe('LinkEstimate', () => {
  for (const link of [
    { roundTripMs: 1, bytesPerMs: 125_000 },
    { roundTripMs: 20, bytesPerMs: 125_000 },
    { roundTripMs: 50, bytesPerMs: 12_500 },
  ]) {
    it(`finds what ${link.roundTripMs} ms carry at ${link.bytesPerMs * 8e-6} Gbit/s, also where answers wait behind others`, () => {
      const real = link.roundTripMs * link.bytesPerMs;
      for (const waits of [false, true]) {
        const found = estimate(link, waits);
        assert.ok(found > 0.5 * real && found < 1.5 * real, `${found} instead of ${real}, waits: ${waits}`);
      }
    });
  }

  it('counts what several long answers bring together', () => {
    const made = new LinkEstimate();
    // 4 MB/s each, two at a time.
    for (let ms = 0; ms <= 2_000; ms += 50) {
      made.received(200_000, ms);
      made.received(200_000, ms + 1);
    }
    const found = made.bytesPerMs(2_400);
    assert.ok(found > 7_500 && found < 9_500, `${found}`);
  });

  it('says nothing before enough is known, nor from answers of one kind alone', () => {
    const link = new LinkEstimate();
    for (let i = 0; i < 6; i++) link.add(20, i === 0 ? KiB : MiB, i);
    assert.equal(link.roundTripBytes(7), 0);
    const large = new LinkEstimate();
    for (let i = 0; i < 100; i++) large.add(20, MiB, i);
    assert.equal(large.roundTripBytes(100), 0);
    const small = new LinkEstimate();
    for (let i = 0; i < 100; i++) small.add(20, KiB, i);
    assert.equal(small.roundTripBytes(100), 0);
  });

  it('tells the rate of the link by itself, as little as the round trip before enough is known', () => {
    const link = { roundTripMs: 20, bytesPerMs: 12_500 };
    const made = new LinkEstimate();
    assert.equal(made.bytesPerMs(0), 0);
    for (let i = 0; i < 30; i++) {
      const bytes = i % 3 === 0 ? 4 * KiB : MiB;
      made.add(tookMs(link, bytes), bytes, i);
    }
    const found = made.bytesPerMs(30);
    assert.ok(found > 0.9 * link.bytesPerMs && found < 1.1 * link.bytesPerMs, `${found}`);
    assert.equal(made.bytesPerMs(60_000), found, 'what was known last');
    assert.equal(made.bytesPerMs(1_200_000), 0);
    assert.equal(made.roundTripBytes(60_000), 0);
  });

  it('forgets a link that was: another one may have taken its place', () => {
    const link = new LinkEstimate();
    for (const [i, bytes] of [KiB, ...new Array<number>(20).fill(400 * KiB)].entries())
      link.add(tookMs({ roundTripMs: 1, bytesPerMs: 125_000 }, bytes), bytes, i);
    assert.ok(link.roundTripBytes(20) > 0);
    assert.equal(link.roundTripBytes(60_000), 0);
  });
});
