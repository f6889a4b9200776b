// A layer that a kubelet had pulled and containerd unpacked, converted out of containerd's own copy of the blob, and killed in
// the middle of it: it starts over, and what is shown then is what overlayfs shows.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, describe, test } from 'node:test';
import { ServiceClient } from '../../src/snapshotter/service-client.ts';
import { waitFor } from '../support/containerd.ts';
import { type CriNode, startCriNode } from '../support/cri-node.ts';
import { busyboxEntries } from '../support/images.ts';
import type { PublishedImage } from '../support/lazy-node.ts';
import { assertSameViews } from '../support/lazy-view.ts';

const FILES = 24;
const FILE_BYTES = 3 << 20;

describe("a layer that is converted out of containerd's copy", () => {
  let started: CriNode;
  let published: PublishedImage;

  before(async () => {
    started = await startCriNode();
    const { product, containerd } = started.node;
    // Its containerd has an address only now.
    await product.stopService();
    await product.stopDaemon();
    await product.configure({ convert_ordinary: true, containerd_address: containerd.address });
    await started.node.startService();
    const files = Array.from({ length: FILES }, (_, i) => ({
      name: `data/${i}`,
      content: randomBytes(FILE_BYTES + i),
    }));
    const layers = [
      { entries: await busyboxEntries(['sh', 'cat']) },
      { entries: [...files, { name: 'bin/cat2', type: 'symlink' as const, linkname: 'cat' }] },
    ];
    published = await started.node.publish('team/large', layers);
  });
  after(() => started?.stop());

  test('starts over when dedupd is killed in the middle, and equals what overlayfs shows', async () => {
    const { node, cri } = started;
    const { image, plain } = published;
    const [bottom, large] = image.layers;
    assert.ok(bottom !== undefined && large !== undefined);
    await cri.pull(plain);
    const client = new ServiceClient(node.product.address);
    try {
      const status = () => client.conversions('Status');
      await waitFor(
        'the middle of its blob',
        async () => {
          const { current, done } = await status();
          assert.ok(done < 2, 'it was too fast to be killed');
          // Only a blob is read without entries.
          return current?.total === large.size && current.bytes > 0 && current.entries === 0;
        },
        60_000,
      );
      await node.product.stopDaemon('SIGKILL');
      assert.equal((await status()).done, 1);
      await waitFor('both conversions', async () => (await status()).done === 2, 120_000);
      const { left, failed } = await status();
      assert.deepEqual({ left, failed }, { left: [], failed: [] });
    } finally {
      client.close();
    }
    // By the names that the registry has for them: no directory was read.
    for (const { digest } of [bottom, large]) {
      assert.equal(node.indexCount(`SELECT count(*) FROM layers WHERE digest = '${digest}'`), 1);
    }
    assert.equal(node.indexCount('SELECT count(*) FROM held_chunks'), 0);
    const stored = node.indexCount('SELECT sum(size) FROM chunks');
    assert.ok(stored >= FILES * FILE_BYTES && stored < FILES * FILE_BYTES + (4 << 20), `${stored}`);
    const pull = ['images', 'pull', '--plain-http', '--snapshotter', 'overlayfs', plain];
    await node.containerd.ctr(pull, { timeoutMs: 120_000 });
    await assertSameViews(node, large.chainId);
  });
});
