// What every Repository must do, whatever it reads from. Called by the test of each implementation with a factory.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import { type Digest, digestOf } from '../../src/digest.ts';
import { DedupError, type ErrorCode } from '../../src/errors.ts';
import { addReferrerTag } from '../../src/fs/registry/referrer-tag.ts';
import type { StreamingRepository } from '../../src/fs/registry/verified-stream.ts';
import { type ByteRange, MiB } from '../../src/units.ts';

export interface RepositoryUnderTest {
  readonly repository: StreamingRepository;
  /** Inverts the stored byte at `offset` of a blob. */
  corrupt(digest: Digest, offset: number): Promise<void>;
  close(): Promise<void>;
}

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const EMPTY = Buffer.from('{}');

/** A signal that ends a hanging test with a clear error. */
export function soon(ms = 15_000): AbortSignal {
  return AbortSignal.timeout(ms);
}

/** A check for assert.rejects: a DedupError with that code. */
export function withCode(code: ErrorCode, message?: RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof DedupError, `not a DedupError: ${String(error)}`);
    assert.equal(error.code, code, error.message);
    if (message !== undefined) assert.match(error.message, message);
    return true;
  };
}

export async function collect(chunks: AsyncIterable<Buffer>): Promise<Buffer> {
  const all: Buffer[] = [];
  for await (const chunk of chunks) all.push(chunk);
  return Buffer.concat(all);
}

