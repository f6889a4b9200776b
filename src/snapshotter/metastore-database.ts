// metadata.db as a file: opens it, brings its schema up to date and reads its rows as records. What is asked of it stands in
// the classes made from this one (metastore-conversions.ts, metastore.ts); runs in the metastore's worker thread.
import { existsSync, readFileSync, renameSync } from 'node:fs';
import Database from 'better-sqlite3';
import { DedupError } from '../errors.ts';
import type { Labels } from './labels.ts';
import type { Lower } from './mounts.ts';
import type { ConversionState, DirectoryState, SnapshotKind, SnapshotRecord } from './snapshot-record.ts';

export interface Row {
  id: number;
  name: string;
  kind: SnapshotKind;
  parent: number | null;
  parent_name: string | null;
  labels: string;
  created: number;
  updated: number;
  lowers: string;
  layer_digest: string | null;
  layer_index: string | null;
  layer_scope: string | null;
  usage_bytes: number | null;
  usage_inodes: number | null;
  unpacked: number;
  boot: string | null;
  conversion: ConversionState | null;
  directory: Exclude<DirectoryState, 'unproven'> | null;
  unproven: number;
}

const SCHEMA_VERSION = 3;
/** Schema 1. */
const FIRST_SCHEMA = `
CREATE TABLE snapshots (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
  parent INTEGER REFERENCES snapshots(id),
  labels TEXT NOT NULL,
  ref TEXT,
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  lowers TEXT NOT NULL,
  layer_digest TEXT,
  layer_index TEXT,
  layer_scope TEXT,
  usage_bytes INTEGER,
  usage_inodes INTEGER
);
CREATE INDEX snapshots_parent ON snapshots(parent);
CREATE INDEX snapshots_ref ON snapshots(ref) WHERE ref IS NOT NULL;
CREATE TABLE removed (id INTEGER PRIMARY KEY);
CREATE TABLE protected_ids (up_to INTEGER NOT NULL);
CREATE TABLE sources (
  digest TEXT NOT NULL,
  host TEXT NOT NULL,
  repository TEXT NOT NULL,
  told INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (digest, host, repository)
) WITHOUT ROWID;
`;
/**
 * Schema 2: ordinary layers are converted. Of each committed snapshot without a layer of its own: whether an unpack
 * committed it (1), in which boot, and what has become of its conversion. `directory` is set while the directory of a
 * converted one is still there.
 */
const CONVERSIONS = `
ALTER TABLE snapshots ADD COLUMN unpacked INTEGER NOT NULL DEFAULT 0;
ALTER TABLE snapshots ADD COLUMN boot TEXT;
ALTER TABLE snapshots ADD COLUMN conversion TEXT CHECK (conversion IN ('pending', 'left', 'done'));
ALTER TABLE snapshots ADD COLUMN left_because TEXT;
ALTER TABLE snapshots ADD COLUMN directory TEXT CHECK (directory IN ('waits', 'goes'));
CREATE INDEX snapshots_conversion ON snapshots(conversion, id) WHERE conversion IS NOT NULL;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
`;
/**
 * Schema 3: no image may be possible of what was converted. `unproven` is 1 for a directory that waits and may not go before
 * the image of its chain was built.
 */
const PROOFS = `
ALTER TABLE snapshots ADD COLUMN unproven INTEGER NOT NULL DEFAULT 0;
UPDATE snapshots SET unproven = 1 WHERE directory = 'waits';
`;
export const SELECT = 'SELECT s.*, p.name AS parent_name FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent';

export function record(row: Row): SnapshotRecord {
  return {
    id: row.id,
    name: row.name,
    kind: row.kind,
    parentId: row.parent ?? undefined,
    parent: row.parent_name ?? '',
    labels: JSON.parse(row.labels) as Labels,
    createdMs: row.created,
    updatedMs: row.updated,
    lowers: JSON.parse(row.lowers) as Lower[],
    layer:
      row.layer_digest === null
        ? undefined
        : { digest: row.layer_digest, index: row.layer_index ?? '', scope: row.layer_scope ?? '' },
    usage: row.usage_bytes === null ? undefined : { bytes: row.usage_bytes, inodes: row.usage_inodes ?? 0 },
    origin: row.boot === null ? undefined : { unpacked: row.unpacked === 1, boot: row.boot },
    conversion: row.conversion ?? undefined,
    directory: row.unproven === 1 && row.directory === 'waits' ? 'unproven' : (row.directory ?? undefined),
  };
}

/** The kernel's name for the time since it was started; another one after every boot (proc(5), random/boot_id). */
export function currentBoot(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
}

/** Opens the file if SQLite finds no fault in it, else a new one in its place. Errors: those of SQLite and node:fs. */
function openSound(file: string): Database.Database {
  let db: Database.Database | undefined;
  try {
    db = new Database(file);
    if (db.pragma('quick_check(1)', { simple: true }) === 'ok') return db;
  } catch (error) {
    const code = (error as { code?: unknown }).code;
    if (code !== 'SQLITE_NOTADB' && !String(code).startsWith('SQLITE_CORRUPT')) throw error;
  }
  db?.close();
  const aside = `${file}.damaged-${Date.now()}`;
  for (const suffix of ['', '-wal', '-shm']) {
    if (existsSync(file + suffix)) renameSync(file + suffix, aside + suffix);
  }
  return new Database(file);
}

/** The open file. Not for use outside the metastore. */
export class MetastoreDatabase {
  protected readonly db: Database.Database;
  /** The boot that commits are made in. */
  protected readonly boot: string;
  readonly #statements = new Map<string, Database.Statement>();

  /**
   * Opens or makes the database, and brings an older one up to date. One that is damaged is moved aside, and a new one made:
   * restore() fills it again. Errors: STORE_CORRUPT when it was written by a newer version.
   */
  constructor(file: string, boot: string = currentBoot()) {
    this.boot = boot;
    this.db = openSound(file);
    this.db.pragma('journal_mode = WAL');
    this.db.pragma('synchronous = NORMAL');
    this.db.pragma('foreign_keys = ON');
    const version = this.db.pragma('user_version', { simple: true }) as number;
    if (version > SCHEMA_VERSION) {
      this.db.close();
      throw new DedupError('STORE_CORRUPT', `${file} has schema ${version}; this program knows ${SCHEMA_VERSION}`, {
        hint: 'run the version that wrote it',
      });
    }
    if (version < SCHEMA_VERSION) this.db.transaction(() => this.#migrate(version))();
  }

  #migrate(version: number): void {
    if (version < 1) this.db.exec(FIRST_SCHEMA);
    if (version < 2) {
      this.db.exec(CONVERSIONS);
      // Who committed them, and when, was not written down: as if by hand, in this boot.
      this.db
        .prepare(
          "UPDATE snapshots SET conversion = 'pending', boot = ? WHERE kind = 'committed' AND layer_digest IS NULL",
        )
        .run(this.boot);
    }
    this.db.exec(PROOFS);
    this.db.pragma(`user_version = ${SCHEMA_VERSION}`);
  }

  protected sql(text: string): Database.Statement {
    let statement = this.#statements.get(text);
    if (statement === undefined) {
      statement = this.db.prepare(text);
      this.#statements.set(text, statement);
    }
    return statement;
  }

  protected rows(text: string, ...args: unknown[]): SnapshotRecord[] {
    return (this.sql(text).all(...args) as Row[]).map(record);
  }

  /** Undefined when there is no snapshot of that number. */
  byId(id: number): SnapshotRecord | undefined {
    return this.rows(`${SELECT} WHERE s.id = ?`, id)[0];
  }

  close(): void {
    this.db.close();
  }
}
