// Makes the layer index of an unpacked layer: reads each file once, cuts and names its content with the chunker of all
// layers, and hands whole pieces out in batches. Called by conversion-worker.ts in a thread of its own: every call
// blocks. The layer it describes is a tar that nobody made: a block for each header, content, padding, and no framing.
import { hash } from 'node:crypto';
import { type BigIntStats, closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { digestOf } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import { MiB, roundUp } from '../../units.ts';
import type { BuiltIndex } from '../index/builder.ts';
import { buildChunkTable } from '../index/chunk-table.ts';
import { Chunker } from '../index/chunker.ts';
import { EntryColumns } from '../index/entry-columns.ts';
import { decodeLayerIndex, encodeLayerIndex } from '../index/format.ts';
import type { LayerIndex } from '../index/layer-index.ts';
import { FramingWriter, SpanWriter } from '../index/restart-blob.ts';
import { TAR_BLOCK_BYTES } from '../index/tar-header.ts';
import { MAX_MEMBERS } from '../index/tar-reader.ts';
import { BATCH_BYTES, BATCH_ENTRIES, BATCH_PIECES, type ConversionOrder, type PieceBatch } from './messages.ts';
import { changed, DirectoryWalk, type FoundMember } from './walk.ts';

/** Distance of the spans that the format asks for; nobody fetches them. */
const SPAN_BYTES = MiB;
/** Nothing that took the place of the file is waited for, and its time of access stays. */
const OPEN_FLAGS = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK | constants.O_NOATIME;
const NO_BYTES = Buffer.alloc(0);

export class DirectoryIndexer {
  readonly #order: ConversionOrder;
  readonly #send: (batch: PieceBatch) => void;
  readonly #walk: DirectoryWalk;
  readonly #chunker: Chunker;
  readonly #entries = new EntryColumns();
  #entryCount = 0;
  #contentBytes = 0;
  #tarBytes = 0;
  /** The batch being filled. A byte more than a piece needs room in it, to see the end of a file. */
  readonly #batchBytes: number;
  #batch: Buffer;
  #used = 0;
  /** Pieces read into it, and what the chunker says of them once it is named. */
  #pieceCount = 0;
  #pieces: number[] = [];
  #sentEntries = 0;

  /** `send` takes the batch's memory, and may block or throw to end the work. */
  constructor(order: ConversionOrder, send: (batch: PieceBatch) => void) {
    const { chunkBytes, pieceBytes } = order;
    this.#order = order;
    this.#send = send;
    this.#walk = new DirectoryWalk(order.directory);
    this.#chunker = new Chunker({
      chunkBytes,
      pieceBytes,
      onPiece: ({ chunk, piece, parts: [bytes], length }) => {
        // No piece lies in two batches.
        this.#pieces.push(chunk, piece, bytes?.byteOffset ?? 0, length);
        return undefined;
      },
    });
    this.#batchBytes = Math.max(BATCH_BYTES, pieceBytes);
    this.#batch = this.#newBatch();
    this.#chunker.startBuffer(this.#batch);
  }

  /**
   * Walks the directory and returns its index. Errors: those of DirectoryWalk.members and of `send`; LAYER_NOT_LAZY also
   * for what exceeds the format.
   */
  async run(): Promise<BuiltIndex> {
    for (const found of this.#walk.members()) this.#add(found);
    this.#flush();
    return await this.#finish();
  }

  #add({ member, file }: FoundMember): void {
    this.#entries.add(member, this.#chunker.chunkCount, this.#order.chunkBytes);
    if (++this.#entryCount > MAX_MEMBERS) throw tooLarge(`it has more than ${MAX_MEMBERS} entries`);
    if (file !== undefined) this.#read(member.name, file.path, file.stats);
    if (this.#pieceCount >= BATCH_PIECES || this.#entryCount - this.#sentEntries >= BATCH_ENTRIES) this.#flush();
  }

  /** Reads a file to its end, which must be where it was when it was found. */
  #read(name: string, path: Buffer, found: BigIntStats): void {
    let fd: number;
    try {
      fd = openSync(path, OPEN_FLAGS);
    } catch (error) {
      throw this.#walk.failure(name, error);
    }
    try {
      if (!sameFile(fstatSync(fd, { bigint: true }), found)) throw changed(name);
      const size = Number(found.size);
      this.#tarBytes += TAR_BLOCK_BYTES;
      this.#chunker.startFile(size, this.#tarBytes, undefined);
      for (let at = 0; at < size; at += this.#order.pieceBytes) {
        const length = Math.min(this.#order.pieceBytes, size - at);
        // No piece lies in two batches.
        if (this.#used + length > this.#batchBytes) this.#flush();
        const beyond = at + length === size ? 1 : 0;
        if (readPiece(fd, this.#batch, this.#used, length, beyond) !== length) throw changed(name);
        this.#chunker.content(this.#batch.subarray(this.#used, this.#used + length));
        this.#used += length;
        this.#pieceCount++;
        this.#contentBytes += length;
      }
      this.#tarBytes += roundUp(size, TAR_BLOCK_BYTES);
      // A caller may have kept it waiting for long between two pieces.
      if (size > this.#order.pieceBytes && !sameFile(fstatSync(fd, { bigint: true }), found)) throw changed(name);
    } catch (error) {
      throw error instanceof DedupError ? asRefusal(error) : this.#walk.failure(name, error);
    } finally {
      closeSync(fd);
    }
  }

  #newBatch(): Buffer {
    return Buffer.from(new ArrayBuffer(this.#batchBytes + 1));
  }

  /** Names the pieces of the batch and sends it. */
  #flush(): void {
    const { ranges, named } = this.#chunker.endBuffer();
    const digests = this.#digestsOf(ranges);
    void named(digests);
    const memory = this.#batch.buffer as ArrayBuffer;
    // Views of a piece hold the whole batch in memory.
    const copied = this.#used < this.#batchBytes / 2;
    const bytes = copied ? memory.slice(0, this.#used) : memory;
    const pieces = Uint32Array.from(this.#pieces);
    this.#pieces = [];
    this.#pieceCount = 0;
    this.#used = 0;
    this.#sentEntries = this.#entryCount;
    if (!copied) this.#batch = this.#newBatch();
    this.#chunker.startBuffer(this.#batch);
    this.#send({
      kind: 'batch',
      bytes,
      pieces,
      digests,
      doneBytes: this.#contentBytes,
      doneEntries: this.#entryCount,
    });
  }

  /** SHA-256 of each piece of the batch, 32 bytes each. */
  #digestsOf(ranges: Uint32Array): Buffer {
    const digests = Buffer.allocUnsafeSlow((ranges.length / 3) * 32);
    for (let i = 0, to = 0; i < ranges.length; i += 3, to += 32) {
      if (ranges[i + 2] !== 1) throw new DedupError('INTERNAL', 'a piece lies in two batches');
      const from = ranges[i]!;
      hash('sha256', this.#batch.subarray(from, from + ranges[i + 1]!), 'buffer').copy(digests, to);
    }
    return digests;
  }

  async #finish(): Promise<BuiltIndex> {
    const { identity, chunkBytes, pieceBytes } = this.#order;
    const { files, zero, storedPieces } = this.#chunker.finish();
    const restartBlob = await new FramingWriter().finish();
    const spans = new SpanWriter();
    for (let at = 0; at < this.#tarBytes; at += SPAN_BYTES) {
      spans.add({ outOffset: at, inOffset: at, bits: 0, memberStart: false, window: NO_BYTES });
    }
    const index: LayerIndex = {
      layerDigest: identity,
      layerBytes: this.#tarBytes,
      diffId: identity,
      tarBytes: this.#tarBytes,
      compression: 'none',
      spanBytes: SPAN_BYTES,
      chunkBytes,
      pieceBytes,
      restart: { digest: digestOf(restartBlob), size: restartBlob.length, framingLength: restartBlob.length },
      entries: this.#entries.finish(),
      chunks: buildChunkTable(files, chunkBytes, pieceBytes, zero, storedPieces),
      spans: (await spans.finish(restartBlob.length)).spans,
    };
    const indexBlob = encodeLayerIndex(index);
    try {
      // The directory goes once this stands for it: what nobody could read is found now.
      decodeLayerIndex(indexBlob);
    } catch (error) {
      throw asRefusal(error);
    }
    return { index, indexBlob, restartBlob };
  }
}

/** A layer that is more than the format can express stays as it is; anything else remains what it was. */
function asRefusal(error: unknown): unknown {
  if (!(error instanceof DedupError)) return error;
  return error.code === 'LAYER_INVALID' || error.code === 'INDEX_INVALID' ? tooLarge(error.message, error) : error;
}

function tooLarge(why: string, cause?: unknown): DedupError {
  return wrapError(cause ?? why, 'the unpacked layer exceeds the layer index', 'LAYER_NOT_LAZY');
}

function sameFile(a: BigIntStats, b: BigIntStats): boolean {
  return a.ino === b.ino && a.dev === b.dev && a.mode === b.mode && a.size === b.size && a.mtimeNs === b.mtimeNs;
}

/** Reads `length` bytes, fewer at the end of the file, and up to `beyond` more in the same call if there are any. */
function readPiece(fd: number, into: Buffer, at: number, length: number, beyond: number): number {
  let done = 0;
  while (done < length) {
    const got = readSync(fd, into, at + done, length + beyond - done, null);
    if (got === 0) break;
    done += got;
  }
  return done;
}
