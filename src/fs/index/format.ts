// Encoder and bounds-checked decoder of the index blob (docs/formats/layer-index.md). The decoder takes bytes from
// anyone: every count and length is checked against its section and a limit before memory is given for it, and what
// can be derived (chunk names, lengths, places) is derived instead of read. It does not check that the blob has the
// digest it was asked for by: discovery.ts does.
import { constants as zlibConstants, zstdCompressSync, zstdDecompressSync } from 'node:zlib';
import { type Digest, digestBytes, digestFromBytes } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import { buildChunkTable, countChunks, type FileExtents, fileExtents, paddedEnd } from './chunk-table.ts';
import { decodeEntries, emptyEntryTable, encodeEntries } from './entry-section.ts';
import {
  HEADER_BYTES,
  INDEX_MAGIC,
  INDEX_VERSION,
  MAX_CHUNK_BYTES,
  MAX_CHUNKS,
  MAX_ENTRIES,
  MAX_FRAGMENTS,
  MAX_INDEX_BYTES,
  MAX_PIECES,
  MAX_SECTION_BYTES,
  MAX_SPAN_BYTES,
  MAX_SPANS,
  MAX_TAR_BYTES,
  MAX_XATTR_SETS,
  MAX_ZERO_CHUNKS,
  MIN_CHUNK_BYTES,
  MIN_SPAN_BYTES,
  SECTION_BYTES,
  SECTION_NAMES,
  type SectionName,
} from './format-limits.ts';
import type { ChunkTable, Compression, LayerIndex } from './layer-index.ts';
import { decodeSpans, encodeSpans } from './span-section.ts';
import type { Fragment } from './tar-header.ts';
import { indexError, WireReader, WireWriter } from './wire.ts';

const COMPRESSIONS: readonly Compression[] = ['none', 'gzip', 'zstd'];
const ENCODING_RAW = 0;
const ENCODING_ZSTD = 1;
/** Level of sections; at 12 they are 3 % smaller and take twice as long. */
const SECTION_LEVEL = 9;

/** Entries that a blob of so many bytes may have: bounds what a bomb makes the decoder allocate. */
function maxEntries(blobBytes: number): number {
  return Math.min(MAX_ENTRIES, 1_048_576 + blobBytes * 64);
}

/** Encodes an index; the same index always gives the same bytes. Errors: LAYER_NOT_LAZY when it exceeds the format. */
export function encodeLayerIndex(index: LayerIndex): Buffer {
  const files = fileExtents(index.entries, index.chunks);
  const counts = { zero: 0, fragments: 0 };
  for (const value of index.chunks.zero) counts.zero += value;
  for (const fragments of files.sparse.values()) counts.fragments += fragments.length;

  const header = new WireWriter();
  header.raw(INDEX_MAGIC);
  header.u32(INDEX_VERSION);
  header.u32(0);
  header.raw(digestBytes(index.layerDigest));
  header.raw(digestBytes(index.diffId));
  header.raw(digestBytes(index.restart.digest));
  for (const size of [index.layerBytes, index.tarBytes, index.restart.size, index.restart.framingLength])
    header.u64(size);
  header.u32(COMPRESSIONS.indexOf(index.compression));
  for (const bytes of [index.spanBytes, index.chunkBytes, index.pieceBytes]) header.u32(bytes);
  header.u32(index.entries.count);
  header.u32(files.count);
  header.u32(index.chunks.count);
  header.u32(counts.zero);
  header.u32(counts.fragments);
  header.u32(index.spans.count);
  header.u32(index.entries.xattrSets.length);
  header.raw(Buffer.alloc(HEADER_BYTES - header.length));

  const raw: Record<SectionName, Buffer> = {
    files: encodeFiles(files, index.chunks.zero),
    pieces: storedPieces(index.chunks),
    spans: encodeSpans(index.spans, index.restart.framingLength),
    entries: section((out) => encodeEntries(index.entries, out)),
  };
  const bodies: Buffer[] = [];
  for (const name of SECTION_NAMES) {
    const body = raw[name];
    const packed = name === 'pieces' ? body : compress(body);
    const smaller = packed.length < body.length;
    const stored = smaller ? packed : body;
    header.u32(SECTION_NAMES.indexOf(name));
    header.u32(smaller ? ENCODING_ZSTD : ENCODING_RAW);
    header.u64(stored.length);
    header.u64(body.length);
    bodies.push(stored);
  }
  const blob = Buffer.concat([header.bytes(), ...bodies]);
  if (blob.length > MAX_INDEX_BYTES || index.entries.count > maxEntries(blob.length)) {
    throw new DedupError('LAYER_NOT_LAZY', `the index of layer ${index.layerDigest} exceeds the limits of its format`);
  }
  return blob;
}

