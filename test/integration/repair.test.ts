// A root directory that was lost while containerd has images and containers: what `repair` finds, removes and leaves.
import assert from 'node:assert/strict';
import { rm } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import { unmountBelow } from '../support/containerd.ts';
import { FILE_BYTES, LazyNode, noiseSum, smallLayers } from '../support/lazy-node.ts';

describe('repair', () => {
  let node: LazyNode;
  let lazy: string;
  let plain: string;

  before(async () => {
    node = await LazyNode.start();
    ({ lazy, plain } = await node.publish('team/app', await smallLayers('whole')));
  });
  after(() => node?.stop());

  const repair = (...args: string[]) => node.product.cli(['repair', '-a', node.containerd.address, ...args]);
  const sees = async (namespace: string): Promise<string> => {
    const run = ['run', '--rm', '--snapshotter', 'dedup', lazy, `look-${namespace}`, '/bin/sha256sum', '/cold'];
    return (await node.containerd.ctr(run, { namespace })).stdout;
  };

  test('removes the records of snapshots that are lost, in every namespace, and images can be pulled again', async () => {
    const { containerd, product } = node;
    const first = containerd.namespace;
    for (const namespace of [first, 'second']) await node.rpull(lazy, ['-n', namespace]);
    await node.rpull(plain);
    await containerd.ctr(['container', 'create', '--snapshotter', 'dedup', lazy, 'kept', '/bin/sh']);
    assert.match((await repair()).stdout, /nothing to repair/);
    assert.equal(await sees('second'), noiseSum(FILE_BYTES, 'cold whole', '/cold'), 'what is whole stays');

    await product.stopService();
    await product.stopDaemon();
    await unmountBelow(product.root);
    await rm(product.root, { recursive: true });
    await node.startService();
    await assert.rejects(node.rpull(lazy), /run "dedup-snapshotter repair"/);
    await assert.rejects(sees(first), 'containerd believes that all is here');

    const { stdout } = await repair();
    assert.match(stdout, new RegExp(`${first}: removed [1-9]\\d* records of lost snapshots`));
    assert.match(stdout, /second: removed [1-9]\d* records? of lost snapshots/);
    for (const name of [lazy, plain]) assert.match(stdout, new RegExp(`pull again: ${name}`));
    assert.match(stdout, /its file system is lost: kept/);
    assert.doesNotMatch(stdout, /something stands on it/);

    for (const namespace of [first, 'second']) {
      await node.rpull(lazy, ['-n', namespace]);
      assert.equal(await sees(namespace), noiseSum(FILE_BYTES, 'cold whole', '/cold'));
    }
    assert.match((await repair()).stdout, /nothing to repair/);
    await containerd.ctr(['container', 'rm', 'kept'], { allowFailure: true });
    for (const [namespace, name] of [
      [first, lazy],
      [first, plain],
      ['second', lazy],
    ] as const)
      await containerd.ctr(['image', 'rm', '--sync', name], { namespace });
    await node.collect();
    assert.deepEqual(await containerd.inventory('dedup'), {
      content: [],
      ingests: [],
      snapshots: [],
      images: [],
      leases: [],
    });
  });

  test('touches nothing while the service is away, and says what to do', async () => {
    await node.rpull(lazy);
    await node.product.stopService();
    const { code, stderr } = await node.product.cli(['repair', '-a', node.containerd.address], { allowFailure: true });
    assert.equal(code, 1);
    assert.match(stderr, /is dedup-snapshotter running/);
    await node.startService();
    assert.equal(await sees(node.containerd.namespace), noiseSum(FILE_BYTES, 'cold whole', '/cold'));
  });
});
