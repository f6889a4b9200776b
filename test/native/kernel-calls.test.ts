// mount(2), loop devices, presence and descriptor calls of the native addon, against the real kernel.
import assert from 'node:assert/strict';
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import type { DedupError } from '../../src/errors.ts';
import { MS_NODEV, native } from '../../src/fs/native.ts';
import { descriptors } from './fuse-fixture.ts';

const limit = { timeout: 20_000 };
const MIB = 1 << 20;

let dir: string;
before(() => {
  dir = mkdtempSync(join(tmpdir(), 'dedup-native-'));
});
after(() => {
  rmSync(dir, { recursive: true, force: true });
});

describe('mount and umount', () => {
  it('mounts a file system and takes it away', limit, async () => {
    const target = mkdtempSync(join(dir, 'mnt-'));
    await native().mount({ source: 'tmpfs', target, fstype: 'tmpfs', flags: MS_NODEV, data: 'size=64k,mode=700' });
    try {
      const line = readFileSync('/proc/self/mountinfo', 'utf8')
        .split('\n')
        .find((text) => text.includes(` ${target} `));
      assert.match(line ?? '', /nodev.*tmpfs/);
    } finally {
      await native().umount(target, 0);
    }
    assert.doesNotMatch(readFileSync('/proc/self/mountinfo', 'utf8'), new RegExp(` ${target} `));
  });

  it('names call, operands, errno and path when mount fails', limit, async () => {
    const target = join(dir, 'missing');
    await assert.rejects(
      native().mount({ source: '/dev/none', target, fstype: 'erofs', flags: 0, data: '' }),
      (error: DedupError) => {
        assert.equal(error.code, 'KERNEL');
        assert.match(error.message, /mount\(2\).*\/dev\/none on .*missing: No such file or directory/);
        assert.deepEqual(error.details, { errno: 2, path: target, syscallError: 'ENOENT' });
        return true;
      },
    );
  });

  it('names errno and path when umount fails', limit, async () => {
    await assert.rejects(native().umount(dir, 0), (error: DedupError) => {
      assert.deepEqual(error.details, { errno: 22, path: dir, syscallError: 'EINVAL' });
      return true;
    });
  });

  it('refuses a string with NUL and a missing argument', limit, async () => {
    await assert.rejects(native().umount('/a\0b', 0), { code: 'INVALID_ARGUMENT' });
    await assert.rejects(native().umount(undefined as unknown as string, 0), { code: 'INVALID_ARGUMENT' });
  });
});

