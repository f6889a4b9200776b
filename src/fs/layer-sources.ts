// Where layers are read from: which source of a layer is asked first, what the way to each host carries, how much was asked and
// came. Owned by SpanFetcher; decides neither what is fetched nor when.
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { LinkEstimate } from './link-estimate.ts';
import { type LayerBlobSource, type LayerMap, nameOf } from './loadable-layer.ts';
import type { BlobReader } from './registry/blob-reader.ts';

/** How long a source is tried last, after it failed for a layer. */
const DISTRUST_MS = 30_000;

export class LayerSources {
  /** Range requests that were begun: of layer data and of windows that were not here, repeated ones included. */
  requests = 0;
  /** Bytes received in those requests. */
  wireBytes = 0;
  readonly #log: Logger;
  /** By host. */
  readonly #links = new Map<string, LinkEstimate>();
  /** Until when, by layer and source. */
  readonly #distrusted = new Map<string, number>();

  constructor(log: Logger) {
    this.#log = log;
  }

  /** Sources of a layer, those that failed lately last. None when the layer was dropped meanwhile. */
  of(map: LayerMap): LayerBlobSource[] {
    const now = performance.now();
    const distrusted = (source: LayerBlobSource): number =>
      Number((this.#distrusted.get(`${map.layerId} ${nameOf(source)}`) ?? 0) > now);
    try {
      return map.layer.sources().toSorted((a, b) => distrusted(a) - distrusted(b));
    } catch (error) {
      this.#log.warn({ err: error, layer: map.blob.digest }, 'the sources of a layer are not known');
      return [];
    }
  }

  /** Tries this source of the layer last for a while. */
  distrust(map: LayerMap, source: string): void {
    this.#distrusted.set(`${map.layerId} ${source}`, performance.now() + DISTRUST_MS);
  }

  /** Forgets distrust that has ended. */
  sweep(): void {
    const now = performance.now();
    for (const [key, until] of this.#distrusted) if (until <= now) this.#distrusted.delete(key);
  }

  /** What the way to the first source of a layer carries; zeros as long as that is not known. */
  link(map: LayerMap): { roundTripBytes: number; bytesPerMs: number } {
    const [source] = this.of(map);
    if (source === undefined) return { roundTripBytes: 0, bytesPerMs: 0 };
    const link = this.#linkTo(source.host);
    const nowMs = performance.now();
    return { roundTripBytes: link.roundTripBytes(nowMs), bytesPerMs: link.bytesPerMs(nowMs) };
  }

  #linkTo(host: string): LinkEstimate {
    let link = this.#links.get(host);
    if (link === undefined) this.#links.set(host, (link = new LinkEstimate()));
    return link;
  }

  /** The reader of a source with its requests and bytes counted. */
  counted({ host, reader }: LayerBlobSource): BlobReader {
    return {
      readRange: async (blob, range, signal) => {
        this.requests++;
        const startedMs = performance.now();
        const bytes = await reader.readRange(blob, range, signal);
        const nowMs = performance.now();
        this.#linkTo(host).add(nowMs - startedMs, bytes.length, nowMs);
        this.wireBytes += bytes.length;
        return bytes;
      },
      readRanges: async (blob, ranges, signal, onPart) => {
        this.requests++;
        const startedMs = performance.now();
        let length = 0;
        await reader.readRanges(blob, ranges, signal, (index, bytes) => {
          length += bytes.length;
          this.wireBytes += bytes.length;
          this.#linkTo(host).received(bytes.length, performance.now());
          onPart(index, bytes);
        });
        const nowMs = performance.now();
        this.#linkTo(host).add(nowMs - startedMs, length, nowMs);
      },
      readAll: (blob, signal) => reader.readAll(blob, signal),
    };
  }
}

/** For a reader that ignores its signal: it must not hold a place. */
export function givenUp(): DedupError {
  return new DedupError('CANCELLED', 'the request was given up');
}
