// The product as an operator runs it: `bin/dedup-snapshotter` with a configuration of its own in a temporary directory,
// and the dedupd that it starts. Used by end-to-end tests, the demo and benchmarks; the build must exist.
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, existsSync, openSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DedupdClient, type DedupdStats } from '../../src/snapshotter/dedupd-client.ts';
import { type CommandResult, mountsBelow, run, socketAnswers, unmountBelow, waitFor } from './containerd.ts';

const REPOSITORY = join(import.meta.dirname, '..', '..');
export const PROGRAM = join(REPOSITORY, 'bin', 'dedup-snapshotter');

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    // A zombie has ended: its parent is this process or init.
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

export class Product {
  readonly dir: string;
  readonly root: string;
  readonly runDir: string;
  readonly address: string;
  readonly configFile: string;
  readonly logFile: string;
  readonly #inside: readonly string[];
  #service: ChildProcess | undefined;
  #client: DedupdClient | undefined;

  private constructor(dir: string, inside: readonly string[]) {
    this.dir = dir;
    this.#inside = inside;
    this.root = join(dir, 'root');
    this.runDir = join(dir, 'run');
    this.address = join(dir, 'dedup.sock');
    this.configFile = join(dir, 'config.json');
    this.logFile = join(dir, 'service.log');
  }

  /**
   * Makes directory and configuration; start() runs the service. `inside`: words before its commands, to run them in
   * another network namespace.
   */
  static async create(
    config: Readonly<Record<string, unknown>> = {},
    options: { readonly inside?: readonly string[] } = {},
  ): Promise<Product> {
    if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing: run make build`);
    const product = new Product(await mkdtemp(join(tmpdir(), 'dedup-')), options.inside ?? []);
    await product.configure(config);
    return product;
  }

  async configure(config: Readonly<Record<string, unknown>>): Promise<void> {
    await mkdir(this.runDir, { recursive: true });
    const own = {
      root: this.root,
      run_dir: this.runDir,
      address: this.address,
      log_dir: this.dir,
      log_level: 'debug',
      ...config,
    };
    await writeFile(this.configFile, JSON.stringify(own));
  }

  /** Runs the service and waits until its socket answers. */
  async start(): Promise<void> {
    const log = openSync(this.logFile, 'a');
    const [program, ...args] = [...this.#inside, PROGRAM, '--config', this.configFile];
    const child = spawn(program!, args, { stdio: ['ignore', log, log] });
    closeSync(log);
    this.#service = child;
    await waitFor(
      'the service',
      async () => {
        if (child.exitCode !== null) throw new Error(`the service ended at start:\n${this.log()}`);
        return await socketAnswers(this.address);
      },
      30_000,
    );
  }

  /** Runs dedupd by itself, as systemd does, so that nobody starts another one; returns once it answers. */
  async startDaemon(): Promise<ChildProcess> {
    const log = openSync(this.logFile, 'a');
    const child = spawn(join(PROGRAM, '..', 'dedupd'), ['--config', this.configFile], { stdio: ['ignore', log, log] });
    closeSync(log);
    const answers = (): Promise<boolean> =>
      this.daemonPid().then(
        (pid) => pid === child.pid,
        () => false,
      );
    await waitFor('dedupd', answers, 20_000);
    return child;
  }

  /** `dedup-snapshotter --config … ARGS`. */
  async cli(
    args: readonly string[],
    options: { timeoutMs?: number; allowFailure?: boolean } = {},
  ): Promise<CommandResult> {
    const [program, ...words] = [...this.#inside, PROGRAM, '--config', this.configFile, ...args];
    return await run(program!, words, { timeoutMs: 120_000, ...options });
  }

  get client(): DedupdClient {
    this.#client ??= new DedupdClient({ address: join(this.runDir, 'dedupd.sock') });
    return this.#client;
  }

  stats(): Promise<DedupdStats> {
    return this.client.stats();
  }

  get servicePid(): number | undefined {
    return this.#service?.pid;
  }

  async daemonPid(): Promise<number> {
    return (await this.client.hello()).pid;
  }

  /** What both processes have logged. */
  log(): string {
    return [this.logFile, join(this.dir, 'dedupd.log')]
      .filter((file) => existsSync(file))
      .map((file) => readFileSync(file, 'utf8'))
      .join('\n');
  }

  async stopService(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    const child = this.#service;
    if (child === undefined) return;
    this.#service = undefined;
    child.kill(signal);
    await waitFor('the service to end', () => child.exitCode !== null || child.signalCode !== null, 15_000);
  }

  async stopDaemon(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    let pid: number;
    try {
      pid = await this.daemonPid();
    } catch {
      return; // None runs.
    }
    process.kill(pid, signal);
    await waitFor('dedupd to end', () => !alive(pid), 20_000);
  }

  /** Ends both processes and removes everything. Safe to call twice. */
  async stop(): Promise<void> {
    await this.stopService();
    await this.stopDaemon();
    this.#client?.close();
    this.#client = undefined;
    if (mountsBelow(this.dir).length > 0) await unmountBelow(this.dir);
    await rm(this.dir, { recursive: true, force: true });
  }
}
