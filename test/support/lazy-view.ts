// What end-to-end tests of file trees need of a LazyNode beside running containers: images that are lazy in some layers
// only, and snapshots mounted where the test can walk them.
import { createHash } from 'node:crypto';
import { readdir, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from './containerd.ts';
import type { LazyNode } from './lazy-node.ts';
import { assertSameRows, walkTreeApart } from './tree-walk.ts';

const INDEX_ANNOTATION = 'containerd.io/snapshot/dedup.index';
const ACCEPT = 'application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json';

interface Descriptor {
  readonly mediaType: string;
  readonly digest: string;
  readonly size: number;
  readonly annotations?: Record<string, string>;
  readonly platform?: { readonly os: string; readonly architecture: string };
}

interface Manifest {
  readonly mediaType?: string;
  readonly manifests?: readonly Descriptor[];
  readonly layers?: Descriptor[];
}

async function getManifest(node: LazyNode, repository: string, reference: string): Promise<Manifest> {
  const url = `http://${node.registry.host}/v2/${repository}/manifests/${reference}`;
  const response = await fetch(url, { headers: { accept: ACCEPT } });
  if (!response.ok) throw new Error(`GET ${url}: ${response.status}`);
  return (await response.json()) as Manifest;
}

/** The image manifest behind an annotated tag. */
async function imageManifest(node: LazyNode, repository: string, tag: string): Promise<Manifest> {
  const root = await getManifest(node, repository, tag);
  if (root.manifests === undefined) return root;
  const image = root.manifests.find(({ platform }) => platform?.os === 'linux');
  if (image === undefined) throw new Error(`${repository}:${tag} holds no image`);
  return await getManifest(node, repository, image.digest);
}

/** Pushes a copy of an annotated image in which the layers at these positions name no index. Answers its reference. */
export async function withoutIndexes(
  node: LazyNode,
  repository: string,
  tag: string,
  positions: readonly number[],
): Promise<string> {
  const manifest = await imageManifest(node, repository, tag);
  for (const [position, layer] of (manifest.layers ?? []).entries()) {
    if (layer.annotations?.[INDEX_ANNOTATION] === undefined)
      throw new Error(`layer ${position} of ${tag} has no index`);
    if (positions.includes(position)) delete layer.annotations[INDEX_ANNOTATION];
  }
  const body = JSON.stringify(manifest);
  const newTag = `without-${positions.join('-')}-${createHash('sha256').update(body).digest('hex').slice(0, 8)}`;
  const url = `http://${node.registry.host}/v2/${repository}/manifests/${newTag}`;
  const type = manifest.mediaType ?? 'application/vnd.oci.image.manifest.v1+json';
  const response = await fetch(url, { method: 'PUT', headers: { 'content-type': type }, body });
  if (!response.ok) throw new Error(`PUT ${url}: ${response.status} ${await response.text()}`);
  return `${node.proxy.host}/${repository}:${newTag}`;
}

export interface TreeView {
  readonly path: string;
  close(): Promise<void>;
}

let views = 0;

/**
 * What a container on this snapshot sees, mounted where the test can walk it. `parent` is a chain ID. An active snapshot,
 * not a view: ctr keeps only those from containerd's collection.
 */
export async function openView(
  node: Pick<LazyNode, 'containerd'>,
  snapshotter: string,
  parent: string,
): Promise<TreeView> {
  const { containerd } = node;
  const key = `walk-${process.pid}-${++views}`;
  const path = await containerd.scratch(key);
  const { stdout } = await containerd.ctr([
    'snapshots',
    '--snapshotter',
    snapshotter,
    'prepare',
    '--target',
    path,
    key,
    parent,
  ]);
  const commands = stdout.split('\n').filter((line) => line !== '');
  for (const command of commands) await run('sh', ['-c', command]);
  return {
    path,
    async close() {
      await run('umount', [path]);
      await containerd.ctr(['snapshots', '--snapshotter', snapshotter, 'rm', key]);
      await rmdir(path);
    },
  };
}

/** Runs fsck.erofs over the metadata of every image the node has built; how many there were. */
export async function checkMetadata(node: LazyNode): Promise<number> {
  const { root } = node.product;
  const names = (await readdir(join(root, 'images'))).filter((name) => name.endsWith('.erofs'));
  for (const name of names) {
    await run('fsck.erofs', [`--device=${join(root, 'chunks', 'store')}`, join(root, 'images', name)]);
  }
  return names.length;
}

/** Compares what overlayfs and ours show of an image that both snapshotters have, row by row and byte by byte. */
export async function assertSameViews(node: LazyNode, chainId: string): Promise<void> {
  const expected = await openView(node, 'overlayfs', chainId);
  const actual = await openView(node, 'dedup', chainId);
  try {
    const rows = await walkTreeApart(expected.path);
    const directories = rows.filter(({ type }) => type === 'directory').map(({ path }) => path);
    // Of those that no layer describes, each unpack has its own time.
    assertSameRows(await walkTreeApart(actual.path), rows, { ignoreMtimeOf: directories });
  } finally {
    await actual.close();
    await expected.close();
  }
}
