// What a node learns of an image without an index, and who starts lazily for it: the same node when the image comes back,
// and other nodes where it is pushed beside the image. On real containerd with CRI, and by `rpull`.
import assert from 'node:assert/strict';
import { rm } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import { waitFor } from '../support/containerd.ts';
import { type CriNode, startCriNode } from '../support/cri-node.ts';
import { type LayerSource, makeImage, pushLayout, type TestImage } from '../support/images.ts';
import { FILE_BYTES, LazyNode, noiseSum, smallLayers } from '../support/lazy-node.ts';

const TRUSTING = { index_trust: ['annotation', 'local', 'referrer'] };
const NOTHING = [0, 0];

async function converted(node: LazyNode, count: number): Promise<void> {
  await waitFor(
    `${count} layers to be converted`,
    async () => {
      const { stdout } = await node.product.cli(['dedup', 'status', '--json']);
      const { pending, done, left, failed } = JSON.parse(stdout) as Record<string, unknown>;
      assert.deepEqual({ left, failed }, { left: [], failed: [] });
      return pending === 0 && (done as number) >= count;
    },
    60_000,
  );
}

/** A node whose product knows where its containerd is, and converts what that unpacks. */
async function startConvertingNode(config: Readonly<Record<string, unknown>> = {}): Promise<CriNode> {
  const started = await startCriNode();
  const { product, containerd } = started.node;
  await product.stopService();
  await product.stopDaemon();
  await product.configure({ prefetch: { enabled: false }, containerd_address: containerd.address, ...config });
  await started.node.startService();
  return started;
}

async function pushed(node: LazyNode, times: number): Promise<void> {
  const said = () => node.product.log().split('the indexes of an image were pushed').length - 1;
  await waitFor('the indexes to be pushed', () => said() >= times, 20_000);
}

async function runsRight(node: LazyNode, reference: string, mark: string): Promise<void> {
  const { stdout } = await node.runScript(reference, 'cat /mark; sha256sum /cold');
  assert.equal(stdout, `${mark}${noiseSum(FILE_BYTES, `cold ${mark}`, '/cold')}`);
}

describe('an image without an index that CRI pulled', () => {
  test('is lazy when it is pulled again, by whomever: its indexes were kept', async () => {
    const here = await startConvertingNode();
    const { node, cri } = here;
    try {
      const { image, plain } = await node.publish('team/kept', await smallLayers('kept'));
      await cri.pull(plain);
      await converted(node, 2);
      await runsRight(node, plain, 'kept');
      for (const again of [() => cri.pull(plain), () => node.rpull(plain)]) {
        await cri.remove(plain);
        await waitFor('its layers to go', async () => {
          await node.collect();
          return node.indexCount('SELECT COUNT(*) FROM layers') === 0;
        });
        node.proxy.reset();
        await again();
        assert.deepEqual(node.fetched(image), NOTHING);
        await runsRight(node, plain, 'kept');
      }
      await cri.remove(plain);
    } finally {
      await here.stop();
    }
  });

  test('is lazy on the next node when its indexes were pushed beside it', async () => {
    const here = await startConvertingNode({ publish_index: 'registry' });
    const next = await startCriNode(TRUSTING);
    try {
      const { image, plain } = await here.node.publish('team/pushed', await smallLayers('pushed'));
      await here.cri.pull(plain);
      await pushed(here.node, 1);
      here.node.proxy.reset();
      await next.cri.pull(plain);
      assert.deepEqual(here.node.fetched(image), NOTHING);
      await runsRight(next.node, plain, 'pushed');
      for (const { cri } of [here, next]) await cri.remove(plain);
    } finally {
      await next.stop();
      await here.stop();
    }
  });
});

