// Reads block devices with O_DIRECT from a process of its own, so that a stalled read never holds the test's event loop
// or thread pool. The file is both: the parent's handle (`startDirectReader`) and the child's program.
import { type ChildProcess, fork } from 'node:child_process';
import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { open } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { native } from '../../src/fs/native.ts';

export interface DirectRead {
  readonly path: string;
  readonly offset: number;
  readonly length: number;
}

export interface DirectResult {
  /** SHA-256 of the bytes, hex; absent when the read failed. */
  readonly sha256?: string;
  readonly bytesRead: number;
  /** errno name when the read failed. */
  readonly code?: string;
  readonly ms: number;
}

export interface DirectReader {
  /** One read; reads of one reader run in parallel. */
  read(read: DirectRead): Promise<DirectResult>;
  /** Reads in turn, in the child, without a round trip in between. */
  sequence(reads: readonly DirectRead[]): Promise<DirectResult[]>;
  close(): Promise<void>;
}

interface Call {
  readonly id: number;
  readonly reads: readonly DirectRead[];
}

export async function startDirectReader(options: { threads?: number; timeoutMs?: number } = {}): Promise<DirectReader> {
  const timeoutMs = options.timeoutMs ?? 20_000;
  const child: ChildProcess = fork(fileURLToPath(import.meta.url), ['child'], {
    env: { ...process.env, UV_THREADPOOL_SIZE: String(options.threads ?? 32) },
  });
  const waiting = new Map<number, { resolve: (results: DirectResult[]) => void; reject: (error: Error) => void }>();
  let next = 1;
  let exited = false;
  await new Promise<void>((resolve, reject) => {
    child.once('message', () => resolve());
    child.once('error', reject);
    child.once('exit', (code) => reject(new Error(`direct reader ended with ${code}`)));
  });
  child.on('message', (message: { id: number; results: DirectResult[] }) => {
    waiting.get(message.id)?.resolve(message.results);
    waiting.delete(message.id);
  });
  const gone = new Promise<void>((resolve) => {
    child.once('exit', () => {
      exited = true;
      for (const entry of waiting.values()) entry.reject(new Error('the direct reader ended'));
      waiting.clear();
      resolve();
    });
  });
  const sequence = (reads: readonly DirectRead[]): Promise<DirectResult[]> => {
    const id = next++;
    let timer: NodeJS.Timeout | undefined;
    return new Promise<DirectResult[]>((resolve, reject) => {
      waiting.set(id, { resolve, reject });
      timer = setTimeout(() => reject(new Error(`direct read did not return within ${timeoutMs} ms`)), timeoutMs);
      child.send({ id, reads } satisfies Call);
    }).finally(() => clearTimeout(timer));
  };
  return {
    sequence,
    read: async (read) => (await sequence([read]))[0]!,
    close: async () => {
      if (!exited) child.kill('SIGKILL');
      await Promise.race([gone, new Promise((resolve) => setTimeout(resolve, 5_000))]);
    },
  };
}

async function perform(read: DirectRead): Promise<DirectResult> {
  const buffer = native().alignedBuffer(read.length);
  const file = await open(read.path, constants.O_RDONLY | constants.O_DIRECT);
  const start = performance.now();
  try {
    const { bytesRead } = await file.read(buffer, 0, read.length, read.offset);
    const ms = performance.now() - start;
    return { sha256: createHash('sha256').update(buffer.subarray(0, bytesRead)).digest('hex'), bytesRead, ms };
  } catch (error) {
    return {
      bytesRead: -1,
      code: (error as NodeJS.ErrnoException).code ?? String(error),
      ms: performance.now() - start,
    };
  } finally {
    await file.close();
  }
}

async function serve(call: Call): Promise<void> {
  const results: DirectResult[] = [];
  for (const read of call.reads) results.push(await perform(read));
  process.send?.({ id: call.id, results });
}

if (process.argv[2] === 'child' && process.argv[1] === fileURLToPath(import.meta.url)) {
  process.on('message', (call: Call) => void serve(call));
  process.on('disconnect', () => process.exit(0));
  process.send?.('ready');
}
