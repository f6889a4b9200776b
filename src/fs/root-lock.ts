// The lock by which there is one dedupd per root, and what is done about a holder that was killed and cannot end: a thread
// of it waits in the kernel for its own FUSE session, and the session ends only with the process. Nobody else can break
// that circle (docs/decisions/0027-hung-holders.md). Called by daemon.ts.
import { closeSync, fstatSync, openSync, statSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { DedupError, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { RootPaths, RunPaths } from '../paths.ts';
import { type LockHolder, lockHolder } from './lock-holder.ts';
import { native } from './native.ts';
import { abortConnection } from './transport/connections.ts';

/** How long a killed holder may take to end by itself; a large one needs some hundred milliseconds. */
const ENDS_MS = 1_000;
/** How long it is waited for altogether: less than what the service waits for a start. */
const GIVE_UP_MS = 10_000;
const POLL_MS = 50;

/**
 * Locks the root for the life of the process; waits for a holder that was killed, and helps it to end. The caller closes the
 * descriptor. Errors: LOCKED.
 */
export async function lockRoot(paths: RootPaths, run: RunPaths, log: Logger): Promise<number> {
  await mkdir(paths.root, { recursive: true, mode: 0o700 });
  const fd = openSync(paths.lock, 'a', 0o600);
  try {
    if (native().flock(fd)) return fd;
    await outlastKilled(fd, paths, run, log);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** True as long as the file that was locked is the one below the root: an emptied root has none, or another one. */
export function isStillLocked(paths: RootPaths, lock: number): boolean {
  const found = statSync(paths.lock, { throwIfNoEntry: false });
  const held = fstatSync(lock);
  return found !== undefined && found.ino === held.ino && found.dev === held.dev;
}

/** Returns once the lock is taken from a holder that was killed. Errors: LOCKED, at once when the holder lives. */
async function outlastKilled(fd: number, paths: RootPaths, run: RunPaths, log: Logger): Promise<void> {
  const begun = performance.now();
  const aborted = new Set<number>();
  let first: LockHolder | undefined;
  let since = begun;
  for (;;) {
    const holder = await lookAtHolder(fd, paths);
    if (native().flock(fd)) break;
    if (holder?.ending !== true)
      throw new DedupError('LOCKED', `another dedupd serves ${paths.root}`, { hint: 'one dedupd per root' });
    if (first?.pid !== holder.pid || first.startTime !== holder.startTime) {
      first = holder;
      since = performance.now();
    }
    if (performance.now() - since > ENDS_MS) await abortAll(holder, () => lookAtHolder(fd, paths), aborted, run, log);
    if (performance.now() - begun > GIVE_UP_MS) throw doesNotEnd(holder, paths);
    await sleep(POLL_MS);
  }
  if (first === undefined) return;
  log.info({ holderPid: first.pid, waitedMs: Math.round(performance.now() - begun) }, 'a killed dedupd has ended');
}

/** As lockHolder. Errors: LOCKED when it cannot be told: it may live. */
async function lookAtHolder(fd: number, paths: RootPaths): Promise<LockHolder | undefined> {
  try {
    return await lockHolder(fd);
  } catch (error) {
    throw new DedupError('LOCKED', `another process serves ${paths.root}, and cannot be looked at`, { cause: error });
  }
}

/** Ends the connections that a killed process serves, each once. Errors: LOCKED, with why it cannot be done. */
async function abortAll(
  holder: LockHolder,
  look: () => Promise<LockHolder | undefined>,
  aborted: Set<number>,
  run: RunPaths,
  log: Logger,
): Promise<void> {
  for (const connection of holder.connections) {
    if (aborted.has(connection)) continue;
    aborted.add(connection);
    const facts = { holderPid: holder.pid, connection };
    try {
      await mkdir(run.dir, { recursive: true, mode: 0o700 });
      const isStill = async (): Promise<boolean> => {
        const now = await look();
        return now?.pid === holder.pid && now.startTime === holder.startTime && now.connections.includes(connection);
      };
      if (!(await abortConnection(connection, run.fuseControl, isStill))) continue;
      log.warn(
        facts,
        'a dedupd that was killed waits for its own FUSE session: the connection was aborted so that it ends',
      );
    } catch (error) {
      const doing = `aborting FUSE connection ${connection} of process ${holder.pid}, which was killed and does not end`;
      throw new DedupError('LOCKED', wrapError(error, doing).message, {
        cause: error,
        hint: `mount -t fusectl none /sys/fs/fuse/connections; echo 1 > /sys/fs/fuse/connections/${connection}/abort`,
      });
    }
  }
}

function doesNotEnd(holder: LockHolder, paths: RootPaths): DedupError {
  return new DedupError(
    'LOCKED',
    `process ${holder.pid}, which serves ${paths.root}, was killed and does not end: it waits in the kernel`,
    { hint: `/proc/${holder.pid}/task/*/stack says for what; a disk that does not answer is one reason` },
  );
}
