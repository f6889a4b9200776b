// Notes what the containers of an image read in their first seconds, and has it merged into the image's trace. Tells the span
// ledger of every read: that is how prefetch learns what was useful. Called by data-plane.ts when an image was mounted.
import { digestFromBytes } from '../digest.ts';
import type { LayerMap } from '../fs/loadable-layer.ts';
import type { SpanLedger } from '../fs/span-ledger.ts';
import type { SeenRead, Transport } from '../fs/transport/transport.ts';
import type { Logger } from '../log.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../units.ts';
import {
  MAX_UNITS,
  mergeRun,
  type Outcome,
  TRACE_UNIT_BYTES,
  type TraceIdentity,
  type TraceUnit,
  traceId,
} from './access-trace.ts';
import type { TraceStore } from './trace-store.ts';

/** A start is over this long after its first read, milliseconds. */
const RECORD_MS = 30_000;
/** Or when nothing was read for so long. */
const IDLE_MS = 5_000;
/** An image that is mounted and not read by then is not about to start. */
const FIRST_READ_MS = 600_000;
/** How often reads are taken from the transport. */
const TICK_MS = 100;
/** Pieces of 64 KiB of the largest chunk. */
const UNITS_PER_CHUNK = (64 * MiB) / TRACE_UNIT_BYTES;

export interface RecordedImage {
  readonly imageId: number;
  readonly identity: TraceIdentity;
  /** The layers of the image, bottom to top, as the loader has them open. */
  readonly maps: readonly LayerMap[];
}

export interface RecorderOptions {
  readonly transport: Pick<Transport, 'watchReads' | 'takeReads' | 'capabilities'>;
  readonly ledger: Pick<SpanLedger, 'read' | 'origin' | 'settle' | 'watch'>;
  readonly traces: TraceStore;
  /** Files that chunks of a layer belong to: first chunk, path and offset; '' when not known. */
  readonly filesOf: (map: LayerMap, chunks: ReadonlySet<number>) => Promise<ReadonlyMap<number, ChunkFile>>;
  readonly log: Logger;
}

/** A file that has a chunk, and where in it the chunk begins. */
export interface ChunkFile {
  readonly path: string;
  readonly offset: number;
}

/** Addresses of the store. */
interface Part {
  readonly start: number;
  readonly end: number;
}

interface SeenUnit {
  readonly atMs: number;
  readonly outcome: Outcome;
}

interface Recording extends RecordedImage {
  readonly begunMs: number;
  /** Of the transport's clock. */
  firstMs: number | undefined;
  /** By performance.now(). */
  firstSeenMs: number;
  lastSeenMs: number;
  /** By layer, then by chunk and unit, in the order of first touch. */
  readonly units: Map<number, SeenUnit>[];
  count: number;
  /** The layer that was read last: most reads follow in the same. */
  recent: number;
}

export class Recorder {
  readonly #options: RecorderOptions;
  readonly #recordings = new Map<number, Recording>();
  readonly #saving = new Map<number, Promise<void>>();
  #timer: NodeJS.Timeout | undefined;
  /** Runs that became part of a trace. */
  recorded = 0;
  /** Distinct bytes that recorded starts asked for, and those of them that were present then; in parts of 64 KiB. */
  askedBytes = 0;
  presentBytes = 0;

  constructor(options: RecorderOptions) {
    this.#options = options;
  }

  /** Begins to note the reads of an image that was just mounted: nothing of it is in the page cache yet. */
  begin(image: RecordedImage): void {
    if (this.#recordings.has(image.imageId)) return;
    // What was read in an earlier life of this number is nothing of this one.
    this.#takeReads();
    const now = performance.now();
    const units = image.maps.map(() => new Map<number, SeenUnit>());
    const rest = { begunMs: now, firstMs: undefined, firstSeenMs: now, lastSeenMs: now, count: 0, recent: 0 };
    this.#recordings.set(image.imageId, { ...image, ...rest, units });
    this.#options.transport.watchReads(image.imageId, true);
    this.#watchLedger(image, true);
    this.#timer ??= setInterval(() => this.#tick(), TICK_MS).unref();
  }

  #watchLedger({ maps }: RecordedImage, on: boolean): void {
    const { ledger, transport } = this.#options;
    // Where hits are not seen, all that was fetched ahead would look as if nobody had read it.
    if (transport.capabilities.seesHits)
      ledger.watch(
        maps.map(({ layerId }) => layerId),
        on,
      );
  }

