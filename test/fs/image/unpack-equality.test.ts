// The mounted image against containerd's own unpack of the same layers on overlayfs, attribute by attribute: merged into
// one tree, split into segments, and mixed with layers that containerd unpacked.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { buildImage, type SegmentBelow } from '../../../src/fs/image/build-image.ts';
import { encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { BLOCK_BYTES } from '../../../src/units.ts';
import { mountErofs, type TestMount } from '../../support/erofs-mount.ts';
import { bottomLayer, middleLayer, topLayer, undescribedDirectories } from '../../support/feature-layers.ts';
import { FakeStore, layerIndexOf, type MadeLayer, makeLayer } from '../../support/layer-maker.ts';
import { randomLayers } from '../../support/random-layers.ts';
import { assertSameRows, assertSameTree, walkTree } from '../../support/tree-walk.ts';
import { layerSource, lowersOf, mountLayers, onStack, Unpacker } from '../../support/unpacked-layers.ts';

const LAYERS = [bottomLayer(), middleLayer(), topLayer()];
const undescribed = undescribedDirectories(LAYERS);
const COMPARE = { ignoreMtimeOf: (path: string) => undescribed.has(path) };

let dir: string;
let unpacker: Unpacker;
let store: FakeStore;
let made: { readonly layer: MadeLayer; readonly index: string }[];
/** containerd's view of the three layers, and the directories it unpacked them to, bottom to top. */
let view: string;
let unpacked: string[];

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'equality-'));
  unpacker = await Unpacker.start(dir);
  store = new FakeStore(join(dir, 'store'));
  made = LAYERS.map((specs, i) => {
    const layer = makeLayer(specs, store);
    const index = join(dir, `${i}.index`);
    writeFileSync(index, encodeLayerIndex(layerIndexOf(layer)));
    return { layer, index };
  });
  view = await unpacker.unpack(LAYERS.map(layerSource), 'three');
  unpacked = lowersOf(view);
});

after(async () => {
  await unpacker?.stop();
  store?.close();
  await rm(dir, { recursive: true, force: true });
});

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

/** Stacks `lowers`, bottom to top, and compares with containerd's view. */
function compareStack(lowers: readonly string[]): void {
  onStack(dir, lowers, (stack) => assertSameTree(stack, view, COMPARE));
}

const lazyBelow = (...layers: number[]): SegmentBelow => ({
  kind: 'layers',
  indexes: layers.map((layer) => made[layer]!.index),
});

test('one layer with everything a tar can hold looks as containerd unpacks it', async () => {
  const single = await unpacker.unpack([layerSource(LAYERS[0]!)], 'one');
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
    const expected = await unpacker.tryUnpack(specs.map(layerSource), `random-${seed}`);
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
          const layers = segment.map(({ made }) => made);
          const mount = mountLayers(dir, name, layers, store, below);
          mounts.push(mount);
          return mount.path;
        });
        // Paths through symlinks touch directories at other paths than their own: no rule says which times are the unpack's.
        onStack(dir, lowers, (stack) => assertSameRows(walkTree(stack), rows, { ignoreMtimeOf: () => true }));
        compared++;
      } finally {
        for (const mount of mounts) mount.close();
      }
    }
  }
  assert.ok(compared >= 7 * 8, `only ${compared} chains were compared: containerd refuses the rest`);
});
