// Ordinary images, unpacked by containerd, that are stored as chunks afterwards: on the real product and containerd. What
// runs keeps what it was given; what starts later reads the store; directories go; nothing changes in what anybody sees.
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { isDeepStrictEqual } from 'node:util';
import { waitFor } from '../support/containerd.ts';
import { featureLayers } from '../support/feature-tars.ts';
import { busyboxEntries, type LayerSource } from '../support/images.ts';
import { FILE_BYTES, LazyNode, NOTHING_LEFT, noise, noiseSum, type PublishedImage } from '../support/lazy-node.ts';
import { assertSameViews, checkMetadata, openView } from '../support/lazy-view.ts';
import { assertSameRows, walkTreeApart } from '../support/tree-walk.ts';

interface Status {
  readonly pending: number;
  readonly done: number;
  readonly left: readonly { readonly name: string; readonly reason: string }[];
  readonly directories: readonly { readonly name: string; readonly reason: string }[];
}

const SHARED = 'cold shared';

/** A layer that runs a shell; one with content that every image has, and one of its own. */
async function ordinaryLayers(mark: string): Promise<LayerSource[]> {
  return [
    { entries: await busyboxEntries(['sh', 'cat', 'sleep', 'echo', 'sha256sum', 'ls']) },
    {
      entries: [
        { name: 'shared', content: noise(FILE_BYTES, SHARED) },
        { name: 'both', content: 'below' },
      ],
    },
    {
      entries: [
        { name: 'mark', content: mark },
        { name: 'both', content: 'above' },
        { name: 'own', content: noise(FILE_BYTES, mark) },
      ],
    },
  ];
}

const SCRIPT = 'cat /mark /both; sha256sum /shared /own';
const said = (mark: string): string =>
  `${mark}above${noiseSum(FILE_BYTES, SHARED, '/shared')}${noiseSum(FILE_BYTES, mark, '/own')}`;

describe('ordinary layers', () => {
  let node: LazyNode;

  before(async () => {
    node = await LazyNode.start({ config: { convert_ordinary: true } });
  });
  after(() => node?.stop());

  /** `ctr image pull`, which tells the snapshotter nothing of the image. */
  async function pull(reference: string, snapshotter = 'dedup'): Promise<void> {
    await node.containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', snapshotter, reference], {
      timeoutMs: 120_000,
    });
  }

  async function status(): Promise<Status> {
    return JSON.parse((await node.product.cli(['dedup', 'status', '--json'])).stdout) as Status;
  }

  async function converted(count: number): Promise<void> {
    await waitFor(
      `${count} layers to be converted`,
      async () => {
        const { pending, done, left } = await status();
        assert.deepEqual(left, []);
        return pending === 0 && done === count;
      },
      60_000,
    );
  }

  /** Numbers of snapshots whose directories are there. */
  const directories = (): string[] => {
    const root = join(node.product.root, 'snapshots');
    return readdirSync(root).filter((id) => existsSync(join(root, id, 'fs')));
  };

  /** The device of an image that was read without dedupd goes a moment after its last user; what it kept, in the next pass. */
  async function nothingLeft(): Promise<void> {
    await waitFor('nothing to be left', async () => {
      await node.collect();
      return isDeepStrictEqual(await node.leftovers(), NOTHING_LEFT);
    }).catch(() => undefined);
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  }

  async function remove(reference: string): Promise<void> {
    await node.containerd.ctr(['images', 'rm', '--sync', reference]);
  }

  test('are stored once, whatever image brought them; running containers keep their directories, which then go', async () => {
    const one = await node.publish('team/one', await ordinaryLayers('one'));
    await pull(one.plain);
    // Begun before anything is converted: it has the directories for its whole life.
    const long = [
      'run',
      '-d',
      '--snapshotter',
      'dedup',
      one.plain,
      'long',
      '/bin/sh',
      '-c',
      'while :; do sleep 1; done',
    ];
    await node.containerd.ctr(long);
    const exec = (id: string) =>
      node.containerd.ctr(['tasks', 'exec', '--exec-id', id, 'long', '/bin/sh', '-c', SCRIPT]);
    assert.equal((await exec('before')).stdout, said('one'));
    await converted(3);
    assert.equal((await exec('after')).stdout, said('one'));
    await node.collect();
    assert.equal(directories().length, 4, 'three layers and the container');
    const held = (await status()).directories;
    assert.equal(held.length, 3);
    assert.match(held[0]?.reason ?? '', /long/);
    // Another container of the same image reads the store, without any registry.
    await node.registry.halt();
    assert.equal((await node.runScript(one.plain, SCRIPT)).stdout, said('one'));
    await node.registry.launch();

    const two = await node.publish('team/two', await ordinaryLayers('two'));
    await pull(two.plain);
    await converted(4);
    const bytes = node.indexCount('SELECT SUM(size) FROM chunks');
    assert.ok(bytes < 3 * FILE_BYTES + 2_000_000, `${bytes} bytes for three files of ${FILE_BYTES} and busybox`);
    assert.equal((await node.runScript(two.plain, SCRIPT)).stdout, said('two'));

    await node.containerd.ctr(['tasks', 'kill', '--signal', 'SIGKILL', 'long']);
    await waitFor('the container to end', async () =>
      /STOPPED/.test((await node.containerd.ctr(['tasks', 'ls'])).stdout),
    );
    await node.containerd.ctr(['tasks', 'rm', 'long']);
    await node.containerd.ctr(['containers', 'rm', 'long']);
    await waitFor('the directories to go', async () => {
      await node.collect();
      return directories().length === 0;
    });
    assert.equal((await node.runScript(one.plain, SCRIPT)).stdout, said('one'));
    // A restart of everything, and what was converted starts as before.
    await node.product.stopService();
    await node.product.stopDaemon();
    await node.startService();
    assert.equal((await node.runScript(one.plain, SCRIPT)).stdout, said('one'));
    assert.equal((await node.runScript(two.plain, SCRIPT)).stdout, said('two'));
    await remove(one.plain);
    await remove(two.plain);
    await nothingLeft();
  });

  test('show the same tree as overlayfs, with everything a layer can hold, before and after', async () => {
    const features = await node.publish('features', featureLayers());
    const top = features.image.layers.at(-1)?.chainId ?? '';
    await pull(features.plain);
    const held = await openView(node, 'dedup', top);
    try {
      const before = await walkTreeApart(held.path);
      await converted(features.image.layers.length);
      assertSameRows(await walkTreeApart(held.path), before);
      const lazy = await openView(node, 'dedup', top);
      try {
        const text = readFileSync('/proc/self/mountinfo', 'utf8');
        const line = text.split('\n').find((mount) => mount.includes(` ${lazy.path} `)) ?? '';
        assert.match(line, /lowerdir=[^,:]*\/mounts\/\d+/, 'it has one lower, an EROFS image');
        assertSameRows(await walkTreeApart(lazy.path), before, { ignoreMtimeOf: [''] });
        assert.ok((await checkMetadata(node)) > 0);
      } finally {
        await lazy.close();
      }
    } finally {
      await held.close();
      await remove(features.plain);
    }
    await nothingLeft();
  });

  test('can be committed on: what is written above a converted image is a layer like any other', async () => {
    const image = await node.publish('team/base', await ordinaryLayers('base'));
    const top = image.image.layers.at(-1)?.chainId ?? '';
    await pull(image.plain);
    await converted(3);
    const snapshots = ['snapshots', '--snapshotter', 'dedup'];
    const view = await openView(node, 'dedup', top);
    // As `nerdctl commit` does: the difference of what a container wrote becomes content, unpacked again on a parent.
    const { containerd } = node;
    await containerd.ctr([
      'run',
      '--snapshotter',
      'dedup',
      image.plain,
      'writer',
      '/bin/sh',
      '-c',
      'echo new > /new; echo x > /both',
    ]);
    const { stdout: diff } = await containerd.ctr(
      ['snapshots', '--snapshotter', 'dedup', 'diff', '--keep', 'writer', top],
      {
        allowFailure: true,
      },
    );
    assert.ok(diff.length > 0, 'the difference of container and image');
    // By hand: the container's own snapshot becomes a layer.
    await containerd.ctr([...snapshots, 'label', 'writer', 'containerd.io/gc.root=now']);
    await containerd.ctr(['containers', 'rm', '--keep-snapshot', 'writer']);
    await containerd.ctr([...snapshots, 'commit', 'by-hand', 'writer']);
    const key = await openView(node, 'dedup', 'by-hand');
    try {
      assert.equal(readFileSync(join(key.path, 'new'), 'utf8'), 'new\n');
      assert.equal(readFileSync(join(key.path, 'both'), 'utf8'), 'x\n');
      assert.equal(readFileSync(join(key.path, 'mark'), 'utf8'), 'base');
    } finally {
      await key.close();
      await view.close();
      await containerd.ctr([...snapshots, 'rm', 'by-hand']);
      await remove(image.plain);
    }
    await nothingLeft();
  });
});

