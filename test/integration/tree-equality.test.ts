// The tree that a container sees through the lazy mount, against containerd's own overlayfs unpack of the same image:
// real images, a generated one with everything a tar layer can hold, and chains of lazy and ordinary layers.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { debianImages, NGINX_IMAGE, PYTHON_IMAGE } from '../support/debian-images.ts';
import { featureDirectoriesWithoutTime, featureLayers } from '../support/feature-tars.ts';
import { pushLayout } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT, type PublishedImage } from '../support/lazy-node.ts';
import { checkMetadata, openView, withoutIndexes } from '../support/lazy-view.ts';
import { assertSameRows, type CompareOptions, type TreeRow, walkTreeApart } from '../support/tree-walk.ts';

/** containerd makes the root directory of an unpack itself: its time is that of the unpack, an image has none to give. */
const ROOT = '';

describe('the tree of a lazy image', () => {
  let node: LazyNode;

  before(async () => {
    node = await LazyNode.start();
  });

  after(async () => {
    await node?.stop();
  });

  /** Pulls with containerd alone and walks its overlayfs snapshot. */
  async function expectedTree(plain: string, chainId: string): Promise<TreeRow[]> {
    await node.containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', 'overlayfs', plain], {
      timeoutMs: 120_000,
    });
    const view = await openView(node, 'overlayfs', chainId);
    try {
      return await walkTreeApart(view.path);
    } finally {
      await view.close();
      // Its content too: an rpull that comes later has nothing at hand.
      await node.containerd.ctr(['images', 'rm', '--sync', plain]);
    }
  }

  /** Pulls with rpull, walks the lazy snapshot, checks the metadata, and takes it all away again. */
  async function compareLazy(
    reference: string,
    chainId: string,
    expected: readonly TreeRow[],
    options: CompareOptions,
  ): Promise<void> {
    await node.rpull(reference);
    const view = await openView(node, 'dedup', chainId);
    try {
      assertSameRows(await walkTreeApart(view.path), expected, options);
      assert.ok((await checkMetadata(node)) > 0);
    } finally {
      await view.close();
      await node.containerd.ctr(['images', 'rm', '--sync', reference]);
      await node.collect();
    }
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  }

  for (const spec of [PYTHON_IMAGE, NGINX_IMAGE]) {
    test(`of the Debian image ${spec.tag} equals containerd's unpack`, { timeout: 300_000 }, async () => {
      const { dir, images } = await debianImages([PYTHON_IMAGE, NGINX_IMAGE]);
      const image = images.get(spec.tag);
      assert.ok(image !== undefined);
      const pushed = await pushLayout(dir, spec.tag, node.registry.host, spec.tag);
      await node.product.cli(['index', pushed, '--annotate', `${node.registry.host}/${spec.tag}:lazy`]);
      const chainId = image.layers.at(-1)?.chainId ?? '';
      const expected = await expectedTree(`${node.proxy.host}/${spec.tag}:${spec.tag}`, chainId);
      await compareLazy(`${node.proxy.host}/${spec.tag}:lazy`, chainId, expected, { ignoreMtimeOf: [ROOT] });
    });
  }

  describe('of an image with everything a layer can hold', () => {
    let published: PublishedImage;
    let chainId: string;
    let expected: TreeRow[];
    const undescribed = featureDirectoriesWithoutTime();
    const options: CompareOptions = { ignoreMtimeOf: (path) => undescribed.has(path) };

    before(async () => {
      published = await node.publish('features', featureLayers());
      chainId = published.image.layers.at(-1)?.chainId ?? '';
      expected = await expectedTree(published.plain, chainId);
    });

    test("equals containerd's unpack, all layers lazy", async () => {
      await compareLazy(published.lazy, chainId, expected, options);
    });

    for (const [name, ordinary] of [
      ['normal, lazy', [0]],
      ['lazy, normal, lazy', [1]],
      ['lazy, normal, lazy above two', [2]],
      ['lazy, normal', [3]],
      ['normal, lazy, normal, lazy', [0, 2]],
      ['lazy, normal, lazy, normal', [1, 3]],
    ] as const) {
      test(`equals containerd's unpack with layers ${name}`, async () => {
        const reference = await withoutIndexes(node, 'features', 'lazy', ordinary);
        await compareLazy(reference, chainId, expected, options);
      });
    }
  });
});
