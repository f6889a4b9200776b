// Recognises that a program picks many things out of one place of a layer - headers of a language, modules of a package,
// pages of a large executable - from misses that lie close together, and names the spans around them. Called by
// FetchAhead; decides only, fetches nothing.

/** How far around a miss others are looked for, and how far around it is fetched then, spans. */
const REACH = 8;
/** Misses in that place, this one included, that make it one. */
const CLOSE_MISSES = 3;
/** Misses of a layer that are remembered, most recent last. */
const REMEMBERED = 32;

export class Clusters {
  readonly #misses = new Map<number, number[]>();

  /**
   * Tells of a miss in spans [first, last] of a layer with `spanCount` spans; the spans around it that are likely to be
   * wanted soon, as a range: none until misses have come close together.
   */
  onMiss(layerId: number, first: number, last: number, spanCount: number): { from: number; count: number } {
    let misses = this.#misses.get(layerId);
    if (misses === undefined) this.#misses.set(layerId, (misses = []));
    if (!misses.includes(last)) misses.push(last);
    if (misses.length > REMEMBERED) misses.shift();
    const close = misses.filter((miss) => miss >= first - REACH && miss <= last + REACH);
    if (close.length < CLOSE_MISSES) return { from: first, count: 0 };
    const from = Math.max(0, first - REACH);
    return { from, count: Math.min(spanCount, last + REACH + 1) - from };
  }

  forget(layerId: number): void {
    this.#misses.delete(layerId);
  }
}
