// A real containerd of its own (root, state, socket, configuration in a temporary directory), for tests that need the
// true client of the snapshotter. Owns every shim, container and mount below that directory; touches nothing else.
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, existsSync, openSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, rmdir } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { containerdConfig } from './containerd-config.ts';
import { containerdVersion } from './containerd-version.ts';

export interface TestContainerdOptions {
  /** Proxy snapshotters: name → socket, as `[proxy_plugins.NAME]`. */
  readonly proxies?: Readonly<Record<string, string>>;
  /** False: proxies get no labels from the transfer service, where the version has that choice. Default true. */
  readonly exports?: boolean;
  /** Enables the CRI plugin with this snapshotter, and annotations on unless false; off when absent. */
  readonly cri?: { readonly snapshotter: string; readonly sandboxImage?: string; readonly annotations?: boolean };
  /** Namespace of `ctr`; one of its own by default, so that runc and cgroup names of two tests never meet. */
  readonly namespace?: string;
  /** Lines appended to config.toml. */
  readonly extraConfig?: string;
  /** Seconds after which `timeout` ends containerd whatever happens. Default 600. */
  readonly lifetimeSeconds?: number;
  /** Words before `containerd` and `ctr`, to run them in another network namespace. */
  readonly inside?: readonly string[];
}

export interface CommandResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Options of one `ctr` call. */
export interface CtrOptions {
  readonly timeoutMs?: number;
  /** Answers with the exit code instead of throwing. */
  readonly allowFailure?: boolean;
  readonly namespace?: string;
}

const RUNC_ROOT = '/run/containerd/runc';

/** Runs a program under a deadline; throws with its output unless `allowFailure`. */
export async function run(
  file: string,
  args: readonly string[],
  options: { timeoutMs?: number; allowFailure?: boolean; env?: NodeJS.ProcessEnv; cwd?: string } = {},
): Promise<CommandResult> {
  const result = await new Promise<CommandResult>((resolve) => {
    execFile(
      file,
      args as string[],
      {
        timeout: options.timeoutMs ?? 60_000,
        killSignal: 'SIGKILL',
        maxBuffer: 64 * 1024 * 1024,
        env: options.env ?? process.env,
        ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
      },
      (error, stdout, stderr) => {
        const code = error === null ? 0 : typeof error.code === 'number' ? error.code : -1;
        resolve({ code, stdout, stderr: code === -1 ? `${stderr}${error?.message ?? ''}` : stderr });
      },
    );
  });
  if (result.code !== 0 && options.allowFailure !== true) {
    throw new Error(`${file} ${args.join(' ')}: exit ${result.code}\n${result.stdout}${result.stderr}`);
  }
  return result;
}

/** Mount points below `dir` (never `dir` itself), deepest last in mount order. */
export function mountsBelow(dir: string): string[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) =>
      (line.split(' ')[4] ?? '').replace(/\\([0-7]{3})/g, (_, octal) => String.fromCharCode(parseInt(octal, 8))),
    )
    .filter((path) => path.startsWith(`${dir}/`));
}

/** Unmounts everything below `dir`, newest first, lazily where it is busy. */
export async function unmountBelow(dir: string): Promise<void> {
  for (const path of mountsBelow(dir).reverse()) {
    const plain = await run('umount', [path], { allowFailure: true, timeoutMs: 10_000 });
    if (plain.code !== 0) await run('umount', ['-l', path], { allowFailure: true, timeoutMs: 10_000 });
  }
}

function children(pid: number): number[] {
  try {
    const text = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim();
    return text === '' ? [] : text.split(' ').map(Number);
  } catch {
    return []; // the process has ended meanwhile
  }
}

function isAlive(pid: number): boolean {
  try {
    // The third field of stat is the state; a zombie has ended.
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2, stat.lastIndexOf(')') + 3) !== 'Z';
  } catch {
    return false;
  }
}

function killQuietly(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // It has ended already: what was wanted.
  }
}

/** Waits until `ready` is true. Throws with `what` after `timeoutMs`. */
export async function waitFor(
  what: string,
  ready: () => Promise<boolean> | boolean,
  timeoutMs = 15_000,
): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  while (!(await ready())) {
    if (Date.now() > deadline) throw new Error(`waited ${timeoutMs} ms in vain for ${what}`);
    await sleep(25);
  }
}

