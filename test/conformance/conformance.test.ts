// containerd's suite for snapshotters against the service as built. Go program and suite come from Debian packages; its
// verdicts become tests of their own.
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { mountsBelow, run, unmountBelow } from '../support/containerd.ts';
import { PROGRAM } from '../support/product.ts';

/** Subtests of the suite in containerd 1.6. Fewer means that a part of it did not run. */
const SUBTESTS = 21;
/** Skipped by its own first line, whatever is tested ("still fails on some kernels with overlay"). */
const SKIPPED_BY_SUITE = ['Rename'];
const VERDICT = /^\s*--- (PASS|FAIL|SKIP): TestSnapshotter\/(\S+) \(([\d.]+)s\)/gm;

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
    const env = {
      ...process.env,
      // Debian's Go sources, without modules and without a network.
      GO111MODULE: 'off',
      GOPATH: '/usr/share/gocode',
      GOFLAGS: '',
      GOCACHE: join(dir, 'cache'),
      GOTMPDIR: dir,
      TMPDIR: dir,
      DEDUP_PROGRAM: PROGRAM,
    };
    const go = '/usr/bin/go';
    const binary = join(dir, 'suite');
    await run(go, ['test', '-c', '-o', binary, '.'], { cwd: import.meta.dirname, env, timeoutMs: 600_000 });
    const flags = ['-test.v', '-test.root', '-test.parallel', '4', '-test.timeout', '5m'];
    const result = await run(binary, flags, { cwd: dir, env, timeoutMs: 320_000, allowFailure: true });
    const verdicts = [...result.stdout.matchAll(VERDICT)].map(([, verdict, name]) => ({ verdict, name }));
    for (const { verdict, name } of verdicts) t.diagnostic(`${verdict} ${name}`);
    assert.deepEqual(
      verdicts.filter(({ verdict }) => verdict !== 'PASS'),
      SKIPPED_BY_SUITE.map((name) => ({ verdict: 'SKIP', name })),
      result.stdout.slice(-20_000) + result.stderr.slice(-5_000),
    );
    assert.equal(verdicts.length, SUBTESTS, result.stdout.slice(-20_000) + result.stderr.slice(-5_000));
    assert.equal(result.code, 0);
    assert.deepEqual(mountsBelow(dir), []);
  });
});
