// Traces at work: has the trace of an image replayed while it is pulled or mounted, and its start recorded. Puts together trace
// store, planner, scheduler and recorder; called by data-plane.ts. A trace is a hint: whatever fails here is read later.
import { setTimeout as sleep } from 'node:timers/promises';
import { LRUCache } from 'lru-cache';
import { type Digest, isDigest } from '../digest.ts';
import { EntryType, type LayerIndex } from '../fs/index/layer-index.ts';
import type { LazyLoader } from '../fs/lazy-loader.ts';
import type { LayerMap, PieceRef } from '../fs/loadable-layer.ts';
import type { Transport } from '../fs/transport/transport.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import { type AccessTrace, type TraceEvent, type TraceIdentity, traceId } from './access-trace.ts';
import { readTree } from './image-start.ts';
import { resolveByPath, resolveTrace, spansNeeded } from './planner.ts';
import { type ChunkFile, Recorder } from './recorder.ts';
import { PrefetchScheduler } from './scheduler.ts';
import type { TraceStore } from './trace-store.ts';

/** How far ahead of its reader a trace of the very image is replayed, compressed bytes. */
const OWN_AHEAD_BYTES = 256 * MiB;
/** The same of a trace that somebody else made, or of another version: so much it can cost for nothing. */
const FOREIGN_AHEAD_BYTES = 64 * MiB;
/** Traces of other versions that are tried, latest first. */
const MAX_PREDECESSORS = 4;
/** How long it is waited to know whether a registry has a trace, before the files of a start are looked for, milliseconds. */
const EXACT_WAIT_MS = 500;
/** How long an unmount, or the end of dedupd, waits for a trace to be written, milliseconds. */
const KEEP_WAIT_MS = 2_000;
/** An image that is pulled and then mounted is replayed once, milliseconds. */
const AGAIN_MS = 60_000;

export interface StartingImage {
  /** Bottom to top. */
  readonly layerIds: readonly number[];
  readonly identity: TraceIdentity;
  /** Looks for a trace beside the image in its registry; absent: it is not looked for. */
  readonly registry?: ((layers: readonly Digest[]) => Promise<AccessTrace | undefined>) | undefined;
  readonly signal: AbortSignal;
}

export interface PrefetchOptions {
  readonly loader: LazyLoader;
  readonly transport: Pick<Transport, 'watchReads' | 'takeReads' | 'capabilities'>;
  readonly traces: TraceStore;
  readonly isPresent: (address: number, length: number) => boolean;
  /** The whole index of a layer, for the names of its files. */
  readonly readIndex: (layerId: number) => Promise<Pick<LayerIndex, 'entries'>>;
  /** False: nothing is fetched ahead; starts are recorded all the same. */
  readonly enabled: boolean;
  readonly workers: number;
  readonly queueSize: number;
  readonly log: Logger;
}

/** What a trace tells of an image's next start. */
export interface Foreseen {
  /** Whose trace it is: recorded on this node, found beside the image, or that of another version of it. */
  readonly from: 'node' | 'registry' | 'version';
  /** In the order of first need. */
  readonly pieces: readonly PieceRef[];
}

interface Replay {
  readonly startedMs: number;
  /** True when a trace of the very image is replayed. */
  readonly exact: Promise<boolean>;
  /** Aborted when a trace of the very image takes the place of another version's. */
  readonly replaced: AbortController;
  /** What an older trace names that this image has under another digest, once that is known. */
  changed: { readonly events: readonly TraceEvent[]; readonly maps: readonly LayerMap[] } | undefined;
}

export class Prefetch {
  readonly #options: PrefetchOptions;
  readonly #scheduler: PrefetchScheduler;
  readonly #recorder: Recorder;
  readonly #replays = new Map<string, Replay>();
  /** What pulls said of images, by trace id. */
  readonly #named = new LRUCache<string, TraceIdentity>({ max: 1000 });
  /** Images whose reads come to us. */
  readonly #mounted = new Set<number>();
  /** Traces that were replayed. */
  replayed = 0;

  constructor(options: PrefetchOptions) {
    this.#options = options;
    const { loader, transport, traces, workers, queueSize, log } = options;
    this.#scheduler = new PrefetchScheduler({ fetcher: loader.batches, workers, queueSize, log });
    const filesOf = (map: LayerMap, chunks: ReadonlySet<number>) => this.#filesOf(map, chunks);
    this.#recorder = new Recorder({ transport, ledger: loader.ledger, traces, filesOf, log });
  }

  get queuedSpans(): number {
    return this.#scheduler.queuedSpans;
  }

  get recorded(): number {
    return this.#recorder.recorded;
  }

