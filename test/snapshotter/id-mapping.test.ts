// Snapshots for containers in user namespaces: what is answered when containerd was told that the snapshotter remaps IDs,
// and that without it nothing changes.
import assert from 'node:assert/strict';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { LABEL_GID_MAPPING, LABEL_UID_MAPPING } from '../../src/snapshotter/id-mapping.ts';
import { LABEL_IMAGE_REF, LABEL_INDEX, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF } from '../../src/snapshotter/labels.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import { refused } from '../suites/snapshotter.ts';
import { FakeImages } from '../support/fake-images.ts';
import { TestService } from '../support/snapshots-service.ts';

const MAPPED = { [LABEL_UID_MAPPING]: '1:5:7,0:100000:65536', [LABEL_GID_MAPPING]: '0:200000:65536' };
const OPTIONS = ['uidmap=1:5:7,0:100000:65536', 'gidmap=0:200000:65536'];

describe('a snapshot for a user namespace', () => {
  let dir: string;
  let images: FakeImages;
  let service: TestService;
  let lazy = '';

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'mapping-'));
    images = new FakeImages(dir);
    images.rootOwner = { rootUid: 12, rootGid: 34 };
    for (const name of ['a', 'b']) await images.addLayer(digestOf(name), name);
    service = await TestService.start({ images, remapIds: true });
    for (const name of ['a', 'b']) lazy = await remote(name, lazy);
    await ordinary('one', '');
    await ordinary('two', 'one');
    await ordinary('mixed', lazy);
  });
  after(async () => {
    await service?.stop();
    await rm(dir, { recursive: true });
  });

  async function ordinary(name: string, parent: string): Promise<void> {
    await service.client.prepare(`key ${name}`, parent);
    await service.client.commit(name, `key ${name}`);
  }

  async function remote(name: string, parent: string): Promise<string> {
    const labels = {
      [LABEL_SNAPSHOT_REF]: digestOf(`chain ${name}`),
      [LABEL_LAYER_DIGEST]: digestOf(name),
      [LABEL_IMAGE_REF]: 'registry.test/app:1',
      [LABEL_INDEX]: digestOf(`index ${name}`),
    };
    await refused(service.client.prepare(`extract ${name}`, parent, labels), 'alreadyExists');
    return digestOf(`chain ${name}`);
  }

  const option = (mounts: readonly Mount[], name: string): string =>
    mounts[0]?.options.find((one) => one.startsWith(`${name}=`))?.slice(name.length + 1) ?? '';

  /** Owner of what a container writes to. */
  async function upperOwner(mounts: readonly Mount[]): Promise<number[]> {
    const { uid, gid } = await stat(option(mounts, 'upperdir'));
    return [uid, gid];
  }

  test('on a lazy image carries the mapping and the mount itself, and its root owns what is written', async () => {
    const mounts = await service.client.prepare('lazy', lazy, MAPPED);
    assert.deepEqual(
      mounts[0]?.options.filter((one) => /^[ug]idmap=/.test(one)),
      OPTIONS,
    );
    // containerd maps the directory around a single lower, without what is mounted in it.
    assert.equal(option(mounts, 'lowerdir'), `${join(dir, 'mounts/1')}/.`);
    assert.deepEqual(await upperOwner(mounts), [100_000, 200_000]);
    assert.deepEqual(await service.client.mounts('lazy'), mounts);
    await service.restart();
    assert.deepEqual(await service.client.mounts('lazy'), mounts);
  });

  test('on ordinary layers carries the mapping', async () => {
    const mounts = await service.client.prepare('ordinary', 'two', MAPPED);
    assert.ok(OPTIONS.every((one) => mounts[0]?.options.includes(one)));
    assert.equal(option(mounts, 'lowerdir').split(':').length, 2);
    assert.deepEqual(await upperOwner(mounts), [100_000, 200_000]);
    const [view] = await service.client.view('view', 'one', MAPPED);
    assert.deepEqual([view?.type, view?.options], ['bind', [...OPTIONS, 'ro', 'rbind']]);
    const [alone] = await service.client.prepare('alone', '', MAPPED);
    assert.deepEqual(alone?.options, [...OPTIONS, 'rw', 'rbind']);
  });

  test('on lazy and ordinary layers is refused, and leaves nothing', async () => {
    await refused(service.client.prepare('refused', 'mixed', MAPPED), 'unimplemented');
    await assert.rejects(service.client.view('refused', 'mixed', MAPPED), /index all of its layers/);
    await refused(service.client.stat('refused'), 'notFound');
    await service.client.prepare('fine', 'mixed');
  });

  test('is refused when its mapping cannot be one', async () => {
    const { [LABEL_UID_MAPPING]: uids = '' } = MAPPED;
    for (const gids of [undefined, '', '0:1', '0:1:x', '1:1000:5', '0:1000:0']) {
      const labels = { [LABEL_UID_MAPPING]: uids, ...(gids === undefined ? {} : { [LABEL_GID_MAPPING]: gids }) };
      await refused(service.client.prepare('bad', 'two', labels), 'invalidArgument');
    }
  });

  test('is an ordinary one while containerd was told nothing: it has made a copy with other owners', async () => {
    const plain = await TestService.start({ images });
    try {
      await plain.client.prepare('key base', '');
      await plain.client.commit('base', 'key base');
      const mounts = await plain.client.prepare('key', 'base', MAPPED);
      assert.ok(!mounts[0]?.options.some((one) => /^[ug]idmap=/.test(one)));
      assert.deepEqual(await upperOwner(mounts), [0, 0]);
    } finally {
      await plain.stop();
    }
  });
});
