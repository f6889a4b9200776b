// Who holds a lock, as the kernel tells it: the process, whether it is beyond return, and the FUSE connections that it
// serves. Reads text below /proc only: no path is looked up in a file system that the holder may be serving, which could
// wait for it. Called by root-lock.ts.
import { fstatSync } from 'node:fs';
import { readdir, readFile, readlink } from 'node:fs/promises';
import { join } from 'node:path';
import { majorOf, minorOf } from '../device-number.ts';
import { parseMountinfo } from '../mountinfo.ts';

export interface LockHolder {
  readonly pid: number;
  /** In clock ticks since the machine's start: another process with this number has another one. */
  readonly startTime: string;
  /** No thread of it will run its own code again, whatever happens: it was killed, and waits in the kernel at most. */
  readonly ending: boolean;
  /** FUSE connections that it serves, by their marks (native/fuse/mark.h); of one that is ending, else empty. */
  readonly connections: readonly number[];
}

/** fs/locks.c, lock_get_status: as in /proc/locks and, for the locks of a descriptor, in its fdinfo. */
const FLOCK = /^(?:lock:\t)?\d+: FLOCK +ADVISORY +WRITE +(\d+) ([0-9a-f]+:[0-9a-f]+:\d+) /gm;

const MARK = /^\/memfd:dedup-fuse-connection-(\d+)( |$)/;

/** include/linux/sched.h. */
const PF_EXITING = 0x4;
const PF_DUMPCORE = 0x200;
/** Bit of SIGKILL in the masks of /proc/PID/status: it can be neither blocked nor taken back. */
const SIGKILL_BIT = 1n << 8n;

/** Errors of a process or thread that has ended while it was looked at. */
const GONE = ['ENOENT', 'ESRCH', 'EINVAL'];

async function orGone<T>(reading: Promise<T>): Promise<T | undefined> {
  try {
    return await reading;
  } catch (error) {
    if (GONE.includes((error as NodeJS.ErrnoException).code ?? '')) return undefined;
    throw error;
  }
}

/**
 * Who holds the exclusive flock(2) on an open file; undefined when nobody does, or when it cannot be seen from here (another
 * PID namespace). Errors: those of node:fs.
 */
export async function lockHolder(fd: number): Promise<LockHolder | undefined> {
  const names = await lockNames(fd);
  for (const [, pid, name] of (await readFile('/proc/locks', 'utf8')).matchAll(FLOCK)) {
    if (!names.has(name!)) continue;
    const tasks = await tasksOf(Number(pid));
    const leader = tasks.find(({ tid }) => tid === pid);
    if (leader === undefined) return undefined;
    const ending = tasks.every((task) => task.ending);
    const connections = ending ? await connectionsOf(Number(pid), tasks, names) : [];
    return { pid: Number(pid), startTime: leader.startTime, ending, connections };
  }
  return undefined;
}

/** What an open file is called in the kernel's lists of locks. */
async function lockNames(fd: number): Promise<ReadonlySet<string>> {
  const { dev, ino } = fstatSync(fd, { bigint: true });
  const devices = [[majorOf(dev), minorOf(dev)]];
  // Where stat(2) tells of subvolumes (btrfs), the lists of locks and of mounts tell of the whole file system.
  const mountId = /^mnt_id:\s*(\d+)/m.exec(await readFile(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1];
  const mount = parseMountinfo(await readFile('/proc/self/mountinfo', 'utf8')).find(({ id }) => id === mountId);
  if (mount !== undefined) devices.push(mount.device.split(':').map(Number));
  const hex = (number: number): string => number.toString(16).padStart(2, '0');
  return new Set(devices.map((numbers) => `${numbers.map(hex).join(':')}:${ino}`));
}

interface Task {
  readonly tid: string;
  readonly startTime: string;
  readonly ending: boolean;
  /** It has given up what it had open. */
  readonly dead: boolean;
}

/** The threads of a process; none when it has ended. */
async function tasksOf(pid: number): Promise<Task[]> {
  const tasks: Task[] = [];
  for (const tid of (await orGone(readdir(`/proc/${pid}/task`))) ?? []) {
    const dir = `/proc/${pid}/task/${tid}`;
    const stat = await orGone(readFile(join(dir, 'stat'), 'utf8'));
    const status = await orGone(readFile(join(dir, 'status'), 'utf8'));
    if (stat === undefined || status === undefined) continue;
    // After the name, which may hold anything: state, …, flags as field 9, start time as field 22 (proc(5)).
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const dead = fields[0] === 'Z' || fields[0] === 'X';
    const beyondReturn = (Number(fields[6]) & (PF_EXITING | PF_DUMPCORE)) !== 0;
    const pending = [...status.matchAll(/^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)/gm)].map(([, mask]) => BigInt(`0x${mask}`));
    const killed = pending.some((mask) => (mask & SIGKILL_BIT) !== 0n);
    tasks.push({ tid, startTime: fields[19] ?? '', ending: dead || beyondReturn || killed, dead });
  }
  return tasks;
}

/** Connections of a process that has the locked file open itself. Its threads share what is open. */
async function connectionsOf(pid: number, tasks: readonly Task[], names: ReadonlySet<string>): Promise<number[]> {
  for (const { tid, dead } of tasks) {
    if (dead) continue;
    const dir = `/proc/${pid}/task/${tid}`;
    const connections: number[] = [];
    let locked = false;
    for (const fd of (await orGone(readdir(join(dir, 'fd')))) ?? []) {
      const link = (await orGone(readlink(join(dir, 'fd', fd)))) ?? '';
      const mark = MARK.exec(link)?.[1];
      if (mark !== undefined) connections.push(Number(mark));
      const info = (await orGone(readFile(join(dir, 'fdinfo', fd), 'utf8'))) ?? '';
      for (const [, owner, name] of info.matchAll(FLOCK)) if (Number(owner) === pid && names.has(name!)) locked = true;
    }
    if (locked) return connections;
  }
  return [];
}
