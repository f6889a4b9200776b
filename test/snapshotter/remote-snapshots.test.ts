// Remote snapshots: what makes a layer one, who finds it, what lies below a container on top of it, and what happens
// while dedupd is away.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { digestOf } from '../../src/digest.ts';
import { refused } from '../suites/snapshotter.ts';
import { run, TestContainerd, unmountBelow, waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { SnapshotsClient, TestService } from '../support/snapshots-service.ts';

const REF = 'containerd.io/snapshot.ref';

function labelsOf(name: string, image = 'registry.test/app:1'): Record<string, string> {
  return {
    [REF]: digestOf(`chain ${name}`),
    'containerd.io/snapshot/cri.layer-digest': digestOf(name),
    'containerd.io/snapshot/cri.image-ref': image,
    'containerd.io/snapshot/cri.image-layers': `${digestOf(name)},${digestOf('above')}`,
    'containerd.io/snapshot/cri.manifest-digest': digestOf('manifest'),
    'containerd.io/snapshot/dedup.index': digestOf(`index ${name}`),
  };
}

describe('remote snapshots', () => {
  let dir: string;
  let images: FakeImages;
  let service: TestService;
  let lines: { msg: string; reason?: string }[];

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'remote-'));
    images = new FakeImages(dir);
    for (const name of ['a', 'b', 'c', 'd']) await images.addLayer(digestOf(name), name);
    lines = [];
    const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
    service = await TestService.start({ images, log });
  });
  afterEach(async () => {
    await unmountBelow(dir);
    await service.stop();
    await rm(dir, { recursive: true });
  });

  /** Asks for a layer on top of `parent` as containerd does and answers the snapshot found by ref and parent. */
  async function remote(name: string, parent = '', namespace = 'ns/1', image?: string): Promise<string> {
    const labels = labelsOf(name, image);
    await refused(service.client.prepare(`${namespace}/extract-${name}`, parent, labels), 'alreadyExists');
    const found = await service.client.names(`labels."${REF}"==${labels[REF]},parent=="${parent}"`);
    assert.equal(found.length, 1);
    return found[0] ?? '';
  }

  async function ordinary(name: string, parent: string): Promise<string> {
    const mounts = await service.client.prepare(`key ${name}`, parent);
    const upper = mounts[0]?.options.find((option) => option.startsWith('upperdir='))?.slice('upperdir='.length);
    await writeFile(join(upper ?? mounts[0]?.source ?? '', name), '');
    await service.client.commit(name, `key ${name}`);
    return name;
  }

  test('a caller that goes away during its Prepare leaves no snapshot behind, remote or not', async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const prepareLayer = images.prepareLayer.bind(images);
    images.prepareLayer = async (args) => {
      const answer = await prepareLayer(args);
      await promise;
      return answer;
    };
    const gone = new AbortController();
    const calls: Promise<unknown>[] = [];
    for (const name of ['a', 'unknown']) {
      const call = service.client.prepare(`ns/1/extract-${name}`, '', labelsOf(name), gone.signal);
      call.catch(() => undefined);
      calls.push(call);
      await waitFor('the call', () => images.prepared.some(({ layer }) => layer.digest === digestOf(name)));
    }
    gone.abort();
    for (const call of calls) await assert.rejects(call, { code: 1 });
    await sleep(50); // The service hears of it a moment later.
    resolve();
    await service.client.cleanup(); // After everything that was prepared meanwhile.
    assert.deepEqual(await service.client.names(), []);
    assert.deepEqual(await readdir(service.paths.snapshots), []);
  });

  test('a layer that can be loaded lazily is answered AlreadyExists and found by ref and parent', async () => {
    const name = await remote('a');
    assert.equal(name, `ns/1/${labelsOf('a')[REF]}`);
    const info = await service.client.stat(name);
    assert.deepEqual([info.kind, info.parent, info.labels], [3, '', labelsOf('a')]);
    const [asked] = images.prepared;
    assert.deepEqual(asked?.layer, { digest: digestOf('a'), index: digestOf('index a'), scope: '' });
    assert.deepEqual(asked?.sources, [{ host: 'registry.test', repository: 'app' }]);
    assert.equal(asked?.manifest, digestOf('manifest'));
    assert.deepEqual(
      asked?.siblings.map(({ digest }) => digest),
      [digestOf('a'), digestOf('above')],
    );
    await refused(service.client.stat('ns/1/extract-a'), 'notFound');
  });

  test('a second namespace adopts the snapshot of the first, and its source is kept', async () => {
    const name = await remote('a');
    assert.equal(await remote('a', '', 'other/7', 'mirror.test/copy:2'), name);
    const known = [
      { host: 'mirror.test', repository: 'copy' },
      { host: 'registry.test', repository: 'app' },
    ];
    assert.deepEqual(await service.metastore.sources(digestOf('a')), known);
    assert.deepEqual(images.prepared.at(-1)?.sources, [known[0]]);
    // The same layer on another parent is asked for from every source it ever had.
    await remote('a', await remote('b'), 'ns/1', 'third.test/x:3');
    assert.deepEqual(images.prepared.at(-1)?.sources, [{ host: 'third.test', repository: 'x' }, ...known]);
  });

  test('a source that dedupd could not be told of is told at the next Cleanup', async () => {
    await remote('a');
    images.down = true;
    await remote('a', '', 'other/7', 'mirror.test/copy:2');
    images.down = false;
    await service.client.cleanup();
    assert.deepEqual(images.prepared.at(-1)?.sources, [{ host: 'mirror.test', repository: 'copy' }]);
    assert.deepEqual(await service.metastore.untoldSources(), []);
  });

  test('ref and parent survive label updates, and a normally committed layer keeps its ref', async () => {
    const name = await remote('a');
    await service.client.update(name, { x: 'y' });
    assert.deepEqual((await service.client.stat(name)).labels, { x: 'y', [REF]: labelsOf('a')[REF] });
    const labels = { [REF]: 'sha256:normal' };
    await service.client.prepare('key', name, labels);
    await service.client.commit('normal', 'key', {});
    assert.deepEqual((await service.client.stat('normal')).labels, labels);
    await refused(service.client.prepare('again', name, labels), 'alreadyExists');
    assert.deepEqual(await service.client.names(`labels."${REF}"==sha256:normal,parent=="${name}"`), ['normal']);
  });

  test('a layer that cannot be loaded lazily is prepared normally, with the reason logged once', async () => {
    for (const key of ['one', 'two']) {
      const mounts = await service.client.prepare(key, '', labelsOf('unknown'));
      assert.deepEqual(mounts[0]?.options, ['rw', 'rbind']);
    }
    const { 'containerd.io/snapshot/cri.image-ref': _, ...noReference } = labelsOf('a');
    assert.equal((await service.client.prepare('three', '', noReference)).length, 1);
    images.down = true;
    assert.equal((await service.client.prepare('four', '', labelsOf('b'))).length, 1);
    const reasons = lines.flatMap(({ reason }) => reason ?? []);
    assert.deepEqual(reasons, [
      'no index is known',
      'the client sends no image reference with the layer',
      'the fake is down (UNAVAILABLE)',
    ]);
  });

  test('consecutive lazy layers are one lower directory, normal layers their own', async () => {
    const b = await remote('b', await remote('a'));
    const d = await remote('d', await remote('c', await ordinary('middle', b)));
    const top = await ordinary('top', d);
    images.mounted.length = 0;
    const [mount] = await service.client.prepare('key', top);
    assert.deepEqual(images.mounted, [
      { layers: [digestOf('c'), digestOf('d')], bottom: false },
      { layers: [digestOf('a'), digestOf('b')], bottom: true },
    ]);
    const said = images.below
      .slice(-2)
      .map((lowers) =>
        lowers.map((lower) =>
          lower.kind === 'directory'
            ? existsSync(join(lower.path, 'middle'))
            : lower.layers.map(({ digest }) => digest),
        ),
      );
    assert.deepEqual(said, [[true, [digestOf('a'), digestOf('b')]], []]);
    const root = join(dir, 'merged');
    await mkdir(root);
    await run('mount', ['-t', 'overlay', '-o', mount?.options.join(',') ?? '', 'overlay', root]);
    assert.deepEqual((await readdir(root)).sort(), ['a', 'b', 'c', 'd', 'middle', 'top']);
    for (const option of ['index=off', 'metacopy=off', 'redirect_dir=off']) {
      assert.ok(mount?.options.includes(option), option);
    }
  });

  test('a view of lazy layers is a read-only bind of their merged image', async () => {
    const b = await remote('b', await remote('a'));
    const mounts = await service.client.view('view', b);
    assert.deepEqual(mounts, [{ type: 'bind', source: join(dir, 'mounts/1'), target: '', options: ['ro', 'rbind'] }]);
  });

  test('after a restart Mounts asks for the same lower set again', async () => {
    const top = await remote('b', await ordinary('middle', await remote('a')));
    const mounts = await service.client.prepare('key', top);
    const below = images.below.slice(-2);
    await service.restart();
    images.mounted.length = 0;
    assert.deepEqual(await service.client.mounts('key'), mounts);
    assert.deepEqual(images.mounted, [
      { layers: [digestOf('b')], bottom: false },
      { layers: [digestOf('a')], bottom: true },
    ]);
    assert.deepEqual(images.below.slice(-2), below);
  });

  test('Cleanup names what is in use, and not what was removed', async () => {
    const b = await remote('b', await remote('a'));
    await service.client.prepare('key', b);
    await service.client.view('view', b);
    await service.client.cleanup();
    assert.deepEqual(images.released.at(-1), [1]);
    assert.deepEqual(images.retained.at(-1), [digestOf('a'), digestOf('b')].sort());
    for (const name of ['key', 'view', b]) await service.client.remove(name);
    await service.client.cleanup();
    assert.deepEqual(images.released.at(-1), []);
    assert.deepEqual(images.retained.at(-1), [digestOf('a')]);
    assert.equal((await readdir(service.paths.snapshots)).length, 1);
    assert.deepEqual(await service.metastore.sources(digestOf('b')), []);
  });

  test('Cleanup does not release an image that a Prepare under way has just had mounted', async () => {
    const a = await remote('a');
    const { promise: mounted, resolve: isMounted } = Promise.withResolvers<void>();
    const { promise: goOn, resolve: letGo } = Promise.withResolvers<void>();
    images.afterMount = () => {
      isMounted();
      return goOn;
    };
    const prepared = service.client.prepare('key', a);
    await mounted;
    const cleaned = service.client.cleanup();
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.deepEqual(images.released, []);
    letGo();
    await Promise.all([prepared, cleaned]);
    assert.deepEqual(images.released, [[1]]);
  });

  test('without dedupd ordinary layers work and lazy ones answer Unavailable', async () => {
    const a = await remote('a');
    const key = await service.client.prepare('key', a);
    images.down = true;
    assert.equal((await service.client.prepare('plain')).length, 1);
    await refused(service.client.prepare('more', a), 'unavailable');
    await refused(service.client.mounts('key'), 'unavailable');
    await refused(service.client.usage(a), 'unavailable');
    await service.client.remove('plain');
    await service.client.cleanup();
    images.down = false;
    assert.deepEqual(await service.client.mounts('key'), key);
    assert.equal((await service.client.stat(a)).kind, 3);
  });

  test('the root above a lazy layer has the owner dedupd tells', async () => {
    images.rootOwner = { rootUid: 1234, rootGid: 2345 };
    await service.client.prepare('key', await remote('a'));
    const { uid, gid } = await stat(service.paths.snapshotFs(2));
    assert.deepEqual([uid, gid], [1234, 2345]);
  });

  test('the usage of a lazy layer is asked once', async () => {
    const a = await remote('a');
    assert.deepEqual(await service.client.usage(a), { size: 12345, inodes: 6 });
    images.down = true;
    assert.deepEqual(await service.client.usage(a), { size: 12345, inodes: 6 });
  });

  test('many clients that ask for one layer at once get one snapshot', async () => {
    const asked = Array.from({ length: 20 }, (_, number) =>
      refused(service.client.prepare(`ns/1/extract-${number}`, '', labelsOf('a')), 'alreadyExists'),
    );
    await Promise.all(asked);
    assert.equal((await service.client.names()).length, 1);
    assert.equal((await readdir(service.paths.snapshots)).length, 1);
  });

  test('a restart deletes half-made directories and keeps the rest', async () => {
    const a = await remote('a');
    await service.client.prepare('key', a);
    await service.down();
    await mkdir(join(service.paths.snapshot(99), 'fs'), { recursive: true });
    await writeFile(join(service.paths.snapshotFs(99), 'half'), '');
    await service.up();
    await service.client.cleanup();
    assert.deepEqual((await readdir(service.paths.snapshots)).sort(), ['1', '2']);
    assert.deepEqual((await service.client.names()).sort(), [a, 'key'].sort());
    const info = JSON.parse(await readFile(join(service.paths.snapshot(1), 'info.json'), 'utf8'));
    assert.deepEqual([info.name, info.kind, info.layer.digest], [a, 'committed', digestOf('a')]);
    await service.client.prepare('next');
    assert.ok(existsSync(service.paths.snapshotFs(100)));
  });

  test('a half-made directory with something mounted in it stays until that has gone, and so does what is mounted', async () => {
    await service.down();
    const fs = service.paths.snapshotFs(99);
    await mkdir(fs, { recursive: true });
    await run('mount', ['-t', 'tmpfs', 'orphan-test', fs]);
    try {
      await writeFile(join(fs, 'in-use'), 'kept');
      await service.up();
      await assert.rejects(service.client.cleanup(), /could not be deleted/);
      assert.equal(await readFile(join(fs, 'in-use'), 'utf8'), 'kept');
    } finally {
      await run('umount', [fs]);
    }
    await service.client.cleanup();
    assert.deepEqual(await readdir(service.paths.snapshots), []);
  });

  test('a half-written description goes at the start, and a lost directory without content of its own comes back', async () => {
    const a = await remote('a');
    await service.client.view('look', a);
    await service.client.prepare('key', a);
    await service.down();
    await writeFile(join(service.paths.snapshot(3), 'info.json.new'), '{"vers');
    for (const id of [1, 2]) await rm(service.paths.snapshot(id), { recursive: true });
    await service.up();
    assert.deepEqual((await readdir(service.paths.snapshot(3))).sort(), ['fs', 'info.json', 'work']);
    assert.deepEqual((await service.client.names()).sort(), [a, 'key', 'look'].sort());
    const described = async (id: number) =>
      JSON.parse(await readFile(join(service.paths.snapshot(id), 'info.json'), 'utf8')).name;
    assert.deepEqual([await described(1), await described(2)], [a, 'look']);
    assert.equal((await service.client.mounts('look')).length, 1);
  });

  test('a lost directory with content of its own is told, and its snapshot can be removed', async () => {
    await service.client.prepare('key');
    await service.down();
    await rm(service.paths.snapshot(1), { recursive: true });
    await service.up();
    assert.ok(lines.some(({ msg }) => /directory of a snapshot is gone/.test(msg)));
    assert.equal(existsSync(service.paths.snapshot(1)), false);
    await service.client.remove('key');
    await service.client.cleanup();
    assert.deepEqual(await service.client.names(), []);
  });

  test('an empty database beside described snapshots deletes nothing', async () => {
    await ordinary('precious', '');
    await service.down();
    for (const suffix of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + suffix, { force: true });
    await service.up();
    await service.client.prepare('new');
    await service.restart();
    await service.client.cleanup();
    assert.ok(existsSync(join(service.paths.snapshotFs(1), 'precious')));
    assert.ok(lines.some(({ msg }) => /is made again/.test(msg)));
  });

  test('containerd takes the remote snapshot into both of two namespaces', async () => {
    const containerd = await TestContainerd.start({ proxies: { dedup: service.address } });
    try {
      const refs = { a: labelsOf('a')[REF] ?? '', b: labelsOf('b')[REF] ?? '' };
      for (const namespace of [containerd.namespace, `${containerd.namespace}-b`]) {
        await containerd.ctr(['leases', 'create', '--id', 'pull'], { namespace });
        const client = new SnapshotsClient(containerd.address, { snapshotter: 'dedup', namespace, lease: 'pull' });
        await refused(client.prepare('extract-1', '', labelsOf('a')), 'alreadyExists');
        await refused(client.prepare('extract-2', refs.a, labelsOf('b')), 'alreadyExists');
        assert.deepEqual([(await client.stat(refs.b)).kind, (await client.stat(refs.b)).parent], [3, refs.a]);
        const [mount] = await client.prepare('container', refs.b);
        assert.match(mount?.options.join() ?? '', /lowerdir=[^:]*\/mounts\/1/);
        client.close();
      }
      await containerd.gc();
      assert.equal((await service.client.names('kind==committed')).length, 2);
      for (const namespace of [containerd.namespace, `${containerd.namespace}-b`]) {
        await containerd.ctr(['leases', 'rm', '--sync', 'pull'], { namespace });
      }
      await containerd.gc();
      assert.deepEqual(await service.client.names(), []);
      assert.deepEqual(await readdir(service.paths.snapshots), []);
    } finally {
      await containerd.stop();
    }
  });
});
