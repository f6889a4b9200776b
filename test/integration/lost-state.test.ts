// State that is damaged, replaced or cannot be written while images are here: bytes that the disk changed, an older
// index.db, a full disk. Detected, said, and fetched again or refused; never a wrong byte.
import assert from 'node:assert/strict';
import { closeSync, copyFileSync, openSync, readSync, rmSync, statfsSync, writeFileSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import Database from 'better-sqlite3';
import { run, unmountBelow, waitFor } from '../support/containerd.ts';
import { FILE_BYTES, LazyNode, noiseSum, type PublishedImage, smallLayers } from '../support/lazy-node.ts';

const cold = (mark: string) => noiseSum(FILE_BYTES, `cold ${mark}`, '/cold');
const unread = (mark: string) => noiseSum(FILE_BYTES, `unread ${mark}`, '/unread');
const LOOK = 'sha256sum /cold /unread';

/** Forgets what the kernel has read, so that the next read asks the disk. */
function dropPageCache(): void {
  writeFileSync('/proc/sys/vm/drop_caches', '1');
}

describe('damaged and replaced state', () => {
  let node: LazyNode;
  let one: PublishedImage;
  let two: PublishedImage;

  before(async () => {
    // What the disk changes is told where dedupd is in between, in what it reads itself.
    node = await LazyNode.start({ config: { direct_mounts: false } });
    one = await node.publish('team/one', await smallLayers('one'));
    two = await node.publish('team/two', await smallLayers('two'));
  });
  after(() => node?.stop());

  /** Changes one bit in every file of noise that the store holds, `at` bytes from its start. */
  function flipBits(at: number): void {
    const db = new Database(join(node.product.root, 'index.db'), { readonly: true });
    const addresses = db.prepare('SELECT address FROM chunks WHERE size = ?').pluck().all(FILE_BYTES) as number[];
    db.close();
    assert.ok(addresses.length >= 2);
    const store = openSync(join(node.product.root, 'chunks', 'store'), 'r+');
    for (const address of addresses) {
      const byte = Buffer.alloc(1);
      readSync(store, byte, 0, 1, address + at);
      byte[0]! ^= 0x40;
      writeSync(store, byte, 0, 1, address + at);
    }
    closeSync(store);
  }

  for (const running of [true, false]) {
    test(`a bit that the disk changed ${running ? 'while dedupd runs' : 'while dedupd was down'} is told, and fetched again`, async () => {
      const { product } = node;
      await node.rpull(one.lazy);
      assert.equal((await node.runScript(one.lazy, LOOK)).stdout, cold('one') + unread('one'));
      if (!running) {
        await product.stopService();
        await product.stopDaemon();
      }
      flipBits(1_234_567);
      const logged = product.log().length;
      if (!running) await node.startService();
      dropPageCache();
      node.proxy.reset();
      assert.equal((await node.runScript(one.lazy, LOOK)).stdout, cold('one') + unread('one'));
      assert.ok(node.layerRequests(one.image) > 0, 'it was fetched again');
      assert.match(product.log().slice(logged), /the disk changed bytes of the store/);
      // With no registry to ask: an error, not the byte that is there.
      flipBits(2_345_678);
      dropPageCache();
      node.proxy.setRules({ fault: { kind: 'status', status: 503 } });
      const { code, stderr } = await node.runScript(one.lazy, 'cat /cold > /dev/null', { allowFailure: true });
      node.proxy.reset();
      assert.notEqual(code, 0);
      assert.match(stderr, /I\/O error|Input\/output error/);
      await waitFor('the failure to be forgotten', async () => {
        const again = await node.runScript(one.lazy, LOOK, { allowFailure: true });
        return again.stdout === cold('one') + unread('one');
      });
    });
  }

  test('an older index.db beside a newer store: what it does not know is learned and fetched again', async () => {
    const { product } = node;
    await node.rpull(one.lazy);
    await node.runScript(one.lazy, LOOK);
    const file = join(product.root, 'index.db');
    // As an operator copies it.
    copyFileSync(file, `${file}.bak`);
    await node.rpull(two.lazy);
    assert.equal((await node.runScript(two.lazy, LOOK)).stdout, cold('two') + unread('two'));
    // The store goes on: what the copy says of the first image is not so any more.
    await node.containerd.ctr(['image', 'rm', '--sync', one.lazy]);
    await node.collect();
    await product.stopService();
    await product.stopDaemon();
    for (const suffix of ['-wal', '-shm']) rmSync(file + suffix, { force: true });
    copyFileSync(`${file}.bak`, file);
    await node.startService();
    assert.equal((await node.runScript(two.lazy, LOOK)).stdout, cold('two') + unread('two'));
    await node.rpull(one.lazy);
    assert.equal((await node.runScript(one.lazy, LOOK)).stdout, cold('one') + unread('one'));
    assert.match(product.log(), /recorded presence is not believed/);
  });
});

describe('a full disk below the root', () => {
  let node: LazyNode;
  let dir: string;
  let one: PublishedImage;

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'small-disk-'));
    const disk = join(dir, 'disk');
    const root = join(dir, 'root');
    await run('truncate', ['-s', '96M', disk]);
    await run('mkfs.ext4', ['-q', '-b', '4096', '-m', '0', disk]);
    await mkdir(root);
    await run('mount', ['-o', 'loop', disk, root]);
    node = await LazyNode.start({ config: { root } });
    one = await node.publish('team/one', await smallLayers('one'));
  });
  after(async () => {
    await node?.stop();
    await unmountBelow(dir);
    await rm(dir, { recursive: true, force: true });
  });

  /** Takes all the room that is left. */
  async function fill(): Promise<void> {
    await run('dd', ['if=/dev/zero', `of=${join(dir, 'root', 'filler')}`, 'bs=4k'], { allowFailure: true });
    assert.equal(statfsSync(join(dir, 'root')).bavail, 0);
  }
  /** Leaves the eviction nothing: what is here was used a moment ago, however long this test takes. */
  async function nothingIsCold(): Promise<void> {
    const durable = `SELECT count(*) FROM chunks WHERE durable <> 0 AND size = ${FILE_BYTES}`;
    const db = new Database(join(dir, 'root', 'index.db'));
    await waitFor('what was read to be durable', () => db.prepare(durable).pluck().get() === 1);
    db.exec('UPDATE chunks SET last_used = 4000000000');
    db.close();
  }
  const room = () => rm(join(dir, 'root', 'filler'), { force: true });

  test('during a fill: reads that find no room fail, what is here is read on, and all is right when there is room', async () => {
    await node.rpull(one.lazy);
    assert.equal((await node.runScript(one.lazy, 'sha256sum /cold')).stdout, cold('one'));
    await node.containerd.ctr(['run', '-d', '--snapshotter', 'dedup', one.lazy, 'reader', '/bin/sleep', '600']);
    const look = (path: string) =>
      node.containerd.ctr(['task', 'exec', '--exec-id', `e${path.slice(1)}`, 'reader', '/bin/sha256sum', path], {
        allowFailure: true,
      });
    await nothingIsCold();
    await fill();
    const full = await look('/unread');
    assert.notEqual(full.code, 0, full.stdout);
    assert.doesNotMatch(full.stdout, /[0-9a-f]{64}/, 'no sum of half a file');
    assert.match(node.product.log(), /No space left|STORE_FULL/);
    dropPageCache();
    assert.equal((await look('/cold')).stdout, cold('one'));
    await room();
    await waitFor('the failure to be forgotten', async () => (await look('/unread')).stdout === unread('one'));
    await node.containerd.ctr(['task', 'kill', '-s', 'KILL', 'reader']);
    await waitFor('the reader to end', async () => {
      const { code } = await node.containerd.ctr(['container', 'rm', 'reader'], { allowFailure: true });
      return code === 0;
    });
  });

  test('during commits and prepares: they fail and say why; none that was answered is lost', async () => {
    const client = node.snapshots();
    const answered: string[] = [];
    const refused: string[] = [];
    try {
      await fill();
      for (let i = 0; i < 400; i++) {
        try {
          await client.prepare(`key-${i}`, '', { filler: 'x'.repeat(4000) });
          answered.push(`key-${i}`);
          await client.commit(`layer-${i}`, `key-${i}`, { 'containerd.io/gc.root': 'y' });
          answered[answered.length - 1] = `layer-${i}`;
        } catch (error) {
          refused.push((error as Error).message);
        }
      }
      assert.ok(refused.length > 0, 'the disk was full');
      assert.match(refused.at(-1)!, /full|No space left/i);
    } finally {
      await room();
      client.close();
    }
    await node.product.stopService('SIGKILL');
    await node.product.start();
    const after = node.snapshots();
    try {
      const there = new Set(await after.names());
      assert.deepEqual(
        answered.filter((name) => !there.has(name)),
        [],
      );
      await after.prepare('with-room');
      for (const name of ['with-room', ...answered]) await after.remove(name);
      await after.cleanup();
    } finally {
      after.close();
    }
  });

  test('during the writes of index.db: a pull fails or goes on without, and comes right when there is room', async () => {
    const two = await node.publish('team/two', await smallLayers('two'));
    await fill();
    const { code, stderr } = await node.rpull(two.lazy, [], { allowFailure: true });
    assert.ok(code === 0 || /full|No space left/i.test(stderr), stderr);
    await room();
    await node.rpull(two.lazy);
    assert.equal((await node.runScript(two.lazy, LOOK)).stdout, cold('two') + unread('two'));
    assert.equal((await node.runScript(one.lazy, LOOK)).stdout, cold('one') + unread('one'));
    for (const { lazy } of [one, two]) await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.collect();
  });
});
