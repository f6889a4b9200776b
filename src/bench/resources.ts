// Samples what a start costs while it runs: cores in use, memory of the daemons, bytes written to disks, bytes from the
// network. For one start of each snapshotter, whose times are then not used.
import { readdirSync, readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { cpuSeconds, type Daemon, pssBytes } from './process-use.ts';
import type { ResourceSample } from './result.ts';

export interface SamplerOptions {
  readonly intervalMs: number;
  /** Bytes that have come from the registry so far. */
  readonly networkBytes: () => number;
  /** Processes that are no part of the node although they run on this machine: registry, emulated link. */
  readonly foreign: () => readonly number[];
}

interface Counters {
  readonly atMs: number;
  readonly busySeconds: number;
  readonly diskBytes: number;
  readonly networkBytes: number;
}

/** Busy time of all cores, seconds: everything of proc(5) stat's first line but idle and iowait (and guests, which user has). */
export function busySeconds(stat: string): number {
  const fields = (/^cpu\s+(.*)$/m.exec(stat)?.[1] ?? '').split(' ').map(Number);
  return fields.slice(0, 8).reduce((sum, ticks, at) => (at === 3 || at === 4 ? sum : sum + ticks), 0) / 100;
}

/** Bytes written to whole disks, not to partitions or to devices that stand on others. `disks`: names that count. */
export function diskWrittenBytes(diskstats: string, disks: ReadonlySet<string>): number {
  let sectors = 0;
  for (const line of diskstats.split('\n')) {
    const fields = line.trim().split(/\s+/);
    // Column 10: sectors written, always of 512 bytes (kernel, Documentation/admin-guide/iostats.rst).
    if (disks.has(fields[2] ?? '')) sectors += Number(fields[9] ?? 0);
  }
  return sectors * 512;
}

/** Bytes written so far to the machine's own disks. */
export function writtenToDisks(): number {
  return diskWrittenBytes(readFileSync('/proc/diskstats', 'utf8'), realDisks());
}

function realDisks(): ReadonlySet<string> {
  return new Set(readdirSync('/sys/block').filter((name) => !/^(loop|ram|dm-|md|zram)/.test(name)));
}

export class ResourceSampler {
  readonly #options: SamplerOptions;
  readonly #disks = realDisks();
  #daemons: readonly Daemon[] = [];
  #timer: NodeJS.Timeout | undefined;
  #startedMs = 0;
  #last: Counters | undefined;
  #samples: ResourceSample[] = [];

  constructor(options: SamplerOptions) {
    this.#options = options;
  }

  start(daemons: readonly Daemon[]): void {
    this.#daemons = daemons;
    this.#samples = [];
    this.#startedMs = performance.now();
    this.#last = this.#read();
    this.#timer = setInterval(() => this.#sample(), this.#options.intervalMs);
  }

  /** Takes the last sample and answers all of them. Idempotent. */
  stop(): readonly ResourceSample[] {
    if (this.#timer !== undefined) {
      clearInterval(this.#timer);
      this.#timer = undefined;
      this.#sample();
    }
    return this.#samples;
  }

  #read(): Counters {
    // This process is foreign too: it only looks on.
    const foreign = [process.pid, ...this.#options.foreign()];
    return {
      atMs: performance.now(),
      busySeconds:
        busySeconds(readFileSync('/proc/stat', 'utf8')) - foreign.reduce((sum, pid) => sum + ownSeconds(pid), 0),
      diskBytes: diskWrittenBytes(readFileSync('/proc/diskstats', 'utf8'), this.#disks),
      networkBytes: this.#options.networkBytes(),
    };
  }

  #sample(): void {
    const last = this.#last!;
    const now = this.#read();
    const seconds = (now.atMs - last.atMs) / 1000;
    if (seconds <= 0) return;
    this.#last = now;
    const cores = (now.busySeconds - last.busySeconds) / seconds;
    this.#samples.push({
      atMs: now.atMs - this.#startedMs,
      cpuCores: Math.min(availableParallelism(), Math.max(0, cores)),
      memoryBytes: this.#daemons.reduce((sum, { pid }) => sum + pssBytes(pid), 0),
      diskWriteBytesPerSecond: Math.max(0, (now.diskBytes - last.diskBytes) / seconds),
      networkBytesPerSecond: Math.max(0, (now.networkBytes - last.networkBytes) / seconds),
    });
  }
}

/** Seconds of a process itself: those of children that ended are in the machine's sum as work of their own. */
function ownSeconds(pid: number): number {
  return cpuSeconds(pid, { children: false });
}
