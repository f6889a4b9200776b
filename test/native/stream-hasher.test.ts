// streamHasher of the addon: the digest of a stream and of the pieces in it, however it is cut.
import assert from 'node:assert/strict';
import { hash } from 'node:crypto';
import { describe, it } from 'node:test';
import { HOLE_OFFSET, native } from '../../src/fs/native.ts';
import { noise } from '../support/gzip-streams.ts';

const sha256 = (bytes: Uint8Array): Buffer => hash('sha256', bytes, 'buffer');

describe('streamHasher', () => {
  it('names the stream and every piece of it, over the ends of pushes and over holes', async () => {
    const bytes = noise(300_000);
    const hasher = native().streamHasher();
    const first = hasher.push(
      bytes.subarray(0, 100_000),
      Uint32Array.of(512, 0, 1, 512, 1, 1, 1024, 70_000, 1, 90_000, 10_000, 0),
    );
    const second = hasher.push(
      bytes.subarray(100_000, 200_000),
      Uint32Array.of(0, 5_000, 0, HOLE_OFFSET, 200_001, 0, 6_000, 1, 1, HOLE_OFFSET, 70_000, 1),
    );
    const third = hasher.push(bytes.subarray(200_000), new Uint32Array());
    const whole = hasher.finish();
    const hole = Buffer.concat([
      bytes.subarray(90_000, 105_000),
      Buffer.alloc(200_001),
      bytes.subarray(106_000, 106_001),
    ]);
    assert.deepEqual(
      await first,
      Buffer.concat([sha256(Buffer.alloc(0)), sha256(bytes.subarray(512, 513)), sha256(bytes.subarray(1024, 71_024))]),
    );
    assert.deepEqual(await second, Buffer.concat([sha256(hole), sha256(Buffer.alloc(70_000))]));
    assert.equal((await third).length, 0);
    assert.deepEqual(await whole, sha256(bytes));
  });

  it('works on many queued pushes in order, two hashers at once', async () => {
    const parts = Array.from({ length: 400 }, (_, i) => noise(1 + ((i * 977) % 9000)));
    const hashers = [native().streamHasher(), native().streamHasher()];
    const pieces = hashers.map((hasher) =>
      Promise.all(parts.map((part) => hasher.push(part, Uint32Array.of(0, part.length, 1)))),
    );
    const wholes = hashers.map((hasher) => hasher.finish());
    for (const list of pieces) assert.deepEqual(await list, parts.map(sha256));
    for (const whole of wholes) assert.deepEqual(await whole, sha256(Buffer.concat(parts)));
  });

  it('names nothing when nothing came, and takes nothing after that', async () => {
    const hasher = native().streamHasher();
    assert.deepEqual(await hasher.finish(), sha256(Buffer.alloc(0)));
    await assert.rejects(async () => hasher.push(Buffer.alloc(1), new Uint32Array()), { code: 'CLOSED' });
    await assert.rejects(async () => hasher.finish(), { code: 'CLOSED' });
  });

  it('refuses ranges beyond the bytes and arguments of other kinds', async () => {
    const hasher = native().streamHasher();
    const bytes = Buffer.alloc(100);
    const bad: unknown[] = [
      Uint32Array.of(0, 101, 1),
      Uint32Array.of(100, 1, 1),
      Uint32Array.of(101, 0, 1),
      Uint32Array.of(50, 0xffff_ffff, 1),
      Uint32Array.of(0, 1),
      Float64Array.of(0, 1, 1),
      [0, 1, 1],
      undefined,
    ];
    for (const ranges of bad) {
      await assert.rejects(async () => hasher.push(bytes, ranges as Uint32Array), { code: 'INVALID_ARGUMENT' });
    }
    await assert.rejects(async () => hasher.push('text' as unknown as Buffer, new Uint32Array()), {
      code: 'INVALID_ARGUMENT',
    });
    assert.deepEqual(await hasher.finish(), sha256(Buffer.alloc(0)), 'what was refused is not hashed');
  });
});
