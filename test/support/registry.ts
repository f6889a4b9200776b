// A real docker-registry process on a loopback port with its files in a temporary directory, for tests and benchmarks.
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);

export interface RegistryProcessOptions {
  /** Basic authentication: the lines of an htpasswd file with bcrypt hashes, e.g. `TEST_LOGIN.htpasswd`. */
  readonly htpasswd?: string;
  /** Token authentication: the realm and the root certificate that signed the tokens' key. */
  readonly token?: {
    readonly realm: string;
    readonly service: string;
    readonly issuer: string;
    readonly rootCertFile: string;
  };
  readonly tls?: { readonly certFile: string; readonly keyFile: string };
  /** Kept by the caller; default: a new temporary directory that `stop` removes. */
  readonly storageDir?: string;
  /** Fixed port, to restart at the same address. */
  readonly port?: number;
  /** Words before the command, to run it in another network namespace; `address` is then one of that namespace. */
  readonly inside?: readonly string[];
  /** Where it listens. Default 127.0.0.1. */
  readonly address?: string;
}

/** A user for `htpasswd`; the bcrypt line is made once, Node has no bcrypt. */
export const TEST_LOGIN = {
  username: 'alice',
  password: 'secret-word',
  htpasswd: 'alice:$2y$04$H93MVahbmxBiv0SACEtwQeIB3iIa3NljNUTSkx72ZZJcdeUZfDezu',
} as const;

export class RegistryProcess {
  readonly host: string;
  readonly port: number;
  readonly storageDir: string;
  readonly #dir: string;
  readonly #configFile: string;
  readonly #inside: readonly string[];
  #child: ChildProcess | undefined;
  #log = '';

  private constructor(host: string, dir: string, storageDir: string, configFile: string, inside: readonly string[]) {
    this.port = Number(host.slice(host.lastIndexOf(':') + 1));
    this.host = host;
    this.#dir = dir;
    this.storageDir = storageDir;
    this.#configFile = configFile;
    this.#inside = inside;
  }

  static async start(options: RegistryProcessOptions = {}): Promise<RegistryProcess> {
    const dir = await mkdtemp(join(tmpdir(), 'registry-'));
    const storageDir = options.storageDir ?? join(dir, 'storage');
    await mkdir(storageDir, { recursive: true });
    const host = `${options.address ?? '127.0.0.1'}:${options.port ?? (await freePort())}`;
    const configFile = join(dir, 'config.json');
    await writeFile(join(dir, 'htpasswd'), `${options.htpasswd ?? ''}\n`, { mode: 0o600 });
    // The configuration is YAML, of which JSON is a part.
    const config = {
      version: 0.1,
      log: { level: 'info', formatter: 'text', accesslog: { disabled: false } },
      storage: {
        filesystem: { rootdirectory: storageDir },
        delete: { enabled: true },
        cache: { blobdescriptor: 'inmemory' },
      },
      http: {
        addr: host,
        secret: createHash('sha256').update(dir).digest('hex'),
        ...(options.tls === undefined ? {} : { tls: { certificate: options.tls.certFile, key: options.tls.keyFile } }),
      },
      ...(options.htpasswd === undefined ? {} : { auth: { htpasswd: { realm: 'test', path: join(dir, 'htpasswd') } } }),
      ...(options.token === undefined
        ? {}
        : {
            auth: {
              token: {
                realm: options.token.realm,
                service: options.token.service,
                issuer: options.token.issuer,
                rootcertbundle: options.token.rootCertFile,
              },
            },
          }),
    };
    await writeFile(configFile, JSON.stringify(config));
    const registry = new RegistryProcess(host, dir, storageDir, configFile, options.inside ?? []);
    await registry.launch();
    return registry;
  }

