// Opens index.db for its one writer: settings, schema, and the check that a database that was not closed is sound.
// Runs only in the worker thread.
import Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';
import { COLUMN_ADDITIONS, SCHEMA, SCHEMA_ADDITIONS, SCHEMA_VERSION } from './index-schema.ts';

/**
 * The database at `file`, made when missing. One that was not closed — after a crash, or a copy taken while it was in
 * use — is checked page by page. Errors: STORE_CORRUPT, FAILED_PRECONDITION for a newer schema.
 */
export function openSound(file: string): Database.Database {
  const db = new Database(file);
  try {
    db.pragma('journal_mode = WAL');
    db.pragma('synchronous = NORMAL');
    db.pragma('wal_autocheckpoint = 0');
    db.pragma('cache_size = -8192');
    db.pragma('foreign_keys = OFF');
    const version = db.pragma('user_version', { simple: true });
    if (version === 0) {
      db.transaction(() => {
        db.exec(SCHEMA);
        db.pragma(`user_version = ${SCHEMA_VERSION}`);
      }).immediate();
    } else if (version !== SCHEMA_VERSION) {
      throw new DedupError(
        'FAILED_PRECONDITION',
        `${file} has schema ${String(version)}, this version knows ${SCHEMA_VERSION}`,
      );
    } else if (db.prepare("SELECT value FROM meta WHERE key = 'clean'").pluck().get() !== 1) {
      const found = db.pragma('quick_check(1)', { simple: true });
      if (found !== 'ok') throw new DedupError('STORE_CORRUPT', `${file} is damaged: ${String(found)}`);
    }
    db.exec(SCHEMA_ADDITIONS);
    for (const { table, column, definition } of COLUMN_ADDITIONS) {
      const there = db.prepare('SELECT 1 FROM pragma_table_info(?) WHERE name = ?').get(table, column) !== undefined;
      if (!there) db.exec(`ALTER TABLE ${table} ADD COLUMN ${column} ${definition}`);
    }
    return db;
  } catch (error) {
    db.close();
    throw error;
  }
}
