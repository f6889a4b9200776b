// Builds the lazy index of a layer while it streams by once: checks digest and size, computes the diffID, and collects
// members, chunks, framing and restart points. Called by publish.ts and by a node that pulls a layer whole. The same
// layer and options give the same bytes; nothing is written to disk here.
import { createHash } from 'node:crypto';
import { type Digest, digestFromBytes, digestOf } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { KiB, MiB } from '../../units.ts';
import { native, type RestartPoint } from '../native.ts';
import { buildChunkTable } from './chunk-table.ts';
import { Chunker, type OnPiece } from './chunker.ts';
import { EntryColumns } from './entry-columns.ts';
import { encodeLayerIndex } from './format.ts';
import { MAX_SPAN_OUTPUT_BYTES } from './format-limits.ts';
import { compressionOf, decodeLayer, OutputBuffers, tooFar } from './layer-decoder.ts';
import { type Compression, EntryType, type LayerIndex } from './layer-index.ts';
import { FramingWriter, SpanWriter } from './restart-blob.ts';
import { type TarMember, TarReader, type TarSink } from './tar-reader.ts';

/**
 * Pieces of chunks of this size, bytes: small, because a read of a few KiB needs its whole piece, and one in four pieces of
 * 256 KiB lies in two spans instead of nearly every one of 1 MiB; yet no more than 16 of a chunk, so that the database can
 * record them one by one (MAX_MASKED_PIECES). Measured in docs/decisions/0025-pieces-of-256-kib.md.
 */
export function pieceBytesFor(chunkBytes: number): number {
  return Math.min(chunkBytes, Math.max(256 * KiB, chunkBytes / 16));
}

/** Uncompressed bytes that may wait to be hashed. */
const MAX_UNNAMED_BYTES = 4 * MiB;

export interface BuildOptions {
  /** The layer as it is in the registry; its buffers must not change after they were given. */
  readonly stream: AsyncIterable<Buffer>;
  readonly layerDigest: Digest;
  readonly layerBytes: number;
  /** `stream` itself ends with DIGEST_MISMATCH when its bytes are wrong (Repository.readAll): they are not hashed again. */
  readonly verifiedStream?: boolean;
  /** Distance of restart points in the uncompressed tar, bytes; default 1 MiB. */
  readonly spanBytes?: number;
  /** Default 4 MiB. */
  readonly chunkBytes?: number;
  /** Default: `pieceBytesFor` the chunk size. */
  readonly pieceBytes?: number;
  /** Called after every buffer with the compressed bytes read so far. */
  readonly onProgress?: ((layerBytes: number) => void) | undefined;
  /**
   * Called with every whole piece, for a node that keeps chunks while it indexes; a promise holds the build up, and
   * there are never more than a few MiB of tar between pieces that wait. Pieces of a chunk that turns out to be all zeros may come too: `index.chunks.zero` tells at the end.
   */
  readonly onPiece?: OnPiece | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface BuiltIndex {
  readonly index: LayerIndex;
  readonly indexBlob: Buffer;
  readonly restartBlob: Buffer;
}

/**
 * Reads a layer once and returns its index. Errors: LAYER_INVALID (not a tar, or does not decompress), LAYER_NOT_LAZY
 * (nowhere to restart decompression), DIGEST_MISMATCH, CANCELLED, and what `stream` throws.
 */
export async function buildLayerIndex(options: BuildOptions): Promise<BuiltIndex> {
  const { spanBytes = MiB, chunkBytes = 4 * MiB, pieceBytes = pieceBytesFor(chunkBytes) } = options;
  const chunker = new Chunker({ chunkBytes, pieceBytes, onPiece: options.onPiece });
  const entries = new EntryColumns();
  const framing = new FramingWriter();
  const spans = new SpanWriter();
  const tar = new TarReader(new LayerSink(entries, chunker, framing, chunkBytes));

  const outputs = new OutputBuffers();
  const names = new Naming(chunker, outputs);
  const source = checked(options);
  let compression: Compression;
  let diffId: Buffer;
  try {
    compression = await readThrough(source, spanBytes, spans, outputs, async (output) => {
      chunker.startBuffer(output);
      tar.push(output);
      names.add(output);
      await names.room();
      await spans.room();
      await framing.room();
    });
    tar.finish();
    diffId = await names.finish();
  } catch (error) {
    await names.settled();
    // Bytes damaged on the way would else pass for a layer that is malformed for everyone.
    if (error instanceof DedupError && error.code === 'LAYER_INVALID') for await (const _rest of source);
    throw error;
  } finally {
    await source.return(undefined);
  }
  if (tar.offset - spans.lastOutOffset > MAX_SPAN_OUTPUT_BYTES) throw tooFar(spans.lastOutOffset);

  const { files, zero, storedPieces } = chunker.finish();
  const framingBlob = await framing.finish();
  const { spans: spanTable, windows } = await spans.finish(framingBlob.length);
  const empty = await new SpanWriter().finish(framingBlob.length);
  const restartBlob = Buffer.concat([framingBlob, windows]);
  const index: LayerIndex = {
    layerDigest: options.layerDigest,
    layerBytes: options.layerBytes,
    diffId: digestFromBytes(diffId),
    tarBytes: tar.offset,
    compression,
    spanBytes,
    chunkBytes,
    pieceBytes,
    restart: { digest: digestOf(restartBlob), size: restartBlob.length, framingLength: framingBlob.length },
    entries: entries.finish(),
    chunks: buildChunkTable(files, chunkBytes, pieceBytes, zero, storedPieces),
    // A gzip stream of nothing has a member, but no byte that a span could cover.
    spans: tar.offset === 0 ? empty.spans : spanTable,
  };
  return { index, indexBlob: encodeLayerIndex(index), restartBlob };
}

/** Has buffers of the tar hashed on a native thread while the next are read, and gives the digests to the chunker. */
class Naming {
  readonly #chunker: Chunker;
  readonly #outputs: OutputBuffers;
  readonly #hasher = native().streamHasher();
  readonly #queue: { readonly done: Promise<unknown>; readonly bytes: number }[] = [];
  #bytes = 0;

