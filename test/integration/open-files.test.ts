// The limit of open files that a process is started with: a low soft one is raised, a low hard one is refused with a line
// that says what to do.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { run } from '../support/containerd.ts';
import { PROGRAM, Product } from '../support/product.ts';

describe('the limit of open files', () => {
  test('both processes raise a soft limit of 1024 to the hard one', async () => {
    const product = await Product.create({}, { inside: ['prlimit', '--nofile=1024:8192'] });
    try {
      await product.start();
      for (const pid of [product.servicePid, await product.daemonPid()])
        assert.match(readFileSync(`/proc/${pid}/limits`, 'utf8'), /^Max open files\s+8192\s+8192/m);
    } finally {
      await product.stop();
    }
  });

  for (const name of ['dedup-snapshotter', 'dedupd']) {
    test(`${name} refuses a hard limit that is too low and says what to raise`, async () => {
      const program = join(PROGRAM, '..', name);
      const { code, stderr } = await run('prlimit', ['--nofile=512:512', program], { allowFailure: true });
      assert.equal(code, 1);
      assert.match(
        stderr,
        new RegExp(`^${name}: may open only 512 files, needs 1024; raise the hard limit .*LimitNOFILE`),
      );
    });
  }
});
