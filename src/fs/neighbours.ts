// Recognises that a program is picking many things out of one place of a layer - modules of a language, pages of a large
// library - from misses that lie close together, and names the spans between and around them. How far it looks follows
// from how many of its guesses were read. Called by FetchAhead; decides only, fetches nothing.

/** Misses of a layer that are remembered, most recent last. */
const REMEMBERED = 32;
/** How far to look at first, spans, and in the end. */
const FIRST_REACH = 1;
const MAX_REACH = 32;
/** Guesses of a layer that are judged together. */
const JUDGED = 4;
/** Share of them that must have been read to look further, and to look as far as before. */
const GOOD = 0.5;
const POOR = 0.25;

interface Place {
  readonly misses: number[];
  reach: number;
  judged: number;
  useful: number;
}

export class Neighbours {
  readonly #places = new Map<number, Place>();

  /**
   * Tells of a miss in spans [first, last] of a layer with `spanCount` spans. When an earlier miss lies within four times
   * the reach: the spans from the lower one less the reach to the upper one plus the reach, those nearest to the new miss
   * first. `linkReach`: spans that the link carries in a round trip; guesses reach that far from the beginning, but not
   * beyond 4.
   */
  onMiss(layerId: number, first: number, last: number, spanCount: number, linkReach: number): number[] {
    const place = this.#place(layerId);
    const reach = Math.max(place.reach, Math.min(linkReach, 4));
    const { misses } = place;
    let nearest: number | undefined;
    for (const miss of misses) {
      if (miss >= first && miss <= last) continue;
      const closer = nearest === undefined || distance(miss, first, last) < distance(nearest, first, last);
      if (closer && distance(miss, first, last) <= 4 * reach) nearest = miss;
    }
    if (misses.at(-1) !== last) misses.push(last);
    if (misses.length > REMEMBERED) misses.shift();
    if (nearest === undefined) return [];
    const from = Math.max(0, Math.min(nearest, first) - reach);
    const until = Math.min(spanCount - 1, Math.max(nearest, last) + reach);
    const spans: number[] = [];
    for (let span = from; span <= until; span++) if (span < first || span > last) spans.push(span);
    return spans.sort((a, b) => distance(a, first, last) - distance(b, first, last));
  }

  /** Tells whether a guessed span was read after it had come. */
  judge(layerId: number, useful: boolean): void {
    const place = this.#place(layerId);
    place.judged++;
    if (useful) place.useful++;
    if (place.judged < JUDGED) return;
    const share = place.useful / place.judged;
    if (share >= GOOD) place.reach = Math.min(MAX_REACH, place.reach * 2);
    else if (share < POOR) place.reach = Math.max(FIRST_REACH, place.reach / 2);
    place.judged = 0;
    place.useful = 0;
  }

  #place(layerId: number): Place {
    let place = this.#places.get(layerId);
    if (place === undefined)
      this.#places.set(layerId, (place = { misses: [], reach: FIRST_REACH, judged: 0, useful: 0 }));
    return place;
  }

  forget(layerId: number): void {
    this.#places.delete(layerId);
  }
}

function distance(span: number, first: number, last: number): number {
  return span < first ? first - span : Math.max(0, span - last);
}
