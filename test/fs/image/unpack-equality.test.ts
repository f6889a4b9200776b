// The mounted image against containerd's own unpack of the same layers on overlayfs, attribute by attribute: merged into
// one tree, split into segments, and mixed with layers that containerd unpacked.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { layersBelow } from '../../../src/fs/image/below.ts';
import { buildImage, type SegmentBelow } from '../../../src/fs/image/build-image.ts';
import { writeImage } from '../../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../../src/fs/image/merge.ts';
import { encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { BLOCK_BYTES } from '../../../src/units.ts';
import { TestContainerd } from '../../support/containerd.ts';
import { mountErofs, type TestMount } from '../../support/erofs-mount.ts';
import {
  bottomLayer,
  middleLayer,
  topLayer,
  toTarEntries,
  undescribedDirectories,
} from '../../support/feature-layers.ts';
import { makeImage } from '../../support/images.ts';
import { type EntrySpec, FakeStore, layerIndexOf, type MadeLayer, makeLayer } from '../../support/layer-maker.ts';
import { randomLayers } from '../../support/random-layers.ts';
import { assertSameRows, assertSameTree, walkTree } from '../../support/tree-walk.ts';

const LAYERS = [bottomLayer(), middleLayer(), topLayer()];
const undescribed = undescribedDirectories(LAYERS);
const COMPARE = { ignoreMtimeOf: (path: string) => undescribed.has(path) };

let dir: string;
let containerd: TestContainerd;
let store: FakeStore;
let made: { readonly layer: MadeLayer; readonly index: string }[];
/** containerd's view of the three layers, and the directories it unpacked them to, bottom to top. */
let view: string;
let unpacked: string[];
/** Views that containerd mounted. */
const views: string[] = [];

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'equality-'));
  containerd = await TestContainerd.start();
  store = new FakeStore(join(dir, 'store'));
  made = LAYERS.map((specs, i) => {
    const layer = makeLayer(specs, store);
    const index = join(dir, `${i}.index`);
    writeFileSync(index, encodeLayerIndex(layerIndexOf(layer)));
    return { layer, index };
  });
  view = await unpackWithContainerd(LAYERS, 'three');
  unpacked = lowersOf(view);
});

/** Lower directories of a mounted overlay, bottom to top. */
function lowersOf(mountPoint: string): string[] {
  const options = readFileSync('/proc/self/mounts', 'utf8')
    .split('\n')
    .find((line) => line.split(' ')[1] === mountPoint)!;
  return /lowerdir=([^, ]+)/.exec(options)![1]!.split(':').reverse();
}

after(async () => {
  for (const path of views) execFileSync('umount', [path]);
  store?.close();
  await containerd?.stop();
  await rm(dir, { recursive: true, force: true });
});

/** Imports the layers into containerd and mounts its unpacked view at a new directory; undefined when it refuses them. */
async function tryUnpack(layers: readonly (readonly EntrySpec[])[], tag: string): Promise<string | undefined> {
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
  const mount = ['images', 'mount', '--snapshotter', 'overlayfs', name, target];
  const { code } = await containerd.ctr(mount, { allowFailure: true });
  if (code !== 0) return undefined;
  views.push(target);
  return target;
}

async function unpackWithContainerd(layers: readonly (readonly EntrySpec[])[], tag: string): Promise<string> {
  const target = await tryUnpack(layers, tag);
  assert.ok(target !== undefined, `containerd refuses the layers of ${tag}`);
  return target;
}

/** Builds and mounts layers [first, last] as one segment. */
async function mountSegment(first: number, last: number, below: readonly SegmentBelow[]): Promise<TestMount> {
  const output = join(dir, `segment-${first}-${last}.erofs`);
  await buildImage({
    layers: made.slice(first, last + 1).map(({ layer, index }) => ({ index, addresses: layer.addresses })),
    bottom: first === 0,
    layout: { kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES },
    output,
    below,
  });
  execFileSync('fsck.erofs', [`--device=${store.path}`, output]);
  return mountErofs(output, join(dir, `mount-${first}-${last}`), { device: store.path });
}

/** Stacks `lowers`, bottom to top, with overlayfs as a container would have them. */
function onStack(lowers: readonly string[], look: (stack: string) => void): void {
  const target = join(dir, 'stack');
  for (const name of ['stack', 'upper', 'work']) mkdirSync(join(dir, name));
  const options = `lowerdir=${[...lowers].reverse().join(':')},upperdir=${dir}/upper,workdir=${dir}/work,index=off`;
  try {
    execFileSync('mount', ['-t', 'overlay', 'overlay', '-o', options, target]);
    try {
      look(target);
    } finally {
      execFileSync('umount', [target]);
    }
  } finally {
    rmdirSync(target);
    execFileSync('rm', ['-rf', join(dir, 'upper'), join(dir, 'work')]);
  }
}

/** The same, compared with containerd's view. */
function compareStack(lowers: readonly string[]): void {
  onStack(lowers, (stack) => assertSameTree(stack, view, COMPARE));
}

