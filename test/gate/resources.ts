// Processor time, allocations, memory and written bytes of indexing, of a mount and of reading everything. Disturbances
// only ever add, so the least of several rounds counts; processor time is divided by that of a yardstick, measured between
// the rounds on the same machine.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { run, unmountBelow } from '../support/containerd.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';
import type { Figure, Figures, FigureUnit } from './figures.ts';
import { largeImage } from './images.ts';
import { Probe } from './probe.ts';
import { readSerially, type SerialRead } from './reader.ts';

const REPOSITORY = 'large';
/** How often everything is read from the store: one pass is over too soon. */
const HIT_PASSES = 12;
const YARDSTICK = join(import.meta.dirname, 'yardstick.ts');

/** Least value of each quantity so far; processor time in seconds. */
type Quantities = Map<string, { value: number; unit: FigureUnit | 'seconds' }>;

/** dedupd's totals at one moment. */
interface Sample {
  readonly cpuSeconds: number;
  readonly allocatedBytes: number;
  readonly peakBytes: number;
  /** Caused to be written to a disk (proc(5)). */
  readonly writtenBytes: number;
  readonly requests: number;
  readonly wireBytes: number;
  readonly misses: number;
  /** Reads of the kernel, hits and misses. */
  readonly kernelReads: number;
}

/** The registry with the image, and what rounds have shown. */
export class Resources implements AsyncDisposable {
  rounds = 0;
  readonly #parts: AsyncDisposableStack;
  readonly #registry: RegistryProcess;
  readonly #dir: string;
  /** Digests. */
  readonly #layers: readonly string[];
  /** Of everything in the image, in the order of the layers. */
  readonly #reads: readonly { readonly path: string; readonly length: number }[];
  readonly #sha256: string;
  readonly #least: Quantities = new Map();
  #yardstickSeconds = Number.POSITIVE_INFINITY;

  private constructor(
    parts: AsyncDisposableStack,
    made: { registry: RegistryProcess; dir: string; layers: string[]; reads: { path: string; length: number }[] },
    sha256: string,
  ) {
    this.#parts = parts;
    this.#registry = made.registry;
    this.#dir = made.dir;
    this.#layers = made.layers;
    this.#reads = made.reads;
    this.#sha256 = sha256;
  }

  static async create(): Promise<Resources> {
    await using parts = new AsyncDisposableStack();
    const dir = await mkdtemp(join(tmpdir(), 'gate-'));
    parts.defer(async () => await rm(dir, { recursive: true, force: true }));
    const registry = parts.use(await RegistryProcess.start());
    const { layers, files } = largeImage();
    const image = await makeImage({ layers, tag: 'plain', into: join(dir, 'layout') });
    await pushLayout(image.dir, 'plain', registry.host, REPOSITORY);
    const hash = createHash('sha256');
    for (const { content } of files) hash.update(content);
    const made = {
      registry,
      dir,
      layers: image.layers.map(({ digest }) => digest),
      reads: files.map(({ path, content }) => ({ path, length: content.length })),
    };
    return new Resources(parts.move(), made, hash.digest('hex'));
  }

