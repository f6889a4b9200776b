// Ordinary layers as containerd's unpack makes them, one file each, and what the mounts answered for a key name. For tests of
// their conversion.
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { digestOf } from '../../src/digest.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import type { SnapshotsClient } from './snapshots-service.ts';

/** What containerd's CRI sends with a layer, but for an index. */
export function unpackLabels(layer: string): Record<string, string> {
  return {
    'containerd.io/snapshot.ref': chainOf(layer),
    'containerd.io/snapshot/cri.layer-digest': digestOf(layer),
    'containerd.io/snapshot/cri.image-ref': 'registry.test/app:1',
    'containerd.io/snapshot/cri.manifest-digest': digestOf('manifest'),
  };
}

export function chainOf(layer: string): string {
  return digestOf(`chain ${layer}`);
}

function option(mounts: readonly Mount[], name: string): string | undefined {
  return mounts[0]?.options.find((text) => text.startsWith(`${name}=`))?.slice(name.length + 1);
}

/** Where a writable snapshot is written to. */
export function upperOf(mounts: readonly Mount[]): string {
  return option(mounts, 'upperdir') ?? mounts[0]?.source ?? '';
}

/** Top to bottom; of a bind mount its source. */
export function lowersOf(mounts: readonly Mount[]): string[] {
  return option(mounts, 'lowerdir')?.split(':') ?? [mounts[0]?.source ?? ''];
}

/** Unpacks a layer that holds one file of its name; answers the name of its snapshot, which is its chain ID. */
export async function unpack(
  client: SnapshotsClient,
  layer: string,
  parent = '',
  labels: Record<string, string> = unpackLabels(layer),
): Promise<string> {
  const key = `ns/1/extract-1234-abcd ${chainOf(layer)}`;
  const mounts = await client.prepare(key, parent, labels);
  await writeFile(join(upperOf(mounts), layer), `content of ${layer}\n`.repeat(1000));
  const name = `ns/2/${chainOf(layer)}`;
  await client.commit(name, key, labels);
  return name;
}

/** Makes a change on top of `parent` and commits it, as a person does with `ctr snapshot`. */
export async function commitByHand(client: SnapshotsClient, file: string, parent: string): Promise<string> {
  const mounts = await client.prepare(`ns/3/work-${file}`, parent);
  await writeFile(join(upperOf(mounts), file), 'by hand\n');
  await client.commit(`ns/4/${file}`, `ns/3/work-${file}`);
  return `ns/4/${file}`;
}
