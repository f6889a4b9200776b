import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import { isNoSpareRoom, SpareRoom } from '../../src/fs/spare-room.ts';
import { GiB, MiB } from '../../src/units.ts';

/** On a disk of `size` with so much free. */
function roomOn(size: number, free: number, quotaBytes = 0, presentBytes = 0, reserved = 0): SpareRoom {
  return new SpareRoom({
    directory: '/store',
    quotaBytes,
    presentBytes: () => presentBytes,
    statfs: async (path) => {
      assert.equal(path, '/store');
      const [blocks, bavail] = [(size + reserved) / 4096, free / 4096];
      return { bsize: 4096, blocks, bfree: bavail + reserved / 4096, bavail };
    },
  });
}

const refusal = (message: string) => (error: unknown) => {
  assert.ok(error instanceof DedupError && isNoSpareRoom(error));
  assert.deepEqual([error.code, error.message], ['STORE_FULL', message]);
  return true;
};

describe('spare room', () => {
  it('is what a large disk has above 15 %', async () => {
    await roomOn(100 * GiB, 20 * GiB).require(5 * GiB);
    await assert.rejects(
      roomOn(100 * GiB, 20 * GiB).require(5 * GiB + 1),
      refusal('no room: 5.0 GiB needed, 5.0 GiB free beside the 15.0 GiB that are left for others'),
    );
    // What is reserved for root is nobody's.
    await roomOn(100 * GiB, 20 * GiB, 0, 0, 50 * GiB).require(5 * GiB);
    await roomOn(100 * GiB, 15 * GiB).require(0);
    await assert.rejects(roomOn(100 * GiB, 14 * GiB).require(1), { code: 'STORE_FULL' });
  });

  it('is what a small disk has above 256 MiB', async () => {
    await roomOn(GiB, 300 * MiB).require(44 * MiB);
    await assert.rejects(
      roomOn(GiB, 300 * MiB).require(45 * MiB),
      refusal('no room: 45.0 MiB needed, 44.0 MiB free beside the 256.0 MiB that are left for others'),
    );
  });

  it('ends at the quota', async () => {
    await roomOn(100 * GiB, 50 * GiB, 10 * GiB, 9 * GiB).require(GiB);
    await assert.rejects(
      roomOn(100 * GiB, 50 * GiB, 10 * GiB, 9 * GiB).require(2 * GiB),
      refusal('no room in quota_bytes: 2.0 GiB needed, 1.0 GiB free'),
    );
    await assert.rejects(roomOn(100 * GiB, 50 * GiB, GiB, 2 * GiB).require(1), /1 B needed, 0 B free/);
  });
});
