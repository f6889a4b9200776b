import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { crc32, gunzipSync, gzipSync, zstdCompressSync } from 'node:zlib';
import { digestFromBytes, digestOf } from '../../../src/digest.ts';
import { DedupError, type ErrorCode } from '../../../src/errors.ts';
import type { BuiltIndex } from '../../../src/fs/index/builder.ts';
import type { IndexedPiece } from '../../../src/fs/index/chunker.ts';
import { decodeLayerIndex, encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { EntryType } from '../../../src/fs/index/layer-index.ts';
import { RestartReader, WindowCache } from '../../../src/fs/index/restart-reader.ts';
import { native } from '../../../src/fs/native.ts';
import { KiB, MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import { noise } from '../../support/gzip-streams.ts';
import { chunkFromTar, rebuildTar } from '../../support/rebuild-tar.ts';
import { tarOf } from '../../support/tar.ts';

const run = promisify(execFile);
const dir = await mkdtemp(join(tmpdir(), 'builder-'));
after(() => rm(dir, { recursive: true, force: true }));

/** Bytes that compress, but not to nothing. */
function prose(length: number, seed: number): Buffer {
  const words = Array.from({ length: 400 }, (_, i) => `${((i + 1) * seed * 2_654_435_761) % 1e9} `);
  let state = seed;
  const parts: string[] = [];
  for (let have = 0; have < length; have += parts.at(-1)!.length) {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648;
    parts.push(words[state % words.length]!);
  }
  return Buffer.from(parts.join('').slice(0, length));
}

const TAR = tarOf([
  { name: 'etc/', type: 'dir' },
  { name: 'etc/one', content: 'one\n' },
  { name: 'empty' },
  { name: 'large', content: prose(9 * MiB + 77, 3) },
  { name: 'exactly-a-piece', content: prose(MiB, 5) },
  { name: 'zeros', content: Buffer.alloc(5 * MiB + 3) },
  { name: 'exactly-a-chunk', content: prose(4 * MiB, 7) },
  { name: 'hard', type: 'hardlink', linkname: 'etc/one' },
  { name: 'random', content: noise(300_000) },
  { name: 'attributes', content: 'x', xattrs: { 'user.b': 'B', 'user.a': 'A' } },
  { name: 'same-attributes', content: 'x', xattrs: { 'user.a': 'A', 'user.b': 'B' } },
]);

/** Every promise of an index about the bytes of its layer. */
function holds(built: BuiltIndex, tar: Buffer): void {
  const { index } = built;
  assert.equal(index.diffId, digestOf(tar));
  assert.equal(index.tarBytes, tar.length);
  const { chunks } = index;
  for (let i = 0; i < chunks.count; i++) {
    const bytes = chunkFromTar(index, tar, i);
    assert.equal(chunks.zero[i] === 1, !bytes.some((byte) => byte !== 0), `zero mark of chunk ${i}`);
    const pieces: Buffer[] = [];
    for (let at = 0; at < bytes.length; at += index.pieceBytes) {
      pieces.push(
        createHash('sha256')
          .update(bytes.subarray(at, at + index.pieceBytes))
          .digest(),
      );
    }
    const from = chunks.pieceStart[i]!;
    assert.equal(chunks.pieceStart[i + 1]! - from, pieces.length);
    assert.deepEqual(
      Buffer.from(chunks.pieceDigest.subarray(from * 32, (from + pieces.length) * 32)),
      Buffer.concat(pieces),
    );
    const name = pieces.length === 1 ? pieces[0]! : createHash('sha256').update(Buffer.concat(pieces)).digest();
    assert.deepEqual(Buffer.from(chunks.digest.subarray(i * 32, i * 32 + 32)), name, `name of chunk ${i}`);
  }
  const rebuilt = rebuildTar(index, built.restartBlob, (i) => chunkFromTar(index, tar, i));
  assert.equal(digestOf(rebuilt), index.diffId, 'framing and chunks are the whole tar');
  assert.equal(digestOf(built.restartBlob), index.restart.digest);
  assert.deepEqual(decodeLayerIndex(built.indexBlob), index, 'what is decoded is what was built');
  assert.ok(encodeLayerIndex(decodeLayerIndex(built.indexBlob)).equals(built.indexBlob));
}

function fails(promise: Promise<unknown>, code: ErrorCode, what = /./): Promise<void> {
  return assert.rejects(promise, (error: unknown) => {
    assert.ok(error instanceof DedupError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, what);
    return true;
  });
}

/** zstd frames of `size` uncompressed bytes each. */
function frames(bytes: Buffer, size: number): Buffer {
  const parts: Buffer[] = [];
  for (let at = 0; at < bytes.length; at += size) parts.push(zstdCompressSync(bytes.subarray(at, at + size)));
  return Buffer.concat(parts);
}

const skippable = Buffer.concat([Buffer.from([0x5a, 0x2a, 0x4d, 0x18, 100, 0, 0, 0]), Buffer.alloc(100, 9)]);

/** A tar of one file of letters whose gzip is a single deflate block (RFC 1951 §3.2.6), with nowhere to restart. */
function oneBlockGzip(fileBytes: number): Buffer {
  const tar = tarOf([{ name: 'letters', content: Buffer.alloc(fileBytes, 'x') }]);
  const bits: number[] = [];
  const out: Buffer[] = [];
  const put = (value: number, count: number, msbFirst: boolean): void => {
    for (let i = 0; i < count; i++) bits.push((value >> (msbFirst ? count - 1 - i : i)) & 1);
    if (bits.length < 65_536) return;
    const whole = bits.splice(0, bits.length - (bits.length % 8));
    out.push(packed(whole));
  };
  const packed = (list: number[]): Buffer => {
    const bytes = Buffer.alloc(Math.ceil(list.length / 8));
    for (const [i, bit] of list.entries()) bytes[i >> 3]! |= bit << (i & 7);
    return bytes;
  };
  const literal = (byte: number): void => (byte < 144 ? put(0x30 + byte, 8, true) : put(0x190 + byte - 144, 9, true));
  put(1, 1, false);
  put(1, 2, false);
  let at = 0;
  while (at < tar.length) {
    const repeats = at > 0 && at + 258 <= tar.length && tar[at - 1] === tar[at] && tar[at + 257] === tar[at];
    if (repeats && tar.subarray(at, at + 258).equals(tar.subarray(at - 1, at + 257))) {
      put(0b11000101, 8, true);
      put(0, 5, true);
      at += 258;
    } else {
      literal(tar[at++]!);
    }
  }
  put(0, 7, true);
  out.push(packed(bits));
  const trailer = Buffer.alloc(8);
  trailer.writeUInt32LE(crc32(tar), 0);
  trailer.writeUInt32LE(tar.length, 4);
  return Buffer.concat([Buffer.from([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]), ...out, trailer]);
}

describe('the index builder', () => {
  const layers: Record<string, [Buffer, 'none' | 'gzip' | 'zstd']> = {
    'an uncompressed layer': [TAR, 'none'],
    'a gzip layer': [gzipSync(TAR), 'gzip'],
    'a gzip layer of several members': [
      Buffer.concat([
        gzipSync(TAR.subarray(0, 3_000_000)),
        gzipSync(Buffer.alloc(0)),
        gzipSync(TAR.subarray(3_000_000)),
      ]),
      'gzip',
    ],
    'a gzip layer of stored blocks': [gzipSync(TAR, { level: 0 }), 'gzip'],
    'a zstd layer of 100 KB frames': [frames(TAR, 100_000), 'zstd'],
    'a zstd layer with skippable frames around its frames': [
      Buffer.concat([
        skippable,
        frames(TAR.subarray(0, 5 * MiB), 3 * MiB),
        skippable,
        frames(TAR.subarray(5 * MiB), MiB),
        skippable,
      ]),
      'zstd',
    ],
  };
  for (const [title, [layer, compression]] of Object.entries(layers)) {
    test(`accounts for every byte of ${title}, and gives the same bytes for any buffers`, async () => {
      const built = await indexOf(layer);
      assert.equal(built.index.compression, compression);
      holds(built, TAR);
      for (const bufferBytes of [1000, 1_000_003]) {
        const again = await indexOf(layer, { bufferBytes });
        assert.ok(again.indexBlob.equals(built.indexBlob), `index with buffers of ${bufferBytes}`);
        assert.ok(again.restartBlob.equals(built.restartBlob), `restart blob with buffers of ${bufferBytes}`);
      }
      await restarts(built, layer);
    });
  }

  /** Decompresses every span on its own, from its restart point. */
  async function restarts(built: BuiltIndex, layer: Buffer): Promise<void> {
    const { spans, tarBytes, compression } = built.index;
    assert.ok(spans.count > 5, `${spans.count} spans`);
    const local = join(dir, 'restart');
    await writeFile(local, built.restartBlob);
    const reader = new RestartReader(built.index, local, new WindowCache(MiB));
    const notLocal = () => assert.fail('not local');
    const nowhere = { readRange: notLocal, readRanges: notLocal, readAll: notLocal };
    for (let i = 0; i < spans.count; i++) {
      const end = i + 1 < spans.count ? spans.outOffset[i + 1]! : tarBytes;
      const inEnd = i + 1 < spans.count ? spans.inOffset[i + 1]! : layer.length;
      const lead = spans.bits[i]! > 0 ? 1 : 0;
      const from = spans.inOffset[i]! - lead;
      const [window] = await reader.readWindows(i, 1, nowhere, AbortSignal.timeout(5000));
      const output = await native().decodeSpans({
        compression,
        input: layer.subarray(from, inEnd),
        spans: [
          {
            inputOffset: lead,
            bits: spans.bits[i]!,
            memberStart: spans.memberStart[i] === 1,
            window: window!,
            outputOffset: 0,
            outputLength: end - spans.outOffset[i]!,
          },
        ],
        outputLength: end - spans.outOffset[i]!,
      });
      assert.ok(output.equals(TAR.subarray(spans.outOffset[i]!, end)), `span ${i}`);
    }
  }

  test('describes members, files and shared attribute sets', async () => {
    const { entries } = (await indexOf(TAR)).index;
    const of = (name: string): number => entries.name.indexOf(name);
    assert.equal(entries.count, 11);
    assert.equal(entries.type[of('etc')], EntryType.directory);
    assert.equal(entries.link[of('hard')], 'etc/one');
    assert.deepEqual([entries.size[of('large')], entries.chunkCount[of('large')]], [9 * MiB + 77, 3]);
    assert.deepEqual([entries.size[of('empty')], entries.chunkCount[of('empty')]], [0, 0]);
    assert.equal(entries.xattrSets.length, 1);
    assert.equal(entries.xattrSet[of('attributes')], entries.xattrSet[of('same-attributes')]);
    assert.equal(entries.xattrSet[of('etc')], 0xffff_ffff);
  });

  test('puts a span about every mebibyte, and groups small zstd frames into one', async () => {
    for (const layer of [TAR, gzipSync(TAR), frames(TAR, 50_000)]) {
      const { spans } = (await indexOf(layer)).index;
      assert.ok(spans.count >= TAR.length / (2 * MiB) && spans.count <= TAR.length / MiB + 2, `${spans.count} spans`);
    }
  });

  test('reads real sparse files in every format of GNU tar', async () => {
    const file = join(dir, 'sparse');
    await writeFile(file, prose(10_000, 1));
    await truncate(file, 9 * MiB + 5);
    const handle = await import('node:fs/promises').then((fs) => fs.open(file, 'r+'));
    await handle.write(prose(200_000, 2), 0, 200_000, 4 * MiB - 50_000);
    await handle.close();
    await writeFile(join(dir, 'hole'), '');
    await truncate(join(dir, 'hole'), 5 * MiB + 1);
    await writeFile(join(dir, 'after'), 'after');
    const plain = createHash('sha256')
      .update(await readFile(file))
      .digest('hex');
    for (const format of [
      ['--format=gnu'],
      ['--format=pax'],
      ['--format=pax', '--sparse-version=0.1'],
      ['--format=pax', '--sparse-version=0.0'],
    ]) {
      const out = join(dir, 'sparse.tar');
      await run('tar', ['-S', ...format, '-C', dir, '-cf', out, 'sparse', 'hole', 'after']);
      const tar = await readFile(out);
      assert.ok(tar.length < 2 * MiB, 'GNU tar wrote it as sparse');
      const built = await indexOf(tar);
      holds(built, tar);
      const { entries, chunks } = built.index;
      const first = entries.firstChunk[entries.name.indexOf('sparse')]!;
      const content = createHash('sha256');
      for (let i = first; i < first + 3; i++) content.update(chunkFromTar(built.index, tar, i));
      assert.equal(content.digest('hex'), plain, format.join(' '));
      const hole = entries.firstChunk[entries.name.indexOf('hole')]!;
      assert.deepEqual([...chunks.zero.subarray(hole, hole + 2)], [1, 1]);
      assert.deepEqual([...chunks.tarOffset.subarray(hole, hole + 2)], [0, 0]);
    }
  });

  test('hands out every whole piece with its digest, and waits for who takes it', async () => {
    const taken: IndexedPiece[] = [];
    let waiting = 0;
    const built = await indexOf(gzipSync(TAR), {
      onPiece: async (piece) => {
        assert.equal(digestFromBytes(piece.digest), digestOf(Buffer.concat(piece.parts)));
        taken.push(piece);
        waiting++;
        await new Promise((resolve) => setTimeout(resolve, 1));
        waiting--;
      },
    });
    assert.equal(waiting, 0);
    const { chunks } = built.index;
    const seen = new Set(taken.map(({ chunk, piece }) => chunks.pieceStart[chunk]! + piece));
    for (let i = 0; i < chunks.count; i++) {
      if (chunks.zero[i] === 1) continue;
      for (let piece = chunks.pieceStart[i]!; piece < chunks.pieceStart[i + 1]!; piece++) assert.ok(seen.has(piece));
    }
    for (const { chunk, piece, digest } of taken) {
      const at = (chunks.pieceStart[chunk]! + piece) * 32;
      assert.ok(digest.equals(chunks.pieceDigest.subarray(at, at + 32)));
    }
  });

  test('gives the same blobs whether memory is used again or pieces are handed out, sudden zeros in between', async () => {
    const tar = tarOf([
      { name: 'many', content: noise(1.5 * MiB) },
      { name: 'zeros', content: Buffer.alloc(20 * MiB) },
      ...Array.from({ length: 300 }, (_, i) => ({ name: `small${i}`, content: noise(i * 7) })),
      { name: 'last', content: Buffer.concat([noise(2 * MiB), Buffer.alloc(5 * MiB), noise(10)]) },
    ]);
    const layer = gzipSync(tar);
    const reused = await indexOf(layer);
    holds(reused, tar);
    const kept: { readonly bytes: Buffer; readonly digest: Buffer }[] = [];
    const handedOut = await indexOf(layer, {
      onPiece: (piece) => {
        kept.push({ bytes: Buffer.concat(piece.parts), digest: piece.digest });
        return undefined;
      },
    });
    assert.ok(handedOut.indexBlob.equals(reused.indexBlob));
    assert.ok(handedOut.restartBlob.equals(reused.restartBlob));
    assert.ok(kept.length > 300);
    for (const { bytes, digest } of kept) assert.equal(digestFromBytes(digest), digestOf(bytes));
  });

  test('indexes layers of nothing', async () => {
    for (const layer of [
      Buffer.alloc(0),
      gzipSync(Buffer.alloc(0)),
      Buffer.alloc(1024),
      gzipSync(Buffer.alloc(1024)),
    ]) {
      const built = await indexOf(layer);
      assert.equal(built.index.entries.count, 0);
      assert.deepEqual(decodeLayerIndex(built.indexBlob), built.index);
    }
  });

  test('refuses a layer whose bytes are not what its descriptor says', async () => {
    const layer = gzipSync(TAR.subarray(0, 100 * KiB));
    const whole = gzipSync(tarOf([{ name: 'a', content: 'b' }]));
    await fails(indexOf(whole, { layerDigest: digestOf('other') }), 'DIGEST_MISMATCH');
    await fails(indexOf(whole, { layerBytes: whole.length + 1 }), 'DIGEST_MISMATCH');
    await fails(indexOf(whole, { layerBytes: whole.length - 1 }), 'DIGEST_MISMATCH');
    await fails(indexOf(layer), 'LAYER_INVALID', /cut off/);
    const damaged = Buffer.from(gzipSync(TAR));
    damaged.fill(0x55, 50_000, 50_100);
    await fails(indexOf(damaged, { layerDigest: digestOf(gzipSync(TAR)), bufferBytes: 9000 }), 'DIGEST_MISMATCH');
  });

  test('refuses damaged, truncated and foreign streams with LAYER_INVALID', async () => {
    const good = gzipSync(TAR);
    const flipped = Buffer.from(good);
    flipped[good.length >> 1]! ^= 0x55;
    const zstd = frames(TAR, MiB);
    const brokenZstd = Buffer.from(zstd);
    brokenZstd.fill(0x55, 3000, 3100);
    const bad: Record<string, Buffer> = {
      'a flipped byte': flipped,
      'a truncated gzip stream': good.subarray(0, good.length - 5),
      'garbage after gzip': Buffer.concat([good, Buffer.from('garbage')]),
      'a truncated zstd frame': zstd.subarray(0, zstd.length - 7),
      'a damaged zstd frame': brokenZstd,
      'garbage after zstd': Buffer.concat([zstd, Buffer.from('not a frame')]),
      'a tar that is none': Buffer.alloc(5000, 0x41),
    };
    for (const [title, layer] of Object.entries(bad)) {
      await assert.rejects(
        indexOf(layer),
        (error: unknown) => error instanceof DedupError && error.code === 'LAYER_INVALID',
        title,
      );
    }
  });

  test('says that zstd in one large frame cannot be loaded lazily, without reading it whole', async () => {
    const big = Buffer.concat([TAR.subarray(0, TAR.length - 1024), TAR]);
    await fails(indexOf(zstdCompressSync(big)), 'LAYER_NOT_LAZY', /without frames/);
    let read = 0;
    const layer = zstdCompressSync(Buffer.alloc(64 * MiB, 'x'));
    await fails(
      indexOf(layer, { bufferBytes: 512, onProgress: (bytes) => (read = bytes) }),
      'LAYER_NOT_LAZY',
      /67108864/,
    );
    assert.ok(read <= 1024, `${read} bytes read`);
  });

  test('says that gzip without block boundaries cannot be loaded lazily', async () => {
    const small = oneBlockGzip(10_000);
    assert.equal(gunzipSync(small).length, 512 + 10_240 + 1024);
    await fails(indexOf(oneBlockGzip(70 * MiB)), 'LAYER_NOT_LAZY', /no place to restart/);
  });

  test('takes a layer that inflates a thousandfold without holding it in memory', async () => {
    const tar = tarOf([{ name: 'bomb', content: Buffer.alloc(300 * MiB) }]);
    const layer = gzipSync(tar, { level: 9 });
    const before = process.memoryUsage().rss;
    let most = 0;
    const { index } = await indexOf(layer, {
      bufferBytes: 16 * KiB,
      onProgress: () => (most = Math.max(most, process.memoryUsage().rss - before)),
    });
    assert.equal(index.tarBytes, tar.length);
    assert.ok(index.chunks.zero.every((zero) => zero === 1));
    assert.ok(index.spans.count > 30);
    assert.ok(most < 300 * MiB, `${most} bytes more`);
  });

  test('stops when told to', async () => {
    const abort = new AbortController();
    const layer = gzipSync(TAR);
    await fails(
      indexOf(layer, {
        bufferBytes: 10_000,
        signal: abort.signal,
        onProgress: (bytes) => {
          if (bytes > 500_000) abort.abort(new Error('enough'));
        },
      }),
      'CANCELLED',
    );
  });

  test('passes on what the stream throws', async () => {
    async function* broken(): AsyncGenerator<Buffer> {
      yield gzipSync(TAR).subarray(0, 200_000);
      throw new DedupError('REGISTRY_HTTP', 'reset');
    }
    await fails(indexOf(gzipSync(TAR), { stream: broken() }), 'REGISTRY_HTTP', /reset/);
  });

  test('keeps index and restart points of a real directory tree within their goals', async () => {
    const out = join(dir, 'real.tar');
    await run('tar', ['-C', '/usr/lib', '-cf', out, 'python3.11']);
    const tar = await readFile(out);
    const layer = gzipSync(tar, { level: 6 });
    const built = await indexOf(layer);
    holds(built, tar);
    const percent = (part: number): number => (100 * part) / layer.length;
    assert.ok(percent(built.indexBlob.length) <= 1, `index ${percent(built.indexBlob.length)} %`);
    assert.ok(percent(built.restartBlob.length) <= 4, `restart ${percent(built.restartBlob.length)} %`);
  });
});
