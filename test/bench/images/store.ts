// The cache of layers and images on disk: made once, each in a directory of its own that appears by a rename, so that
// an interrupted build leaves nothing that looks finished. One build at a time, across processes.
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { link, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from '../../support/containerd.ts';
import { busyboxEntries } from '../../support/images.ts';
import { tarOf } from '../../support/tar.ts';
import { fetchSuites, installedPackages, makeBase, makeLayer, type Suites, UNDATED_EPOCH } from './debian.ts';
import { type PackedLayer, packLayer, unpackLayer } from './pack.ts';
import { type ImageRecipe, imageKey, layerKeys } from './recipe.ts';

/** A layer in the cache. */
export interface StoredLayer extends PackedLayer {
  /** Packages that this layer installs or changes, with their versions. */
  readonly packages: Readonly<Record<string, string>>;
  /** RFC 3339. */
  readonly made: string;
}

export interface StoredImage {
  readonly manifestDigest: string;
  readonly configDigest: string;
  /** Bottom to top. */
  readonly layers: readonly (StoredLayer & { readonly mediaType: string; readonly chainId: string })[];
}

const TYPES = {
  manifest: 'application/vnd.oci.image.manifest.v1+json',
  config: 'application/vnd.oci.image.config.v1+json',
  layer: 'application/vnd.oci.image.layer.v1.tar+gzip',
};

const sha256 = (bytes: string) => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** Runs `body` while no other process does so for the same directory. The lock ends with this process. */
async function locked<T>(dir: string, body: () => Promise<T>): Promise<T> {
  const holder = spawn('flock', [join(dir, 'lock'), 'sh', '-c', 'echo; exec cat'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const ended = new Promise<void>((resolve, reject) => {
    holder.once('error', reject);
    holder.once('close', () => resolve());
  });
  try {
    const first = await Promise.race([new Promise((resolve) => holder.stdout.once('data', resolve)), ended]);
    if (first === undefined) throw new Error(`flock ${dir}: ended with ${holder.exitCode}`);
    return await body();
  } finally {
    holder.stdin.end();
    await ended;
  }
}

/** Makes `made` appear as `final`. Of two that race, the first stays. */
async function publish(made: string, final: string): Promise<void> {
  await mkdir(join(final, '..'), { recursive: true });
  try {
    await rename(made, final);
  } catch (error) {
    if (!existsSync(final)) throw error;
    await rm(made, { recursive: true, force: true });
  }
}

const layerDir = (cache: string, key: string) => join(cache, 'layers', key);
const blobOf = (cache: string, key: string) => join(layerDir(cache, key), 'layer.tar.gz');

async function storedLayer(cache: string, key: string): Promise<StoredLayer> {
  return JSON.parse(await readFile(join(layerDir(cache, key), 'layer.json'), 'utf8')) as StoredLayer;
}

/** Makes the layers of a recipe that are not in the cache yet. Call under the lock. */
async function makeLayers(cache: string, recipe: ImageRecipe, say: (text: string) => void): Promise<void> {
  const keys = layerKeys(recipe);
  const missing = keys.findIndex((key) => !existsSync(layerDir(cache, key)));
  if (missing === -1) return;
  // What earlier builds that were killed left behind: nobody else builds now.
  for (const name of await readdir(cache)) {
    if (name.startsWith('work-')) await rm(join(cache, name), { recursive: true, force: true });
  }
  const work = await mkdtemp(join(cache, 'work-'));
  const fetched = new Map<string, Suites>();
  const suitesOf = async (names: readonly string[]): Promise<Suites> => {
    const known = fetched.get(names.join());
    if (known !== undefined) return known;
    if (names.length > 0) say(`fetching the package lists of ${names.join(', ')}`);
    const fresh = await fetchSuites(names, join(work, `suites-${fetched.size}`));
    fetched.set(names.join(), fresh);
    return fresh;
  };
  try {
    const trees: string[] = [];
    for (const [at, key] of keys.entries()) {
      const dir = join(work, `layer-${at}`);
      if (at < missing) {
        await unpackLayer(blobOf(cache, key), dir);
        trees.push(dir);
        continue;
      }
      await mkdir(dir);
      const out = join(dir, 'out');
      await mkdir(out);
      const layer = recipe.layers[at - 1];
      let tree: string;
      let epoch: number;
      if (layer !== undefined) {
        const suites = await suitesOf(layer.suites);
        const steps = layer.steps.map((step) =>
          'install' in step ? `install ${step.install.join(' ')}` : 'run' in step ? 'run' : step.file,
        );
        say(`making a layer: ${steps.join('; ')}`);
        tree = await makeLayer(layer, suites, trees, dir);
        epoch = suites.epoch;
      } else {
        ({ tree, epoch } = await makeBaseTree(recipe, join(dir, 'root'), suitesOf, say));
      }
      const packed = await packLayer(tree, trees, join(out, 'layer.tar.gz'), epoch, dir);
      const packages = await changedPackages(trees, tree);
      const record: StoredLayer = { ...packed, packages, made: new Date().toISOString() };
      await writeFile(join(out, 'layer.json'), JSON.stringify(record));
      await publish(out, layerDir(cache, key));
      trees.push(tree);
    }
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

async function makeBaseTree(
  recipe: ImageRecipe,
  dir: string,
  suitesOf: (names: readonly string[]) => Promise<Suites>,
  say: (text: string) => void,
): Promise<{ tree: string; epoch: number }> {
  if (recipe.base.kind === 'debian') {
    const suites = await suitesOf(recipe.base.suites);
    say(`making a base of ${recipe.base.suites.join(', ')}`);
    await makeBase(suites, dir);
    return { tree: dir, epoch: suites.epoch };
  }
  await mkdir(dir);
  await writeFile(`${dir}.tar`, tarOf(await busyboxEntries()));
  await run('tar', ['-C', dir, '--numeric-owner', '-xpf', `${dir}.tar`]);
  return { tree: dir, epoch: UNDATED_EPOCH };
}

async function changedPackages(below: readonly string[], tree: string): Promise<Record<string, string>> {
  const after = await installedPackages(tree);
  let before = new Map<string, string>();
  for (const dir of below) {
    const found = await installedPackages(dir);
    if (found.size > 0) before = found;
  }
  return Object.fromEntries([...after].filter(([name, version]) => before.get(name) !== version).sort());
}

/** The layout directory of an image, built where it is missing. */
export async function storeImage(
  cache: string,
  label: string,
  recipe: ImageRecipe,
  say: (text: string) => void,
): Promise<{ dir: string; image: StoredImage }> {
  const dir = join(cache, 'images', `${label}-${imageKey(recipe)}`);
  if (!existsSync(dir)) {
    await mkdir(cache, { recursive: true });
    await locked(cache, async () => {
      if (existsSync(dir)) return;
      await makeLayers(cache, recipe, say);
      await writeLayout(cache, label, recipe, dir);
    });
  }
  return { dir, image: JSON.parse(await readFile(join(dir, 'image.json'), 'utf8')) as StoredImage };
}

/** Writes an OCI layout of one image, its layers linked to those in the cache. */
async function writeLayout(cache: string, label: string, recipe: ImageRecipe, dir: string): Promise<void> {
  const keys = layerKeys(recipe);
  const part = await mkdtemp(join(cache, 'work-'));
  const blobs = join(part, 'blobs', 'sha256');
  await mkdir(blobs, { recursive: true });
  const addJson = async (mediaType: string, value: unknown) => {
    const text = JSON.stringify(value);
    const digest = sha256(text);
    await writeFile(join(blobs, digest.slice('sha256:'.length)), text);
    return { mediaType, digest, size: Buffer.byteLength(text) };
  };
  const layers: StoredImage['layers'][number][] = [];
  for (const key of keys) {
    const layer = await storedLayer(cache, key);
    const blob = join(blobs, layer.digest.slice('sha256:'.length));
    if (!existsSync(blob)) await link(blobOf(cache, key), blob);
    const below = layers.at(-1);
    const chainId = below === undefined ? layer.diffId : sha256(`${below.chainId} ${layer.diffId}`);
    layers.push({ ...layer, mediaType: TYPES.layer, chainId });
  }
  const created = layers.at(-1)?.made;
  const config = await addJson(TYPES.config, {
    created,
    os: 'linux',
    architecture: 'amd64',
    config: recipe.config,
    rootfs: { type: 'layers', diff_ids: layers.map((layer) => layer.diffId) },
    history: layers.map((layer) => ({ created: layer.made, created_by: 'dedup-snapshotter bench' })),
  });
  const manifest = await addJson(TYPES.manifest, {
    schemaVersion: 2,
    mediaType: TYPES.manifest,
    config,
    layers: layers.map((layer) => ({ mediaType: TYPES.layer, digest: layer.digest, size: layer.compressedBytes })),
  });
  const annotations = { 'org.opencontainers.image.ref.name': label };
  await writeFile(
    join(part, 'index.json'),
    JSON.stringify({ schemaVersion: 2, manifests: [{ ...manifest, annotations }] }),
  );
  await writeFile(join(part, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }));
  const image: StoredImage = { manifestDigest: manifest.digest, configDigest: config.digest, layers };
  await writeFile(join(part, 'image.json'), JSON.stringify(image));
  await publish(part, dir);
}

/** Removes layers and images whose keys are not among those of `recipes`. Call when nobody reads old ones. */
export async function pruneStore(cache: string, recipes: readonly ImageRecipe[]): Promise<string[]> {
  const keys = new Set(recipes.flatMap((recipe) => [...layerKeys(recipe), imageKey(recipe)]));
  const removed: string[] = [];
  await locked(cache, async () => {
    for (const kind of ['images', 'layers']) {
      const dir = join(cache, kind);
      for (const name of existsSync(dir) ? await readdir(dir) : []) {
        if (keys.has(name.slice(name.lastIndexOf('-') + 1))) continue;
        await rm(join(dir, name), { recursive: true, force: true });
        removed.push(`${kind}/${name}`);
      }
    }
  });
  return removed;
}
