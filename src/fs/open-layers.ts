// The layers that are open for loading, those used lately, and which piece lies at an address of the store. Owned by LazyLoader;
// reads no bytes of layers.
import { LRUCache } from 'lru-cache';
import { DedupError } from '../errors.ts';
import { BLOCK_BYTES, type ByteRange } from '../units.ts';
import { LayerMap, type LayerProvider, type PieceRef } from './loadable-layer.ts';

/** A piece that a read needs, by where it lies. */
export interface Slot {
  readonly address: number;
  readonly length: number;
  readonly chunkId: number | undefined;
  readonly ref: PieceRef | undefined;
}

/** What the node store knows of an address. */
export interface PlacedChunks {
  find(address: number): { address: number; chunkId: number; size: number; pieceBytes: number } | undefined;
}

export interface OpenLayersOptions {
  readonly provider: LayerProvider;
  readonly store: PlacedChunks;
  /** Memory for opened layers, bytes. */
  readonly maxBytes: number;
  /** True for a layer that was dropped: it is not opened any more. */
  readonly isDropped: (layerId: number) => boolean;
  /** Told of a layer that is open no more. */
  readonly onClosed: (layerId: number) => void;
}

export class OpenLayers {
  readonly #options: OpenLayersOptions;
  readonly #maps: LRUCache<number, LayerMap>;
  readonly #opening = new Map<number, Promise<LayerMap>>();

  constructor(options: OpenLayersOptions) {
    this.#options = options;
    const { maxBytes, onClosed } = options;
    // A layer larger than the limit is kept too, alone.
    this.#maps = new LRUCache({
      maxSize: maxBytes,
      sizeCalculation: (map) => Math.min(map.bytes, maxBytes),
      dispose: (_map, layerId) => onClosed(layerId),
    });
  }

  /** A layer, opened if it is not. Errors: those of the provider, UNAVAILABLE when it was dropped meanwhile. */
  open(layerId: number): Promise<LayerMap> {
    const known = this.#maps.get(layerId);
    if (known !== undefined) return Promise.resolve(known);
    const running = this.#opening.get(layerId);
    if (running !== undefined) return running;
    const { provider, isDropped } = this.#options;
    const work = provider.openLayer(layerId).then((layer) => {
      if (isDropped(layerId)) throw new DedupError('UNAVAILABLE', `layer ${layerId} was dropped`);
      const map = new LayerMap(layerId, layer);
      this.#maps.set(layerId, map);
      return map;
    });
    this.#opening.set(layerId, work);
    const settled = (): void => void this.#opening.delete(layerId);
    work.then(settled, settled);
    return work;
  }

  /** The pieces that cover a range, ascending; of `layers` where those are open. Errors: STORE_IO when a block belongs to none. */
  locate(range: ByteRange, layers: readonly number[]): Slot[] {
    if (range.offset % BLOCK_BYTES !== 0 || range.length % BLOCK_BYTES !== 0 || range.length <= 0) {
      throw new DedupError('INVALID_ARGUMENT', `a read of ${range.length} bytes at ${range.offset} is not in blocks`);
    }
    const open: LayerMap[] = [];
    for (const layerId of layers) {
      const map = this.#maps.get(layerId);
      if (map !== undefined) open.push(map);
    }
    const slots: Slot[] = [];
    const end = range.offset + range.length;
    let recent: LayerMap | undefined;
    for (let at = range.offset; at < end; ) {
      let slot: Slot | undefined;
      if (recent !== undefined) slot = slotIn(recent, at);
      for (let i = 0; slot === undefined && i < open.length; i++) {
        slot = slotIn(open[i]!, at);
        if (slot !== undefined) recent = open[i];
      }
      slot ??= this.#slotInStore(at);
      if (slot === undefined) throw new DedupError('STORE_IO', `nothing is assigned to address ${at} of the store`);
      slots.push(slot);
      at = slot.address + Math.ceil(slot.length / BLOCK_BYTES) * BLOCK_BYTES;
    }
    return slots;
  }

  #slotInStore(at: number): Slot | undefined {
    const placed = this.#options.store.find(at);
    if (placed === undefined) return undefined;
    const piece = Math.floor((at - placed.address) / placed.pieceBytes);
    return {
      address: placed.address + piece * placed.pieceBytes,
      length: Math.min(placed.pieceBytes, placed.size - piece * placed.pieceBytes),
      chunkId: placed.chunkId,
      ref: undefined,
    };
  }

  /** Closes a layer that was dropped, and forgets its windows. */
  forget(layerId: number): void {
    const map = this.#maps.get(layerId);
    map?.layer.windows.forget?.(0, map.spanCount);
    this.#maps.delete(layerId);
  }

  /** Resolves once every layer that is being opened now is, or is not to be. Never rejects. */
  async drained(): Promise<void> {
    await Promise.allSettled(this.#opening.values());
  }

  /** Closes all of them. */
  clear(): void {
    this.#maps.clear();
  }
}

/** The piece of a layer that lies at an address; undefined when the layer has none there. */
export function slotIn(map: LayerMap, address: number): (Slot & { readonly ref: PieceRef }) | undefined {
  const chunk = map.chunkAt(address);
  if (chunk === undefined) return undefined;
  const ref = map.piece(chunk, Math.floor((address - map.layer.addresses[chunk]!) / map.layer.index.pieceBytes));
  return { address: ref.address, length: ref.length, chunkId: undefined, ref };
}
