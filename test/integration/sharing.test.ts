// What one image brought to the node is never asked of the registry again, whichever image, layer or repository names
// it next. Counted at a proxy before the registry.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { MiB } from '../../src/units.ts';
import { debianImages, NGINX_IMAGE, PYTHON_IMAGE } from '../support/debian-images.ts';
import { noise } from '../support/feature-tars.ts';
import { pushLayout, type TestImage } from '../support/images.ts';
import { LazyNode } from '../support/lazy-node.ts';
import { openView } from '../support/lazy-view.ts';
import { type TreeRow, walkTreeApart } from '../support/tree-walk.ts';

describe('a second image', () => {
  let node: LazyNode;

  before(async () => {
    node = await LazyNode.start();
  });

  after(async () => {
    await node?.stop();
  });

  /** Requests for the bytes of a layer since the proxy was last reset. */
  function dataRequests(digest: string): { requests: number; bytes: number } {
    return node.proxy.count({ method: 'GET', path: new RegExp(`/blobs/${digest}`) });
  }

  /** Reads every byte of an image through its lazy mount. */
  async function walk(image: TestImage): Promise<TreeRow[]> {
    const view = await openView(node, 'dedup', image.layers.at(-1)?.chainId ?? '');
    try {
      return await walkTreeApart(view.path);
    } finally {
      await view.close();
    }
  }

  test('on a base that was read fetches nothing of the base', { timeout: 300_000 }, async () => {
    const { dir, images } = await debianImages([PYTHON_IMAGE, NGINX_IMAGE]);
    for (const tag of ['python', 'nginx']) {
      const pushed = await pushLayout(dir, tag, node.registry.host, tag);
      await node.product.cli(['index', pushed, '--annotate', `${node.registry.host}/${tag}:lazy`]);
    }
    const python = images.get('python') as TestImage;
    const nginx = images.get('nginx') as TestImage;
    const base = python.layers[0]?.digest ?? '';
    const own = nginx.layers[1]?.digest ?? '';
    assert.equal(nginx.layers[0]?.digest, base);

    await node.rpull(`${node.proxy.host}/python:lazy`);
    node.proxy.reset();
    const first = await walk(python);
    assert.ok(dataRequests(base).bytes > 10 * MiB, 'the first image reads the base from the registry');

    await node.rpull(`${node.proxy.host}/nginx:lazy`);
    node.proxy.reset();
    const second = await walk(nginx);
    const known = new Set(first.map(({ path, content }) => `${path} ${content}`));
    const shared = second.filter(({ type, path, content }) => type === 'file' && known.has(`${path} ${content}`));
    assert.ok(shared.length > 2000, `only ${shared.length} files are the same in both images`);
    assert.deepEqual(dataRequests(base), { requests: 0, bytes: 0 });
    assert.ok(dataRequests(own).bytes > 0, 'its own layer comes from the registry');
  });

  test('with the bytes of a file in another layer, under another name, fetches none of them', async () => {
    const content = noise(1234, 6 * MiB + 5);
    const one = await node.publish('one', [{ entries: [{ name: 'a', content }] }]);
    const entries = [{ name: 'moved/', type: 'dir' } as const, { name: 'moved/b', content }];
    const two = await node.publish('two', [{ entries, compression: 'zstd-frames' }]);
    await node.rpull(one.lazy);
    const written = (await walk(one.image)).find(({ path }) => path === 'a');
    await node.rpull(two.lazy);
    node.proxy.reset();
    const row = (await walk(two.image)).find(({ path }) => path === 'moved/b');
    assert.equal(row?.size, content.length);
    assert.equal(row?.content, written?.content);
    assert.deepEqual(node.proxy.seen, []);
  });
});
