// A whole node for end-to-end tests: registry, a proxy before it that counts, the product as built, and a containerd
// that knows it as snapshotter `dedup`. Images made here are pulled through the proxy.
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import Database from 'better-sqlite3';
import { type CommandResult, mountsBelow, TestContainerd, type TestContainerdOptions, waitFor } from './containerd.ts';
import { FaultProxy } from './fault-proxy.ts';
import { busyboxEntries, type LayerSource, makeImage, pushLayout, type TestImage } from './images.ts';
import { Product } from './product.ts';
import { RegistryProcess, type RegistryProcessOptions } from './registry.ts';
import { SnapshotsClient } from './snapshots-service.ts';

export interface LazyNodeOptions {
  readonly config?: Readonly<Record<string, unknown>>;
  /** Words before the product's commands. */
  readonly inside?: readonly string[];
  readonly containerd?: TestContainerdOptions;
  readonly registry?: RegistryProcessOptions;
  /** Called with the host of the proxy before containerd starts; what it answers is added to containerd's options. */
  readonly prepare?: (node: {
    registry: RegistryProcess;
    proxy: FaultProxy;
  }) => Promise<Partial<TestContainerdOptions>>;
}

/** An image in the registry: as it was made, and its copy with indexes. */
export interface PublishedImage {
  readonly image: TestImage;
  /** Reference of the unchanged image, through the proxy. */
  readonly plain: string;
  /** Reference of the annotated copy, through the proxy. */
  readonly lazy: string;
}

/** Loop devices whose backing file the predicate accepts. */
export function loopDevices(accept: (backingFile: string) => boolean): string[] {
  return readdirSync('/sys/block')
    .filter((name) => name.startsWith('loop'))
    .filter((name) => {
      const file = join('/sys/block', name, 'loop', 'backing_file');
      try {
        return accept(readFileSync(file, 'utf8').trim());
      } catch {
        return false; // Not attached, or detached meanwhile.
      }
    });
}

/** What a directory holds; nothing when it has not been made yet. */
function names(dir: string): string[] {
  return existsSync(dir) ? readdirSync(dir) : [];
}

/** Bytes that no compression makes fewer; the same ones for the same seed. */
export function noise(bytes: number, seed: string): Buffer {
  const out = Buffer.alloc(bytes);
  for (let at = 0, count = 0; at < bytes; at += 32, count++)
    createHash('sha256').update(`${seed} ${count}`).digest().copy(out, at);
  return out;
}

/** What `sha256sum PATH` prints of noise. */
export function noiseSum(bytes: number, seed: string, path: string): string {
  return `${createHash('sha256').update(noise(bytes, seed)).digest('hex')}  ${path}\n`;
}

/** Size of /cold and of /unread in smallLayers. */
export const FILE_BYTES = 3 << 20;

/** A layer that can run a shell; above it one with /mark, which holds `mark`, and noise in /cold and /unread. */
export async function smallLayers(mark: string): Promise<LayerSource[]> {
  return [
    { entries: await busyboxEntries(['sh', 'cat', 'sleep', 'echo', 'sha256sum', 'ls']) },
    {
      entries: [
        { name: 'mark', content: mark },
        { name: 'cold', content: noise(FILE_BYTES, `cold ${mark}`) },
        { name: 'unread', content: noise(FILE_BYTES, `unread ${mark}`) },
      ],
    },
  ];
}

export class LazyNode {
  readonly registry: RegistryProcess;
  readonly proxy: FaultProxy;
  readonly product: Product;
  readonly containerd: TestContainerd;
  readonly #layouts = new Set<string>();
  /** `user:password` given to `index`. */
  readonly #login: string | undefined;
  #containers = 0;

  private constructor(
    parts: { registry: RegistryProcess; proxy: FaultProxy; product: Product; containerd: TestContainerd },
    login: string | undefined,
  ) {
    this.registry = parts.registry;
    this.proxy = parts.proxy;
    this.product = parts.product;
    this.containerd = parts.containerd;
    this.#login = login;
  }

  /** Starts everything. `login`: user:password for a registry with htpasswd. */
  static async start(options: LazyNodeOptions = {}, login?: string): Promise<LazyNode> {
    const registry = await RegistryProcess.start(options.registry);
    const proxy = await FaultProxy.start(`http://${registry.host}`);
    // Most tests look at what was unpacked; those of conversions say so.
    const config = { convert_ordinary: false, ...options.config };
    const product = await Product.create(config, { inside: options.inside ?? [] });
    try {
      await product.start();
      const more = (await options.prepare?.({ registry, proxy })) ?? {};
      const containerd = await TestContainerd.start({
        proxies: { dedup: product.address },
        ...options.containerd,
        ...more,
      });
      return new LazyNode({ registry, proxy, product, containerd }, login);
    } catch (error) {
      await product.stop();
      await proxy.stop();
      await registry.stop();
      throw error;
    }
  }

  /**
   * Runs the service again and waits until containerd has found it: up to three seconds after a service that was killed
   * (its gRPC client's backoff).
   */
  async startService(): Promise<void> {
    await this.product.start();
    const snapshots = ['snapshots', '--snapshotter', 'dedup'];
    await waitFor('containerd to have found the service', async () => {
      const { code } = await this.containerd.ctr([...snapshots, 'prepare', 'reached'], { allowFailure: true });
      return code === 0;
    });
    await this.containerd.ctr([...snapshots, 'rm', 'reached']);
  }

