// Builds the lazy index of a layer while it streams by once: checks digest and size, computes the diffID, and collects
// members, chunks, framing and restart points. Called by publish.ts and by a node that pulls a layer whole. The same
// layer and options give the same bytes; nothing is written to disk here.
import { createHash } from 'node:crypto';
import { type Digest, digestFromBytes, digestOf } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { MiB } from '../../units.ts';
import type { RestartPoint } from '../native.ts';
import { buildChunkTable } from './chunk-table.ts';
import { Chunker, type IndexedPiece } from './chunker.ts';
import { EntryColumns } from './entry-columns.ts';
import { encodeLayerIndex } from './format.ts';
import { MAX_SPAN_OUTPUT_BYTES } from './format-limits.ts';
import { compressionOf, decodeLayer, tooFar } from './layer-decoder.ts';
import { type Compression, EntryType, type LayerIndex } from './layer-index.ts';
import { FramingWriter, SpanWriter } from './restart-blob.ts';
import { type TarMember, TarReader, type TarSink } from './tar-reader.ts';

export interface BuildOptions {
  /** The layer as it is in the registry. */
  readonly stream: AsyncIterable<Buffer>;
  readonly layerDigest: Digest;
  readonly layerBytes: number;
  /** `stream` itself ends with DIGEST_MISMATCH when its bytes are wrong (Repository.readAll): they are not hashed again. */
  readonly verifiedStream?: boolean;
  /** Distance of restart points in the uncompressed tar, bytes; default 1 MiB. */
  readonly spanBytes?: number;
  /** Default 4 MiB. */
  readonly chunkBytes?: number;
  /** Default 1 MiB. */
  readonly pieceBytes?: number;
  /** Called after every buffer with the compressed bytes read so far. */
  readonly onProgress?: ((layerBytes: number) => void) | undefined;
  /**
   * Called with every whole piece, for a node that keeps chunks while it indexes; a promise holds the build up. Pieces
   * of a chunk that turns out to be all zeros may come too: `index.chunks.zero` tells at the end.
   */
  readonly onPiece?: ((piece: IndexedPiece) => Promise<void> | undefined) | undefined;
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
  const { spanBytes = MiB, chunkBytes = 4 * MiB, pieceBytes = MiB } = options;
  const pending: Promise<void>[] = [];
  const onPiece = options.onPiece;
  const chunker = new Chunker({
    chunkBytes,
    pieceBytes,
    onPiece:
      onPiece === undefined
        ? undefined
        : (piece) => {
            const waiting = onPiece(piece);
            if (waiting !== undefined) pending.push(waiting);
          },
  });
  const entries = new EntryColumns();
  const framing = new FramingWriter();
  const spans = new SpanWriter();
  const tar = new TarReader(new LayerSink(entries, chunker, framing, chunkBytes));

  const tarHash = createHash('sha256');
  const source = checked(options);
  let compression: Compression;
  try {
    compression = await readThrough(source, spanBytes, spans, (output) => {
      tarHash.update(output);
      tar.push(output);
      return pending.length === 0 ? undefined : Promise.all(pending.splice(0));
    });
    tar.finish();
  } catch (error) {
    await Promise.allSettled(pending);
    // Bytes damaged on the way would else pass for a layer that is malformed for everyone.
    if (error instanceof DedupError && error.code === 'LAYER_INVALID') for await (const _rest of source);
    throw error;
  } finally {
    await source.return(undefined);
  }
  if (tar.offset - spans.lastOutOffset > MAX_SPAN_OUTPUT_BYTES) throw tooFar(spans.lastOutOffset);

  const { files, zero, storedPieces } = chunker.finish();
  const framingBlob = framing.finish();
  const { spans: spanTable, windows } = spans.finish(framingBlob.length);
  const empty = new SpanWriter().finish(framingBlob.length);
  const restartBlob = Buffer.concat([framingBlob, windows]);
  const index: LayerIndex = {
    layerDigest: options.layerDigest,
    layerBytes: options.layerBytes,
    diffId: digestFromBytes(tarHash.digest()),
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
  take: (output: Buffer) => Promise<unknown> | undefined,
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
  for await (const output of decodeLayer(slices(), compression, spanBytes, onPoint)) {
    const waiting = take(output);
    if (waiting !== undefined) await waiting;
  }
  return compression;
}
