// The settings that index.db has of itself, in its table `meta`. Runs in the writer's worker thread.
import type Database from 'better-sqlite3';
import { DedupError } from '../../errors.ts';

export class Settings {
  readonly #db: Database.Database;

  constructor(db: Database.Database) {
    this.#db = db;
  }

  get(key: string): unknown {
    return this.#db.prepare('SELECT value FROM meta WHERE key = ?').pluck().get(key);
  }

  /** Errors: STORE_CORRUPT when it is not there. */
  number(key: string): number {
    const value = this.get(key);
    if (typeof value !== 'number') throw new DedupError('STORE_CORRUPT', `index.db has no ${key}`);
    return value;
  }

  set(key: string, value: string | number): void {
    this.#db
      .prepare('INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value')
      .run(key, value);
  }
}
