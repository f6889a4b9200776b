// Checks of the process itself, made before anything native is loaded: the Node.js version and root. This file and what
// it imports must run on any Node.js that can parse it.

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
