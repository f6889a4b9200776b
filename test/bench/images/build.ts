// Builds the benchmark's images and prints what they are.
//   node test/bench/images/build.ts [NAME…] [--version 1|2] [--prune]
import { setPriority } from 'node:os';
import { parseArgs } from 'node:util';
import {
  BENCH_IMAGES,
  type BuiltBenchImage,
  benchImages,
  type ImageVersion,
  pruneBenchImages,
} from './bench-images.ts';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { version: { type: 'string' }, prune: { type: 'boolean', default: false } },
});
if (values.version !== undefined && values.version !== '1' && values.version !== '2')
  throw new Error(`--version ${values.version}: 1 or 2`);
const versions: ImageVersion[] = values.version === undefined ? ['1', '2'] : [values.version];

setPriority(10);
if (values.prune) for (const name of await pruneBenchImages()) console.log(`removed ${name}`);
const names = positionals.length > 0 ? positionals : BENCH_IMAGES.map((spec) => spec.name);
const built = await benchImages(names, versions, (text) => console.log(text));

const mb = (bytes: number) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);

/** Packages that the specification names, in the versions that were installed. */
function named(image: BuiltBenchImage): string {
  const installed: Record<string, string> = Object.assign({}, ...image.layers.map((layer) => layer.packages));
  const wanted = image.spec
    .recipe(image.version)
    .layers.flatMap((layer) => layer.steps.flatMap((step) => ('install' in step ? step.install : [])));
  return wanted.map((name) => `${name} ${installed[name] ?? '?'}`).join(', ');
}

console.log('\n| image | compressed MB | uncompressed MB | files | layers (compressed MB) | largest file (MB) |');
console.log('| --- | ---: | ---: | ---: | --- | --- |');
for (const image of built) {
  const layers = image.layers.map((layer) => mb(layer.compressedBytes)).join(' + ');
  const largest = `${image.largestFile.path} (${mb(image.largestFile.bytes)})`;
  const cells = [
    image.tag,
    mb(image.compressedBytes),
    mb(image.uncompressedBytes),
    image.files,
    `${image.layers.length} (${layers})`,
    largest,
  ];
  console.log(`| ${cells.join(' | ')} |`);
}
console.log();
for (const image of built) console.log(`${image.tag}: ${image.spec.composition}. ${named(image)}`);
