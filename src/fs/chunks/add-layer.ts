// Gives the chunks of a new layer their addresses, inside the writer's transaction: known chunks keep theirs, new ones
// follow upwards in layer order, so that neighbours in the tar are neighbours in the store.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import type { AddressSpace } from './address-space.ts';
import { type HeldNames, NamedChunks } from './chunk-rows.ts';
import type { AddedLayer, NewLayer } from './index-protocol.ts';
import { addressesOf, addSources } from './layer-rows.ts';

const blocksOf = (bytes: number): number => Math.ceil(bytes / BLOCK_BYTES);

/**
 * Inserts the layer, or returns the existing one with the same name. New chunks get addresses of `space`; those that are
 * held, where they are: `counted` are their names, to be struck out. Errors: STORE_FULL when the address space ends,
 * INDEX_INVALID when a chunk contradicts a known one.
 */
export function addLayer(
  db: Database.Database,
  layer: NewLayer,
  space: AddressSpace,
  holds: HeldNames,
  nowSeconds: number,
): Omit<AddedLayer, 'nextAddress'> & { readonly counted: readonly string[] } {
  const scope = scopeId(db, layer.scope);
  const contiguous = layer.files === undefined ? 0 : 1;
  const known = db
    .prepare(
      'SELECT id, chunk_count FROM layers WHERE digest = ? AND index_digest = ? AND scope = ? AND contiguous = ?',
    )
    .raw()
    .get(layer.digest, layer.indexDigest, scope, contiguous) as [number, number] | undefined;
  const count = layer.lengths.length;
  if (known !== undefined) {
    const [layerId, chunkCount] = known;
    if (chunkCount !== count)
      throw new DedupError('STORE_CORRUPT', `layer ${layer.digest} is stored with ${chunkCount} chunks, not ${count}`);
    addSources(db, layerId, layer.sources);
    // Made here from the whole layer: whatever named the same index before, now it is known to be right.
    if (layer.trust === 'local') db.prepare("UPDATE layers SET trust = 'local' WHERE id = ?").run(layerId);
    return { layerId, addresses: addressesOf(db, layerId, count), existed: true, counted: [] };
  }
  const layerId = Number(
    db
      .prepare(
        `INSERT INTO layers (scope, digest, size, diff_id, index_digest, restart_digest, restart_size, chunk_count, contiguous, reference, trust, added_at)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
      )
      .run(
        scope,
        layer.digest,
        layer.size,
        layer.diffId,
        layer.indexDigest,
        layer.restartDigest,
        layer.restartSize,
        count,
        contiguous,
        layer.reference,
        layer.trust,
        nowSeconds,
      ).lastInsertRowid,
  );
  addSources(db, layerId, layer.sources);
  const placer = new Placer(db, layer, layerId, space, new NamedChunks(db, scope, holds, nowSeconds));
  if (layer.files === undefined) {
    for (let seq = 0; seq < count; seq++) if (layer.zero[seq] === 0) placer.place(seq);
  } else {
    for (let i = 0; i + 1 < layer.files.length; i += 2) placer.placeFile(layer.files[i]!, layer.files[i + 1]!);
  }
  placer.countKnown();
  return { layerId, addresses: placer.addresses, existed: false, counted: placer.counted };
}

/** Number of a scope, made when it is new. */
export function scopeId(db: Database.Database, name: string): number {
  const id = db.prepare('SELECT id FROM scopes WHERE name = ?').pluck().get(name) as number | undefined;
  return id ?? Number(db.prepare('INSERT INTO scopes (name) VALUES (?)').run(name).lastInsertRowid);
}

class Placer {
  readonly addresses: Float64Array;
  readonly #layer: NewLayer;
  readonly #layerId: number;
  readonly #space: AddressSpace;
  /** First block of the chunks this layer has used so far, by digest and size. */
  readonly #seen = new Map<string, number>();
  /** Those of them that were there before; new ones have this layer counted already. */
  readonly #known: number[] = [];
  readonly #digests: Buffer;
  readonly #chunks: NamedChunks;
  readonly #link: Database.Statement;
  readonly #extra: Database.Statement;
  readonly #extrasOf: Database.Statement;
  readonly #chunkAt: Database.Statement;
  readonly #count: Database.Statement;

  constructor(db: Database.Database, layer: NewLayer, layerId: number, space: AddressSpace, chunks: NamedChunks) {
    this.#layer = layer;
    this.#layerId = layerId;
    this.#space = space;
    this.addresses = new Float64Array(layer.lengths.length);
    this.#digests = Buffer.from(layer.digests.buffer, layer.digests.byteOffset, layer.digests.byteLength);
    this.#chunks = chunks;
    this.#link = db.prepare('INSERT INTO layer_chunks (layer_id, seq, chunk_id, placement) VALUES (?, ?, ?, ?)');
    this.#extra = db.prepare('INSERT INTO placements (block, chunk_id) VALUES (?, ?)');
    this.#extrasOf = db.prepare('SELECT block FROM placements WHERE chunk_id = ?').pluck();
    this.#chunkAt = db
      .prepare('SELECT id FROM chunks WHERE id = ? UNION ALL SELECT chunk_id FROM placements WHERE block = ?')
      .pluck();
    this.#count = db.prepare('UPDATE chunks SET ref_count = ref_count + 1 WHERE id = ?');
  }

  /** Names of chunks that were held for a layer that is being read. */
  get counted(): readonly string[] {
    return this.#chunks.counted;
  }

  /** Counts the layer for every chunk that was known before it. */
  countKnown(): void {
    for (const id of this.#known) this.#count.run(id);
  }

  #digest(seq: number): Buffer {
    return this.#digests.subarray(seq * 32, seq * 32 + 32);
  }

  #key(seq: number): string {
    return `${this.#digest(seq).toString('latin1')}${this.#layer.lengths[seq]}`;
  }

  /** The chunk's first block, counted for this layer once; `newBlock` gives its place when it is not known yet. */
  #chunk(seq: number, newBlock: () => number): number {
    const key = this.#key(seq);
    const seen = this.#seen.get(key);
    if (seen !== undefined) return seen;
    const { lengths, pieceBytes } = this.#layer;
    const { id, isNew } = this.#chunks.findOrAdd(this.#digest(seq), lengths[seq]!, pieceBytes, newBlock);
    if (!isNew) this.#known.push(id);
    this.#seen.set(key, id);
    return id;
  }

  #record(seq: number, chunkId: number, block: number): void {
    this.#link.run(this.#layerId, seq, chunkId, block === chunkId ? null : block);
    this.addresses[seq] = block * BLOCK_BYTES;
  }

  /** Places one chunk wherever it is, or at the next free address. */
  place(seq: number): void {
    const id = this.#chunk(seq, () => this.#space.take(this.#layer.lengths[seq]!));
    this.#record(seq, id, id);
  }

  /** Places a file's chunks one after the other: in a run that exists already, or in a new one. */
  placeFile(first: number, count: number): void {
    if (count === 0) return;
    if (count === 1) {
      this.place(first);
      return;
    }
    const run = this.#existingRun(first, count);
    if (run !== undefined) {
      for (let i = 0; i < count; i++) {
        const block = run + i * blocksOf(this.#layer.chunkBytes);
        this.#record(first + i, this.#chunk(first + i, unplaced), block);
      }
      return;
    }
    let bytes = 0;
    for (let i = 0; i < count; i++) bytes += this.#layer.lengths[first + i]!;
    let block = this.#space.take(bytes);
    for (let i = 0; i < count; i++) {
      const seq = first + i;
      const here = block;
      const id = this.#chunk(seq, () => here);
      if (id !== block) this.#extra.run(block, id);
      this.#record(seq, id, block);
      block += blocksOf(this.#layer.lengths[seq]!);
    }
  }

  #existingRun(first: number, count: number): number | undefined {
    const ids: number[] = [];
    for (let i = 0; i < count; i++) {
      const seq = first + i;
      const id = this.#chunks.find(this.#digest(seq), this.#layer.lengths[seq]!);
      if (id === undefined) return undefined;
      ids.push(id);
    }
    const step = blocksOf(this.#layer.chunkBytes);
    const starts = [ids[0]!, ...(this.#extrasOf.all(ids[0]) as number[])];
    return starts.find((start) => ids.every((id, i) => this.#chunkAt.get(start + i * step, start + i * step) === id));
  }
}

/** The place of a chunk that was just seen to have one. */
function unplaced(): never {
  throw new DedupError('INTERNAL', 'a chunk of an existing run has no place');
}
