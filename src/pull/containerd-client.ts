// containerd's own API over its unix socket: content, images, leases, snapshots and diff, as typed calls of one
// namespace. Called by pull.ts and manifest-search.ts; knows nothing of registries or of pulling.
import * as grpc from '@grpc/grpc-js';
import { type Digest, isDigest, parseDigest } from '../digest.ts';
import { DedupError, type ErrorCode, GrpcStatus } from '../errors.ts';
import { loadProto } from '../protocol.ts';
import { ContentWriter, type WriteResponse } from './content-writer.ts';

export type Labels = Readonly<Record<string, string>>;

/** An OCI descriptor, as containerd takes it. */
export interface Descriptor {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly annotations?: Labels;
}

export interface Mount {
  readonly type: string;
  readonly source: string;
  readonly target: string;
  readonly options: readonly string[];
}

export interface ContentInfo {
  readonly digest: Digest;
  readonly size: number;
  /** When it was made or its labels were last changed. */
  readonly updated_at: { readonly seconds: number; readonly nanos: number };
  readonly labels: Labels;
}

export interface ImageRecord {
  readonly name: string;
  readonly labels: Labels;
  readonly target: Descriptor;
}

/** What a lease keeps from garbage collection. It may be named before it exists. */
export interface LeaseResource {
  readonly id: string;
  readonly type: 'content' | 'ingests' | `snapshots/${string}`;
}

/** What surrounds one call. */
export interface CallScope {
  /** Lease that what the call makes belongs to. */
  readonly lease?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Default: 60 s; 0 for none. */
  readonly timeoutMs?: number;
}

export interface ContainerdClientOptions {
  /** Path of containerd's unix socket. */
  readonly address: string;
  readonly namespace: string;
}

const DEFAULT_TIMEOUT_MS = 60_000;

type ServiceName = 'content' | 'containers' | 'images' | 'leases' | 'namespaces' | 'snapshots' | 'diff';

const SERVICES: Readonly<Record<ServiceName, { file: string; service: string }>> = {
  content: { file: 'containerd/content.proto', service: 'Content' },
  containers: { file: 'containerd/containers.proto', service: 'Containers' },
  images: { file: 'containerd/images.proto', service: 'Images' },
  leases: { file: 'containerd/leases.proto', service: 'Leases' },
  namespaces: { file: 'containerd/namespaces.proto', service: 'Namespaces' },
  snapshots: { file: 'snapshots.proto', service: 'Snapshots' },
  diff: { file: 'containerd/diff.proto', service: 'Diff' },
};

const CODES: Readonly<Record<number, ErrorCode>> = {
  [GrpcStatus.cancelled]: 'CANCELLED',
  [GrpcStatus.invalidArgument]: 'INVALID_ARGUMENT',
  [GrpcStatus.deadlineExceeded]: 'DEADLINE',
  [GrpcStatus.notFound]: 'NOT_FOUND',
  [GrpcStatus.alreadyExists]: 'ALREADY_EXISTS',
  [GrpcStatus.permissionDenied]: 'NOT_ROOT',
  [GrpcStatus.resourceExhausted]: 'UNAVAILABLE',
  [GrpcStatus.failedPrecondition]: 'FAILED_PRECONDITION',
  [GrpcStatus.aborted]: 'UNAVAILABLE',
  [GrpcStatus.unimplemented]: 'UNIMPLEMENTED',
  [GrpcStatus.unavailable]: 'UNAVAILABLE',
  [GrpcStatus.dataLoss]: 'DIGEST_MISMATCH',
};

/** True for a DedupError of `code`. */
export function hasCode(error: unknown, code: ErrorCode): boolean {
  return error instanceof DedupError && error.code === code;
}

export class ContainerdClient {
  readonly address: string;
  readonly namespace: string;
  readonly #clients = new Map<ServiceName, grpc.Client>();
  #closed = false;

  constructor(options: ContainerdClientOptions) {
    this.address = options.address;
    this.namespace = options.namespace;
  }

