// metadata.db by itself: what was answered is there after a kill; trees of odd names are measured and deleted.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { link, lstat, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import Database from 'better-sqlite3';
import { deleteTree, diskUsage } from '../../src/snapshotter/disk-tree.ts';
import { Gate } from '../../src/snapshotter/gate.ts';
import { openMetastore } from '../../src/snapshotter/metastore-client.ts';

const CLIENT = new URL('../../src/snapshotter/metastore-client.ts', import.meta.url).href;
/** Prepares and commits for ever, telling each name once it was answered. */
const WRITER = `
const { openMetastore } = await import(${JSON.stringify(CLIENT)});
const store = await openMetastore(process.argv[1]);
for (let id = (await store.lastId()) + 1; ; id++) {
  await store.insert({ id, name: 'key-' + id, kind: 'active', parent: '', labels: { n: String(id) }, lowers: [] });
  await store.commit('key-' + id, 'name-' + id, { n: String(id) });
  process.stdout.write('name-' + id + '\\n');
}`;

/** As version 0.1.0 made it before ordinary layers were converted. */
const FIRST_SCHEMA = `
CREATE TABLE snapshots (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')), parent INTEGER REFERENCES snapshots(id),
  labels TEXT NOT NULL, ref TEXT, created INTEGER NOT NULL, updated INTEGER NOT NULL, lowers TEXT NOT NULL,
  layer_digest TEXT, layer_index TEXT, layer_scope TEXT, usage_bytes INTEGER, usage_inodes INTEGER
);
CREATE TABLE removed (id INTEGER PRIMARY KEY);
CREATE TABLE protected_ids (up_to INTEGER NOT NULL);
CREATE TABLE sources (
  digest TEXT NOT NULL, host TEXT NOT NULL, repository TEXT NOT NULL, told INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (digest, host, repository)
) WITHOUT ROWID;
`;