  /** Ends the recording of an image; resolves once what was recorded of it is kept, or could not be. Never rejects. */
  async end(imageId: number): Promise<void> {
    const recording = this.#recordings.get(imageId);
    if (recording !== undefined) {
      this.#takeReads();
      this.#finish(recording);
    }
    await this.#saving.get(imageId);
  }

  #tick(): void {
    this.#takeReads();
    const now = performance.now();
    for (const recording of [...this.#recordings.values()]) {
      const { firstMs, begunMs, firstSeenMs, lastSeenMs } = recording;
      const over =
        firstMs === undefined
          ? now - begunMs > FIRST_READ_MS
          : now - firstSeenMs > RECORD_MS || now - lastSeenMs > IDLE_MS;
      if (over || recording.count >= MAX_UNITS) this.#finish(recording);
    }
  }

  #takeReads(): void {
    const now = performance.now();
    for (const read of this.#options.transport.takeReads()) {
      const recording = this.#recordings.get(read.imageId);
      if (recording === undefined) continue;
      if (recording.firstMs === undefined) {
        recording.firstMs = read.atMs;
        recording.firstSeenMs = now;
      }
      recording.lastSeenMs = now;
      this.#note(recording, read, Math.max(0, read.atMs - recording.firstMs));
    }
  }

  /** Enters a read under every chunk it touches: each address once, although layers share chunks. */
  #note(recording: Recording, { offset, length, missed }: SeenRead, atMs: number): void {
    const { maps, recent } = recording;
    let todo: Part[] = [{ start: offset, end: offset + length }];
    for (let i = 0; i < maps.length && todo.length > 0; i++) {
      const number = (recent + i) % maps.length;
      const map = maps[number]!;
      const rest: Part[] = [];
      for (const part of todo) {
        let at = part.start;
        for (const chunk of map.chunksIn(part.start, part.end)) {
          const address = map.layer.addresses[chunk]!;
          const end = address + roundUp(map.layer.index.chunks.length[chunk]!, BLOCK_BYTES);
          if (end <= at) continue; // A file of the same content.
          if (address > at) rest.push({ start: at, end: address });
          this.#noteChunk(recording, number, chunk, Math.max(0, at - address), part.end - address, { atMs, missed });
          recording.recent = number;
          at = end;
        }
        if (at < part.end) rest.push({ start: at, end: part.end });
      }
      todo = rest;
    }
  }

  /** Enters bytes [from, to) of a chunk, as far as it has them. */
  #noteChunk(
    recording: Recording,
    number: number,
    chunk: number,
    from: number,
    to: number,
    { atMs, missed }: { readonly atMs: number; readonly missed: boolean },
  ): void {
    const map = recording.maps[number]!;
    const units = recording.units[number]!;
    const length = map.layer.index.chunks.length[chunk]!;
    const end = Math.min(length, to);
    const first = Math.floor(from / TRACE_UNIT_BYTES);
    const count = Math.max(0, Math.ceil(end / TRACE_UNIT_BYTES) - first);
    // Read again: it says nothing new.
    if (Array.from({ length: count }, (_, i) => chunk * UNITS_PER_CHUNK + first + i).every((key) => units.has(key)))
      return;
    const outcome = this.#outcome(map, chunk, from, end, missed);
    for (let unit = Math.floor(from / TRACE_UNIT_BYTES); unit * TRACE_UNIT_BYTES < end; unit++) {
      const key = chunk * UNITS_PER_CHUNK + unit;
      if (units.has(key) || recording.count >= MAX_UNITS) continue;
      units.set(key, { atMs, outcome });
      recording.count++;
      const bytes = Math.min(TRACE_UNIT_BYTES, length - unit * TRACE_UNIT_BYTES);
      this.askedBytes += bytes;
      if (!missed) this.presentBytes += bytes;
    }
  }

  /** How a read met a part of a chunk; marks the spans that hold it as read. */
  #outcome(map: LayerMap, chunk: number, from: number, to: number, missed: boolean): Outcome {
    const { ledger } = this.#options;
    const { pieceBytes } = map.layer.index;
    let ahead = false;
    for (let piece = Math.floor(from / pieceBytes); piece * pieceBytes < to; piece++) {
      for (const span of map.spansOf(map.piece(chunk, piece))) {
        ledger.read(map.layerId, span);
        const origin = ledger.origin(map.layerId, span);
        if (origin !== undefined && origin !== 'read') ahead = true;
      }
    }
    return missed ? (ahead ? 'late' : 'miss') : ahead ? 'ahead' : 'hit';
  }

  #finish(recording: Recording): void {
    this.#recordings.delete(recording.imageId);
    this.#options.transport.watchReads(recording.imageId, false);
    this.#watchLedger(recording, false);
    if (this.#recordings.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    }
    if (recording.count === 0) return;
    if (this.#options.transport.capabilities.seesHits)
      this.#options.ledger.settle(recording.maps.map(({ layerId }) => layerId));
    const saving = this.#save(recording).catch((error: unknown) => {
      // The next start is no worse off than this one was.
      this.#options.log.warn({ err: error, image: recording.imageId }, 'a trace could not be kept');
    });
    this.#saving.set(recording.imageId, saving);
    void saving.then(() => {
      if (this.#saving.get(recording.imageId) === saving) this.#saving.delete(recording.imageId);
    });
  }

  async #save(recording: Recording): Promise<void> {
    const { traces, transport, log } = this.#options;
    const { identity, count } = recording;
    const before = await traces.load(traceId(identity.layers));
    const known = new Map<string, ChunkFile>();
    for (const { chunk, offset, path, fileOffset } of before?.events ?? []) {
      // A trace may come from anybody: no chunk begins before its file.
      if (fileOffset >= offset) known.set(chunk, { path, offset: fileOffset - offset });
    }
    const units: TraceUnit[] = [];
    for (const [number, seen] of recording.units.entries()) {
      if (seen.size > 0) await this.#name(recording.maps[number]!, seen, known, units);
    }
    const { seesHits } = transport.capabilities;
    const trace = mergeRun(before, { identity, endedMs: Date.now(), seesHits, units });
    const file = await traces.save(trace);
    this.recorded++;
    log.debug(
      { image: recording.imageId, file, ranges: count, runs: trace.runs },
      'the reads of a start were recorded',
    );
  }

  /** Adds the units of a layer with the names of their chunks and files. */
  async #name(
    map: LayerMap,
    seen: ReadonlyMap<number, SeenUnit>,
    known: Map<string, ChunkFile>,
    units: TraceUnit[],
  ): Promise<void> {
    const { chunks } = map.layer.index;
    const digests = new Map<number, ReturnType<typeof digestFromBytes>>();
    const nameless = new Set<number>();
    for (const key of seen.keys()) {
      const chunk = Math.floor(key / UNITS_PER_CHUNK);
      if (digests.has(chunk)) continue;
      const digest = digestFromBytes(chunks.digest.subarray(chunk * 32, chunk * 32 + 32));
      digests.set(chunk, digest);
      if (!known.has(digest)) nameless.add(chunk);
    }
    if (nameless.size > 0) {
      const files = await this.#options.filesOf(map, nameless).catch((error: unknown) => {
        // Dropped meanwhile. Chunks are found by their digests all the same, only those of later versions are not.
        this.#options.log.debug({ err: error, layer: map.blob.digest }, 'the files of a layer have no names');
        return new Map<number, ChunkFile>();
      });
      for (const chunk of nameless) known.set(digests.get(chunk)!, files.get(chunk) ?? { path: '', offset: 0 });
    }
    for (const [key, { atMs, outcome }] of seen) {
      const chunk = Math.floor(key / UNITS_PER_CHUNK);
      const offset = (key % UNITS_PER_CHUNK) * TRACE_UNIT_BYTES;
      const length = Math.min(TRACE_UNIT_BYTES, chunks.length[chunk]! - offset);
      const digest = digests.get(chunk)!;
      const { path, offset: at } = known.get(digest)!;
      units.push({ chunk: digest, offset, length, atMs, outcome, path, fileOffset: at + offset });
    }
  }

  /** Keeps what was recorded so far. Never rejects. */
  async close(): Promise<void> {
    for (const imageId of [...this.#recordings.keys()]) void this.end(imageId);
    await Promise.all(this.#saving.values());
  }
}
