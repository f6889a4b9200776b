// containerd's suite for snapshotters against the service as built. Go program and suite come from Debian packages, or for
// another containerd from its Go module (`make compat`); its verdicts become tests of their own.
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { mountsBelow, run, unmountBelow } from '../support/containerd.ts';
import { containerdVersion } from '../support/containerd-version.ts';
import { PROGRAM } from '../support/product.ts';

/** Subtests of the suite in containerd 1.6 to 2.4. Fewer means that a part of it did not run. */
const SUBTESTS = 21;
/** Skipped by its own first line, whatever is tested ("still fails on some kernels with overlay"). */
const SKIPPED_IN_1_6 = ['Rename'];
const VERDICT = /^\s*--- (PASS|FAIL|SKIP): TestSnapshotter\/(\S+) \(([\d.]+)s\)/gm;

/** The Go to fetch and compile the suite of the containerd at hand with; without it, Debian's of 1.6 is taken. */
const go = process.env.COMPAT_GO;

/** With Debian's Go sources, without modules and without a network. */
async function compileDebian(binary: string, env: NodeJS.ProcessEnv): Promise<void> {
  const without = { ...env, GO111MODULE: 'off', GOPATH: '/usr/share/gocode', GOFLAGS: '' };
  await run('/usr/bin/go', ['test', '-c', '-o', binary, '.'], {
    cwd: import.meta.dirname,
    env: without,
    timeoutMs: 600_000,
  });
}

/** The suite of the newest patch of the version at hand. */
async function compileModule(program: string, above: string, binary: string, env: NodeJS.ProcessEnv): Promise<void> {
  // Go takes no notice of a module in the folder for temporary files itself.
  const dir = join(above, 'module');
  await mkdir(dir);
  const [major, minor] = containerdVersion().number;
  const path = 'github.com/containerd/containerd';
  const source = await readFile(join(import.meta.dirname, 'suite_test.go'), 'utf8');
  const text = major === 1 ? source : source.replaceAll(`${path}/snapshots`, `${path}/v2/core/snapshots`);
  await writeFile(join(dir, 'suite_test.go'), text);
  await writeFile(join(dir, 'go.mod'), 'module conformance\n\ngo 1.23\n');
  const modules = { ...env, GO111MODULE: 'on', GOFLAGS: '-mod=mod', GOTOOLCHAIN: 'local' };
  const options = { cwd: dir, env: modules, timeoutMs: 600_000 };
  await run(program, ['get', `${major === 1 ? path : `${path}/v2`}@v${major}.${minor}`], options);
  await run(program, ['test', '-c', '-o', binary, '.'], options);
}

describe("containerd's suite for snapshotters", () => {
  let dir: string;
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'conformance-'));
  });
  after(async () => {
    await unmountBelow(dir);
    await rm(dir, { recursive: true, force: true });
  });

  test(`finds no fault in any of its ${SUBTESTS} subtests, in parallel, and leaves no mount`, {
    timeout: 900_000,
  }, async (t) => {
    const env = { ...process.env, GOCACHE: join(dir, 'cache'), GOTMPDIR: dir, TMPDIR: dir, DEDUP_PROGRAM: PROGRAM };
    const binary = join(dir, 'suite');
    await (go === undefined ? compileDebian(binary, env) : compileModule(go, dir, binary, env));
    const flags = ['-test.v', '-test.root', '-test.parallel', '4', '-test.timeout', '5m'];
    const result = await run(binary, flags, { cwd: dir, env, timeoutMs: 320_000, allowFailure: true });
    const verdicts = [...result.stdout.matchAll(VERDICT)].map(([, verdict, name]) => ({ verdict, name }));
    for (const { verdict, name } of verdicts) t.diagnostic(`${verdict} ${name}`);
    // What it found, apart from the listings it makes of every failure.
    const found = result.stdout.split('\n').filter((line) => /testsuite\.go:\d+: /.test(line));
    const told = `${found.join('\n')}\n${result.stdout.slice(-20_000)}${result.stderr.slice(-5_000)}`;
    assert.deepEqual(
      verdicts.filter(({ verdict }) => verdict !== 'PASS'),
      (go === undefined ? SKIPPED_IN_1_6 : []).map((name) => ({ verdict: 'SKIP', name })),
      told,
    );
    assert.equal(verdicts.length, SUBTESTS, told);
    assert.equal(result.code, 0);
    assert.deepEqual(mountsBelow(dir), []);
  });
});
