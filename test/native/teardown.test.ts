// What happens to kernel requests, mounts and devices when the process or the thread that owns a session just ends.
import assert from 'node:assert/strict';
import { type ChildProcess, fork } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { isMainThread, Worker } from 'node:worker_threads';
import { native } from '../../src/fs/native.ts';
import { type DirectReader, startDirectReader } from '../support/direct-reader.ts';
import { BLOCK, HEAD, STORE, TAIL } from './fuse-fixture.ts';

const limit = { timeout: 30_000 };

/** Child: a session whose misses nobody answers, and a loop device over it; ends in the way it is told. */
async function owner(dir: string, way: string): Promise<void> {
  const storePath = join(dir, 'store');
  closeSync(openSync(storePath, 'w'));
  truncateSync(storePath, STORE);
  const mountDir = join(dir, 'mnt');
  mkdirSync(mountDir);
  const endNow = (): void => {
    if (way === 'exit') process.exit(0);
    if (way === 'kill') process.kill(process.pid, 'SIGKILL');
    // 'throw': the batch of misses is refused with EIO and the exception is uncaught.
    throw new Error('onMiss fails');
  };
  const session = await native().fuseStart({
    mountDir,
    storeFd: openSync(storePath, 'r'),
    sumsFd: openSync('/dev/null', 'r'),
    storeBytes: STORE,
    headBytes: HEAD,
    tailBytes: TAIL,
    presence: native().presenceCreate(STORE),
    threads: 2,
    maxBackground: 64,
    onMiss: endNow,
    onEnd: () => {},
  });
  const fd = await session.openFile(1);
  const args = { fd, readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: BLOCK, autoclear: false };
  const device = await native().loopAttach({ ...args, name: 'teardown' });
  closeSync(fd);
  process.send?.({ path: device.path });
  // Waits in the kernel for our own session: must not keep the process from ending.
  if (way === 'exit')
    void native().mount({ source: device.path, target: mountDir, fstype: 'ext4', flags: 1, data: '' });
}

/** Worker: the same, then the thread is terminated by its parent. */
const workerSource = `
  const { parentPort, workerData } = require('node:worker_threads');
  const { closeSync, openSync, mkdirSync, truncateSync } = require('node:fs');
  const { BLOCK, HEAD, STORE, TAIL, dir, addonPath } = workerData;
  const addon = require(addonPath);
  closeSync(openSync(dir + '/store', 'w'));
  truncateSync(dir + '/store', STORE);
  mkdirSync(dir + '/mnt');
  (async () => {
    const session = await addon.fuseStart({ mountDir: dir + '/mnt', storeFd: openSync(dir + '/store', 'r'),
      sumsFd: openSync('/dev/null', 'r'), storeBytes: STORE, headBytes: HEAD, tailBytes: TAIL, presence: addon.presenceCreate(STORE), threads: 2, maxBackground: 64,
      onMiss: () => parentPort.postMessage('miss'), onEnd: () => {} });
    const fd = await session.openFile(1);
    const device = await addon.loopAttach({ fd, readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: BLOCK,
      autoclear: false, name: 'teardown' });
    closeSync(fd);
    parentPort.postMessage({ path: device.path });
  })();
`;

if (process.argv[2] === 'owner') {
  void owner(process.argv[3]!, process.argv[4]!);
} else if (isMainThread) {
  describe('end of the owner', () => {
    let reader: DirectReader;
    let dir: string;
    const devices: string[] = [];
    before(async () => {
      reader = await startDirectReader({ threads: 8 });
      dir = mkdtempSync(join(tmpdir(), 'dedup-teardown-'));
    });
    after(async () => {
      for (const path of devices) await native().loopDetach(path);
      await reader.close();
      rmSync(dir, { recursive: true, force: true });
    });

    for (const way of ['exit', 'kill', 'throw']) {
      it(`gives EIO to a waiting reader and leaves no mount when the process ends by ${way}`, limit, async () => {
        const own = join(dir, way);
        mkdirSync(own);
        const child: ChildProcess = fork(fileURLToPath(import.meta.url), ['owner', own, way], {
          stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
        });
        const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
        const path = await new Promise<string>((resolve, reject) => {
          child.once('message', (message: { path: string }) => resolve(message.path));
          child.once('exit', () => reject(new Error('the owner ended too early')));
        });
        devices.push(path);
        const result = await reader.read({ path, offset: 16 << 20, length: BLOCK });
        assert.equal(result.code, 'EIO');
        await ended;
        assert.ok(!readFileSync('/proc/self/mountinfo', 'utf8').includes(own));
      });
    }

    it('gives EIO to waiting readers when the worker thread that owns the session is terminated', limit, async () => {
      const own = join(dir, 'worker');
      mkdirSync(own);
      const addonPath =
        process.env.DEDUP_SNAPSHOTTER_ADDON ??
        fileURLToPath(new URL('../../native/build/dedup_native.node', import.meta.url));
      const worker = new Worker(workerSource, {
        eval: true,
        workerData: { BLOCK, HEAD, STORE, TAIL, dir: own, addonPath },
      });
      const path = await new Promise<string>((resolve, reject) => {
        worker.once('message', (message: { path: string }) => resolve(message.path));
        worker.once('error', reject);
      });
      devices.push(path);
      const missed = new Promise((resolve) => worker.once('message', resolve));
      const stalled = reader.read({ path, offset: 16 << 20, length: BLOCK });
      await missed;
      await worker.terminate();
      assert.equal((await stalled).code, 'EIO');
    });
  });
}
