// metadata.db: which snapshots exist, what lies below each, what is still to be deleted. The one writer of that file;
// runs in the metastore's worker thread and is called through metastore-client.ts. Touches no snapshot directory.
import { wallClockMs } from '../clock.ts';
import { DedupError } from '../errors.ts';
import type { LayerKey, Source } from './images.ts';
import { isUnpackKey, LABEL_SNAPSHOT_REF, type Labels, maskedLabels } from './labels.ts';
import { ConversionMetastore } from './metastore-conversions.ts';
import { type Row, SELECT } from './metastore-database.ts';
import type { Lower } from './mounts.ts';
import { type NewSnapshot, requireMove, type SnapshotRecord } from './snapshot-record.ts';

/**
 * Snapshots in SQLite. WAL with synchronous=NORMAL: what was answered survives the death of the process; after a power
 * cut the last commits may be missing, the file is never torn (docs/decisions/0006-metadata-db.md).
 */
export class SqliteMetastore extends ConversionMetastore {
  /** The highest snapshot number ever given; numbers are not used twice. */
  lastId(): number {
    const row = this.sql("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").get() as
      | { seq: number }
      | undefined;
    return row?.seq ?? 0;
  }

  find(name: string): SnapshotRecord | undefined {
    return this.rows(`${SELECT} WHERE s.name = ?`, name)[0];
  }

  /** As find. Errors: NOT_FOUND. */
  get(name: string): SnapshotRecord {
    const found = this.find(name);
    if (found === undefined) throw new DedupError('NOT_FOUND', `snapshot ${JSON.stringify(name)} does not exist`);
    return found;
  }

  /** The committed snapshot that stands for `ref` on top of `parent`; the oldest if two namespaces committed one each. */
  findByRef(ref: string, parent: string): SnapshotRecord | undefined {
    return this.rows(
      `${SELECT} WHERE s.ref = ? AND s.kind = 'committed' AND ifnull(p.name, '') = ? ORDER BY s.id LIMIT 1`,
      ref,
      parent,
    )[0];
  }

  /** The committed snapshots from `name` down to the base. Errors: NOT_FOUND; INVALID_ARGUMENT when not committed. */
  chain(name: string): SnapshotRecord[] {
    if (name === '') return [];
    const result: SnapshotRecord[] = [this.#committedParent(name)];
    for (let below = result[0]?.parentId; below !== undefined; below = result.at(-1)?.parentId) {
      result.push(...this.rows(`${SELECT} WHERE s.id = ?`, below));
    }
    return result;
  }

  #committedParent(name: string): SnapshotRecord {
    const parent = this.find(name);
    if (parent === undefined) {
      throw new DedupError('NOT_FOUND', `parent snapshot ${JSON.stringify(name)} does not exist`);
    }
    if (parent.kind !== 'committed') {
      throw new DedupError(
        'INVALID_ARGUMENT',
        `parent snapshot ${JSON.stringify(name)} is ${parent.kind}, not committed`,
      );
    }
    return parent;
  }

