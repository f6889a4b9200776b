// The layers this node knows, by identity: what the control server asks about and what the LazyLoader opens. Sources
// and credentials can be added while a layer is being read.
import { readFile } from 'node:fs/promises';
import { type Digest, digestOf, parseDigest } from '../digest.ts';
import { DedupError, wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import type { LayerRecord, LayerSourceName } from './chunks/index-protocol.ts';
import type { NodeStore } from './chunks/node-store.ts';
import { decodeLayerIndex } from './index/format.ts';
import type { LayerIndex } from './index/layer-index.ts';
import type { LayerBlobSource, LayerProvider, LoadableLayer, WindowReader } from './loadable-layer.ts';
import type { Repository } from './registry/blob-reader.ts';

/** Identity of a layer; an empty `index` stands for one that was made here. */
export interface LayerIdentity {
  readonly digest: string;
  readonly index: string;
  readonly scope: string;
}

export interface LayerBookOptions {
  readonly paths: RootPaths;
  readonly store: NodeStore;
  readonly repository: (source: LayerSourceName) => Repository;
  /** A reader of the layer's windows: from the local restart blob, else from a repository. */
  readonly windows: (index: LayerIndex) => WindowReader;
}

export class LayerBook implements LayerProvider {
  readonly #options: LayerBookOptions;
  readonly #byId = new Map<number, LayerRecord>();

  private constructor(options: LayerBookOptions) {
    this.#options = options;
  }

  static async open(options: LayerBookOptions): Promise<LayerBook> {
    const book = new LayerBook(options);
    await book.reload();
    return book;
  }

  /** Reads all rows again: after layers were added or dropped. */
  async reload(): Promise<void> {
    const rows = await this.#options.store.layers();
    this.#byId.clear();
    for (const row of rows) this.#byId.set(row.id, row);
  }

  /** Forgets a layer that is being dropped: nobody may be told any more that it is here. */
  forget(layerId: number): void {
    this.#byId.delete(layerId);
  }

  /**
   * Without an index in the key only one made here counts: what another image's annotation says of the same layer is
   * not this image's, and may be wrong on purpose.
   */
  find(key: LayerIdentity): LayerRecord | undefined {
    for (const row of this.#byId.values()) {
      if (row.digest !== key.digest || row.scope !== key.scope) continue;
      if (key.index === '' ? row.trust === 'local' : row.indexDigest === key.index) return row;
    }
    return undefined;
  }

  /** Errors: NOT_FOUND. */
  get(layerId: number): LayerRecord {
    const row = this.#byId.get(layerId);
    if (row === undefined) throw new DedupError('NOT_FOUND', `no layer has the number ${layerId}`);
    return row;
  }

  all(): LayerRecord[] {
    return [...this.#byId.values()];
  }

  /** Records more places a layer can be read from. */
  async addSources(layerId: number, sources: readonly LayerSourceName[]): Promise<void> {
    const row = this.get(layerId);
    const fresh = sources.filter(
      (source) => !row.sources.some((known) => known.host === source.host && known.repository === source.repository),
    );
    if (fresh.length === 0) return;
    await this.#options.store.addSources(layerId, fresh);
    this.#byId.set(layerId, { ...row, sources: [...row.sources, ...fresh] });
  }

  /** The index of a layer, verified. Errors: NOT_FOUND when its file is gone, DIGEST_MISMATCH, INDEX_INVALID. */
  async readIndex(layerId: number, parts: 'all' | 'chunks'): Promise<LayerIndex> {
    const row = this.get(layerId);
    const path = this.#options.paths.layerIndex(parseDigest(row.indexDigest));
    return decodeLayerIndex(await readVerified(path, row), { parts });
  }

  /** Chunk and span tables, addresses and sources of a layer. Errors: those of readIndex, STORE_IO. */
  async openLayer(layerId: number): Promise<LoadableLayer> {
    const row = this.get(layerId);
    if (row.condemned) {
      throw new DedupError('DIGEST_MISMATCH', `layer ${row.digest} is blocked: its index does not describe it`);
    }
    const index = await this.readIndex(layerId, 'chunks');
    const addresses = await this.#options.store.layerAddresses(layerId);
    return {
      index,
      addresses,
      windows: this.#options.windows(index),
      sources: () => this.sources(layerId),
    };
  }

  /** Every source known now, in the order they became known. */
  sources(layerId: number): LayerBlobSource[] {
    return this.get(layerId).sources.map((source) => ({
      host: source.host,
      name: `${source.host}/${source.repository}`,
      reader: this.#options.repository(source),
    }));
  }

  /** Errors: NOT_FOUND, DIGEST_MISMATCH. */
  async checkIndexFile(layerId: number): Promise<void> {
    const row = this.get(layerId);
    await readVerified(this.indexPath(row), row);
  }

  /** Path of a layer's index file. */
  indexPath(row: LayerRecord): string {
    return this.#options.paths.layerIndex(row.indexDigest as Digest);
  }
}

/**
 * The index blob of a layer. Its digest is checked at every read: chunks get their addresses by their position in it, so
 * another index in its place would put bytes where they do not belong.
 */
async function readVerified(path: string, row: LayerRecord): Promise<Buffer> {
  let bytes: Buffer;
  try {
    bytes = await readFile(path);
  } catch (error) {
    throw wrapError(error, `reading the index of layer ${row.digest}`, 'NOT_FOUND');
  }
  if (digestOf(bytes) !== row.indexDigest) {
    throw new DedupError('DIGEST_MISMATCH', `${path} is not the index of layer ${row.digest}`, {
      hint: 'remove the file: it is fetched again',
    });
  }
  return bytes;
}
