// The benchmark's images by name: builds what the cache does not have and says where each lies. Used by the runner and
// by build.ts.
import { join } from 'node:path';
import type { BenchImage } from '../../../src/bench/result.ts';
import { testCacheDir } from '../../support/images.ts';
import type { BenchImageSpec, ImageVersion } from './recipe.ts';
import { BENCH_IMAGES } from './specs.ts';
import { pruneStore, type StoredImage, storeImage } from './store.ts';

export type { BenchImageSpec, ImageVersion } from './recipe.ts';
export { BENCH_IMAGES } from './specs.ts';

/** An image in an OCI layout directory of its own. Sizes in bytes. */
export interface BuiltBenchImage extends StoredImage {
  readonly spec: BenchImageSpec;
  readonly version: ImageVersion;
  /** OCI layout, to be pushed with `pushLayout(dir, tag, …)`. Belongs to the cache: read only. */
  readonly dir: string;
  readonly tag: string;
  readonly compressedBytes: number;
  /** Of the layers' tars. */
  readonly uncompressedBytes: number;
  readonly files: number;
  readonly largestFile: { readonly path: string; readonly bytes: number };
}

/** An image as results describe it. */
export function asBenchImage({ spec, compressedBytes, uncompressedBytes, layers }: BuiltBenchImage): BenchImage {
  const { name, composition, command, ready } = spec;
  return { name, composition, compressedBytes, uncompressedBytes, layers: layers.length, command, ready };
}

/** The specification of that name; throws with the names there are. */
export function benchImageSpec(name: string): BenchImageSpec {
  const spec = BENCH_IMAGES.find((candidate) => candidate.name === name);
  if (spec === undefined)
    throw new Error(`no benchmark image "${name}"; there are ${BENCH_IMAGES.map((each) => each.name).join(', ')}`);
  return spec;
}

async function cacheDir(): Promise<string> {
  return join(await testCacheDir(), 'bench-images');
}

/**
 * Builds the images that are missing (root, a Debian mirror and minutes of time are needed then) and answers all of
 * them, names outermost. Throws with the output of what failed.
 */
export async function benchImages(
  names: readonly string[],
  versions: readonly ImageVersion[] = ['1'],
  say: (text: string) => void = () => {},
): Promise<BuiltBenchImage[]> {
  const cache = await cacheDir();
  const built: BuiltBenchImage[] = [];
  for (const spec of names.map(benchImageSpec)) {
    for (const version of versions) {
      const tag = `${spec.name}-${version}`;
      const { dir, image } = await storeImage(cache, tag, spec.recipe(version), (text) => say(`${tag}: ${text}`));
      const sum = (value: (layer: StoredImage['layers'][number]) => number) =>
        image.layers.reduce((total, layer) => total + value(layer), 0);
      const largest = image.layers.map((layer) => layer.largestFile).sort((a, b) => b.bytes - a.bytes)[0];
      built.push({
        ...image,
        spec,
        version,
        dir,
        tag,
        compressedBytes: sum((layer) => layer.compressedBytes),
        uncompressedBytes: sum((layer) => layer.uncompressedBytes),
        files: sum((layer) => layer.files),
        largestFile: largest ?? { path: '', bytes: 0 },
      });
    }
  }
  return built;
}

/** Removes from the cache what no specification of today asks for; what was removed. */
export async function pruneBenchImages(): Promise<string[]> {
  return await pruneStore(
    await cacheDir(),
    BENCH_IMAGES.flatMap((spec) => spec.versions.map((version) => spec.recipe(version))),
  );
}