/** True when something accepts connections on the unix socket. */
export function socketAnswers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path);
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}

export class TestContainerd {
  readonly dir: string;
  readonly root: string;
  readonly state: string;
  readonly address: string;
  readonly configFile: string;
  readonly logFile: string;
  readonly namespace: string;
  readonly #lifetimeSeconds: number;
  readonly #inside: readonly string[];
  /** The `timeout` process around containerd. */
  #child: ChildProcess | undefined;

  private constructor(dir: string, options: TestContainerdOptions) {
    this.dir = dir;
    this.root = join(dir, 'root');
    this.state = join(dir, 'state');
    this.address = join(dir, 'containerd.sock');
    this.configFile = join(dir, 'config.toml');
    this.logFile = join(dir, 'containerd.log');
    this.namespace = options.namespace ?? `test-${randomBytes(4).toString('hex')}`;
    this.#lifetimeSeconds = options.lifetimeSeconds ?? 600;
    this.#inside = options.inside ?? [];
  }

  /** Starts containerd and waits until its socket answers. */
  static async start(options: TestContainerdOptions = {}): Promise<TestContainerd> {
    const dir = await mkdtemp(join(tmpdir(), 'ctrd-'));
    const self = new TestContainerd(dir, options);
    writeFileSync(self.configFile, containerdConfig(self, options, containerdVersion()));
    try {
      await self.#spawn();
    } catch (error) {
      await self.stop();
      throw error;
    }
    return self;
  }

  async #spawn(): Promise<void> {
    const log = openSync(this.logFile, 'a');
    // setpriv: containerd ends with the test process even if that is killed; timeout: it ends in any case.
    const child = spawn(
      'setpriv',
      [
        '--pdeathsig',
        'TERM',
        'timeout',
        '-k',
        '10',
        String(this.#lifetimeSeconds),
        ...this.#inside,
        'containerd',
        '--config',
        this.configFile,
      ],
      { stdio: ['ignore', log, log], detached: true },
    );
    closeSync(log);
    child.unref();
    this.#child = child;
    await waitFor(
      `containerd on ${this.address}`,
      async () => {
        if (child.exitCode !== null) throw new Error(`containerd ended at start:\n${this.#logTail()}`);
        return await socketAnswers(this.address);
      },
      30_000,
    );
  }

