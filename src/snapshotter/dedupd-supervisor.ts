// Finds the dedupd of this root or starts one: connects first, and only when nobody holds the root's lock starts a
// process of its own session, which outlives this one. Used by the service and by CLI verbs that need the daemon.
import { spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { Config } from '../config.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import { RunPaths } from '../paths.ts';
import { EXIT_LOCKED } from '../protocol.ts';

/** What the supervisor needs of a client; DedupdClient is one. */
export interface DaemonProbe {
  /** Errors: UNAVAILABLE when nobody listens, FAILED_PRECONDITION for another protocol version or root. */
  hello(): Promise<{ pid: number; root: string }>;
}

export interface SupervisorOptions {
  readonly config: Config;
  /** Configuration file handed to the daemon; undefined for defaults. */
  readonly configFile: string | undefined;
  readonly client: DaemonProbe;
  readonly log: Logger;
}

const START_DEADLINE_MS = 15_000;
const POLL_MS = 25;
const MAX_STARTS_PER_MINUTE = 5;
const WATCH_MS = 1_000;

export class DedupdSupervisor {
  readonly #options: SupervisorOptions;
  #starts: number[] = [];
  #watching: NodeJS.Timeout | undefined;
  #ensuring: Promise<void> | undefined;
  #gaveUp = false;
  /** True while a check is under way: one failure is told once. */
  #checking = false;

  constructor(options: SupervisorOptions) {
    this.#options = options;
  }

  /** Returns once a daemon answers. Errors: UNAVAILABLE with the reason and what to do. */
  ensure(): Promise<void> {
    this.#ensuring ??= this.#ensure().finally(() => {
      this.#ensuring = undefined;
    });
    return this.#ensuring;
  }

  async #ensure(): Promise<void> {
    if (await this.#answers()) return;
    const { config, log } = this.#options;
    if (!config.dedupd.enabled) {
      throw new DedupError('UNAVAILABLE', 'dedupd does not run and "dedupd.enabled" is false', {
        hint: 'start dedupd, or set "dedupd.enabled" to true',
      });
    }
    const now = Date.now();
    this.#starts = this.#starts.filter((time) => now - time < 60_000);
    if (this.#starts.length >= MAX_STARTS_PER_MINUTE) {
      throw new DedupError('UNAVAILABLE', `dedupd ended ${this.#starts.length} times within a minute`, {
        hint: `see ${join(config.log_dir, 'dedupd.log')}`,
      });
    }
    await sleep(this.#starts.length === 0 ? 0 : 100 * 2 ** this.#starts.length);
    this.#starts.push(now);
    const ended = this.#spawn();
    const deadline = Date.now() + START_DEADLINE_MS;
    while (Date.now() < deadline) {
      if (await this.#answers()) return;
      const status = ended();
      // A locked root means that another start won the race: its daemon will answer.
      if (status !== undefined && status !== EXIT_LOCKED) {
        throw new DedupError('UNAVAILABLE', `dedupd ended at once with status ${status}`, {
          hint: `see ${join(config.log_dir, 'dedupd.log')}`,
        });
      }
      await sleep(POLL_MS);
    }
    log.error({ deadlineMs: START_DEADLINE_MS }, 'dedupd does not answer');
    throw new DedupError('UNAVAILABLE', `dedupd did not answer within ${START_DEADLINE_MS / 1000} s`, {
      hint: `see ${join(config.log_dir, 'dedupd.log')}`,
    });
  }

  /** As ensure, for a call that found nobody; does not start one that was given up. Errors: UNAVAILABLE. */
  async revive(): Promise<void> {
    if (this.#gaveUp) throw new DedupError('UNAVAILABLE', 'dedupd was given up');
    await this.ensure();
  }

  async #answers(): Promise<boolean> {
    try {
      await this.#options.client.hello();
      return true;
    } catch (error) {
      if (errorCode(error) === 'UNAVAILABLE' || errorCode(error) === 'DEADLINE') return false;
      throw error;
    }
  }

  /** Starts a daemon; the returned function gives its exit status once it has ended. */
  #spawn(): () => number | undefined {
    const { config, configFile, log } = this.#options;
    const here = fileURLToPath(import.meta.url);
    const entry = join(dirname(here), '..', here.endsWith('.ts') ? 'dedupd.ts' : 'dedupd.js');
    mkdirSync(config.log_dir, { recursive: true, mode: 0o755 });
    const logFd = openSync(join(config.log_dir, 'dedupd.log'), 'a', 0o640);
    let status: number | undefined;
    try {
      // The same flags as ours: the launcher sets those that keep memory small.
      const args = [...process.execArgv, entry];
      if (configFile !== undefined) args.push('--config', configFile);
      const child = spawn(process.execPath, args, { detached: true, stdio: ['ignore', logFd, logFd], cwd: '/' });
      child.once('exit', (code, signal) => {
        status = code ?? (signal === null ? 1 : 128);
      });
      child.once('error', (error) => {
        log.error({ err: error }, 'dedupd cannot be started');
        status = 127;
      });
      child.unref();
      log.info({ daemonPid: child.pid }, 'started dedupd');
    } finally {
      closeSync(logFd);
    }
    return () => status;
  }

  /** Keeps a daemon running until close(); gives up loudly after repeated failures. */
  watch(): void {
    this.#watching ??= setInterval(() => void this.#check(), WATCH_MS).unref();
  }

  async #check(): Promise<void> {
    if (this.#gaveUp || this.#checking) return;
    this.#checking = true;
    const socket = new RunPaths(this.#options.config.run_dir).dedupdSocket;
    try {
      if (existsSync(socket) && (await this.#answers())) return;
      if (!this.#options.config.dedupd.enabled) return;
      await this.ensure();
    } catch (error) {
      this.#options.log.error({ err: error }, 'dedupd is not running: lazy layers are unavailable');
      if (error instanceof DedupError && error.message.includes('within a minute')) {
        this.#gaveUp = true;
        this.#options.log.fatal('giving up on dedupd; restart dedup-snapshotter once the cause is mended');
      }
    } finally {
      this.#checking = false;
    }
  }

  close(): void {
    clearInterval(this.#watching);
    this.#watching = undefined;
  }
}
