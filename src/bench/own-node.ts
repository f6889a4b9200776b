// The node of an operator as the benchmark sees it: its containerd, its snapshotters, and counting proxies in front of the
// registries that its images come from. Used by the verb `bench`; leaves the node as it was.
import { readFile } from 'node:fs/promises';
import { request } from 'undici';
import { DedupError } from '../errors.ts';
import { type Credentials, parseUserPassword } from '../fs/registry/credentials.ts';
import { type RegistryOptions, RegistryPool } from '../fs/registry/pool.ts';
import {
  formatReference,
  type ImageReference,
  isLoopback,
  parseReference,
  serverOf,
} from '../fs/registry/reference.ts';
import { MiB } from '../units.ts';
import type { BenchTarget, ContenderNode } from './contenders.ts';
import { CountingProxy } from './counting-proxy.ts';
import { imageFacts } from './describe.ts';
import { type LinkProbe, tcpRoundTripMs, usableSnapshotters } from './floor.ts';
import type { Meter, MeteredRequest } from './meter.ts';
import { ctr, execute } from './node-commands.ts';
import { socketOwner } from './process-use.ts';
import type { BenchImage } from './result.ts';

/** Nobody else's images are in it, and it is removed at the end. */
export const BENCH_NAMESPACE = 'dedup-bench';

export interface OwnNodeOptions {
  readonly address: string;
  readonly containerdRoot: string;
  /** "user:password" for the registries. */
  readonly user?: string;
}

/** The operator's node. Errors: UNAVAILABLE when ctr is missing or containerd does not answer. */
export async function ownNode(options: OwnNodeOptions): Promise<ContenderNode> {
  const node: ContenderNode = {
    inside: [],
    address: options.address,
    namespace: BENCH_NAMESPACE,
    containerdRoot: options.containerdRoot,
    pullFlags: ['--plain-http', ...(options.user === undefined ? [] : ['--user', options.user])],
    containerd: () => {
      const pid = socketOwner(options.address);
      return pid === undefined
        ? Promise.reject(new DedupError('UNAVAILABLE', `nobody listens on ${options.address}`))
        : Promise.resolve({ name: 'containerd', pid });
    },
  };
  try {
    await execute(ctr(node, 'version'), { timeoutMs: 20_000 });
  } catch (cause) {
    if (cause instanceof DedupError && cause.message.endsWith('was not found')) throw cause;
    throw new DedupError('UNAVAILABLE', `containerd does not answer on ${options.address}`, {
      cause,
      hint: 'start it, or name its socket with --address',
    });
  }
  return node;
}

/** Errors: FAILED_PRECONDITION that names the snapshotters there are. */
export async function requireSnapshotters(node: ContenderNode, plugins: readonly string[]): Promise<void> {
  const usable = await usableSnapshotters(node);
  const missing = plugins.filter((plugin) => !usable.includes(plugin));
  if (missing.length === 0) return;
  throw new DedupError(
    'FAILED_PRECONDITION',
    `containerd has no snapshotter ${missing.join(', ')}; it has ${usable.join(', ')}`,
    { hint: 'add [proxy_plugins.NAME] with type and address to /etc/containerd/config.toml and restart containerd' },
  );
}

/** Where a registry is really reached: https, or http where that is allowed and https does not answer. */
async function originOf(host: string, options: RegistryOptions): Promise<string> {
  const configured = options.endpoints?.[host];
  if (configured !== undefined) return configured;
  const server = serverOf(host);
  const plainAllowed = isLoopback(host) || (options.insecureHosts ?? []).includes(host);
  if (!plainAllowed) return `https://${server}`;
  try {
    // One that asks for credentials is an answer too.
    const { body } = await request(`http://${server}/v2/`, { headersTimeout: 10_000 });
    await body.dump();
    return `http://${server}`;
  } catch {
    return `https://${server}`;
  }
}

interface Upstream {
  readonly origin: string;
  readonly proxy: CountingProxy;
}

/** Counting proxies, one for each registry, as one meter. */
export class OwnRegistries implements Meter {
  readonly #options: RegistryOptions;
  readonly #pool: RegistryPool;
  readonly #credentials: Credentials | undefined;
  readonly #upstreams = new Map<string, Upstream>();

  constructor(options: RegistryOptions, user?: string) {
    this.#options = options;
    this.#pool = new RegistryPool(options);
    this.#credentials = user === undefined ? undefined : parseUserPassword(user);
  }

