// The tree that a container sees through the lazy mount, against containerd's own overlayfs unpack of the same image:
// real images, a generated one with everything a tar layer can hold, and chains of lazy and ordinary layers.
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { MiB } from '../../src/units.ts';
import { run } from '../support/containerd.ts';
import { debianImages, NGINX_IMAGE, PYTHON_IMAGE } from '../support/debian-images.ts';
import { DEEP as DEEP_PATH } from '../support/feature-layers.ts';
import { featureLayers } from '../support/feature-tars.ts';
import { pushLayout } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT, type PublishedImage } from '../support/lazy-node.ts';
import { checkMetadata, openView, withoutIndexes } from '../support/lazy-view.ts';
import { assertSameRows, type CompareOptions, type TreeRow, walkTreeApart } from '../support/tree-walk.ts';

/** Layers without an index are unpacked, and stay so: the chains of both kinds are what is compared. */
const ORDINARY_STAYS = { index_trust: ['annotation'], convert_ordinary: false };

/** containerd makes the root directory of an unpack itself and ignores its tar entry: the time is that of the unpack. */
const ROOT = '';
/**
 * Directories of the generated image whose time differs by design: some layer makes or changes something in them
 * without an entry for the directory itself, so containerd leaves the time of that moment. Here it is the time that a
 * lower layer gives, or 1970: the same on every node, whenever it was pulled.
 */
const DIRECTORIES_WITHOUT_TIME = [
  ROOT,
  // Parents without any entry.
  ...[1, 2, 3, 4, 5].map((depth) => DEEP_PATH.split('/').slice(0, depth).join('/')),
  // Changed by a higher layer that has no entry for them.
  'across/attrs',
  'across/second-only',
  'big',
  'etc',
  'hidden',
  // The middle layer unpacks through a symlink of the lower layer: directories of these names take its place.
  'link-to-dir',
  'link-to-tmp',
  'many',
  'merge',
  'missing',
  'missing/parent',
  'missing/parent/of',
  'opaque',
  'opaque/sub',
  'special',
  'special/deep',
];

/**
 * Pulls with containerd alone and walks its overlayfs snapshot. `unpackTimes`: exactly the paths whose time is that of
 * the unpack, because no layer says another.
 */
async function expectedTree(
  node: LazyNode,
  plain: string,
  chainId: string,
  unpackTimes: readonly string[],
): Promise<TreeRow[]> {
  const startedNs = BigInt(Date.now()) * 1_000_000n;
  await node.containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', 'overlayfs', plain], {
    timeoutMs: 120_000,
  });
  const view = await openView(node, 'overlayfs', chainId);
  try {
    const rows = await walkTreeApart(view.path);
    assert.deepEqual(
      rows.filter(({ mtimeNs }) => mtimeNs >= startedNs).map(({ path }) => path),
      unpackTimes,
    );
    return rows;
  } finally {
    await view.close();
    // Its content too: an rpull that comes later has nothing at hand.
    await node.containerd.ctr(['images', 'rm', '--sync', plain]);
  }
}

/** Pulls with rpull, walks the lazy snapshot, checks the metadata, and takes it all away again. */
async function compareLazy(
  node: LazyNode,
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

describe('the tree of a lazy image', () => {
  let node: LazyNode;

  before(async () => {
    node = await LazyNode.start({ config: ORDINARY_STAYS });
  });

  after(async () => {
    await node?.stop();
  });

  for (const spec of [PYTHON_IMAGE, NGINX_IMAGE]) {
    test(`of the Debian image ${spec.tag} equals containerd's unpack`, { timeout: 300_000 }, async () => {
      const { dir, images } = await debianImages([PYTHON_IMAGE, NGINX_IMAGE]);
      const image = images.get(spec.tag);
      assert.ok(image !== undefined);
      const pushed = await pushLayout(dir, spec.tag, node.registry.host, spec.tag);
      await node.product.cli(['index', pushed, '--annotate', `${node.registry.host}/${spec.tag}:lazy`]);
      const chainId = image.layers.at(-1)?.chainId ?? '';
      const expected = await expectedTree(node, `${node.proxy.host}/${spec.tag}:${spec.tag}`, chainId, [ROOT]);
      await compareLazy(node, `${node.proxy.host}/${spec.tag}:lazy`, chainId, expected, { ignoreMtimeOf: [ROOT] });
    });
  }

  describe('of an image with everything a layer can hold', () => {
    let published: PublishedImage;
    let chainId: string;
    let expected: TreeRow[];
    const options: CompareOptions = { ignoreMtimeOf: DIRECTORIES_WITHOUT_TIME };

    before(async () => {
      published = await node.publish('features', featureLayers());
      chainId = published.image.layers.at(-1)?.chainId ?? '';
      expected = await expectedTree(node, published.plain, chainId, DIRECTORIES_WITHOUT_TIME);
    });

    test("equals containerd's unpack, all layers lazy", async () => {
      await compareLazy(node, published.lazy, chainId, expected, options);
    });

    test('shows zeros between the end of a file and the end of its last page', async () => {
      const program = join(await node.containerd.scratch('mmap'), 'mmap-tail');
      await run('cc', ['-O1', '-o', program, join(import.meta.dirname, '../support/mmap-tail.c')]);
      await node.rpull(published.lazy);
      const view = await openView(node, 'dedup', chainId);
      try {
        const files = expected.filter(({ type, size }) => type === 'file' && size % 4096 !== 0);
        assert.ok(files.some(({ path }) => path === `big/${9 * MiB + 123}`));
        const { stdout } = await run('sh', ['-c', `find ${view.path} -type f -print0 | ${program}`]);
        assert.equal(Number(stdout), files.length);
      } finally {
        await view.close();
        await node.containerd.ctr(['images', 'rm', '--sync', published.lazy]);
        await node.collect();
      }
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
        await compareLazy(node, reference, chainId, expected, options);
      });
    }
  });
});

describe('the tree of a lazy image over fuse-native', () => {
  let node: LazyNode;

  before(async () => {
    node = await LazyNode.start({ config: { ...ORDINARY_STAYS, transport: 'fuse-native' } });
  });

  after(async () => {
    await node?.stop();
  });

  test("equals containerd's unpack with every feature, all layers lazy and mixed", async () => {
    assert.equal((await node.product.client.hello()).transport, 'fuse-native');
    const { image, plain, lazy } = await node.publish('features', featureLayers());
    const chainId = image.layers.at(-1)?.chainId ?? '';
    const expected = await expectedTree(node, plain, chainId, DIRECTORIES_WITHOUT_TIME);
    const options: CompareOptions = { ignoreMtimeOf: DIRECTORIES_WITHOUT_TIME };
    await compareLazy(node, lazy, chainId, expected, options);
    await compareLazy(node, await withoutIndexes(node, 'features', 'lazy', [1]), chainId, expected, options);
  });
});