  /** Starts the process again after `halt`, on the same port and files. */
  async launch(): Promise<void> {
    await this.halt();
    const [program, ...args] = [...this.#inside, 'docker-registry', 'serve', this.#configFile];
    const child = spawn(program!, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    this.#child = child;
    const failed = new Promise<never>((_, reject) => {
      child.once('error', (error) => reject(new Error(`docker-registry cannot be started: ${error.message}`)));
      child.once('exit', (code) => reject(new Error(`docker-registry ended with ${code}: ${this.#log.slice(-2000)}`)));
    });
    failed.catch(() => undefined); // it also ends when it is stopped, long after anyone waits for it
    const listening = new Promise<void>((resolve) => {
      const onData = (data: Buffer) => {
        this.#log += data.toString('utf8');
        if (this.#log.length > 8 << 20) this.#log = this.#log.slice(-(4 << 20));
        if (this.#log.includes('listening on')) resolve();
      };
      child.stdout?.on('data', onData);
      child.stderr?.on('data', onData);
    });
    await Promise.race([listening, failed]);
  }

  /** Ends the process; files and port stay. */
  async halt(): Promise<void> {
    const child = this.#child;
    this.#child = undefined;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
  }

  /** Ends the process and removes its temporary files. */
  async stop(): Promise<void> {
    await this.halt();
    await rm(this.#dir, { recursive: true, force: true });
  }

  /** Runs the registry's own collector, with the process halted meanwhile: it must not run beside uploads. */
  async garbageCollect(options: { readonly deleteUntagged: boolean }): Promise<string> {
    await this.halt();
    const flags = options.deleteUntagged ? ['--delete-untagged'] : [];
    const { stdout } = await run('docker-registry', ['garbage-collect', ...flags, this.#configFile], {
      maxBuffer: 64 << 20,
    });
    this.#log = '';
    await this.launch();
    return stdout;
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  /** Everything it wrote since its start. */
  get logs(): string {
    return this.#log;
  }

  /** Requests it answered, from its access log, of one method and a path that matches. */
  requests(method?: string, path?: RegExp): number {
    return [...this.#log.matchAll(/"([A-Z]+) (\S+) HTTP\/1\.[01]"/g)].filter(
      ([, requestMethod, requestPath]) =>
        (method === undefined || requestMethod === method) && (path === undefined || path.test(requestPath ?? '')),
    ).length;
  }

  /** Answers so far and bytes of their bodies, from its access log. */
  traffic(): { requests: number; bytes: number } {
    let [requests, bytes] = [0, 0];
    for (const match of this.#log.matchAll(/"GET \S+ HTTP\/1\.[01]" \d{3} (\d+)/g)) {
      requests++;
      bytes += Number(match[1]);
    }
    return { requests, bytes };
  }

  /** Answers since `fromAt` in the order of their end, from its log. Times: milliseconds since the epoch. */
  answered(fromAt = 0): { startedAt: number; endedAt: number; bytes: number; path: string; method: string }[] {
    const found: ReturnType<RegistryProcess['answered']> = [];
    for (const line of this.#log.split('\n')) {
      if (!line.includes('msg="response completed')) continue;
      const field = (name: string) => new RegExp(` ${name}=("([^"]*)"|\\S+)`).exec(line)?.slice(1) ?? [];
      const text = (name: string) => field(name)[1] ?? field(name)[0] ?? '';
      const endedAt = epochMs(/^time="([^"]*)"/.exec(line)?.[1] ?? '');
      if (endedAt < fromAt) continue;
      found.push({
        startedAt: endedAt - durationMs(text('http.response.duration')),
        endedAt,
        bytes: Number(text('http.response.written')),
        path: text('http.request.uri'),
        method: text('http.request.method'),
      });
    }
    return found;
  }

  /** Overwrites stored bytes of a blob, as a broken disk would. */
  async corruptBlob(digest: string, offset: number): Promise<void> {
    const hex = digest.slice(7);
    const file = join(this.storageDir, 'docker/registry/v2/blobs/sha256', hex.slice(0, 2), hex, 'data');
    const bytes = await readFile(file);
    bytes[offset] = (bytes[offset] ?? 0) ^ 0xff;
    await writeFile(file, bytes);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/** RFC 3339 with nanoseconds, of which Date keeps three digits. */
function epochMs(text: string): number {
  const fraction = /\.(\d+)/.exec(text)?.[1] ?? '0';
  return Date.parse(text.replace(/\.\d+/, '')) + Number(`0.${fraction}`) * 1000;
}

/** A duration as Go prints it: "1m2.5s", "1.5ms", "962.547µs". */
function durationMs(text: string): number {
  const units: Readonly<Record<string, number>> = {
    h: 3_600_000,
    m: 60_000,
    s: 1000,
    ms: 1,
    µs: 0.001,
    us: 0.001,
    ns: 1e-6,
  };
  let sum = 0;
  for (const [, value, unit = ''] of text.matchAll(/([\d.]+)(h|ms|m|s|µs|us|ns)/g))
    sum += Number(value) * (units[unit] ?? 0);
  return sum;
}

/** A port that was free a moment ago. */
export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(0, '127.0.0.1', resolve);
  });
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
