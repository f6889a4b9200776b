// The private world of `make bench`: an emulated link with a registry at its far end and a containerd with the product,
// and any peer, at its near end. Everything is this process's own and ends with it.
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  type BenchTarget,
  type Contender,
  type ContenderNode,
  dedup,
  overlayfs,
  type PeerSpec,
  peer,
} from '../../src/bench/contenders.ts';
import type { LinkProbe } from '../../src/bench/floor.ts';
import type { Meter } from '../../src/bench/meter.ts';
import { execute } from '../../src/bench/node-commands.ts';
import type { BenchImage, BenchLink } from '../../src/bench/result.ts';
import type { IndexReport } from '../../src/fs/index/artifact.ts';
import { RootPaths } from '../../src/paths.ts';
import { MiB } from '../../src/units.ts';
import { socketAnswers, TestContainerd, waitFor } from '../support/containerd.ts';
import { makeImage } from '../support/images.ts';
import { type Inside, Link, type LinkProfile } from '../support/link/link.ts';
import { PROGRAM, Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';
import { makeCertificates } from '../support/tls.ts';
import { TraceDirectory } from './traces/trace-directory.ts';

/** A peer and how it is started here; without a command it must listen already and reach the registry. */
export interface WorldPeer {
  readonly spec: PeerSpec;
  /** Words with {socket} {containerd} {dir} {registry}; run at the near end. */
  readonly service?: readonly string[];
  readonly directories: readonly string[];
}

export interface WorldOptions {
  /** Absent: no link, registry and node meet on loopback as it is. */
  readonly profile?: LinkProfile;
  readonly tls: boolean;
  readonly peers: readonly WorldPeer[];
  /** More of the product's configuration. */
  readonly config?: Readonly<Record<string, unknown>>;
}

/** An image in an OCI layout, with what is run in it. */
export interface WorldImage {
  readonly image: BenchImage;
  readonly dir: string;
  readonly tag: string;
}

/** An image that is at the registry. */
export interface PushedImage {
  readonly target: BenchTarget;
  /** Digests, bottom to top. */
  readonly layers: readonly string[];
}

const PUSH_TIMEOUT_MS = 1_800_000;
/** What is still on its way when a start is over is waited for, so long at most; it has arrived when nothing came for a moment. */
const ARRIVAL_MS = 2000;
const MOMENT_MS = 100;
const PROBE_BYTES = 64 * MiB;
const LIFETIME_SECONDS = 7 * 86_400;

export class World implements Meter {
  readonly link: Link | undefined;
  readonly registry: RegistryProcess;
  readonly product: Product;
  readonly node: ContenderNode;
  readonly contenders: readonly Contender[];
  readonly #dir: string;
  readonly #caFile: string | undefined;
  readonly #parts: AsyncDisposableStack;
  /** A blob to measure the link with. */
  #probeBlob = '';

  private constructor(
    parts: AsyncDisposableStack,
    dir: string,
    caFile: string | undefined,
    own: { link: Link | undefined; registry: RegistryProcess; product: Product; containerd: TestContainerd },
    peers: readonly WorldPeer[],
  ) {
    const { link, registry, product, containerd } = own;
    this.#parts = parts;
    this.#dir = dir;
    this.#caFile = caFile;
    this.link = link;
    this.registry = registry;
    this.product = product;
    this.node = {
      inside: link?.near ?? [],
      address: containerd.address,
      namespace: containerd.namespace,
      containerdRoot: containerd.root,
      pullFlags: caFile === undefined ? ['--plain-http'] : ['--tlscacert', caFile],
      containerd: () => Promise.resolve({ name: 'containerd', pid: containerd.pid ?? 0 }),
    };
    const ours = dedup(this.node, {
      program: [PROGRAM, '--config', product.configFile],
      pullFlags: [],
      root: product.root,
      daemons: async () => [
        { name: 'dedup-snapshotter', pid: product.servicePid ?? 0 },
        { name: 'dedupd', pid: await product.daemonPid() },
      ],
    });
    const traces = new TraceDirectory(product);
    this.contenders = [
      overlayfs(this.node),
      // Each start is the first of its image: what an earlier one has read is not known.
      { ...ours, prepare: async () => await traces.clear() },
      ...peers.map(({ spec, directories }) => peer(this.node, spec, directories)),
    ];
  }

  static async start(options: WorldOptions): Promise<World> {
    await using parts = new AsyncDisposableStack();
    const dir = await mkdtemp(join(tmpdir(), 'bench-world-'));
    parts.defer(async () => await rm(dir, { recursive: true, force: true }));
    const link = options.profile === undefined ? undefined : parts.use(await Link.start(options.profile));
    if (link !== undefined) parts.defer(() => endAll(link.near));
    const near = link?.near ?? [];
    const address = link?.farAddress ?? '127.0.0.1';
    const certificates = options.tls ? await makeCertificates(dir, [`IP:${address}`]) : undefined;
    const registry = parts.use(
      await RegistryProcess.start({
        inside: link?.far ?? [],
        address,
        ...(certificates === undefined ? {} : { tls: certificates }),
      }),
    );
    const trust =
      certificates === undefined ? { insecure_registries: [registry.host] } : { ca_files: [certificates.caFile] };
    const product = await Product.create({ log_level: 'info', ...trust, ...options.config }, { inside: near });
    parts.defer(async () => await product.stop());
    await product.start();
    const proxies = { dedup: product.address };
    for (const { spec } of options.peers) Object.assign(proxies, { [spec.name]: spec.socket });
    const containerd = await TestContainerd.start({ proxies, inside: near, lifetimeSeconds: LIFETIME_SECONDS });
    parts.defer(async () => await containerd.stop());
    for (const one of options.peers) {
      if (one.service === undefined) continue;
      const values: Readonly<Record<string, string>> = {
        socket: one.spec.socket,
        containerd: containerd.address,
        dir: one.directories[0] ?? dir,
        registry: registry.host,
      };
      const words = one.service.map((word) =>
        word.replace(/\{(\w+)\}/g, (whole, name: string) => values[name] ?? whole),
      );
      const service = startService([...near, ...words]);
      parts.defer(async () => await service.stop());
      await waitFor(
        `${one.spec.name} on ${one.spec.socket}`,
        async () => service.check() && (await socketAnswers(one.spec.socket)),
        30_000,
      );
    }
    const own = { link, registry, product, containerd };
    const world = new World(parts.move(), dir, certificates?.caFile, own, options.peers);
    try {
      await world.#pushProbe();
    } catch (error) {
      await world.stop();
      throw error;
    }
    return world;
  }

  get indexDirectory(): string {
    return new RootPaths(this.product.root).layers;
  }

  /** Words before what runs at the registry's end. */
  get #far(): readonly string[] {
    return this.link?.far ?? [];
  }

  /**
   * Pushes an image and makes its indexes, at the registry's end of the link. Without `index`, `lazy` is the plain image,
   * too: ours then reads all of it.
   */
  async push(
    { image, dir, tag }: WorldImage,
    { index = true }: { readonly index?: boolean } = {},
  ): Promise<PushedImage> {
    const repository = tag.replace(/[^a-z0-9-]/g, '-');
    const plain = `${this.registry.host}/${repository}:plain`;
    const lazy = index ? `${this.registry.host}/${repository}:lazy` : plain;
    await this.#copy(dir, tag, plain);
    const makeIndexes = [PROGRAM, '--config', this.product.configFile, 'index', plain, '--annotate', lazy, '--json'];
    const made = index
      ? await execute([...this.#far, ...makeIndexes], { timeoutMs: PUSH_TIMEOUT_MS })
      : '{"images":[]}';
    const { images } = JSON.parse(made) as IndexReport;
    const restarts = images.flatMap((one) => one.layers.flatMap(({ restart }) => restart?.digest ?? []));
    const { config, layers } = await manifestOf(dir, tag);
    const digests = layers.map(({ digest }) => digest);
    return {
      layers: digests,
      target: {
        // An image from elsewhere comes without its sizes.
        image: { ...image, compressedBytes: layers.reduce((sum, { size }) => sum + size, 0), layers: layers.length },
        plain,
        lazy,
        blobs: { layers: new Set(digests), configs: new Set([config.digest]), restarts: new Set(restarts) },
        prepare: async () => await this.#warmRegistry(repository),
      },
    };
  }

  async #copy(dir: string, tag: string, reference: string): Promise<void> {
    const copy = ['skopeo', '--insecure-policy', 'copy', '--quiet', '--preserve-digests', '--dest-tls-verify=false'];
    const places = [`oci:${dir}:${tag}`, `docker://${reference}`];
    await execute([...this.#far, ...copy, ...places], { timeoutMs: PUSH_TIMEOUT_MS });
  }

  /** Random bytes at the registry, to measure the link with. */
  async #pushProbe(): Promise<void> {
    const dir = join(this.#dir, 'probe');
    const entries = [{ name: 'random', content: randomBytes(PROBE_BYTES) }];
    const { layers } = await makeImage({ layers: [{ entries, compression: 'none' }], into: dir, tag: 'probe' });
    await this.#copy(dir, 'probe', `${this.registry.host}/probe:probe`);
    this.#probeBlob = layers[0]?.digest ?? '';
  }

  /** The registry stands for another machine: its page cache is not the node's. */
  async #warmRegistry(repository: string): Promise<void> {
    const root = join(this.registry.storageDir, 'docker/registry/v2');
    const links = join(root, 'repositories', repository, '_layers/sha256');
    const files = (await readdir(links)).map((hex) => join(root, 'blobs/sha256', hex.slice(0, 2), hex, 'data'));
    await execute(['sh', '-c', 'cat -- "$@" > /dev/null', 'sh', ...files.filter((file) => existsSync(file))]);
  }

  async requests(fromAt: number, toAt: number): ReturnType<Meter['requests']> {
    await this.#arrived();
    const all = this.registry.answered(fromAt);
    const within = all.filter(({ startedAt }) => startedAt >= fromAt && startedAt <= toAt);
    return await Promise.resolve(within.sort((a, b) => a.startedAt - b.startedAt));
  }

  /** Waits until the link carries nothing: the registry's log has a request only when it was answered. */
  async #arrived(): Promise<void> {
    const untilMs = performance.now() + ARRIVAL_MS;
    let before = -1;
    while (this.link !== undefined && performance.now() < untilMs && this.receivedBytes !== before) {
      before = this.receivedBytes;
      await sleep(MOMENT_MS);
    }
  }

  /** Makes the link what `link` says. */
  async enter(link: BenchLink): Promise<void> {
    const { roundTripMs = 0, bitsPerSecond = 0, lossRatio = 0, name } = link;
    if (this.link === undefined) throw new Error(`no link to make ${name} of`);
    await this.link.set({ name, roundTripMs, bitsPerSecond, lossRate: lossRatio });
  }

  probe(): LinkProbe {
    const { link } = this;
    if (link === undefined) throw new Error('no link to measure');
    const { near, farAddress } = link;
    return {
      roundTripMs: async () => {
        const text = await execute([...near, 'ping', '-q', '-i', '0.05', '-c', '21', farAddress]);
        const average = /= [\d.]+\/([\d.]+)\//.exec(text)?.[1];
        if (average === undefined) throw new Error(`ping: ${text}`);
        return Number(average);
      },
      bytesPerSecond: async () => {
        const scheme = this.#caFile === undefined ? 'http' : 'https';
        const url = `${scheme}://${this.registry.host}/v2/probe/blobs/${this.#probeBlob}`;
        // About two seconds.
        const bytes = Math.min(PROBE_BYTES, Math.max(8e6, (link.profile.bitsPerSecond / 8) * 2));
        const probe = [process.execPath, join(import.meta.dirname, 'link-probe.ts'), url, String(Math.floor(bytes))];
        const trust = this.#caFile === undefined ? [] : ['env', `NODE_EXTRA_CA_CERTS=${this.#caFile}`];
        return Number(await execute([...near, ...trust, ...probe]));
      },
    };
  }

  /** Bytes that have come over the link to the node, TCP's own included. */
  get receivedBytes(): number {
    return receivedBytes(this.product.servicePid ?? process.pid);
  }

  async stop(): Promise<void> {
    await this.#parts.disposeAsync();
    await rm(this.#dir, { recursive: true, force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/** What the network devices of a process's namespace have received, without loopback, bytes (proc(5), net/dev). */
function receivedBytes(pid: number): number {
  let sum = 0;
  for (const line of readFileSync(`/proc/${pid}/net/dev`, 'utf8').split('\n')) {
    const [, device, bytes] = /^\s*([^:\s]+):\s*(\d+)/.exec(line) ?? [];
    if (device !== undefined && device !== 'lo') sum += Number(bytes);
  }
  return sum;
}

/** Ends what is left in a network namespace of ours: a peer may have daemons that outlive its service. */
function endAll(inside: Inside): void {
  const namespace = readlinkSync(inside[1]!.replace('--net=', ''));
  // Never the machine's own.
  if (namespace === readlinkSync('/proc/self/ns/net')) return;
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      if (readlinkSync(`/proc/${pid}/ns/net`) === namespace) process.kill(Number(pid), 'SIGKILL');
    } catch {
      // It has ended meanwhile.
    }
  }
}

interface Service {
  /** True; throws with its output when it has ended. */
  check(): true;
  stop(): Promise<void>;
}

function startService(argv: readonly string[]): Service {
  const [file = '', ...args] = argv;
  const child: ChildProcess = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream?.on('data', (data: Buffer) => {
      output = (output + data.toString()).slice(-10_000);
    });
  }
  child.on('error', (error) => {
    output += error.message;
  });
  const ended = () => child.exitCode !== null || child.signalCode !== null || child.pid === undefined;
  return {
    check: () => {
      if (ended()) throw new Error(`${argv.join(' ')} ended: ${output}`);
      return true;
    },
    stop: async () => {
      child.kill('SIGTERM');
      await waitFor(`${file} to end`, ended).catch(() => child.kill('SIGKILL'));
    },
  };
}

interface Blob {
  readonly digest: string;
  readonly size: number;
}

/** Configuration and layers of a tag in an OCI layout directory. */
async function manifestOf(dir: string, tag: string): Promise<{ config: Blob; layers: Blob[] }> {
  const json = async <T>(path: string): Promise<T> => JSON.parse(await readFile(join(dir, path), 'utf8')) as T;
  interface Entry extends Blob {
    annotations?: Record<string, string>;
  }
  const { manifests } = await json<{ manifests: Entry[] }>('index.json');
  const found = manifests.find(({ annotations }) => annotations?.['org.opencontainers.image.ref.name'] === tag);
  if (found === undefined) throw new Error(`${dir} has no tag ${tag}`);
  return await json(`blobs/sha256/${found.digest.slice('sha256:'.length)}`);
}
