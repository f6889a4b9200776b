// The addon's idleThread in a worker thread: that thread becomes idle, and no other.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { native } from '../../src/fs/native.ts';

/** Scheduling policy of the calling thread: field 41 of its stat, which stands after a name in brackets (proc(5)). */
function policy(): number {
  const stat = readFileSync('/proc/thread-self/stat', 'latin1');
  return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[41 - 3]);
}

const SCHED_OTHER = 0;
const SCHED_IDLE = 5;

if (isMainThread) {
  test('a thread that asks for it gets what nobody else wants; others keep theirs', async () => {
    const worker = new Worker(new URL(import.meta.url), { workerData: 'become idle' });
    const [policies] = (await once(worker, 'message')) as [number[]];
    assert.deepEqual(policies, [SCHED_OTHER, SCHED_IDLE]);
    assert.equal(policy(), SCHED_OTHER);
  });
} else if (workerData === 'become idle') {
  const before = policy();
  native().idleThread();
  parentPort!.postMessage([before, policy()]);
}