  /** Indexes, mounts and reads once more, by new processes with an empty store. Errors: those of the commands. */
  async round(): Promise<void> {
    this.rounds++;
    await this.#measureYardstick();
    await using probe = await Probe.create();
    const product = await Product.create({ log_level: 'info' }, { inside: probe.words });
    const target = join(this.#dir, `mount-${this.rounds}`);
    try {
      await this.#index(product, probe);
      await mkdir(target);
      await this.#mountAndRead(product, probe, target);
    } finally {
      await unmountBelow(this.#dir);
      await product.stop();
    }
  }

  async #index(product: Product, probe: Probe): Promise<void> {
    const [plain, lazy] = [this.#reference('plain'), this.#reference('lazy')];
    await product.cli(['index', plain, '--annotate', lazy]);
    const [used] = await probe.ended();
    assert.ok(used !== undefined, 'the process that indexed has not said what it used');
    this.#note('index: processor time', used.cpuSeconds, 'seconds');
    this.#note('index: allocates', used.allocatedBytes, 'bytes');
  }

  async #mountAndRead(product: Product, probe: Probe, target: string): Promise<void> {
    await product.cli(['mount', this.#reference('lazy'), target]);
    const reads = this.#reads.map(({ path, length }): SerialRead => ({ path: join(target, path), offset: 0, length }));
    const mounted = await sample(product, probe);
    this.#note('start dedupd and mount: processor time', mounted.cpuSeconds, 'seconds');
    this.#note('start dedupd and mount: allocates', mounted.allocatedBytes, 'bytes');
    this.#note('start dedupd and mount: writes', mounted.writtenBytes, 'bytes');
    this.#note('start dedupd and mount: peak memory', mounted.peakBytes, 'bytes');

    const { sha256 } = await readSerially(reads, 'buffered');
    assert.equal(sha256, this.#sha256, 'what was read is not what the image holds');
    const read = await sample(product, probe);
    this.#note('read everything: processor time', read.cpuSeconds - mounted.cpuSeconds, 'seconds');
    this.#note('read everything: allocates', read.allocatedBytes - mounted.allocatedBytes, 'bytes');
    this.#note('read everything: writes', read.writtenBytes - mounted.writtenBytes, 'bytes');
    this.#note('read everything: peak memory', read.peakBytes, 'bytes');
    this.#note('read everything: range requests', read.requests - mounted.requests, 'requests');
    this.#note('read everything: bytes of range requests', read.wireBytes - mounted.wireBytes, 'bytes');
    this.#note('read everything: misses', read.misses - mounted.misses, 'reads');
    this.#note("read everything: kernel's reads", read.kernelReads - mounted.kernelReads, 'reads');

    await readSerially(Array.from({ length: HIT_PASSES }, () => reads).flat(), 'direct');
    const again = await sample(product, probe);
    this.#note('read from the store: processor time', again.cpuSeconds - read.cpuSeconds, 'seconds');
    this.#note('read from the store: range requests', again.requests - read.requests, 'requests');
    this.#note("read from the store: kernel's reads", again.kernelReads - read.kernelReads, 'reads');
  }

  async #measureYardstick(): Promise<void> {
    const urls = this.#layers.map((digest) => `http://${this.#registry.host}/v2/${REPOSITORY}/blobs/${digest}`);
    const { stdout } = await run(process.execPath, [YARDSTICK, join(this.#dir, 'yardstick'), ...urls]);
    this.#yardstickSeconds = Math.min(this.#yardstickSeconds, Number(stdout));
  }

  #reference(tag: string): string {
    return `${this.#registry.host}/${REPOSITORY}:${tag}`;
  }

  #note(name: string, value: number, unit: FigureUnit | 'seconds'): void {
    this.#least.set(name, { value: Math.min(value, this.#least.get(name)?.value ?? value), unit });
  }

  /** The least of all rounds so far. */
  figures(): Figures {
    const found: Record<string, Figure> = {};
    for (const [name, { value, unit }] of this.#least) {
      const ratio = Number((value / this.#yardstickSeconds).toFixed(3));
      found[name] = unit === 'seconds' ? { value: ratio, unit: '× yardstick' } : { value, unit };
    }
    return found;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#parts.disposeAsync();
  }
}

async function sample(product: Product, probe: Probe): Promise<Sample> {
  const pid = await product.daemonPid();
  const totals = await probe.ask(pid);
  const io = await readFile(`/proc/${pid}/io`, 'utf8');
  const { requests, wire_bytes, misses, hits } = await product.stats();
  const writtenBytes = Number(/^write_bytes: (\d+)$/m.exec(io)?.[1]);
  return { ...totals, writtenBytes, requests, wireBytes: wire_bytes, misses, kernelReads: hits + misses };
}
