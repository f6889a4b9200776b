// What containerd still records of snapshots that the snapshotter has lost: finds and removes it, in one namespace.
// containerd does not heal that itself: it answers AlreadyExists from its own records, and hides them from lists.
import { type Digest, parseDigest } from '../digest.ts';
import { parseConfig, parseImageIndex, parseManifest } from '../fs/index/manifests.ts';
import { chainIds } from '../fs/registry/image-manifest.ts';
import { hasCode } from '../pull/containerd-calls.ts';
import type { ContainerdClient } from '../pull/containerd-client.ts';
import { MiB } from '../units.ts';

export interface RepairReport {
  /** Keys whose records were removed, in that order. */
  readonly removed: readonly string[];
  /** Keys whose records are stale too, but have a child that the snapshotter has, or that nobody names. */
  readonly kept: readonly string[];
  /** Images that must be pulled again, by name. */
  readonly images: readonly string[];
  /** Containers whose file system is lost, by id. */
  readonly containers: readonly string[];
}

/** Why what an image record leads to may have no snapshots. */
const NO_IMAGE = ['NOT_FOUND', 'REGISTRY_PROTOCOL', 'INVALID_ARGUMENT'] as const;

/** Manifests and configurations are a few KiB; more than this is none. */
const MAX_DOCUMENT_BYTES = 16 * MiB;

/**
 * Removes the records of snapshots that `snapshotter` does not have, children first. Keys are those that containers,
 * leases and the images' chains name: no list tells the others, and containerd collects what nothing refers to.
 * Errors: UNAVAILABLE when containerd or the snapshotter does not answer; then nothing more is removed.
 */
export async function removeStaleRecords(client: ContainerdClient, snapshotter: string): Promise<RepairReport> {
  const lost = new Map<string, boolean>();
  const isLost = async (key: string): Promise<boolean> => {
    const known = lost.get(key);
    if (known !== undefined) return known;
    const answer = !(await client.hasSnapshot(snapshotter, key));
    lost.set(key, answer);
    return answer;
  };

  const containers = await client.listContainers(snapshotter);
  const chains: { image: string; chain: readonly Digest[] }[] = [];
  for (const { name, target } of await client.listImages()) {
    for (const chain of await chainsOf(client, target)) chains.push({ image: name, chain });
  }
  // Children before parents: containers stand on chains, and a longer chain on a shorter one.
  const keys = new Set([
    ...containers.map(({ snapshotKey }) => snapshotKey),
    ...(await client.listLeasedSnapshots(snapshotter)),
  ]);
  const deepest = chains.flatMap(({ chain }) => chain.map((key, depth) => ({ key, depth })));
  for (const { key } of deepest.toSorted((a, b) => b.depth - a.depth)) {
    keys.delete(key); // A lease may name it as well, out of order.
    keys.add(key);
  }

  const removed: string[] = [];
  let kept: string[] = [];
  // Leases name their keys in no order: what had a child is tried again once the child may be gone.
  for (let left = [...keys], before = -1; left.length > 0 && removed.length > before; left = kept) {
    before = removed.length;
    kept = [];
    for (const key of left) {
      if (!(await isLost(key))) continue;
      try {
        if (await client.removeSnapshotRecord(snapshotter, key)) removed.push(key);
      } catch (error) {
        if (!hasCode(error, 'FAILED_PRECONDITION')) throw error;
        kept.push(key);
      }
    }
  }
  const gone = new Set([...removed, ...kept]);
  return {
    removed,
    kept,
    images: [...new Set(chains.filter(({ chain }) => chain.some((key) => gone.has(key))).map(({ image }) => image))],
    containers: containers.filter(({ snapshotKey }) => gone.has(snapshotKey)).map(({ id }) => id),
  };
}

/** The chain IDs, bottom to top, of every image that an image record leads to and whose configuration is here. */
async function chainsOf(client: ContainerdClient, target: Digest): Promise<Digest[][]> {
  const chains: Digest[][] = [];
  const queue = [target];
  const seen = new Set<Digest>();
  for (let digest = queue.shift(); digest !== undefined; digest = queue.shift()) {
    if (seen.has(digest)) continue;
    seen.add(digest);
    try {
      const bytes = await client.readContent(digest, MAX_DOCUMENT_BYTES);
      if (isImageIndex(bytes)) {
        queue.push(
          ...parseImageIndex(bytes, `image index ${digest}`).manifests.map((entry) => parseDigest(entry.digest)),
        );
        continue;
      }
      const { config } = parseManifest(bytes, `manifest ${digest}`);
      const configuration = await client.readContent(parseDigest(config.digest), MAX_DOCUMENT_BYTES);
      const { diffIds } = parseConfig(configuration, `configuration ${config.digest}`);
      chains.push(chainIds(diffIds.map(parseDigest)));
    } catch (error) {
      // Other platforms' manifests were never fetched; artifacts, and digests of another kind, are no images of ours.
      if (!NO_IMAGE.some((code) => hasCode(error, code))) throw error;
    }
  }
  return chains;
}

function isImageIndex(bytes: Buffer): boolean {
  try {
    return 'manifests' in (JSON.parse(bytes.toString()) as object);
  } catch {
    return false;
  }
}
