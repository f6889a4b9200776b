// A pull brings what the start of the image's own command reads, and nothing else; a start then waits for less.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { waitFor } from '../support/containerd.ts';
import { busyboxEntries } from '../support/images.ts';
import { FILE_BYTES, LazyNode, noise, type PublishedImage } from '../support/lazy-node.ts';

describe('the files of a start', () => {
  let node: LazyNode;
  let published: PublishedImage;

  before(async () => {
    node = await LazyNode.start();
    published = await node.publish(
      'team/app',
      [
        { entries: await busyboxEntries(['sh', 'cat', 'sleep']) },
        {
          entries: [
            { name: 'start.sh', content: '#!/bin/sh\ncat /mark\n', mode: 0o755 },
            { name: 'mark', content: 'started' },
            { name: 'etc/', type: 'dir' },
            { name: 'etc/passwd', content: 'root:x:0:0:root:/root:/bin/sh\n' },
          ],
        },
        // Layers of their own, so that no span of the others holds any of it.
        { entries: [{ name: 'cold', content: noise(FILE_BYTES, 'cold') }] },
      ],
      { Entrypoint: ['/start.sh'] },
    );
  });
  after(() => node?.stop());

  test('are here before the start, and what it does not read is not', async () => {
    const { image, lazy } = published;
    await node.rpull(lazy);
    const [bottom, scripts, cold] = image.layers.map(({ digest }) => digest);
    const requests = (digest: string | undefined): number =>
      node.proxy.count({ method: 'GET', path: new RegExp(digest ?? 'none') }).requests;
    await waitFor('the start files', () => node.product.log().includes('the files of a start are here'));
    assert.ok(requests(bottom) > 0 && requests(scripts) > 0);
    const before = requests(bottom) + requests(scripts);
    const { stdout } = await node.runScript(lazy, 'exec /start.sh');
    assert.equal(stdout, 'started');
    assert.equal(requests(bottom) + requests(scripts), before, 'the start asks for nothing more');
    assert.equal(requests(cold), 0);
  });

  test('are forgotten quietly when the image is removed while they come', async () => {
    const { lazy } = published;
    for (let round = 0; round < 5; round++) {
      await node.containerd.ctr(['image', 'rm', '--sync', lazy], { allowFailure: true });
      await node.rpull(lazy);
    }
    const pid = await node.product.daemonPid();
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    assert.equal(await node.product.daemonPid(), pid, 'dedupd lives');
  });
});
