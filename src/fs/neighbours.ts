// Recognises that a program is picking many things out of one place of a layer - modules of a language, pages of a large
// library - from misses that lie close together, and names the spans between and around them. Called by FetchAhead;
// decides only, fetches nothing.

/** Misses of a layer that are remembered, most recent last. */
const REMEMBERED = 32;
/** Spans to each side of a pair of misses at most, whatever the link could carry. */
const MAX_REACH = 4;

export class Neighbours {
  readonly #misses = new Map<number, number[]>();

  /**
   * Tells of a miss in spans [first, last] of a layer with `spanCount` spans. When an earlier miss lies within four times
   * `reach` spans: the spans from `reach` before the lower one to `reach` behind the upper one, those nearest to the new
   * miss first. None when `reach` is 0: there the next miss is cheaper than a guess.
   */
  onMiss(layerId: number, first: number, last: number, spanCount: number, reach: number): number[] {
    let misses = this.#misses.get(layerId);
    if (misses === undefined) this.#misses.set(layerId, (misses = []));
    const near = Math.min(reach, MAX_REACH);
    const partners = misses
      .filter((miss) => miss < first || miss > last)
      .filter((miss) => distance(miss, first, last) <= 4 * near);
    if (misses.at(-1) !== last) misses.push(last);
    if (misses.length > REMEMBERED) misses.shift();
    if (near === 0 || partners.length === 0) return [];
    const nearest = partners.reduce((a, b) => (distance(b, first, last) < distance(a, first, last) ? b : a));
    const from = Math.max(0, Math.min(nearest, first) - near);
    const until = Math.min(spanCount - 1, Math.max(nearest, last) + near);
    const spans: number[] = [];
    for (let span = from; span <= until; span++) if (span < first || span > last) spans.push(span);
    return spans.sort((a, b) => distance(a, first, last) - distance(b, first, last));
  }

  forget(layerId: number): void {
    this.#misses.delete(layerId);
  }
}

function distance(span: number, first: number, last: number): number {
  return span < first ? first - span : Math.max(0, span - last);
}
