// Reads files one after the other in a process of its own, so that a read that waits never holds the gate's event loop,
// through which the bytes come. Both the parent's function and the child's program.
import { fork } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, constants, openSync, readSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { native } from '../../src/fs/native.ts';
import { KiB, MiB, roundUp } from '../../src/units.ts';

export interface SerialRead {
  readonly path: string;
  /** Multiple of 4096. */
  readonly offset: number;
  /** Bytes; a read ends with the file. */
  readonly length: number;
}

export interface ReadResult {
  readonly bytes: number;
  /** SHA-256 of all bytes in the order of the reads, hex. */
  readonly sha256: string;
}

/** Direct reads bypass the page cache and readahead: each is one read of the device. The others are as a program's. */
export type ReadMode = 'direct' | 'buffered';

const TIMEOUT_MS = 120_000;
const BLOCK = 4096;
/** What one system call asks for. */
const STEP_BYTES = 128 * KiB;

/** Errors: the child's, as a message; a read that does not come back ends the child. */
export async function readSerially(reads: readonly SerialRead[], mode: ReadMode): Promise<ReadResult> {
  const child = fork(fileURLToPath(import.meta.url), ['child'], { timeout: TIMEOUT_MS, killSignal: 'SIGKILL' });
  const ended = once(child, 'exit');
  const answered = once(child, 'message');
  child.send({ reads, mode });
  const first = await Promise.race([
    answered.then(([message]) => message as ReadResult | { error: string }),
    ended.then(([code, signal]) => ({ error: `the reader ended with ${code ?? signal}` })),
  ]);
  child.disconnect();
  await ended;
  if ('error' in first) throw new Error(first.error);
  return first;
}

function readAll(reads: readonly SerialRead[], mode: ReadMode): ReadResult {
  const hash = createHash('sha256');
  const buffer = native().alignedBuffer(MiB);
  let bytes = 0;
  for (const { path, offset, length } of reads) {
    const fd = openSync(path, mode === 'direct' ? constants.O_RDONLY | constants.O_DIRECT : constants.O_RDONLY);
    try {
      for (let at = 0; at < length; ) {
        const wanted = Math.min(STEP_BYTES, length - at);
        const read = readSync(fd, buffer, 0, mode === 'direct' ? roundUp(wanted, BLOCK) : wanted, offset + at);
        if (read === 0) break;
        hash.update(buffer.subarray(0, Math.min(read, wanted)));
        bytes += Math.min(read, wanted);
        at += read;
      }
    } finally {
      closeSync(fd);
    }
  }
  return { bytes, sha256: hash.digest('hex') };
}

if (process.argv[2] === 'child' && process.argv[1] === fileURLToPath(import.meta.url)) {
  process.once('message', ({ reads, mode }: { reads: SerialRead[]; mode: ReadMode }) => {
    let answer: ReadResult | { error: string };
    try {
      answer = readAll(reads, mode);
    } catch (error) {
      answer = { error: error instanceof Error ? error.message : String(error) };
    }
    process.send?.(answer);
  });
  process.once('disconnect', () => process.exit(0));
}