  /** Distinct bytes that recorded starts asked for, and those of them that were present then. */
  get asked(): { readonly bytes: number; readonly presentBytes: number } {
    return { bytes: this.#recorder.askedBytes, presentBytes: this.#recorder.presentBytes };
  }

  get scheduler(): PrefetchScheduler {
    return this.#scheduler;
  }

  /**
   * What the next start of an image will read, without fetching any of it; undefined when no trace tells. `metadata` is the
   * file of its built file system: with it, files that another version's trace names are found by their names, too.
   * Errors: those of the layers; STORE_IO.
   */
  async plan(image: StartingImage, metadata?: string): Promise<Foreseen | undefined> {
    const { loader, traces, log } = this.#options;
    const { identity, layerIds, registry } = image;
    const maps = await loader.maps(layerIds);
    const own = await traces.load(traceId(identity.layers));
    if (own !== undefined) return { from: 'node', pieces: resolveTrace(own, maps).pieces };
    const found = await registry?.(identity.layers).catch((error: unknown) => {
      log.debug({ err: error, layers: layerIds }, 'no trace could be had of the registry');
      return undefined;
    });
    if (found !== undefined) return { from: 'registry', pieces: resolveTrace(found, maps).pieces };
    const older = await this.#predecessor(identity, maps);
    if (older === undefined) return undefined;
    const { pieces, unknown } = resolveTrace(older, maps);
    const tree = unknown.length === 0 || metadata === undefined ? undefined : await readTree(metadata);
    const changed = tree === undefined ? [] : resolveByPath(unknown, tree, maps);
    return { from: 'version', pieces: [...pieces, ...changed] };
  }

  /** Begins to fetch what the start of an image will read, by its trace or that of an earlier version. */
  begin(image: StartingImage): void {
    const { identity } = image;
    if (identity.layers.length === 0) return;
    const id = traceId(identity.layers);
    if (identity.manifest !== '') this.#named.set(id, identity);
    if (!this.#options.enabled) return;
    const now = performance.now();
    for (const [key, { startedMs }] of this.#replays) if (now - startedMs > AGAIN_MS) this.#replays.delete(key);
    const key = keyOf(image.layerIds);
    if (this.#replays.has(key)) return;
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const replay: Replay = { startedMs: now, exact: promise, replaced: new AbortController(), changed: undefined };
    this.#replays.set(key, replay);
    this.#replay(image, id, replay, resolve).catch((error: unknown) => {
      resolve(false);
      this.#options.log.debug({ err: error, layers: image.layerIds }, 'a trace could not be replayed');
    });
  }

  async #replay(image: StartingImage, id: string, replay: Replay, exact: (known: boolean) => void): Promise<void> {
    const { loader, traces, log } = this.#options;
    const [maps, own] = await Promise.all([loader.maps(image.layerIds), traces.load(id)]);
    if (own !== undefined) {
      exact(true);
      loader.foresee(image.layerIds, true);
      log.debug({ layers: image.layerIds, events: own.events.length, runs: own.runs }, 'a trace is replayed');
      await this.#run(own, maps, OWN_AHEAD_BYTES, image.signal);
      return;
    }
    const remote = image.registry?.(image.identity.layers).catch((error: unknown) => {
      log.debug({ err: error, layers: image.layerIds }, 'no trace could be had of the registry');
      return undefined;
    });
    const older = await this.#predecessor(image.identity, maps);
    if (older !== undefined) {
      const { unknown } = resolveTrace(older, maps);
      replay.changed = { events: unknown, maps };
      log.debug(
        { layers: image.layerIds, from: older.tag, changed: unknown.length },
        'the trace of another version is replayed',
      );
      this.#passOver(
        this.#run(older, maps, FOREIGN_AHEAD_BYTES, AbortSignal.any([image.signal, replay.replaced.signal])),
      );
    }
    const found = await remote;
    exact(found !== undefined);
    if (found === undefined) return;
    replay.replaced.abort();
    replay.changed = undefined;
    loader.foresee(image.layerIds, true);
    log.debug({ layers: image.layerIds, events: found.events.length }, "a trace of the image's registry is replayed");
    await this.#run(found, maps, FOREIGN_AHEAD_BYTES, image.signal);
  }