function section(write: (out: WireWriter) => void): Buffer {
  const out = new WireWriter();
  write(out);
  return out.bytes();
}

function compress(bytes: Buffer): Buffer {
  return zstdCompressSync(bytes, { params: { [zlibConstants.ZSTD_c_compressionLevel]: SECTION_LEVEL } });
}

function encodeFiles(files: FileExtents, zero: Uint8Array): Buffer {
  return section((out) => {
    for (let i = 0; i < files.count; i++) out.varint(files.size[i]!);
    let end = 0;
    for (let i = 0; i < files.count; i++) {
      const sparse = files.sparse.get(i);
      out.varint(((files.base[i]! - end) / 512) * 2 + (sparse === undefined ? 0 : 1));
      end = paddedEnd(files.base[i]!, sparse, files.size[i]!);
    }
    for (let i = 0; i < files.count; i++) {
      const sparse = files.sparse.get(i);
      if (sparse === undefined) continue;
      out.varint(sparse.length);
      let at = 0;
      for (const { offset, length } of sparse) {
        out.varint(offset - at);
        out.varint(length);
        at = offset + length;
      }
    }
    // Runs of zero chunks: how many others come before, how many there are.
    for (let i = 0, last = 0; i < zero.length; ) {
      if (zero[i] === 0) {
        i++;
        continue;
      }
      const from = i;
      while (i < zero.length && zero[i] === 1) i++;
      out.varint(from - last);
      out.varint(i - from);
      last = i;
    }
  });
}

function storedPieces(chunks: ChunkTable): Buffer {
  const runs: Uint8Array[] = [];
  for (let i = 0; i < chunks.count; ) {
    if (chunks.zero[i] === 1) {
      i++;
      continue;
    }
    const from = i;
    while (i < chunks.count && chunks.zero[i] === 0) i++;
    runs.push(chunks.pieceDigest.subarray(chunks.pieceStart[from]! * 32, chunks.pieceStart[i]! * 32));
  }
  return Buffer.concat(runs);
}

interface Header {
  readonly layerDigest: Digest;
  readonly diffId: Digest;
  readonly restart: LayerIndex['restart'];
  readonly layerBytes: number;
  readonly tarBytes: number;
  readonly compression: Compression;
  readonly spanBytes: number;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  readonly entryCount: number;
  readonly fileCount: number;
  readonly chunkCount: number;
  readonly zeroCount: number;
  readonly fragmentCount: number;
  readonly spanCount: number;
  readonly xattrSetCount: number;
}

/**
 * Decodes an index blob. With `parts: 'chunks'` the entries are left out (an empty table), which is what the loader
 * needs of a layer whose whole index was decoded before. Errors: INDEX_INVALID naming the field that is wrong.
 */
