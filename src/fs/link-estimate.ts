// What the way to a registry can carry, estimated from the requests that are made anyway: the shortest answer stands for
// the round trip, the fastest transfer for the bandwidth. Fed by SpanFetcher.

/** Requests that are looked back at; conditions change. */
const REMEMBERED = 24;
/** Transfers smaller than this say nothing about bandwidth, bytes. */
const LARGE_BYTES = 128 * 1024;

export class LinkEstimate {
  readonly #samples: { readonly ms: number; readonly bytes: number }[] = [];
  #product = 0;

  /** Tells of a request that was answered whole after `ms`. */
  add(ms: number, bytes: number): void {
    this.#samples.push({ ms, bytes });
    if (this.#samples.length > REMEMBERED) this.#samples.shift();
    const roundTripMs = Math.min(...this.#samples.map((sample) => sample.ms));
    let bytesPerMs = 0;
    for (const sample of this.#samples) {
      if (sample.bytes >= LARGE_BYTES)
        bytesPerMs = Math.max(bytesPerMs, sample.bytes / Math.max(1, sample.ms - roundTripMs));
    }
    this.#product = roundTripMs * bytesPerMs;
  }

  /** Bytes that fit into one round trip; 0 as long as nothing is known. */
  get bandwidthDelayBytes(): number {
    return this.#product;
  }
}
