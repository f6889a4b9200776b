// The guide's reset — images removed, everything below the root deleted, services restarted — while images are mounted and
// the daemons run: what follows is a clean, working state.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { mountsBelow, run, waitFor } from '../support/containerd.ts';
import { FILE_BYTES, LazyNode, noiseSum, smallLayers } from '../support/lazy-node.ts';

describe("the guide's reset", () => {
  let node: LazyNode;
  let lazy: string;

  before(async () => {
    node = await LazyNode.start();
    ({ lazy } = await node.publish('team/app', await smallLayers('whole')));
  });
  after(() => node?.stop());

  const daemonPid = (): Promise<number> => node.product.daemonPid().catch(() => 0);

  for (const orderly of [true, false]) {
    test(`with images mounted, in two namespaces, ${orderly ? 'the service restarted' : 'nothing restarted but containerd'}`, async () => {
      const { containerd, product } = node;
      const namespaces = [containerd.namespace, 'second'];
      for (const namespace of namespaces) await node.rpull(lazy, ['-n', namespace]);
      assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
      const before = await daemonPid();
      assert.ok(mountsBelow(product.root).length > 0);

      for (const namespace of namespaces) await containerd.ctr(['image', 'rm', lazy], { namespace });
      // What is mounted there cannot be deleted; the guide's line goes on all the same.
      await run('sh', ['-c', `rm -rf "$1"/* 2>/dev/null`, 'sh', product.root], { allowFailure: true });
      if (orderly) {
        await product.stopService();
        await product.start();
      }
      await containerd.restart();
      await waitFor('a dedupd of the new root', async () => ![0, before].includes(await daemonPid()), 30_000);
      if (!orderly) {
        await product.stopService();
        await product.start();
      }
      await node.collect();
      assert.deepEqual(mountsBelow(product.root), []);

      await node.rpull(lazy);
      const { stdout } = await node.runScript(lazy, 'cat /mark; echo; sha256sum /cold');
      assert.equal(stdout, `whole\n${noiseSum(FILE_BYTES, 'cold whole', '/cold')}`);
      await containerd.ctr(['image', 'rm', '--sync', lazy]);
      await node.collect();
      assert.deepEqual(node.loops(), []);
    });
  }
});