describe('ordinary layers that are converted while others are unpacked', () => {
  let node: LazyNode;
  const LAYERS = 10;
  const images: PublishedImage[] = [];

  before(async () => {
    node = await LazyNode.start({ config: { convert_ordinary: true } });
    for (const mark of ['p', 'q', 'r']) {
      const layers: LayerSource[] = [{ entries: await busyboxEntries(['sh', 'cat']) }];
      for (let i = 1; i < LAYERS; i++) {
        layers.push({
          entries: [
            // Content that its neighbours have, too; a file that each layer replaces, and one that every other removes.
            { name: `dir/${i}`, content: noise(200_000 + i * 1000, `layer ${i}`) },
            { name: 'replaced', content: noise(100_000 + i, `${mark} ${i}`) },
            ...(i % 2 === 0
              ? [{ name: 'dir/.wh.gone', content: '' }]
              : [{ name: 'dir/gone', content: `${mark} ${i}` }]),
            ...Array.from({ length: 200 }, (_, f) => ({
              name: `many/${i}/${f}`,
              content: `${mark} ${f % 50} ${i % 3}`,
            })),
          ],
        });
      }
      images.push(await node.publish(`team/${mark}`, layers));
    }
  });
  after(() => node?.stop());

  test('equal what overlayfs shows, and equal it once all of them are converted', async () => {
    const { containerd } = node;
    const pull = (reference: string, snapshotter: string) =>
      containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', snapshotter, reference], {
        timeoutMs: 200_000,
      });
    await Promise.all(images.map(({ plain }) => pull(plain, 'dedup')));
    for (const { plain } of images) await pull(plain, 'overlayfs');
    const compare = async (): Promise<void> => {
      for (const { image } of images) await assertSameViews(node, image.layers.at(-1)?.chainId ?? '');
    };
    await compare();
    const all = new Set(images.flatMap(({ image }) => image.layers.map(({ chainId }) => chainId))).size;
    await waitFor(
      'all layers to be converted',
      async () => {
        const { pending, done } = JSON.parse((await node.product.cli(['dedup', 'status', '--json'])).stdout) as Status;
        return pending === 0 && done === all;
      },
      120_000,
    );
    await compare();
  });
});