describe('metadata.db', () => {
  let dir: string;
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'metastore-'));
  });
  after(() => rm(dir, { recursive: true, force: true }));

  test('every commit that was answered is there after SIGKILL', async () => {
    const file = join(dir, 'killed.db');
    for (let round = 0; round < 3; round++) {
      const writer = spawn(process.execPath, ['--input-type=module', '-e', WRITER, file], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      let said = '';
      await new Promise<void>((resolve) => {
        writer.stdout.on('data', (part: Buffer) => {
          said += part.toString();
          if (said.split('\n').length > 200) writer.kill('SIGKILL');
        });
        writer.on('close', () => resolve());
      });
      const names = said.split('\n').slice(0, -1);
      assert.ok(names.length >= 200);
      const store = await openMetastore(file);
      for (const name of names) assert.equal((await store.get(name)).kind, 'committed');
      await store.close();
    }
    const db = new Database(file, { readonly: true });
    assert.equal(db.pragma('integrity_check', { simple: true }), 'ok');
    db.close();
  });

  test('numbers are never given twice', async () => {
    const store = await openMetastore(join(dir, 'numbers.db'));
    await store.insert({ id: 5, name: 'a', kind: 'active', parent: '', labels: {}, lowers: [] });
    await store.remove('a');
    assert.equal(await store.lastId(), 5);
    assert.deepEqual(await store.removedIds(), [5]);
    await store.close();
    await assert.rejects(store.ids(), { code: 'CLOSED' });
  });

  test('a database of a newer schema is refused with the reason; a file that is none is moved aside', async () => {
    const newer = join(dir, 'newer.db');
    const db = new Database(newer);
    db.pragma('user_version = 99');
    db.close();
    await assert.rejects(openMetastore(newer), { code: 'STORE_CORRUPT', message: /schema 99/ });
    const garbage = join(dir, 'garbage.db');
    await writeFile(garbage, 'this is no database'.repeat(100));
    const store = await openMetastore(garbage);
    assert.equal(await store.lastId(), 0);
    await store.close();
    const [aside = ''] = (await readdir(dir)).filter((name) => name.startsWith('garbage.db.damaged-'));
    assert.match(await readFile(join(dir, aside), 'utf8'), /^this is no database/);
  });

  test('a database of the first schema is brought up to date: its layers count as committed by hand, now', async () => {
    const file = join(dir, 'first.db');
    const old = new Database(file);
    old.exec(FIRST_SCHEMA);
    const insert = old.prepare(
      `INSERT INTO snapshots (name, kind, parent, labels, created, updated, lowers, layer_digest, usage_bytes, usage_inodes)
       VALUES (?, ?, ?, '{"a":"b"}', 1, 2, '[]', ?, ?, ?)`,
    );
    insert.run('remote', 'committed', null, 'sha256:layer', null, null);
    insert.run('ordinary', 'committed', 1, null, 5, 6);
    insert.run('key', 'active', 2, null, null, null);
    old.pragma('user_version = 1');
    old.close();
    const store = await openMetastore(file, 'boot of the migration');
    const { origin, conversion, usage, parent } = await store.get('ordinary');
    assert.deepEqual(
      { origin, conversion, usage, parent },
      {
        origin: { unpacked: false, boot: 'boot of the migration' },
        conversion: 'pending',
        usage: { bytes: 5, inodes: 6 },
        parent: 'remote',
      },
    );
    for (const name of ['remote', 'key']) {
      const other = await store.get(name);
      assert.deepEqual([other.origin, other.conversion, other.labels], [undefined, undefined, { a: 'b' }]);
    }
    assert.deepEqual(await store.pendingConversions(), []);
    await store.close();
    const later = await openMetastore(file, 'another boot');
    assert.deepEqual(await later.pendingConversions(), [{ id: 2, parentId: 1 }]);
    await later.commit('key', 'sha256:new', {});
    assert.deepEqual(await later.pendingConversions(), [{ id: 2, parentId: 1 }]);
    await later.close();
    const newest = await openMetastore(file);
    assert.deepEqual(await newest.pendingConversions(), [
      { id: 2, parentId: 1 },
      { id: 3, parentId: 2 },
    ]);
    await newest.close();
  });

  test('a tree is measured as du does and deleted, whatever its names', async () => {
    const root = join(dir, 'tree');
    await mkdir(join(root, 'sub/deep'), { recursive: true });
    await writeFile(join(root, 'file'), Buffer.alloc(100_000, 1));
    await link(join(root, 'file'), join(root, 'sub/again'));
    await symlink('/', join(root, 'sub/deep/out'));
    const odd = Buffer.concat([Buffer.from(`${root}/sub/`), Buffer.from([0xff, 0x0a, 0xfe])]);
    await mkdir(odd);
    await writeFile(Buffer.concat([odd, Buffer.from([0x2f, 0x80])]), 'x');
    const du = (flag: string) => Number(execFileSync('du', ['-s', flag, root]).toString().split('\t')[0]);
    assert.deepEqual(await diskUsage(root), { bytes: du('-B1'), inodes: du('--inodes') });
    await deleteTree(root);
    assert.ok(!existsSync(root));
    assert.ok((await lstat('/')).isDirectory());
    await deleteTree(root);
  });

  test('a gate lets many share and one be alone, and nobody who shares waits for one not yet inside', async () => {
    const gate = new Gate();
    const events: string[] = [];
    const first = Promise.withResolvers<void>();
    const alone = Promise.withResolvers<void>();
    const work =
      (name: string, until: Promise<void> = Promise.resolve()) =>
      async () => {
        events.push(`+${name}`);
        await until;
        events.push(`-${name}`);
      };
    const all: Promise<unknown>[] = [
      gate.shared(work('a', first.promise)),
      gate.exclusive(work('X', alone.promise), 5000),
      gate.shared(work('b', first.promise)),
    ];
    assert.equal(await gate.exclusive(work('Y'), 10), false);
    assert.deepEqual(events, ['+a', '+b']);
    first.resolve();
    await new Promise((tick) => setImmediate(tick));
    all.push(gate.shared(work('c')), gate.exclusive(work('Z'), 5000));
    assert.deepEqual(events, ['+a', '+b', '-a', '-b', '+X']);
    alone.resolve();
    await Promise.all(all);
    assert.deepEqual(events.slice(4), ['+X', '-X', '+c', '-c', '+Z', '-Z']);
    await assert.rejects(
      gate.exclusive(() => Promise.reject(new Error('x')), 10),
      /x/,
    );
    await gate.shared(async () => {});
  });
});
