// What pulling, starting, reading and sharing cost in requests, bytes and events: counted once on a whole node, with reads
// one after the other, so that the numbers are the same every time. Fetching ahead is off: it depends on who comes first.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { KiB, MiB } from '../../src/units.ts';
import { makeImage, pushLayout, type TestImage } from '../support/images.ts';
import { LazyNode } from '../support/lazy-node.ts';
import { openView } from '../support/lazy-view.ts';
import type { Figure, Figures, FigureUnit } from './figures.ts';
import { firstImage, type GateFile, type GateImage, pick, secondImage } from './images.ts';
import { Probe } from './probe.ts';
import { readSerially } from './reader.ts';

const READS = 40;
const PART_BYTES = 256 * KiB;

/** A part of a file. */
interface Part {
  readonly file: GateFile;
  readonly offset: number;
  readonly length: number;
}

interface Published {
  readonly source: GateImage;
  readonly image: TestImage;
  readonly reference: string;
}

/** What `index --json` prints, as far as it is read here. */
interface IndexReport {
  readonly images: readonly {
    readonly layers: readonly {
      readonly index: { readonly size: number };
      readonly restart: { readonly size: number };
    }[];
  }[];
}

/** What a start may read: whole small files, and some blocks here and there of large ones. */
function startReads(files: readonly GateFile[]): Part[] {
  const small = files.filter(({ content }) => content.length < MiB);
  const large = files.filter(({ content }) => content.length >= MiB);
  return Array.from({ length: READS }, (_, i) => {
    const file = i % 4 === 0 ? large[pick(`large ${i}`, large.length)]! : small[pick(`small ${i}`, small.length)]!;
    if (i % 4 !== 0) return { file, offset: 0, length: file.content.length };
    const offset = pick(`offset ${i}`, Math.floor(file.content.length / 4096)) * 4096;
    const length = Math.min(4096 * (1 + pick(`length ${i}`, 16)), file.content.length - offset);
    return { file, offset, length };
  });
}

/** All of all files, in parts and in an order in which nothing looks sequential. */
function allParts(files: readonly GateFile[]): Part[] {
  const parts = files.flatMap((file) =>
    Array.from({ length: Math.ceil(file.content.length / PART_BYTES) }, (_, i): Part => {
      const offset = i * PART_BYTES;
      return { file, offset, length: Math.min(PART_BYTES, file.content.length - offset) };
    }),
  );
  const rank = new Map(parts.map((part) => [part, pick(`${part.file.path} ${part.offset}`, 2 ** 32)]));
  return parts.sort((a, b) => rank.get(a)! - rank.get(b)!);
}

/** Reads parts below `root` and compares every byte. */
async function read(root: string, parts: readonly Part[]): Promise<void> {
  const expected = createHash('sha256');
  for (const { file, offset, length } of parts) expected.update(file.content.subarray(offset, offset + length));
  const reads = parts.map(({ file, offset, length }) => ({ path: join(root, file.path), offset, length }));
  const { sha256 } = await readSerially(reads, 'direct');
  assert.equal(sha256, expected.digest('hex'), 'what was read is not what the image holds');
}

class Counts {
  readonly figures: Record<string, Figure> = {};
  readonly #node: LazyNode;
  readonly #probe: Probe;

  constructor(node: LazyNode, probe: Probe) {
    this.#node = node;
    this.#probe = probe;
  }

  add(name: string, value: number | string, unit: FigureUnit): void {
    this.figures[name] = { value, unit };
  }