describe('images without an index on a fleet of nodes that push what they learn', () => {
  const layouts: string[] = [];
  let first: LazyNode;
  let second: LazyNode;
  before(async () => {
    first = await LazyNode.start({ config: { ...TRUSTING, publish_index: 'registry' } });
    second = await LazyNode.start({ config: { ...TRUSTING, publish_index: 'registry' } });
  });
  after(async () => {
    await second?.stop();
    await first?.stop();
    for (const dir of layouts) await rm(dir, { recursive: true });
  });

  /** Pushed without an index, to be pulled through the first node's proxy. */
  async function publish(
    repository: string,
    mark: string,
    order: (layers: LayerSource[]) => LayerSource[] = (layers) => layers,
  ): Promise<{ image: TestImage; reference: string }> {
    const image = await makeImage({ layers: order(await smallLayers(mark)) });
    layouts.push(image.dir);
    const reference = await pushLayout(image.dir, image.tag, first.registry.host, repository, mark);
    return { image, reference: reference.replace(first.registry.host, first.proxy.host) };
  }

  test('are pushed by a node that knows the base by a referrer only, and are lazy on the next', async () => {
    const one = await publish('team/fleet', 'one');
    await first.rpull(one.reference);
    await pushed(first, 1);
    assert.match((await second.rpull(one.reference)).stdout, /2 layers: 2 lazy/);
    const two = await publish('team/fleet', 'two');
    assert.match((await second.rpull(two.reference)).stdout, /1 read and stored .*1 already here/);
    await pushed(second, 1);
    first.proxy.reset();
    // The first node has the base; a third one has nothing.
    const third = await LazyNode.start({ config: TRUSTING });
    try {
      assert.match((await third.rpull(two.reference)).stdout, /2 layers: 2 lazy/);
      await runsRight(third, two.reference, 'two');
    } finally {
      await third.stop();
    }
  });

  test('are pushed without the index of a base that another repository gave, which is said once', async () => {
    const three = await publish('other/fleet', 'three');
    assert.match((await second.rpull(three.reference)).stdout, /1 read and stored .*1 already here/);
    await pushed(second, 2);
    const left = second.product
      .log()
      .split('\n')
      .filter((line) => /other repositories gave them/.test(line));
    assert.equal(left.length, 1);
    assert.ok(left[0]?.includes(three.image.layers[0]?.digest ?? 'none'));
    // A node that made the index of that base completes it.
    assert.match((await first.rpull(three.reference)).stdout, /1 lazy, .*1 already here/);
    await pushed(first, 2);
    const next = await LazyNode.start({ config: TRUSTING });
    try {
      assert.match((await next.rpull(three.reference)).stdout, /2 layers: 2 lazy/);
      await runsRight(next, three.reference, 'three');
    } finally {
      await next.stop();
    }
  });

  test('are lazy in a layer that an image of their own repository has brought the index of, and of no other', async () => {
    // Upside down: the base is above what containerd does not have.
    for (const [repository, lazy] of [
      ['team/fleet', 1],
      ['another/fleet', 0],
    ] as const) {
      const { image, reference } = await publish(repository, `down-${lazy}`, (layers) => layers.toReversed());
      first.proxy.reset();
      const { stdout } = await second.rpull(reference);
      assert.match(stdout, new RegExp(`2 layers: ${lazy} lazy, ${2 - lazy} read and stored`));
      const [, base = 0] = image.layers.map(({ size }) => size);
      assert.equal(first.fetched(image)[1] === base, lazy === 0, `${first.fetched(image)}`);
      await runsRight(second, reference, `down-${lazy}`);
    }
  });

  test('are pushed with the next pull where that was not done before', async () => {
    const four = await publish('team/late', 'four');
    first.proxy.setRules({ method: 'PUT', path: /\/blobs\/uploads/, fault: { kind: 'status', status: 403 } });
    await first.rpull(four.reference);
    await waitFor('the refusal', () => /could not be pushed beside it/.test(first.product.log()));
    first.proxy.reset();
    await first.product.stopDaemon('SIGKILL');
    await first.containerd.ctr(['image', 'rm', '--sync', four.reference]);
    await waitFor('the next dedupd', () =>
      first.product.daemonPid().then(
        () => true,
        () => false,
      ),
    );
    await first.rpull(four.reference);
    await pushed(first, 3);
  });
});
