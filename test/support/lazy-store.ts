// A node store with layers for tests of the store and the loader: real file, real SQLite, real addon; only the
// registry is a map in memory that can be told to misbehave.
import { createHash } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gzipSync, zstdDecompressSync } from 'node:zlib';
import { type Digest, digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { NodeStore, type NodeStoreOptions, type StoreNative } from '../../src/fs/chunks/node-store.ts';
import { buildLayerIndex } from '../../src/fs/index/builder.ts';
import type { LayerIndex } from '../../src/fs/index/layer-index.ts';
import { LazyLoader, type LazyLoaderOptions } from '../../src/fs/lazy-loader.ts';
import type { LayerBlobSource, LoadableLayer } from '../../src/fs/loadable-layer.ts';
import { native } from '../../src/fs/native.ts';
import type { BlobId, BlobReader, OnPart } from '../../src/fs/registry/blob-reader.ts';
import { readRangesOneByOne } from '../../src/fs/registry/wanted-parts.ts';
import { createLogger, type Logger } from '../../src/log.ts';
import { RootPaths } from '../../src/paths.ts';
import { type ByteRange, GiB } from '../../src/units.ts';
import { tarOf } from './tar.ts';

export const quiet: Logger = createLogger('test', { level: 'error', fd: 2 });
quiet.level = 'silent';

export interface TestFile {
  readonly name: string;
  readonly content: Buffer;
}

export interface TestLayer {
  readonly files: readonly TestFile[];
  readonly blob: Buffer;
  readonly id: BlobId;
  readonly index: LayerIndex;
  readonly indexDigest: Digest;
  readonly restart: Buffer;
}

/** Bytes that do not compress, the same for the same seed. */
export function noise(seed: string, bytes: number): Buffer {
  const blocks: Buffer[] = [];
  for (let i = 0; i * 32 < bytes; i++) blocks.push(createHash('sha256').update(`${seed}${i}`).digest());
  return Buffer.concat(blocks).subarray(0, bytes);
}

/** Bytes that compress about threefold, different everywhere. */
export function prose(seed: string, bytes: number): Buffer {
  const hex = noise(seed, Math.ceil(bytes / 4)).toString('hex');
  return Buffer.from(`${hex}${hex.split('').reverse().join('')}`.slice(0, bytes).padEnd(bytes, '.'), 'latin1');
}

export interface LayerOptions {
  readonly compression?: 'gzip' | 'none';
  readonly spanBytes?: number;
  readonly chunkBytes?: number;
  readonly pieceBytes?: number;
}

/** A layer with these files, its index built by the product's own builder. */
export async function layerOf(files: readonly TestFile[], options: LayerOptions = {}): Promise<TestLayer> {
  return await layerOfTar(tarOf(files.map(({ name, content }) => ({ name, content }))), files, options);
}

/** A layer out of a tar archive that holds these files. */
export async function layerOfTar(
  tar: Buffer,
  files: readonly TestFile[],
  options: LayerOptions = {},
): Promise<TestLayer> {
  const blob = options.compression === 'none' ? tar : gzipSync(tar);
  const digest = digestOf(blob);
  async function* stream(): AsyncGenerator<Buffer> {
    for (let at = 0; at < blob.length; at += 65536) yield blob.subarray(at, at + 65536);
  }
  const { index, indexBlob, restartBlob } = await buildLayerIndex({
    stream: stream(),
    layerDigest: digest,
    layerBytes: blob.length,
    ...options,
  });
  return {
    files,
    blob,
    id: { digest, size: blob.length },
    index,
    indexDigest: digestOf(indexBlob),
    restart: restartBlob,
  };
}

/** What a request to a MemoryBlobs may be answered with instead of the bytes. */
export type Misbehaviour = (request: {
  blob: BlobId;
  range: ByteRange;
  bytes: Buffer;
  number: number;
  signal: AbortSignal;
}) => Buffer | undefined | Promise<Buffer | undefined>;

/** A registry in memory. */
export class MemoryBlobs implements BlobReader {
  readonly blobs = new Map<string, Buffer>();
  readonly requests: { digest: string; offset: number; length: number }[] = [];
  misbehave: Misbehaviour | undefined;
  delayMs = 0;
  running = 0;
  mostRunning = 0;

  constructor(...layers: TestLayer[]) {
    for (const layer of layers) this.add(layer);
  }

  add(layer: TestLayer): void {
    this.blobs.set(layer.id.digest, layer.blob);
  }

  get bytes(): number {
    return this.requests.reduce((sum, request) => sum + request.length, 0);
  }

  async readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer> {
    this.requests.push({ digest: blob.digest, ...range });
    const number = this.requests.length;
    this.running++;
    this.mostRunning = Math.max(this.mostRunning, this.running);
    try {
      if (this.delayMs > 0) await new Promise((resolve) => setTimeout(resolve, this.delayMs));
      const whole = this.blobs.get(blob.digest);
      if (whole === undefined) throw new DedupError('REGISTRY_NOT_FOUND', `no blob ${blob.digest}`);
      const bytes = Buffer.from(whole.subarray(range.offset, range.offset + range.length));
      return (await this.misbehave?.({ blob, range, bytes, number, signal })) ?? bytes;
    } finally {
      this.running--;
    }
  }

  readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void> {
    return readRangesOneByOne(this, blob, ranges, signal, onPart);
  }

  async *readAll(blob: BlobId): AsyncGenerator<Buffer> {
    const whole = this.blobs.get(blob.digest);
    if (whole === undefined) throw new DedupError('REGISTRY_NOT_FOUND', `no blob ${blob.digest}`);
    yield whole;
  }
}

/** A store in a directory of its own. */
export class TestStore {
  readonly root: string;
  readonly paths: RootPaths;
  store!: NodeStore;

  constructor(root: string) {
    this.root = root;
    this.paths = new RootPaths(root);
  }

  static async create(options: Partial<NodeStoreOptions> = {}, root?: string): Promise<TestStore> {
    const made = new TestStore(root ?? (await mkdtemp(join(tmpdir(), 'dedup-store-'))));
    await made.open(options);
    return made;
  }

  async open(options: Partial<NodeStoreOptions> = {}): Promise<void> {
    this.store = await NodeStore.open({
      paths: this.paths,
      native: native(),
      log: quiet,
      storeBytes: 128 * GiB,
      flushDelayMs: 60_000,
      ...options,
    });
  }

  async remove(): Promise<void> {
    await this.store.close();
    await rm(this.root, { recursive: true, force: true });
  }
}

/** The addon with some functions replaced. */
export function nativeWith(replaced: Partial<StoreNative>): StoreNative {
  const addon = native();
  return {
    presenceCreate: addon.presenceCreate,
    touchedCreate: addon.touchedCreate,
    presenceSet: addon.presenceSet,
    presenceTest: addon.presenceTest,
    presenceClearEpoch: addon.presenceClearEpoch,
    findHoles: addon.findHoles,
    punchHole: addon.punchHole,
    storePieces: addon.storePieces,
    readStore: addon.readStore,
    ...replaced,
  };
}

export interface StoredTestLayer {
  readonly layer: TestLayer;
  readonly layerId: number;
  readonly addresses: Float64Array;
}

/** A store with layers in it and a loader over registries in memory. */
export class LoaderRig {
  readonly node: TestStore;
  readonly layers = new Map<number, StoredTestLayer>();
  readonly sources = new Map<number, LayerBlobSource[]>();
  loader!: LazyLoader;
  opened = 0;

  private constructor(node: TestStore) {
    this.node = node;
  }

  static async create(
    options: Partial<LazyLoaderOptions> = {},
    store: Partial<NodeStoreOptions> = {},
    root?: string,
  ): Promise<LoaderRig> {
    const rig = new LoaderRig(await TestStore.create(store, root));
    rig.start(options);
    return rig;
  }

  start(options: Partial<LazyLoaderOptions> = {}): void {
    this.loader = new LazyLoader({
      store: this.node.store,
      native: native(),
      log: quiet,
      layers: { openLayer: (layerId) => this.#openLayer(layerId) },
      ...options,
    });
  }

  async #openLayer(layerId: number): Promise<LoadableLayer> {
    this.opened++;
    const { layer } = this.layers.get(layerId)!;
    return {
      index: layer.index,
      addresses: await this.node.store.layerAddresses(layerId),
      windows: { readWindows: async (first, count) => windowsOf(layer, first, count) },
      sources: () => this.sources.get(layerId) ?? [],
    };
  }

  async add(
    layer: TestLayer,
    sources: LayerBlobSource[],
    options: { scope?: string; contiguousFiles?: boolean } = {},
  ): Promise<StoredTestLayer> {
    const { layerId, addresses } = await this.node.store.addLayer(layer.index, {
      scope: options.scope ?? '',
      indexDigest: layer.indexDigest,
      sources: sources.map(({ host }) => ({ host, repository: 'test' })),
      trust: 'annotation',
      contiguousFiles: options.contiguousFiles ?? false,
    });
    const stored = { layer, layerId, addresses };
    this.layers.set(layerId, stored);
    this.sources.set(layerId, sources);
    return stored;
  }

  /** Reads a file of a layer through the loader, the way the kernel would: whole blocks, chunk by chunk. */
  async readFile(stored: StoredTestLayer, name: string, blocksPerRead = 32): Promise<Buffer> {
    const { layer, layerId, addresses } = stored;
    const { entries, chunks } = layer.index;
    const entry = entries.name.indexOf(name);
    const parts: Buffer[] = [];
    for (let i = 0; i < entries.chunkCount[entry]!; i++) {
      const chunk = entries.firstChunk[entry]! + i;
      const length = chunks.length[chunk]!;
      if (chunks.zero[chunk] === 1 && addresses[chunk] === 0) {
        parts.push(Buffer.alloc(length));
        continue;
      }
      const blocks = Math.ceil(length / 4096);
      const padded: Buffer[] = [];
      for (let at = 0; at < blocks; at += blocksPerRead) {
        const range = { offset: addresses[chunk]! + at * 4096, length: Math.min(blocksPerRead, blocks - at) * 4096 };
        padded.push(...(await this.loader.read(range, { layers: [layerId] })));
      }
      const whole = Buffer.concat(padded);
      if (whole.subarray(length).some((byte) => byte !== 0))
        throw new Error(`${name}: bytes after its end are not zeros`);
      parts.push(whole.subarray(0, length));
    }
    return Buffer.concat(parts);
  }

  /** Every file of a layer, compared byte by byte. */
  async mustEqual(stored: StoredTestLayer): Promise<void> {
    for (const file of stored.layer.files) {
      const read = await this.readFile(stored, file.name);
      if (!read.equals(file.content)) throw new Error(`${file.name} differs`);
    }
  }

  stop(): void {
    this.loader.close();
  }

  /** An orderly restart; `meanwhile` finds the store closed. */
  async restart(meanwhile?: () => Promise<unknown>): Promise<void> {
    this.loader.close();
    await this.node.store.close();
    await meanwhile?.();
    await this.node.open();
    this.start();
  }

  async remove(): Promise<void> {
    this.loader.close();
    await this.node.remove();
  }
}

/** Decompressed windows of spans, out of the restart blob. */
export function windowsOf(layer: TestLayer, first: number, count: number): Uint8Array[] {
  const { windowOffset, windowLength } = layer.index.spans;
  return Array.from({ length: count }, (_, i) => {
    const length = windowLength[first + i]!;
    const offset = windowOffset[first + i]!;
    return length === 0 ? Buffer.alloc(0) : zstdDecompressSync(layer.restart.subarray(offset, offset + length));
  });
}