  /** Requests that came to the registry since the proxy was reset, and bytes of the answers. */
  #addRequests(name: string, filters: Readonly<Record<string, { method?: string; path?: RegExp }>>): void {
    for (const [kind, filter] of Object.entries(filters)) {
      const { requests, bytes } = this.#node.proxy.count(filter);
      this.add(`${name}: ${kind}`, requests, 'requests');
      if (bytes > 0) this.add(`${name}: bytes of ${kind}`, bytes, 'bytes');
    }
  }

  /** Pushes an image and makes its indexes. */
  async publish(name: string, source: GateImage): Promise<Published> {
    const { proxy, registry, product } = this.#node;
    const image = await makeImage({ layers: source.layers, tag: 'plain' });
    await pushLayout(image.dir, 'plain', registry.host, name, 'plain');
    await rm(image.dir, { recursive: true });
    this.add(`${name} image: layers`, image.manifest.digest, 'digest');
    proxy.reset();
    const reference = `${proxy.host}/${name}:lazy`;
    const { stdout } = await product.cli(['index', `${proxy.host}/${name}:plain`, '--annotate', reference, '--json']);
    const layers = (JSON.parse(stdout) as IndexReport).images[0]?.layers ?? [];
    const sum = (sizes: readonly number[]): number => sizes.reduce((a, b) => a + b, 0);
    this.add(`${name} image: indexes`, sum(layers.map(({ index }) => index.size)), 'bytes');
    this.add(`${name} image: restart blobs`, sum(layers.map(({ restart }) => restart.size)), 'bytes');
    this.#addRequests(`index ${name} image`, { downloads: { method: 'GET' } });
    this.add(`index ${name} image: uploads`, proxy.count({ method: 'PUT' }).requests, 'requests');
    this.add(`index ${name} image: all requests`, proxy.count().requests, 'requests');
    return { source, image, reference };
  }

  async pull(name: string, { reference, image }: Published): Promise<void> {
    const { proxy } = this.#node;
    proxy.reset();
    await this.#node.rpull(reference);
    this.#addRequests(`pull ${name} image`, { manifests: { path: /\/manifests\// }, blobs: { path: /\/blobs\// } });
    const data = image.layers.map(({ digest }) => proxy.count({ path: new RegExp(`/blobs/${digest}`) }).requests);
    this.add(
      `pull ${name} image: layers`,
      data.reduce((a, b) => a + b, 0),
      'requests',
    );
  }

  /** What both daemons have allocated since they started. */
  async addAllocations(name: string): Promise<void> {
    const { product } = this.#node;
    const daemons = { 'dedup-snapshotter': product.servicePid ?? 0, dedupd: await product.daemonPid() };
    for (const [daemon, pid] of Object.entries(daemons)) {
      const { allocatedBytes } = await this.#probe.ask(pid);
      this.add(`${name}: ${daemon} allocates`, allocatedBytes, 'bytes');
    }
  }

  /** Reads parts of an image that is pulled. */
  async read(name: string, root: string, parts: readonly Part[]): Promise<void> {
    const { proxy, product } = this.#node;
    const before = await product.stats();
    proxy.reset();
    await read(root, parts);
    const after = await product.stats();
    this.#addRequests(name, { 'range requests': {} });
    this.add(`${name}: spans`, after.span_bytes - before.span_bytes, 'bytes');
    const misses = after.misses - before.misses;
    this.add(`${name}: misses`, misses, 'reads');
    this.add(`${name}: kernel's reads`, after.hits - before.hits + misses, 'reads');
  }
}

/** Errors: those of the commands; AssertionError when a byte is wrong. */
export async function measureCounts(): Promise<Figures> {
  await using probe = await Probe.create();
  // The kernel's reads are counted also of what is here completely.
  const config = { log_level: 'info', direct_mounts: false, prefetch: { enabled: false } };
  const node = await LazyNode.start({ config, inside: probe.words });
  try {
    const counts = new Counts(node, probe);
    const first = await counts.publish('first', firstImage());
    const second = await counts.publish('second', secondImage());
    await counts.pull('first', first);
    await counts.addAllocations('start daemons and pull');
    const whole = allParts(first.source.files);
    const view = await openView(node, 'dedup', first.image.layers.at(-1)!.chainId);
    try {
      const start = startReads(first.source.files);
      await counts.read('start', view.path, start);
      await counts.read('start again', view.path, start);
      await counts.read('read the rest', view.path, whole);
      await counts.read('read it again', view.path, whole);
    } finally {
      await view.close();
    }
    await counts.pull('second', second);
    const beside = await openView(node, 'dedup', second.image.layers.at(-1)!.chainId);
    try {
      const isOwn = ({ file }: Part): boolean => file.path === 'opt/own';
      const parts = allParts(second.source.files);
      await counts.read(
        'shared part of the second image',
        beside.path,
        parts.filter((part) => !isOwn(part)),
      );
      await counts.read('own part of the second image', beside.path, parts.filter(isOwn));
    } finally {
      await beside.close();
    }
    return counts.figures;
  } finally {
    await node.stop();
  }
}
