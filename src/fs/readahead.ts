// Recognises sequential reading of a layer from its misses and says which spans to fetch ahead. Hits are answered
// natively and never seen here; a reader that catches up with what is being fetched misses again, and so moves it on.
// Called by the LazyLoader; decides only, fetches nothing.

/** Spans ahead of the reader: about 8 MiB uncompressed; more where nearly all of it was read, fewer where half was not. */
const MAX_WINDOW = 8;
const WIDE_WINDOW = 32;
const NARROW_WINDOW = 2;
const WIDE_FROM = 0.9;
const NARROW_BELOW = 0.5;
/**
 * Spans read one after the other before anything is fetched ahead. Starting programs map files of a few spans from end to
 * end and then go elsewhere: with an earlier start a fifth of what the demo's starts fetched was never read.
 */
const OPENING_RUN = 6;
/** Sequential readers of one layer that are told apart. */
const MAX_STREAMS = 4;

interface Stream {
  /** Span of the last miss. */
  last: number;
  /** End of what was asked for ahead, exclusive. */
  ahead: number;
  /** Spans from the first miss of the stream to the last. */
  run: number;
  /** How many spans to keep ahead; 0 until the run is long enough. */
  window: number;
}

export class Readahead {
  /** By layer, most recent first. */
  readonly #streams = new Map<number, Stream[]>();

  /**
   * Tells of a miss in spans [first, last] of a layer with `spanCount` spans; the spans to fetch ahead, as a range.
   * The window opens once a run of misses is long enough, and doubles with each further one, up to what `useful` allows:
   * the share of what was fetched ahead lately that was read; undefined when that is not known.
   */
  onMiss(
    layerId: number,
    first: number,
    last: number,
    spanCount: number,
    useful?: number,
  ): { from: number; count: number } {
    let streams = this.#streams.get(layerId);
    if (streams === undefined) this.#streams.set(layerId, (streams = []));
    const at = streams.findIndex((stream) => first >= stream.last && first <= Math.max(stream.last + 1, stream.ahead));
    const stream = at >= 0 ? streams.splice(at, 1)[0]! : { last, ahead: last + 1, run: last - first + 1, window: 0 };
    const moved = at >= 0 && last > stream.last;
    if (at >= 0 && !moved) {
      // More misses in the same span say nothing new.
      streams.unshift(stream);
      return { from: stream.ahead, count: 0 };
    }
    if (moved) {
      stream.run += last - stream.last;
      if (stream.run >= OPENING_RUN) stream.window = Math.min(mostSpans(useful), Math.max(2, stream.window * 2));
    }
    stream.last = last;
    const from = Math.max(stream.ahead, last + 1);
    const end = Math.min(spanCount, last + 1 + stream.window);
    stream.ahead = Math.max(from, end);
    streams.unshift(stream);
    streams.length = Math.min(streams.length, MAX_STREAMS);
    return { from, count: Math.max(0, end - from) };
  }

  /** Tells that the reader of the last miss is fetched for up to span `end`, exclusive. */
  extend(layerId: number, end: number): void {
    const stream = this.#streams.get(layerId)?.[0];
    if (stream !== undefined) stream.ahead = Math.max(stream.ahead, end);
  }

  forget(layerId: number): void {
    this.#streams.delete(layerId);
  }

  clear(): void {
    this.#streams.clear();
  }
}

/** How wide a window may be, by the share of what was fetched ahead that was read. */
function mostSpans(useful: number | undefined): number {
  if (useful === undefined) return MAX_WINDOW;
  if (useful >= WIDE_FROM) return WIDE_WINDOW;
  return useful < NARROW_BELOW ? NARROW_WINDOW : MAX_WINDOW;
}
