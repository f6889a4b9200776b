// What other chunks than those of 4 MiB at fixed offsets would share: two real versions of each of the benchmark's images, the
// bytes of their changed big files that the older version's chunks give, and the size of one store for all of them.
// Reads image layers only; nothing of the product runs.
//   node test/bench/chunking.ts [--images a,b] [--write]
import { setPriority } from 'node:os';
import { parseArgs } from 'node:util';
import { bytes } from '../../src/bench/report/quantities.ts';
import { table } from '../../src/bench/report/tables.ts';
import { KiB, MiB } from '../../src/units.ts';
import { Catalogue, type Cutter } from './chunking/catalogue.ts';
import { comparePair, type PairShares, type Shared, storeSizes } from './chunking/compare.ts';
import { fastCdc, fixedChunks } from './chunking/fastcdc.ts';
import { BENCH_IMAGES, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';

const { values } = parseArgs({
  options: {
    images: {
      type: 'string',
      default: BENCH_IMAGES.map(({ name }) => name)
        .filter((name) => name !== 'tiny')
        .join(','),
    },
    write: { type: 'boolean', default: false },
  },
});

const sizeName = (size: number): string => (size >= MiB ? `${size / MiB} MiB` : `${size / KiB} KiB`);
const fixed = (size: number): Cutter => ({ name: `fixed ${sizeName(size)}`, cut: (all) => fixedChunks(all, size) });
const cdc = (size: number): Cutter => ({ name: `FastCDC ${sizeName(size)}`, cut: (all) => fastCdc(all, size) });
/** The first is the product's. */
const CUTTERS: readonly Cutter[] = [
  ...[4 * MiB, MiB, 256 * KiB, 64 * KiB].map(fixed),
  ...[4 * MiB, MiB, 256 * KiB, 64 * KiB].map(cdc),
];
const THRESHOLDS = [4 * MiB, MiB];
/** The smallest chunk of all: what is not larger is one chunk whoever cuts it. */
const WHOLE_BYTES = 64 * KiB;

const say = (text: string): void => void process.stderr.write(`${text}\n`);
const percent = (part: number, of: number): string => (of > 0 ? `${((100 * part) / of).toFixed(1)} %` : '—');

setPriority(10);
const names = values.images.split(',');
const catalogue = new Catalogue(CUTTERS, WHOLE_BYTES);
let layerBytes = 0;
const pairs: { readonly name: string; readonly update: string; readonly shares: PairShares }[] = [];
for (const name of names) {
  const [first, second] = await benchImages([name], ['1', '2'], say);
  const older = await catalogue.add(first!, say);
  const newer = await catalogue.add(second!, say);
  for (const layer of newer) if (!older.includes(layer)) layerBytes += layer.compressedBytes;
  pairs.push({ name, update: first!.spec.update, shares: comparePair(catalogue, older, newer, THRESHOLDS) });
}

const sum = (pick: (shares: PairShares) => number): number =>
  pairs.reduce((total, { shares }) => total + pick(shares), 0);

/** One row an image: how many of its changed big files' bytes each way finds in the older version. */
function sharesTable(of: (shares: PairShares) => Shared): string {
  return table(
    ['image', 'files', 'their bytes', '4 MiB in place', ...CUTTERS.map((cutter) => cutter.name)],
    pairs.map(({ name, shares }) => {
      const { files, newBytes, anywhere, inPlace } = of(shares);
      const share = (part: number): string => percent(part, newBytes);
      return [name, String(files), bytes(newBytes), share(inPlace[0]!), ...anywhere.map(share)];
    }),
  );
}

const sizes = storeSizes(catalogue);
const today = sizes[0]!;
const wireToday = sum(({ all }) => all.newCompressedBytes - all.anywhereCompressed[0]!);
const totals = table(
  [
    'chunks',
    'distinct chunks',
    'one store for all, bytes',
    'in blocks of 4 KiB',
    'disk against today',
    'bytes found in the older version, of all new bytes',
    'wire against today, at most',
  ],
  CUTTERS.map(({ name }, at) => {
    const size = sizes[at]!;
    const wire = sum(({ all }) => all.anywhereCompressed[at]! - all.anywhereCompressed[0]!);
    return [
      name,
      String(size.chunks),
      bytes(size.bytes),
      bytes(size.diskBytes),
      at === 0 ? '0' : `−${percent(today.diskBytes - size.diskBytes, today.diskBytes)}`,
      percent(
        sum(({ all }) => all.anywhere[at]!),
        sum(({ all }) => all.newBytes),
      ),
      at === 0 ? '0' : `−${percent(wire, wireToday)}`,
    ];
  }),
);

const text = `\`node test/bench/chunking.ts --write\`: both versions of each image of \`make bench\` (${names.join(', ')}), all their layers. A file
counts when its content is in version 2 and not in version 1; the columns say how many of such files' bytes lie in chunks that version
1 has anywhere ("in place": at the same offset of the same file, whose name may differ in digits). FastCDC is the paper's of 2020 with
chunks of a quarter to eight times the average (\`test/bench/chunking/fastcdc.ts\`). Files above 4 MiB:

${sharesTable(({ above }) => above[0]!)}
Files above 1 MiB:

${sharesTable(({ above }) => above[1]!)}
All files above 64 KiB cut in each way, smaller ones whole, all ${names.length * 2} images in one store. "Wire": of what a
node with version 1 fetches today to have all of version 2 (${bytes(wireToday)} of ${bytes(layerBytes)} of layers that it does not have), what it would not
fetch, each byte taken at its layer's compression; a limit, for a compressed layer can only be entered at its restart points. No row
but the first four could be a file of the kernel's: EROFS maps blocks of 4 KiB, and FastCDC's chunks begin anywhere.

${totals}
Versions: ${pairs.map(({ name, update }) => `${name}: ${update}`).join('; ')}.
`;
process.stdout.write(`${text}\n`);
if (values.write) await writeSection('Chunks across versions', text);
