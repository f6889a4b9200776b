// From a trace to the spans that a start will need: where its chunks lie in the layers of an image, or of a later version of
// it; in the order of first need; without what is here. Pure look-ups: the scheduler fetches.
import { type Digest, digestBytes, digestFromBytes } from '../digest.ts';
import type { LayerMap, PieceRef } from '../fs/loadable-layer.ts';
import type { ByteRange } from '../units.ts';
import type { AccessTrace, TraceEvent } from './access-trace.ts';
import type { StartTree } from './start-files.ts';

/** A span that a plan foresees. */
export interface PlannedSpan {
  readonly map: LayerMap;
  readonly span: number;
  /** Compressed. */
  readonly bytes: number;
}

export interface Resolved {
  /** Pieces that events stand for, in the order of first need. */
  readonly pieces: readonly PieceRef[];
  /** Events whose chunk no layer has. */
  readonly unknown: readonly TraceEvent[];
}

/** Pieces of one trace at most, repeated ones included: about 50 GiB, or a trace that was made to cost memory. */
const MAX_PIECES = 200_000;
/** A range that less than a third of the runs have read is left to its reader. */
const MIN_SHARE = 1 / 3;

/** Events that are worth fetching. */
function* likely({ events, runs }: AccessTrace): Generator<TraceEvent> {
  for (const event of events) if (event.count >= runs * MIN_SHARE) yield event;
}

/** Finds the chunks of a trace in the layers of an image. */
export function resolveTrace(trace: AccessTrace, maps: readonly LayerMap[]): Resolved {
  const places = findChunks(new Set([...likely(trace)].map(({ chunk }) => chunk)), maps);
  const pieces: PieceRef[] = [];
  const unknown: TraceEvent[] = [];
  for (const event of likely(trace)) {
    const place = places.get(event.chunk);
    if (place === undefined) unknown.push(event);
    else
      for (const piece of piecesIn(place.map, place.chunk, event.offset, event.offset + event.length))
        pieces.push(piece);
    if (pieces.length > MAX_PIECES) break;
  }
  return { pieces, unknown };
}

/** Finds by their names the files of events whose chunks have changed: a later version of them is read in the same places. */
export function resolveByPath(events: readonly TraceEvent[], tree: StartTree, maps: readonly LayerMap[]): PieceRef[] {
  const pieces: PieceRef[] = [];
  for (const event of events) {
    for (const range of rangesOf(event, tree)) {
      for (const piece of piecesAt(range, maps)) pieces.push(piece);
      if (pieces.length > MAX_PIECES) return pieces;
    }
  }
  return pieces;
}

/** The pieces of a range of the store, in the layer that has its beginning. */
export function* piecesAt(range: ByteRange, maps: readonly LayerMap[]): Generator<PieceRef> {
  const map = maps.find((one) => one.chunkAt(range.offset) !== undefined);
  if (map === undefined) return;
  const end = range.offset + range.length;
  for (const chunk of map.chunksIn(range.offset, end)) {
    const start = map.layer.addresses[chunk]!;
    yield* piecesIn(map, chunk, Math.max(0, range.offset - start), end - start);
  }
}

/**
 * Every piece of layers, each address once, in the order in which their bytes come in the layers. Pieces of zeros are among
 * them where they have an address: no span holds them, and whoever wants all of an image wants them too.
 */
export function* allPieces(maps: readonly LayerMap[]): Generator<PieceRef> {
  const seen = new Set<number>();
  for (const map of maps) {
    const { addresses, index } = map.layer;
    const { tarOffset, count } = index.chunks;
    const placed = Uint32Array.from(Array(count).keys()).filter((chunk) => addresses[chunk]! > 0);
    for (const chunk of placed.sort((a, b) => tarOffset[a]! - tarOffset[b]!)) {
      for (let piece = 0; piece < map.pieceCount(chunk); piece++) {
        const ref = map.piece(chunk, piece);
        if (seen.has(ref.address)) continue;
        seen.add(ref.address);
        yield ref;
      }
    }
  }
}

/** Where the file of an event lies in the store, as far as the event reaches; nowhere when there is no such file. */
function rangesOf({ path, fileOffset, length }: TraceEvent, tree: StartTree): ByteRange[] {
  if (path === '') return [];
  try {
    const file = tree.file(path);
    if (file === undefined || fileOffset >= file.size) return [];
    return file.ranges(fileOffset, Math.min(length, file.size - fileOffset));
  } catch {
    return []; // Damaged metadata: whoever mounts the image is told.
  }
}

/** Where each of these chunks lies; the digest tables are looked through once, by the first four bytes. */
function findChunks(
  wanted: ReadonlySet<Digest>,
  maps: readonly LayerMap[],
): Map<Digest, { readonly map: LayerMap; readonly chunk: number }> {
  const starts = new Set([...wanted].map((digest) => digestBytes(digest).readUInt32LE(0)));
  const found = new Map<Digest, { map: LayerMap; chunk: number }>();
  for (const map of maps) {
    const { digest: table, count } = map.layer.index.chunks;
    const view = new DataView(table.buffer, table.byteOffset, table.byteLength);
    for (let chunk = 0; chunk < count; chunk++) {
      if (!starts.has(view.getUint32(chunk * 32, true))) continue;
      const digest = digestFromBytes(table.subarray(chunk * 32, chunk * 32 + 32));
      if (wanted.has(digest) && !found.has(digest)) found.set(digest, { map, chunk });
    }
  }
  return found;
}

/** Pieces of a chunk with a byte in [start, end) of it; none of a chunk of zeros. */
function* piecesIn(map: LayerMap, chunk: number, start: number, end: number): Generator<PieceRef> {
  const { chunks, pieceBytes } = map.layer.index;
  if (map.layer.addresses[chunk] === 0 || chunks.zero[chunk] === 1) return;
  const stop = Math.min(end, chunks.length[chunk]!);
  for (let piece = Math.floor(start / pieceBytes); piece * pieceBytes < stop; piece++) yield map.piece(chunk, piece);
}

/**
 * The spans that pieces need and that are not here, each once, those of one piece side by side. `isPresent` as of the node
 * store. Taken as the queue drains: what has come meanwhile is left out.
 */
export function* spansNeeded(
  pieces: Iterable<PieceRef>,
  isPresent: (address: number, length: number) => boolean,
): Generator<PlannedSpan> {
  const seen = new Map<number, Uint8Array>();
  for (const ref of pieces) {
    if (isPresent(ref.address, ref.length)) continue;
    const { map } = ref;
    let known = seen.get(map.layerId);
    if (known === undefined) seen.set(map.layerId, (known = new Uint8Array(map.spanCount)));
    for (const span of map.spansOf(ref)) {
      if (known[span] === 1) continue;
      known[span] = 1;
      yield { map, span, bytes: map.compressedRange(span, 1).length };
    }
  }
}
