// What the store takes and for whom, and the steps of a collection that somebody asks for: the answers to the RPCs Space
// and Gc. Called by data-plane.ts; decides nothing itself.
import type { LayerRecord } from './chunks/index-protocol.ts';
import type { NodeStore } from './chunks/node-store.ts';
import type { GcProgressMessage, SpaceImageMessage, SpaceMessage } from './control-server.ts';
import type { MountTable } from './mount-table.ts';

export interface SpaceReportParts {
  readonly store: NodeStore;
  readonly mounts: MountTable;
  readonly layers: () => readonly LayerRecord[];
  /** Name of the transport that serves images. */
  readonly transport: string;
}

/** Everything that `dedup-snapshotter stats` shows. Errors: STORE_IO, CLOSED. */
export async function reportSpace({ store, mounts, layers, transport }: SpaceReportParts): Promise<SpaceMessage> {
  const stats = await store.stats();
  const { toPunchBytes, quarantinedBytes, freeBytes } = stats.freed;
  const mounted = new Map(mounts.list().map((image) => [image.id, image]));
  const rows = new Map(layers().map((row) => [row.id, row]));
  const records = new Map((await store.images()).map((image) => [image.id, image]));
  const images: SpaceImageMessage[] = [];
  for (const use of await store.imageUse()) {
    let present = 0;
    for (let i = 0; i + 1 < use.chunks.length; i += 2) present += store.presentIn(use.chunks[i]!, use.chunks[i + 1]!);
    const image = mounted.get(use.id);
    const top = rows.get(records.get(use.id)?.layers.at(-1) ?? -1);
    images.push({
      image_id: use.id,
      reference: [...(image?.holders.values() ?? [])][0] ?? top?.reference ?? '',
      total_bytes: use.totalBytes,
      present_bytes: present,
      shared_bytes: use.sharedBytes,
      pinned: use.pinned,
      transport: use.direct ? 'direct' : image === undefined ? '' : transport,
    });
  }
  return {
    disk_bytes: await store.diskBytes(),
    present_bytes: stats.presentBytes,
    quota_bytes: store.quotaBytes,
    chunks: stats.chunks,
    chunk_bytes: stats.chunkBytes,
    referenced_bytes: stats.referencedBytes,
    shared_chunks: stats.sharedChunks,
    shared_bytes: stats.sharedBytes,
    freed_bytes: toPunchBytes,
    quarantined_bytes: quarantinedBytes,
    free_bytes: freeBytes,
    evicted_bytes: stats.evictedBytes,
    images,
  };
}

export interface CollectionParts {
  readonly store: NodeStore;
  /** Unmounts images that nobody uses; how many. */
  readonly releaseIdle: () => Promise<number>;
  /** Drops layers that nobody names; how many. */
  readonly dropUnnamed: () => Promise<number>;
}

/** The steps of a collection, each told when it begins and when it has ended. Errors: those of the steps. */
export async function collectGarbage(
  { store, releaseIdle, dropUnnamed }: CollectionParts,
  show: (progress: GcProgressMessage) => void,
): Promise<void> {
  const step = async (name: string, work: () => Promise<{ count?: number; addressBytes?: number }>): Promise<void> => {
    show({ step: name, done: false, count: 0, disk_bytes: 0, address_bytes: 0 });
    const before = await store.diskBytes();
    const { count = 0, addressBytes = 0 } = await work();
    // Others may have stored something meanwhile.
    const freed = Math.max(0, before - (await store.diskBytes()));
    show({ step: name, done: true, count, disk_bytes: freed, address_bytes: addressBytes });
  };
  await step('release images', async () => ({ count: await releaseIdle() }));
  await step('drop layers', async () => ({ count: await dropUnnamed() }));
  await step('evict', async () => {
    const { evictedPieces } = await store.stats();
    await store.evictToQuota();
    return { count: (await store.stats()).evictedPieces - evictedPieces };
  });
  await step('free addresses', async () => {
    const { quarantinedBytes } = (await store.stats()).freed;
    await store.endQuarantine({ wait: true });
    return { addressBytes: Math.max(0, quarantinedBytes - (await store.stats()).freed.quarantinedBytes) };
  });
}
