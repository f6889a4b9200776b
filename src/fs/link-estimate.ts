// What the way to a registry carries in one round trip, estimated from the requests that are made anyway: the quickest
// small answer stands for the round trip, the fastest transfer for the rate. Fed and asked by SpanFetcher.
import { KiB } from '../units.ts';

/** Answers that are looked back at, and for how long; links change. Among so many, some did not wait behind others. */
const REMEMBERED = 256;
const REMEMBERED_MS = 10_000;
/** A rate is taken for right for so long when nothing new is known, milliseconds: links change, but seldom. */
const KNOWN_MS = 600_000;
/** Bytes of all answers are counted over this time, milliseconds. */
const BUCKET_MS = 300;
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
  /** What came since #bucketMs. */
  #bucketMs = Number.NEGATIVE_INFINITY;
  #bucketBytes = 0;
  /** The most that came in such a stretch of time lately, bytes a millisecond, and when. */
  #fullest = 0;
  #fullestMs = Number.NEGATIVE_INFINITY;
  /** The rate as it was known last. */
  #last = 0;
  #lastMs = Number.NEGATIVE_INFINITY;

  /** Tells of a request that was answered whole, `tookMs` after it was sent. `nowMs` is that of performance.now(). */
  add(tookMs: number, bytes: number, nowMs: number): void {
    this.#answers.push({ atMs: nowMs, tookMs, bytes });
    if (this.#answers.length > REMEMBERED) this.#answers.shift();
    if (bytes >= LARGE_BYTES) this.bytesPerMs(nowMs);
  }

  /** Bytes that fit into one round trip; 0 as long as too little is known. */
  roundTripBytes(nowMs: number): number {
    const { roundTripMs, bytesPerMs } = this.#estimate(nowMs);
    return roundTripMs * bytesPerMs;
  }

  /**
   * The rate of the link, bytes a millisecond: of what came in one stretch of time by all requests together, or of the fastest
   * one; else what was known last, for some minutes. 0 as long as nothing is known.
   */
  bytesPerMs(nowMs: number): number {
    if (nowMs - this.#bucketMs >= BUCKET_MS) this.#closeBucket();
    const now = Math.max(this.#estimate(nowMs).bytesPerMs, nowMs - this.#fullestMs < REMEMBERED_MS ? this.#fullest : 0);
    if (now > 0) {
      this.#last = now;
      this.#lastMs = nowMs;
    }
    return nowMs - this.#lastMs < KNOWN_MS ? this.#last : 0;
  }

  /** Tells of bytes of an answer that goes on. */
  received(bytes: number, nowMs: number): void {
    if (nowMs - this.#bucketMs >= BUCKET_MS) {
      this.#closeBucket();
      this.#bucketMs = nowMs;
    }
    this.#bucketBytes += bytes;
  }

  #closeBucket(): void {
    const rate = this.#bucketBytes / BUCKET_MS;
    // The first bytes of an answer open their stretch of time: it is not worth more than it was long.
    if (this.#bucketBytes > 0 && (rate >= this.#fullest || this.#bucketMs - this.#fullestMs > REMEMBERED_MS)) {
      this.#fullest = rate;
      this.#fullestMs = this.#bucketMs;
    }
    this.#bucketBytes = 0;
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
