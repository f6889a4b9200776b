// What became of every span that was fetched: why it was, whether a reader had to wait for it, whether anybody read it. Owned by
// the SpanFetcher, told of reads by the recorder of access traces; what is known of usefulness comes from here.
import type { LayerMap } from './loadable-layer.ts';

/** Priorities of what is fetched: a reader waits; the rest by how certain it is that somebody will. */
export const Priority = { onDemand: 100, trace: 40, start: 30, sequential: 20, guess: 10, background: 0 } as const;

/** Priority from which on somebody waits for a span. */
export const WANTED_PRIORITY: number = Priority.onDemand;

/** Why a span was fetched first. */
export type Origin = 'read' | 'trace' | 'start' | 'sequential' | 'guess' | 'background';
const ORIGINS: readonly Origin[] = ['read', 'trace', 'start', 'sequential', 'guess', 'background'];

function originOf(priority: number): Origin {
  if (priority >= Priority.onDemand) return 'read';
  if (priority >= Priority.trace) return 'trace';
  if (priority >= Priority.start) return 'start';
  if (priority >= Priority.sequential) return 'sequential';
  return priority >= Priority.guess ? 'guess' : 'background';
}

/** Of each span one byte: the number of its origin plus one, and what happened since. */
const ORIGIN_MASK = 7;
const LATE = 8;
const READ = 16;
const SETTLED = 32;

/** Spans of one kind that were fetched ahead lately. */
interface Sample {
  readonly layerId: number;
  readonly span: number;
  readonly atMs: number;
}

/** Usefulness of a kind is judged by so many spans, once they have had this time to be read. */
const SAMPLES = 64;
const ENOUGH_SAMPLES = 12;
const SAMPLE_AGE_MS = 1_000;
/** And for so long: a bad start is not to be the last word on those that follow. */
const SAMPLE_KEPT_MS = 60_000;

export interface LedgerStats {
  /** Distinct spans that a reader waited for, and their compressed bytes. */
  readonly spans: number;
  readonly spanBytes: number;
  /** Compressed bytes of the distinct spans that were only fetched ahead; readers may have found them here since. */
  readonly aheadBytes: number;
  /**
   * Of all that was fetched ahead: read while it was here; waited for while on its way; not read in its recording, or not
   * here (any more) when somebody came. No byte is in two of them; what is in none may still be read.
   */
  readonly prefetchBytes: number;
  readonly usefulBytes: number;
  readonly lateBytes: number;
  readonly wastedBytes: number;
}

/** What is kept of a layer: numbers alone, for its map is large and goes when it is not used. */
interface LayerSpans {
  readonly state: Uint8Array;
  /** Compressed bytes of each span. */
  readonly bytes: Uint32Array;
}

export class SpanLedger {
  /** By layer; kept while its layer is known, so that nothing is counted twice. */
  readonly #spans = new Map<number, LayerSpans>();
  /** Layers whose reads are seen, and by how many recordings. */
  readonly #watched = new Map<number, number>();
  readonly #samples = new Map<Origin, Sample[]>();
  #count = 0;
  #spanBytes = 0;
  #aheadBytes = 0;
  #prefetchBytes = 0;
  #usefulBytes = 0;
  #lateBytes = 0;
  #wastedBytes = 0;

  stats(): LedgerStats {
    return {
      spans: this.#count,
      spanBytes: this.#spanBytes,
      aheadBytes: this.#aheadBytes,
      prefetchBytes: this.#prefetchBytes,
      usefulBytes: this.#usefulBytes,
      lateBytes: this.#lateBytes,
      wastedBytes: this.#wastedBytes,
    };
  }

  /** Tells that a span is asked for; `underWay`: it is being fetched already. */
  asked(map: LayerMap, span: number, priority: number, underWay: boolean): void {
    let layer = this.#spans.get(map.layerId);
    if (layer === undefined) this.#spans.set(map.layerId, (layer = spansOf(map)));
    const { state } = layer;
    const before = state[span]!;
    const origin = originOf(priority);
    if (before === 0) {
      const bytes = layer.bytes[span]!;
      state[span] = ORIGINS.indexOf(origin) + 1;
      if (origin === 'read') this.#waitedFor(bytes);
      else {
        this.#aheadBytes += bytes;
        this.#prefetchBytes += bytes;
        this.#sample(origin, { layerId: map.layerId, span, atMs: performance.now() });
      }
    } else if (origin === 'read' && (before & (ORIGIN_MASK | LATE)) > 1 && (before & LATE) === 0) {
      // A reader waits for what was fetched ahead: it is on its way still, or what was brought is gone again.
      const bytes = layer.bytes[span]!;
      state[span] = before | LATE;
      this.#aheadBytes -= bytes;
      this.#waitedFor(bytes);
      if ((before & (READ | SETTLED)) !== 0) return;
      if (underWay) this.#lateBytes += bytes;
      else this.#wastedBytes += bytes;
    }
  }

