// A lost or damaged metadata.db: it is made again from what stands beside the snapshots, and nothing is deleted that
// cannot be restored.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { openMetastore } from '../../src/snapshotter/metastore-client.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import { refused } from '../suites/snapshotter.ts';
import { FakeImages } from '../support/fake-images.ts';
import { TestService, type WireInfo } from '../support/snapshots-service.ts';

const REF = 'containerd.io/snapshot.ref';
const remoteLabels = {
  [REF]: digestOf('chain'),
  'containerd.io/snapshot/cri.layer-digest': digestOf('layer'),
  'containerd.io/snapshot/cri.image-ref': 'registry.test/app:1',
  'containerd.io/snapshot/dedup.index': digestOf('index'),
};

describe('a metadata.db that was lost', () => {
  let dir: string;
  let service: TestService;
  let images: FakeImages;

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'rebuild-'));
    images = new FakeImages(dir);
    service = await TestService.start({ images });
    await images.addLayer(digestOf('layer'), 'layer');
  });
  afterEach(async () => {
    await service.stop();
    await rm(dir, { recursive: true });
  });

  const databases = async () => (await readdir(service.paths.root)).filter((name) => name.startsWith('metadata.db'));

  async function lose(): Promise<void> {
    for (const name of await databases()) await rm(join(service.paths.root, name));
  }

  /** Snapshots of every kind, in two namespaces. */
  async function fill(): Promise<void> {
    const { client } = service;
    await refused(client.prepare('ns/1/extract', '', remoteLabels), 'alreadyExists');
    const [remote = ''] = await client.names(`labels."${REF}"==${remoteLabels[REF]}`);
    await client.prepare('ns/2/key', remote, { one: '1' });
    await client.commit('ns/3/layer', 'ns/2/key', { two: '2' });
    await client.update('ns/3/layer', { three: '3' }, ['labels.three']);
    await client.prepare('ns/4/container', 'ns/3/layer', { 'containerd.io/gc.root': 'yes' });
    await client.view('other/1/view', 'ns/3/layer');
    await client.prepare('other/2/scratch');
  }

  /** Everything a client can see, without times: those of a restored snapshot are those of its restoration. */
  async function seen(): Promise<{ infos: Omit<WireInfo, 'created_at' | 'updated_at'>[]; mounts: Mount[][] }> {
    const infos = (await service.client.list()).flat();
    const mounts: Mount[][] = [];
    for (const { name, kind } of infos) if (kind !== 3) mounts.push(await service.client.mounts(name));
    return { infos: infos.map(({ name, parent, kind, labels }) => ({ name, parent, kind, labels })), mounts };
  }

  for (const way of ['deleted', 'damaged', 'empty'] as const) {
    test(`${way}: every snapshot is there again, with parent, labels and mounts`, async () => {
      await fill();
      const before = await seen();
      await service.down();
      if (way === 'deleted') await lose();
      else {
        await rm(`${service.paths.metadataDb}-wal`, { force: true });
        const bytes = await readFile(service.paths.metadataDb);
        // The header stays in one case of damage that matters: pages that are not what they were.
        if (way === 'damaged') bytes.fill(0xa5, 4096 + 200);
        await writeFile(service.paths.metadataDb, way === 'damaged' ? bytes : '');
      }
      await service.up();
      assert.deepEqual(await seen(), before);
      assert.equal(
        (await databases()).some((name) => name.includes('damaged')),
        way === 'damaged',
      );
      // And it is a whole database: the next start finds nothing to do, keys go on.
      await service.restart();
      assert.deepEqual(await seen(), before);
      await service.client.commit('ns/9/next', 'ns/4/container');
      await refused(service.client.remove('ns/3/layer'), 'failedPrecondition');
    });
  }

  test('rebuilding that was interrupted is gone on with at the next start', async () => {
    await fill();
    const before = await seen();
    await service.down();
    await lose();
    // As a start leaves it that was killed after its first row.
    const store = await openMetastore(service.paths.metadataDb);
    await store.protect(100);
    const info = JSON.parse(await readFile(join(service.paths.snapshot(1), 'info.json'), 'utf8'));
    await store.insert(info);
    await store.close();
    await service.up();
    assert.deepEqual(await seen(), before);
  });

  test('a snapshot that cannot be restored keeps its directory; what was half made goes', async () => {
    await fill();
    await service.client.prepare('ns/5/half');
    await service.down();
    const ids = (await readdir(service.paths.snapshots)).map(Number).sort((a, b) => a - b);
    const [half = 0, damaged = 0] = [ids.at(-1), ids.at(-2)];
    await rm(join(service.paths.snapshot(half), 'info.json'));
    await writeFile(join(service.paths.snapshot(damaged), 'info.json'), '{"version":1}');
    await lose();
    await service.up();
    await service.client.cleanup();
    assert.equal(existsSync(service.paths.snapshot(damaged)), true);
    // Protected together with the one beside it: nothing is deleted while anything could not be restored.
    await service.restart();
    await service.client.cleanup();
    assert.equal(existsSync(service.paths.snapshot(damaged)), true);
    assert.equal((await service.client.names()).length, ids.length - 2);
  });

  test('what was removed before a start that restores the rest does not come back, and stays deleted', async () => {
    await fill();
    await service.client.prepare('ns/5/damaged');
    await service.down();
    const ids = (await readdir(service.paths.snapshots)).map(Number).sort((a, b) => a - b);
    await writeFile(join(service.paths.snapshot(ids.at(-1) ?? 0), 'info.json'), '{}');
    await lose();
    await service.up();
    await service.client.remove('ns/4/container');
    await service.restart();
    assert.ok(!(await service.client.names()).includes('ns/4/container'));
    await service.client.cleanup();
    await service.restart();
    assert.ok(!(await service.client.names()).includes('ns/4/container'));
  });

  test('nothing is released or dropped while a snapshot could not be restored: it may use it', async () => {
    await fill();
    await service.down();
    images.released.length = 0; // What the service did while it had its database.
    images.retained.length = 0;
    await writeFile(join(service.paths.snapshot(1), 'info.json'), '{}');
    await lose();
    await service.up();
    await service.client.cleanup();
    assert.deepEqual([images.released, images.retained], [[], []]);
  });

  test('of two snapshots for one layer the newer one is restored, with what stands on it', async () => {
    await fill();
    // The first was removed and is not cleaned up yet; the second came with the next pull.
    await service.client.remove('ns/4/container');
    await service.client.remove('other/1/view');
    await service.client.remove('ns/3/layer');
    const [first = ''] = await service.client.names(`labels."${REF}"==${remoteLabels[REF]}`);
    await service.client.remove(first);
    await refused(service.client.prepare('ns/8/extract', '', remoteLabels), 'alreadyExists');
    const [second = ''] = await service.client.names(`labels."${REF}"==${remoteLabels[REF]}`);
    assert.notEqual(second, first);
    await service.client.prepare('ns/9/container', second);
    await service.down();
    await lose();
    await service.up();
    assert.equal((await service.client.stat('ns/9/container')).parent, second);
  });

  test('labels that are changed right after the commit are those restored', async () => {
    const { client } = service;
    for (let i = 0; i < 40; i++) {
      await client.prepare(`key-${i}`);
      await client.commit(`layer-${i}`, `key-${i}`, { old: 'x'.repeat(5000) });
      await client.update(`layer-${i}`, { fresh: String(i) });
    }
    await service.down();
    await lose();
    await service.up();
    for (let i = 0; i < 40; i++) {
      assert.deepEqual((await service.client.stat(`layer-${i}`)).labels, { fresh: String(i) });
    }
  });
});
