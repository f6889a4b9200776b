// How large pieces are: small enough for a read of a few KiB, few enough for the database to record them one by one.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { MAX_MASKED_PIECES } from '../../../src/fs/chunks/store-layout.ts';
import { pieceBytesFor } from '../../../src/fs/index/builder.ts';
import { decodeLayerIndex } from '../../../src/fs/index/format.ts';
import { KiB, MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import { noise } from '../../support/lazy-store.ts';
import { tarOf } from '../../support/tar.ts';

describe('the size of pieces', () => {
  it('is 256 KiB for usual chunks, the chunk for small ones, and a sixteenth of large ones', () => {
    assert.deepEqual([64 * KiB, 256 * KiB, MiB, 4 * MiB, 16 * MiB].map(pieceBytesFor), [
      64 * KiB,
      256 * KiB,
      256 * KiB,
      256 * KiB,
      MiB,
    ]);
    for (let chunk = 4 * KiB; chunk <= 16 * MiB; chunk *= 2) {
      assert.ok(chunk / pieceBytesFor(chunk) <= MAX_MASKED_PIECES);
      assert.equal(pieceBytesFor(chunk) % (4 * KiB), 0, 'whole blocks');
    }
  });

  it('is in the index, and leaves no byte of a chunk out', async () => {
    const built = await indexOf(tarOf([{ name: 'big', content: noise('pieces', 5 * MiB + 100) }]));
    const index = decodeLayerIndex(built.indexBlob);
    assert.equal(index.pieceBytes, 256 * KiB);
    const { pieceStart, length, count } = index.chunks;
    assert.deepEqual(
      Array.from({ length: count }, (_, i) => [length[i], pieceStart[i + 1]! - pieceStart[i]!]),
      [
        [4 * MiB, 16],
        [MiB + 100, 5],
      ],
    );
  });
});