  /** Ends all connections. Safe to call twice. */
  close(): void {
    this.#closed = true;
    for (const client of this.#clients.values()) client.close();
    this.#clients.clear();
  }

  // --- content ---------------------------------------------------------------------------------------------------

  /** Size and labels of a blob; undefined when this namespace does not have it. */
  async contentInfo(digest: Digest, scope: CallScope = {}): Promise<ContentInfo | undefined> {
    const response = await this.#maybe<{ info: ContentInfo }>(
      'content',
      'Info',
      { digest },
      `content ${digest}`,
      scope,
    );
    return response?.info;
  }

  /** Sets the labels named and leaves the others. Errors: NOT_FOUND. */
  async setContentLabels(digest: Digest, labels: Labels, scope: CallScope = {}): Promise<void> {
    const paths = Object.keys(labels).map((name) => `labels.${name}`);
    const request = { info: { digest, labels }, update_mask: { paths } };
    await this.#unary('content', 'Update', request, `labelling content ${digest}`, scope);
  }

  /** A whole small blob. Errors: NOT_FOUND; INVALID_ARGUMENT when it is larger than `maxBytes`. */
  async readContent(digest: Digest, maxBytes: number, scope: CallScope = {}): Promise<Buffer> {
    const doing = `reading content ${digest}`;
    const info = await this.contentInfo(digest, scope);
    if (info === undefined) throw new DedupError('NOT_FOUND', `${doing}: containerd does not have it`);
    if (info.size > maxBytes) {
      throw new DedupError('INVALID_ARGUMENT', `${doing}: ${info.size} bytes are more than the ${maxBytes} expected`);
    }
    const parts: Buffer[] = [];
    for await (const { data } of this.#streamed<{ data: Buffer }>('content', 'Read', { digest }, doing, scope))
      parts.push(data);
    return Buffer.concat(parts);
  }

  /** The bytes of a blob, one message after the other. Errors: NOT_FOUND, UNAVAILABLE, CANCELLED. */
  async *streamContent(digest: Digest, scope: CallScope = {}): AsyncGenerator<Buffer> {
    const call = { timeoutMs: 0, ...scope };
    for await (const { data } of this.#streamed<{ data: Buffer }>(
      'content',
      'Read',
      { digest },
      `reading ${digest}`,
      call,
    ))
      yield data;
  }

  /** What the namespace has that passes one of the filters (containerd filters/filter.go). */
  async listContent(filters: readonly string[], scope: CallScope = {}): Promise<ContentInfo[]> {
    const found: ContentInfo[] = [];
    const blocks = this.#streamed<{ info: ContentInfo[] }>('content', 'List', { filters }, 'listing content', scope);
    for await (const { info } of blocks) found.push(...info);
    return found;
  }

  /**
   * Opens the writer of an ingest. Its state survives `close`: a later writer of the same `ref` goes on from there.
   * Errors: ALREADY_EXISTS when the namespace has the blob; UNAVAILABLE while another writer has the ref open.
   */
  async openWriter(ref: string, blob: { digest: Digest; size: number }, scope: CallScope): Promise<ContentWriter> {
    const call = this.#start(
      'content',
      'Write',
      { timeoutMs: 0, ...scope },
      (client, path, serialize, deserialize, metadata, options) =>
        client.makeBidiStreamRequest(path, serialize, deserialize, metadata, options),
    ) as grpc.ClientDuplexStream<object, WriteResponse>;
    const writer = new ContentWriter(call, (error) => this.#error(error, `writing content ${blob.digest}`));
    await writer.open(ref, blob);
    return writer;
  }

  /** Drops an ingest; nothing happens when there is none. */
  async abortIngest(ref: string, scope: CallScope = {}): Promise<void> {
    await this.#maybe('content', 'Abort', { ref }, `dropping ingest ${ref}`, scope);
  }

  // --- leases ----------------------------------------------------------------------------------------------------

  async createLease(id: string, labels: Labels, scope: CallScope = {}): Promise<void> {
    await this.#unary('leases', 'Create', { id, labels }, `creating lease ${id}`, scope);
  }