  /** Makes an image, pushes it, and makes a lazily loadable copy of it beside it. */
  async publish(
    repository: string,
    layers: readonly LayerSource[],
    config?: Readonly<Record<string, unknown>>,
  ): Promise<PublishedImage> {
    const image = await makeImage({ layers, tag: 'plain', ...(config === undefined ? {} : { config }) });
    this.#layouts.add(image.dir);
    const pushed = await pushLayout(image.dir, 'plain', this.registry.host, repository, 'plain', this.#login);
    const login = this.#login === undefined ? [] : ['--user', this.#login];
    await this.product.cli(['index', ...login, pushed, '--annotate', `${this.registry.host}/${repository}:lazy`]);
    const through = (tag: string) => `${this.proxy.host}/${repository}:${tag}`;
    return { image, plain: through('plain'), lazy: through('lazy') };
  }

  /** `dedup-snapshotter rpull` into this containerd. */
  async rpull(
    reference: string,
    flags: readonly string[] = [],
    options: { allowFailure?: boolean } = {},
  ): Promise<CommandResult> {
    const { address, namespace } = this.containerd;
    return await this.product.cli(['rpull', '-a', address, '-n', namespace, ...flags, reference], options);
  }

  /** `ctr run --rm` of a shell script with snapshotter dedup; what it printed. */
  async runScript(
    reference: string,
    script: string,
    options: { namespace?: string; allowFailure?: boolean } = {},
  ): Promise<CommandResult> {
    const name = `c${++this.#containers}-${process.pid}`;
    const args = ['run', '--rm', '--snapshotter', 'dedup', reference, name, '/bin/sh', '-c', script];
    return await this.containerd.ctr(args, options);
  }

  /** Bytes of each layer, bottom to top, that have been sent since the proxy was last reset, lazy reads included. */
  fetched(image: TestImage): number[] {
    return image.layers.map(
      ({ digest }) => this.proxy.count({ method: 'GET', path: new RegExp(`/blobs/${digest}`) }).bytes,
    );
  }

  /** Requests for bytes of this image's layers since the proxy was last reset. */
  layerRequests(image: TestImage): number {
    return image.layers.reduce(
      (sum, { digest }) => sum + this.proxy.count({ method: 'GET', path: new RegExp(`/blobs/${digest}`) }).requests,
      0,
    );
  }

  /** Calls to the product's own snapshots socket. The caller closes it. */
  snapshots(): SnapshotsClient {
    return new SnapshotsClient(this.product.address);
  }

  #query(database: string, query: string): unknown[] {
    const db = new Database(join(this.product.root, database), { readonly: true });
    try {
      return db.prepare(query).pluck().all();
    } finally {
      db.close();
    }
  }

  /** One number from index.db, read as an operator would. */
  indexCount(query: string): number {
    return this.#query('index.db', query)[0] as number;
  }

  /** Digests of the layers that are committed as remote snapshots, once for each snapshot. */
  remoteSnapshots(): string[] {
    const query = 'SELECT layer_digest FROM snapshots WHERE layer_digest IS NOT NULL ORDER BY id';
    return this.#query('metadata.db', query) as string[];
  }

  /** Forces containerd's collection, then what the snapshotter does after it. */
  async collect(): Promise<void> {
    await this.containerd.gc();
    const client = this.snapshots();
    try {
      await client.cleanup();
    } finally {
      client.close();
    }
  }

  /** What the node holds of images beside containerd's records. */
  async leftovers(): Promise<Record<string, unknown>> {
    const client = this.snapshots();
    try {
      const { root } = this.product;
      return {
        snapshots: await client.names(),
        directories: names(join(root, 'snapshots')),
        layers: this.indexCount('SELECT COUNT(*) FROM layers'),
        references: this.indexCount('SELECT COUNT(*) FROM chunks WHERE ref_count > 0'),
        images: this.indexCount('SELECT COUNT(*) FROM images'),
        metadata: names(join(root, 'images')).filter((name) => name.endsWith('.erofs')),
        indexes: names(join(root, 'images', 'layers')).filter((name) => !this.#kept().has(name)),
        mounts: mountsBelow(this.product.dir),
        loops: this.loops(),
      };
    } finally {
      client.close();
    }
  }

  /** Files of indexes that are kept for the next pull of layers that have gone. */
  #kept(): Set<string> {
    const directory = join(this.product.root, 'images', 'kept');
    const files = names(directory).map((name) => JSON.parse(readFileSync(join(directory, name), 'utf8')));
    const hex = (digest: string) => digest.slice('sha256:'.length);
    return new Set(
      (files as { index: string; restart: string }[]).flatMap(({ index, restart }) => [
        `${hex(index)}.index`,
        `${hex(restart)}.restart`,
      ]),
    );
  }

  /** Loop devices that hold a file of the product's. */
  loops(): string[] {
    return loopDevices((file) => file.startsWith(this.product.dir));
  }

  /** Ends everything; fails when the product leaves a mount, a loop device or a process. */
  async stop(): Promise<void> {
    await this.containerd.stop();
    await this.product.stop();
    await this.proxy.stop();
    await this.registry.stop();
    for (const dir of this.#layouts) await rm(dir, { recursive: true, force: true });
    await waitFor('loop devices to go', () => this.loops().length === 0, 5_000);
  }
}

/** What leftovers() answers when nothing is left. */
export const NOTHING_LEFT = {
  snapshots: [],
  directories: [],
  layers: 0,
  references: 0,
  images: 0,
  metadata: [],
  indexes: [],
  mounts: [],
  loops: [],
};
