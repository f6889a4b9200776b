// The client side of proto/dedupd.proto: calls dedupd with a deadline each, compares versions before anything else and
// turns statuses back into DedupErrors. Used by the snapshots service, the supervisor and the CLI; retries nothing.
import {
  type ClientReadableStream,
  credentials,
  Metadata,
  type ServiceClientConstructor,
  type ServiceError,
} from '@grpc/grpc-js';
import { DedupError, ERROR_CODES, type ErrorCode, GrpcStatus, wrapError } from '../errors.ts';
import { loadProto, somebodyListens } from '../protocol.ts';
import { DEDUPD_PROTOCOL, HINT_METADATA } from '../protocol-version.ts';
import { MiB } from '../units.ts';
import type {
  ConvertLayerArgs,
  ConvertProgress,
  ImageMounter,
  LayerKey,
  MountedImage,
  MountImageArgs,
  PrepareLayerArgs,
  PrepareLayerResult,
  WaitingLayers,
} from './images.ts';

export interface DedupdHello {
  readonly protocol: number;
  readonly version: string;
  readonly root: string;
  readonly pid: number;
  readonly transport: string;
}

/** One merged image as dedupd lists it: proto/dedupd.proto, ImageInfo. */
export interface DedupdImage {
  readonly mount_id: number;
  readonly path: string;
  readonly layers: readonly string[];
  readonly total_bytes: number;
  readonly present_bytes: number;
  readonly transport: string;
  readonly reference: string;
}

/** proto/dedupd.proto, StatsResponse. */
export type DedupdStats = Readonly<
  Record<
    | 'chunks'
    | 'chunk_bytes'
    | 'present_bytes'
    | 'requests'
    | 'wire_bytes'
    | 'misses'
    | 'hits'
    | 'span_bytes'
    | 'control_bytes'
    | 'control_requests'
    | 'ahead_bytes'
    | 'prefetch_bytes'
    | 'prefetch_useful_bytes'
    | 'prefetch_late_bytes'
    | 'prefetch_wasted_bytes'
    | 'asked_bytes'
    | 'asked_present_bytes',
    number
  >
>;

/** proto/dedupd.proto, SpaceResponse. */
export interface Space
  extends Readonly<
    Record<
      | 'disk_bytes'
      | 'present_bytes'
      | 'quota_bytes'
      | 'chunks'
      | 'chunk_bytes'
      | 'referenced_bytes'
      | 'shared_chunks'
      | 'shared_bytes'
      | 'freed_bytes'
      | 'quarantined_bytes'
      | 'free_bytes'
      | 'evicted_bytes',
      number
    >
  > {
  readonly images: readonly {
    readonly image_id: number;
    readonly reference: string;
    readonly total_bytes: number;
    readonly present_bytes: number;
    readonly shared_bytes: number;
    readonly pinned: boolean;
    readonly transport: string;
  }[];
}

/** proto/dedupd.proto, GcProgress. */
export interface GcStep {
  readonly step: string;
  readonly done: boolean;
  readonly count: number;
  readonly disk_bytes: number;
  readonly address_bytes: number;
}

export interface MountProgress {
  readonly step: string;
  readonly bytes_done: number;
  readonly bytes_total: number;
  readonly done: boolean;
  readonly path: string;
}

interface MountImageMessage {
  readonly path: string;
  readonly mount_id: number;
  readonly root_uid: number;
  readonly root_gid: number;
}

interface ConvertMessage extends ConvertProgress {
  readonly done: boolean;
  readonly layer: LayerKey | null;
}

export interface DedupdClientOptions {
  /** Path of dedupd's unix socket. */
  readonly address: string;
  /** Root directory the daemon must serve; any when absent. */
  readonly root?: string;
  /** Called when nobody answers a Prepare or a mount; once it has resolved, the call is made again. */
  readonly revive?: () => Promise<void>;
}

