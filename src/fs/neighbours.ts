// Guesses from the misses of a start which spans its program reads next: what is read lies near what was read. Called by
// FetchAhead; decides only, fetches nothing.

/** Spans on each side of a miss that its neighbourhood has. */
const REACH = 3;
/** How likely a span at each distance is, beside the one next to the miss. Spans near several misses add up. */
const WEIGHTS = Float32Array.from({ length: REACH + 1 }, (_, distance) => Math.exp(-distance / 2));
/** So many misses within this time are a start: programs that run read now and then, and are not guessed for. */
const BURST_MISSES = 4;
const BURST_MS = 1_000;

interface Layer {
  /** By span: how likely it is. */
  readonly score: Float32Array;
  /** By span: 1 once it was wanted, guessed or found to be here. */
  readonly known: Uint8Array;
  lastMissMs: number;
}

/** A span of a layer. */
export interface Guess {
  readonly layerId: number;
  readonly span: number;
}

export class Neighbours {
  readonly #layers = new Map<number, Layer>();
  /** When the latest misses were, oldest first. */
  #misses: number[] = [];

  /** Tells of a miss in spans of a layer with `spanCount` spans. Times are those of performance.now(). */
  onMiss(layerId: number, spans: Iterable<number>, spanCount: number, nowMs: number): void {
    this.#misses.push(nowMs);
    if (this.#misses.length > BURST_MISSES) this.#misses.shift();
    let layer = this.#layers.get(layerId);
    if (layer === undefined) {
      layer = { score: new Float32Array(spanCount), known: new Uint8Array(spanCount), lastMissMs: nowMs };
      this.#layers.set(layerId, layer);
    }
    layer.lastMissMs = nowMs;
    for (const span of spans) {
      layer.known[span] = 1;
      const end = Math.min(spanCount, span + REACH + 1);
      for (let near = Math.max(0, span - REACH); near < end; near++)
        layer.score[near]! += WEIGHTS[Math.abs(near - span)]!;
    }
  }

  /**
   * Up to `count` spans that are likely to be wanted soon, the likeliest first; none unless misses come in a burst. A span
   * is named once. `isHere` says which need not be named; only layers with a miss in the burst are looked at.
   */
  take(count: number, nowMs: number, isHere: (guess: Guess) => boolean): Guess[] {
    if (this.#misses.length < BURST_MISSES || nowMs - this.#misses[0]! > BURST_MS) return [];
    const found: (Guess & { readonly score: number })[] = [];
    for (const [layerId, { score, known, lastMissMs }] of this.#layers) {
      if (nowMs - lastMissMs > BURST_MS) continue;
      for (let span = 0; span < score.length; span++) {
        if (known[span] === 0 && score[span]! > 0) found.push({ layerId, span, score: score[span]! });
      }
    }
    found.sort((a, b) => b.score - a.score);
    const taken: Guess[] = [];
    for (const { layerId, span } of found) {
      if (taken.length >= count) break;
      this.#layers.get(layerId)!.known[span] = 1;
      if (!isHere({ layerId, span })) taken.push({ layerId, span });
    }
    return taken;
  }

  forget(layerId: number): void {
    this.#layers.delete(layerId);
  }
}
