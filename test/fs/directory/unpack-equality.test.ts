// Layers that containerd unpacked, converted into images, against overlayfs on the directories themselves: attribute by
// attribute, each layer alone, and stacked with any of the others left as directories or lazy.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { chmodSync, linkSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { SegmentBelow } from '../../../src/fs/image/build-image.ts';
import { encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { convertedLayer } from '../../support/converted-layer.ts';
import type { TestMount } from '../../support/erofs-mount.ts';
import { featureLayers } from '../../support/feature-tars.ts';
import { FakeStore, layerIndexOf, type MadeLayer, makeLayer } from '../../support/layer-maker.ts';
import { randomLayers } from '../../support/random-layers.ts';
import { assertSameRows, assertSameTree, type TreeRow, walkTree } from '../../support/tree-walk.ts';
import { layerSource, lowersOf, mountLayers, onStack, Unpacker } from '../../support/unpacked-layers.ts';

/** One layer in every form that it may have in a chain. */
interface Forms {
  readonly directory: string;
  readonly converted: Layer;
  /** Indexed from its tar. */
  readonly lazy?: Layer;
}
interface Layer {
  readonly layer: MadeLayer;
  /** File of its index. */
  readonly index: string;
}
type Form = keyof Forms;

let dir: string;
let store: FakeStore;
let unpacker: Unpacker;
let features: readonly Forms[];
/** Of overlayfs on the directories of all feature layers. */
let expected: readonly TreeRow[];

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'converted-'));
  store = new FakeStore(join(dir, 'store'));
  unpacker = await Unpacker.start(dir);
  const directories = lowersOf(await unpacker.unpack(featureLayers(), 'features'));
  features = await Promise.all(
    directories.map(async (directory, i) => ({ directory, converted: await convertLayer(directory, `feature-${i}`) })),
  );
  expected = stackRows(directories);
});

after(async () => {
  await unpacker?.stop();
  store?.close();
  await rm(dir, { recursive: true, force: true });
});

async function convertLayer(directory: string, name: string): Promise<Layer> {
  const layer = await convertedLayer(directory, store);
  const index = join(dir, `${name}.index`);
  writeFileSync(index, layer.indexBlob);
  return { layer, index };
}

function stackRows(lowers: readonly string[]): TreeRow[] {
  let rows: TreeRow[] = [];
  onStack(dir, lowers, (stack) => {
    rows = walkTree(stack);
  });
  return rows;
}

/** Mounts the chain with each layer, bottom to top, in the form given for it, and gives its lowers to `look`. */
function onChain(layers: readonly Forms[], forms: readonly Form[], look: (lowers: readonly string[]) => void): void {
  const segments: { readonly directory?: string; readonly layers: Layer[] }[] = [];
  layers.forEach((layer, i) => {
    const form = forms[i]!;
    const last = segments.at(-1);
    if (form === 'directory') segments.push({ directory: layer.directory, layers: [] });
    else if (last !== undefined && last.directory === undefined) last.layers.push(layer[form]!);
    else segments.push({ layers: [layer[form]!] });
  });
  const mounts: TestMount[] = [];
  try {
    const lowers = segments.map((segment, position) => {
      if (segment.directory !== undefined) return segment.directory;
      const below = segments
        .slice(0, position)
        .reverse()
        .map(
          (lower): SegmentBelow =>
            lower.directory === undefined
              ? { kind: 'layers', indexes: lower.layers.map(({ index }) => index) }
              : { kind: 'directory', path: lower.directory },
        );
      const name = `${forms.join('-')}-${position}`;
      const mount = mountLayers(
        dir,
        name,
        segment.layers.map(({ layer }) => layer),
        store,
        below,
      );
      mounts.push(mount);
      return mount.path;
    });
    look(lowers);
  } finally {
    for (const mount of mounts) mount.close();
  }
}

test('a converted layer alone, mounted, is the directory; its root is that of a fresh snapshot', () => {
  onChain([features[0]!], ['converted'], ([mounted]) => {
    // An image was made at no time.
    assertSameTree(mounted!, features[0]!.directory, { ignoreMtimeOf: [''] });
  });
});