describe('loop devices', () => {
  for (const forceLegacy of [false, true]) {
    const way = forceLegacy ? 'the ioctls of kernels before 5.8' : 'LOOP_CONFIGURE';
    it(`attaches read-only with direct I/O, offset and size through ${way}`, limit, async () => {
      const path = join(dir, `backing-${forceLegacy}`);
      const content = Buffer.alloc(4 * MIB, 0);
      for (let i = 0; i < content.length; i += 4) content.writeUInt32LE(i, i);
      writeFileSync(path, content);
      const fd = openSync(path, 'r');
      const device = await native().loopAttach({
        fd,
        readOnly: true,
        directIo: true,
        offset: MIB,
        sizeLimit: 2 * MIB,
        blockSize: 4096,
        autoclear: false,
        name: 'loop-test',
        forceLegacy,
      });
      closeSync(fd);
      try {
        assert.equal(device.path, `/dev/loop${device.number}`);
        assert.equal(device.configured, !forceLegacy);
        const sys = `/sys/block/loop${device.number}`;
        const read = (name: string): string => readFileSync(join(sys, name), 'utf8').trim();
        assert.equal(read('loop/dio'), '1');
        assert.equal(read('ro'), '1');
        assert.equal(read('loop/autoclear'), '0');
        assert.equal(read('queue/logical_block_size'), '4096');
        assert.equal(Number(read('size')) * 512, 2 * MIB);
        const reader = openSync(device.path, 'r');
        const block = Buffer.alloc(8192);
        readSync(reader, block, 0, 8192, MIB);
        closeSync(reader);
        assert.deepEqual(block, content.subarray(2 * MIB, 2 * MIB + 8192));
        const other = join(dir, `other-${forceLegacy}`);
        writeFileSync(other, Buffer.alloc(4 * MIB, 0x5a));
        const next = openSync(other, 'r');
        const { name } = await native().loopStatus(device.path);
        await assert.rejects(
          native().loopChangeFd(device.path, next, `${name} of another`),
          (error: DedupError) => error.details.syscallError === 'ENXIO',
        );
        assert.equal(read('loop/backing_file'), path, 'a device of another name is left alone');
        await native().loopChangeFd(device.path, next, name);
        closeSync(next);
        assert.equal(read('loop/backing_file'), other);
        assert.equal((await native().loopStatus(device.path)).name, name);
        assert.equal(read('loop/dio'), '1');
        await assert.rejects(
          native().loopDetach(device.path, `${name} of another`),
          (error: DedupError) => error.details.syscallError === 'ENXIO',
        );
        assert.equal(read('loop/backing_file'), other, 'a device of another name stays attached');
      } finally {
        await native().loopDetach(device.path, 'loop-test');
      }
      for (const call of [native().loopDetach, native().loopStatus]) {
        await assert.rejects(call(device.path), (error: DedupError) => error.details.syscallError === 'ENXIO');
      }
    });

    it(`keeps an autoclear device until it is detached (${way})`, limit, async () => {
      const path = join(dir, `auto-${forceLegacy}`);
      writeFileSync(path, Buffer.alloc(MIB));
      const fds = descriptors();
      const fd = openSync(path, 'r');
      const args = { fd, readOnly: true, directIo: false, offset: 0, sizeLimit: 0, blockSize: 4096, autoclear: true };
      const device = await native().loopAttach({ ...args, name: 'auto', forceLegacy });
      closeSync(fd);
      assert.equal(readFileSync(`/sys/block/loop${device.number}/loop/autoclear`, 'utf8').trim(), '1');
      assert.equal(readFileSync(`/sys/block/loop${device.number}/loop/backing_file`, 'utf8').trim(), path);
      await native().loopDetach(device.path);
      assert.deepEqual(descriptors(), fds);
    });
  }

  it('gives 12 callers at once 12 devices', limit, async () => {
    const path = join(dir, 'shared');
    writeFileSync(path, Buffer.alloc(MIB));
    const fd = openSync(path, 'r');
    const args = {
      fd,
      readOnly: true,
      directIo: true,
      offset: 0,
      sizeLimit: 0,
      blockSize: 4096,
      autoclear: false,
      name: 'many',
    };
    const outcomes = await Promise.allSettled(Array.from({ length: 12 }, () => native().loopAttach(args)));
    closeSync(fd);
    const paths = outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value.path] : []));
    for (const device of paths) await native().loopDetach(device);
    assert.equal(new Set(paths).size, 12);
  });

  it('fails KERNEL_UNSUPPORTED and detaches when the backing file does not take direct I/O', limit, async (t) => {
    const target = mkdtempSync(join(dir, 'ram-'));
    await native().mount({ source: 'ramfs', target, fstype: 'ramfs', flags: 0, data: '' });
    try {
      const path = join(target, 'file');
      writeFileSync(path, Buffer.alloc(MIB));
      const fd = openSync(path, 'r');
      for (const forceLegacy of [false, true]) {
        const args = { fd, readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: 4096, autoclear: false };
        const outcome = native().loopAttach({ ...args, name: 'ramfs', forceLegacy });
        await assert.rejects(outcome, (error: DedupError) => {
          t.diagnostic(error.message);
          return ['KERNEL_UNSUPPORTED', 'KERNEL'].includes(error.code);
        });
      }
      closeSync(fd);
    } finally {
      // EBUSY if a device still held the file.
      await native().umount(target, 0);
    }
  });

  it('names the device that cannot be detached', limit, async () => {
    await assert.rejects(native().loopDetach('/dev/loop-none'), (error: DedupError) => {
      assert.deepEqual(error.details, { errno: 2, path: '/dev/loop-none', syscallError: 'ENOENT' });
      return true;
    });
  });
});