  #waitedFor(bytes: number): void {
    this.#count++;
    this.#spanBytes += bytes;
  }

  #sample(origin: Origin, sample: Sample): void {
    // Where nobody tells of reads, none would look useful.
    if (!this.#watched.has(sample.layerId)) return;
    const samples = this.#samples.get(origin) ?? [];
    samples.push(sample);
    if (samples.length > SAMPLES) samples.shift();
    this.#samples.set(origin, samples);
  }

  /** Why a span was fetched first; undefined when it was not, by this process. */
  origin(layerId: number, span: number): Origin | undefined {
    const state = this.#spans.get(layerId)?.state[span] ?? 0;
    return state === 0 ? undefined : ORIGINS[(state & ORIGIN_MASK) - 1];
  }

  /** True for a span that somebody has read, or waited for. */
  wasRead(layerId: number, span: number): boolean {
    const state = this.#spans.get(layerId)?.state[span] ?? 0;
    return (state & (READ | LATE)) !== 0 || (state & ORIGIN_MASK) === 1;
  }

  /** Begins or ends judging what is fetched ahead in these layers by whether it is read: their reads are told here meanwhile. */
  watch(layerIds: readonly number[], on: boolean): void {
    for (const layerId of layerIds) {
      const watchers = (this.#watched.get(layerId) ?? 0) + (on ? 1 : -1);
      if (watchers > 0) this.#watched.set(layerId, watchers);
      else this.#watched.delete(layerId);
    }
  }

  /** Tells that somebody read bytes of a span. */
  read(layerId: number, span: number): void {
    const layer = this.#spans.get(layerId);
    const before = layer?.state[span] ?? 0;
    if (layer === undefined || (before & READ) !== 0 || before === 0) return;
    layer.state[span] = before | READ;
    const ahead = (before & ORIGIN_MASK) > 1;
    if (ahead && (before & (LATE | SETTLED)) === 0) this.#usefulBytes += layer.bytes[span]!;
  }

  /** Tells that a start has ended: what was fetched ahead in these layers and not read until now was for nothing. */
  settle(layerIds: readonly number[]): void {
    for (const layerId of layerIds) {
      const layer = this.#spans.get(layerId);
      for (let span = 0; layer !== undefined && span < layer.state.length; span++) {
        const before = layer.state[span]!;
        if ((before & ORIGIN_MASK) <= 1 || (before & (LATE | READ | SETTLED)) !== 0) continue;
        layer.state[span] = before | SETTLED;
        this.#wastedBytes += layer.bytes[span]!;
      }
    }
  }

  /** The share of what was fetched ahead for this reason lately that was read, 0 to 1; undefined while too little is known. */
  usefulness(origin: Origin, nowMs: number): number | undefined {
    let [old, used] = [0, 0];
    for (const { layerId, span, atMs } of this.#samples.get(origin) ?? []) {
      const ageMs = nowMs - atMs;
      const layer = this.#spans.get(layerId);
      if (ageMs < SAMPLE_AGE_MS || ageMs > SAMPLE_KEPT_MS || layer === undefined) continue;
      old++;
      if ((layer.state[span]! & (READ | LATE)) !== 0) used++;
    }
    return old < ENOUGH_SAMPLES ? undefined : used / old;
  }

  /** Tells that a layer was dropped: what nobody has read of it nobody will. */
  forget(layerId: number): void {
    this.settle([layerId]);
    this.#spans.delete(layerId);
    this.#watched.delete(layerId);
  }
}

function spansOf(map: LayerMap): LayerSpans {
  const bytes = Uint32Array.from({ length: map.spanCount }, (_, span) => map.compressedRange(span, 1).length);
  return { state: new Uint8Array(map.spanCount), bytes };
}
