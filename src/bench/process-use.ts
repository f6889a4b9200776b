// What processes consume, read from proc(5): CPU seconds, memory, bytes written, and which process serves a socket.
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import type { ProcessUse } from './result.ts';

/** A process whose consumption is reported, under a name for people. */
export interface Daemon {
  readonly name: string;
  readonly pid: number;
}

/** USER_HZ: fixed in the kernel's interface (proc(5), stat). */
const TICKS_PER_SECOND = 100;

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return ''; // The process has ended, or the kernel lacks the file.
  }
}

/** Fields of proc(5) stat from the third on: the second may hold anything. */
function statFields(pid: number | 'self'): string[] {
  const text = read(`/proc/${pid}/stat`);
  return text.slice(text.lastIndexOf(')') + 2).split(' ');
}

/** User and system time of a process and, unless told otherwise, of its children that have ended, seconds. */
export function cpuSeconds(pid: number, options: { readonly children?: boolean } = {}): number {
  const fields = statFields(pid);
  const columns = options.children === false ? [11, 12] : [11, 12, 13, 14];
  return columns.reduce((sum, at) => sum + Number(fields[at] ?? 0), 0) / TICKS_PER_SECOND;
}

/** User and system time of this process's children that have ended, seconds. */
export function endedChildrenSeconds(): number {
  const fields = statFields('self');
  return (Number(fields[13] ?? 0) + Number(fields[14] ?? 0)) / TICKS_PER_SECOND;
}

/** Proportional set size, bytes; 0 when the process is gone. */
export function pssBytes(pid: number): number {
  return Number(/^Pss:\s+(\d+) kB/m.exec(read(`/proc/${pid}/smaps_rollup`))?.[1] ?? 0) * 1024;
}

/** Bytes the process and its ended children caused to be written to disks. */
export function writtenBytes(pid: number | 'self'): number {
  return Number(/^write_bytes: (\d+)/m.exec(read(`/proc/${pid}/io`))?.[1] ?? 0);
}

/** SCHED_IDLE of sched(7): runs when nobody else wants the processor. */
const POLICY_IDLE = '5';

/** User and system time of the process's living threads of the policy SCHED_IDLE, seconds. */
export function idleThreadSeconds(pid: number): number {
  let tasks: string[];
  try {
    tasks = readdirSync(`/proc/${pid}/task`);
  } catch {
    return 0; // It has ended.
  }
  let ticks = 0;
  for (const task of tasks) {
    const text = read(`/proc/${pid}/task/${task}/stat`);
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
    if (fields[38] === POLICY_IDLE) ticks += Number(fields[11]) + Number(fields[12]);
  }
  return ticks / TICKS_PER_SECOND;
}

function children(pid: number): number[] {
  const found: number[] = [];
  let tasks: string[];
  try {
    tasks = readdirSync(`/proc/${pid}/task`);
  } catch {
    return [];
  }
  for (const task of tasks)
    found.push(...read(`/proc/${pid}/task/${task}/children`).split(' ').filter(Boolean).map(Number));
  return found;
}

/** The process and its living descendants, without those that are reported under a name of their own. */
function family(pid: number, others: ReadonlySet<number>): number[] {
  const found = [pid];
  for (let at = 0; at < found.length; at++) {
    for (const child of children(found[at]!)) if (!others.has(child)) found.push(child);
  }
  return found;
}

interface Reading {
  readonly cpuSeconds: number;
  readonly idleSeconds: number;
  readonly writtenBytes: number;
}

/** Reads counters at the beginning; `use` answers what was consumed since. */
export class ProcessMeter {
  readonly #daemons: readonly Daemon[];
  readonly #before = new Map<number, Reading>();
  readonly #childrenSeconds: number;

  constructor(daemons: readonly Daemon[]) {
    this.#daemons = daemons;
    for (const { pid } of daemons) this.#before.set(pid, this.#reading(pid));
    this.#childrenSeconds = endedChildrenSeconds();
  }

  #reading(pid: number): Reading {
    const others = new Set(this.#daemons.map((daemon) => daemon.pid).filter((other) => other !== pid));
    let [cpu, idle, written] = [0, 0, 0];
    for (const member of family(pid, others)) {
      cpu += cpuSeconds(member);
      idle += idleThreadSeconds(member);
      written += writtenBytes(member);
    }
    return { cpuSeconds: cpu, idleSeconds: idle, writtenBytes: written };
  }

  /** Consumption since the constructor, memory now; "commands" is what this process ran (ctr, pull commands). */
  use(): ProcessUse[] {
    const result: ProcessUse[] = this.#daemons.map(({ name, pid }) => {
      const before = this.#before.get(pid);
      const now = this.#reading(pid);
      return {
        name,
        cpuSeconds: Math.max(0, now.cpuSeconds - (before?.cpuSeconds ?? 0)),
        idleCpuSeconds: Math.max(0, now.idleSeconds - (before?.idleSeconds ?? 0)),
        pssBytes: pssBytes(pid),
        writtenBytes: Math.max(0, now.writtenBytes - (before?.writtenBytes ?? 0)),
      };
    });
    const commands = endedChildrenSeconds() - this.#childrenSeconds;
    return [...result, { name: 'commands', cpuSeconds: commands, pssBytes: 0, writtenBytes: 0 }];
  }
}

/**
 * The process that listens on a unix socket, in any network namespace; undefined when nobody does. Sources: proc(5),
 * net/unix (flag 10000 is a listener) and the descriptors of all processes.
 */
export function socketOwner(path: string): number | undefined {
  const pids = readdirSync('/proc').filter((name) => /^\d+$/.test(name));
  const inodes = new Map<string, string | undefined>();
  for (const pid of pids) {
    try {
      const network = readlinkSync(`/proc/${pid}/ns/net`);
      if (!inodes.has(network)) inodes.set(network, listenerInode(read(`/proc/${pid}/net/unix`), path));
      const inode = inodes.get(network);
      if (inode === undefined) continue;
      for (const fd of readdirSync(`/proc/${pid}/fd`)) {
        if (readlinkSync(`/proc/${pid}/fd/${fd}`) === `socket:[${inode}]`) return Number(pid);
      }
    } catch {
      // The process has ended meanwhile.
    }
  }
  return undefined;
}

function listenerInode(table: string, path: string): string | undefined {
  for (const line of table.split('\n')) {
    const [, , , flags, , , inode, name] = line.trim().split(/\s+/);
    if (name === path && (Number.parseInt(flags ?? '0', 16) & 0x10000) !== 0) return inode;
  }
  return undefined;
}
