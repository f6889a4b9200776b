import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { gzipSync, zstdCompressSync, zstdDecompressSync } from 'node:zlib';
import fc from 'fast-check';
import { DedupError } from '../../../src/errors.ts';
import { decodeLayerIndex, encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { HEADER_BYTES, SECTION_BYTES, SECTION_NAMES, type SectionName } from '../../../src/fs/index/format-limits.ts';
import { WireWriter } from '../../../src/fs/index/wire.ts';
import { MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import { noise } from '../../support/gzip-streams.ts';
import { tarOf } from '../../support/tar.ts';

const sparse = (map: string, size: number) => ({ 'GNU.sparse.map': map, 'GNU.sparse.size': String(size) });
const TAR = tarOf([
  { name: './', type: 'dir' },
  { name: 'a', content: noise(1000) },
  { name: 'ab', content: noise(2 * MiB + 9), xattrs: { 'user.x': 'y' } },
  { name: 'link', type: 'symlink', linkname: 'a' },
  { name: 'hard', type: 'hardlink', linkname: 'a' },
  { name: 'dev', type: 'char', devmajor: 1, devminor: 3 },
  { name: 'zeros', content: Buffer.alloc(5 * MiB) },
  { name: 'sparse', content: noise(1500), pax: sparse('512,1000,5000000,500', 6_000_000) },
  { name: 'last', content: 'last' },
]);
const GZIP = gzipSync(TAR);
const built = await indexOf(GZIP);
const blob = built.indexBlob;
const plain = (await indexOf(TAR)).indexBlob;

function refused(bytes: Buffer, field: string): void {
  assert.throws(
    () => decodeLayerIndex(bytes),
    (error: unknown) => {
      assert.ok(error instanceof DedupError, String(error));
      assert.equal(error.code, 'INDEX_INVALID', error.message);
      assert.ok(error.message.includes(field), `${error.message} names ${field}`);
      return true;
    },
  );
}

/** Offsets of numbers in the header. */
const AT = {
  version: 8,
  features: 12,
  layerBytes: 112,
  tarBytes: 120,
  restartSize: 128,
  framingLength: 136,
  compression: 144,
  spanBytes: 148,
  chunkBytes: 152,
  pieceBytes: 156,
  entryCount: 160,
  fileCount: 164,
  chunkCount: 168,
  zeroCount: 172,
  fragmentCount: 176,
  spanCount: 180,
  xattrSetCount: 184,
  reserved: 188,
} as const;

function withNumber(at: number, value: number, from = blob): Buffer {
  const bytes = Buffer.from(from);
  bytes.writeUInt32LE(value, at);
  return bytes;
}

function withU64(at: number, value: bigint): Buffer {
  const bytes = Buffer.from(blob);
  bytes.writeBigUInt64LE(value, at);
  return bytes;
}

/** The sections of a blob, decompressed. */
function sections(from: Buffer): Record<SectionName, Buffer> {
  const result: Partial<Record<SectionName, Buffer>> = {};
  let at = HEADER_BYTES + SECTION_NAMES.length * SECTION_BYTES;
  for (const [i, name] of SECTION_NAMES.entries()) {
    const row = HEADER_BYTES + i * SECTION_BYTES;
    const stored = Number(from.readBigUInt64LE(row + 8));
    const bytes = from.subarray(at, at + stored);
    result[name] = from.readUInt32LE(row + 4) === 1 ? zstdDecompressSync(bytes) : Buffer.from(bytes);
    at += stored;
  }
  return result as Record<SectionName, Buffer>;
}

/** Puts a blob together from a header and raw sections. */
function assemble(from: Buffer, change: Partial<Record<SectionName, Buffer>>, compress = false): Buffer {
  const parts = { ...sections(from), ...change };
  const header = Buffer.from(from.subarray(0, HEADER_BYTES + SECTION_NAMES.length * SECTION_BYTES));
  const bodies = SECTION_NAMES.map((name, i) => {
    const row = HEADER_BYTES + i * SECTION_BYTES;
    const body = compress ? zstdCompressSync(parts[name]) : parts[name];
    header.writeUInt32LE(compress ? 1 : 0, row + 4);
    header.writeBigUInt64LE(BigInt(body.length), row + 8);
    header.writeBigUInt64LE(BigInt(parts[name].length), row + 16);
    return body;
  });
  return Buffer.concat([header, ...bodies]);
}

function written(write: (out: WireWriter) => void): Buffer {
  const out = new WireWriter();
  write(out);
  return Buffer.from(out.bytes());
}

describe('the layer index format', () => {
  test('decodes to what was encoded, and encodes that to the same bytes', () => {
    const index = decodeLayerIndex(blob);
    assert.deepEqual(index, built.index);
    assert.ok(encodeLayerIndex(index).equals(blob));
    assert.deepEqual(decodeLayerIndex(assemble(blob, {})), index, 'however its sections are stored');
    assert.deepEqual(decodeLayerIndex(assemble(blob, {}, true)), index);
  });

  test('decodes chunks and spans without the entries when asked to', () => {
    const part = decodeLayerIndex(blob, { parts: 'chunks' });
    assert.equal(part.entries.count, 0);
    assert.deepEqual(part.chunks, built.index.chunks);
    assert.deepEqual(part.spans, built.index.spans);
  });

  test('refuses a blob cut off anywhere', () => {
    for (let length = 0; length < blob.length; length += length < 400 ? 1 : 997) refused(blob.subarray(0, length), '');
    refused(Buffer.concat([blob, Buffer.from([0])]), 'too many');
  });

  describe('refuses, naming the field,', () => {
    const cases: Record<string, [Buffer, string]> = {
      'another magic': [withNumber(0, 1), 'header.magic'],
      'a later version': [withNumber(AT.version, 2), 'header.version'],
      'unknown feature flags': [withNumber(AT.features, 4), 'header.features'],
      'reserved bytes in use': [withNumber(AT.reserved, 1), 'header.reserved'],
      'an unknown compression': [withNumber(AT.compression, 3), 'header.compression'],
      'a layer above 8 TiB': [withU64(AT.layerBytes, (1n << 43n) << 1n), 'header.layerBytes'],
      'a size above 2^53': [withU64(AT.tarBytes, (1n << 64n) - 1n), 'header.tarBytes'],
      'a tar that ends before its contents': [withU64(AT.tarBytes, 4096n), 'files.gap'],
      'framing longer than the restart blob': [withU64(AT.framingLength, 1n << 40n), 'header.framingLength'],
      'windows that do not fill the restart blob': [withU64(AT.restartSize, 1n << 30n), 'spans.windowLength'],
      'a chunk size that is no power of two': [withNumber(AT.chunkBytes, 5_000_000), 'header.chunkBytes'],
      'a chunk size of nothing': [withNumber(AT.chunkBytes, 0), 'header.chunkBytes'],
      'an absurd chunk size': [withNumber(AT.chunkBytes, 0x8000_0000), 'header.chunkBytes'],
      'pieces larger than chunks': [withNumber(AT.pieceBytes, 8 * MiB), 'header.pieceBytes'],
      'another chunk size than the files were cut to': [withNumber(AT.chunkBytes, 2 * MiB), 'header.chunkCount'],
      'another piece size than the digests are of': [withNumber(AT.pieceBytes, 2 * MiB), 'pieces'],
      'absurd counts of entries': [withNumber(AT.entryCount, 0xffff_ffff), 'header.entryCount'],
      'absurd counts of files': [withNumber(AT.fileCount, 0xffff_ffff), 'header.fileCount'],
      'absurd counts of chunks': [withNumber(AT.chunkCount, 0xffff_ffff), 'header.chunkCount'],
      'more chunks than there are digests for': [withNumber(AT.chunkCount, 1_000_000), 'header.chunkCount'],
      'absurd counts of zero chunks': [withNumber(AT.zeroCount, 0xffff_ffff), 'header.zeroCount'],
      'absurd counts of fragments': [withNumber(AT.fragmentCount, 0xffff_ffff), 'header.fragmentCount'],
      'more fragments than there are': [withNumber(AT.fragmentCount, 3), 'header.fragmentCount'],
      'fewer fragments than there are': [withNumber(AT.fragmentCount, 1), 'files.fragments'],
      'absurd counts of spans': [withNumber(AT.spanCount, 0xffff_ffff), 'header.spanCount'],
      'more spans than there are': [withNumber(AT.spanCount, 10_000_000), 'header.spanCount'],
      'no spans': [withNumber(AT.spanCount, 0), 'header.spanCount'],
      'fewer entries than there are': [withNumber(AT.entryCount, 8), 'entries'],
      'more entries than there are': [withNumber(AT.entryCount, 10), 'entries'],
      'more attribute sets than there are': [withNumber(AT.xattrSetCount, 2), 'entries.xattrs'],
      'fewer files than there are': [withNumber(AT.fileCount, 4), 'header.fragmentCount'],
      'an uncompressed layer of another size than its tar': [
        (() => {
          const bytes = Buffer.from(plain);
          bytes.writeBigUInt64LE(5n, AT.layerBytes);
          return bytes;
        })(),
        'header.tarBytes',
      ],
      'sections out of order': [withNumber(HEADER_BYTES, 1), 'sections.files'],
      'an unknown section encoding': [withNumber(HEADER_BYTES + 4, 7), 'sections.files'],
      'a section longer than the blob': [withU64(HEADER_BYTES + 8, 1n << 40n), 'sections.files'],
      'a section that promises terabytes': [withU64(HEADER_BYTES + 16, 1n << 42n), 'sections.files'],
      'a section that decompresses to less than promised': [
        withU64(HEADER_BYTES + 3 * SECTION_BYTES + 16, 100_000n),
        'sections.entries',
      ],
      'a section that decompresses to more than promised': [
        withU64(HEADER_BYTES + 3 * SECTION_BYTES + 16, 10n),
        'sections.entries',
      ],
      'a digest too many': [
        assemble(blob, { pieces: Buffer.concat([sections(blob).pieces, Buffer.alloc(32)]) }),
        'pieces',
      ],
      'a digest too few': [assemble(blob, { pieces: sections(blob).pieces.subarray(32) }), 'pieces'],
      'half a digest': [assemble(blob, { pieces: sections(blob).pieces.subarray(16) }), 'pieces'],
      'bytes after the entries': [
        assemble(blob, { entries: Buffer.concat([sections(blob).entries, Buffer.alloc(1)]) }),
        'entries',
      ],
      'bytes after the spans': [
        assemble(blob, { spans: Buffer.concat([sections(blob).spans, Buffer.alloc(1)]) }),
        'spans',
      ],
      'bytes after the files': [
        assemble(blob, { files: Buffer.concat([sections(blob).files, Buffer.alloc(1)]) }),
        'files',
      ],
    };
    for (const [title, [bytes, field]] of Object.entries(cases)) test(title, () => refused(bytes, field));

    test('one digest with two lengths', () => {
      const pieces = Buffer.from(sections(blob).pieces);
      // The first file's digest, of 1,000 bytes, is given to the last, of 4.
      pieces.copy(pieces, pieces.length - 32, 0, 32);
      refused(assemble(blob, { pieces }), 'one digest with two lengths');
    });

    /** A blob of one uncompressed file `x` with hand-made sections. */
    const one = async (
      change: Partial<Record<SectionName, (out: WireWriter) => void>>,
      counts: Partial<Record<keyof typeof AT, number>> = {},
    ) => {
      const small = (await indexOf(tarOf([{ name: 'x', content: 'content' }]))).indexBlob;
      let bytes = assemble(
        small,
        Object.fromEntries(Object.entries(change).map(([name, write]) => [name, written(write)])),
      );
      for (const [field, value] of Object.entries(counts))
        bytes = withNumber(AT[field as keyof typeof AT], value, bytes);
      return bytes;
    };
    const entry = (name: string, type = 0) => ({
      entries: (out: WireWriter) => {
        out.u8(type);
        for (const value of [0o644, 0, 0, 0, 0, 0, 0, name.length]) out.varint(value);
        out.latin1(name);
      },
    });

    test('a hand-made blob is accepted when nothing is wrong with it', async () => {
      assert.equal(decodeLayerIndex(await one(entry('good'))).entries.name[0], 'good');
    });

    for (const name of ['..', '.', 'a/../b', '/abs', 'a//b', 'a/', './a', 'nul\0', 'c'.repeat(256), '']) {
      test(`the name ${JSON.stringify(name.slice(0, 10))}`, async () =>
        refused(await one(entry(name)), 'entries.name'));
    }

    test('an unknown entry type', async () => refused(await one(entry('x', 8)), 'entries.type'));
    test('a directory in place of the file', async () => refused(await one(entry('x', 5)), 'entries.type'));

    test('a hard link that leaves the root', async () => {
      const entries = (out: WireWriter): void => {
        out.u8(0);
        out.u8(1);
        for (const value of [...new Array<number>(14).fill(0), 1, 1]) out.varint(value);
        out.latin1('xy');
        out.varint(4);
        out.latin1('../x');
      };
      refused(await one({ entries }, { entryCount: 2 }), 'entries.link');
    });

    test('a name that shares more than the one before it has', async () => {
      const entries = (out: WireWriter): void => {
        out.u8(0);
        for (const value of [0, 0, 0, 0, 0, 0, 5, 1]) out.varint(value);
        out.latin1('x');
      };
      refused(await one({ entries }), 'entries.namePrefix');
    });

    test('a file of absurd size', async () => {
      const files = (out: WireWriter): void => {
        out.varint(2 ** 42);
        out.varint(2);
      };
      refused(await one({ files }), 'files.gap');
    });

    test('contents that overlap', async () => {
      refused(
        await one({
          files: (out) => {
            out.varint(7);
            out.varint(0);
          },
        }),
        'files.gap',
      );
    });

    test('a number that is not in its shortest form', async () => {
      const files = (out: WireWriter): void => {
        for (const byte of [0x87, 0x00, 2]) out.u8(byte);
      };
      refused(await one({ files }), 'shortest');
    });

    test('a number without end', async () => {
      const files = (out: WireWriter): void => {
        for (let i = 0; i < 12; i++) out.u8(0xff);
      };
      refused(await one({ files }), 'files.size');
    });

    test('a span that starts behind the tar, or not at 0', async () => {
      const spans = (first: number, second: number) => (out: WireWriter) => {
        for (const value of [first, second, 0, 512]) out.varint(value);
        out.u8(0);
        out.u8(0);
        out.varint(0);
        out.varint(0);
      };
      refused(await one({ spans: spans(0, 1_000_000) }, { spanCount: 2 }), 'spans.outOffset');
      refused(await one({ spans: spans(1, 512) }, { spanCount: 2 }), 'spans.outOffset');
      refused(await one({ spans: spans(0, 0) }, { spanCount: 2 }), 'spans.outOffset');
      refused(await one({ spans: spans(0, 100) }, { spanCount: 2 }), 'spans.inOffset');
    });

    test('a window where none belongs', async () => {
      const spans = (out: WireWriter): void => {
        out.varint(0);
        out.varint(0);
        out.u8(0);
        out.varint(10);
      };
      refused(await one({ spans }), 'spans.windowLength');
    });

    test('zeros without end', async () => {
      const files = (out: WireWriter): void => {
        out.varint(7);
        out.varint(2);
        out.varint(0);
        out.varint(50);
      };
      refused(await one({ files, pieces: () => undefined }, { zeroCount: 1 }), 'files.zeroRun');
    });
  });

  test('a bomb of millions of entries in a few bytes is refused before memory is given for it', () => {
    const bytes = assemble(blob, { entries: Buffer.alloc(64 * MiB) }, true);
    assert.ok(bytes.length < MiB);
    const before = process.memoryUsage().rss;
    refused(withNumber(AT.entryCount, 1 << 24, bytes), 'header.entryCount');
    refused(withU64(HEADER_BYTES + 3 * SECTION_BYTES + 16, 1n << 35n), 'sections.entries');
    assert.ok(process.memoryUsage().rss - before < 200 * MiB);
  });

  test('any damage to any section gives an index or INDEX_INVALID, and nothing else', () => {
    const raw = sections(blob);
    const step = fc.record({
      section: fc.constantFrom(...SECTION_NAMES),
      at: fc.nat(),
      value: fc.integer({ min: 0, max: 255 }),
      cut: fc.integer({ min: 0, max: 40 }),
    });
    let good = 0;
    let bad = 0;
    fc.assert(
      fc.property(
        fc.array(step, { minLength: 1, maxLength: 4 }),
        fc.option(fc.tuple(fc.nat(), fc.nat(255))),
        (steps, header) => {
          const parts = { ...raw };
          for (const { section, at, value, cut } of steps) {
            const bytes = Buffer.from(parts[section]);
            if (bytes.length === 0) continue;
            bytes[at % bytes.length] = value;
            parts[section] = cut === 40 ? bytes.subarray(0, at % bytes.length) : bytes;
          }
          const damaged = assemble(blob, parts);
          if (header !== null) damaged[112 + (header[0] % (HEADER_BYTES - 112))] = header[1];
          try {
            const index = decodeLayerIndex(damaged);
            // What passes is consistent: it can be encoded and decoded again.
            assert.deepEqual(decodeLayerIndex(encodeLayerIndex(index)), index);
            good++;
          } catch (error) {
            if (!(error instanceof DedupError) || error.code !== 'INDEX_INVALID') throw error;
            bad++;
          }
        },
      ),
      { numRuns: 1500 },
    );
    assert.ok(good > 50 && bad > 50, `both outcomes were seen (${good}, ${bad})`);
  });

  test('random bytes behind a good start give INDEX_INVALID', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 0, maxLength: 600 }), fc.nat(300), (noiseBytes, keep) => {
        const bytes = Buffer.concat([blob.subarray(0, keep), noiseBytes]);
        assert.throws(
          () => decodeLayerIndex(bytes),
          (error: unknown) => error instanceof DedupError && error.code === 'INDEX_INVALID',
        );
      }),
      { numRuns: 1000 },
    );
  });
});
