// Checks of the process itself, made before anything native is loaded: the Node.js version and root. This file and what
// it imports must run on any Node.js that can parse it.

import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/** Oldest Node.js that all dependencies work on; better-sqlite3 crashes without a word on Node 20. */
const MINIMUM: readonly [number, number] = [22, 19];

/** Ends the process with one clear line and status 1 when this Node.js is too old. */
export function requireSupportedNode(program: string): void {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  if (major > MINIMUM[0] || (major === MINIMUM[0] && minor >= MINIMUM[1])) return;
  process.stderr.write(
    `${program}: needs Node.js ${MINIMUM.join('.')} or later, this is ${process.versions.node}; ` +
      'start it through bin/ (which brings its own) or set NODE=\n',
  );
  process.exit(1);
}

/** Least limit of open files; some 50 are open at rest, and each connection takes one (docs/measurements.md). */
const MINIMUM_FILES = 1024;

/**
 * Ends the process with one clear line and status 1 when it may open too few files. Node.js itself raises the soft limit
 * to the hard one before anything of ours runs (node::PlatformInit), so only a low hard limit is in the way.
 */
export function requireOpenFiles(program: string): void {
  // proc(5), limits: name, soft limit, hard limit, unit.
  const soft = /^Max open files\s+(\d+|unlimited)/m.exec(readFileSync('/proc/self/limits', 'utf8'))?.[1];
  if (soft === undefined || soft === 'unlimited' || Number(soft) >= MINIMUM_FILES) return;
  process.stderr.write(
    `${program}: may open only ${soft} files, needs ${MINIMUM_FILES}; raise the hard limit ` +
      '(LimitNOFILE= of its systemd unit, or `ulimit -Hn` before it is started)\n',
  );
  process.exit(1);
}

/** True when this process may mount and attach devices. */
export function isRoot(): boolean {
  return process.getuid?.() === 0;
}

/**
 * Keeps compiled code between starts, beside the program: a verb of the command line starts in half the time. Does
 * nothing where that directory cannot be written.
 */
export async function keepCompiledCode(): Promise<void> {
  const { enableCompileCache } = await import('node:module');
  enableCompileCache(fileURLToPath(new URL('../.compile-cache', import.meta.url)));
}
