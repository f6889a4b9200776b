// What real images take on a node's disk, two versions of each on shared bases: containerd's overlayfs, our store, and the
// least there is when each distinct file content is kept once. Real registry, containerd and product; du and SQL only.
//   node test/bench/dedup-table.ts [--images a,b] [--how lazy|eager|converted] [--write]
import { parseArgs } from 'node:util';
import { bytes, ratio } from '../../src/bench/report/quantities.ts';
import { table } from '../../src/bench/report/tables.ts';
import { diskBytes } from '../../src/bench/start.ts';
import { TestContainerd } from '../support/containerd.ts';
import { pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';
import { BENCH_IMAGES, type BuiltBenchImage, benchImages } from './images/bench-images.ts';
import { writeSection } from './section.ts';
import { bringIn, HOWS, type How } from './space/bring-in.ts';
import { type OverlayfsSpace, overlayfsSpace } from './space/overlayfs-space.ts';
import { type StoreSpace, storeSpace, storeTotals } from './space/store-space.ts';

const { values } = parseArgs({
  options: {
    images: {
      type: 'string',
      default: BENCH_IMAGES.map(({ name }) => name)
        .filter((name) => name !== 'tiny')
        .join(','),
    },
    how: { type: 'string', default: 'eager' },
    write: { type: 'boolean', default: false },
  },
});
const how = HOWS.find((one) => one === values.how);
if (how === undefined) throw new Error(`--how ${values.how}: ${HOWS.join(', ')}`);

const WORDS: Readonly<Record<How, string>> = {
  lazy: 'pulled by `rpull` with indexes, then all files read through the mount',
  eager: 'pulled by `rpull` without an index, which reads all layers',
  converted: 'pulled by `ctr image pull --snapshotter dedup` and converted afterwards',
};
/** Ours may take this much more than the least. */
const TARGET = 1.1;
/** What index.db says and what `du` says may differ by this. */
const AGREEMENT = 0.01;

// Takes effect between two images: what was made is then removed in order.
const interrupt = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort());
const say = (text: string): void => void process.stderr.write(`${text}\n`);

/** Our own disk space after an image, all of those before it included. */
interface OwnSpace extends StoreSpace {
  readonly contentBytes: number;
}

interface Pushed {
  readonly image: BuiltBenchImage;
  readonly plain: string;
  readonly lazy: string;
}

async function push(
  images: readonly BuiltBenchImage[],
  registry: RegistryProcess,
  product: Product,
): Promise<Pushed[]> {
  const pushed: Pushed[] = [];
  for (const image of images) {
    say(`${image.tag}: pushing`);
    const plain = await pushLayout(image.dir, image.tag, registry.host, image.tag, 'plain');
    const lazy = `${registry.host}/${image.tag}:lazy`;
    if (how === 'lazy') await product.cli(['index', plain, '--annotate', lazy], { timeoutMs: 600_000 });
    pushed.push({ image, plain, lazy });
  }
  return pushed;
}

async function ownSpaces(product: Product, pushed: readonly Pushed[]): Promise<OwnSpace[]> {
  await product.start();
  const containerd = await TestContainerd.start({ proxies: { dedup: product.address }, lifetimeSeconds: 14_400 });
  try {
    const spaces: OwnSpace[] = [];
    for (const { image, plain, lazy } of pushed) {
      interrupt.signal.throwIfAborted();
      say(`${image.tag}: bringing it in (${how})`);
      await bringIn({ containerd, product }, how!, { plain, lazy, chainId: image.layers.at(-1)!.chainId });
      const contentBytes = await diskBytes([`${containerd.root}/io.containerd.content.v1.content`]);
      spaces.push({ ...(await storeSpace(product.root)), contentBytes });
    }
    return spaces;
  } finally {
    await containerd.stop();
  }
}

function imagesTable(
  images: readonly BuiltBenchImage[],
  theirs: readonly OverlayfsSpace[],
  ours: readonly OwnSpace[],
): string {
  const head = [
    'after',
    'overlayfs',
    'with its content store',
    'new file bytes',
    'unique file bytes',
    'unique 4 MiB parts',
    'chunks/',
    'metadata',
    'chunks/ ÷ unique file bytes',
    'with metadata ÷',
  ];
  const rows = images.map((image, at) => {
    const [their, our] = [theirs[at]!, ours[at]!];
    const metadata = our.images + our.indexDb;
    const bound = their.uniqueFileBytes;
    return [
      image.tag,
      bytes(their.snapshotBytes),
      bytes(their.snapshotBytes + their.contentBytes),
      bytes(bound - (theirs[at - 1]?.uniqueFileBytes ?? 0)),
      bytes(bound),
      bytes(their.uniqueWrittenBytes),
      bytes(our.chunks),
      bytes(metadata),
      (our.chunks / bound).toFixed(3),
      ((our.chunks + metadata) / bound).toFixed(3),
    ];
  });
  return table(head, rows);
}

