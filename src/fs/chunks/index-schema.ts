// Schema of index.db. Owned by the worker that writes it; described for people in docs/formats/index-db.md. No code
// outside src/fs/chunks builds SQL for this database.

export const SCHEMA_VERSION = 1;

export const SCHEMA = `
CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value ANY
) STRICT, WITHOUT ROWID;

CREATE TABLE scopes (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE chunks (
  id INTEGER PRIMARY KEY,
  scope INTEGER NOT NULL REFERENCES scopes(id),
  digest BLOB NOT NULL CHECK (length(digest) = 32),
  size INTEGER NOT NULL CHECK (size > 0),
  piece_bytes INTEGER NOT NULL CHECK (piece_bytes > 0),
  ref_count INTEGER NOT NULL CHECK (ref_count >= 0),
  durable INTEGER NOT NULL DEFAULT 0,
  last_used INTEGER NOT NULL DEFAULT 0,
  address INTEGER GENERATED ALWAYS AS (id * 4096) VIRTUAL,
  UNIQUE (digest, size, scope)
) STRICT;

CREATE TABLE placements (
  block INTEGER PRIMARY KEY,
  chunk_id INTEGER NOT NULL REFERENCES chunks(id),
  durable INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX placements_by_chunk ON placements(chunk_id);

CREATE TABLE layers (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  scope INTEGER NOT NULL REFERENCES scopes(id),
  digest TEXT NOT NULL,
  size INTEGER NOT NULL,
  diff_id TEXT NOT NULL,
  index_digest TEXT NOT NULL,
  restart_digest TEXT NOT NULL,
  restart_size INTEGER NOT NULL,
  chunk_count INTEGER NOT NULL,
  contiguous INTEGER NOT NULL DEFAULT 0,
  reference TEXT NOT NULL DEFAULT '',
  trust TEXT NOT NULL DEFAULT 'annotation' CHECK (trust IN ('annotation', 'local', 'referrer')),
  verified INTEGER NOT NULL DEFAULT 0,
  condemned INTEGER NOT NULL DEFAULT 0,
  added_at INTEGER NOT NULL,
  UNIQUE (digest, index_digest, scope, contiguous)
) STRICT;

CREATE TABLE layer_chunks (
  layer_id INTEGER NOT NULL REFERENCES layers(id),
  seq INTEGER NOT NULL,
  chunk_id INTEGER NOT NULL REFERENCES chunks(id),
  placement INTEGER,
  PRIMARY KEY (layer_id, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX layer_chunks_by_chunk ON layer_chunks(chunk_id);

CREATE TABLE sources (
  layer_id INTEGER NOT NULL REFERENCES layers(id),
  host TEXT NOT NULL,
  repository TEXT NOT NULL,
  position INTEGER NOT NULL,
  PRIMARY KEY (layer_id, host, repository)
) STRICT, WITHOUT ROWID;

CREATE TABLE images (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  key TEXT NOT NULL UNIQUE,
  state TEXT NOT NULL CHECK (state IN ('building', 'ready')),
  metadata_bytes INTEGER NOT NULL DEFAULT 0,
  reference TEXT NOT NULL DEFAULT '',
  created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE image_layers (
  image_id INTEGER NOT NULL REFERENCES images(id),
  position INTEGER NOT NULL,
  layer_id INTEGER NOT NULL REFERENCES layers(id),
  PRIMARY KEY (image_id, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX image_layers_by_layer ON image_layers(layer_id);

CREATE TABLE pins (
  mount_id INTEGER NOT NULL,
  layer_id INTEGER NOT NULL REFERENCES layers(id),
  PRIMARY KEY (mount_id, layer_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX pins_by_layer ON pins(layer_id);

CREATE TABLE direct_mounts (
  mount_id INTEGER PRIMARY KEY,
  loop TEXT NOT NULL,
  metadata_path TEXT NOT NULL,
  since INTEGER NOT NULL
) STRICT;

CREATE TABLE freed (
  block INTEGER PRIMARY KEY,
  blocks INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('to-punch', 'quarantine', 'free')),
  since INTEGER NOT NULL
) STRICT;
`;

/** What the schema has gained since its first version without changing what was there: made in every file that lacks it. */
export const SCHEMA_ADDITIONS = `
CREATE INDEX IF NOT EXISTS chunks_unreferenced ON chunks(id) WHERE ref_count = 0;
CREATE INDEX IF NOT EXISTS chunks_by_use ON chunks(last_used, id) WHERE durable <> 0;
CREATE INDEX IF NOT EXISTS freed_by_size ON freed(blocks, block) WHERE state = 'free';
CREATE TABLE IF NOT EXISTS held_chunks (
  block INTEGER PRIMARY KEY,
  scope INTEGER NOT NULL REFERENCES scopes(id),
  digest BLOB NOT NULL,
  size INTEGER NOT NULL,
  piece_bytes INTEGER NOT NULL,
  durable INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS evicted (
  block INTEGER PRIMARY KEY,
  blocks INTEGER NOT NULL
) STRICT;
`;

/** Columns that tables have gained, in every file that lacks them. */
export const COLUMN_ADDITIONS = [
  { table: 'images', column: 'ahead', definition: 'INTEGER NOT NULL DEFAULT 0' },
] as const;