  constructor(chunker: Chunker, outputs: OutputBuffers) {
    this.#chunker = chunker;
    this.#outputs = outputs;
  }

  /** Takes the buffer that the chunker has just read. */
  add(output: Buffer): void {
    const { ranges, named } = this.#chunker.endBuffer();
    // Promises of one hasher settle in order.
    const done = this.#hasher.push(output, ranges).then((digests) => {
      const taken = named(digests);
      this.#outputs.give(output);
      return taken;
    });
    // The rejection is seen at its await; until then it must not count as unhandled.
    done.catch(() => undefined);
    this.#queue.push({ done, bytes: output.length });
    this.#bytes += output.length;
  }

  /** Waits until no more than MAX_UNNAMED_BYTES, or one buffer, are unhashed or with `onPiece`. */
  async room(): Promise<void> {
    while (this.#bytes > MAX_UNNAMED_BYTES && this.#queue.length > 1) await this.#next();
  }

  async #next(): Promise<void> {
    const { done, bytes } = this.#queue.shift()!;
    this.#bytes -= bytes;
    await done;
  }

  /** The digest of the whole tar, after the chunker has got all of its own. */
  async finish(): Promise<Buffer> {
    const digest = this.#hasher.finish();
    digest.catch(() => undefined);
    while (this.#queue.length > 0) await this.#next();
    return await digest;
  }

  /** Waits until nobody works on a buffer any more, whatever the outcome. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#queue.map(({ done }) => done));
  }
}

/** Sends members to the entry table, content to the chunker and all other bytes to the framing. */
class LayerSink implements TarSink {
  readonly #entries: EntryColumns;
  readonly #chunker: Chunker;
  readonly #framing: FramingWriter;
  readonly #chunkBytes: number;

  constructor(entries: EntryColumns, chunker: Chunker, framing: FramingWriter, chunkBytes: number) {
    this.#entries = entries;
    this.#chunker = chunker;
    this.#framing = framing;
    this.#chunkBytes = chunkBytes;
  }

  member(member: TarMember): void {
    this.#entries.add(member, this.#chunker.chunkCount, this.#chunkBytes);
    if (member.type === EntryType.file && member.size > 0) {
      this.#chunker.startFile(member.size, member.contentOffset, member.fragments);
    }
  }

  content(bytes: Buffer): void {
    this.#chunker.content(bytes);
  }

  endContent(): void {
    // The chunker knows a file's end from its size.
  }

  framing(bytes: Buffer): void {
    this.#framing.add(bytes);
  }
}

/** The layer's bytes, hashed on the way; ends with an error unless they are what the descriptor says. */
async function* checked(options: BuildOptions): AsyncGenerator<Buffer> {
  const hash = createHash('sha256');
  let length = 0;
  for await (const bytes of options.stream) {
    if (options.signal?.aborted === true) {
      throw new DedupError('CANCELLED', `indexing layer ${options.layerDigest}: cancelled`, {
        cause: options.signal.reason,
      });
    }
    length += bytes.length;
    if (length > options.layerBytes) break;
    if (options.verifiedStream !== true) hash.update(bytes);
    options.onProgress?.(length);
    yield bytes;
  }
  const doing = `indexing layer ${options.layerDigest}`;
  if (length !== options.layerBytes) {
    throw new DedupError(
      'DIGEST_MISMATCH',
      `${doing}: ${length > options.layerBytes ? 'more' : length} bytes instead of ${options.layerBytes}`,
    );
  }
  if (options.verifiedStream === true) return;
  const digest = digestFromBytes(hash.digest());
  if (digest !== options.layerDigest)
    throw new DedupError('DIGEST_MISMATCH', `${doing}: its bytes have the digest ${digest}`);
}

/** Decompresses all of `source`, which is left open when something goes wrong, and gives each buffer to `take`. */
async function readThrough(
  source: AsyncGenerator<Buffer>,
  spanBytes: number,
  spans: SpanWriter,
  outputs: OutputBuffers,
  take: (output: Buffer) => Promise<void>,
): Promise<Compression> {
  const head: Buffer[] = [];
  let length = 0;
  while (length < 4) {
    const next = await source.next();
    if (next.done === true) break;
    head.push(next.value);
    length += next.value.length;
  }
  const compression = compressionOf(Buffer.concat(head));
  // Not `yield*`: that would close the source together with this.
  async function* slices(): AsyncGenerator<Buffer> {
    yield* head;
    for (let next = await source.next(); next.done !== true; next = await source.next()) yield next.value;
  }
  const onPoint = (point: RestartPoint): void => {
    if (point.outOffset - spans.lastOutOffset > MAX_SPAN_OUTPUT_BYTES) throw tooFar(spans.lastOutOffset);
    spans.add(point);
  };
  for await (const output of decodeLayer(slices(), compression, spanBytes, onPoint, outputs)) {
    await take(output);
  }
  return compression;
}