export function decodeLayerIndex(blob: Buffer, options: { readonly parts?: 'all' | 'chunks' } = {}): LayerIndex {
  if (blob.length > MAX_INDEX_BYTES) throw indexError('blob', `${blob.length} bytes`);
  if (blob.length < HEADER_BYTES + SECTION_NAMES.length * SECTION_BYTES)
    throw indexError('header', 'the blob is cut off');
  const reader = new WireReader(blob, 'header');
  const header = decodeHeader(reader, blob.length);
  const open = decodeSections(reader);

  const filesReader = new WireReader(open('files', MAX_SECTION_BYTES), 'files');
  const pieces = open('pieces', MAX_PIECES * 32);
  const storedPieceCount = pieces.length / 32;
  if (!Number.isInteger(storedPieceCount)) throw indexError('pieces', 'the section is no list of digests');
  // Every chunk that is not zeros has a digest in the blob, so this bounds the tables by the blob.
  if (header.chunkCount - header.zeroCount > storedPieceCount)
    throw indexError('header.chunkCount', 'more chunks than digests');
  if (header.fileCount > header.chunkCount) throw indexError('header.fileCount', 'more files than chunks');
  const files = decodeFiles(filesReader, header);
  if (countChunks(files, header.chunkBytes) !== header.chunkCount) {
    throw indexError('header.chunkCount', 'does not follow from the file sizes');
  }
  const zero = decodeZeroRuns(filesReader, header);
  const chunks = buildChunkTable(files, header.chunkBytes, header.pieceBytes, zero, pieces);
  checkNames(chunks);
  const spans = decodeSpans(new WireReader(open('spans', MAX_SECTION_BYTES), 'spans'), header, header.spanCount);
  const entries =
    options.parts === 'chunks'
      ? emptyEntryTable(0)
      : decodeEntries(
          new WireReader(open('entries', MAX_SECTION_BYTES), 'entries'),
          header.entryCount,
          header.xattrSetCount,
          files.size,
          header.chunkBytes,
        );
  const { layerDigest, layerBytes, diffId, tarBytes, compression, spanBytes, chunkBytes, pieceBytes, restart } = header;
  return {
    layerDigest,
    layerBytes,
    diffId,
    tarBytes,
    compression,
    spanBytes,
    chunkBytes,
    pieceBytes,
    restart,
    entries,
    chunks,
    spans,
  };
}

function decodeHeader(reader: WireReader, blobBytes: number): Header {
  if (!reader.raw('magic', INDEX_MAGIC.length).equals(INDEX_MAGIC))
    throw indexError('header.magic', 'not a layer index');
  const version = reader.u32('version');
  if (version !== INDEX_VERSION) throw indexError('header.version', `version ${version} is not known`);
  const features = reader.u32('features');
  if (features !== 0) throw indexError('header.features', `feature flags 0x${features.toString(16)} are not known`);
  const layerDigest = digestFromBytes(reader.raw('layerDigest', 32));
  const diffId = digestFromBytes(reader.raw('diffId', 32));
  const restartDigest = digestFromBytes(reader.raw('restartDigest', 32));
  const layerBytes = atMost(reader.u64('layerBytes'), MAX_TAR_BYTES, 'header.layerBytes');
  const tarBytes = atMost(reader.u64('tarBytes'), MAX_TAR_BYTES, 'header.tarBytes');
  const restartSize = atMost(reader.u64('restartSize'), MAX_TAR_BYTES, 'header.restartSize');
  const framingLength = atMost(reader.u64('framingLength'), restartSize, 'header.framingLength');
  const compression = COMPRESSIONS[reader.u32('compression')];
  if (compression === undefined) throw indexError('header.compression', 'not known');
  const spanBytes = between(reader.u32('spanBytes'), MIN_SPAN_BYTES, MAX_SPAN_BYTES, 'header.spanBytes');
  const chunkBytes = between(reader.u32('chunkBytes'), MIN_CHUNK_BYTES, MAX_CHUNK_BYTES, 'header.chunkBytes');
  const pieceBytes = between(reader.u32('pieceBytes'), MIN_CHUNK_BYTES, chunkBytes, 'header.pieceBytes');
  if (!powerOfTwo(chunkBytes)) throw indexError('header.chunkBytes', 'not a power of two');
  if (!powerOfTwo(pieceBytes)) throw indexError('header.pieceBytes', 'not a power of two');
  const header: Header = {
    layerDigest,
    diffId,
    restart: { digest: restartDigest, size: restartSize, framingLength },
    layerBytes,
    tarBytes,
    compression,
    spanBytes,
    chunkBytes,
    pieceBytes,
    entryCount: atMost(reader.u32('entryCount'), maxEntries(blobBytes), 'header.entryCount'),
    fileCount: atMost(reader.u32('fileCount'), MAX_ENTRIES, 'header.fileCount'),
    chunkCount: atMost(reader.u32('chunkCount'), MAX_CHUNKS, 'header.chunkCount'),
    zeroCount: atMost(reader.u32('zeroCount'), MAX_ZERO_CHUNKS, 'header.zeroCount'),
    fragmentCount: atMost(reader.u32('fragmentCount'), MAX_FRAGMENTS, 'header.fragmentCount'),
    spanCount: atMost(reader.u32('spanCount'), MAX_SPANS, 'header.spanCount'),
    xattrSetCount: atMost(reader.u32('xattrSetCount'), MAX_XATTR_SETS, 'header.xattrSetCount'),
  };
  const reserved = reader.raw('reserved', HEADER_BYTES - 188);
  if (reserved.some((byte) => byte !== 0)) throw indexError('header.reserved', 'not zero');
  if (header.zeroCount > header.chunkCount) throw indexError('header.zeroCount', 'more zero chunks than chunks');
  if (header.zeroCount * (chunkBytes / pieceBytes) > MAX_PIECES)
    throw indexError('header.zeroCount', 'too many pieces');
  if (header.fileCount > header.entryCount) throw indexError('header.fileCount', 'more files than entries');
  if (compression === 'none' && layerBytes !== tarBytes) throw indexError('header.tarBytes', 'differs from layerBytes');
  return header;
}