for (let i = 0; i < 4; i++) {
  test(`converted layer ${i} below a container looks as its directory does`, () => {
    onChain([features[i]!], ['converted'], (lowers) => {
      assertSameRows(stackRows(lowers), stackRows([features[i]!.directory]), { ignoreMtimeOf: [''] });
    });
  });
}

test('a chain looks the same whichever of its layers are converted', () => {
  for (let bits = 1; bits < 16; bits++) {
    const forms = features.map((_, i): Form => ((bits >> i) & 1 ? 'converted' : 'directory'));
    onChain(features, forms, (lowers) => assertSameRows(stackRows(lowers), expected, { ignoreMtimeOf: [''] }));
  }
});

/** Writes into a new upper directory, stacked by overlayfs on the bottom layer. */
function upperOf(name: string, options: string, write: (stack: string) => void): string {
  const upper = join(dir, name);
  const [work, stack] = [`${upper}-work`, `${upper}-stack`];
  for (const path of [upper, work, stack]) mkdirSync(path);
  const data = `lowerdir=${features[0]!.directory},upperdir=${upper},workdir=${work},index=off,${options}`;
  execFileSync('mount', ['-t', 'overlay', 'overlay', '-o', data, stack]);
  try {
    write(stack);
  } finally {
    execFileSync('umount', [stack]);
  }
  return upper;
}

test('a directory that overlayfs itself wrote looks the same converted; without the content it is left alone', async () => {
  const upper = upperOf('upper', 'metacopy=off,redirect_dir=off', (stack) => {
    for (const gone of ['empty', 'bin/a-link', 'dev', 'reborn', 'merge']) {
      rmSync(join(stack, gone), { recursive: true });
    }
    mkdirSync(join(stack, 'reborn'));
    mkdirSync(join(stack, 'merge'));
    writeFileSync(join(stack, 'merge/new'), 'new');
    chmodSync(join(stack, 'bin/su'), 0o4711);
    renameSync(join(stack, 'owned/file'), join(stack, 'owned/renamed'));
    linkSync(join(stack, 'etc/passwd'), join(stack, 'etc/link'));
  });
  const chain = [features[0]!, { directory: upper, converted: await convertLayer(upper, 'upper') }];
  const rows = stackRows([features[0]!.directory, upper]);
  for (const bottom of ['directory', 'converted'] as const) {
    onChain(chain, [bottom, 'converted'], (lowers) => {
      assertSameRows(stackRows(lowers), rows, { ignoreMtimeOf: [''] });
    });
  }
  const partial = upperOf('partial', 'metacopy=on,redirect_dir=on', (stack) => chmodSync(join(stack, 'bin/su'), 0o711));
  await assert.rejects(convertLayer(partial, 'partial'), /"bin\/su" has trusted.overlay.metacopy/);
});

/** Seeds whose layers met a rule that an earlier merge got wrong. */
const SEEDS = [1, 1024, 1302];

test('random layers look the same converted, as directories and lazy, merged with each other', async () => {
  let compared = 0;
  for (const seed of SEEDS) {
    const specs = randomLayers(seed, 3, 12);
    const view = await unpacker.tryUnpack(specs.map(layerSource), `random-${seed}`);
    if (view === undefined) continue;
    const directories = lowersOf(view);
    const rows = stackRows(directories);
    const chain: Forms[] = [];
    for (const [i, directory] of directories.entries()) {
      const converted = await convertLayer(directory, `random-${seed}-${i}`);
      const layer = makeLayer(specs[i]!, store);
      const index = join(dir, `random-${seed}-${i}-lazy.index`);
      writeFileSync(index, encodeLayerIndex(layerIndexOf(layer)));
      chain.push({ directory, converted, lazy: { layer, index } });
    }
    for (let bits = 1; bits < 8; bits++) {
      for (const other of ['directory', 'lazy'] as const) {
        const forms = chain.map((_, i): Form => ((bits >> i) & 1 ? 'converted' : other));
        // Of lazy layers no rule says which times are the unpack's.
        const ignoreMtimeOf = other === 'lazy' ? (): boolean => true : [''];
        onChain(chain, forms, (lowers) => assertSameRows(stackRows(lowers), rows, { ignoreMtimeOf }));
        compared++;
      }
    }
  }
  assert.ok(compared >= 14 * 2, `only ${compared} chains were compared: containerd refuses the rest`);
});
