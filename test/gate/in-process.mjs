// Loaded by probe.ts into processes of the product, through NODE_OPTIONS: writes what the process has used so far to
// $GATE_PROBE/PID-COUNT when asked by SIGUSR2, and to $GATE_PROBE/PID-exit at its end. JavaScript, because types would
// have to be stripped inside the process that is measured.
import { renameSync, writeFileSync } from 'node:fs';
import { GCProfiler } from 'node:v8';
import { isMainThread } from 'node:worker_threads';

const directory = process.env.GATE_PROBE;

function heapUsed() {
  return process.memoryUsage().heapUsed;
}

/** Sums up by how much the heap grew between collections: what was allocated on it. */
class Allocations {
  bytes = heapUsed();
  #last = this.bytes;
  #profiler = new GCProfiler();

  constructor() {
    this.#profiler.start();
  }

  sum() {
    for (const { beforeGC, afterGC } of this.#profiler.stop().statistics) {
      this.#grownTo(beforeGC.heapStatistics.usedHeapSize);
      this.#last = afterGC.heapStatistics.usedHeapSize;
    }
    this.#grownTo(heapUsed());
    // A profiler that was stopped tells nothing more.
    this.#profiler = new GCProfiler();
    this.#profiler.start();
    return this.bytes;
  }

  #grownTo(used) {
    this.bytes += Math.max(0, used - this.#last);
    this.#last = used;
  }
}

function report(name, allocations) {
  const { user, system } = process.cpuUsage();
  const totals = {
    cpuSeconds: (user + system) / 1e6,
    allocatedBytes: allocations.sum(),
    peakBytes: process.resourceUsage().maxRSS * 1024,
  };
  const file = `${directory}/${process.pid}-${name}`;
  writeFileSync(`${file}.tmp`, JSON.stringify(totals));
  // Whoever waits for the file finds all of it.
  renameSync(`${file}.tmp`, file);
}

if (isMainThread && directory !== undefined) {
  const allocations = new Allocations();
  let count = 0;
  process.on('SIGUSR2', () => report(++count, allocations));
  process.on('exit', () => report('exit', allocations));
}