export function blobReaderSuite(name: string, factory: () => Promise<RepositoryUnderTest>): void {
  describe(`${name} as a repository`, () => {
    let subject: RepositoryUnderTest;
    let repository: StreamingRepository;
    const bytes = randomBytes(3 * MiB + 123);
    const blob = { digest: digestOf(bytes), size: bytes.length };

    before(async () => {
      subject = await factory();
      repository = subject.repository;
      await repository.putBlob(blob.digest, bytes, soon());
      await repository.putBlob(digestOf(EMPTY), EMPTY, soon());
    });
    after(async () => await subject?.close());

    test('a range is exactly the bytes asked for, wherever it lies', async () => {
      const range = fc
        .integer({ min: 0, max: blob.size })
        .chain((offset) =>
          fc.record({ offset: fc.constant(offset), length: fc.integer({ min: 0, max: blob.size - offset }) }),
        );
      const check = fc.asyncProperty(range, async (wanted) => {
        const got = await repository.readRange(blob, wanted, soon());
        assert.ok(got.equals(bytes.subarray(wanted.offset, wanted.offset + wanted.length)));
      });
      const ends = [
        { offset: 0, length: 1 },
        { offset: blob.size - 1, length: 1 },
        { offset: 0, length: blob.size },
        { offset: blob.size, length: 0 },
      ];
      await fc.assert(check, { numRuns: 25, examples: ends.map((one) => [one]) });
    });

    test('a range outside of the blob is refused before anything is asked for', async () => {
      const { requests } = repository.traffic;
      for (const [offset, length] of [
        [0, blob.size + 1],
        [blob.size, 1],
        [-1, 2],
        [0, -1],
        [0.5, 1],
        [Number.NaN, 1],
      ] as const) {
        await assert.rejects(repository.readRange(blob, { offset, length }, soon()), withCode('INVALID_ARGUMENT'));
      }
      assert.equal(repository.traffic.requests, requests);
    });

    test('sixteen ranges at once do not mix', async () => {
      const ranges = Array.from({ length: 16 }, (_, i) => ({ offset: i * 150_000, length: 200_000 }));
      const got = await Promise.all(ranges.map((range) => repository.readRange(blob, range, soon())));
      for (const [i, { offset, length }] of ranges.entries()) {
        assert.ok(got[i]?.equals(bytes.subarray(offset, offset + length)), `range ${i}`);
      }
    });

    /** What readRanges tells for `ranges`, by number. */
    const readSeveral = async (ranges: readonly ByteRange[]): Promise<Map<number, Buffer>> => {
      const told = new Map<number, Buffer>();
      await repository.readRanges(blob, ranges, soon(), (i, part) => {
        assert.ok(!told.has(i), `range ${i} is told twice`);
        told.set(i, part);
      });
      return told;
    };
    const checkSeveral = async (ranges: readonly ByteRange[]): Promise<void> => {
      const told = await readSeveral(ranges);
      assert.equal(told.size, ranges.length);
      for (const [i, { offset, length }] of ranges.entries()) {
        assert.ok(told.get(i)?.equals(bytes.subarray(offset, offset + length)), `range ${i} of ${ranges.length}`);
      }
    };

    test('several ranges are told once each with exactly their bytes, wherever they lie', async () => {
      const cuts = fc.uniqueArray(fc.integer({ min: 0, max: blob.size }), { minLength: 2, maxLength: 40 });
      // Every second gap between two cuts is left out, or none is: then all ranges touch.
      const check = fc.asyncProperty(cuts, fc.boolean(), fc.nat(), async (unsorted, touching, turn) => {
        const sorted = unsorted.toSorted((a, b) => a - b);
        const all = sorted.slice(1).map((end, i) => ({ offset: sorted[i]!, length: end - sorted[i]! }));
        const some = touching ? all : all.filter((_, i) => i % 2 === 0);
        // In any order.
        await checkSeveral([...some.slice(turn % some.length), ...some.slice(0, turn % some.length)]);
      });
      await fc.assert(check, { numRuns: 15 });
      await checkSeveral([]);
      await checkSeveral([{ offset: 0, length: blob.size }]);
      await checkSeveral([
        { offset: 0, length: 1 },
        { offset: 5, length: 0 },
        { offset: 5, length: 1 },
        { offset: blob.size - 1, length: 1 },
        { offset: blob.size, length: 0 },
      ]);
    });

    test('several ranges come in the order in which they were given', async () => {
      const ranges = [900_000, 100_000, 500_000, 300_000].map((offset) => ({ offset, length: 60_000 }));
      assert.deepEqual([...(await readSeveral(ranges)).keys()], [0, 1, 2, 3]);
      await checkSeveral(ranges);
    });

    test('more ranges than fit into one request are all read', async () => {
      await checkSeveral(Array.from({ length: 200 }, (_, i) => ({ offset: i * 15_000, length: 700 + i })));
    });

    test('several ranges of which one is outside of the blob, or that overlap, are refused before anything is asked for', async () => {
      const { requests } = repository.traffic;
      const first = { offset: 10, length: 10 };
      for (const second of [
        { offset: blob.size, length: 1 },
        { offset: 19, length: 5 },
        { offset: 5, length: 6 },
        { offset: 30, length: -1 },
      ]) {
        await assert.rejects(readSeveral([first, second]), withCode('INVALID_ARGUMENT'));
      }
      assert.equal(repository.traffic.requests, requests);
    });

    test('several ranges of a blob that is not there are REGISTRY_NOT_FOUND, and an aborted call is CANCELLED', async () => {
      const ranges = [
        { offset: 0, length: 2 },
        { offset: 5, length: 2 },
      ];
      const missing = { digest: digestOf('nobody has this'), size: 10 };
      const never = () => assert.fail('nothing is told');
      await assert.rejects(repository.readRanges(missing, ranges, soon(), never), withCode('REGISTRY_NOT_FOUND'));
      await assert.rejects(repository.readRanges(blob, ranges, AbortSignal.abort(), never), withCode('CANCELLED'));
    });

    test('what is thrown where a part is told ends the call', async () => {
      const ranges = [
        { offset: 0, length: 2 },
        { offset: 50_000, length: 2 },
      ];
      const refuse = () => {
        throw new RangeError('enough');
      };
      await assert.rejects(repository.readRanges(blob, ranges, soon(), refuse), RangeError);
      await checkSeveral(ranges);
    });

    test('the whole blob streams and is counted', async () => {
      const before = repository.traffic.bytes;
      const got = await collect(repository.readAll(blob, soon()));
      assert.ok(got.equals(bytes));
      assert.equal(repository.traffic.bytes - before, blob.size);
    });

    test('a part of the blob streams', async () => {
      const got = await collect(repository.streamRange(blob, { offset: 1000, length: 2_000_000 }, soon()));
      assert.ok(got.equals(bytes.subarray(1000, 2_001_000)));
    });

    test('a stream that is left early does not disturb the next one', async () => {
      for await (const chunk of repository.readAll(blob, soon())) {
        assert.ok(chunk.length > 0);
        break;
      }
      assert.equal((await collect(repository.readAll(blob, soon()))).length, blob.size);
    });

    test('a descriptor with another size than the blob never gives bytes as if it were right', async () => {
      for (const size of [blob.size - 1, blob.size + 1]) {
        await assert.rejects(collect(repository.readAll({ ...blob, size }, soon())), withCode('REGISTRY_PROTOCOL'));
      }
    });

    test('a damaged blob ends its stream with DIGEST_MISMATCH', async () => {
      const damaged = randomBytes(100_000);
      const digest = digestOf(damaged);
      await repository.putBlob(digest, damaged, soon());
      await subject.corrupt(digest, 99_999);
      await assert.rejects(
        collect(repository.readAll({ digest, size: damaged.length }, soon())),
        withCode('DIGEST_MISMATCH'),
      );
    });

    test('a blob that is not there is REGISTRY_NOT_FOUND', async () => {
      const missing = { digest: digestOf('nobody has this'), size: 10 };
      const range = { offset: 0, length: 5 };
      await assert.rejects(repository.readRange(missing, range, soon()), withCode('REGISTRY_NOT_FOUND'));
      await assert.rejects(collect(repository.readAll(missing, soon())), withCode('REGISTRY_NOT_FOUND'));
      assert.equal(await repository.hasBlob(missing.digest, soon()), false);
      assert.equal(await repository.hasBlob(blob.digest, soon()), true);
    });

    test('a blob whose size nobody told is read whole, unless it is too large', async () => {
      const whole = await collect(repository.readAll(blob, soon()));
      assert.ok((await repository.readBlob(blob.digest, blob.size, soon())).equals(whole));
      await assert.rejects(repository.readBlob(blob.digest, blob.size - 1, soon()), withCode('REGISTRY_PROTOCOL'));
      await assert.rejects(repository.readBlob(digestOf('not here'), 10, soon()), withCode('REGISTRY_NOT_FOUND'));
    });

    test('an aborted call is CANCELLED, an expired one DEADLINE', async () => {
      const range = { offset: 0, length: 5 };
      await assert.rejects(repository.readRange(blob, range, AbortSignal.abort()), withCode('CANCELLED'));
      await assert.rejects(collect(repository.readAll(blob, AbortSignal.abort())), withCode('CANCELLED'));
      await assert.rejects(repository.getManifest('any', AbortSignal.abort()), withCode('CANCELLED'));
      const expired = AbortSignal.abort(new DOMException('late', 'TimeoutError'));
      await assert.rejects(repository.readRange(blob, range, expired), withCode('DEADLINE'));
    });

    test('a stream that is aborted in the middle ends with CANCELLED', async () => {
      const controller = new AbortController();
      const read = async () => {
        for await (const chunk of repository.readAll(blob, controller.signal)) {
          assert.ok(chunk.length > 0);
          controller.abort();
        }
      };
      await assert.rejects(read(), withCode('CANCELLED'));
    });

    test('a blob is stored only under its own digest', async () => {
      const wrong = repository.putBlob(digestOf('something else'), Buffer.from('this'), soon());
      await assert.rejects(wrong, withCode('DIGEST_MISMATCH'));
      assert.equal(await repository.hasBlob(digestOf('something else'), soon()), false);
    });

    const manifestOf = (fields: object) =>
      Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType: MANIFEST,
          config: { mediaType: 'application/vnd.oci.empty.v1+json', digest: digestOf(EMPTY), size: 2 },
          layers: [{ mediaType: 'application/octet-stream', digest: blob.digest, size: blob.size }],
          ...fields,
        }),
      );

    test('a manifest comes back byte for byte, by tag and by digest', async () => {
      const manifest = manifestOf({ annotations: { odd: ' spacing  stays ' } });
      const digest = digestOf(manifest);
      await repository.putManifest('v1.0', MANIFEST, manifest, soon());
      for (const name of ['v1.0', digest]) {
        const got = await repository.getManifest(name, soon());
        assert.deepEqual({ ...got }, { digest, mediaType: MANIFEST, bytes: manifest });
      }
      await assert.rejects(repository.getManifest('v9', soon()), withCode('REGISTRY_NOT_FOUND'));
      await assert.rejects(repository.getManifest(digestOf('no'), soon()), withCode('REGISTRY_NOT_FOUND'));
    });

    test('a tag moves to the manifest pushed last', async () => {
      const [one, two] = [manifestOf({ annotations: { n: '1' } }), manifestOf({ annotations: { n: '2' } })];
      await repository.putManifest('moving', MANIFEST, one, soon());
      await repository.putManifest('moving', MANIFEST, two, soon());
      assert.equal((await repository.getManifest('moving', soon())).digest, digestOf(two));
      assert.equal((await repository.getManifest(digestOf(one), soon())).digest, digestOf(one));
    });

    test('a manifest is stored only under its own digest', async () => {
      const push = repository.putManifest(digestOf('other'), MANIFEST, manifestOf({}), soon());
      await assert.rejects(push, withCode('DIGEST_MISMATCH'));
    });

    test('referrers of a manifest are found by artifact type, with or without the referrers API', async () => {
      const image = manifestOf({ annotations: { role: 'subject' } });
      const digest = digestOf(image);
      await repository.putManifest('subject', MANIFEST, image, soon());
      assert.deepEqual(await repository.referrers(digest, 'application/x.one', soon()), []);
      const expected = new Map<string, object[]>();
      for (const artifactType of ['application/x.one', 'application/x.two']) {
        const about = { mediaType: MANIFEST, digest, size: image.length };
        const referrer = manifestOf({ artifactType, subject: about });
        const own = { mediaType: MANIFEST, digest: digestOf(referrer), size: referrer.length };
        const { subjectKnown } = await repository.putManifest(own.digest, MANIFEST, referrer, soon());
        if (!subjectKnown) await addReferrerTag(repository, digest, { ...own, artifactType }, soon());
        expected.set(artifactType, [own]);
      }
      for (const [artifactType, found] of expected) {
        assert.deepEqual(await repository.referrers(digest, artifactType, soon()), found);
      }
      assert.deepEqual(await repository.referrers(digest, 'application/x.three', soon()), []);
    });
  });
}
