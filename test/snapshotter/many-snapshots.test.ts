// Ten thousand snapshots, made through containerd: lists stay streams that wait for their reader, Stat answers meanwhile,
// and containerd's own walk sees every one.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { TestContainerd } from '../support/containerd.ts';
import { SnapshotsClient, TestService } from '../support/snapshots-service.ts';

const SNAPSHOTS = 10_000;
const BLOCK = 100;
/** Calls under way at a time. */
const AT_ONCE = 50;
/** Snapshots that containerd does not know. */
const FOREIGN = 300;
/** A kilobyte each, so that the whole list is far more than the socket's buffers take. */
const LABELS = { 'containerd.io/gc.root': 'kept', 'containerd.io/snapshot/filler': 'x'.repeat(1024) };

describe('ten thousand snapshots', () => {
  let service: TestService;
  let containerd: TestContainerd;
  let client: SnapshotsClient;

  before(async () => {
    service = await TestService.start();
    containerd = await TestContainerd.start({ proxies: { dedup: service.address } });
    client = new SnapshotsClient(containerd.address, { snapshotter: 'dedup', namespace: containerd.namespace });
    await prepare(client, 'key', SNAPSHOTS);
  });
  after(async () => {
    client?.close();
    await containerd?.stop();
    await service?.stop();
  });

  async function prepare(asked: SnapshotsClient, name: string, count: number): Promise<void> {
    for (let at = 0; at < count; at += AT_ONCE) {
      await Promise.all(Array.from({ length: AT_ONCE }, (_, i) => asked.prepare(`${name}-${at + i}`, '', LABELS)));
    }
  }

  test('are listed in blocks, no further ahead than the reader, and Stat answers meanwhile', async (t) => {
    const reads = t.mock.method(service.metastore, 'list').mock;
    let readAhead = 0;
    const blocks = await service.client.list([], async (block) => {
      if (readAhead > 0) return;
      // The reader pauses until the service has stopped reading for it.
      for (let seen = -1; seen !== reads.callCount(); await sleep(300)) seen = reads.callCount();
      readAhead = reads.callCount();
      for (const { name } of block) assert.equal((await service.client.stat(name)).name, name);
    });
    assert.ok(readAhead < SNAPSHOTS / BLOCK / 2, `${readAhead} blocks were read for a reader of one`);
    assert.ok(blocks.every((block) => block.length <= BLOCK));
    assert.equal(new Set(blocks.flat().map(({ name }) => name)).size, SNAPSHOTS);
  });

  test('are all seen through containerd, which asks for each while it lists', async () => {
    assert.equal(new Set(await client.names()).size, SNAPSHOTS);
    assert.deepEqual(await client.names('name==key-9999'), ['key-9999']);
  });

  test("are walked by containerd's collection: it keeps its own, all of them, and removes those it does not know", async () => {
    await prepare(service.client, 'foreign', FOREIGN);
    assert.equal((await service.client.names()).length, SNAPSHOTS + FOREIGN);
    // Only the removal of something of ours makes the collection look.
    await client.remove('key-0');
    await containerd.gc();
    const left = await service.client.names();
    assert.equal(left.length, SNAPSHOTS - 1);
    assert.deepEqual(
      left.filter((name) => name.includes('foreign')),
      [],
    );
  });
});
