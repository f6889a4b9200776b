// Space given back on a whole node: what is removed while somebody still holds it mounted, `gc` and `stats`, a quota with
// containers that read. Real containerd, real mounts.
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { existsSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import Database from 'better-sqlite3';
import { waitFor } from '../support/containerd.ts';
import { FILE_BYTES, LazyNode, noiseSum, type PublishedImage, smallLayers } from '../support/lazy-node.ts';

const cold = (mark: string) => noiseSum(FILE_BYTES, `cold ${mark}`, '/cold');
const unread = (mark: string) => noiseSum(FILE_BYTES, `unread ${mark}`, '/unread');
const LOOK = 'sha256sum /cold /unread';

/** What `stats --json` says. */
interface Stats {
  readonly disk_bytes: number;
  readonly present_bytes: number;
  readonly quota_bytes: number;
  readonly chunk_bytes: number;
  readonly referenced_bytes: number;
  readonly dedup_ratio: number;
  readonly quarantined_bytes: number;
  readonly free_bytes: number;
  readonly evicted_bytes: number;
  readonly images: readonly {
    readonly total_bytes: number;
    readonly present_bytes: number;
    readonly shared_bytes: number;
    readonly pinned: boolean;
    readonly transport: string;
    readonly reference: string;
  }[];
}

interface Collected {
  readonly disk_bytes: number;
  readonly steps: readonly { readonly step: string; readonly count: number; readonly address_bytes: number }[];
}

async function json<T>(node: LazyNode, verb: string): Promise<T> {
  return JSON.parse((await node.product.cli([verb, '--json'])).stdout) as T;
}

/** Addresses of the files of noise that index.db knows. */
function addresses(node: LazyNode): number[] {
  const db = new Database(join(node.product.root, 'index.db'), { readonly: true });
  try {
    return db.prepare('SELECT address FROM chunks WHERE size = ? ORDER BY 1').pluck().all(FILE_BYTES) as number[];
  } finally {
    db.close();
  }
}

const remove = async (node: LazyNode, image: PublishedImage): Promise<void> => {
  await node.containerd.ctr(['image', 'rm', '--sync', image.lazy]);
  await node.collect();
};

describe('an image that was removed while somebody holds its mount', () => {
  let node: LazyNode;
  let images: PublishedImage[];
  let holder: ChildProcess | undefined;

  before(async () => {
    // Those that the kernel reads without dedupd keep their layers, too.
    node = await LazyNode.start({ config: { direct_mounts: false } });
    images = [];
    for (const mark of ['one', 'two', 'three'])
      images.push(await node.publish(`team/${mark}`, await smallLayers(mark)));
  });
  after(async () => {
    holder?.kill('SIGKILL');
    await node?.stop();
  });

  test('keeps its addresses until it is let go; then they are given again, and every byte is right', async () => {
    const [one, two, three] = images as [PublishedImage, PublishedImage, PublishedImage];
    const { root } = node.product;
    await node.rpull(one.lazy);
    assert.equal((await node.runScript(one.lazy, LOOK)).stdout, cold('one') + unread('one'));
    const stats = await json<Stats>(node, 'stats');
    const du = Number(execFileSync('du', ['-s', '-B1', join(root, 'chunks')], { encoding: 'utf8' }).split('\t')[0]);
    assert.ok(Math.abs(du - stats.disk_bytes) <= 64 * 1024, `du ${du}, stats ${stats.disk_bytes}`);
    assert.ok(stats.disk_bytes >= stats.present_bytes && stats.present_bytes >= 2 * FILE_BYTES);
    assert.equal(stats.dedup_ratio, stats.referenced_bytes / stats.chunk_bytes);
    const [image] = stats.images;
    assert.ok(image!.present_bytes >= 2 * FILE_BYTES && image!.present_bytes <= image!.total_bytes);
    assert.deepEqual([image!.pinned, image!.transport, image!.shared_bytes], [true, 'fuse', 0]);
    assert.match((await node.product.cli(['stats'])).stdout, /^disk .*\n(.*\n)*IMAGE +SIZE +PRESENT/);
    // An open file keeps what it is on, wherever that was mounted. Nobody has read this one yet in full.
    const [mounted] = readdirSync(join(root, 'mounts'));
    holder = spawn('sh', ['-c', 'exec 3<"$0"; exec sleep 600', join(root, 'mounts', mounted!, 'unread')], {
      stdio: 'ignore',
    });
    const file = `/proc/${holder.pid}/fd/3`;
    await waitFor('the holder to have it', () => existsSync(file));
    const given = addresses(node);
    await remove(node, one);
    assert.deepEqual(addresses(node), []);
    const held = await json<Collected>(node, 'gc');
    assert.equal(held.steps.find(({ step }) => step === 'free addresses')?.address_bytes, 0);
    assert.ok((await json<Stats>(node, 'stats')).quarantined_bytes >= 2 * FILE_BYTES);
    await node.rpull(two.lazy);
    assert.equal((await node.runScript(two.lazy, LOOK)).stdout, cold('two') + unread('two'));
    assert.ok(Math.min(...addresses(node)) > Math.max(...given));
    // Who holds it has no other's bytes: an error, as what is here of it is not its own any more.
    writeFileSync('/proc/sys/vm/drop_caches', '1');
    assert.throws(() => execFileSync('sha256sum', [file], { stdio: 'pipe' }), /Input\/output error/);
    holder.kill('SIGKILL');
    await waitFor('its loop devices to go', () => node.loops().length <= 2);
    const free = await json<Collected>(node, 'gc');
    assert.ok(free.steps.find(({ step }) => step === 'free addresses')!.address_bytes >= 2 * FILE_BYTES);
    await node.rpull(three.lazy);
    assert.equal((await node.runScript(three.lazy, LOOK)).stdout, cold('three') + unread('three'));
    assert.equal((await node.runScript(two.lazy, LOOK)).stdout, cold('two') + unread('two'));
    assert.ok(
      addresses(node).some((address) => address <= Math.max(...given)),
      'addresses of the first are given again',
    );
  });

  test('"gc" unmounts what nobody uses at once, and says what it did', async () => {
    const [, ...left] = images;
    assert.ok(node.loops().length > 0);
    const { stdout } = await node.product.cli(['gc']);
    assert.match(stdout, /^2 unused images unmounted, 0 B freed\n0 layers dropped, .*\n0 pieces evicted, .*\n/m);
    assert.match(stdout, /of address space can be given again\n.* freed in all\n$/);
    await waitFor('their devices to go', () => node.loops().length === 0);
    assert.equal((await json<Stats>(node, 'stats')).images[0]!.transport, '');
    const [two] = left;
    assert.equal((await node.runScript(two!.lazy, LOOK)).stdout, cold('two') + unread('two'), 'nothing was lost');
    for (const image of left) await remove(node, image);
    // A device goes a moment after its image was unmounted; until then nobody knows that nobody reads.
    await waitFor('the quarantine to end', async () => {
      await json<Collected>(node, 'gc');
      return (await json<Stats>(node, 'stats')).quarantined_bytes === 0;
    });
    const { disk_bytes, ...stats } = await json<Stats>(node, 'stats');
    assert.deepEqual([stats.images, stats.present_bytes, stats.quarantined_bytes], [[], 0, 0]);
    assert.ok(disk_bytes < 256 * 1024, `${disk_bytes} bytes are left on the disk`);
  });
});

describe('a quota', () => {
  let node: LazyNode;
  const quota = 8 << 20;

  before(async () => {
    node = await LazyNode.start({ config: { quota_bytes: quota, direct_mounts: false } });
  });
  after(() => node?.stop());

  test('is kept while containers read more than it holds, and they get every byte', async () => {
    const marks = ['one', 'two'];
    for (const mark of marks) {
      const image = await node.publish(`team/${mark}`, await smallLayers(mark));
      await node.rpull(image.lazy);
      await node.containerd.ctr(['run', '-d', '--snapshotter', 'dedup', image.lazy, mark, '/bin/sleep', '600']);
    }
    let execs = 0;
    const look = async (mark: string) =>
      (
        await node.containerd.ctr([
          ...['task', 'exec', '--exec-id', `e${++execs}`, mark],
          ...['/bin/sha256sum', '/cold', '/unread'],
        ])
      ).stdout;
    const present = async () => (await json<Stats>(node, 'stats')).present_bytes;
    for (const mark of marks) assert.equal(await look(mark), cold(mark) + unread(mark));
    assert.ok((await present()) > quota, 'what was used just now stays');
    await waitFor('the store to be within its quota', async () => (await present()) <= quota, 40_000);
    assert.ok((await json<Stats>(node, 'stats')).evicted_bytes > 0);
    writeFileSync('/proc/sys/vm/drop_caches', '1');
    node.proxy.reset();
    for (const mark of marks) assert.equal(await look(mark), cold(mark) + unread(mark));
    assert.ok(node.proxy.count({ method: 'GET', path: /blobs/ }).bytes > 0, 'some of it was fetched again');
    assert.doesNotMatch(node.product.log(), /the disk changed bytes/);
    for (const mark of marks) {
      await node.containerd.ctr(['task', 'kill', '-s', 'KILL', mark]);
      await waitFor('the container to end', async () => {
        const { code } = await node.containerd.ctr(['container', 'rm', mark], { allowFailure: true });
        return code === 0;
      });
    }
  });
});
