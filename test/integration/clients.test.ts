// What each client of containerd sends and what follows (docs/clients.md): the rows that the containerd at hand can show
// with its own clients, and the labels of other ones sent by hand. Real containerd, runc, registry and product.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { LABEL_IMAGE_REF, LABEL_INDEX, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF } from '../../src/snapshotter/labels.ts';
import { containerdVersion, type Told } from '../support/containerd-version.ts';
import { CriClient } from '../support/cri.ts';
import { type CriNode, startCriNode } from '../support/cri-node.ts';
import type { TestImage } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT, smallLayers } from '../support/lazy-node.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

/** gRPC status ALREADY_EXISTS. */
const ALREADY_EXISTS = 6;

const VERSION = containerdVersion();

const sizes = (image: TestImage) => image.layers.map(({ size }) => size);
const digests = (image: TestImage) => image.layers.map(({ digest }) => digest);

async function labelsOf(node: LazyNode, chainId: string): Promise<Readonly<Record<string, string>>> {
  const { stdout } = await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'info', chainId]);
  return (JSON.parse(stdout) as { Labels: Record<string, string> }).Labels;
}

/** Reading /mark fetches a part of the top layer. */
function assertLittleFetched(node: LazyNode, image: TestImage): void {
  const [bottom = 0, top = 0] = node.fetched(image);
  assert.ok(bottom > 0 && top > 0 && top < (image.layers[1]?.size ?? 0) / 2, `${bottom} and ${top} bytes fetched`);
}

/** A pull of an image with indexes is lazy when the snapshotter is told everything, and ordinary otherwise. */
function assertPulled(node: LazyNode, image: TestImage, told: Told): void {
  const lazy = told === 'everything';
  assert.deepEqual(node.fetched(image), lazy ? [0, 0] : sizes(image));
  assert.deepEqual(node.remoteSnapshots(), lazy ? digests(image) : []);
}

async function assertNothingLeft(node: LazyNode): Promise<void> {
  await node.collect();
  assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
}

describe(`CRI of containerd ${VERSION.text}`, () => {
  let started: CriNode | undefined;
  let node: LazyNode;
  let cri: CriClient;
  let image: TestImage;
  let plain: string;
  let lazy: string;
  let sandboxImage = '';

  before(async () => {
    started = await startCriNode();
    ({ node, cri, sandboxImage } = started);
    ({ image, plain, lazy } = await node.publish('team/app', await smallLayers('whole')));
  });

  after(() => started?.stop());

  test('CRI with annotations on: every layer is lazy, and no byte of one is fetched', async () => {
    node.proxy.reset();
    assert.equal(await cri.pull(lazy), image.config.digest);
    assertPulled(node, image, VERSION.cri);
    assert.ok((await cri.list()).some(({ repo_tags }) => repo_tags.includes(lazy)));
    const bottom = image.layers[0];
    const labels = await labelsOf(node, bottom?.chainId ?? '');
    assert.equal(labels[LABEL_IMAGE_REF], lazy);
    assert.equal(labels[LABEL_LAYER_DIGEST], bottom?.digest);
    assert.match(labels[LABEL_INDEX] ?? '', /^sha256:/);
  });

  test('CRI: a pod runs the lazy image, and so does ctr in the same namespace', async () => {
    node.proxy.reset();
    const pod = await cri.runPod('pod');
    const script = ['/bin/sh', '-c', 'cat /mark; echo; sha256sum /bin/busybox'];
    const container = await cri.startContainer(pod, 'reader', lazy, script);
    const { code, stdout } = await cri.outcome(container, 'reader');
    assert.equal(code, 0);
    assert.match(stdout, /^whole\n[0-9a-f]{64} {2}\/bin\/busybox\n$/);
    assertLittleFetched(node, image);
    const stays = await cri.startContainer(pod, 'stays', lazy, ['/bin/sleep', '100']);
    assert.deepEqual(await cri.exec(stays, ['/bin/cat', '/mark']), { code: 0, stdout: 'whole' });
    await cri.removePod(pod);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
  });

  test('CRI: removing the image leaves nothing of it', async () => {
    await cri.remove(lazy);
    await cri.remove(sandboxImage);
    await assertNothingLeft(node);
  });

  test('CRI: an image without indexes is fetched and unpacked the ordinary way', async () => {
    node.proxy.reset();
    await cri.pull(plain);
    assert.deepEqual(node.fetched(image), sizes(image));
    assert.deepEqual(node.remoteSnapshots(), []);
    assert.match(node.product.log(), /"reason":"it has no index annotation"/);
    const pod = await cri.runPod('plain');
    const container = await cri.startContainer(pod, 'plain', plain, ['/bin/sh', '-c', 'cat /mark']);
    const { code } = await cri.outcome(container, 'plain');
    assert.equal(code, 0);
    await cri.removePod(pod);
    assert.equal((await node.runScript(plain, 'cat /mark')).stdout, 'whole');
    await cri.remove(plain);
    await cri.remove(sandboxImage);
    await assertNothingLeft(node);
  });
});

