// Rows of layers and of where their chunks lie: read, and changed but for what adds and drops layers. Runs inside the writer's
// transactions, in the worker thread.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import type { LayerRecord, LayerSourceName, LayerTrust } from './index-protocol.ts';

/** Every layer, in the order in which they were added. */
export function layerRecords(db: Database.Database): LayerRecord[] {
  const sources = new Map<number, LayerSourceName[]>();
  const sourceRows = db
    .prepare('SELECT layer_id, host, repository FROM sources ORDER BY layer_id, position')
    .raw()
    .all();
  for (const [layerId, host, repository] of sourceRows as [number, string, string][]) {
    const list = sources.get(layerId) ?? [];
    list.push({ host, repository });
    sources.set(layerId, list);
  }
  const rows = db
    .prepare('SELECT l.*, s.name AS scope_name FROM layers l JOIN scopes s ON s.id = l.scope ORDER BY l.id')
    .all();
  return (rows as Record<string, string | number>[]).map((row) => ({
    id: row.id as number,
    scope: row.scope_name as string,
    digest: row.digest as string,
    size: row.size as number,
    diffId: row.diff_id as string,
    indexDigest: row.index_digest as string,
    restartDigest: row.restart_digest as string,
    restartSize: row.restart_size as number,
    chunkCount: row.chunk_count as number,
    contiguous: row.contiguous === 1,
    reference: row.reference as string,
    trust: row.trust as LayerTrust,
    verified: row.verified === 1,
    condemned: row.condemned === 1,
    sources: sources.get(row.id as number) ?? [],
  }));
}

/** Store address of every chunk of a layer's table; 0 for a zero chunk that has none. Errors: NOT_FOUND. */
export function layerAddresses(db: Database.Database, layerId: number): Float64Array {
  const count = db.prepare('SELECT chunk_count FROM layers WHERE id = ?').pluck().get(layerId) as number | undefined;
  if (count === undefined) throw new DedupError('NOT_FOUND', `layer ${layerId} is not in the store`);
  return addressesOf(db, layerId, count);
}

/** The same for a layer of which the number of chunks is known. */
export function addressesOf(db: Database.Database, layerId: number, count: number): Float64Array {
  const addresses = new Float64Array(count);
  const rows = db
    .prepare('SELECT seq, ifnull(placement, chunk_id) FROM layer_chunks WHERE layer_id = ?')
    .raw()
    .iterate(layerId) as IterableIterator<[number, number]>;
  for (const [seq, block] of rows) addresses[seq] = block * BLOCK_BYTES;
  return addresses;
}

/** Adds repositories that hold a layer, behind those that are known. */
export function addSources(db: Database.Database, layerId: number, sources: readonly LayerSourceName[]): void {
  const insert = db.prepare(
    `INSERT INTO sources (layer_id, host, repository, position)
     SELECT ?, ?, ?, (SELECT count(*) FROM sources WHERE layer_id = ?) WHERE true ON CONFLICT DO NOTHING`,
  );
  for (const { host, repository } of sources) insert.run(layerId, host, repository, layerId);
}

/** Changes what was found out about a layer; what is absent stays. */
export function setLayerState(
  db: Database.Database,
  layerId: number,
  state: { readonly verified?: boolean; readonly condemned?: boolean },
): void {
  const set = db.prepare(
    'UPDATE layers SET verified = ifnull(?, verified), condemned = ifnull(?, condemned) WHERE id = ?',
  );
  const flag = (value: boolean | undefined): number | null => (value === undefined ? null : Number(value));
  set.run(flag(state.verified), flag(state.condemned), layerId);
}
