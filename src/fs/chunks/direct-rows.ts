// SQL about mounts that read the store without dedupd, and about which chunks of layers are here for good. Runs inside
// the writer's transactions, in the worker thread.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import type { DirectMount, LayerPresence } from './index-protocol.ts';
import { MAX_MASKED_PIECES } from './store-layout.ts';

/** Chunks that are not wholly here are listed up to this number: the first that is absent settles the question. */
const MOST_MISSING = 64;

/** Row of a chunk of a layer: first block, bytes, bytes of a piece, mask of its durable pieces. */
type ChunkRow = [block: number, size: number, pieceBytes: number, durable: number];

const CHUNKS_OF_LAYER = `
  SELECT c.id, c.size, c.piece_bytes, c.durable FROM layer_chunks l JOIN chunks c ON c.id = l.chunk_id
  WHERE l.layer_id = ? AND l.placement IS NULL
  UNION ALL
  SELECT p.block, c.size, c.piece_bytes, p.durable FROM layer_chunks l JOIN placements p ON p.block = l.placement
  JOIN chunks c ON c.id = p.chunk_id WHERE l.layer_id = ?`;

function isDurable(size: number, pieceBytes: number, mask: number): boolean {
  if (mask === -1) return true;
  const pieces = Math.ceil(size / pieceBytes);
  if (pieces > MAX_MASKED_PIECES) return false;
  const all = 2 ** pieces - 1;
  return (mask & all) === all;
}

/** Which blocks the chunks of a layer take, if every piece of them is durable; else some chunks of which one is not. */
export function layerPresence(db: Database.Database, layerId: number): LayerPresence {
  const rows = db.prepare(CHUNKS_OF_LAYER).raw();
  const lengths = new Map<number, number>();
  const missing: number[] = [];
  for (const [block, size, pieceBytes, mask] of rows.iterate(layerId, layerId) as IterableIterator<ChunkRow>) {
    const blocks = Math.ceil(size / BLOCK_BYTES);
    lengths.set(block, blocks);
    if (isDurable(size, pieceBytes, mask)) continue;
    missing.push(block, blocks);
    if (missing.length === 2 * MOST_MISSING) break;
  }
  if (missing.length > 0) return { missing: Float64Array.from(missing), ranges: new Float64Array(0) };
  const ranges: number[] = [];
  let end = -1;
  for (const block of Float64Array.from(lengths.keys()).sort()) {
    const blocks = lengths.get(block)!;
    if (block === end) ranges[ranges.length - 1]! += blocks;
    else ranges.push(block, blocks);
    end = block + blocks;
  }
  return { missing: new Float64Array(0), ranges: Float64Array.from(ranges) };
}

/** Records a mount and pins its layers. The transaction is on the disk before the device reads the store. */
export function addDirect(db: Database.Database, mount: DirectMount, nowSeconds: number): void {
  db.prepare(
    `INSERT INTO direct_mounts (mount_id, loop, metadata_path, since) VALUES (?, ?, ?, ?)
     ON CONFLICT DO UPDATE SET loop = excluded.loop, metadata_path = excluded.metadata_path`,
  ).run(mount.imageId, mount.loop, mount.metadata, nowSeconds);
  pin(db, mount.imageId, mount.layers);
}

/** Forgets a mount whose device was seen gone; its layers stay pinned when the same image is mounted again. */
export function dropDirect(db: Database.Database, imageId: number, pinned: boolean): void {
  db.prepare('DELETE FROM direct_mounts WHERE mount_id = ?').run(imageId);
  if (!pinned) unpin(db, imageId);
}

/** Images with a row. */
export function directMounts(db: Database.Database): number[] {
  return db.prepare('SELECT mount_id FROM direct_mounts ORDER BY mount_id').pluck().all() as number[];
}

/** Has AUTOINCREMENT continue after this number, if it has not come so far. */
export function numberImagesAbove(db: Database.Database, imageId: number): void {
  const raised = db.prepare("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'images'").run(imageId);
  if (raised.changes === 0) db.prepare("INSERT INTO sqlite_sequence (name, seq) VALUES ('images', ?)").run(imageId);
}

/** Rows of another history of this store: what their numbers mean is not known here. */
export function forgetDirect(db: Database.Database): void {
  db.exec('DELETE FROM direct_mounts; DELETE FROM pins');
}

/** Errors: NOT_FOUND for a layer that was dropped. */
export function pin(db: Database.Database, mountId: number, layers: readonly number[]): void {
  const insert = db.prepare('INSERT INTO pins (mount_id, layer_id) VALUES (?, ?) ON CONFLICT DO NOTHING');
  const known = db.prepare('SELECT 1 FROM layers WHERE id = ?').pluck();
  for (const layerId of layers) {
    // Dropped a moment ago: its addresses may be given to others.
    if (known.get(layerId) === undefined) throw new DedupError('NOT_FOUND', `layer ${layerId} is not in the store`);
    insert.run(mountId, layerId);
  }
}

/** Unpins the layers of a mount, or of all; those of a device that reads the store itself stay. */
export function unpin(db: Database.Database, mountId?: number): void {
  const released = mountId === undefined ? 'TRUE' : 'mount_id = ?';
  db.prepare(`DELETE FROM pins WHERE ${released} AND mount_id NOT IN (SELECT mount_id FROM direct_mounts)`).run(
    ...(mountId === undefined ? [] : [mountId]),
  );
}
