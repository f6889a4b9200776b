// When a process counts as ready, with real processes and sockets in place of a container.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { listensOn, waitReady } from '../../../src/bench/ready.ts';
import type { Ready } from '../../../src/bench/result.ts';

let dir: string;
before(() => {
  dir = mkdtempSync(join(tmpdir(), 'ready-'));
});
after(() => {
  rmSync(dir, { recursive: true, force: true });
});

async function readyOf(ready: Ready, script: string, timeoutMs = 10_000): Promise<number> {
  const child = spawn('sh', ['-c', script], { stdio: ['ignore', 'pipe', 'pipe'] });
  try {
    return await waitReady(ready, { child, pidFile: join(dir, 'none'), timeoutMs });
  } finally {
    child.kill('SIGKILL');
  }
}

describe('a line', () => {
  const line: Ready = { kind: 'line', pattern: '^now ready$' };

  test('of standard output or error counts before the process ends', async () => {
    await readyOf(line, 'echo starting; echo now ready; exec sleep 60');
    await readyOf(line, 'echo now ready >&2; exec sleep 60');
  });

  test('may come in pieces, and the two streams do not mix', async () => {
    await readyOf(line, 'printf "now "; sleep 0.05; printf "ready\\n"; exec sleep 60');
    await assert.rejects(readyOf(line, 'printf "now "; sleep 0.05; printf "ready\\n" >&2'), /ended with 0 before/);
  });

  test('printed last still counts, without one the output is in the error', async () => {
    await readyOf(line, 'echo now ready; exit 3');
    await assert.rejects(readyOf(line, 'echo something else; exit 3'), /ended with 3 before .*something else/s);
  });

  test('that never comes is an error after the deadline', async () => {
    await assert.rejects(readyOf(line, 'echo waiting; exec sleep 60', 300), /not ready after 0.3 s.*waiting/s);
  });
});

test('an end counts with status 0 only', async () => {
  await readyOf({ kind: 'exit' }, 'echo done');
  await assert.rejects(readyOf({ kind: 'exit' }, 'echo failed; exit 1'), /ended with 1/);
});

test('a port counts when the network namespace of the process in the pid file listens on it', async () => {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  assert.ok(typeof address === 'object' && address !== null);
  const pidFile = join(dir, 'pid');
  const child = spawn('sleep', ['60'], { stdio: ['ignore', 'pipe', 'pipe'] });
  try {
    const ready = waitReady({ kind: 'port', port: address.port }, { child, pidFile, timeoutMs: 10_000 });
    const writtenMs = performance.now();
    writeFileSync(pidFile, String(process.pid));
    assert.ok((await ready) >= writtenMs);
    const closed = waitReady({ kind: 'port', port: 1 }, { child, pidFile, timeoutMs: 200 });
    await assert.rejects(closed, /not ready after/);
  } finally {
    child.kill('SIGKILL');
    server.close();
  }
});

test('only listeners count, of IPv4 and IPv6', () => {
  const tcp =
    '  sl  local_address rem_address   st tx_queue\n   0: 00000000:0050 00000000:0000 0A 0:0\n   1: 0100007F:1F90 0100007F:0050 01 0:0\n';
  assert.equal(listensOn(tcp, 80), true);
  assert.equal(listensOn(tcp, 8080), false);
  assert.equal(listensOn('   0: 00000000000000000000000000000000:0050 0:0 0A 0:0', 80), true);
});