describe('presence', () => {
  it('keeps block b in byte b / 8, bit b % 8', limit, () => {
    const presence = native().presenceCreate(64 * MIB);
    assert.equal(presence.length, (64 * MIB) / 4096 / 8);
    native().presenceSet(presence, 11, 1, true);
    assert.equal(presence[1], 1 << 3);
    presence[2] = 0xff;
    assert.ok(native().presenceTest(presence, 16, 8));
    assert.ok(!native().presenceTest(presence, 15, 2));
  });

  it('sets, clears and tests ranges like a list of flags', limit, () => {
    const presence = native().presenceCreate(4 * MIB);
    const blocks = (4 * MIB) / 4096;
    const model = new Array<boolean>(blocks).fill(false);
    let seed = 7;
    const next = (below: number): number => {
      seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
      return (seed >>> 8) % below;
    };
    for (let round = 0; round < 2000; round++) {
      const first = next(blocks);
      const count = Math.min(next(200), blocks - first);
      const value = next(3) > 0;
      native().presenceSet(presence, first, count, value);
      model.fill(value, first, first + count);
      const from = next(blocks);
      const length = Math.min(next(150), blocks - from);
      assert.equal(native().presenceTest(presence, from, length), model.slice(from, from + length).every(Boolean));
    }
    for (let b = 0; b < blocks; b++) assert.equal(((presence[b >> 3]! >> (b & 7)) & 1) === 1, model[b]);
  });

  it('refuses blocks beyond the end and memory that is not its own', limit, () => {
    const presence = native().presenceCreate(MIB);
    const blocks = MIB / 4096;
    assert.throws(() => native().presenceSet(presence, blocks, 1, true), { code: 'INVALID_ARGUMENT' });
    assert.throws(() => native().presenceTest(presence, 1, blocks), { code: 'INVALID_ARGUMENT' });
    assert.throws(() => native().presenceSet(presence.subarray(1), 0, 1, true), { code: 'INVALID_ARGUMENT' });
    assert.throws(() => native().presenceCreate(4095), { code: 'INVALID_ARGUMENT' });
  });

  it('takes memory only for what is touched: 4 TiB of store cost less than 4 MiB', limit, () => {
    const rss = (): number => Number(/VmRSS:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))![1]) * 1024;
    const presence = native().presenceCreate(4 * 2 ** 40);
    const start = rss();
    native().presenceSet(presence, 2 ** 29, 1024, true);
    assert.equal(presence.length, 128 * MIB);
    assert.ok(rss() - start < 4 * MIB);
  });
});

describe('descriptor calls', () => {
  it('locks a file once', limit, () => {
    const path = join(dir, 'lock');
    const first = openSync(path, 'w');
    const second = openSync(path, 'r');
    assert.equal(native().flock(first), true);
    assert.equal(native().flock(second), false);
    closeSync(first);
    assert.equal(native().flock(second), true);
    closeSync(second);
    assert.throws(
      () => native().flock(second),
      (error: DedupError) => error.details.syscallError === 'EBADF',
    );
  });

  it('gives buffers that O_DIRECT accepts', limit, async () => {
    const { open, constants } = await import('node:fs/promises');
    const path = join(dir, 'direct');
    for (const bytes of [4096, 12288, MIB]) {
      const buffer = native().alignedBuffer(bytes);
      assert.equal(buffer.length, bytes);
      assert.ok(buffer.every((byte) => byte === 0));
      buffer.fill(0xa5);
      const file = await open(path, constants.O_RDWR | constants.O_CREAT | constants.O_DIRECT);
      const { bytesWritten } = await file.write(buffer, 0, bytes, 0);
      await file.close();
      assert.equal(bytesWritten, bytes);
    }
  });

  it('punches a hole and keeps the size', limit, async () => {
    const path = join(dir, 'holes');
    writeFileSync(path, Buffer.alloc(4 * MIB, 1));
    const fd = openSync(path, 'r+');
    const blocks = fstatSync(fd).blocks;
    await native().punchHole(fd, MIB, 2 * MIB);
    closeSync(fd);
    assert.equal(statSync(path).size, 4 * MIB);
    assert.ok(statSync(path).blocks <= blocks - (2 * MIB) / 512 + 16);
    const content = readFileSync(path);
    assert.ok(content.subarray(MIB, 3 * MIB).every((byte) => byte === 0));
    assert.ok(content.subarray(0, MIB).every((byte) => byte === 1));
    await assert.rejects(
      native().punchHole(fd, 0, 4096),
      (error: DedupError) => error.details.syscallError === 'EBADF',
    );
  });
});
