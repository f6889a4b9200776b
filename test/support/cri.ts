// A small client of the container runtime interface: what a kubelet asks of containerd, as far as tests need it. Talks
// to containerd's own socket; containerd must have been started with the CRI plugin.
import { randomUUID } from 'node:crypto';
import { readdir, readFile, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { credentials, loadPackageDefinition, type ServiceClientConstructor } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { waitFor } from './containerd.ts';

interface Packages {
  readonly runtime: {
    readonly v1: { readonly ImageService: ServiceClientConstructor; readonly RuntimeService: ServiceClientConstructor };
  };
}

/** Network, process and IPC namespaces of the host: no CNI plugin is needed. */
const ON_THE_HOST = { network: 'NODE', pid: 'CONTAINER', ipc: 'NODE' } as const;
const RUNNING = 1;
const EXITED = 2;
const DEADLINE_MS = 60_000;

export interface CriImage {
  readonly id: string;
  readonly repo_tags: readonly string[];
  readonly size: number;
}

/** What a writable layer, or all snapshots, take on disk. */
export interface CriUsage {
  readonly bytes: number;
  readonly inodes: number;
}

interface WireUsage {
  readonly used_bytes: { readonly value: number } | null;
  readonly inodes_used: { readonly value: number } | null;
}

interface WireStats {
  readonly attributes: { readonly id: string };
  readonly writable_layer: WireUsage | null;
}

function usageOf(usage: WireUsage | null | undefined): CriUsage {
  return { bytes: usage?.used_bytes?.value ?? 0, inodes: usage?.inodes_used?.value ?? 0 };
}

export class CriClient {
  readonly #images: InstanceType<ServiceClientConstructor>;
  readonly #runtime: InstanceType<ServiceClientConstructor>;
  readonly #logDirectory: string;
  readonly #cgroup = `/cri-${randomUUID().slice(0, 8)}`;
  readonly #pods = new Map<string, object>();

  /** `logDirectory`: where containers' output goes; the caller removes it. */
  constructor(address: string, logDirectory: string) {
    const options = { keepCase: true, longs: Number, defaults: true, arrays: true, objects: true };
    const definition = loadSync(join(import.meta.dirname, 'proto', 'cri.proto'), options);
    const { v1 } = (loadPackageDefinition(definition) as unknown as Packages).runtime;
    this.#images = new v1.ImageService(`unix:${address}`, credentials.createInsecure());
    this.#runtime = new v1.RuntimeService(`unix:${address}`, credentials.createInsecure());
    this.#logDirectory = logDirectory;
  }

  /** A containerd that has just started listens before its CRI is ready: then the call is made again. */
  async #call<T>(client: InstanceType<ServiceClientConstructor>, method: string, request: object): Promise<T> {
    const deadline = Date.now() + DEADLINE_MS;
    for (;;) {
      try {
        return await this.#callOnce<T>(client, method, request);
      } catch (error) {
        if (!/server is not initialized yet/.test(String(error)) || Date.now() > deadline) throw error;
        await sleep(50);
      }
    }
  }

  #callOnce<T>(client: InstanceType<ServiceClientConstructor>, method: string, request: object): Promise<T> {
    return new Promise((resolve, reject) => {
      const invoke = client[method] as (
        request: object,
        options: { deadline: number },
        done: (error: Error | null, value: T) => void,
      ) => void;
      invoke.call(client, request, { deadline: Date.now() + DEADLINE_MS }, (error, value) =>
        error === null ? resolve(value) : reject(error),
      );
    });
  }

  /** Answers the image's identity, the digest of its configuration. */
  async pull(image: string, auth?: { username: string; password: string }): Promise<string> {
    const request = { image: { image }, ...(auth === undefined ? {} : { auth }) };
    return (await this.#call<{ image_ref: string }>(this.#images, 'PullImage', request)).image_ref;
  }

  async remove(image: string): Promise<void> {
    await this.#call(this.#images, 'RemoveImage', { image: { image } });
  }

  async list(): Promise<CriImage[]> {
    return (await this.#call<{ images: CriImage[] }>(this.#images, 'ListImages', {})).images;
  }

  /** Starts a pod on the host's network; it runs the configured sandbox image. */
  async runPod(name: string): Promise<string> {
    const config = {
      metadata: { name, uid: randomUUID(), namespace: 'default', attempt: 0 },
      hostname: '', // The host's network brings the host's name.
      log_directory: this.#logDirectory,
      linux: { cgroup_parent: this.#cgroup, security_context: { namespace_options: ON_THE_HOST } },
    };
    const { pod_sandbox_id } = await this.#call<{ pod_sandbox_id: string }>(this.#runtime, 'RunPodSandbox', { config });
    this.#pods.set(pod_sandbox_id, config);
    return pod_sandbox_id;
  }

  /** Makes and starts a container of a pod; answers its id. */
  async startContainer(pod: string, name: string, image: string, command: readonly string[]): Promise<string> {
    const config = {
      metadata: { name },
      image: { image },
      command,
      log_path: `${name}.log`,
      linux: { security_context: { namespace_options: ON_THE_HOST } },
    };
    const request = { pod_sandbox_id: pod, config, sandbox_config: this.#pods.get(pod) };
    const { container_id } = await this.#call<{ container_id: string }>(this.#runtime, 'CreateContainer', request);
    await this.#call(this.#runtime, 'StartContainer', { container_id });
    return container_id;
  }

  /** Waits until a container has ended; its exit code, and what it wrote to stdout. */
  async outcome(container: string, name: string): Promise<{ code: number; stdout: string }> {
    let code = -1;
    await waitFor(`container ${name} to end`, async () => {
      const request = { container_id: container };
      type Answer = { status: { state: number | string; exit_code: number } };
      const { status } = await this.#call<Answer>(this.#runtime, 'ContainerStatus', request);
      code = status.exit_code;
      return status.state === EXITED;
    });
    const log = await readFile(join(this.#logDirectory, `${name}.log`), 'utf8');
    // Each line: time, stream, F or P, text (kubelet's log format).
    const lines = log.split('\n').flatMap((line) => /^\S+ stdout F (.*)$/.exec(line)?.[1] ?? []);
    return { code, stdout: lines.map((line) => `${line}\n`).join('') };
  }

  /** Identities of the containers that run. */
  async running(): Promise<string[]> {
    type Answer = { containers: { id: string; state: number }[] };
    const { containers } = await this.#call<Answer>(this.#runtime, 'ListContainers', {});
    return containers.filter(({ state }) => state === RUNNING).map(({ id }) => id);
  }

  /** Use of a container's writable layer; zeros before containerd has first asked the snapshotter. */
  async writableLayer(container: string): Promise<CriUsage> {
    const request = { container_id: container };
    const { stats } = await this.#call<{ stats: WireStats }>(this.#runtime, 'ContainerStats', request);
    return usageOf(stats.writable_layer);
  }

  /** As writableLayer, for every container, by its identity. */
  async writableLayers(): Promise<Map<string, CriUsage>> {
    const { stats } = await this.#call<{ stats: WireStats[] }>(this.#runtime, 'ListContainerStats', {});
    return new Map(stats.map(({ attributes, writable_layer }) => [attributes.id, usageOf(writable_layer)]));
  }

  /** Use of all snapshots together. */
  async imageFileSystem(): Promise<CriUsage> {
    type Answer = { image_filesystems: WireUsage[] };
    return usageOf((await this.#call<Answer>(this.#images, 'ImageFsInfo', {})).image_filesystems[0]);
  }

  /** Runs a command in a running container. */
  async exec(container: string, cmd: readonly string[]): Promise<{ code: number; stdout: string }> {
    const request = { container_id: container, cmd, timeout: 30 };
    type Answer = { stdout: Buffer; exit_code: number };
    const { stdout, exit_code } = await this.#call<Answer>(this.#runtime, 'ExecSync', request);
    return { code: exit_code, stdout: Buffer.from(stdout).toString('utf8') };
  }

  async removePod(pod: string): Promise<void> {
    await this.#call(this.#runtime, 'StopPodSandbox', { pod_sandbox_id: pod });
    await this.#call(this.#runtime, 'RemovePodSandbox', { pod_sandbox_id: pod });
    this.#pods.delete(pod);
  }

  /** Removes all pods, their cgroups, and ends the connection. Idempotent. */
  async close(): Promise<void> {
    for (const pod of this.#pods.keys()) await this.removePod(pod);
    this.#images.close();
    this.#runtime.close();
    for (const controller of ['', ...(await readdir('/sys/fs/cgroup'))])
      await rmdir(join('/sys/fs/cgroup', controller, this.#cgroup)).catch(() => {}); // one hierarchy may have several names
  }
}
