// Calls of containerd's services over its unix socket: namespace, lease, deadline and abort signal of each, and its errors in
// our terms. Called by ContainerdClient, which knows what the calls mean.
import * as grpc from '@grpc/grpc-js';
import { DedupError, type ErrorCode, GrpcStatus } from '../errors.ts';
import { loadProto } from '../protocol.ts';

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

export class ContainerdCalls {
  readonly #options: ContainerdClientOptions;
  readonly #clients = new Map<ServiceName, grpc.Client>();
  #closed = false;

  constructor(options: ContainerdClientOptions) {
    this.#options = options;
  }

  /** Ends all connections. Safe to call twice. */
  close(): void {
    this.#closed = true;
    for (const client of this.#clients.values()) client.close();
    this.#clients.clear();
  }

  /** The answer to one call; undefined when containerd answers NotFound. Errors: as unary. */
  async maybe<T = unknown>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): Promise<T | undefined> {
    try {
      return await this.unary<T>(service, method, request, doing, scope);
    } catch (error) {
      if (hasCode(error, 'NOT_FOUND')) return undefined;
      throw error;
    }
  }

  /** The answer to one call. Errors: what containerd answered, as DedupError that says what was being done; CANCELLED, CLOSED. */
  async unary<T = unknown>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): Promise<T> {
    try {
      return await new Promise<T>((resolve, reject) => {
        this.start(service, method, scope, (client, path, serialize, deserialize, metadata, options) =>
          client.makeUnaryRequest(path, serialize, deserialize, request, metadata, options, (error, value) => {
            if (error === null) resolve(value as T);
            else reject(error);
          }),
        );
      });
    } catch (error) {
      throw this.error(error, doing);
    }
  }

  /** The answers to one call, as they come. Errors: as unary. */
  async *streamed<T>(
    service: ServiceName,
    method: string,
    request: object,
    doing: string,
    scope: CallScope,
  ): AsyncGenerator<T> {
    const call = this.start(service, method, scope, (client, path, serialize, deserialize, metadata, options) =>
      client.makeServerStreamRequest(path, serialize, deserialize, request, metadata, options),
    );
    try {
      yield* call as AsyncIterable<T>;
    } catch (error) {
      throw this.error(error, doing);
    }
  }

  /** Starts one call with namespace, lease, deadline and abort signal set. */
  start<C extends grpc.ClientUnaryCall | grpc.ClientReadableStream<unknown> | grpc.ClientDuplexStream<object, never>>(
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
    metadata.set('containerd-namespace', this.#options.namespace);
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
      client = new grpc.Client(`unix:${this.#options.address}`, grpc.credentials.createInsecure(), {
        'grpc.enable_http_proxy': 0,
        'grpc.max_receive_message_length': 16 * 1024 * 1024,
        // All services of one socket share one connection; restarts of containerd are noticed within a second.
        'grpc.max_reconnect_backoff_ms': 1000,
      });
      this.#clients.set(service, client);
    }
    return client;
  }

  /** What containerd or the connection answered, with what was being done and what to do about it. */
  error(error: unknown, doing: string): DedupError {
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
    if (/EACCES|EPERM/.test(details)) return `run this as root: ${this.#options.address} belongs to root`;
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
      return `is containerd running? Its socket is expected at ${this.#options.address}; --address names another`;
    }
    return undefined;
  }
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
