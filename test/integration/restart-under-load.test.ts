// Restarts while several containers run and read: of the service, with prepares and commits going on, and of dedupd, with
// the registry down. What containers have goes on, what answered stays, and what is missing comes right by itself.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFile, writeFile } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { COLD_STRIDE, ColdContainer } from '../support/cold-container.ts';
import { waitFor } from '../support/containerd.ts';
import { busyboxBinary } from '../support/images.ts';
import { LazyNode } from '../support/lazy-node.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

const CONTAINERS = 3;
const FILES = 130;
/** Files from here on are not read before the registry is down. */
const UNREAD_FROM = 98;
/** Files below UNREAD_FROM that each container reads cold while the service restarts. */
const COLD_READS = 14;
/** gRPC status UNAVAILABLE: what a client is answered while the service is away. */
const UNAVAILABLE = 14;
const BLOB = /\/blobs\//;
/** Files of each container that are here when the registry goes; each is in a span of its own. */
const PRESENT = Array.from({ length: 6 }, (_, i) => i * COLD_STRIDE);

describe('several containers that run', () => {
  let node: LazyNode;
  const containers: ColdContainer[] = [];

  before(async () => {
    node = await LazyNode.start({ config: { prefetch: { enabled: false } } });
    for (let i = 0; i < CONTAINERS; i++)
      containers.push(await ColdContainer.start(node, `busy-${i}`, `under load ${i}`, FILES));
  });
  after(() => node?.stop());

  async function allRun(): Promise<boolean> {
    return (await Promise.all(containers.map((one) => one.runs()))).every(Boolean);
  }

  test('notice nothing when the service restarts under prepares and commits, and every answered commit stays', async (t) => {
    // Every read waits a little: a whole image lasts longer than the restarts.
    node.proxy.setRules({ path: BLOB, fault: { kind: 'delay', ms: 600 } });
    let goesOn = true;
    const wrong: string[] = [];
    let reads = 0;
    const reader = async (container: ColdContainer): Promise<void> => {
      for (let round = 0; goesOn; round++) {
        // Backwards: nobody reads ahead of that. When all are read, again, slowly.
        const i = UNREAD_FROM - 1 - (round % COLD_READS) * COLD_STRIDE;
        if (round >= COLD_READS) await sleep(100);
        const sum = await container.read(i);
        if (sum !== container.sumOf(i)) wrong.push(`${container.name}, f${i}: ${sum}`);
        reads++;
      }
    };
    const committed: string[] = [];
    let refusals = 0;
    /** Prepares and commits in chains, as pulls do. */
    const committer = async (name: string, client: SnapshotsClient): Promise<void> => {
      let parent = '';
      for (let i = 0; goesOn; i++) {
        const layer = `${name}-layer-${i}`;
        try {
          await client.prepare(`${name}-key-${i}`, parent);
          await client.commit(layer, `${name}-key-${i}`);
          committed.push(layer);
          parent = i % 20 === 19 ? '' : layer;
        } catch (error) {
          if ((error as { code?: number }).code !== UNAVAILABLE) throw error;
          refusals++;
          await sleep(100);
        }
      }
    };
    await node.containerd.ctr(['leases', 'create', '--id', 'load']);
    const { address, namespace } = node.containerd;
    const through = new SnapshotsClient(address, { snapshotter: 'dedup', namespace, lease: 'load' });
    const work = [...containers.map(reader), committer('through', through)];
    const load = Promise.all(work);
    load.catch(() => undefined); // Awaited below; until then the other checks tell more.
    try {
      for (const signal of ['SIGTERM', 'SIGKILL', 'SIGTERM'] as const) {
        const before = committed.length;
        await waitFor('commits', () => committed.length > before + 5);
        await node.product.stopService(signal);
        const readBefore = reads;
        await waitFor('reads while the service is away', () => reads >= readBefore + CONTAINERS);
        await node.startService();
      }
      const last = committed.length;
      await waitFor('commits after the last start', () => committed.length > last + 5);
    } finally {
      goesOn = false;
      await load.finally(() => through.close());
    }
    t.diagnostic(`${reads} reads, ${committed.length} commits, ${refusals} refused while the service was away`);
    assert.deepEqual(wrong, []);
    assert.ok(refusals > 0, 'the restarts were felt');
    assert.ok(await allRun());
    const own = node.snapshots();
    const names = new Set((await own.names()).map((name) => name.replace(/^[^/]+\/\d+\//, '')));
    own.close();
    assert.deepEqual(
      committed.filter((name) => !names.has(name)),
      [],
    );
    await node.containerd.ctr(['leases', 'rm', '--sync', 'load']);
    await node.collect();
  });

  /** The last file that nothing is recorded of: not read, nor fetched with others. */
  function lastUnknown(container: ColdContainer): number {
    for (let i = FILES - 1; i > UNREAD_FROM; i--) {
      const digest = container.sumOf(i);
      if (node.indexCount(`SELECT durable FROM chunks WHERE digest = x'${digest}'`) === 0) return i;
    }
    throw new Error(`everything of ${container.name} is here`);
  }

  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    test(`with the registry down, dedupd restarted by ${signal}: what is here is read, the rest fails and comes right later`, async () => {
      node.proxy.reset();
      const busybox = createHash('sha256')
        .update(await readFile(await busyboxBinary()))
        .digest('hex');
      const here = new Set<string>();
      for (const container of containers) {
        assert.equal(await container.readPath('/bin/busybox'), busybox);
        for (const i of PRESENT) {
          here.add(container.sumOf(i));
          assert.equal(await container.read(i), container.sumOf(i));
        }
      }
      // A kill loses what index.db has not heard of yet. busybox is cut into several chunks.
      const whole = 'durable = (1 << ((size + piece_bytes - 1) / piece_bytes)) - 1';
      const files = [...here].map((digest) => `x'${digest}'`).join();
      const recorded = `SELECT COUNT(*) FROM chunks WHERE digest IN (${files}) AND ${whole}`;
      const bottom = containers[0]?.published.image.layers[0]?.digest;
      const program = `SELECT COUNT(*) FROM chunks WHERE size > 4096 AND NOT ${whole} AND id IN (SELECT chunk_id
        FROM layer_chunks WHERE layer_id IN (SELECT id FROM layers WHERE digest = '${bottom}'))`;
      await waitFor(
        'everything to be recorded',
        () => node.indexCount(recorded) === here.size && node.indexCount(program) === 0,
      );

      await node.registry.halt();
      const pid = await node.product.daemonPid();
      await node.product.stopDaemon(signal);
      await waitFor('the next dedupd', () =>
        node.product.daemonPid().then(
          (next) => next !== pid,
          () => false,
        ),
      );
      await writeFile('/proc/sys/vm/drop_caches', '1');
      const missing = containers.map(lastUnknown);
      const fails = Promise.all(containers.map((container, at) => container.read(missing[at]!)));
      fails.catch(() => undefined); // Awaited below.
      for (const container of containers) {
        for (const i of PRESENT) assert.equal(await container.read(i), container.sumOf(i), `${container.name}, f${i}`);
        assert.equal(await container.readPath('/bin/busybox'), busybox);
      }
      assert.deepEqual(
        await fails,
        containers.map(() => 'EIO'),
      );
      assert.ok(await allRun());
      const [{ published } = assert.fail()] = containers;
      const { stdout } = await node.runScript(published.lazy, 'sha256sum < /data/f0');
      assert.equal(stdout, `${containers[0]?.sumOf(0)}  -\n`);

      await node.registry.launch();
      for (const [at, container] of containers.entries()) {
        const file = missing[at]!;
        await waitFor(`${container.name} to read`, async () => (await container.read(file)) === container.sumOf(file));
      }
      assert.ok(await allRun());
    });
  }

  test('are removed, and nothing of them is left', async () => {
    for (const container of containers) {
      await container.remove();
      await node.containerd.ctr(['image', 'rm', '--sync', container.published.lazy]);
    }
    await node.collect();
    assert.deepEqual(node.loops(), []);
    assert.deepEqual(node.remoteSnapshots(), []);
  });
});