const lazyBelow = (...layers: number[]): SegmentBelow => ({
  kind: 'layers',
  indexes: layers.map((layer) => made[layer]!.index),
});

test('one layer with everything a tar can hold looks as containerd unpacks it', async () => {
  const single = await unpackWithContainerd([LAYERS[0]!], 'one');
  const mount = await mountSegment(0, 0, []);
  try {
    assertSameTree(mount.path, single, COMPARE);
  } finally {
    mount.close();
  }
});

test('three merged layers look as overlayfs stacks them', async () => {
  const mount = await mountSegment(0, 2, []);
  try {
    assertSameTree(mount.path, view, COMPARE);
  } finally {
    mount.close();
  }
});

for (const split of [1, 2]) {
  test(`two lazy segments split before layer ${split} look as overlayfs stacks the layers`, async () => {
    const lower = await mountSegment(0, split - 1, []);
    try {
      const upper = await mountSegment(split, 2, [lazyBelow(...[0, 1].slice(0, split))]);
      try {
        compareStack([lower.path, upper.path]);
      } finally {
        upper.close();
      }
    } finally {
      lower.close();
    }
  });
}

test('a chain lazy, normal, lazy looks as overlayfs stacks the layers', async () => {
  const lower = await mountSegment(0, 0, []);
  try {
    const upper = await mountSegment(2, 2, [{ kind: 'directory', path: unpacked[1]! }, lazyBelow(0)]);
    try {
      compareStack([lower.path, unpacked[1]!, upper.path]);
    } finally {
      upper.close();
    }
  } finally {
    lower.close();
  }
});

test('a chain normal, lazy looks as overlayfs stacks the layers', async () => {
  const upper = await mountSegment(1, 2, [{ kind: 'directory', path: unpacked[0]! }]);
  try {
    compareStack([unpacked[0]!, upper.path]);
  } finally {
    upper.close();
  }
});

test('a chain lazy, normal looks as overlayfs stacks the layers', async () => {
  const lower = await mountSegment(0, 1, []);
  try {
    compareStack([lower.path, unpacked[2]!]);
  } finally {
    lower.close();
  }
});

/** Seeds whose layers met a rule that an earlier merge got wrong, and some that any merge gets right. */
const SEEDS = [1, 2, 3, 4, 1024, 1050, 1054, 1104, 1124, 1160, 1302];

test('random layers, whichever of them are lazy, look as overlayfs stacks them', async () => {
  let compared = 0;
  for (const seed of SEEDS) {
    const specs = randomLayers(seed, 3, 12);
    const expected = await tryUnpack(specs, `random-${seed}`);
    if (expected === undefined) continue;
    const rows = walkTree(expected);
    const directories = lowersOf(expected);
    const parts = specs.map((layer, i) => {
      const made = makeLayer(layer, store);
      const index = join(dir, `random-${seed}-${i}.index`);
      writeFileSync(index, encodeLayerIndex(layerIndexOf(made)));
      return { made, index, directory: directories[i]! };
    });
    // One bit for each layer that is unpacked; never all of them.
    for (let unpackedLayers = 0; unpackedLayers < 7; unpackedLayers++) {
      const segments: (typeof parts)[] = [];
      parts.forEach((part, i) => {
        const last = segments.at(-1);
        const joins = i > 0 && ((unpackedLayers >> (i - 1)) & 3) === 0;
        if (joins && last !== undefined) last.push(part);
        else segments.push([part]);
      });
      const isUnpacked = (segment: typeof parts): boolean => ((unpackedLayers >> parts.indexOf(segment[0]!)) & 1) === 1;
      const mounts: TestMount[] = [];
      try {
        const lowers = segments.map((segment, position) => {
          if (isUnpacked(segment)) return segment[0]!.directory;
          const below = segments
            .slice(0, position)
            .reverse()
            .map(
              (lower): SegmentBelow =>
                isUnpacked(lower)
                  ? { kind: 'directory', path: lower[0]!.directory }
                  : { kind: 'layers', indexes: lower.map(({ index }) => index) },
            );
          const name = `random-${seed}-${unpackedLayers}-${position}`;
          const mount = mountLayers(
            name,
            segment.map(({ made }) => made),
            below,
          );
          mounts.push(mount);
          return mount.path;
        });
        // Paths through symlinks touch directories at other paths than their own: no rule says which times are the unpack's.
        onStack(lowers, (stack) => assertSameRows(walkTree(stack), rows, { ignoreMtimeOf: () => true }));
        compared++;
      } finally {
        for (const mount of mounts) mount.close();
      }
    }
  }
  assert.ok(compared >= 7 * 8, `only ${compared} chains were compared: containerd refuses the rest`);
});

/** Builds, checks and mounts a segment; `below` top to bottom, empty for the bottom one. */
function mountLayers(name: string, layers: readonly MadeLayer[], below: readonly SegmentBelow[]): TestMount {
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