  /**
   * Adds a snapshot. A remote one (`layer`) is refused when its (ref, parent) exists.
   * Errors: ALREADY_EXISTS, NOT_FOUND and INVALID_ARGUMENT for the parent.
   */
  insert(snapshot: NewSnapshot): SnapshotRecord {
    return this.db.transaction(() => {
      const parent = snapshot.parent === '' ? undefined : this.#committedParent(snapshot.parent);
      const ref = snapshot.labels[LABEL_SNAPSHOT_REF];
      const { layer, conversion, directory, usage } = snapshot;
      const remote = layer !== undefined && conversion !== 'done';
      const taken =
        this.find(snapshot.name) !== undefined ||
        (remote && ref !== undefined && this.findByRef(ref, snapshot.parent) !== undefined);
      if (taken) throw new DedupError('ALREADY_EXISTS', `snapshot ${JSON.stringify(snapshot.name)} exists`);
      const ordinary = snapshot.kind === 'committed' && layer === undefined;
      // Restored from a file that does not say who committed it: as if by hand, now.
      const origin = snapshot.origin ?? (ordinary ? { unpacked: false, boot: this.boot } : undefined);
      const now = wallClockMs();
      this.sql(
        `INSERT INTO snapshots (id, name, kind, parent, labels, ref, created, updated, lowers, layer_digest, layer_index,
           layer_scope, usage_bytes, usage_inodes, unpacked, boot, conversion, directory, unproven)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
      ).run(
        snapshot.id,
        snapshot.name,
        snapshot.kind,
        parent?.id ?? null,
        JSON.stringify(snapshot.labels),
        ref ?? null,
        now,
        now,
        JSON.stringify(snapshot.lowers),
        layer?.digest ?? null,
        layer?.index ?? null,
        layer?.scope ?? null,
        usage?.bytes ?? null,
        usage?.inodes ?? null,
        origin?.unpacked === true ? 1 : 0,
        origin?.boot ?? null,
        conversion ?? (ordinary ? 'pending' : null),
        directory === 'unproven' ? 'waits' : (directory ?? null),
        directory === 'unproven' ? 1 : 0,
      );
      return this.get(snapshot.name);
    })();
  }

  /**
   * Turns an active snapshot into a committed one, made now. Its labels become those given; `containerd.io/snapshot.ref`
   * stays.
   * Errors: NOT_FOUND, FAILED_PRECONDITION when not active, ALREADY_EXISTS for the name.
   */
  commit(key: string, name: string, labels: Labels): SnapshotRecord {
    return this.db.transaction(() => {
      const active = this.get(key);
      requireMove(active, 'commit');
      if (this.find(name) !== undefined) {
        throw new DedupError('ALREADY_EXISTS', `snapshot ${JSON.stringify(name)} exists`);
      }
      const ref = labels[LABEL_SNAPSHOT_REF] ?? active.labels[LABEL_SNAPSHOT_REF];
      const kept = ref === undefined ? labels : { ...labels, [LABEL_SNAPSHOT_REF]: ref };
      const unpacked = ref !== undefined || isUnpackKey(key);
      const now = wallClockMs();
      this.sql(
        `UPDATE snapshots SET name = ?, kind = 'committed', labels = ?, ref = ?, created = ?, updated = ?, lowers = '[]',
           unpacked = ?, boot = ?, conversion = 'pending' WHERE id = ?`,
      ).run(name, JSON.stringify(kept), ref ?? null, now, now, unpacked ? 1 : 0, this.boot, active.id);
      return this.get(name);
    })();
  }

  /** Forgets a snapshot; its directory is remembered for Cleanup. Errors: NOT_FOUND, FAILED_PRECONDITION with children. */
  remove(name: string): SnapshotRecord {
    return this.db.transaction(() => {
      const found = this.get(name);
      const child = this.sql('SELECT name FROM snapshots WHERE parent = ? LIMIT 1').get(found.id) as Row | undefined;
      if (child !== undefined) {
        throw new DedupError('FAILED_PRECONDITION', `snapshot ${JSON.stringify(name)} has children`, {
          hint: `remove ${JSON.stringify(child.name)} first`,
        });
      }
      this.sql('DELETE FROM snapshots WHERE id = ?').run(found.id);
      this.sql('INSERT OR IGNORE INTO removed (id) VALUES (?)').run(found.id);
      if (found.layer !== undefined) {
        this.sql(
          'DELETE FROM sources WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM snapshots WHERE layer_digest = sources.digest)',
        ).run(found.layer.digest);
      }
      return found;
    })();
  }

  /**
   * Changes labels as `maskedLabels` says. The ref of a remote snapshot stays: it is how containerd finds it.
   * Errors: NOT_FOUND, INVALID_ARGUMENT for a field that cannot be changed.
   */
  update(name: string, given: Labels, fields: readonly string[]): SnapshotRecord {
    return this.db.transaction(() => {
      const found = this.get(name);
      const labels = maskedLabels(found.labels, given, fields);
      const ref = labels[LABEL_SNAPSHOT_REF] ?? (found.layer && found.labels[LABEL_SNAPSHOT_REF]);
      const kept = ref === undefined ? labels : { ...labels, [LABEL_SNAPSHOT_REF]: ref };
      this.sql('UPDATE snapshots SET labels = ?, ref = ?, updated = ? WHERE id = ?').run(
        JSON.stringify(kept),
        ref ?? null,
        // Strictly later than before, also when the clock was set back.
        Math.max(wallClockMs(), found.updatedMs + 0.001),
        found.id,
      );
      return this.get(name);
    })();
  }

  /** At most `limit` snapshots with a number above `afterId`, ascending. */
  list(afterId: number, limit: number): SnapshotRecord[] {
    return this.rows(`${SELECT} WHERE s.id > ? ORDER BY s.id LIMIT ?`, afterId, limit);
  }

  /** Remembers what was answered to Usage; the first answer stays. */
  setUsage(id: number, bytes: number, inodes: number): SnapshotRecord['usage'] {
    this.sql('UPDATE snapshots SET usage_bytes = ?, usage_inodes = ? WHERE id = ? AND usage_bytes IS NULL').run(
      bytes,
      inodes,
      id,
    );
    return this.rows(`${SELECT} WHERE s.id = ?`, id)[0]?.usage;
  }

  setLowers(id: number, lowers: readonly Lower[]): void {
    this.sql('UPDATE snapshots SET lowers = ? WHERE id = ?').run(JSON.stringify(lowers), id);
  }

  /** Everything that keeps a merged image mounted, and every lazy layer. */
  inUse(): { mountIds: number[]; layers: LayerKey[] } {
    const mountIds = new Set<number>();
    const layers = new Map<string, LayerKey>();
    const add = ({ digest, index, scope }: LayerKey): void => {
      layers.set(JSON.stringify([digest, index, scope]), { digest, index, scope });
    };
    for (const lowers of this.frozenLowers()) {
      for (const lower of lowers) {
        if (lower.kind !== 'lazy') continue;
        mountIds.add(lower.mountId);
        // A converted snapshot that is a directory again may lie below a key that was given its layer.
        lower.layers.forEach(add);
      }
    }
    const named = this.sql(
      `SELECT DISTINCT layer_digest AS digest, layer_index AS 'index', layer_scope AS scope
       FROM snapshots WHERE layer_digest IS NOT NULL`,
    ).all() as LayerKey[];
    named.forEach(add);
    return { mountIds: [...mountIds], layers: [...layers.values()] };
  }

  /** Directories with a number up to this one that belong to no snapshot are left alone; 0 when there are none. */
  protectedUpTo(): number {
    return (this.sql('SELECT ifnull(max(up_to), 0) FROM protected_ids').pluck().get() as number | undefined) ?? 0;
  }

  /** Leaves directories up to this number alone from now on: this database replaces one that was lost. */
  protect(upTo: number): void {
    this.sql('INSERT INTO protected_ids (up_to) VALUES (?)').run(upTo);
  }

  /** Every snapshot of a lost database has its row again. */
  unprotect(): void {
    this.sql('DELETE FROM protected_ids').run();
  }

  ids(): number[] {
    return this.sql('SELECT id FROM snapshots').pluck().all() as number[];
  }

  removedIds(): number[] {
    return this.sql('SELECT id FROM removed').pluck().all() as number[];
  }

  /** Remembers a directory that belongs to no snapshot. */
  markRemoved(id: number): void {
    this.sql('INSERT OR IGNORE INTO removed (id) VALUES (?)').run(id);
  }

  forgetRemoved(id: number): void {
    this.sql('DELETE FROM removed WHERE id = ?').run(id);
  }

  /** Adds a place the layer was prepared from. */
  addSource(digest: string, source: Source, told: boolean): void {
    this.sql(
      `INSERT INTO sources (digest, host, repository, told) VALUES (?, ?, ?, ?)
       ON CONFLICT DO UPDATE SET told = max(told, excluded.told)`,
    ).run(digest, source.host, source.repository, told ? 1 : 0);
  }

  sources(digest: string): Source[] {
    return this.sql('SELECT host, repository FROM sources WHERE digest = ?').all(digest) as Source[];
  }

  /** Sources that dedupd has not heard of yet. */
  untoldSources(): { layer: LayerKey; source: Source }[] {
    const rows = this.sql(
      `SELECT DISTINCT s.layer_digest AS digest, s.layer_index AS 'index', s.layer_scope AS scope, host, repository
       FROM sources JOIN snapshots s ON s.layer_digest = sources.digest WHERE told = 0`,
    ).all() as (LayerKey & Source)[];
    return rows.map(({ digest, index, scope, host, repository }) => ({
      layer: { digest, index, scope },
      source: { host, repository },
    }));
  }
}