function atMost(value: number, max: number, field: string): number {
  if (value > max) throw indexError(field, `${value} is above the limit ${max}`);
  return value;
}

function between(value: number, min: number, max: number, field: string): number {
  if (value < min) throw indexError(field, `${value} is below the limit ${min}`);
  return atMost(value, max, field);
}

function powerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0;
}

/** Reads the section table and gives a function that opens one section, decompressed. */
function decodeSections(reader: WireReader): (name: SectionName, maxBytes: number) => Buffer {
  const table: { encoding: number; storedBytes: number; rawBytes: number }[] = [];
  for (const [position, name] of SECTION_NAMES.entries()) {
    if (reader.u32('section') !== position) throw indexError(`sections.${name}`, 'out of order');
    const encoding = reader.u32('encoding');
    if (encoding > ENCODING_ZSTD) throw indexError(`sections.${name}`, `encoding ${encoding} is not known`);
    table.push({ encoding, storedBytes: reader.u64('storedBytes'), rawBytes: reader.u64('rawBytes') });
  }
  const stored = table.map(({ storedBytes }, position) =>
    reader.raw(`sections.${SECTION_NAMES[position]!}`, storedBytes),
  );
  reader.end();
  return (name, maxBytes) => {
    const position = SECTION_NAMES.indexOf(name);
    const { encoding, rawBytes } = table[position]!;
    const bytes = stored[position]!;
    atMost(rawBytes, maxBytes, `sections.${name}`);
    if (encoding === ENCODING_RAW) {
      if (bytes.length !== rawBytes) throw indexError(`sections.${name}`, 'the two lengths differ');
      return bytes;
    }
    return decompress(bytes, rawBytes, name);
  };
}

function decompress(bytes: Buffer, rawBytes: number, name: SectionName): Buffer {
  let raw: Buffer;
  try {
    // One byte more than promised is enough to see that there is more.
    raw = zstdDecompressSync(bytes, { maxOutputLength: rawBytes + 1 });
  } catch (cause) {
    throw wrapError(cause, `layer index, sections.${name}: cannot be decompressed`, 'INDEX_INVALID');
  }
  if (raw.length !== rawBytes) throw indexError(`sections.${name}`, 'does not have the length it should decompress to');
  return raw;
}

