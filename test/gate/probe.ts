// What a process of the product says about itself: processor time, allocations, peak memory. in-process.mjs is loaded
// into it through NODE_OPTIONS and answers a signal with a file; the product knows nothing of that.
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { waitFor } from '../support/containerd.ts';

/** Totals since the process started. */
export interface ProcessTotals {
  /** Processor time of all threads, user and kernel, seconds. */
  readonly cpuSeconds: number;
  /** What the main thread has allocated on V8's heap, bytes. */
  readonly allocatedBytes: number;
  /** Highest resident set, bytes. */
  readonly peakBytes: number;
}

/** What the processes load. */
const IN_PROCESS = pathToFileURL(join(import.meta.dirname, 'in-process.mjs')).href;

export class Probe implements AsyncDisposable {
  /** Words before a command that load it into everything the command starts. */
  readonly words: readonly string[];
  readonly #dir: string;
  /** How often a process was asked. */
  readonly #asked = new Map<number, number>();

  private constructor(dir: string) {
    this.#dir = dir;
    this.words = ['env', `GATE_PROBE=${dir}`, `NODE_OPTIONS=--import=${IN_PROCESS}`];
  }

  static async create(): Promise<Probe> {
    return new Probe(await mkdtemp(join(tmpdir(), 'gate-probe-')));
  }

  /** Asks a running process. Errors: Error when it does not answer. */
  async ask(pid: number): Promise<ProcessTotals> {
    const number = (this.#asked.get(pid) ?? 0) + 1;
    this.#asked.set(pid, number);
    const file = join(this.#dir, `${pid}-${number}`);
    process.kill(pid, 'SIGUSR2');
    await waitFor(`process ${pid} to say what it used`, () => existsSync(file));
    return JSON.parse(await readFile(file, 'utf8')) as ProcessTotals;
  }

  /** What those processes used that have ended since the last call. */
  async ended(): Promise<ProcessTotals[]> {
    const names = (await readdir(this.#dir)).filter((name) => name.endsWith('-exit'));
    return await Promise.all(
      names.map(async (name) => {
        const totals = JSON.parse(await readFile(join(this.#dir, name), 'utf8')) as ProcessTotals;
        await rm(join(this.#dir, name));
        return totals;
      }),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.#dir, { recursive: true, force: true });
  }
}