/** The signal of calls that nobody ends. */
const NEVER = new AbortController().signal;
/** Deadlines, milliseconds. Release and retain are called with Prepare waiting behind them: short. */
const DEADLINE_MS = {
  Hello: 2_000,
  MountImage: 20_000,
  ReleaseImages: 3_000,
  RetainLayers: 3_000,
  ConfirmLayer: 10_000,
  LayerUsage: 10_000,
  PrebuildImage: 120_000,
  ListImages: 10_000,
  Stats: 10_000,
  Space: 60_000,
  UnmountReference: 30_000,
  GiveCredentials: 2_000,
  Shutdown: 10_000,
} as const;
/** A daemon that comes back is found within a moment, not after gRPC's two minutes. */
const MAX_BACKOFF_MS = 500;
/** Time kept back from a budget so that dedupd's own answer, with its reason, arrives before our deadline. */
const ANSWER_MS = 200;
/** The longest pause between attempts to connect, and what connecting takes. */
const RECONNECT_MS = MAX_BACKOFF_MS + 250;
/** What a start of the daemon may take while a mount waits for it. */
const REVIVE_MS = 5_000;

export class DedupdClient implements ImageMounter {
  readonly #client: InstanceType<ServiceClientConstructor>;
  readonly #options: DedupdClientOptions;
  #compared: Promise<unknown> | undefined;

