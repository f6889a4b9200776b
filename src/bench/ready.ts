// When a container counts as ready: a line of its output, a TCP port it listens on, or its end. Seen from outside the
// container, within POLL_MS.
import type { ChildProcess } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { DedupError } from '../errors.ts';
import type { Ready } from './result.ts';

/** How often a port is looked for; lines and ends are events. */
export const POLL_MS = 2;
const KEPT_OUTPUT_CHARS = 64 * 1024;
/** State of a listening socket in proc(5), net/tcp. */
const TCP_LISTEN = '0A';

/** True when proc(5)'s net/tcp or net/tcp6 text has a listener on the port. */
export function listensOn(table: string, port: number): boolean {
  const suffix = `:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  return table.split('\n').some((line) => {
    const [, local = '', , state] = line.trim().split(/\s+/);
    return state === TCP_LISTEN && local.endsWith(suffix);
  });
}

function tables(pid: number): string {
  return ['tcp', 'tcp6']
    .map((name) => {
      try {
        return readFileSync(`/proc/${pid}/net/${name}`, 'latin1');
      } catch {
        return ''; // It has ended, or the kernel is without IPv6.
      }
    })
    .join('\n');
}

/** Number in a file that another process is about to write; undefined until it has. */
function pidIn(file: string): number | undefined {
  try {
    return Number(readFileSync(file, 'utf8').trim()) || undefined;
  } catch {
    return undefined;
  }
}

export interface Watched {
  /** `ctr task start`: prints what the container prints, ends when it ends with its status. */
  readonly child: ChildProcess;
  /** File that will hold the pid of the container's first process. */
  readonly pidFile: string;
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
}

/**
 * Waits until the container is ready and answers when that was, as performance.now().
 * Errors: UNAVAILABLE with its output when it ends before (or, for "exit", with a status other than 0), DEADLINE.
 */
export async function waitReady(ready: Ready, watched: Watched): Promise<number> {
  const { child } = watched;
  const giveUp = new AbortController();
  let output = '';
  try {
    return await new Promise<number>((resolve, reject) => {
      const pattern = ready.kind === 'line' ? new RegExp(ready.pattern) : undefined;
      const timer = setTimeout(
        () =>
          reject(new DedupError('DEADLINE', `not ready after ${watched.timeoutMs / 1000} s; it printed: ${output}`)),
        watched.timeoutMs,
      );
      giveUp.signal.addEventListener('abort', () => clearTimeout(timer));
      watched.signal?.addEventListener('abort', () => reject(new DedupError('CANCELLED', 'interrupted')), {
        signal: giveUp.signal,
      });
      for (const stream of [child.stdout, child.stderr]) {
        // Each stream has lines of its own.
        let rest = '';
        stream?.on('data', (data: Buffer) => {
          const now = performance.now();
          output = (output + data.toString()).slice(-KEPT_OUTPUT_CHARS);
          const lines = (rest + data.toString()).split('\n');
          // A prompt without a newline is a line too.
          if (pattern !== undefined && lines.some((line) => pattern.test(line))) resolve(now);
          rest = lines.at(-1) ?? '';
        });
      }
      child.once('error', reject);
      let endedMs: number | undefined;
      child.once('exit', () => {
        endedMs = performance.now();
      });
      // "close" comes after all output has: a line printed last still counts.
      child.once('close', (code) => {
        if (ready.kind === 'exit' && code === 0) resolve(endedMs ?? performance.now());
        else reject(new DedupError('UNAVAILABLE', `the container ended with ${code} before it was ready: ${output}`));
      });
      if (ready.kind === 'port') pollPort(ready.port, watched.pidFile, giveUp.signal).then(resolve, reject);
    });
  } finally {
    giveUp.abort();
  }
}

async function pollPort(port: number, pidFile: string, signal: AbortSignal): Promise<number> {
  let pid: number | undefined;
  while (!signal.aborted) {
    pid ??= pidIn(pidFile);
    if (pid !== undefined && listensOn(tables(pid), port)) return performance.now();
    await sleep(POLL_MS);
  }
  throw new DedupError('CANCELLED', 'nobody waits any more');
}
