// Sixteen images at once while the registry sends no data: what needs none goes on, what waits is answered rightly when
// the data comes, and nothing is left.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { run } from '../support/containerd.ts';
import { noise } from '../support/feature-tars.ts';
import { LazyNode, NOTHING_LEFT, type PublishedImage } from '../support/lazy-node.ts';
import type { TarEntry } from '../support/tar.ts';

const IMAGES = 16;
const SHARED = noise(99, 300_000);
/** What the service promises for what is here; the process that reads takes some of it. */
const HIT_MS = 50;

const own = (i: number): Buffer => noise(1000 + i, 400_000 + i);
const digest = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

async function sha256(path: string): Promise<string> {
  return (await run('sha256sum', [path], { timeoutMs: 60_000 })).stdout.slice(0, 64);
}

/** Median of some milliseconds. */
function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1] ?? Number.NaN;
}

describe('sixteen images mounted while the registry sends no data', () => {
  let node: LazyNode;
  let warm: PublishedImage;
  let images: PublishedImage[] = [];
  const mounted: string[] = [];

  before(async () => {
    node = await LazyNode.start();
    warm = await node.publish('warm', [{ entries: [{ name: 'shared', content: SHARED }] }]);
    const entries = (i: number): TarEntry[] => [
      { name: 'dir/', type: 'dir' },
      { name: 'dir/shared', content: SHARED },
      { name: 'dir/own', content: own(i) },
    ];
    const publish = (i: number): Promise<PublishedImage> => node.publish(`image-${i}`, [{ entries: entries(i) }]);
    for (let i = 0; i < IMAGES; i += 4) {
      images = [...images, ...(await Promise.all([0, 1, 2, 3].map((j) => publish(i + j))))];
    }
  });

  after(async () => {
    await node?.stop();
  });

  async function mount(reference: string, name: string): Promise<string> {
    const directory = join(node.product.dir, name);
    await mkdir(directory);
    const request = { reference, directory, platform: '', credentials: '' };
    for await (const { done } of node.product.client.mountReference(request)) if (done) mounted.push(directory);
    return directory;
  }

  test('are mounted and listed, serve what is here, and answer every reader in the end', {
    timeout: 120_000,
  }, async () => {
    await node.rpull(warm.lazy);
    assert.equal(await sha256(join(await mount(warm.lazy, 'warm'), 'shared')), digest(SHARED));

    // Blobs of layers are data; the indexes that a mount needs are other blobs.
    const layers = images.map(({ image }) => image.layers[0]?.digest ?? '');
    const { promise: until, resolve: release } = Promise.withResolvers<void>();
    node.proxy.setRules({ path: new RegExp(`/blobs/(${layers.join('|')})`), fault: { kind: 'hold', until } });
    try {
      const directories = await Promise.all(images.map(({ lazy }, i) => mount(lazy, `mount-${i}`)));
      let answered = 0;
      const waiting = directories.map(async (directory) => {
        const result = await sha256(join(directory, 'dir/own'));
        answered++;
        return result;
      });
      const all = Promise.all(waiting);
      all.catch(() => undefined); // Awaited below; until then the other checks tell more.
      await sleep(300);

      const hitMs: number[] = [];
      for (const directory of directories) {
        const { stdout } = await run('ls', ['-l', join(directory, 'dir')], { timeoutMs: 5_000 });
        assert.match(stdout, /own[\s\S]*shared/);
        const startedMs = performance.now();
        assert.equal(await sha256(join(directory, 'dir/shared')), digest(SHARED));
        hitMs.push(performance.now() - startedMs);
      }
      assert.ok(median(hitMs) < HIT_MS, `reading what is here takes ${hitMs.map(Math.round)} ms`);

      const client = node.snapshots();
      const startedMs = performance.now();
      const [name = ''] = await client.names();
      assert.equal((await client.stat(name)).name, name);
      const serviceMs = performance.now() - startedMs;
      client.close();
      assert.ok(serviceMs < 1000, `the snapshots service answers after ${serviceMs} ms`);
      assert.ok((await node.product.stats()).hits > 0);
      assert.equal(answered, 0, 'nobody was answered without data');

      release();
      assert.deepEqual(
        await all,
        images.map((_, i) => digest(own(i))),
      );
    } finally {
      release();
    }
  });

  test('leave nothing when they are unmounted', async () => {
    for (const directory of mounted) await node.product.client.unmountReference(directory);
    await node.containerd.ctr(['images', 'rm', '--sync', warm.lazy]);
    await node.collect();
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  });
});
