import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { describe, it } from 'node:test';
import { KiB, MiB } from '../../../src/units.ts';
import { noise } from '../../support/lazy-store.ts';
import { fastCdc, fixedChunks } from './fastcdc.ts';

const AVERAGE_BYTES = 64 * KiB;
const content = noise('content', 8 * MiB);

function chunks(bytes: Buffer, ends: readonly number[]): string[] {
  return ends.map((end, at) =>
    createHash('sha256')
      .update(bytes.subarray(ends[at - 1] ?? 0, end))
      .digest('hex'),
  );
}

describe('fastCdc', () => {
  it('cuts everything, between a quarter and eight times the average, near the average', () => {
    const ends = fastCdc(content, AVERAGE_BYTES);
    assert.equal(ends.at(-1), content.length);
    const lengths = ends.map((end, at) => end - (ends[at - 1] ?? 0));
    for (const length of lengths.slice(0, -1)) {
      assert.ok(length > AVERAGE_BYTES / 4 && length <= AVERAGE_BYTES * 8, `${length}`);
    }
    const average = content.length / ends.length;
    assert.ok(average > AVERAGE_BYTES * 0.8 && average < AVERAGE_BYTES * 1.6, `${average}`);
  });

  it('finds its cuts again after bytes that were put in, which fixed chunks do not', () => {
    const at = 3 * MiB + 17;
    const longer = Buffer.concat([content.subarray(0, at), Buffer.from('inserted'), content.subarray(at)]);
    const lost = (cut: (bytes: Buffer) => number[]): number => {
      const before = new Set(chunks(content, cut(content)));
      return chunks(longer, cut(longer)).filter((digest) => !before.has(digest)).length;
    };
    assert.ok(lost((bytes) => fastCdc(bytes, AVERAGE_BYTES)) <= 3);
    assert.equal(
      lost((bytes) => fixedChunks(bytes, AVERAGE_BYTES)),
      81,
    );
  });

  it('cuts nothing out of nothing, and a short file not at all', () => {
    assert.deepEqual(fastCdc(Buffer.alloc(0), AVERAGE_BYTES), []);
    assert.deepEqual(fastCdc(content.subarray(0, 100), AVERAGE_BYTES), [100]);
    assert.deepEqual(fixedChunks(Buffer.alloc(0), AVERAGE_BYTES), []);
    assert.deepEqual(fixedChunks(content.subarray(0, AVERAGE_BYTES), AVERAGE_BYTES), [AVERAGE_BYTES]);
  });
});
