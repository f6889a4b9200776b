// Brings one piece here out of one layer: fetches the spans that hold it, puts it together where it lies across them, has it
// verified and stored. Called by LazyLoader, which chooses the layer and answers reads.
import { DedupError } from '../errors.ts';
import type { Logger } from '../log.ts';
import { BLOCK_BYTES } from '../units.ts';
import { isTakenAway } from './chunks/taken-away.ts';
import { type LayerMap, nameOf, type PieceRef } from './loadable-layer.ts';
import type { PlacedChunks } from './open-layers.ts';
import { copyTar } from './span-edges.ts';
import type { SpanFetcher } from './span-fetcher.ts';
import { Priority } from './span-ledger.ts';
import { type LoaderStore, type RunOutput, toStore } from './span-storer.ts';

/** Verified bytes of a piece; undefined when they must be read from the store. */
export type PieceBytes = Uint8Array | undefined;

/** What is needed of the node store: look-ups, reads, verified writes. */
export interface PieceStore extends LoaderStore, PlacedChunks {
  read(target: Buffer, at: number, length: number, address: number): Promise<void>;
}

export interface PieceLoaderOptions {
  readonly store: PieceStore;
  readonly fetcher: Pick<SpanFetcher, 'fetch' | 'edges' | 'sources'>;
  /** Told of the spans that a reader waits for, once they have been asked for. */
  readonly onMiss: (map: LayerMap, spans: ReadonlySet<number>) => void;
  readonly log: Logger;
}

export class PieceLoader {
  readonly #options: PieceLoaderOptions;

  constructor(options: PieceLoaderOptions) {
    this.#options = options;
  }

  /**
   * Brings a piece here from its layer; resolves to its bytes, or to undefined when they must be read from the store. A wrong
   * piece is asked of one other source, then given up. Errors: those of SpanFetcher.fetch(), DIGEST_MISMATCH, STORE_IO.
   */
  async load(ref: PieceRef, priority: number): Promise<PieceBytes> {
    if (await this.#copyFromOtherPlacement(ref)) return undefined;
    const bad = new Set<string>();
    let mismatch = false;
    for (let round = 0; round < 4; round++) {
      const outputs = await this.#fetchMissing(ref, priority);
      const inPlace = outputs.find((output) => output.stored.has(ref.address));
      if (inPlace !== undefined) return bytesIn(ref, inPlace);
      if (this.#options.store.isPresent(ref.address, ref.length)) return undefined;
      const rejected = outputs.find((output) => output.bad.has(ref.address));
      let source = rejected?.source;
      if (rejected === undefined) {
        const assembled = this.#assemble(ref, outputs);
        // Bytes that were kept have gone from memory since: once more.
        if (assembled === undefined) continue;
        const [stored] = await this.#options.store.store(assembled, [toStore(ref, 0)]);
        if (stored === 1) return assembled;
        source = outputs.at(-1)?.source;
      }
      mismatch = true;
      for (const span of ref.map.spansOf(ref)) {
        this.#options.fetcher.edges.drop(ref.map.layerId, span);
        ref.map.layer.windows.forget?.(span, 1);
      }
      // What was kept from an earlier fetch was not verified then and may be what is wrong: once more, all of it anew.
      if (outputs.length < ref.map.spansOf(ref).size) continue;
      if (source === undefined) break;
      this.#options.fetcher.sources.distrust(ref.map, source);
      const others = ref.map.layer.sources().some((other) => nameOf(other) !== source && !bad.has(nameOf(other)));
      if (bad.size > 0 || !others) break;
      bad.add(source);
    }
    if (!mismatch)
      throw new DedupError('STORE_IO', `what was fetched for address ${ref.address} did not stay in memory`);
    throw new DedupError(
      'DIGEST_MISMATCH',
      `piece ${ref.piece} of chunk ${ref.chunk} of layer ${ref.map.blob.digest} is not what its index says`,
    );
  }

  /** Fetches those spans of a piece whose bytes are not kept from an earlier fetch. */
  #fetchMissing(ref: PieceRef, priority: number): Promise<RunOutput[]> {
    const { map } = ref;
    const wanted = new Set<number>();
    for (const part of map.partsOf(ref)) {
      const last = map.spanAt(part.tarOffset + part.length - 1);
      for (let span = map.spanAt(part.tarOffset); span <= last; span++) {
        const from = Math.max(part.tarOffset, map.spanStart(span));
        const to = Math.min(part.tarOffset + part.length, map.spanEnd(span));
        if (!this.#kept(map, span, from, to)) wanted.add(span);
      }
    }
    const fetches = [...wanted].map((span) => this.#options.fetcher.fetch(map, span, priority));
    if (priority === Priority.onDemand) this.#options.onMiss(map, map.spansOf(ref));
    return Promise.all(fetches);
  }

  #kept(map: LayerMap, span: number, from: number, to: number): boolean {
    const covers = (edge: { start: number; bytes: Uint8Array } | undefined): boolean =>
      edge !== undefined && edge.start <= from && edge.start + edge.bytes.length >= to;
    return (
      covers(this.#options.fetcher.edges.tail(map.layerId, span)) ||
      covers(this.#options.fetcher.edges.head(map.layerId, span))
    );
  }

  /** The bytes of a piece out of what was fetched and kept; undefined when some are missing. Not verified. */
  #assemble(ref: PieceRef, outputs: readonly RunOutput[]): Buffer | undefined {
    const { map } = ref;
    const target = Buffer.alloc(ref.length);
    for (const part of map.partsOf(ref)) {
      const end = part.tarOffset + part.length;
      const last = map.spanAt(end - 1);
      for (let span = map.spanAt(part.tarOffset); span <= last; span++) {
        const from = Math.max(part.tarOffset, map.spanStart(span));
        const to = Math.min(end, map.spanEnd(span));
        const candidates = [
          ...outputs,
          this.#options.fetcher.edges.tail(map.layerId, span),
          this.#options.fetcher.edges.head(map.layerId, span),
        ];
        const at = part.at + from - part.tarOffset;
        if (!candidates.some((bytes) => bytes !== undefined && copyTar(bytes, from, to, target, at))) return undefined;
      }
    }
    return target;
  }

  /** A chunk may lie at several addresses; what is at the first one is copied, verified again, instead of fetched. */
  async #copyFromOtherPlacement(ref: PieceRef): Promise<boolean> {
    const placed = this.#options.store.find(ref.address);
    if (placed === undefined)
      throw new DedupError('STORE_IO', `address ${ref.address} of the store is not assigned any more`);
    const first = placed.chunkId * BLOCK_BYTES;
    if (first === placed.address) return false;
    const address = first + (ref.address - placed.address);
    if (!this.#options.store.isPresent(address, ref.length)) return false;
    const bytes = Buffer.allocUnsafeSlow(ref.length);
    try {
      await this.#options.store.read(bytes, 0, ref.length, address);
    } catch (error) {
      if (isTakenAway(error)) return false;
      throw error;
    }
    const [stored] = await this.#options.store.store(bytes, [toStore(ref, 0)]);
    if (stored !== 1) this.#options.log.error({ address }, 'a present piece does not have its digest');
    return stored === 1;
  }
}

function bytesIn(ref: PieceRef, output: RunOutput): Uint8Array | undefined {
  const [part] = ref.map.partsOf(ref);
  if (part === undefined || part.length !== ref.length) return undefined;
  const at = part.tarOffset - output.start;
  return output.bytes.subarray(at, at + part.length);
}