  #logTail(): string {
    return existsSync(this.logFile) ? readFileSync(this.logFile, 'utf8').split('\n').slice(-30).join('\n') : '';
  }

  /** Pid of containerd itself; undefined while it is down. */
  get pid(): number | undefined {
    const wrapper = this.#child?.pid;
    return wrapper === undefined ? undefined : children(wrapper)[0];
  }

  /** Everything containerd has logged so far. */
  async log(): Promise<string> {
    return await readFile(this.logFile, 'utf8');
  }

  /** `ctr --address … --namespace … ARGS`; throws with its output when it fails. */
  async ctr(args: readonly string[], options: CtrOptions = {}): Promise<CommandResult> {
    const own = ['--address', this.address, '--namespace', options.namespace ?? this.namespace];
    const [program, ...words] = [...this.#inside, 'ctr', ...own, ...args];
    return await run(program!, words, {
      timeoutMs: options.timeoutMs ?? 60_000,
      allowFailure: options.allowFailure === true,
    });
  }

  /** Runs containerd's garbage collection to its end: deleting a lease synchronously schedules it and waits. */
  async gc(): Promise<void> {
    const id = `gc-${randomBytes(4).toString('hex')}`;
    await this.ctr(['leases', 'create', '--id', id]);
    await this.ctr(['leases', 'rm', '--sync', id]);
  }

  /** What containerd's records hold in one namespace: for asserting that nothing is left. */
  async inventory(
    snapshotter: string,
    namespace = this.namespace,
  ): Promise<{ content: string[]; ingests: string[]; snapshots: string[]; images: string[]; leases: string[] }> {
    const first = (text: string) =>
      text
        .split('\n')
        .map((line) => line.trim().split(/\s+/)[0] ?? '')
        .filter((word) => word !== '' && word !== 'KEY' && word !== 'REF' && word !== 'ID');
    const list = async (args: string[]) => first((await this.ctr(args, { namespace })).stdout);
    return {
      content: await list(['content', 'ls', '-q']),
      ingests: await list(['content', 'active']),
      snapshots: await list(['snapshots', '--snapshotter', snapshotter, 'ls']),
      images: await list(['images', 'ls', '-q']),
      leases: await list(['leases', 'ls', '-q']),
    };
  }

  /** Ends containerd alone (shims and containers stay) and starts it again on the same state. */
  async restart(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    await this.down(signal);
    await this.#spawn();
  }

  /** Starts containerd again after `down`. */
  async up(): Promise<void> {
    if (this.#child === undefined) await this.#spawn();
  }

  /** Ends containerd alone. Its containers go on. */
  async down(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    const wrapper = this.#child;
    if (wrapper === undefined) return;
    const pid = this.pid;
    if (pid !== undefined) killQuietly(pid, signal);
    try {
      await waitFor('containerd to end', () => wrapper.exitCode !== null || wrapper.signalCode !== null, 10_000);
    } catch {
      if (pid !== undefined) killQuietly(pid, 'SIGKILL');
      await waitFor('containerd to end', () => wrapper.exitCode !== null || wrapper.signalCode !== null, 10_000);
    }
    this.#child = undefined;
  }

  /** Ends containers, shims and containerd; unmounts and removes the directory. Safe to call twice. */
  async stop(): Promise<void> {
    const shims = await this.#shims();
    for (const shim of shims) for (const pid of children(shim)) killQuietly(pid, 'SIGKILL');
    await this.down();
    for (const shim of shims) killQuietly(shim, 'SIGKILL');
    await waitFor('shims to end', () => !shims.some(isAlive), 10_000);
    await this.#removeRuncState();
    await this.#removeShimSockets();
    await unmountBelow(this.dir);
    await rm(this.dir, { recursive: true, force: true });
  }

  /** Shims started by this containerd: their command line names its socket. */
  async #shims(): Promise<number[]> {
    const found: number[] = [];
    for (const name of await readdir('/proc')) {
      if (!/^\d+$/.test(name)) continue;
      try {
        const words = readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0');
        const exe = readlinkSync(`/proc/${name}/exe`);
        if (exe.includes('containerd-shim') && words.includes(this.address)) found.push(Number(name));
      } catch {
        // The process has ended while we looked.
      }
    }
    return found;
  }

  /** runc keeps its state by namespace outside our directory; so do cgroups. Only our own namespace is touched. */
  async #removeRuncState(): Promise<void> {
    if (!this.namespace.startsWith('test-')) return;
    const dir = join(RUNC_ROOT, this.namespace);
    if (existsSync(dir)) {
      for (const id of await readdir(dir)) {
        await run('runc', ['--root', dir, 'delete', '--force', id], { allowFailure: true, timeoutMs: 10_000 });
      }
      await rm(dir, { recursive: true, force: true });
    }
    const base = '/sys/fs/cgroup';
    for (const controller of ['', ...(await readdir(base))]) {
      const group = join(base, controller, this.namespace);
      if (!existsSync(group)) continue;
      for (const id of await readdir(group, { withFileTypes: true })) {
        if (id.isDirectory()) await rmdir(join(group, id.name)).catch(() => {});
      }
      await rmdir(group).catch(() => {}); // another controller of the same hierarchy removed it
    }
  }

  /** Shims listen outside our directory too; each bundle names its socket. */
  async #removeShimSockets(): Promise<void> {
    const tasks = join(this.state, 'io.containerd.runtime.v2.task');
    if (!existsSync(tasks)) return;
    for (const bundle of await readdir(tasks, { recursive: true, withFileTypes: true })) {
      if (bundle.name !== 'address' || !bundle.isFile()) continue;
      const address = readFileSync(join(bundle.parentPath, bundle.name), 'utf8').trim();
      if (address.startsWith('unix:///run/containerd/s/')) await rm(address.slice('unix://'.length), { force: true });
    }
  }

  /** A directory below the containerd's own, removed with it. */
  async scratch(name: string): Promise<string> {
    const path = join(this.dir, name);
    await mkdir(path, { recursive: true });
    return path;
  }
}