  /** A target for images of any registry; both references go through the meter. */
  async target(image: TargetDescription): Promise<{ target: BenchTarget; layers: readonly string[]; tls: boolean }> {
    const plain = parseReference(image.plain);
    const lazy = parseReference(image.lazy);
    const [plainFacts, lazyFacts] = [await this.#facts(plain), await this.#facts(lazy)];
    const layers = plainFacts.layers.map(({ digest }) => digest as string);
    const lazyLayers = lazyFacts.layers.map(({ digest }) => digest as string);
    const bench: BenchImage = {
      name: image.name,
      composition: image.plain,
      compressedBytes: plainFacts.layers.reduce((sum, { size }) => sum + size, 0),
      uncompressedBytes: 0,
      layers: layers.length,
      command: image.command,
      ready: image.ready,
    };
    const target: BenchTarget = {
      image: bench,
      plain: await this.#metered(plain),
      lazy: await this.#metered(lazy),
      blobs: { layers: new Set([...layers, ...lazyLayers]), configs: new Set([plainFacts.config, lazyFacts.config]) },
    };
    const upstream = await this.#upstream(plain.host);
    return { target, layers: lazyLayers, tls: upstream.origin.startsWith('https:') };
  }

  /** Measures the way to the registry of `reference` itself, past the proxy. */
  probe(reference: string): LinkProbe {
    const parsed = parseReference(reference);
    return {
      roundTripMs: async () => {
        const url = new URL((await this.#upstream(parsed.host)).origin);
        return await tcpRoundTripMs(url.hostname, Number(url.port) || (url.protocol === 'https:' ? 443 : 80));
      },
      bytesPerSecond: async () => await this.#download(parsed),
    };
  }

  async #download(reference: ImageReference): Promise<number> {
    const { layers } = await this.#facts(reference);
    const largest = [...layers].sort((a, b) => b.size - a.size)[0];
    if (largest === undefined) throw new DedupError('NOT_FOUND', `${formatReference(reference)} has no layers`);
    const repository = this.#pool.repository(reference, this.#credentials);
    const signal = AbortSignal.timeout(300_000);
    // Opens the connection and its congestion window.
    await repository.readRange(largest, { offset: 0, length: Math.min(largest.size, MiB) }, signal);
    const startedMs = performance.now();
    const bytes = await repository.readRange(
      largest,
      { offset: 0, length: Math.min(largest.size, PROBE_BYTES) },
      signal,
    );
    return bytes.length / ((performance.now() - startedMs) / 1000);
  }

  async #facts(reference: ImageReference): ReturnType<typeof imageFacts> {
    return await imageFacts(this.#pool.repository(reference, this.#credentials), reference);
  }

  async #upstream(host: string): Promise<Upstream> {
    let known = this.#upstreams.get(host);
    if (known === undefined) {
      const origin = await originOf(host, this.#options);
      const ca = await Promise.all((this.#options.caFiles ?? []).map((path) => readFile(path, 'utf8')));
      const insecure = (this.#options.insecureHosts ?? []).includes(host);
      known = { origin, proxy: await CountingProxy.start({ upstream: origin, ca, insecure }) };
      this.#upstreams.set(host, known);
    }
    return known;
  }

  async #metered(reference: ImageReference): Promise<string> {
    const { proxy } = await this.#upstream(reference.host);
    return formatReference({ ...reference, host: proxy.host });
  }

  /** Bytes that passed all proxies so far. */
  get bytes(): number {
    return [...this.#upstreams.values()].reduce((sum, { proxy }) => sum + proxy.bytes, 0);
  }

  async requests(fromAt: number, toAt: number): Promise<readonly MeteredRequest[]> {
    const all = await Promise.all([...this.#upstreams.values()].map(({ proxy }) => proxy.requests(fromAt, toAt)));
    return all.flat().sort((a, b) => a.startedAt - b.startedAt);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#upstreams.values()].map(async ({ proxy }) => await proxy.close()));
    await this.#pool.close();
  }
}

/** Enough that the start of the transfer does not count for much. */
const PROBE_BYTES = 32 * MiB;

export interface TargetDescription extends Pick<BenchImage, 'name' | 'command' | 'ready'> {
  readonly plain: string;
  readonly lazy: string;
}

/** Removes what a killed run left in the benchmark's namespace: the next start would not be cold. */
export async function clearNamespace(node: ContenderNode): Promise<void> {
  const list = async (what: string): Promise<string[]> =>
    (await execute(ctr(node, what, 'ls', '-q'), { allowFailure: true })).split('\n').filter((line) => line !== '');
  for (const container of await list('containers')) {
    await execute(ctr(node, 'tasks', 'rm', '--force', container), { allowFailure: true });
    await execute(ctr(node, 'containers', 'rm', container), { allowFailure: true });
  }
  for (const image of await list('images')) await execute(ctr(node, 'images', 'rm', '--sync', image));
}

/** Removes the benchmark's namespace, which must be empty. */
export async function removeNamespace(node: ContenderNode): Promise<void> {
  await execute(ctr(node, 'namespaces', 'rm', node.namespace), { allowFailure: true });
}
