// Compiles the link's process once for each state of its sources. Used by link.ts.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rename } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from '../containerd.ts';
import { testCacheDir } from '../images.ts';

const NATIVE = join(import.meta.dirname, '..', '..', '..', 'native');
const FLAGS = ['-std=c++20', '-O2', '-Wall', '-Wextra', '-Werror', '-D_GNU_SOURCE', `-I${NATIVE}`];

/** Path of the program, in the cache of the tests. Errors: the compiler's own words. */
export async function linkProgram(): Promise<string> {
  const names = (await readdir(import.meta.dirname)).filter((name) => /\.(cc|h)$/.test(name)).sort();
  const files = [...names.map((name) => join(import.meta.dirname, name)), join(NATIVE, 'owned_fd.h')];
  const state = createHash('sha256').update(FLAGS.join(' '));
  for (const file of files) state.update(await readFile(file));
  const dir = join(await testCacheDir(), 'link');
  const program = join(dir, `link-${state.digest('hex').slice(0, 16)}`);
  if (existsSync(program)) return program;
  await mkdir(dir, { recursive: true });
  // Made beside and renamed: two test files may do this at once.
  const fresh = `${program}.${process.pid}`;
  const sources = files.filter((file) => file.endsWith('.cc'));
  await run('g++', [...FLAGS, '-o', fresh, ...sources], { timeoutMs: 120_000 });
  await rename(fresh, program);
  return program;
}
