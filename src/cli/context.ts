// What every verb of the command line shares: configuration, registry options, a connection to dedupd, and how errors
// reach a person. Verbs declare the part they use.
import type { Command } from 'commander';
import { type Config, lazyDisabledReason, loadConfig } from '../config.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { RegistryOptions } from '../fs/registry/pool.ts';
import { createLogger, type Logger } from '../log.ts';
import { DEFAULT_CONFIG_FILE } from '../paths.ts';
import { registryOptions } from '../registry-settings.ts';
import { isRoot } from '../runtime.ts';

export class CliContext {
  readonly #program: Command;
  #config: Config | undefined;

  constructor(program: Command) {
    this.#program = program;
  }

  /** The file given with --config, or undefined for the default one. */
  get configFile(): string | undefined {
    return this.#program.opts<{ config?: string }>().config;
  }

  config(): Config {
    this.#config ??= loadConfig(this.configFile ?? DEFAULT_CONFIG_FILE, this.configFile !== undefined);
    return this.#config;
  }

  registryOptions(): RegistryOptions {
    return registryOptions(this.config());
  }

  /** Chunk size for indexes made here, bytes. */
  get chunkBytes(): number {
    return this.config().chunk_size;
  }

  get containerdAddress(): string {
    return this.config().containerd_address;
  }

  /**
   * Hands credentials of a verb to a running dedupd: lazy reads need them after the verb has ended. Where no layer is
   * lazy, by configuration or because no dedupd runs, nobody needs them.
   */
  async onCredentials(host: string, username: string, password: string): Promise<void> {
    if (lazyDisabledReason(this.config()) !== undefined) return;
    const { connectDaemon } = await import('./daemon-client.ts');
    try {
      const daemon = await connectDaemon(this, { start: false });
      try {
        await daemon.giveCredentials(host, `${username}:${password}`);
      } finally {
        daemon.close();
      }
    } catch (error) {
      if (errorCode(error) !== 'UNAVAILABLE') throw error;
      this.log.warn({ err: error }, 'dedupd does not run: layers are pulled and unpacked the normal way');
    }
  }

  /** Warnings and errors of a verb, to stderr; as configured when log_level is not "info". */
  get log(): Logger {
    const { log_level: level, verbose } = this.config();
    const wanted = verbose ? 'debug' : level;
    return createLogger('dedup-snapshotter', { level: wanted === 'info' ? 'warn' : wanted, fd: 2 });
  }

  /** Errors: NOT_ROOT with what to do. */
  requireRoot(verb: string): void {
    if (isRoot()) return;
    throw new DedupError('NOT_ROOT', `"${verb}" mounts file systems, which only root may do`, {
      hint: 'run it with sudo',
    });
  }

  /** Errors: FAILED_PRECONDITION when the configuration forbids lazy loading. */
  requireLazy(): void {
    const reason = lazyDisabledReason(this.config());
    if (reason !== undefined) {
      throw new DedupError('FAILED_PRECONDITION', `lazy loading is off: ${reason}`, {
        hint: `change ${this.configFile ?? DEFAULT_CONFIG_FILE}`,
      });
    }
  }
}

/** Prints an error for a person: what failed, what to do, and the code of docs/errors.md. */
export function printError(program: string, error: unknown): void {
  if (error instanceof DedupError) {
    process.stderr.write(`${program}: ${error.message} [${error.code}]\n`);
    if (error.hint !== undefined) process.stderr.write(`  ${error.hint}\n`);
    return;
  }
  process.stderr.write(`${program}: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`);
}
