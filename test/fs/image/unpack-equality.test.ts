// The mounted image against containerd's own unpack of the same layers on overlayfs, attribute by attribute.
import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { writeImage } from '../../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../../src/fs/image/merge.ts';
import { BLOCK_BYTES } from '../../../src/units.ts';
import { run, TestContainerd } from '../../support/containerd.ts';
import { mountErofs } from '../../support/erofs-mount.ts';
import {
  bottomLayer,
  middleLayer,
  topLayer,
  toTarEntries,
  undescribedDirectories,
} from '../../support/feature-layers.ts';
import { makeImage } from '../../support/images.ts';
import { type EntrySpec, FakeStore, makeLayer } from '../../support/layer-maker.ts';
import { assertSameTree } from '../../support/tree-walk.ts';

let dir: string;
let containerd: TestContainerd;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'equality-'));
  containerd = await TestContainerd.start();
});

after(async () => {
  await containerd?.stop();
  await rm(dir, { recursive: true, force: true });
});

/** Imports the layers into containerd and mounts its unpacked view at a new directory. */
async function unpackWithContainerd(layers: readonly (readonly EntrySpec[])[], tag: string): Promise<string> {
  const image = await makeImage({
    layers: layers.map((specs) => ({ entries: toTarEntries(specs), compression: 'none' as const })),
    into: join(dir, `layout-${tag}`),
    tag,
  });
  const archive = join(dir, `${tag}.tar`);
  execFileSync('tar', ['-C', image.dir, '-cf', archive, '.']);
  const name = `example.org/${tag}:latest`;
  await containerd.ctr(['images', 'import', '--no-unpack', '--index-name', name, archive]);
  const target = join(dir, `view-${tag}`);
  mkdirSync(target);
  await containerd.ctr(['images', 'mount', '--snapshotter', 'overlayfs', name, target]);
  return target;
}

async function compare(layers: readonly (readonly EntrySpec[])[], tag: string): Promise<void> {
  const view = await unpackWithContainerd(layers, tag);
  const store = new FakeStore(join(dir, `${tag}.store`));
  const made = layers.map((specs) => makeLayer(specs, store));
  const image = join(dir, `${tag}.erofs`);
  const fd = openSync(image, 'w');
  const tree = mergeLayers(
    made.map(({ entries }) => entries),
    { bottom: true },
  );
  writeImage(fd, tree, made, { kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES });
  closeSync(fd);
  store.close();
  execFileSync('fsck.erofs', [`--device=${store.path}`, image]);
  const mount = mountErofs(image, join(dir, `mount-${tag}`), { device: store.path });
  try {
    const undescribed = undescribedDirectories(layers);
    assertSameTree(mount.path, view, { ignoreMtimeOf: (path) => undescribed.has(path) });
  } finally {
    mount.close();
    await run('umount', [view]);
  }
}

test('one layer with everything a tar can hold looks as containerd unpacks it', async () => {
  await compare([bottomLayer()], 'one');
});

test('three merged layers look as overlayfs stacks them', async () => {
  await compare([bottomLayer(), middleLayer(), topLayer()], 'three');
});
