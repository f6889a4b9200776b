// What the way to a registry carries in one round trip, estimated from the requests that are made anyway: the quickest
// small answer stands for the round trip, the fastest transfer for the rate. Fed and asked by SpanFetcher.
import { KiB } from '../units.ts';

/** Answers that are looked back at, and for how long; links change. Among so many, some did not wait behind others. */
const REMEMBERED = 256;
const REMEMBERED_MS = 10_000;
/** Fewer answers say nothing: the first ones open connections. */
const ENOUGH = 8;
/** From this size on an answer says something about the rate; below it, about the round trip. Bytes. */
const LARGE_BYTES = 128 * KiB;

interface Answer {
  readonly atMs: number;
  readonly tookMs: number;
  readonly bytes: number;
}

export class LinkEstimate {
  /** Oldest first. */
  readonly #answers: Answer[] = [];

  /** Tells of a request that was answered whole, `tookMs` after it was sent. `nowMs` is that of performance.now(). */
  add(tookMs: number, bytes: number, nowMs: number): void {
    this.#answers.push({ atMs: nowMs, tookMs, bytes });
    if (this.#answers.length > REMEMBERED) this.#answers.shift();
  }

  /** Bytes that fit into one round trip; 0 as long as too little is known. */
  roundTripBytes(nowMs: number): number {
    const { roundTripMs, bytesPerMs } = this.#estimate(nowMs);
    return roundTripMs * bytesPerMs;
  }

  /** The rate of the link, bytes a millisecond; 0 as long as too little is known. */
  bytesPerMs(nowMs: number): number {
    return this.#estimate(nowMs).bytesPerMs;
  }

  #estimate(nowMs: number): { roundTripMs: number; bytesPerMs: number } {
    while (this.#answers.length > 0 && nowMs - this.#answers[0]!.atMs > REMEMBERED_MS) this.#answers.shift();
    const unknown = { roundTripMs: 0, bytesPerMs: 0 };
    if (this.#answers.length < ENOUGH) return unknown;
    let roundTripMs = Number.POSITIVE_INFINITY;
    for (const { tookMs, bytes } of this.#answers) if (bytes < LARGE_BYTES) roundTripMs = Math.min(roundTripMs, tookMs);
    // Among large answers alone, round trip and transfer cannot be told apart.
    if (roundTripMs === Number.POSITIVE_INFINITY) return unknown;
    // An answer takes at least the round trip and its transfer, so no single one shows more than the link's rate.
    let bytesPerMs = 0;
    for (const { tookMs, bytes } of this.#answers) {
      if (bytes >= LARGE_BYTES) bytesPerMs = Math.max(bytesPerMs, bytes / Math.max(1, tookMs - roundTripMs));
    }
    return { roundTripMs, bytesPerMs };
  }
}
