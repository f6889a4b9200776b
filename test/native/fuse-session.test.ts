// The FUSE session as the kernel sees it: through a direct-I/O loop device, read with O_DIRECT by another process.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import {
  closeSync,
  constants,
  fstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { open as openHandle } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { DedupError } from '../../src/errors.ts';
import { type FuseMiss, native } from '../../src/fs/native.ts';
import { type DirectReader, startDirectReader } from '../support/direct-reader.ts';
import { BLOCK, descriptors, type Fixture, HEAD, STORE, startFixture, TAIL } from './fuse-fixture.ts';

const MIB = 1 << 20;
const limit = { timeout: 30_000 };

function answer(fixture: Fixture, miss: FuseMiss): void {
  fixture.session.reply(miss.id, [fixture.content.subarray(miss.offset, miss.offset + miss.length)]);
}

function answerAll(fixture: Fixture, misses: readonly FuseMiss[]): void {
  for (const miss of misses) answer(fixture, miss);
}

function refuseAll(fixture: Fixture, misses: readonly FuseMiss[]): void {
  for (const miss of misses) fixture.session.replyError(miss.id, 5);
}

function thrownCode(call: () => void): string {
  try {
    call();
  } catch (error) {
    return error instanceof DedupError ? error.code : `not a DedupError: ${String(error)}`;
  }
  return 'nothing thrown';
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 5_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`${what} did not happen within 5 s`);
    await delay(5);
  }
}

/** The backing file of a loop device, as the kernel names it; undefined when it is detached. */
function backingFile(number: number): string | undefined {
  try {
    return readFileSync(`/sys/block/loop${number}/loop/backing_file`, 'utf8').trim();
  } catch {
    return undefined;
  }
}

