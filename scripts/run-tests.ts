// Runs every test and prints one closing line. Unit tests run side by side, those with kernel mounts and daemons one
// after the other. In CI a skipped test is a failure: everything a test can miss is installed there.
//   node scripts/run-tests.ts [PATH-PART…]
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { run } from 'node:test';
import { spec } from 'node:test/reporters';

const root = join(import.meta.dirname, '..');
const wanted = process.argv.slice(2);

function testFiles(dir: string): string[] {
  return readdirSync(join(root, dir), { recursive: true, encoding: 'utf8' })
    .map((name) => join(dir, name))
    .filter((name) => name.endsWith('.test.ts'))
    .filter((name) => wanted.length === 0 || wanted.some((part) => name.includes(part)))
    .sort();
}

/** Folders whose tests own kernel state (mounts, loop devices, containerd) or measure, and must not overlap. */
const ALONE = [
  'test/integration/',
  'test/native/',
  'test/cli/',
  'test/snapshotter/',
  'test/gate/',
  'test/conformance/',
];

interface Totals {
  passed: number;
  failed: number;
  skipped: string[];
}

async function runFiles(files: string[], concurrency: number, totals: Totals): Promise<void> {
  if (files.length === 0) return;
  const stream = run({ files: files.map((file) => join(root, file)), concurrency, timeout: 600_000 });
  stream.on('test:pass', (event) => {
    if (event.details.type === 'suite') return;
    if (event.skip !== undefined && event.skip !== false) totals.skipped.push(`${event.name} (${event.skip})`);
    else totals.passed++;
  });
  stream.on('test:fail', (event) => {
    if (event.details.type !== 'suite') totals.failed++;
  });
  const reporter = stream.compose(spec());
  for await (const chunk of reporter) process.stdout.write(chunk as string);
}

const totals: Totals = { passed: 0, failed: 0, skipped: [] };
const all = testFiles('test');
const alone = all.filter((file) => ALONE.some((dir) => file.startsWith(dir)));
await runFiles(
  all.filter((file) => !alone.includes(file)),
  2,
  totals,
);
await runFiles(alone, 1, totals);

for (const skipped of totals.skipped) console.log(`skipped: ${skipped}`);
let failed = totals.failed;
if (process.env.CI === 'true' && totals.skipped.length > 0) {
  console.log('a test was skipped although this is CI, where everything it needs is installed');
  failed += totals.skipped.length;
}
if (totals.passed + failed === 0) {
  console.log('no test ran');
  process.exitCode = 1;
}
if (failed > 0) process.exitCode = 1;
console.log(`${totals.passed} passed, ${failed} failed, ${totals.skipped.length} skipped`);
