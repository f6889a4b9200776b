// The semantic suite against our service: asked directly, and through containerd; and against containerd's own
// overlayfs, which shows that the suite asks for nothing special.

import { type SnapshotterUnderTest, snapshotterSuite } from '../suites/snapshotter.ts';
import { TestContainerd } from '../support/containerd.ts';
import { SnapshotsClient, TestService } from '../support/snapshots-service.ts';

snapshotterSuite('dedup, asked directly', async () => {
  const service = await TestService.start();
  return { client: service.client, stop: () => service.stop() };
});

/** A snapshotter of a containerd; a lease keeps its garbage collector away from what the suite makes. */
async function throughContainerd(
  snapshotter: string,
  proxies: Record<string, string>,
  stop: () => Promise<void>,
): Promise<SnapshotterUnderTest> {
  const containerd = await TestContainerd.start({ proxies });
  await containerd.ctr(['leases', 'create', '--id', 'suite']);
  const client = new SnapshotsClient(containerd.address, {
    snapshotter,
    namespace: containerd.namespace,
    lease: 'suite',
  });
  return {
    client,
    stop: async () => {
      client.close();
      await containerd.stop();
      await stop();
    },
  };
}

snapshotterSuite('dedup, through containerd', async () => {
  const service = await TestService.start();
  return throughContainerd('dedup', { dedup: service.address }, () => service.stop());
});

snapshotterSuite("containerd's overlayfs", () => throughContainerd('overlayfs', {}, async () => {}));
