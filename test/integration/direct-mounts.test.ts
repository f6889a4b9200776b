// Containers of images that are here completely need no dedupd: they read through its death, its end and its next start
// without one error, and what they read is kept until the last of them has gone. Real containerd, runc, registry, product.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import Database from 'better-sqlite3';
import { native } from '../../src/fs/native.ts';
import { imageDevices } from '../../src/fs/transport/erofs-mount.ts';
import { RootPaths } from '../../src/paths.ts';
import { ColdContainer } from '../support/cold-container.ts';
import { run, waitFor } from '../support/containerd.ts';
import { busyboxBinary } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT } from '../support/lazy-node.ts';
import { storeIdOf } from '../support/loop-names.ts';

const FILES = 24;
/** Files that each reader reads in every stage of a restart. */
const READS = 5;
const READERS = 2;

describe('a container of an image that is here completely', () => {
  let node: LazyNode;
  let container: ColdContainer;
  let storeId: string;
  let paths: RootPaths;

  before(async () => {
    node = await LazyNode.start({ config: { prefetch: { enabled: false } } });
    paths = new RootPaths(node.product.root);
    storeId = await storeIdOf(paths);
    container = await ColdContainer.start(node, 'complete', 'complete', FILES);
  });
  after(() => node?.stop());

  const transports = async () => (await node.product.client.listImages()).map(({ transport }) => transport);
  const rows = () => node.indexCount('SELECT COUNT(*) FROM direct_mounts');
  const pins = () => node.indexCount('SELECT COUNT(*) FROM pins JOIN direct_mounts USING (mount_id)');
  const direct = async () => (await imageDevices(storeId)).map((device) => device.direct);

  /** A file past the page cache, which the container shares with this process. */
  async function read(i: number): Promise<void> {
    const path = `/proc/${container.pid}/root/data/f${i}`;
    await run('dd', [`if=${path}`, 'iflag=nocache', 'count=0', 'status=none']);
    assert.equal(await container.read(i), container.sumOf(i), `f${i}`);
  }

  /** Runs `stages` one after the other, each while every reader reads further. */
  async function whileReading(stages: readonly (() => Promise<unknown>)[]): Promise<void> {
    const reads = Array.from({ length: READERS }, () => 0);
    let goesOn = true;
    const reading = Promise.all(
      reads.map(async (_, reader) => {
        for (let i = reader; goesOn; i = (i + 5) % FILES) {
          await read(i);
          reads[reader]!++;
        }
      }),
    );
    const failed = reading.then(() => undefined); // Rejects with the first wrong read.
    failed.catch(() => undefined);
    const further = async (): Promise<void> => {
      const reached = reads.map((count) => count + READS);
      const all = waitFor('every reader', () => reads.every((count, i) => count >= reached[i]!), 60_000);
      await Promise.race([all, failed]);
    };
    try {
      await further();
      for (const stage of stages) {
        await stage();
        await further();
      }
    } finally {
      goesOn = false;
      await reading;
    }
  }

  const nextDaemon = () =>
    waitFor('the next dedupd', () =>
      node.product.daemonPid().then(
        () => true,
        () => false,
      ),
    );

  test('is read without dedupd from when its last piece has come', async () => {
    assert.deepEqual([await transports(), await direct(), rows()], [['fuse'], [false], 0]);
    const busybox = createHash('sha256')
      .update(await readFile(await busyboxBinary()))
      .digest('hex');
    assert.equal(await container.readPath('/bin/busybox'), busybox);
    for (let i = 0; i < FILES; i++) await read(i);
    await waitFor('the switch', async () => (await transports())[0] === 'direct');
    assert.deepEqual([await direct(), rows(), pins()], [[true], 1, 2]);
    const { stdout } = await node.product.cli(['images']);
    assert.match(stdout, /\bdirect\b/);
    const { hits } = await node.product.stats();
    for (let i = 0; i < FILES; i++) await read(i);
    assert.equal((await node.product.stats()).hits, hits);
  });

  for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
    test(`reads through the end of both processes by ${signal}, while none runs, and through the next start`, async () => {
      await whileReading([
        () => node.product.stopService(signal),
        () => node.product.stopDaemon(signal),
        async () => {
          assert.deepEqual([await direct(), rows(), pins()], [[true], 1, 2]);
        },
        () => node.startService().then(nextDaemon),
        async () => {
          assert.deepEqual([rows(), pins()], [1, 2]);
          await node.collect();
        },
      ]);
      assert.ok(await container.runs());
      // A kill leaves the mount where it is; an end in order takes it away, under containers too, and another one is made.
      const { stdout } = await node.runScript(container.published.lazy, 'sha256sum < /data/f0');
      assert.equal(stdout, `${container.sumOf(0)}  -\n`);
      assert.deepEqual(await transports(), ['direct']);
      assert.deepEqual(await direct(), signal === 'SIGKILL' ? [true] : [true, true]);
      assert.equal(rows(), 1);
    });
  }

  test('keeps what it reads when its image is removed, until it has gone itself', async () => {
    await node.containerd.ctr(['image', 'rm', '--sync', container.published.lazy]);
    await node.collect();
    await whileReading([() => node.product.stopDaemon('SIGKILL'), nextDaemon, () => node.collect()]);
    assert.deepEqual([rows(), pins()], [1, 2]);
    await container.remove();
    await node.collect();
    assert.deepEqual([rows(), node.indexCount('SELECT COUNT(*) FROM pins'), await direct()], [0, 0, []]);
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  });

  test('leaves no row of a device that a dedupd attached, or was about to, when it was killed', async () => {
    await node.product.stopService();
    await node.product.stopDaemon();
    const fd = openSync(paths.store, 'r');
    const rest = { readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: 4096, autoclear: false };
    const { path } = await native().loopAttach({ fd, ...rest, name: `dedup:101:${storeId}` });
    closeSync(fd);
    const db = new Database(paths.indexDb);
    // 100: not attached yet. 101: attached, and not mounted.
    for (const id of [100, 101]) db.prepare('INSERT INTO direct_mounts VALUES (?, ?, ?, 0)').run(id, `dedup:${id}`, '');
    db.close();
    const holder = openSync(path, 'r');
    try {
      await node.startService();
      await nextDaemon();
      assert.deepEqual([rows(), await direct()], [1, [true]], 'somebody has it open');
      await node.product.stopService();
      await node.product.stopDaemon();
    } finally {
      closeSync(holder);
    }
    await node.startService();
    await nextDaemon();
    assert.deepEqual([rows(), await direct()], [0, []]);
  });
});
