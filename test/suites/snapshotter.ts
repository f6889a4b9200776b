// What every snapshotter that containerd can use must do, asked through the snapshots service: the keys' life, what is
// refused and how, labels, lists, usage, and the trees one sees through the mounts. Run against ours and, as the
// yardstick, against containerd's own overlayfs.
import assert from 'node:assert/strict';
import { chown, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, unlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { GrpcStatus } from '../../src/errors.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import { run, unmountBelow } from '../support/containerd.ts';
import type { SnapshotsClient } from '../support/snapshots-service.ts';

export interface SnapshotterUnderTest {
  readonly client: SnapshotsClient;
  stop(): Promise<void>;
}

const VIEW = 1;
const ACTIVE = 2;
const COMMITTED = 3;

/** Asserts that a call ends with this gRPC status. */
export async function refused(
  call: Promise<unknown>,
  status: keyof typeof GrpcStatus,
  details = /(?:)/,
): Promise<void> {
  await assert.rejects(call, (error: { code?: number; details?: string }) => {
    assert.equal(error.code, GrpcStatus[status], `expected ${status}: ${error.details}`);
    assert.match(error.details ?? '', details);
    return true;
  });
}

export function snapshotterSuite(name: string, start: () => Promise<SnapshotterUnderTest>): void {
  describe(name, () => {
    let under: SnapshotterUnderTest;
    let client: SnapshotsClient;
    let dir: string;
    let counter = 0;
    const fresh = (what: string) => `${what}-${++counter}`;

    before(async () => {
      dir = await mkdtemp(join(tmpdir(), 'suite-'));
      under = await start();
      client = under.client;
    });
    after(async () => {
      await unmountBelow(dir);
      await under?.stop();
      await rm(dir, { recursive: true });
    });

    async function inside<T>(mounts: readonly Mount[], work: (root: string) => Promise<T>): Promise<T> {
      const root = join(dir, fresh('mount'));
      await mkdir(root);
      for (const { type, source, options } of mounts) {
        await run('mount', [...(type === 'bind' ? [] : ['-t', type]), '-o', options.join(','), source, root]);
      }
      try {
        return await work(root);
      } finally {
        await run('umount', [root]);
      }
    }

    /** Commits what `change` does on top of `parent` and answers the name. */
    async function layer(parent: string, change: (root: string) => Promise<void> = async () => {}): Promise<string> {
      const key = fresh('key');
      const committed = fresh('layer');
      await inside(await client.prepare(key, parent), change);
      await client.commit(committed, key);
      return committed;
    }

    test('a key is active, then committed under its name, with its parent and times', async () => {
      const base = await layer('');
      const key = fresh('key');
      const beforeMs = Date.now();
      await client.prepare(key, base);
      const active = await client.stat(key);
      assert.deepEqual([active.name, active.parent, active.kind], [key, base, ACTIVE]);
      assert.ok(Math.abs(active.created_at.seconds * 1000 - beforeMs) < 5000);
      const committed = fresh('layer');
      await client.commit(committed, key);
      const info = await client.stat(committed);
      assert.deepEqual([info.name, info.parent, info.kind], [committed, base, COMMITTED]);
      await refused(client.stat(key), 'notFound');
      await client.prepare(key, committed);
      assert.equal((await client.stat(key)).parent, committed);
    });

    test('a key that exists is not made again', async () => {
      const key = fresh('key');
      await client.prepare(key);
      await refused(client.prepare(key), 'alreadyExists');
      await refused(client.view(key), 'alreadyExists');
    });

    test('the parent must exist and be committed', async () => {
      const key = fresh('key');
      await client.prepare(key);
      await refused(client.prepare(fresh('key'), 'nowhere'), 'notFound');
      await refused(client.view(fresh('key'), 'nowhere'), 'notFound');
      await refused(client.prepare(fresh('key'), key), 'invalidArgument');
      await refused(client.view(fresh('key'), key), 'invalidArgument');
    });

    test('only active keys are committed, under a free name', async () => {
      const base = await layer('');
      const view = fresh('view');
      const key = fresh('key');
      await client.view(view, base);
      await client.prepare(key, base);
      await refused(client.commit(fresh('layer'), view), 'failedPrecondition');
      await refused(client.commit(fresh('layer'), 'nowhere'), 'notFound');
      await refused(client.commit(base, key), 'alreadyExists');
      assert.equal((await client.stat(view)).kind, VIEW);
    });

    test('what has children is not removed, what has none is gone at once', async () => {
      const base = await layer('');
      const top = await layer(base);
      const key = fresh('key');
      await client.prepare(key, top);
      await refused(client.remove(base), 'failedPrecondition');
      await refused(client.remove(top), 'failedPrecondition');
      await client.remove(key);
      await client.remove(top);
      await refused(client.stat(top), 'notFound');
      await refused(client.remove(top), 'notFound');
      await refused(client.mounts(key), 'notFound');
    });

    test('files are added, changed, renamed and deleted from layer to layer', async () => {
      const base = await layer('', async (root) => {
        await mkdir(join(root, 'd'));
        for (const file of ['same', 'changed', 'gone', 'd/old']) await writeFile(join(root, file), `${file} 1`);
      });
      const top = await layer(base, async (root) => {
        await writeFile(join(root, 'changed'), 'changed 2');
        await unlink(join(root, 'gone'));
        await rename(join(root, 'd/old'), join(root, 'd/new'));
      });
      await inside(await client.prepare(fresh('key'), top), async (root) => {
        assert.deepEqual((await readdir(root)).sort(), ['changed', 'd', 'same']);
        assert.deepEqual(await readdir(join(root, 'd')), ['new']);
        assert.equal(await readFile(join(root, 'same'), 'utf8'), 'same 1');
        assert.equal(await readFile(join(root, 'changed'), 'utf8'), 'changed 2');
        assert.equal(await readFile(join(root, 'd/new'), 'utf8'), 'd/old 1');
      });
      await inside(await client.view(fresh('view'), base), async (root) => {
        assert.equal(await readFile(join(root, 'changed'), 'utf8'), 'changed 1');
      });
    });

    test('a directory deleted and made again hides what was in it below', async () => {
      const base = await layer('', async (root) => {
        await mkdir(join(root, 'd'));
        await writeFile(join(root, 'd/hidden'), '');
      });
      const top = await layer(base, async (root) => {
        await rm(join(root, 'd'), { recursive: true });
        await mkdir(join(root, 'd'));
        await writeFile(join(root, 'd/shown'), '');
      });
      await inside(await client.view(fresh('view'), top), async (root) => {
        assert.deepEqual(await readdir(join(root, 'd')), ['shown']);
      });
    });

    test('views of none, one and several layers are read-only', async () => {
      const base = await layer('', (root) => writeFile(join(root, 'file'), ''));
      const top = await layer(base, (root) => writeFile(join(root, 'other'), ''));
      for (const parent of ['', base, top]) {
        await inside(await client.view(fresh('view'), parent), async (root) => {
          await assert.rejects(writeFile(join(root, 'new'), ''), { code: 'EROFS' });
        });
      }
    });

    test('the mounts of a key stay the same for its life; a committed snapshot has none', async () => {
      const base = await layer('', (root) => writeFile(join(root, 'file'), ''));
      const top = await layer(base);
      const key = fresh('key');
      const mounts = await client.prepare(key, top);
      await layer(top);
      await client.update(top, { changed: 'yes' });
      assert.deepEqual(await client.mounts(key), mounts);
      await inside(mounts, (root) => writeFile(join(root, 'mine'), ''));
      await inside(await client.mounts(key), async (root) => {
        assert.deepEqual((await readdir(root)).sort(), ['file', 'mine']);
      });
      await assert.rejects(client.mounts(top), /snapshot/);
    });

    test('the root is 0755 and keeps the owner given to it in a lower layer', async () => {
      const base = await layer('', (root) => chown(root, 1234, 2345));
      await inside(await client.prepare(fresh('key'), base), async (root) => {
        const { uid, gid, mode } = await stat(root);
        assert.deepEqual([uid, gid, mode & 0o7777], [1234, 2345, 0o755]);
      });
    });

    test('128 layers are mounted', async () => {
      let top = '';
      for (let number = 0; number < 128; number++) {
        const key = fresh('key');
        const mounts = await client.prepare(key, top);
        const upper = mounts[0]?.options.find((option) => option.startsWith('upperdir='))?.slice('upperdir='.length);
        await writeFile(join(upper ?? mounts[0]?.source ?? '', `layer-${number}`), '');
        top = fresh('layer');
        await client.commit(top, key);
      }
      const [mount] = await client.prepare(fresh('key'), top);
      // The option string must fit a page: directories are given relative to their common prefix, as containerd does.
      const lowers = mount?.options.find((option) => option.startsWith('lowerdir=')) ?? '';
      const paths = lowers.slice('lowerdir='.length).split(':');
      assert.equal(paths.length, 128);
      const prefix = `${paths[0]?.split('/').slice(0, -2).join('/')}/`;
      assert.ok(paths.every((path) => path.startsWith(prefix)));
      const short = mount?.options.map((option) => option.replaceAll(prefix, ''));
      const root = join(dir, fresh('mount'));
      await mkdir(root);
      await run('mount', ['-t', 'overlay', '-o', short?.join(',') ?? '', 'overlay', root], { cwd: prefix });
      assert.equal((await readdir(root)).length, 128);
      await run('umount', [root]);
    });

    test('labels are kept, replaced by Commit and changed by field mask', async () => {
      const key = fresh('key');
      const committed = fresh('layer');
      await client.prepare(key, '', { 'containerd.io/gc.root': 'x', one: '1' });
      assert.deepEqual((await client.stat(key)).labels, { 'containerd.io/gc.root': 'x', one: '1' });
      await client.commit(committed, key, { 'containerd.io/gc.root': 'y' });
      assert.deepEqual((await client.stat(committed)).labels, { 'containerd.io/gc.root': 'y' });
      assert.deepEqual((await client.update(committed, { a: '1', b: '2' })).labels, { a: '1', b: '2' });
      assert.deepEqual((await client.update(committed, { b: '3', c: '4' }, ['labels.b'])).labels, { a: '1', b: '3' });
      assert.deepEqual((await client.update(committed, { c: '5' }, ['labels'])).labels, { c: '5' });
      const changed = await client.update(committed, { 'a.b/c': '6' }, ['labels.a.b/c']);
      assert.deepEqual(changed.labels, { c: '5', 'a.b/c': '6' });
      await refused(client.update(committed, {}, ['parent']), 'invalidArgument');
      await refused(client.update('nowhere', {}), 'notFound');
      const info = await client.stat(committed);
      assert.deepEqual(info.labels, changed.labels);
      const time = ({ seconds, nanos }: { seconds: number; nanos: number }) => seconds + nanos / 1e9;
      assert.ok(time(info.updated_at) > time(info.created_at));
    });

    test('a list is filtered by name, parent, kind and labels', async () => {
      const base = await layer('');
      const mark = fresh('mark');
      const key = fresh('key');
      await client.prepare(key, base, { mark, 'containerd.io/snapshot.ref': 'sha256:0123' });
      const other = fresh('view');
      await client.view(other, base, { mark });
      const both = [key, other].sort();
      const names = async (...filters: string[]) => (await client.names(...filters)).sort();
      assert.deepEqual(await names(`labels.mark==${mark}`), both);
      assert.deepEqual(await names(`labels.mark==${mark},kind==view`), [other]);
      assert.deepEqual(await names(`labels.mark=="${mark}",kind!=view`), [key]);
      assert.deepEqual(await names(`name==${key}`, `name==${other}`), both);
      assert.deepEqual(await names(`name~=^${key}$`), [key]);
      assert.deepEqual(await names(`name~=/${key.slice(1)}$/,labels.mark`), [key]);
      assert.deepEqual(await names(`labels."containerd.io/snapshot.ref"==sha256:0123,parent=="${base}"`), [key]);
      assert.deepEqual(await names(`labels."containerd.io/snapshot.ref"==sha256:0123,parent==""`), []);
      assert.deepEqual(await names(`labels."containerd.io/snapshot.ref",labels.mark==${mark}`), [key]);
      assert.deepEqual(await names(`name==${base},parent==""`), [base]);
      assert.deepEqual(await names(`name==${key},labels.none!=x`), [key]);
      assert.deepEqual(await names(`name==${key},unknown==x`), []);
      for (const bad of ['name==', 'name=', '==x', 'name==a b', 'labels."x', 'name==a,', 'name~=/a'])
        await assert.rejects(client.names(bad), /filter/, bad);
    });

    test('a long list comes in blocks, and Stat answers while it does', async () => {
      const mark = fresh('mark');
      for (let number = 0; number < 250; number++) await client.prepare(fresh('many'), '', { mark });
      let asked = 0;
      const blocks = await client.list([`labels.mark==${mark}`], async (block) => {
        for (const { name: key } of block.slice(0, 3)) {
          assert.equal((await client.stat(key)).name, key);
          asked++;
        }
      });
      assert.ok(blocks.every((block) => block.length <= 100));
      assert.equal(new Set(blocks.flat().map((info) => info.name)).size, 250);
      assert.ok(blocks.length >= 3 && asked === blocks.length * 3);
    });

    test('usage of an active key grows, of a committed one it stays', async () => {
      const key = fresh('key');
      const mounts = await client.prepare(key);
      const empty = await client.usage(key);
      await inside(mounts, (root) => writeFile(join(root, 'file'), Buffer.alloc(1024 * 1024, 1)));
      const full = await client.usage(key);
      assert.equal(full.inodes, empty.inodes + 1);
      assert.ok(full.size >= empty.size + 1024 * 1024 && full.size < empty.size + 1024 * 1024 + 65536);
      const committed = fresh('layer');
      await client.commit(committed, key);
      const first = await client.usage(committed);
      assert.deepEqual(first, full);
      assert.deepEqual(await client.usage(committed), first);
      await refused(client.usage('nowhere'), 'notFound');
    });

    test('keys, names and parents must not be empty', async () => {
      await assert.rejects(client.prepare(''));
      await assert.rejects(client.view(''));
      const key = fresh('key');
      await client.prepare(key);
      await assert.rejects(client.commit('', key));
      await assert.rejects(client.remove(''));
    });
  });
}
