// The part of metadata.db that knows of conversions: which ordinary layers are to be converted, which were, and whose
// directories are still there. Runs in the metastore's worker thread; asked by converter.ts and leftover-directories.ts.
import type { LayerKey } from './images.ts';
import { MetastoreDatabase, type Row, record, SELECT } from './metastore-database.ts';
import type { Lower } from './mounts.ts';
import type { DirectoryState, SnapshotRecord } from './snapshot-record.ts';

/** How far the conversions of ordinary layers have come. */
export interface ConversionCounts {
  /** May be converted now. */
  readonly pending: number;
  /** Committed by hand in this boot: only in another one. */
  readonly later: number;
  readonly done: number;
  readonly left: readonly { readonly id: number; readonly name: string; readonly reason: string }[];
}

/** The directory of a converted layer that is still there. */
export interface LeftoverDirectory {
  readonly id: number;
  readonly name: string;
  readonly state: DirectoryState;
  /** A key that was given it as a lower directory. */
  readonly heldBy: string | undefined;
}

/** A committed one is never answered as an upper directory, so after its boot nobody can have it mounted to write. */
const ELIGIBLE = "conversion = 'pending' AND (unpacked = 1 OR boot <> ?)";

export class ConversionMetastore extends MetastoreDatabase {
  /** Snapshots that may be converted now, the oldest first; what lies below a snapshot is older than it. */
  pendingConversions(): { id: number; parentId: number | undefined }[] {
    const rows = this.sql(`SELECT id, parent FROM snapshots WHERE ${ELIGIBLE} ORDER BY id`).all(this.boot) as Row[];
    return rows.map(({ id, parent }) => ({ id, parentId: parent ?? undefined }));
  }

  conversionCounts(): ConversionCounts {
    const count = (where: string, ...args: unknown[]): number =>
      this.sql(`SELECT count(*) FROM snapshots WHERE ${where}`)
        .pluck()
        .get(...args) as number;
    const pending = count(ELIGIBLE, this.boot);
    return {
      pending,
      later: count("conversion = 'pending'") - pending,
      done: count("conversion = 'done'"),
      left: this.sql(
        "SELECT id, name, left_because AS reason FROM snapshots WHERE conversion = 'left' ORDER BY id",
      ).all() as ConversionCounts['left'][number][],
    };
  }

  /**
   * Makes an ordinary snapshot one whose content is `layer`. Its directory is remembered until it is gone, and none of its
   * chain goes before proven(). Undefined, and nothing done, when it is not to be converted any more.
   */
  convert(id: number, layer: LayerKey): SnapshotRecord | undefined {
    return this.db.transaction(() => {
      const { changes } = this.sql(
        `UPDATE snapshots SET layer_digest = ?, layer_index = ?, layer_scope = ?, conversion = 'done', directory = 'waits'
         WHERE id = ? AND conversion = 'pending'`,
      ).run(layer.digest, layer.index, layer.scope, id);
      if (changes === 0) return undefined;
      this.sql(
        `WITH RECURSIVE
           above(id) AS (
             SELECT ? UNION SELECT s.id FROM snapshots s JOIN above ON s.parent = above.id WHERE s.kind = 'committed'
           ),
           below(id) AS (
             SELECT ? UNION SELECT s.parent FROM snapshots s JOIN below ON s.id = below.id WHERE s.parent IS NOT NULL
           )
         UPDATE snapshots SET unproven = 1
         WHERE directory = 'waits' AND id IN (SELECT id FROM above UNION SELECT id FROM below)`,
      ).run(id, id);
      return this.byId(id);
    })();
  }

  /** Converted snapshots whose directories are kept until an image was made of them, the oldest first. */
  unproven(): number[] {
    return this.sql("SELECT id FROM snapshots WHERE unproven = 1 AND directory = 'waits' ORDER BY id")
      .pluck()
      .all() as number[];
  }

  /** The directory of a converted snapshot may go. */
  proven(id: number): void {
    this.sql('UPDATE snapshots SET unproven = 0 WHERE id = ?').run(id);
  }

  /** Leaves an ordinary snapshot as it is, until retryLeft(). */
  leave(id: number, reason: string): void {
    this.sql("UPDATE snapshots SET conversion = 'left', left_because = ? WHERE id = ? AND conversion = 'pending'").run(
      reason,
      id,
    );
  }

  /** What was left may be converted after all; how many. */
  retryLeft(): number {
    return this.sql("UPDATE snapshots SET conversion = 'pending', left_because = NULL WHERE conversion = 'left'").run()
      .changes;
  }

