// The snapshots service as the product wires it, on a root directory and socket of its own, with a client of the same
// protocol. For tests of the service; lazy layers come from whatever ImageMounter the test gives.
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { credentials, Metadata, type ServiceClientConstructor } from '@grpc/grpc-js';
import { type Logger, pino } from 'pino';
import { RootPaths } from '../../src/paths.ts';
import { loadProto } from '../../src/protocol.ts';
import type { ConverterSettings } from '../../src/snapshotter/converter.ts';
import { startSnapshotsServer } from '../../src/snapshotter/grpc-server.ts';
import { type ImageMounter, noImages } from '../../src/snapshotter/images.ts';
import { type Metastore, openMetastore } from '../../src/snapshotter/metastore-client.ts';
import type { Mount } from '../../src/snapshotter/mounts.ts';
import { Snapshotter } from '../../src/snapshotter/snapshotter.ts';
import { unmountBelow } from './containerd.ts';

export interface WireInfo {
  readonly name: string;
  readonly parent: string;
  /** 1 view, 2 active, 3 committed. */
  readonly kind: number;
  readonly created_at: { readonly seconds: number; readonly nanos: number };
  readonly updated_at: { readonly seconds: number; readonly nanos: number };
  readonly labels: Readonly<Record<string, string>>;
}

/** What containerd's own socket needs to know beside a key; our socket takes no notice of it. */
export interface ClientScope {
  readonly snapshotter?: string;
  readonly namespace?: string;
  readonly lease?: string;
}

/** Calls over the socket; errors are grpc-js ServiceErrors with `code` and `details`. */
export class SnapshotsClient {
  readonly #client: InstanceType<ServiceClientConstructor>;
  readonly #metadata = new Metadata();
  readonly #snapshotter: string;

