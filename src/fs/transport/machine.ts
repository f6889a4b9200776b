// What this kernel and machine offer to the lazy path, read once. Facts only: select.ts decides, doctor shows.
import { execFileSync } from 'node:child_process';
import { accessSync, constants, readFileSync } from 'node:fs';
import { release } from 'node:os';
import { isRoot } from '../../runtime.ts';

export interface Machine {
  readonly kernel: string;
  /** Major and minor version of the kernel. */
  readonly version: readonly [number, number];
  readonly pageBytes: number;
  readonly root: boolean;
  readonly erofs: boolean;
  readonly overlay: boolean;
  readonly fuseDevice: boolean;
  readonly loopControl: boolean;
}

/** AT_PAGESZ (include/uapi/linux/auxvec.h). */
const AT_PAGESZ = 6n;

function pageBytes(): number {
  const auxv = readFileSync('/proc/self/auxv');
  for (let at = 0; at + 16 <= auxv.length; at += 16) {
    if (auxv.readBigUInt64LE(at) === AT_PAGESZ) return Number(auxv.readBigUInt64LE(at + 8));
  }
  return 4096;
}

function writable(path: string): boolean {
  try {
    accessSync(path, constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
}

function hasFilesystem(name: string): boolean {
  const listed = (): boolean => new RegExp(`\\t${name}$`, 'm').test(readFileSync('/proc/filesystems', 'utf8'));
  if (listed()) return true;
  try {
    execFileSync('modprobe', [name], { stdio: 'ignore', timeout: 10_000 });
  } catch {
    // No such module, or nothing to load modules with: the list decides.
  }
  return listed();
}

/** Major and minor number of a version such as "6.18.44-generic". */
export function majorMinor(text: string): readonly [number, number] {
  const match = /^(\d+)\.(\d+)/.exec(text);
  return [Number(match?.[1] ?? 0), Number(match?.[2] ?? 0)];
}

export function atLeast(version: readonly [number, number], major: number, minor: number): boolean {
  return version[0] > major || (version[0] === major && version[1] >= minor);
}

/** Reads the facts; loads the erofs module when that is all that is missing. */
export function inspectMachine(): Machine {
  const kernel = release();
  return {
    kernel,
    version: majorMinor(kernel),
    pageBytes: pageBytes(),
    root: isRoot(),
    erofs: hasFilesystem('erofs'),
    overlay: hasFilesystem('overlay'),
    fuseDevice: writable('/dev/fuse'),
    loopControl: writable('/dev/loop-control'),
  };
}