  /** Nothing happens when there is no such lease. With `sync` garbage collection has run when this returns. */
  async deleteLease(id: string, sync: boolean, scope: CallScope = {}): Promise<void> {
    await this.#maybe('leases', 'Delete', { id, sync }, `deleting lease ${id}`, scope);
  }

  async addToLease(id: string, resource: LeaseResource, scope: CallScope = {}): Promise<void> {
    await this.#unary(
      'leases',
      'AddResource',
      { id, resource },
      `adding ${resource.type} ${resource.id} to lease ${id}`,
      scope,
    );
  }

  // --- images ----------------------------------------------------------------------------------------------------

  /** Name and digest of an image record; undefined when there is none. */
  async getImage(name: string, scope: CallScope = {}): Promise<{ name: string; digest: string } | undefined> {
    type Response = { image: { name: string; target: { digest: string } } };
    const response = await this.#maybe<Response>('images', 'Get', { name }, `image ${name}`, scope);
    return response === undefined ? undefined : { name: response.image.name, digest: response.image.target.digest };
  }

  /** Creates the record, or points an existing one at another target; labels of an existing one stay. */
  async putImage(image: ImageRecord, scope: CallScope = {}): Promise<void> {
    const doing = `recording image ${image.name}`;
    const wire = { ...image, target: wireDescriptor(image.target) };
    try {
      await this.#unary('images', 'Create', { image: wire }, doing, scope);
    } catch (error) {
      if (!hasCode(error, 'ALREADY_EXISTS')) throw error;
      await this.#unary('images', 'Update', { image: wire, update_mask: { paths: ['target'] } }, doing, scope);
    }
  }

  // --- snapshots and diff ----------------------------------------------------------------------------------------

  /** True when the snapshotter has `key` in this namespace. */
  async hasSnapshot(snapshotter: string, key: string, scope: CallScope = {}): Promise<boolean> {
    const doing = `looking for snapshot ${key} of ${snapshotter}`;
    return (await this.#maybe('snapshots', 'Stat', { snapshotter, key }, doing, scope)) !== undefined;
  }

  /** Errors: ALREADY_EXISTS when the snapshotter has taken the layer upon itself, or the key exists. */
  async prepareSnapshot(
    snapshotter: string,
    key: string,
    parent: string,
    labels: Labels,
    scope: CallScope,
  ): Promise<Mount[]> {
    const request = { snapshotter, key, parent, labels };
    const doing = `preparing snapshot ${key} of ${snapshotter}`;
    const response = await this.#unary<{ mounts: Mount[] }>('snapshots', 'Prepare', request, doing, scope);
    return response.mounts;
  }

  /** Errors: ALREADY_EXISTS when somebody else committed `name` meanwhile. */
  async commitSnapshot(
    snapshotter: string,
    name: string,
    key: string,
    labels: Labels,
    scope: CallScope,
  ): Promise<void> {
    const request = { snapshotter, name, key, labels };
    await this.#unary('snapshots', 'Commit', request, `committing snapshot ${name} of ${snapshotter}`, scope);
  }

  /** Nothing happens when there is no such snapshot. */
  async removeSnapshot(snapshotter: string, key: string, scope: CallScope = {}): Promise<void> {
    await this.#maybe('snapshots', 'Remove', { snapshotter, key }, `removing snapshot ${key} of ${snapshotter}`, scope);
  }

  /** Unpacks a layer of the content store onto mounts and answers the digest of its uncompressed tar. */
  async applyDiff(diff: Descriptor, mounts: readonly Mount[], scope: CallScope): Promise<Digest> {
    const request = { diff: wireDescriptor(diff), mounts };
    const doing = `unpacking layer ${diff.digest}`;
    const response = await this.#unary<{ applied: { digest: string } }>('diff', 'Apply', request, doing, {
      timeoutMs: 0,
      ...scope,
    });
    return parseDigest(response.applied.digest);
  }

  // --- records of this namespace, for whoever looks after them ---------------------------------------------------

  /** Names of all namespaces. */
  async listNamespaces(): Promise<string[]> {
    type Response = { namespaces: { name: string }[] };
    const { namespaces } = await this.#unary<Response>('namespaces', 'List', {}, 'listing namespaces', {});
    return namespaces.map(({ name }) => name);
  }

  /** Image records whose target has a SHA-256 digest. */
  async listImages(): Promise<{ name: string; target: Digest }[]> {
    type Response = { images: { name: string; target: { digest: string } }[] };
    const { images } = await this.#unary<Response>('images', 'List', {}, 'listing images', {});
    return images.flatMap(({ name, target }) =>
      isDigest(target.digest) ? [{ name, target: parseDigest(target.digest) }] : [],
    );
  }

  /** Containers whose file system is a snapshot of this snapshotter. */
  async listContainers(snapshotter: string): Promise<{ id: string; snapshotKey: string }[]> {
    type Response = { containers: { id: string; snapshotter: string; snapshot_key: string }[] };
    const { containers } = await this.#unary<Response>('containers', 'List', {}, 'listing containers', {});
    return containers
      .filter((container) => container.snapshotter === snapshotter && container.snapshot_key !== '')
      .map((container) => ({ id: container.id, snapshotKey: container.snapshot_key }));
  }

  /** Keys of the snapshots of this snapshotter that leases keep. */
  async listLeasedSnapshots(snapshotter: string): Promise<string[]> {
    const doing = 'listing leases';
    const { leases } = await this.#unary<{ leases: { id: string }[] }>('leases', 'List', {}, doing, {});
    const keys: string[] = [];
    for (const { id } of leases) {
      type Response = { resources: { id: string; type: string }[] };
      const held = await this.#maybe<Response>('leases', 'ListResources', { id }, doing, {});
      for (const { id: key, type } of held?.resources ?? []) if (type === `snapshots/${snapshotter}`) keys.push(key);
    }
    return keys;
  }

  /**
   * Removes containerd's record of a snapshot, also of one that the snapshotter no longer has; false when there is none.
   * Errors: FAILED_PRECONDITION when a child of it is recorded.
   */
  async removeSnapshotRecord(snapshotter: string, key: string): Promise<boolean> {
    const doing = `removing the record of snapshot ${key}`;
    return (await this.#maybe('snapshots', 'Remove', { snapshotter, key }, doing, {})) !== undefined;
  }

  // --- calls -----------------------------------------------------------------------------------------------------

  async #maybe<T = unknown>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): Promise<T | undefined> {
    try {
      return await this.#unary<T>(service, method, request, doing, scope);
    } catch (error) {
      if (hasCode(error, 'NOT_FOUND')) return undefined;
      throw error;
    }
  }

  async #unary<T = unknown>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): Promise<T> {
    try {
      return await new Promise<T>((resolve, reject) => {
        this.#start(service, method, scope, (client, path, serialize, deserialize, metadata, options) =>
          client.makeUnaryRequest(path, serialize, deserialize, request, metadata, options, (error, value) => {
            if (error === null) resolve(value as T);
            else reject(error);
          }),
        );
      });
    } catch (error) {
      throw this.#error(error, doing);
    }
  }

  async *#streamed<T>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): AsyncGenerator<T> {
    const call = this.#start(service, method, scope, (client, path, serialize, deserialize, metadata, options) =>
      client.makeServerStreamRequest(path, serialize, deserialize, request, metadata, options),
    );
    try {
      yield* call as AsyncIterable<T>;
    } catch (error) {
      throw this.#error(error, doing);
    }
  }

  /** Starts one call with namespace, lease, deadline and abort signal set. */
  #start<C extends grpc.ClientUnaryCall | grpc.ClientReadableStream<unknown> | grpc.ClientDuplexStream<object, never>>(
    service: ServiceName,
    method: string,
    scope: CallScope,
    begin: (
      client: grpc.Client,
      path: string,
      serialize: (value: object) => Buffer,
      deserialize: (bytes: Buffer) => never,
      metadata: grpc.Metadata,
      options: grpc.CallOptions,
    ) => C,
  ): C {
    if (this.#closed) throw new DedupError('CLOSED', 'the connection to containerd is closed');
    if (scope.signal?.aborted === true) throw new DedupError('CANCELLED', 'the call was cancelled before it began');
    const definition = methodOf(service, method);
    const metadata = new grpc.Metadata();
    metadata.set('containerd-namespace', this.namespace);
    if (scope.lease !== undefined) metadata.set('containerd-lease', scope.lease);
    const timeoutMs = scope.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    const options = timeoutMs === 0 ? {} : { deadline: Date.now() + timeoutMs };
    const call = begin(
      this.#client(service),
      definition.path,
      definition.requestSerialize as (value: object) => Buffer,
      definition.responseDeserialize as (bytes: Buffer) => never,
      metadata,
      options,
    );
    const signal = scope.signal;
    if (signal !== undefined) {
      const cancel = () => call.cancel();
      signal.addEventListener('abort', cancel, { once: true });
      call.once('status', () => signal.removeEventListener('abort', cancel));
    }
    return call;
  }

  #client(service: ServiceName): grpc.Client {
    let client = this.#clients.get(service);
    if (client === undefined) {
      client = new grpc.Client(`unix:${this.address}`, grpc.credentials.createInsecure(), {
        'grpc.enable_http_proxy': 0,
        'grpc.max_receive_message_length': 16 * 1024 * 1024,
        // All services of one socket share one connection; restarts of containerd are noticed within a second.
        'grpc.max_reconnect_backoff_ms': 1000,
      });
      this.#clients.set(service, client);
    }
    return client;
  }

  #error(error: unknown, doing: string): DedupError {
    if (error instanceof DedupError) return error;
    const status = typeof error === 'object' && error !== null && 'code' in error ? Number(error.code) : -1;
    const details =
      typeof error === 'object' && error !== null && 'details' in error ? String(error.details) : String(error);
    const code = CODES[status] ?? 'INTERNAL';
    const hint = this.#hint(code, details);
    return new DedupError(code, `${doing}: containerd answered: ${details}`, {
      cause: error,
      ...(hint === undefined ? {} : { hint }),
    });
  }

  #hint(code: ErrorCode, details: string): string | undefined {
    if (/EACCES|EPERM/.test(details)) return `run this as root: ${this.address} belongs to root`;
    if (/snapshotter not loaded/.test(details)) {
      return (
        'add the proxy plugin to /etc/containerd/config.toml ([proxy_plugins.dedup] with type = "snapshot" and the ' +
        'address of the service) and restart containerd'
      );
    }
    // containerd itself names the socket of a proxy plugin that it cannot reach.
    if (code === 'UNAVAILABLE' && /dial unix|connection closed/.test(details)) {
      return 'containerd does not reach the snapshotter: is dedup-snapshotter running? After its start, wait some seconds';
    }
    if (code === 'UNAVAILABLE' && /connect|ENOENT|ECONNREFUSED|No connection/i.test(details)) {
      return `is containerd running? Its socket is expected at ${this.address}; --address names another`;
    }
    return undefined;
  }
}

function wireDescriptor({ mediaType, digest, size, annotations }: Descriptor): object {
  return { media_type: mediaType, digest, size, annotations };
}

const methods = new Map<string, grpc.MethodDefinition<object, object>>();

function methodOf(name: ServiceName, method: string): grpc.MethodDefinition<object, object> {
  const key = `${name}.${method}`;
  let definition = methods.get(key);
  if (definition === undefined) {
    const { file, service } = SERVICES[name];
    const packages = loadProto(file) as unknown as {
      containerd: {
        services: Readonly<Record<string, { v1: Readonly<Record<string, grpc.ServiceClientConstructor>> }>>;
      };
    };
    definition = packages.containerd.services[name]?.v1[service]?.service[method] as typeof definition;
    if (definition === undefined) throw new DedupError('INTERNAL', `${file} does not define ${service}.${method}`);
    methods.set(key, definition);
  }
  return definition;
}