describe(`clients of containerd ${VERSION.text} other than CRI`, () => {
  let node: LazyNode;
  let image: TestImage;
  let plain: string;
  let lazy: string;

  before(async () => {
    node = await LazyNode.start({
      config: { prefetch: { enabled: false } },
      containerd: { cri: { snapshotter: 'dedup', annotations: false } },
    });
    ({ image, plain, lazy } = await node.publish('team/app', await smallLayers('whole')));
  });

  after(() => node?.stop());

  test(`CRI with annotations off tells ${VERSION.criWithoutAnnotations} of layers`, async () => {
    const cri = new CriClient(node.containerd.address, node.containerd.dir);
    try {
      node.proxy.reset();
      await cri.pull(lazy);
      assertPulled(node, image, VERSION.criWithoutAnnotations);
      assert.equal((await node.runScript(lazy, 'cat /mark', { namespace: 'k8s.io' })).stdout, 'whole');
      await cri.remove(lazy);
      await assertNothingLeft(node);
    } finally {
      await cri.close();
    }
  });

  test(`ctr image pull tells ${VERSION.ctrPullExported} of layers: what follows depends on that and on the image`, async () => {
    for (const [reference, told] of [
      [plain, 'nothing'],
      [lazy, VERSION.ctrPullExported],
    ] as const) {
      node.proxy.reset();
      await node.containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', reference]);
      assertPulled(node, image, told);
      assert.equal((await node.runScript(reference, 'cat /mark')).stdout, 'whole');
      await node.containerd.ctr(['image', 'rm', '--sync', reference]);
      await assertNothingLeft(node);
    }
  });

  test('a second namespace adopts what the first has, containerd may restart, and both can be removed', async () => {
    const pull = ['image', 'pull', '--plain-http', '--snapshotter', 'dedup', lazy];
    const other = { namespace: `${node.containerd.namespace}-other` };
    await node.rpull(lazy);
    await node.containerd.restart();
    node.proxy.reset();
    await node.containerd.ctr(pull, other);
    // Who tells nothing fetches and unpacks for himself.
    const adopts = VERSION.ctrPullExported !== 'nothing';
    assert.deepEqual(node.fetched(image), adopts ? [0, 0] : sizes(image));
    assert.deepEqual(node.remoteSnapshots(), digests(image));
    for (const namespace of [node.containerd.namespace, other.namespace]) {
      assert.equal((await node.runScript(lazy, 'cat /mark', { namespace })).stdout, 'whole');
    }
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    assert.equal((await node.runScript(lazy, 'cat /mark', other)).stdout, 'whole');
    await node.containerd.ctr(['image', 'rm', '--sync', lazy], other);
    await assertNothingLeft(node);
  });

  test('rpull sends what CRI sends: every layer is lazy', async () => {
    node.proxy.reset();
    const { stdout } = await node.rpull(lazy);
    assert.match(stdout, /2 layers: 2 lazy, 0 fetched/);
    assert.deepEqual(node.fetched(image), [0, 0]);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    assertLittleFetched(node, image);
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await assertNothingLeft(node);
  });

  describe('labels of newer clients, sent through containerd by hand', () => {
    let client: SnapshotsClient;
    let index = '';

    before(async () => {
      const lease = 'by-hand';
      await node.containerd.ctr(['leases', 'create', '--id', lease]);
      client = new SnapshotsClient(node.containerd.address, {
        snapshotter: 'dedup',
        namespace: node.containerd.namespace,
        lease,
      });
      await node.rpull(lazy);
      index = (await labelsOf(node, image.layers[0]?.chainId ?? ''))[LABEL_INDEX] ?? '';
      await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
      await node.collect();
    });

    after(async () => {
      client?.close();
      await node.containerd.ctr(['leases', 'rm', '--sync', 'by-hand']);
      await assertNothingLeft(node);
    });

    test('snapshot.ref, image reference, layer digest and index (nerdctl, containerd 2.1 and later): lazy', async () => {
      const layer = image.layers[0];
      const labels = {
        [LABEL_SNAPSHOT_REF]: layer?.chainId ?? '',
        [LABEL_IMAGE_REF]: lazy,
        [LABEL_LAYER_DIGEST]: layer?.digest ?? '',
        [LABEL_INDEX]: index,
      };
      node.proxy.reset();
      await assert.rejects(client.prepare('extract-1', '', labels), { code: ALREADY_EXISTS });
      assert.deepEqual(node.fetched(image), [0, 0]);
      assert.deepEqual(node.remoteSnapshots(), [layer?.digest]);
      assert.equal((await client.stat(layer?.chainId ?? '')).name, layer?.chainId);
      // containerd found it by exactly this filter; its walk of our snapshots needs label and parent.
      const own = node.snapshots();
      const found = await own.names(`labels."${LABEL_SNAPSHOT_REF}"==${layer?.chainId},parent==""`);
      own.close();
      assert.equal(found.length, 1);
      const mounts = await client.view('look', layer?.chainId ?? '');
      assert.deepEqual(
        mounts.map(({ type }) => type),
        ['bind'],
      );
      await client.remove('look');
      await client.remove(layer?.chainId ?? '');
      await node.collect();
    });

    test('annotations and snapshot.ref without image reference (containerd 2.0): an ordinary snapshot', async () => {
      const layer = image.layers[0];
      const labels = { [LABEL_SNAPSHOT_REF]: layer?.chainId ?? '', [LABEL_INDEX]: index };
      const mounts = await client.prepare('extract-2', '', labels);
      assert.equal(mounts.length, 1);
      assert.deepEqual(node.remoteSnapshots(), []);
      assert.equal((await client.stat('extract-2')).kind, 2);
      assert.match(node.product.log(), /the client sends no (layer digest|image reference) with the layer/);
      await client.remove('extract-2');
      await node.collect();
    });
  });
});