  /** Makes a converted snapshot the ordinary one it was; undefined when its directory is not kept any more. */
  takeBack(id: number): SnapshotRecord | undefined {
    const { changes } = this.sql(
      `UPDATE snapshots SET layer_digest = NULL, layer_index = NULL, layer_scope = NULL, conversion = 'pending',
         directory = NULL, unproven = 0 WHERE id = ? AND directory = 'waits'`,
    ).run(id);
    return changes === 0 ? undefined : this.byId(id);
  }

  /** Converted snapshots whose content is one of `layers`. */
  convertedAs(layers: readonly LayerKey[]): SnapshotRecord[] {
    return layers.flatMap(({ digest, index, scope }) =>
      this.rows(
        `${SELECT} WHERE s.conversion = 'done' AND s.layer_digest = ? AND s.layer_index = ? AND s.layer_scope = ?`,
        digest,
        index,
        scope,
      ),
    );
  }

  /**
   * The layers, bottom to top, of every chain that ends at or above snapshot `id`, with nothing committed on it, and is
   * lazy throughout.
   */
  lazyChainsWith(id: number): LayerKey[][] {
    const tops = this.sql(
      `WITH RECURSIVE above(id) AS (
         SELECT ? UNION ALL SELECT s.id FROM snapshots s JOIN above ON s.parent = above.id WHERE s.kind = 'committed'
       )
       SELECT id FROM above WHERE NOT EXISTS
         (SELECT 1 FROM snapshots c WHERE c.parent = above.id AND c.kind = 'committed')`,
    )
      .pluck()
      .all(id) as number[];
    return tops.flatMap((top) => {
      const layers: LayerKey[] = [];
      for (let at: number | undefined = top; at !== undefined; ) {
        const snapshot = this.byId(at);
        if (snapshot?.layer === undefined) return [];
        layers.unshift(snapshot.layer);
        at = snapshot.parentId;
      }
      return [layers];
    });
  }

  /** Lower sets of active snapshots and views. */
  protected frozenLowers(): Lower[][] {
    const rows = this.sql("SELECT lowers FROM snapshots WHERE lowers <> '[]'").all() as Row[];
    return rows.map(({ lowers }) => JSON.parse(lowers) as Lower[]);
  }

  /** Directories of converted snapshots that are still there. */
  leftoverDirectories(): LeftoverDirectory[] {
    const left = (this.sql(`${SELECT} WHERE s.directory IS NOT NULL ORDER BY s.id`).all() as Row[]).map(record);
    if (left.length === 0) return [];
    const holders = this.#holders();
    return left.map(({ id, name, directory }) => ({
      id,
      name,
      state: directory ?? 'waits',
      heldBy: holders.get(id),
    }));
  }

  /** Of every directory that keys were given as a lower: the name of one of them. */
  #holders(): Map<number, string> {
    const found = new Map<number, string>();
    for (const { name, lowers } of this.sql("SELECT name, lowers FROM snapshots WHERE lowers <> '[]'").all() as Row[]) {
      for (const lower of JSON.parse(lowers) as Lower[]) if (lower.kind === 'normal') found.set(lower.id, name);
    }
    return found;
  }

  /**
   * Gives up a directory that no key was given, and of whose layer images can be made. On disk when it returns, with
   * everything before it: a directory must not be gone whose snapshot is an ordinary one again after a power cut. False,
   * and nothing done, when it is needed.
   */
  giveUpDirectory(id: number): boolean {
    this.db.pragma('synchronous = FULL');
    try {
      return this.db.transaction(() => {
        if (this.#holders().has(id)) return false;
        const { changes } = this.sql(
          "UPDATE snapshots SET directory = 'goes' WHERE id = ? AND directory = 'waits' AND unproven = 0",
        ).run(id);
        return changes > 0;
      })();
    } finally {
      this.db.pragma('synchronous = NORMAL');
    }
  }

  directoryGone(id: number): void {
    this.sql("UPDATE snapshots SET directory = NULL WHERE id = ? AND directory = 'goes'").run(id);
  }

  /** What was set under a name; undefined when nothing. */
  setting(name: string): string | undefined {
    return this.sql('SELECT value FROM settings WHERE name = ?').pluck().get(name) as string | undefined;
  }

  changeSetting(name: string, value: string): void {
    this.sql('INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value').run(
      name,
      value,
    );
  }
}
