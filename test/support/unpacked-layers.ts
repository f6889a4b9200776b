// Layers as containerd's own unpack leaves them on disk, stacks of such directories and of mounted images, and images
// built from layers in this process: what tests of tree equality compare.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { layersBelow } from '../../src/fs/image/below.ts';
import type { SegmentBelow } from '../../src/fs/image/build-image.ts';
import { type LayerContent, writeImage } from '../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../src/fs/image/merge.ts';
import type { EntryTable } from '../../src/fs/index/layer-index.ts';
import { BLOCK_BYTES } from '../../src/units.ts';
import { TestContainerd } from './containerd.ts';
import { mountErofs, type TestMount } from './erofs-mount.ts';
import { toTarEntries } from './feature-layers.ts';
import { type LayerSource, makeImage } from './images.ts';
import type { EntrySpec, FakeStore } from './layer-maker.ts';

export function layerSource(specs: readonly EntrySpec[]): LayerSource {
  return { entries: toTarEntries(specs), compression: 'none' };
}

/** A containerd whose overlayfs snapshotter unpacks layers. */
export class Unpacker {
  readonly #containerd: TestContainerd;
  readonly #dir: string;
  readonly #views: string[] = [];

  private constructor(containerd: TestContainerd, dir: string) {
    this.#containerd = containerd;
    this.#dir = dir;
  }

  /** Works in `dir`, which exists. */
  static async start(dir: string): Promise<Unpacker> {
    return new Unpacker(await TestContainerd.start(), dir);
  }

  /** Has the layers, bottom to top, unpacked and mounts containerd's view of them; undefined when it refuses them. */
  async tryUnpack(layers: readonly LayerSource[], tag: string): Promise<string | undefined> {
    const image = await makeImage({ layers, into: join(this.#dir, `layout-${tag}`), tag });
    const archive = join(this.#dir, `${tag}.tar`);
    execFileSync('tar', ['-C', image.dir, '-cf', archive, '.']);
    const name = `example.org/${tag}:latest`;
    await this.#containerd.ctr(['images', 'import', '--no-unpack', '--index-name', name, archive]);
    const target = join(this.#dir, `view-${tag}`);
    mkdirSync(target);
    const mount = ['images', 'mount', '--snapshotter', 'overlayfs', name, target];
    const { code } = await this.#containerd.ctr(mount, { allowFailure: true });
    if (code !== 0) return undefined;
    this.#views.push(target);
    return target;
  }

  async unpack(layers: readonly LayerSource[], tag: string): Promise<string> {
    const target = await this.tryUnpack(layers, tag);
    assert.ok(target !== undefined, `containerd refuses the layers of ${tag}`);
    return target;
  }

  async stop(): Promise<void> {
    for (const path of this.#views.splice(0)) execFileSync('umount', [path]);
    await this.#containerd.stop();
  }
}

/** Lower directories of a mounted overlay, bottom to top. */
export function lowersOf(mountPoint: string): string[] {
  const options = readFileSync('/proc/self/mounts', 'utf8')
    .split('\n')
    .find((line) => line.split(' ')[1] === mountPoint)!;
  return /lowerdir=([^, ]+)/.exec(options)![1]!.split(':').reverse();
}

/** Stacks `lowers`, bottom to top, with overlayfs as a container would have them. Works in `dir`. */
export function onStack(dir: string, lowers: readonly string[], look: (stack: string) => void): void {
  const base = mkdtempSync(join(dir, 'stack-'));
  const [stack, upper, work] = ['stack', 'upper', 'work'].map((name) => join(base, name)) as [string, string, string];
  try {
    for (const path of [stack, upper, work]) mkdirSync(path);
    const options = `lowerdir=${[...lowers].reverse().join(':')},upperdir=${upper},workdir=${work},index=off`;
    execFileSync('mount', ['-t', 'overlay', 'overlay', '-o', options, stack]);
    try {
      look(stack);
    } finally {
      execFileSync('umount', [stack]);
    }
  } finally {
    rmSync(base, { recursive: true });
  }
}

/**
 * Builds, checks and mounts one segment of `layers`, bottom to top, at a new directory in `dir`; `below` top to bottom,
 * empty for the bottom one.
 */
export function mountLayers(
  dir: string,
  name: string,
  layers: readonly (LayerContent & { readonly entries: EntryTable })[],
  store: FakeStore,
  below: readonly SegmentBelow[] = [],
): TestMount {
  const tree = mergeLayers(
    layers.map(({ entries }) => entries),
    { bottom: below.length === 0, below: layersBelow(below) },
  );
  const image = join(dir, `${name}.erofs`);
  const fd = openSync(image, 'w');
  writeImage(fd, tree, layers, { kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES });
  closeSync(fd);
  execFileSync('fsck.erofs', [`--device=${store.path}`, image]);
  return mountErofs(image, join(dir, name), { device: store.path });
}
