// The lock of a root: who was killed and waits for its own FUSE session is helped to end, by nothing but what belongs to
// it; who lives is left alone, however slow. Real processes, sessions and loop devices.
import assert from 'node:assert/strict';
import { closeSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, it } from 'node:test';
import { type DedupError, errorCode } from '../../src/errors.ts';
import { lockRoot } from '../../src/fs/root-lock.ts';
import { createLogger } from '../../src/log.ts';
import { mountsBelow } from '../support/containerd.ts';
import { HungHolder, type Wait } from '../support/hung-holder.ts';

const limit = { timeout: 60_000 };
const log = createLogger('test', { level: 'error', fd: 2 });

describe('the lock of a root', () => {
  let dir: string;
  const holders: HungHolder[] = [];

  async function holder(name: string, wait: Wait = 'read'): Promise<HungHolder> {
    const [root, runDir] = [join(dir, name, 'root'), join(dir, name, 'run')];
    await mkdir(root, { recursive: true });
    await mkdir(runDir, { recursive: true });
    const started = await HungHolder.start({ root, runDir, wait });
    holders.push(started);
    return started;
  }

  /** Takes the lock as a dedupd does that starts, and lets it go; milliseconds. */
  async function lock({ paths, run }: HungHolder): Promise<number> {
    const begun = performance.now();
    closeSync(await lockRoot(paths, run, log));
    return performance.now() - begun;
  }

  async function assertLeftAlone(living: HungHolder): Promise<void> {
    const begun = performance.now();
    await assert.rejects(lock(living), (error) => {
      assert.match((error as DedupError).message, /another dedupd serves/);
      return errorCode(error) === 'LOCKED';
    });
    assert.ok(performance.now() - begun < 1_000, 'it is said at once');
  }

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'root-lock-'));
  });
  afterEach(async () => {
    for (const started of holders.splice(0)) await started.close();
  });
  after(() => rm(dir, { recursive: true, force: true }));

  for (const wait of ['read', 'mount', 'change'] as const) {
    it(`is had from a killed holder that waits for itself (${wait}), after a second`, limit, async () => {
      const hung = await holder(`hung-${wait}`, wait);
      await hung.hang();
      const ms = await lock(hung);
      await hung.ended();
      assert.ok(ms > 1_000 && ms < 5_000, `${ms} ms`);
      assert.deepEqual(mountsBelow(hung.runDir), []);
    });
  }

  it(
    'is had from a holder that is killed and ends by itself, without its being said that another one serves',
    limit,
    async () => {
      const killed = await holder('answered');
      await killed.answer();
      killed.signal('SIGKILL');
      assert.ok((await lock(killed)) < 2_000);
    },
  );

  it('stays with a holder that lives and waits for itself, whose session goes on', limit, async () => {
    const living = await holder('living');
    await assertLeftAlone(living);
    assert.equal(await living.answer(), 'bytes');
  });

  it('stays with a holder that is stopped, whose session goes on', limit, async () => {
    const stopped = await holder('stopped');
    stopped.signal('SIGSTOP');
    // As long as one that was killed would get.
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    await assertLeftAlone(stopped);
    stopped.signal('SIGCONT');
    assert.equal(await stopped.answer(), 'bytes');
  });

  it('of one root is had without touching the sessions of others, living, stopped or hung', limit, async () => {
    const hung = await holder('ours');
    const living = await holder('theirs-living');
    const stopped = await holder('theirs-stopped');
    const theirs = await holder('theirs-hung');
    stopped.signal('SIGSTOP');
    await Promise.all([hung.hang(), theirs.hang()]);
    await lock(hung);
    await hung.ended();
    assert.ok(theirs.hangs());
    assert.equal(await living.answer(), 'bytes');
    stopped.signal('SIGCONT');
    assert.equal(await stopped.answer(), 'bytes');
    await lock(theirs);
    await theirs.ended();
  });
});