describe('FUSE session', () => {
  let reader: DirectReader;
  const open = new Set<Fixture>();
  const start: typeof startFixture = async (options) => {
    const fixture = await startFixture(options);
    open.add(fixture);
    return fixture;
  };
  const finish = async (fixture: Fixture): Promise<void> => {
    open.delete(fixture);
    await fixture.close();
  };

  before(async () => {
    reader = await startDirectReader({ threads: 40 });
  });
  after(async () => {
    for (const fixture of open) await fixture.close();
    await reader.close();
  });

  it('answers verified blocks with the bytes of the store and asks nobody', limit, async () => {
    const fixture = await start();
    fixture.present(HEAD, STORE - HEAD - TAIL);
    const reads = Array.from({ length: 200 }, () => {
      const length = BLOCK * randomInt(1, 513);
      return { path: fixture.device.path, offset: BLOCK * randomInt(0, (STORE - length) / BLOCK + 1), length };
    });
    const lanes = await Promise.all(
      [0, 1, 2, 3].map((lane) => reader.sequence(reads.filter((_, i) => i % 4 === lane))),
    );
    for (const [i, read] of reads.entries()) {
      const result = lanes[i % 4]![Math.floor(i / 4)]!;
      assert.equal(result.sha256, fixture.digest(read.offset, read.length), `at ${read.offset}, ${read.length} bytes`);
    }
    assert.deepEqual(fixture.misses, []);
    const stats = fixture.session.stats();
    assert.ok(stats.hits >= reads.length);
    assert.equal(stats.errors, 0);
    await finish(fixture);
  });

  it('leaves the second of a hit at each MiB that it touched, and of a miss nowhere', limit, async () => {
    const fixture = await start({ onMiss: answerAll });
    fixture.touched.fill(0);
    const before = Math.floor(Date.now() / 1000);
    const read = { path: fixture.device.path, offset: 12 * MIB - BLOCK, length: 2 * BLOCK };
    fixture.present(read.offset, read.length);
    await reader.read(read);
    const marked = [...fixture.touched.entries()].filter(([, second]) => second !== 0);
    assert.deepEqual(
      marked.map(([region]) => region),
      [11, 12],
    );
    for (const [, second] of marked) assert.ok(second >= before - 1 && second <= Date.now() / 1000 + 1);
    fixture.touched.fill(0);
    native().presenceSet(fixture.presence, read.offset / BLOCK, 1, false);
    await reader.read(read);
    assert.equal(fixture.misses.length, 1);
    assert.ok(fixture.touched.every((second) => second === 0));
    await finish(fixture);
  });

  it('answers zeros for the head and the tail without a look at the bitmap', limit, async () => {
    const fixture = await start();
    for (const [offset, length] of [
      [0, HEAD],
      [STORE - TAIL, TAIL],
      [STORE - BLOCK, BLOCK],
    ] as const) {
      const result = await reader.read({ path: fixture.device.path, offset, length });
      assert.equal(result.sha256, fixture.digest(offset, length));
    }
    assert.deepEqual(fixture.misses, []);
    await finish(fixture);
  });

  it('hands a range with one absent block to onMiss whole and passes the answer on', limit, async () => {
    const fixture = await start({ onMiss: (f, misses) => answerAll(f, misses) });
    const offset = 8 * MIB;
    fixture.present(offset, 15 * BLOCK);
    const result = await reader.read({ path: fixture.device.path, offset, length: 16 * BLOCK });
    assert.equal(result.sha256, fixture.digest(offset, 16 * BLOCK));
    assert.deepEqual(
      fixture.misses.map(({ file, offset: at, length }) => ({ file, offset: at, length })),
      [{ file: 7, offset, length: 16 * BLOCK }],
    );
    await finish(fixture);
  });

  it('joins an answer given in many parts', limit, async () => {
    const fixture = await start({
      onMiss: (f, misses) => {
        for (const miss of misses) {
          const bytes = f.content.subarray(miss.offset, miss.offset + miss.length);
          // More parts than one writev(2) takes.
          const parts = Array.from({ length: Math.ceil(miss.length / 64) }, (_, i) =>
            bytes.subarray(i * 64, i * 64 + 64),
          );
          f.session.reply(miss.id, parts);
        }
      },
    });
    const result = await reader.read({ path: fixture.device.path, offset: 4 * MIB, length: 64 * BLOCK });
    assert.equal(result.sha256, fixture.digest(4 * MIB, 64 * BLOCK));
    await finish(fixture);
  });

  it('serves misses in parallel: 16 readers with 4 misses of 50 ms each end within 0.4 s', limit, async () => {
    const fixture = await start({
      onMiss: (f, misses) => {
        for (const miss of misses) setTimeout(() => answer(f, miss), 50);
      },
    });
    await reader.read({ path: fixture.device.path, offset: 0, length: BLOCK });
    const began = performance.now();
    const results = await Promise.all(
      Array.from({ length: 16 }, (_, lane) =>
        reader.sequence(
          Array.from({ length: 4 }, (_, i) => ({
            path: fixture.device.path,
            offset: 2 * MIB + ((lane * 4 + i) * MIB) / 2,
            length: BLOCK,
          })),
        ),
      ),
    );
    const ms = performance.now() - began;
    assert.equal(fixture.misses.length, 64);
    for (const lane of results) for (const result of lane) assert.equal(result.code, undefined);
    assert.ok(ms < 400, `took ${ms} ms`);
    await finish(fixture);
  });

  it('answers hits of the same and of another file in less than 5 ms while 20 misses stall', limit, async () => {
    const fixture = await start();
    const other = await fixture.attach(8);
    fixture.present(HEAD, 16 * MIB);
    const stalled = Array.from({ length: 20 }, (_, i) =>
      reader.read({ path: fixture.device.path, offset: 32 * MIB + i * MIB, length: BLOCK }),
    );
    await until(() => fixture.misses.length === 20, 'the stall of 20 misses');
    for (const path of [fixture.device.path, other.path]) {
      const hits = await reader.sequence(
        Array.from({ length: 50 }, (_, i) => ({ path, offset: HEAD + i * 16 * BLOCK, length: BLOCK })),
      );
      const times = hits.map((hit) => hit.ms).sort((a, b) => a - b);
      for (const hit of hits) assert.equal(hit.code, undefined);
      assert.ok(times[25]! < 5, `median of ${path} is ${times[25]} ms`);
    }
    assert.equal(fixture.session.stats().outstanding, 20);
    for (const miss of fixture.misses) answer(fixture, miss);
    for (const [i, result] of (await Promise.all(stalled)).entries())
      assert.equal(result.sha256, fixture.digest(32 * MIB + i * MIB, BLOCK));
    await finish(fixture);
  });

  for (const [name, resize] of [
    ['shorter', (bytes: Buffer) => bytes.subarray(0, bytes.length - BLOCK)],
    ['longer', (bytes: Buffer) => Buffer.concat([bytes, Buffer.alloc(1)])],
    ['emptier', () => Buffer.alloc(0)],
  ] as const) {
    it(`gives EIO to the reader and throws INTERNAL when the answer is ${name} than asked`, limit, async () => {
      const codes: string[] = [];
      const fixture = await start({
        onMiss: (f, misses) => {
          for (const miss of misses) {
            const bytes = resize(f.content.subarray(miss.offset, miss.offset + miss.length));
            codes.push(thrownCode(() => f.session.reply(miss.id, [bytes])));
          }
        },
      });
      const result = await reader.read({ path: fixture.device.path, offset: 8 * MIB, length: 4 * BLOCK });
      assert.equal(result.code, 'EIO');
      assert.ok(codes.length > 0);
      assert.ok(
        codes.every((code) => code === 'INTERNAL'),
        codes.join(),
      );
      await finish(fixture);
    });
  }

  it('refuses a second answer and an unknown id with INTERNAL', limit, async () => {
    const codes: string[] = [];
    const fixture = await start({
      onMiss: (f, misses) => {
        for (const miss of misses) {
          answer(f, miss);
          codes.push(thrownCode(() => answer(f, miss)));
          codes.push(thrownCode(() => f.session.replyError(miss.id, 5)));
        }
      },
    });
    const result = await reader.read({ path: fixture.device.path, offset: 8 * MIB, length: BLOCK });
    assert.equal(result.sha256, fixture.digest(8 * MIB, BLOCK));
    codes.push(thrownCode(() => fixture.session.reply(123_456, [])));
    assert.deepEqual(codes, ['INTERNAL', 'INTERNAL', 'INTERNAL']);
    await finish(fixture);
  });

  it('passes an errno from JavaScript on as a failed read', limit, async () => {
    const fixture = await start({ onMiss: (f, misses) => refuseAll(f, misses) });
    const result = await reader.read({ path: fixture.device.path, offset: 40 * MIB, length: BLOCK });
    assert.equal(result.code, 'EIO');
    assert.equal(
      thrownCode(() => fixture.session.replyError(1, 0)),
      'INVALID_ARGUMENT',
    );
    await finish(fixture);
  });

  it('answers EIO when the store is shorter than the bitmap says, never fewer bytes or zeros', limit, async () => {
    const fixture = await start();
    fixture.present(HEAD, STORE - HEAD - TAIL);
    truncateSync(fixture.storePath, 16 * MIB + BLOCK);
    for (const [offset, length] of [
      [20 * MIB, BLOCK],
      [16 * MIB, 2 * BLOCK],
      [15 * MIB, 2 * MIB],
    ] as const) {
      const result = await reader.read({ path: fixture.device.path, offset, length });
      assert.equal(result.code, 'EIO', `at ${offset}`);
    }
    const whole = await reader.read({ path: fixture.device.path, offset: 15 * MIB, length: MIB });
    assert.equal(whole.sha256, fixture.digest(15 * MIB, MIB));
    await finish(fixture);
  });

  it('asks again for a block that was taken away', limit, async () => {
    const fixture = await start({ onMiss: (f, misses) => answerAll(f, misses) });
    fixture.present(8 * MIB, MIB);
    const read = { path: fixture.device.path, offset: 8 * MIB, length: MIB };
    await reader.read(read);
    assert.equal(fixture.misses.length, 0);
    native().presenceSet(fixture.presence, (8 * MIB) / BLOCK + 3, 1, false);
    const result = await reader.read(read);
    assert.equal(result.sha256, fixture.digest(8 * MIB, MIB));
    assert.equal(fixture.misses.length, 1);
    await finish(fixture);
  });

  it('asks for a block that is not what was written, in whole blocks and in parts', limit, async () => {
    const fixture = await start({ onMiss: (f, misses) => answerAll(f, misses) });
    fixture.present(8 * MIB, 2 * MIB);
    const store = openSync(fixture.storePath, 'r+');
    const [first, second] = [8 * MIB + 5 * BLOCK, 9 * MIB + 7 * BLOCK + 99];
    for (const at of [first, second]) writeSync(store, Buffer.of(fixture.content[at]! ^ 4), 0, 1, at);
    // The kernel may split a read; a part that is read while the damaged block of another is taken away is asked for, too.
    const damaged = (): FuseMiss[] => fixture.misses.filter((miss) => miss.damaged);
    const whole = await reader.read({ path: fixture.device.path, offset: 8 * MIB, length: MIB });
    assert.equal(whole.sha256, fixture.digest(8 * MIB, MIB));
    assert.equal(damaged().length, 1);
    assert.ok(damaged()[0]!.offset <= first && first < damaged()[0]!.offset + damaged()[0]!.length);
    // By the file instead of the loop device, whose blocks are whole: the kernel asks for just these bytes.
    const fd = await fixture.session.openFile(3);
    const file = await openHandle(`/proc/self/fd/${fd}`, constants.O_RDONLY | constants.O_DIRECT);
    const part = async (at: number) => (await file.read(Buffer.alloc(3000), 0, 3000, at)).buffer;
    for (const at of [9 * MIB + 4000, 9 * MIB + 6 * BLOCK + 4000])
      assert.ok((await part(at)).equals(fixture.content.subarray(at, at + 3000)), `at ${at}`);
    assert.equal(damaged().length, 2);
    assert.equal(native().presenceTest(fixture.presence, (9 * MIB) / BLOCK + 7, 1), false);
    await file.close();
    closeSync(fd);
    closeSync(store);
    await finish(fixture);
  });

  it('never shows zeros of a hole while blocks are taken away, punched and written again', limit, async () => {
    const fixture = await start({ onMiss: answerAll });
    const [offset, length] = [8 * MIB, 64 * BLOCK];
    const store = openSync(fixture.storePath, constants.O_RDWR | constants.O_DIRECT);
    const bytes = native().alignedBuffer(length);
    fixture.content.copy(bytes, 0, offset, offset + length);
    fixture.present(offset, length);
    const expected = fixture.digest(offset, length);
    const lanes = Array.from({ length: 3 }, () =>
      reader.sequence(Array.from({ length: 400 }, () => ({ path: fixture.device.path, offset, length }))),
    );
    let running = true;
    const done = Promise.all(lanes).finally(() => {
      running = false;
    });
    let rounds = 0;
    while (running) {
      native().presenceSet(fixture.presence, offset / BLOCK, length / BLOCK, false);
      await native().punchHole(store, offset, length);
      await delay(1);
      writeSync(store, bytes, 0, length, offset);
      fixture.present(offset, length);
      rounds++;
      await delay(1);
    }
    closeSync(store);
    for (const lane of await done) for (const result of lane) assert.equal(result.sha256, expected);
    // What was taken away is asked for, and not taken for something that the disk changed.
    assert.ok(!fixture.misses.some(({ damaged }) => damaged));
    const { hits, misses } = fixture.session.stats();
    assert.ok(rounds > 10 && hits > 10 && misses > 10, `${rounds} rounds, ${hits} hits, ${misses} misses`);
    await finish(fixture);
  });

  it('is not visible in the mount table once it is started', limit, async () => {
    const fixture = await start();
    const lines = readFileSync('/proc/self/mountinfo', 'utf8').split('\n');
    assert.deepEqual(
      lines.filter((line) => line.includes(fixture.dir) || line.includes('fuse.dedup')),
      [],
    );
    assert.deepEqual(readdirSync(join(fixture.dir, 'mnt')), []);
    await finish(fixture);
  });

  it(
    'shows each file read-only with the size of the store, also 4 TiB and with the highest number',
    limit,
    async () => {
      const fixture = await start({ storeBytes: 4 * 2 ** 40 });
      const size = Number(readFileSync(`/sys/block/loop${fixture.device.number}/size`, 'utf8')) * 512;
      assert.equal(size, 4 * 2 ** 40);
      await assert.rejects(fixture.session.openFile(-1), { code: 'INVALID_ARGUMENT' });
      const fd = await fixture.session.openFile(0);
      assert.equal(fstatSync(fd).size, 4 * 2 ** 40);
      assert.equal(fstatSync(fd).mode, 0o100400);
      const siblings = `/proc/self/fd/${fd}/..`;
      assert.throws(() => openSync(`/proc/self/fd/${fd}`, 'r+'), { code: 'EROFS' });
      assert.throws(() => readdirSync(siblings), { code: 'ENOTDIR' });
      closeSync(fd);
      const high = await fixture.attach(Number.MAX_SAFE_INTEGER - 2);
      const result = await reader.read({ path: high.path, offset: 0, length: BLOCK });
      assert.equal(result.sha256, fixture.digest(0, BLOCK));
      await finish(fixture);
    },
  );

  it(
    'gives EIO to every waiting reader when it is closed, and refuses what comes later with CLOSED',
    limit,
    async () => {
      const fixture = await start();
      const stalled = Array.from({ length: 24 }, (_, i) =>
        reader.read({ path: fixture.device.path, offset: 16 * MIB + i * MIB, length: BLOCK }),
      );
      await until(() => fixture.misses.length === 24, 'the stall of 24 misses');
      const began = performance.now();
      await Promise.all([fixture.session.close(), fixture.session.close()]);
      assert.ok(performance.now() - began < 2_000);
      for (const result of await Promise.all(stalled)) assert.equal(result.code, 'EIO');
      assert.equal(
        thrownCode(() => answer(fixture, fixture.misses[0]!)),
        'CLOSED',
      );
      await assert.rejects(fixture.session.openFile(7), { code: 'CLOSED' });
      const late = await reader.read({ path: fixture.device.path, offset: 0, length: BLOCK });
      assert.equal(late.code, 'EIO');
      await finish(fixture);
    },
  );

  it('lets answers race with close: every reader gets the right bytes or EIO', limit, async () => {
    for (let round = 0; round < 6; round++) {
      const fixture = await start({
        onMiss: (f, misses) => {
          for (const miss of misses)
            setTimeout(() => {
              const code = thrownCode(() => answer(f, miss));
              assert.ok(code === 'nothing thrown' || code === 'CLOSED', code);
            }, miss.id % 7);
        },
      });
      const reads = Array.from({ length: 32 }, (_, i) => ({
        path: fixture.device.path,
        offset: 2 * MIB + i * MIB,
        length: 32 * BLOCK,
      }));
      const running = reads.map((read) => reader.read(read));
      await delay(2 + round);
      await fixture.session.close();
      for (const [i, result] of (await Promise.all(running)).entries()) {
        if (result.code === undefined) assert.equal(result.sha256, fixture.digest(reads[i]!.offset, reads[i]!.length));
        else assert.equal(result.code, 'EIO');
      }
      await finish(fixture);
    }
  });

  it('tells onEnd once when the connection is aborted from outside', limit, async () => {
    const ends: number[] = [];
    const fixture = await start({ onEnd: (errno) => ends.push(errno) });
    const control = mkdtempSync(join(tmpdir(), 'dedup-fusectl-'));
    const fd = await fixture.session.openFile(7);
    // The connection has the minor number of its device: the low byte and everything from bit 20 up.
    const device = fstatSync(fd).dev;
    closeSync(fd);
    const connection = (device & 0xff) | ((device >>> 12) & 0xfff00);
    await native().mount({ source: 'none', target: control, fstype: 'fusectl', flags: 0, data: '' });
    try {
      const stalled = reader.read({ path: fixture.device.path, offset: 16 * MIB, length: BLOCK });
      await until(() => fixture.misses.length === 1, 'the miss');
      writeFileSync(join(control, String(connection), 'abort'), '1');
      assert.equal((await stalled).code, 'EIO');
      await until(() => ends.length > 0, 'onEnd');
      answerAll(fixture, fixture.misses);
    } finally {
      await native().umount(control, 0);
      rmdirSync(control);
    }
    await finish(fixture);
    assert.deepEqual(ends, [19]);
  });

  it('is interrupted safely: a killed reader leaves its request to be answered once', limit, async () => {
    const fixture = await start();
    const victim = await startDirectReader();
    const lost = assert.rejects(victim.read({ path: fixture.device.path, offset: 16 * MIB, length: BLOCK }), /ended/);
    await until(() => fixture.misses.length === 1, 'the miss');
    const killed = victim.close();
    await delay(50);
    assert.equal(fixture.session.stats().outstanding, 1);
    answer(fixture, fixture.misses[0]!);
    await Promise.all([killed, lost]);
    assert.equal(fixture.session.stats().outstanding, 0);
    const result = await reader.read({ path: fixture.device.path, offset: HEAD - BLOCK, length: BLOCK });
    assert.equal(result.sha256, fixture.digest(HEAD - BLOCK, BLOCK));
    await finish(fixture);
  });

  it(
    'answers the read of a killed process once, whether the kernel sends FUSE_INTERRUPT for it or not',
    limit,
    async () => {
      const fixture = await start();
      const fd = await fixture.session.openFile(7);
      // Buffered, in the process's own context: kernels that read synchronously interrupt it, newer ones let the process go.
      const child = spawn('dd', ['bs=4096', 'count=1', `skip=${(8 * MIB) / BLOCK}`], {
        stdio: [fd, 'ignore', 'ignore'],
      });
      closeSync(fd);
      const ended = new Promise((resolve) => child.once('exit', (_code, signal) => resolve(signal)));
      await until(() => fixture.misses.length > 0, 'the miss');
      const { requests, outstanding } = fixture.session.stats();
      child.kill('SIGKILL');
      const interrupted = (): boolean => fixture.session.stats().requests > requests;
      await until(() => interrupted() || child.signalCode !== null, 'FUSE_INTERRUPT, or the end of the process');
      assert.equal(fixture.session.stats().outstanding, outstanding);
      answerAll(fixture, fixture.misses);
      assert.equal(await ended, 'SIGKILL');
      assert.equal(fixture.session.stats().outstanding, 0);
      await finish(fixture);
    },
  );

  it('fails with errno and path on a directory that does not exist', limit, async () => {
    const dir = mkdtempSync(join(tmpdir(), 'dedup-fuse-'));
    const storeFd = openSync(join(dir, 'store'), 'w+');
    const target = join(dir, 'missing');
    await assert.rejects(
      native().fuseStart({
        mountDir: target,
        storeFd,
        sumsFd: storeFd,
        storeBytes: STORE,
        headBytes: HEAD,
        tailBytes: TAIL,
        presence: native().presenceCreate(STORE),
        threads: 2,
        maxBackground: 512,
        onMiss: () => {},
        onEnd: () => {},
      }),
      (error: DedupError) =>
        error.code === 'KERNEL' && error.details.syscallError === 'ENOENT' && error.details.path === target,
    );
    closeSync(storeFd);
    rmSync(dir, { recursive: true });
  });

  /** What takeReads() says, by names. */
  const taken = (fixture: Fixture) => {
    const { reads, lost } = fixture.session.takeReads();
    const seen = Array.from({ length: reads.length / 4 }, (_, i) => {
      const [file, offset, length, atMs] = reads.subarray(i * 4, i * 4 + 4);
      return { file: file!, offset: offset!, length: Math.abs(length!), missed: length! < 0, atMs: atMs! };
    });
    return { seen, lost };
  };

  it('notes reads of watched files, hits and misses, in their order, and of no others', limit, async () => {
    const fixture = await start({ onMiss: answerAll });
    const other = await fixture.attach(8);
    fixture.present(16 * MIB, MIB);
    const wanted: { offset: number; length: number; missed: boolean }[] = [
      { offset: 16 * MIB, length: BLOCK, missed: false },
      { offset: 20 * MIB, length: 8 * BLOCK, missed: true },
      { offset: 16 * MIB + 8 * BLOCK, length: 16 * BLOCK, missed: false },
      { offset: 17 * MIB - BLOCK, length: 2 * BLOCK, missed: true },
    ];
    await reader.read({ path: fixture.device.path, offset: 24 * MIB, length: BLOCK });
    assert.deepEqual(taken(fixture), { seen: [], lost: 0 }, 'nobody had asked');
    fixture.session.watchReads(7, true);
    const before = performance.now();
    for (const { offset, length } of wanted) {
      await reader.read({ path: fixture.device.path, offset, length });
      await reader.read({ path: other.path, offset, length });
    }
    const took = performance.now() - before;
    const { seen, lost } = taken(fixture);
    assert.equal(lost, 0);
    assert.deepEqual(
      seen.map(({ offset, length, missed }) => ({ offset, length, missed })),
      wanted,
    );
    assert.ok(seen.every(({ file }) => file === 7));
    const times = seen.map(({ atMs }) => atMs);
    assert.deepEqual(
      times,
      times.toSorted((a, b) => a - b),
    );
    assert.ok(times.at(-1)! - times[0]! <= took);
    assert.deepEqual(taken(fixture).seen, [], 'each is told once');
    fixture.session.watchReads(7, false);
    fixture.session.watchReads(8, true);
    await reader.read({ path: fixture.device.path, offset: 16 * MIB, length: BLOCK });
    await reader.read({ path: other.path, offset: 16 * MIB, length: BLOCK });
    assert.deepEqual(
      taken(fixture).seen.map(({ file }) => file),
      [8],
    );
    await finish(fixture);
  });

  it('counts the reads that nobody took in time, and keeps the first ones', { timeout: 60_000 }, async () => {
    const fixture = await start();
    fixture.present(HEAD, 16 * MIB);
    fixture.session.watchReads(7, true);
    const [capacity, lanes, each] = [65_536, 4, 16_500];
    const reads = Array.from({ length: each }, (_, i) => ({
      path: fixture.device.path,
      offset: HEAD + (i % 1000) * BLOCK,
      length: BLOCK,
    }));
    await Promise.all(Array.from({ length: lanes }, () => reader.sequence(reads)));
    const { seen, lost } = taken(fixture);
    assert.equal(seen.length, capacity);
    assert.equal(lost, lanes * each - capacity);
    assert.equal(seen[0]!.offset, HEAD);
    await reader.read(reads[0]!);
    assert.equal(taken(fixture).seen.length, 1, 'and goes on');
    await finish(fixture);
  });

  it('leaves no descriptor and no loop device behind', limit, async () => {
    const before = descriptors();
    for (let i = 0; i < 5; i++) {
      const fixture = await start({ onMiss: (f, misses) => answerAll(f, misses) });
      await reader.read({ path: fixture.device.path, offset: 16 * MIB, length: BLOCK });
      assert.equal(backingFile(fixture.device.number), '/7');
      await finish(fixture);
      assert.notEqual(backingFile(fixture.device.number), '/7');
    }
    assert.deepEqual(descriptors(), before);
  });
});
