// What a kubelet asks of containerd beyond a pull (clients.test.ts), on lazily loaded images: usage, a restart of containerd
// under running containers, removal and a second pull, and images whose snapshots have gone.
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import { isDeepStrictEqual } from 'node:util';
import { waitFor } from '../support/containerd.ts';
import type { CriClient } from '../support/cri.ts';
import { type CriNode, startCriNode } from '../support/cri-node.ts';
import type { TestImage } from '../support/images.ts';
import { FILE_BYTES, type LazyNode, NOTHING_LEFT, noise, noiseSum, smallLayers } from '../support/lazy-node.ts';

const SLEEP = ['/bin/sleep', '100000'];
/** What a few small files and directories may take beside a large one. */
const FEW_FILES_BYTES = 1 << 20;

describe('a kubelet on a node with lazily loaded images', () => {
  let started: CriNode | undefined;
  let node: LazyNode;
  let cri: CriClient;
  let image: TestImage;
  let lazy: string;
  let pod = '';
  let container = '';

  before(async () => {
    started = await startCriNode();
    ({ node, cri } = started);
    ({ image, lazy } = await node.publish('team/app', await smallLayers('whole')));
  });
  after(() => started?.stop());

  async function shell(id: string, script: string): Promise<string> {
    const { code, stdout } = await cri.exec(id, ['/bin/sh', '-c', script]);
    assert.equal(code, 0, stdout);
    return stdout;
  }

  const digests = (): string[] => image.layers.map(({ digest }) => digest);
  const fetched = (): number => node.fetched(image).reduce((sum, bytes) => sum + bytes, 0);

  /** Starts a container that stays, in a pod of its own, and has it read what nobody has read. */
  async function readsColdFiles(name: string): Promise<void> {
    pod = await cri.runPod(name);
    container = await cri.startContainer(pod, name, lazy, SLEEP);
    assert.equal(await shell(container, 'sha256sum /cold'), noiseSum(FILE_BYTES, 'cold whole', '/cold'));
  }

  async function removed(): Promise<void> {
    await cri.remove(lazy);
    await cri.remove(started?.sandboxImage ?? '');
    await node.collect();
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  }

  /** Forgets the snapshots of the image, top first, as when they were lost; the image stays. */
  async function loseSnapshots(): Promise<void> {
    // Once the first has gone, containerd's own collection may be faster with the others.
    for (const { chainId } of image.layers.toReversed()) {
      await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'rm', chainId], { allowFailure: true });
    }
    await node.collect();
    const { stdout } = await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'ls']);
    for (const { chainId } of image.layers) assert.ok(!stdout.includes(chainId), `${chainId} is still there`);
    assert.ok(
      (await cri.list()).some(({ repo_tags }) => repo_tags.includes(lazy)),
      'the image is still there',
    );
  }

  async function switchAnnotations(on: boolean): Promise<void> {
    const { configFile } = node.containerd;
    const text = readFileSync(configFile, 'utf8');
    writeFileSync(configFile, text.replace(/(disable_snapshot_annotations = )\w+/, `$1${!on}`));
    await node.containerd.restart();
  }

  test('a container that runs reads cold files when it comes to them', async () => {
    await cri.pull(lazy);
    node.proxy.reset();
    await readsColdFiles('first');
    const [, top = 0] = node.fetched(image);
    assert.ok(top >= FILE_BYTES && top < (image.layers[1]?.size ?? 0), `${top} bytes of the upper layer fetched`);
  });

  test('stats of a container are those of its writable layer, and of the image file system those of all', async () => {
    await shell(container, `cat /cold > /written; echo more > /more`);
    const client = node.snapshots();
    try {
      const [key = ''] = await client.names(`name~="${container}$"`);
      const { size, inodes } = await client.usage(key);
      assert.ok(
        size > FILE_BYTES && size < FILE_BYTES + FEW_FILES_BYTES,
        'what was written is counted, what lies below is not',
      );
      // containerd asks once a second.
      const own = { bytes: size, inodes };
      await waitFor('the use', async () => isDeepStrictEqual(await cri.writableLayer(container), own));
      assert.deepEqual((await cri.writableLayers()).get(container), own);
      let all = 0;
      for (const name of await client.names()) all += (await client.usage(name)).size;
      await waitFor('the use of all', async () => (await cri.imageFileSystem()).bytes === all);
    } finally {
      client.close();
    }
  });

  test('while containerd is down a container reads on, and after its restart it is the same one', async () => {
    const { stdout } = await node.containerd.ctr(['task', 'ls']);
    const pid = new RegExp(`^${container}\\s+(\\d+)`, 'm').exec(stdout)?.[1] ?? '';
    await node.containerd.down();
    const before = fetched();
    const content = await readFile(`/proc/${pid}/root/unread`);
    assert.ok(content.equals(noise(FILE_BYTES, 'unread whole')));
    assert.ok(fetched() > before + FILE_BYTES / 2, 'it came from the registry meanwhile');
    await node.containerd.up();
    await waitFor('CRI', () =>
      cri.running().then(
        (ids) => ids.includes(container),
        () => false,
      ),
    );
    assert.equal(await shell(container, 'cat /more /mark'), 'more\nwhole');
    const second = await cri.startContainer(pod, 'second', lazy, SLEEP);
    assert.equal(await shell(second, 'cat /mark'), 'whole');
    assert.deepEqual((await cri.running()).sort(), [container, second].sort());
    await cri.removePod(pod);
  });

  test('an image that was removed leaves nothing, and is pulled and read lazily again', async () => {
    await removed();
    node.proxy.reset();
    await cri.pull(lazy);
    assert.equal(fetched(), 0);
    await readsColdFiles('again');
    assert.ok(fetched() > FILE_BYTES / 2);
    await cri.removePod(pod);
  });

  test('a lazy image whose snapshots have gone says so when a container is made, and a pull brings it back', async () => {
    await loseSnapshots();
    pod = await cri.runPod('lost');
    await assert.rejects(cri.startContainer(pod, 'lost', lazy, SLEEP), /not found/);
    await cri.removePod(pod);
    node.proxy.reset();
    await cri.pull(lazy);
    assert.deepEqual(node.remoteSnapshots(), digests());
    await readsColdFiles('back');
    await cri.removePod(pod);
    await removed();
  });

  test('with annotations off the same image is unpacked, again when its snapshots have gone, and is lazy once they are on', async () => {
    await switchAnnotations(false);
    await cri.pull(lazy);
    assert.deepEqual(node.remoteSnapshots(), []);
    await readsColdFiles('ordinary');
    await cri.removePod(pod);
    node.proxy.reset();
    await loseSnapshots();
    await readsColdFiles('unpacked');
    assert.equal(fetched(), 0, 'the content was still here');
    assert.deepEqual(node.remoteSnapshots(), []);
    await cri.removePod(pod);
    await switchAnnotations(true);
    await loseSnapshots();
    await cri.pull(lazy);
    assert.deepEqual(node.remoteSnapshots(), digests());
    await readsColdFiles('lazy');
    await cri.removePod(pod);
    await removed();
  });
});