function decodeFiles(reader: WireReader, header: Header): FileExtents {
  const count = header.fileCount;
  const size = new Float64Array(count);
  const base = new Float64Array(count);
  const sparse = new Map<number, readonly Fragment[]>();
  for (let i = 0; i < count; i++) {
    size[i] = reader.varint('size', MAX_TAR_BYTES);
    if (size[i] === 0) throw indexError('files.size', 'an empty file is listed');
  }
  const gap = new Float64Array(count);
  for (let i = 0; i < count; i++) gap[i] = reader.varint('gap', MAX_TAR_BYTES);
  let fragmentsLeft = header.fragmentCount;
  for (let i = 0; i < count; i++) {
    if (gap[i]! % 2 === 0) continue;
    const fragments = decodeFragments(reader, size[i]!, fragmentsLeft);
    fragmentsLeft -= fragments.length;
    sparse.set(i, fragments);
  }
  if (fragmentsLeft !== 0) throw indexError('header.fragmentCount', 'there are fewer fragments');
  let end = 0;
  for (let i = 0; i < count; i++) {
    const fragments = sparse.get(i);
    base[i] = end + Math.floor(gap[i]! / 2) * 512;
    // A file with content has a header before it; one that is all hole is said to be where the one before it ends.
    if ((base[i] === end) !== (fragments?.length === 0)) throw indexError('files.gap', 'contents overlap');
    end = paddedEnd(base[i]!, fragments, size[i]!);
    // The padding of the last member must be there too: a tar is made of whole blocks.
    if (end > header.tarBytes) throw indexError('files.gap', 'content lies behind the end of the tar');
  }
  return { count, size, base, sparse };
}

function decodeFragments(reader: WireReader, size: number, allowed: number): Fragment[] {
  const count = reader.varint('fragments', allowed);
  const fragments: Fragment[] = [];
  let end = 0;
  for (let i = 0; i < count; i++) {
    const hole = reader.varint('fragmentOffset', size);
    if (hole === 0 && i > 0) throw indexError('files.fragmentOffset', 'two fragments touch');
    const length = reader.varint('fragmentLength', size);
    if (length === 0) throw indexError('files.fragmentLength', 'a fragment is empty');
    const offset = end + hole;
    end = offset + length;
    if (end > size) throw indexError('files.fragmentLength', 'a fragment ends after its file');
    fragments.push({ offset, length });
  }
  if (count === 1 && fragments[0]!.length === size) throw indexError('files.fragments', 'a sparse file has no hole');
  return fragments;
}

function decodeZeroRuns(reader: WireReader, header: Header): Uint8Array {
  const zero = new Uint8Array(header.chunkCount);
  let at = 0;
  for (let left = header.zeroCount; left > 0; ) {
    at += reader.varint('zeroGap', header.chunkCount - at);
    const run = reader.varint('zeroRun', Math.min(left, header.chunkCount - at));
    if (run === 0) throw indexError('files.zeroRun', 'a run is empty');
    zero.fill(1, at, at + run);
    at += run;
    left -= run;
  }
  reader.end();
  return zero;
}

/** Refuses one name with two lengths (identity is both), and a hole that is not marked as zeros. */
function checkNames(chunks: ChunkTable): void {
  const lengths = new Map<string, number>();
  const names = Buffer.from(chunks.digest.buffer, chunks.digest.byteOffset, chunks.digest.length);
  for (let i = 0; i < chunks.count; i++) {
    if (chunks.tarOffset[i] === 0 && chunks.zero[i] === 0)
      throw indexError('files.zeroRun', 'a hole is not marked as zeros');
    const name = names.toString('latin1', i * 32, i * 32 + 32);
    const known = lengths.get(name);
    if (known === undefined) lengths.set(name, chunks.length[i]!);
    else if (known !== chunks.length[i]) throw indexError('pieces', `chunk ${i}: one digest with two lengths`);
  }
}