  constructor(address: string, scope: ClientScope = {}) {
    this.#snapshotter = scope.snapshotter ?? '';
    if (scope.namespace !== undefined) this.#metadata.set('containerd-namespace', scope.namespace);
    if (scope.lease !== undefined) this.#metadata.set('containerd-lease', scope.lease);
    const packages = loadProto('snapshots.proto') as unknown as {
      containerd: { services: { snapshots: { v1: { Snapshots: ServiceClientConstructor } } } };
    };
    this.#client = new packages.containerd.services.snapshots.v1.Snapshots(
      `unix:${address}`,
      credentials.createInsecure(),
    );
  }

  #call<T>(method: string, request: object, signal?: AbortSignal): Promise<T> {
    return new Promise((resolve, reject) => {
      const invoke = this.#client[method] as (
        request: object,
        metadata: Metadata,
        done: (error: Error | null, value: T) => void,
      ) => { cancel(): void };
      const whole = { snapshotter: this.#snapshotter, ...request };
      const call = invoke.call(this.#client, whole, this.#metadata, (error, value) =>
        error === null ? resolve(value) : reject(error),
      );
      signal?.addEventListener('abort', () => call.cancel(), { once: true });
    });
  }

  /** The signal cancels the call, as a client does that ends. */
  async prepare(key: string, parent = '', labels: Record<string, string> = {}, signal?: AbortSignal): Promise<Mount[]> {
    return (await this.#call<{ mounts: Mount[] }>('Prepare', { key, parent, labels }, signal)).mounts;
  }
  async view(key: string, parent = '', labels: Record<string, string> = {}): Promise<Mount[]> {
    return (await this.#call<{ mounts: Mount[] }>('View', { key, parent, labels })).mounts;
  }
  async mounts(key: string): Promise<Mount[]> {
    return (await this.#call<{ mounts: Mount[] }>('Mounts', { key })).mounts;
  }
  async commit(name: string, key: string, labels: Record<string, string> = {}, parent = ''): Promise<void> {
    await this.#call('Commit', { name, key, labels, parent });
  }
  async remove(key: string): Promise<void> {
    await this.#call('Remove', { key });
  }
  async stat(key: string): Promise<WireInfo> {
    return (await this.#call<{ info: WireInfo }>('Stat', { key })).info;
  }
  async update(name: string, labels: Record<string, string>, paths: string[] = []): Promise<WireInfo> {
    const request = { info: { name, labels }, update_mask: { paths } };
    return (await this.#call<{ info: WireInfo }>('Update', request)).info;
  }
  async usage(key: string): Promise<{ size: number; inodes: number }> {
    return await this.#call('Usage', { key });
  }
  async cleanup(): Promise<void> {
    await this.#call('Cleanup', {});
  }

  /** The messages of a List; `eachBlock` runs while the stream is open. */
  async list(filters: string[] = [], eachBlock: (block: WireInfo[]) => Promise<void> = async () => {}) {
    const invoke = this.#client.List as (request: object, metadata: Metadata) => AsyncIterable<{ info: WireInfo[] }>;
    const blocks: WireInfo[][] = [];
    for await (const { info } of invoke.call(
      this.#client,
      { snapshotter: this.#snapshotter, filters },
      this.#metadata,
    )) {
      blocks.push(info);
      await eachBlock(info);
    }
    return blocks;
  }

  async names(...filters: string[]): Promise<string[]> {
    return (await this.list(filters)).flat().map(({ name }) => name);
  }

  close(): void {
    this.#client.close();
  }
}

export interface TestServiceOptions {
  readonly images?: ImageMounter;
  readonly networkBudgetMs?: number;
  readonly log?: Logger;
  readonly cleanupDelayMs?: number;
  readonly remapIds?: boolean;
  /** Ordinary layers are converted; absent: they are not. */
  readonly convert?: ConverterSettings;
  /** What commits are said to be made in; the kernel's boot id when absent. */
  boot?: string;
}

export class TestService {
  readonly dir: string;
  readonly paths: RootPaths;
  readonly address: string;
  readonly #options: TestServiceOptions;
  #stop: (() => Promise<void>) | undefined;
  #client: SnapshotsClient | undefined;
  #metastore: Metastore | undefined;
  #snapshotter: Snapshotter | undefined;

  private constructor(dir: string, options: TestServiceOptions) {
    this.dir = dir;
    this.paths = new RootPaths(join(dir, 'root'));
    this.address = join(dir, 'run', 'snapshots.sock');
    this.#options = options;
  }

  static async start(options: TestServiceOptions = {}): Promise<TestService> {
    const service = new TestService(await mkdtemp(join(tmpdir(), 'snapshots-')), options);
    await service.up();
    return service;
  }

  get client(): SnapshotsClient {
    if (this.#client === undefined) throw new Error('the service is down');
    return this.#client;
  }

  /** The database behind the service. */
  get metastore(): Metastore {
    if (this.#metastore === undefined) throw new Error('the service is down');
    return this.#metastore;
  }

  /** The state machine behind the socket. */
  get snapshotter(): Snapshotter {
    if (this.#snapshotter === undefined) throw new Error('the service is down');
    return this.#snapshotter;
  }

  async up(): Promise<void> {
    await mkdir(this.paths.root, { recursive: true });
    const log = this.#options.log ?? pino({ level: 'silent' });
    const metastore = await openMetastore(this.paths.metadataDb, this.#options.boot);
    const snapshotter = new Snapshotter({
      paths: this.paths,
      metastore,
      images: this.#options.images ?? noImages('there is no dedupd in this test'),
      sourceOf: testSource,
      log,
      networkBudgetMs: this.#options.networkBudgetMs ?? 2000,
      cleanupDelayMs: this.#options.cleanupDelayMs ?? 30_000,
      releaseDelayMs: this.#options.cleanupDelayMs ?? 60_000,
      remapIds: this.#options.remapIds ?? false,
      ...(this.#options.convert === undefined ? {} : { convert: this.#options.convert }),
      leftoverDelayMs: 200,
    });
    await snapshotter.start();
    const server = await startSnapshotsServer({ address: this.address, snapshotter, log });
    this.#client = new SnapshotsClient(this.address);
    this.#metastore = metastore;
    this.#snapshotter = snapshotter;
    this.#stop = async () => {
      this.#client?.close();
      await server.close();
      await snapshotter.close();
      await metastore.close();
    };
  }

  async down(): Promise<void> {
    await this.#stop?.();
    this.#stop = undefined;
    this.#client = undefined;
    this.#metastore = undefined;
    this.#snapshotter = undefined;
  }

  async restart(): Promise<void> {
    await this.down();
    await this.up();
  }

  /** Ends everything and removes the directory. Safe to call twice. */
  async stop(): Promise<void> {
    await this.down();
    await unmountBelow(this.dir);
    await rm(this.dir, { recursive: true, force: true });
  }
}

/** host/path:tag or host/path@digest, as tests write references. */
function testSource(reference: string): { host: string; repository: string } {
  const [, host, repository] = /^([^/]+)\/([^:@]+)/.exec(reference) ?? [];
  if (host === undefined || repository === undefined) throw new Error(`not a reference: ${reference}`);
  return { host, repository };
}
