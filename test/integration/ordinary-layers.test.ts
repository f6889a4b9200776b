// An image without an index, pulled and unpacked by containerd: converted in the background by the real product, its
// directories deleted, both processes killed in between; and what containers and views see, before and after.
import assert from 'node:assert/strict';
import { existsSync, readdirSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { run, TestContainerd, waitFor } from '../support/containerd.ts';
import { busyboxEntries, importImage, makeImage, type TestImage } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { assertSameRows, type TreeRow, walkTreeApart } from '../support/tree-walk.ts';

const IMAGE = 'registry.test/base:latest';
const SNAPSHOT = ['snapshot', '--snapshotter', 'dedup'];

/** No layer says what the root is like; containerd's has the time of its making. */
const UNDESCRIBED = { ignoreMtimeOf: [''] };

interface Status {
  readonly pending: number;
  readonly done: number;
  readonly left: readonly unknown[];
  readonly failed: readonly unknown[];
  readonly directories: readonly { readonly reason: string }[];
}

describe('an image without an index', () => {
  let product: Product;
  let containerd: TestContainerd;
  let image: TestImage;

  before(async () => {
    product = await Product.create();
    await product.start();
    containerd = await TestContainerd.start({ proxies: { dedup: product.address } });
    const noise = Buffer.alloc(3_000_000, 'not quite noise, but long enough for several pieces\n');
    image = await makeImage({
      layers: [
        {
          entries: [
            ...(await busyboxEntries(['sh', 'cat', 'ls', 'rm', 'mkdir', 'sleep'])),
            { name: 'etc/gone', content: 'x' },
            { name: 'opt/one/hidden', content: 'y' },
            { name: 'opt/big', content: noise },
          ],
        },
        {
          entries: [
            { name: 'etc/.wh.gone' },
            { name: 'opt/one/.wh..wh..opq' },
            { name: 'opt/one/seen', content: 'z\n' },
          ],
        },
        { entries: [{ name: 'srv/again', content: noise }] },
      ],
    });
    await importImage(containerd, image, 'registry.test/base');
  });

  after(async () => {
    await containerd?.stop();
    await product?.stop();
    if (image !== undefined) await rm(image.dir, { recursive: true });
  });

  const status = async (verb = 'status') => JSON.parse((await product.cli(['dedup', verb, '--json'])).stdout) as Status;
  const directories = () =>
    readdirSync(join(product.root, 'snapshots')).filter((id) => existsSync(join(product.root, 'snapshots', id, 'fs')));
  async function look(name: string): Promise<TreeRow[]> {
    const target = await containerd.scratch(name);
    const top = image.layers.at(-1)?.chainId ?? '';
    const { stdout } = await containerd.ctr([...SNAPSHOT, 'view', '--target', target, name, top]);
    await containerd.ctr([...SNAPSHOT, 'label', name, 'containerd.io/gc.root=2024-01-01T00:00:00Z']);
    await run('sh', ['-c', stdout]);
    try {
      return await walkTreeApart(target);
    } finally {
      await run('umount', [target]);
      await containerd.ctr([...SNAPSHOT, 'rm', name]);
    }
  }
  async function start(name: string, script: string, ...flags: string[]): Promise<string> {
    const args = ['run', '--snapshotter', 'dedup', ...flags, IMAGE, name, '/bin/sh', '-c', script];
    return (await containerd.ctr(args)).stdout;
  }

  test('is converted whatever is killed meanwhile, looks as it did, and gives its directories back', async () => {
    await status('pause');
    const unpacked = await look('unpacked');
    await start('runs', 'while ! cat /stop 2>/dev/null; do sleep 0.1; done; cat /opt/one/seen > /root/seen', '-d');
    await status('resume');
    // At whatever moment it is.
    await product.stopDaemon('SIGKILL');
    await product.stopService('SIGKILL');
    await product.start();
    await waitFor('the conversions', async () => (await status()).done === 3, 60_000);
    const { pending, left, failed } = await status();
    assert.deepEqual({ pending, left, failed }, { pending: 0, left: [], failed: [] });
    assertSameRows(await look('converted'), unpacked, UNDESCRIBED);
    // The big file of two layers is there once.
    assert.ok((await product.stats()).present_bytes < 2 * 3_000_000 + 2_500_000);
    assert.equal(
      await start('reader', 'cat /opt/one/seen; ls /etc; cat /srv/again > /dev/null', '--rm'),
      'z\ngroup\npasswd\n',
    );
    await containerd.gc();
    const { directories: waiting } = await status();
    assert.equal(waiting.length, 3);
    for (const { reason } of waiting) assert.match(reason, /^was given to .*\/runs$/);
    await containerd.ctr(['task', 'exec', '--exec-id', 'stop', 'runs', '/bin/sh', '-c', 'echo > /stop']);
    await waitFor('its end', async () => /STOPPED/.test((await containerd.ctr(['task', 'ls'])).stdout));
    await containerd.ctr(['task', 'rm', 'runs']);
    await containerd.ctr(['container', 'rm', 'runs']);
    await containerd.gc();
    await waitFor('the directories to go', () => directories().length === 0);
    assert.deepEqual((await status()).directories, []);
    await product.stopDaemon('SIGKILL');
    await waitFor('the next dedupd', async () =>
      product
        .daemonPid()
        .then(() => true)
        .catch(() => false),
    );
    assertSameRows(await look('without'), unpacked, UNDESCRIBED);
  });

  test('and goes without a trace', async () => {
    await containerd.ctr(['image', 'rm', '--sync', IMAGE]);
    await containerd.gc();
    await waitFor('the snapshots to go', () => readdirSync(join(product.root, 'snapshots')).length === 0);
    await waitFor('the chunks to go', async () => (await product.stats()).chunks === 0);
  });
});
