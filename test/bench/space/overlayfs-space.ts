// What images take on the disk with containerd's own overlayfs snapshotter, one pulled after the other, and what the files in
// its snapshots would take if each content were kept once.
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { diskBytes } from '../../../src/bench/start.ts';
import { run, TestContainerd } from '../../support/containerd.ts';
import { UniqueBytes } from './unique-bytes.ts';

/** After an image, all of those before it included. Bytes. */
export interface OverlayfsSpace {
  readonly snapshotBytes: number;
  readonly contentBytes: number;
  readonly uniqueFileBytes: number;
  readonly uniquePartBytes: number;
  readonly uniqueWrittenBytes: number;
}

/** Pulls `references` into a containerd of its own, which is removed at the end. */
export async function overlayfsSpace(
  references: readonly string[],
  say: (text: string) => void,
): Promise<OverlayfsSpace[]> {
  const containerd = await TestContainerd.start({ lifetimeSeconds: 14_400 });
  try {
    const snapshotter = join(containerd.root, 'io.containerd.snapshotter.v1.overlayfs');
    const content = join(containerd.root, 'io.containerd.content.v1.content');
    const unique = new UniqueBytes();
    const walked = new Set<string>();
    const spaces: OverlayfsSpace[] = [];
    for (const reference of references) {
      say(`${reference}: pulling with overlayfs`);
      await containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference], {
        timeoutMs: 900_000,
      });
      // Space is given to files when they are written back.
      await run('sync', [], { timeoutMs: 300_000 });
      const [snapshotBytes, contentBytes] = [await diskBytes([snapshotter]), await diskBytes([content])];
      for (const id of await readdir(join(snapshotter, 'snapshots'))) {
        if (walked.has(id)) continue;
        walked.add(id);
        unique.addTree(join(snapshotter, 'snapshots', id, 'fs'));
      }
      spaces.push({
        snapshotBytes,
        contentBytes,
        uniqueFileBytes: unique.fileBytes,
        uniquePartBytes: unique.partBytes,
        uniqueWrittenBytes: unique.writtenBytes,
      });
    }
    return spaces;
  } finally {
    await containerd.stop();
  }
}
