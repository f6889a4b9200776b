// `make compat`: the tests that meet containerd, against other versions of it than the installed one. Downloads, needs
// root, is not part of CI. Prints one closing line.
//   node test/compat/compat.ts [--only NAME]…
import { spawn } from 'node:child_process';
import { mkdir } from 'node:fs/promises';
import { delimiter, join } from 'node:path';
import { parseArgs } from 'node:util';
import { debianPrograms, goFolder, modulePrograms, type Programs } from './programs.ts';

const REPOSITORY = join(import.meta.dirname, '..', '..');
const CACHE = join(REPOSITORY, '.cache', 'compat');

/** What is tested, oldest first. Those from modules, and the suite for snapshotters of all, need a Go of their time. */
const RELEASES: readonly ({ readonly name: string } & ({ readonly suite: string } | { readonly module: string }))[] = [
  { name: 'trixie', suite: 'trixie' },
  { name: '2.0', module: 'v2.0' },
  { name: 'sid', suite: 'sid' },
  { name: 'newest', module: 'latest' },
];

const TESTS = [
  'test/integration/clients.test.ts',
  'test/integration/content-search.test.ts',
  'test/integration/rpull-life-cycle.test.ts',
  'test/snapshotter/containerd.test.ts',
  'test/cli/rpull.test.ts',
];
const NEEDS_GO = 'test/conformance/conformance.test.ts';

const say = (text: string) => console.log(`==> ${text}`);

interface Totals {
  passed: number;
  failed: number;
}

/** Runs the tests with the programs in front of PATH. */
async function test(programs: Programs, go: string | undefined): Promise<Totals> {
  const env = go === undefined ? process.env : { ...process.env, COMPAT_GO: join(go, 'go') };
  const path = [programs.dir, process.env.PATH].join(delimiter);
  const files = go === undefined ? TESTS : [...TESTS, NEEDS_GO];
  const child = spawn(process.execPath, [join(REPOSITORY, 'scripts', 'run-tests.ts'), ...files], {
    env: { ...env, PATH: path },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let last = '';
  for await (const chunk of child.stdout.setEncoding('utf8')) {
    process.stdout.write(chunk as string);
    last = (last + (chunk as string)).slice(-1000);
  }
  const [, passed, failed] = /(\d+) passed, (\d+) failed, \d+ skipped\s*$/.exec(last) ?? [];
  // A run without a closing line did not come to its end.
  return passed === undefined ? { passed: 0, failed: 1 } : { passed: Number(passed), failed: Number(failed) };
}

const { values } = parseArgs({ options: { only: { type: 'string', multiple: true } } });
const names = RELEASES.map(({ name }) => name);
for (const name of values.only ?? []) {
  if (!names.includes(name)) throw new Error(`--only ${name}: there are ${names.join(', ')}`);
}
const chosen = RELEASES.filter(({ name }) => values.only?.includes(name) ?? true);
await mkdir(CACHE, { recursive: true });
const go = await goFolder();
if (go === undefined) say('no Go 1.24 or later here: what has to be built or compiled with it is left out');

const totals: Totals = { passed: 0, failed: 0 };
const lines: string[] = [];
for (const release of chosen) {
  let line: string;
  try {
    if ('module' in release && go === undefined) {
      lines.push(`${release.name}: left out, for want of Go`);
      continue;
    }
    const programs =
      'suite' in release
        ? await debianPrograms(release.suite, CACHE, say)
        : await modulePrograms(release.module, go ?? '', CACHE, say);
    say(`testing with containerd ${programs.version} (${release.name})`);
    const { passed, failed } = await test(programs, go);
    totals.passed += passed;
    totals.failed += failed;
    line = `containerd ${programs.version} (${release.name}): ${passed} passed, ${failed} failed`;
  } catch (error) {
    totals.failed++;
    line = `${release.name}: ${error instanceof Error ? error.message : String(error)}`;
  }
  lines.push(line);
}
for (const line of lines) console.log(line);
if (totals.failed > 0 || totals.passed === 0) process.exitCode = 1;
console.log(`${totals.passed} passed, ${totals.failed} failed`);
