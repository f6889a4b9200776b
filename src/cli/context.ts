// What verbs of the command line share: configuration and what follows from it. Verbs declare the part they use.
import type { Command } from 'commander';
import { type Config, lazyDisabledReason, loadConfig } from '../config.ts';
import { DedupError } from '../errors.ts';
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