function partsTable(last: OwnSpace): string {
  const parts: [string, number][] = [
    ['chunks/store', last.store],
    ['chunks/sums', last.sums],
    ['reserve', last.reserve],
    ['images/', last.images],
    ['index.db and metadata.db', last.indexDb],
    ['snapshots/', last.snapshots],
    ["containerd's content", last.contentBytes],
  ];
  return table(
    parts.map(([name]) => name),
    [parts.map(([, size]) => bytes(size))],
  );
}

function sqlTable(root: string, last: OwnSpace): string {
  const totals = storeTotals(root);
  const off = (size: number): string => `${(100 * (size / totals.blockBytes - 1)).toFixed(2)} %`;
  const rows: [string, string, string][] = [
    [
      "the guide's `COUNT(*), SUM(size) … WHERE ref_count > 1`",
      `${totals.sharedChunks}, ${bytes(totals.sharedBytes)}`,
      '',
    ],
    ['`COUNT(*), SUM(size)` of all', `${totals.chunks}, ${bytes(totals.bytes)}`, ''],
    [
      '`SUM(size × ref_count)`: each layer with its own',
      bytes(totals.referencedBytes),
      ratio(totals.referencedBytes / totals.bytes),
    ],
    ['rounded up to blocks (A)', bytes(totals.blockBytes), ''],
    ['of it recorded as present', bytes(totals.durableBlockBytes), off(totals.durableBlockBytes)],
    ['`du chunks/store` against A', bytes(last.store), off(last.store)],
    ['`du chunks/store chunks/sums` against A', bytes(last.store + last.sums), off(last.store + last.sums)],
    ['`du chunks/`, all of it, against A', bytes(last.chunks), off(last.chunks)],
  ];
  const table_ = table(['index.db, and du', 'figure', ''], rows);
  const agrees = Math.abs(last.chunks / totals.blockBytes - 1) <= AGREEMENT;
  return `${table_}\nWithin 1 %: ${agrees ? 'yes' : 'NO'}.`;
}

const images = await benchImages(values.images.split(','), ['1', '2'], say);
await using registry = await RegistryProcess.start();
const product = await Product.create({ log_level: 'info' });
try {
  const pushed = await push(images, registry, product);
  const theirs = await overlayfsSpace(
    pushed.map(({ plain }) => plain),
    say,
  );
  const ours = await ownSpaces(product, pushed);
  const [their, our] = [theirs.at(-1)!, ours.at(-1)!];
  const toBound = our.chunks / their.uniqueFileBytes;
  const updates = [...new Map(images.map(({ spec }) => [spec.name, spec.update]))].map(
    ([name, text]) => `${name}: ${text}`,
  );
  const text = `\`node test/bench/dedup-table.ts --how ${how} --write\`: ${images.length} images, one after the other, none removed; ours ${WORDS[how]}.
Disk space as \`du\` says after \`sync\`, each row with all images before it. "Unique" is added up from overlayfs's snapshots, by SHA-256 of every
file, each distinct content once and rounded up to 4 KiB; "parts" the same for parts of 4 MiB, without those of zeros only. "New" is what an image added to it.

${imagesTable(images, theirs, ours)}
Ours ÷ overlayfs ${ratio(our.chunks / their.snapshotBytes)}, ÷ overlayfs with its content store ${ratio((our.chunks + our.images + our.indexDb + our.contentBytes) / (their.snapshotBytes + their.contentBytes))} (all of ours). \
Chunks ÷ unique file bytes ${toBound.toFixed(3)}, at most ${TARGET} aimed for: ${toBound <= TARGET ? 'reached' : 'NOT REACHED'}.

Of what is there at the end:

${partsTable(our)}
${sqlTable(product.root, our)}

Second versions: ${updates.join('; ')}.
`;
  process.stdout.write(`${text}\n`);
  if (values.write) await writeSection(`Disk space of real images, ${how}`, text);
} finally {
  await product.stop();
}
