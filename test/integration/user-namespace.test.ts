// Images in user namespaces without a copy (capability remap-ids): the mounts that our service answers, made the two ways
// in which containerd 2 makes them, and a container of runc's in a namespace of its own on top. The containerd that runs
// here is older and maps nothing by itself; it passes labels and mounts on.
import assert from 'node:assert/strict';
import { chmod, readFile, rmdir, stat, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { LABEL_GID_MAPPING, LABEL_UID_MAPPING } from '../../src/snapshotter/id-mapping.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import { run } from '../support/containerd.ts';
import type { LayerSource, TestImage } from '../support/images.ts';
import { FILE_BYTES, LazyNode, NOTHING_LEFT, noiseSum, smallLayers } from '../support/lazy-node.ts';
import { withoutIndexes } from '../support/lazy-view.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

/** Root of the namespace, seen from outside. */
const UID = 100_000;
const GID = 200_000;
const SIZE = 65_536;
const MAPPED = { [LABEL_UID_MAPPING]: `0:${UID}:${SIZE}`, [LABEL_GID_MAPPING]: `0:${GID}:${SIZE}` };

/** Which directories are mapped: each lower (containerd 2.0.0, 2.1.0), or the one around them (from 2.0.7, 2.1.5). */
type Way = 'each lower' | 'the directory around all lowers';
const WAYS: readonly Way[] = ['each lower', 'the directory around all lowers'];

/** As containerd finds it: the longest common prefix, then its parent. */
function commonDirectory(paths: readonly string[]): string {
  const [first = '', ...others] = paths;
  let length = first.length;
  for (const other of others) while (!other.startsWith(first.slice(0, length))) length--;
  return dirname(first.slice(0, length));
}

describe('a container in a user namespace', () => {
  let node: LazyNode;
  let client: SnapshotsClient;
  let program: string;
  let image: TestImage;
  let lazy: string;
  let plain: string;
  let mounted = 0;

  before(async () => {
    node = await LazyNode.start({
      config: { remap_ids: true, index_trust: ['annotation'], prefetch: { enabled: false } },
    });
    await chmod(node.containerd.dir, 0o711); // As containerd's own: who is root inside is nobody outside.
    program = join(await node.containerd.scratch('tools'), 'idmapped-mount');
    await run('cc', ['-O1', '-o', program, join(import.meta.dirname, '../support/idmapped-mount.c')]);
    const owned: LayerSource = {
      entries: [
        { name: 'secret', mode: 0o600, content: 'secret' },
        { name: 'of-user', mode: 0o600, uid: 1000, gid: 2000, content: 'user' },
      ],
    };
    ({ image, lazy, plain } = await node.publish('team/app', [...(await smallLayers('whole')), owned]));
    await node.containerd.ctr(['leases', 'create', '--id', 'kept']);
    const { address, namespace } = node.containerd;
    client = new SnapshotsClient(address, { snapshotter: 'dedup', namespace, lease: 'kept' });
  });
  after(async () => {
    client?.close();
    await node?.stop();
  });

  /** Mounts an answered overlay as containerd's mount package does; answers where. */
  async function mountMapped(mounts: readonly Mount[], way: Way): Promise<string> {
    const [mount] = mounts;
    assert.equal(mounts.length, 1);
    assert.equal(mount?.type, 'overlay');
    const options = mount?.options ?? [];
    assert.ok(options.includes(`uidmap=${MAPPED[LABEL_UID_MAPPING]}`) && options.includes(`gidmap=0:${GID}:${SIZE}`));
    const lowers = (options.find((one) => one.startsWith('lowerdir=')) ?? '').slice('lowerdir='.length).split(':');
    const around = commonDirectory(lowers);
    const sources = way === 'each lower' ? lowers : [around];
    const clones: string[] = [];
    const target = await node.containerd.scratch(`mapped-${++mounted}`);
    try {
      for (const source of sources) {
        const clone = await node.containerd.scratch(`clone-${mounted}-${clones.length}`);
        clones.push(clone);
        await run(program, [`${UID}`, `${GID}`, `${SIZE}`, source, clone]);
      }
      const mapped =
        way === 'each lower' ? clones : lowers.map((lower) => join(clones[0]!, lower.slice(around.length)));
      const others = options.filter((one) => !/^([ug]idmap|lowerdir)=/.test(one));
      await run('mount', [
        '-t',
        'overlay',
        '-o',
        [...others, `lowerdir=${mapped.join(':')}`].join(','),
        'overlay',
        target,
      ]);
    } finally {
      for (const clone of clones) {
        await run('umount', [clone], { allowFailure: true });
        await rmdir(clone);
      }
    }
    return target;
  }

  async function owner(path: string): Promise<number[]> {
    const { uid, gid } = await stat(path);
    return [uid, gid];
  }

  /** Runs a script as root of a user namespace on this root directory. */
  async function runInNamespace(root: string, script: string): Promise<string> {
    const bundle = await node.containerd.scratch(`bundle-${mounted}`);
    await run('runc', ['spec', '--bundle', bundle]);
    const file = join(bundle, 'config.json');
    const spec = JSON.parse(await readFile(file, 'utf8')) as {
      process: { terminal: boolean; args: string[] };
      root: { path: string; readonly: boolean };
      linux: { namespaces: { type: string }[] } & Record<string, unknown>;
    };
    spec.process = { ...spec.process, terminal: false, args: ['/bin/sh', '-c', script] };
    spec.root = { path: root, readonly: false };
    spec.linux.namespaces.push({ type: 'user' });
    const mapping = (hostID: number) => [{ containerID: 0, hostID, size: SIZE }];
    spec.linux = { ...spec.linux, uidMappings: mapping(UID), gidMappings: mapping(GID) };
    await writeFile(file, JSON.stringify(spec));
    const state = await node.containerd.scratch('runc');
    const name = `${node.containerd.namespace}-${mounted}`;
    return (await run('runc', ['--root', state, 'run', '--bundle', bundle, name])).stdout;
  }

  /** Prepares a key, mounts it, and looks at it from outside and from within a namespace. */
  async function check(key: string, way: Way): Promise<void> {
    const mounts = await client.prepare(key, image.layers.at(-1)?.chainId, MAPPED);
    const root = await mountMapped(mounts, way);
    try {
      assert.deepEqual(await owner(root), [UID, GID]);
      assert.deepEqual(await owner(join(root, 'secret')), [UID, GID]);
      assert.deepEqual(await owner(join(root, 'of-user')), [UID + 1000, GID + 2000]);
      assert.equal(
        await runInNamespace(root, 'cat /secret /mark; sha256sum /cold; stat -c %u:%g /of-user; echo new > /etc/new'),
        `secretwhole${noiseSum(FILE_BYTES, 'cold whole', '/cold')}1000:2000\n`,
      );
      const upper = mounts[0]?.options.find((one) => one.startsWith('upperdir='))?.slice('upperdir='.length) ?? '';
      assert.deepEqual(await owner(join(upper, 'etc/new')), [UID, GID]);
    } finally {
      await run('umount', [root]);
      await client.remove(key);
    }
  }

  async function forget(reference: string): Promise<void> {
    await node.containerd.ctr(['image', 'rm', '--sync', reference]);
    await node.collect();
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  }

  for (const way of WAYS) {
    test(`reads a lazy image and owns what it writes, where containerd maps ${way}`, async () => {
      node.proxy.reset();
      await node.rpull(lazy);
      assert.deepEqual(node.fetched(image), [0, 0, 0]);
      await check('lazy', way);
      const [, middle = 0] = node.fetched(image);
      assert.ok(middle >= FILE_BYTES && middle < (image.layers[1]?.size ?? 0), 'it fetches what it reads, and no more');
      await forget(lazy);
    });
  }

  test('reads ordinary layers the same ways', async () => {
    await node.containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', plain]);
    for (const way of WAYS) await check('ordinary', way);
    await forget(plain);
  });

  test('is refused on lazy and ordinary layers, of which containerd would show the ordinary ones only', async () => {
    const mixed = await withoutIndexes(node, 'team/app', 'lazy', [1]);
    await node.rpull(mixed);
    const top = image.layers.at(-1)?.chainId;
    await assert.rejects(client.prepare('mixed', top, MAPPED), /cannot be used in a user namespace without a copy/);
    assert.equal((await node.runScript(mixed, 'cat /mark')).stdout, 'whole');
    await forget(mixed);
  });
});