  async #run(
    trace: AccessTrace,
    maps: readonly LayerMap[],
    maxUnreadBytes: number,
    signal: AbortSignal,
  ): Promise<void> {
    this.replayed++;
    await this.#fetch(resolveTrace(trace, maps).pieces, maxUnreadBytes, signal);
  }

  async #fetch(pieces: readonly PieceRef[], maxUnreadBytes: number, signal: AbortSignal): Promise<void> {
    await this.#scheduler.run({ spans: spansNeeded(pieces, this.#options.isPresent), maxUnreadBytes, signal });
  }

  /** Of the latest traces of the same repository the one that says most about these layers. */
  async #predecessor(identity: TraceIdentity, maps: readonly LayerMap[]): Promise<AccessTrace | undefined> {
    const { traces } = this.#options;
    if (identity.repository === '') return undefined;
    const same = (await traces.list()).filter(({ repository }) => repository === identity.repository);
    let [best, most]: [AccessTrace | undefined, number] = [undefined, -1];
    for (const { id } of same.slice(0, MAX_PREDECESSORS)) {
      const trace = await traces.load(id);
      if (trace === undefined) continue;
      const known = resolveTrace(trace, maps).pieces.length;
      if (known > most) [best, most] = [trace, known];
    }
    return best;
  }

  /**
   * Goes on once the file system of an image is built: files of another version's trace that have changed are found by
   * their names. Resolves to true when a trace of the very image is replayed: nothing need be guessed then.
   */
  async built(layerIds: readonly number[], metadata: string, signal: AbortSignal): Promise<boolean> {
    const replay = this.#replays.get(keyOf(layerIds));
    if (replay === undefined) return false;
    // A registry that takes its time is not to hold up what can be known without it.
    const exact = await Promise.race([replay.exact, sleep(EXACT_WAIT_MS, false, { ref: false })]);
    const { changed } = replay;
    if (exact || changed === undefined || changed.events.length === 0) return exact;
    const tree = await readTree(metadata);
    if (tree === undefined) return false;
    const until = AbortSignal.any([signal, replay.replaced.signal]);
    this.#passOver(this.#fetch(resolveByPath(changed.events, tree, changed.maps), FOREIGN_AHEAD_BYTES, until));
    return false;
  }

  /** Has something that is only a hint go on by itself: when it fails, a start reads later what it would have brought. */
  #passOver(work: Promise<void>): void {
    work.catch((error: unknown) => this.#options.log.debug({ err: error }, 'a trace could not be replayed'));
  }

  /** Begins to record an image that was just mounted. Never rejects. */
  async mounted(imageId: number, image: StartingImage): Promise<void> {
    this.begin(image);
    this.#mounted.add(imageId);
    const { loader, log } = this.#options;
    try {
      const maps = await loader.maps(image.layerIds);
      const identity = this.#named.get(traceId(image.identity.layers)) ?? image.identity;
      if (this.#mounted.has(imageId)) this.#recorder.begin({ imageId, identity, maps });
    } catch (error) {
      log.debug({ err: error, image: imageId }, 'a start is not recorded');
    }
  }

  /**
   * Ends the recording of an image that is unmounted, or read without us from now on; resolves once it is kept, or would hold
   * others up: a directory of traces may be slow.
   */
  async unmounted(imageId: number): Promise<void> {
    this.#mounted.delete(imageId);
    await Promise.race([this.#recorder.end(imageId), sleep(KEEP_WAIT_MS, undefined, { ref: false })]);
  }

  async #filesOf(map: LayerMap, chunks: ReadonlySet<number>): Promise<Map<number, ChunkFile>> {
    return filesOfChunks(await this.#options.readIndex(map.layerId), map.layer.index.chunkBytes, chunks);
  }

  /** Keeps what was recorded, where that does not take long. */
  async close(): Promise<void> {
    await Promise.race([this.#recorder.close(), sleep(KEEP_WAIT_MS, undefined, { ref: false })]);
    this.#scheduler.close();
  }
}

/** The files that chunks of a layer belong to. */
export function filesOfChunks(
  { entries }: Pick<LayerIndex, 'entries'>,
  chunkBytes: number,
  chunks: ReadonlySet<number>,
): Map<number, ChunkFile> {
  const found = new Map<number, ChunkFile>();
  for (let i = 0; i < entries.count; i++) {
    if (entries.type[i] !== EntryType.file) continue;
    const first = entries.firstChunk[i]!;
    for (let part = 0; part < entries.chunkCount[i]!; part++)
      if (chunks.has(first + part)) found.set(first + part, { path: entries.name[i]!, offset: part * chunkBytes });
  }
  return found;
}

function keyOf(layerIds: readonly number[]): string {
  return layerIds.join(' ');
}

/** An identity from what is known of layers. */
export function identityOf(
  layers: readonly {
    readonly digest: string;
    readonly sources: readonly { readonly host: string; readonly repository: string }[];
  }[],
  about: {
    readonly tag?: string | undefined;
    readonly manifest?: string | undefined;
    readonly repository?: string | undefined;
  } = {},
): TraceIdentity {
  const digests = layers.map(({ digest }) => digest).filter(isDigest);
  const source = layers.at(-1)?.sources[0];
  const repository = about.repository ?? (source === undefined ? '' : `${source.host}/${source.repository}`);
  return { layers: digests, repository, tag: about.tag ?? '', manifest: about.manifest ?? '' };
}