  /** Connects at the first call, and again whenever the daemon has gone. */
  constructor(options: DedupdClientOptions) {
    const packages = loadProto('dedupd.proto') as unknown as { dedup: { v1: { Dedupd: ServiceClientConstructor } } };
    this.#options = options;
    this.#client = new packages.dedup.v1.Dedupd(`unix:${options.address}`, credentials.createInsecure(), {
      'grpc.max_receive_message_length': 16 * MiB,
      'grpc.max_send_message_length': 16 * MiB,
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.min_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': MAX_BACKOFF_MS,
    });
  }

  /** Errors: UNAVAILABLE when nobody listens, FAILED_PRECONDITION for another protocol version or root. */
  async hello(): Promise<DedupdHello> {
    const ask = () => this.#invoke<DedupdHello>('Hello', { protocol: DEDUPD_PROTOCOL }, DEADLINE_MS.Hello);
    const hello = await ask().catch(async (error: unknown) => {
      // A daemon that has just come listens while the channel still waits between two attempts to connect.
      if (!isUnreached(error)) throw error;
      const listens = await somebodyListens(this.#options.address).catch(() => false);
      if (!listens) throw error;
      await new Promise<void>((resolve) => this.#client.waitForReady(Date.now() + RECONNECT_MS, () => resolve()));
      return await ask();
    });
    if (hello.protocol !== DEDUPD_PROTOCOL) {
      throw new DedupError(
        'FAILED_PRECONDITION',
        `dedupd ${hello.version} speaks protocol ${hello.protocol}, this program ${DEDUPD_PROTOCOL}`,
        { hint: 'restart both with the same version' },
      );
    }
    const { root } = this.#options;
    if (root !== undefined && hello.root !== root) {
      throw new DedupError(
        'FAILED_PRECONDITION',
        `the dedupd on ${this.#options.address} serves ${hello.root}, not ${root}`,
        {
          hint: 'stop it, or configure a run directory of its own for each root',
        },
      );
    }
    return hello;
  }

  async answers(): Promise<void> {
    await this.hello();
  }

  async prepareLayer(args: PrepareLayerArgs): Promise<PrepareLayerResult> {
    const { layer, sources, manifest, siblings, budgetMs } = args;
    const budget_ms = Math.max(1, budgetMs - ANSWER_MS);
    return await this.#call('PrepareLayer', { layer, sources, manifest, siblings, budget_ms, size: 0 }, budgetMs);
  }

  async mountImage({ layers, bottom, below }: MountImageArgs): Promise<MountedImage> {
    const request = {
      layers,
      bottom,
      below: below.map((lower) => (lower.kind === 'directory' ? { directory: lower.path } : { layers: lower.layers })),
    };
    const { path, mount_id, root_uid, root_gid } = await this.#call<MountImageMessage>('MountImage', request);
    return { path, mountId: mount_id, rootUid: root_uid, rootGid: root_gid };
  }

  async releaseImages(inUse: readonly number[]): Promise<void> {
    await this.#call('ReleaseImages', { in_use: inUse });
  }

  async retainLayers(layers: readonly LayerKey[]): Promise<WaitingLayers> {
    const { waiting, again_ms } = await this.#call<{ waiting: number; again_ms: number }>('RetainLayers', { layers });
    return { waiting, againMs: again_ms };
  }

  async confirmLayer(layer: LayerKey): Promise<void> {
    await this.#call('ConfirmLayer', { layer });
  }

  async layerUsage(layer: LayerKey): Promise<{ bytes: number; inodes: number }> {
    const { bytes, inodes } = await this.#call<{ bytes: number; inodes: number }>('LayerUsage', { layer });
    return { bytes, inodes };
  }

  /** Takes as long as it takes: a daemon that has gone is noticed by the end of the connection. */
  async convertLayer(
    { chainId, parentChainId, ...args }: ConvertLayerArgs,
    onProgress: (progress: ConvertProgress) => void,
    signal: AbortSignal,
  ): Promise<LayerKey> {
    const messages = this.#stream<ConvertMessage>(
      'ConvertLayer',
      { ...args, chain_id: chainId, parent_chain_id: parentChainId },
      signal,
    );
    for await (const { done, layer, ...progress } of messages) {
      if (done && layer !== null) return layer;
      onProgress(progress);
    }
    throw new DedupError('INTERNAL', 'dedupd ended a conversion without an answer');
  }

  async prebuildImage(layers: readonly LayerKey[]): Promise<void> {
    await this.#call('PrebuildImage', { layers });
  }

  async listImages(): Promise<readonly DedupdImage[]> {
    return (await this.#call<{ images: DedupdImage[] }>('ListImages', {})).images;
  }

  async stats(): Promise<DedupdStats> {
    return await this.#call('Stats', {});
  }

  async space(): Promise<Space> {
    return await this.#call('Space', {});
  }

  /** Gives back what nobody uses; a message when a step begins, one when it has ended. */
  async *gc(): AsyncGenerator<GcStep> {
    await this.#compare();
    const invoke = this.#client.Gc as (request: object) => ClientReadableStream<GcStep>;
    const stream = invoke.call(this.#client, {});
    try {
      for await (const message of stream) yield message as GcStep;
    } catch (error) {
      throw this.#convert('Gc', error);
    } finally {
      stream.cancel();
    }
  }

  /** Hands over `user:password` for a host; kept in the daemon's memory only. */
  async giveCredentials(host: string, userAndPassword: string): Promise<void> {
    await this.#call('GiveCredentials', { host, credentials: userAndPassword });
  }

  /** Mounts an image without containerd; the messages as they come, the last with `done`. Ends with the signal. */
  async *mountReference(
    request: { reference: string; directory: string; platform: string; credentials: string },
    signal?: AbortSignal,
  ): AsyncGenerator<MountProgress> {
    yield* this.#stream<MountProgress>('MountReference', request, signal);
  }

  async unmountReference(directory: string): Promise<void> {
    await this.#call('UnmountReference', { directory });
  }

  async shutdown(): Promise<void> {
    await this.#call('Shutdown', {});
  }

  /** Ends the connection. Idempotent. */
  close(): void {
    this.#client.close();
  }

  async #call<T>(method: keyof typeof DEADLINE_MS | 'PrepareLayer', request: object, deadlineMs?: number): Promise<T> {
    const startedMs = performance.now();
    const wholeMs = deadlineMs ?? (method === 'PrepareLayer' ? ANSWER_MS : DEADLINE_MS[method]);
    const leftMs = (): number => wholeMs - (performance.now() - startedMs);
    const attempt = async (): Promise<T> => {
      await this.#compare();
      return await this.#invoke<T>(method, request, leftMs());
    };
    try {
      return await attempt();
    } catch (error) {
      const { revive } = this.#options;
      const waits = method === 'PrepareLayer' || method === 'MountImage';
      if (revive === undefined || !waits || !isUnreached(error)) throw error;
      // Both calls may be made twice. A daemon that is just being started anew need not fail the start of a container.
      if (!(await resolvesWithin(revive(), Math.min(leftMs(), REVIVE_MS)))) throw error;
      return await attempt();
    }
  }

  async *#stream<Message>(method: string, request: object, signal: AbortSignal = NEVER): AsyncGenerator<Message> {
    await this.#compare();
    if (signal.aborted) throw new DedupError('CANCELLED', `calling dedupd (${method}): nobody waits for it any more`);
    const invoke = this.#client[method] as (request: object) => ClientReadableStream<Message>;
    const stream = invoke.call(this.#client, request);
    const cancel = (): void => stream.cancel();
    signal.addEventListener('abort', cancel, { once: true });
    try {
      for await (const message of stream) yield message as Message;
    } catch (error) {
      throw this.#convert(method, error);
    } finally {
      signal.removeEventListener('abort', cancel);
      stream.cancel();
    }
  }

  /** Hello, once for each time the daemon is reached anew. */
  #compare(): Promise<unknown> {
    this.#compared ??= this.hello().catch((error: unknown) => {
      this.#compared = undefined;
      throw error;
    });
    return this.#compared;
  }

  #invoke<T>(method: string, request: object, deadlineMs: number): Promise<T> {
    const invoke = this.#client[method] as (
      request: object,
      metadata: Metadata,
      options: { deadline: number },
      done: (error: ServiceError | null, value: T) => void,
    ) => void;
    return new Promise((resolve, reject) => {
      try {
        invoke.call(this.#client, request, new Metadata(), { deadline: Date.now() + deadlineMs }, (error, value) => {
          if (error === null) resolve(value);
          else reject(this.#convert(method, error));
        });
      } catch (error) {
        reject(wrapError(error, `calling dedupd (${method})`));
      }
    });
  }

  #convert(method: string, error: unknown): DedupError {
    if (error instanceof DedupError) return error;
    const { code, details, message } = error as Partial<ServiceError>;
    const text = details ?? message ?? String(error);
    const named = /^(.*) \[([A-Z_]+)\]$/su.exec(text);
    const name = named?.[2];
    // A status with the name of a code in it was sent by the daemon itself; all others come from the connection.
    if (name !== undefined && Object.hasOwn(ERROR_CODES, name)) {
      const hint = (error as Partial<ServiceError>).metadata?.get(HINT_METADATA)[0]?.toString();
      return new DedupError(name as ErrorCode, `dedupd: ${named?.[1] ?? text}`, {
        cause: error,
        ...(hint === undefined ? {} : { hint }),
      });
    }
    if (code === GrpcStatus.unavailable) {
      this.#compared = undefined;
      return new DedupError('UNAVAILABLE', `dedupd does not answer on ${this.#options.address}`, {
        cause: error,
        hint: 'start dedupd, or look into its log',
        details: { reached: false },
      });
    }
    const doing = `calling dedupd (${method}): ${text}`;
    return new DedupError(connectionCode(code), doing, { cause: error });
  }
}

/** True for the error of a call that found nobody. */
function isUnreached(error: unknown): boolean {
  return error instanceof DedupError && error.details.reached === false;
}

/** False when the work fails or takes longer. */
function resolvesWithin(work: Promise<void>, timeoutMs: number): Promise<boolean> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), timeoutMs);
    work.then(
      () => resolve(true),
      () => resolve(false), // The caller tells its own error; the supervisor has logged this one.
    );
    // Neither branch above rejects.
    void work.catch(() => undefined).then(() => clearTimeout(timer));
  });
}

function connectionCode(status: number | undefined): ErrorCode {
  if (status === GrpcStatus.deadlineExceeded) return 'DEADLINE';
  if (status === GrpcStatus.cancelled) return 'CANCELLED';
  if (status === GrpcStatus.unimplemented) return 'UNIMPLEMENTED';
  return 'INTERNAL';
}
