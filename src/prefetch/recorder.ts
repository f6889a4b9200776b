// Notes what the containers of an image read in their first seconds, and has it merged into the image's trace. Tells the span
// ledger of every read: that is how prefetch learns what was useful. Called by data-plane.ts when an image was mounted.
import { digestFromBytes } from '../digest.ts';
import type { LayerMap } from '../fs/loadable-layer.ts';
import type { SpanLedger } from '../fs/span-ledger.ts';
import type { SeenRead, Transport } from '../fs/transport/transport.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import {
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
/** Ranges of a run that are kept; more are no start. */
const MAX_UNITS = 200_000;
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
  readonly ledger: Pick<SpanLedger, 'read' | 'origin' | 'settle'>;
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
    const now = performance.now();
    const units = image.maps.map(() => new Map<number, SeenUnit>());
    const rest = { begunMs: now, firstMs: undefined, firstSeenMs: now, lastSeenMs: now, count: 0, recent: 0 };
    this.#recordings.set(image.imageId, { ...image, ...rest, units });
    this.#options.transport.watchReads(image.imageId, true);
    this.#timer ??= setInterval(() => this.#tick(), TICK_MS).unref();
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
      this.#note(recording, read, read.atMs - recording.firstMs);
    }
  }

  /** Enters a read under every chunk it touches. */
  #note(recording: Recording, { offset, length, missed }: SeenRead, atMs: number): void {
    const { maps } = recording;
    const end = offset + length;
    let left = length;
    for (let i = 0; i < maps.length && left > 0; i++) {
      const number = (recording.recent + i) % maps.length;
      const map = maps[number]!;
      const { addresses, index } = map.layer;
      for (const chunk of map.chunksIn(offset, end)) {
        const address = addresses[chunk]!;
        const from = Math.max(0, offset - address);
        const to = Math.min(index.chunks.length[chunk]!, end - address);
        left -= to - from;
        const outcome = this.#outcome(map, chunk, from, to, missed);
        for (let unit = Math.floor(from / TRACE_UNIT_BYTES); unit * TRACE_UNIT_BYTES < to; unit++) {
          const key = chunk * UNITS_PER_CHUNK + unit;
          if (recording.units[number]!.has(key)) continue;
          recording.units[number]!.set(key, { atMs, outcome });
          recording.count++;
          const bytes = Math.min(TRACE_UNIT_BYTES, index.chunks.length[chunk]! - unit * TRACE_UNIT_BYTES);
          this.askedBytes += bytes;
          if (!missed) this.presentBytes += bytes;
        }
      }
      // Blocks are padded, and layers share chunks: what is left of a page is nobody's.
      if (left < length) {
        recording.recent = number;
        if (left < 4096) break;
      }
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
    if (this.#recordings.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    }
    if (recording.count === 0) return;
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
    const known = new Map(
      before?.events.map(({ chunk, offset, path, fileOffset }) => [chunk, { path, offset: fileOffset - offset }]),
    );
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
