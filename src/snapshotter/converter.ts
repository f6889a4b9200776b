// Converts ordinary layers in the background, one at a time: dedupd cuts the directory that containerd unpacked into chunks,
// and from then on new keys are given the layer instead. Started by Commit and at start; never called inside one of
// containerd's transactions. Deletes nothing: leftover-directories.ts does.
import { existsSync } from 'node:fs';
import { lstat } from 'node:fs/promises';
import type { Logger } from 'pino';
import { DedupError, type ErrorCode, errorCode } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { diskUsage } from './disk-tree.ts';
import { isErrno } from './errno.ts';
import type { ConvertLayerArgs, ConvertProgress, ImageMounter, LayerKey, Source } from './images.ts';
import {
  chainIdOf,
  digestLabel,
  LABEL_IMAGE_REF,
  LABEL_LAYER_DIGEST,
  LABEL_MANIFEST_DIGEST,
  namespaceOf,
} from './labels.ts';
import type { Metastore } from './metastore-client.ts';
import type { ConversionCounts } from './metastore-conversions.ts';
import type { SnapshotRecord } from './snapshot-record.ts';

export interface ConverterSettings {
  /** Why nothing is converted; absent: layers are. */
  readonly off?: string | undefined;
  /** From a Commit to the conversion it starts, milliseconds. */
  readonly delayMs?: number;
  /** The first pause after a failure, milliseconds; each further one is twice as long. */
  readonly retryMs?: number;
}

export interface ConverterOptions extends ConverterSettings {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: Pick<ImageMounter, 'convertLayer' | 'prebuildImage'>;
  /** Where an image reference points. Errors: INVALID_REFERENCE. */
  readonly sourceOf: (reference: string) => Source;
  /** Writes what is known of a snapshot beside it. */
  readonly describe: (snapshot: SnapshotRecord) => Promise<void>;
  /** Called when a layer was converted: its directory may go, or the layer, when its snapshot was removed meanwhile. */
  readonly onConverted: () => void;
  readonly log: Logger;
}

export interface ConverterStatus extends ConversionCounts {
  readonly paused: boolean;
  /** Why nothing is under way although something is pending; "" when there is no reason. */
  readonly waiting: string;
  readonly current: (ConvertProgress & { readonly id: number; readonly name: string }) | undefined;
  /** Pending ones that failed: tried again later, or at the next start of the service when `givenUp`. */
  readonly failed: readonly {
    readonly id: number;
    readonly attempts: number;
    readonly reason: string;
    readonly givenUp: boolean;
  }[];
}

interface Failure {
  attempts: number;
  reason: string;
  /** Not before, by performance.now(). */
  notBeforeMs: number;
}

const DELAY_MS = 2_000;
const RETRY_MS = 1_000;
const LONGEST_RETRY_MS = 60_000;
/** Attempts at one layer in the life of a service. */
const ATTEMPTS = 5;
const PAUSED = 'conversions.paused';

/** Failures that say nothing of the layer: dedupd is away, stopping, older than us, or has no room. */
const NOT_ITS_FAULT: ReadonlySet<ErrorCode> = new Set([
  'UNAVAILABLE',
  'CANCELLED',
  'DEADLINE',
  'CLOSED',
  'UNIMPLEMENTED',
  'STORE_FULL',
]);

/** Failures of building an image that say that it can never be built. */
const UNUSABLE: ReadonlySet<ErrorCode> = new Set(['IMAGE_INVALID', 'INDEX_INVALID', 'LAYER_INVALID']);

export class Converter {
  readonly #options: ConverterOptions;
  readonly #failures = new Map<number, Failure>();
  #running: Promise<void> | undefined;
  /** Something may have come up while a round was ending. */
  #again = false;
  #timer: NodeJS.Timeout | undefined;
  #timerAtMs = Number.POSITIVE_INFINITY;
  /** Why nothing can be converted at the moment, and until when that is taken for granted. */
  #away: { reason: string; pauseMs: number; untilMs: number } | undefined;
  #current: { id: number; name: string; abort: AbortController; progress: ConvertProgress } | undefined;
  #paused = false;
  #closed = false;

  constructor(options: ConverterOptions) {
    this.#options = options;
  }

  /** Goes on where an earlier service ended. Errors: STORE_IO. */
  async start(): Promise<void> {
    this.#paused = (await this.#options.metastore.setting(PAUSED)) === '1';
    this.kick();
  }

  /** Says that there may be something to convert; it is looked for a little later. */
  kick(): void {
    this.#wakeIn(this.#options.delayMs ?? DELAY_MS);
  }

  /** Ends the conversion of a snapshot that was removed. */
  removed(id: number): void {
    this.#failures.delete(id);
    if (this.#current?.id === id) this.#current.abort.abort();
  }

  /** Ends what is under way; it starts over after resume(). Outlives the service. Errors: STORE_IO. */
  async pause(): Promise<void> {
    await this.#options.metastore.changeSetting(PAUSED, '1');
    this.#paused = true;
    this.#current?.abort.abort();
    await this.#running;
  }

  /** Goes on; what was given up is tried again. Errors: STORE_IO. */
  async resume(): Promise<void> {
    await this.#options.metastore.changeSetting(PAUSED, '0');
    this.#paused = false;
    this.#failures.clear();
    this.#away = undefined;
    this.#wakeIn(0);
  }

  /**
   * Makes converted snapshots the ordinary ones they were, because dedupd does not know their layers any more; as far as
   * their directories are there. They are converted anew. Answers how many. Errors: STORE_IO.
   */
  async takeBack(layers: readonly LayerKey[]): Promise<number> {
    const count = await this.#makeOrdinary(layers, ({ id, name }) => {
      this.#options.log.warn({ id, name }, 'dedupd has forgotten a converted layer, it is an ordinary one again');
    });
    if (count > 0) this.kick();
    return count;
  }

  async status(): Promise<ConverterStatus> {
    const counts = await this.#options.metastore.conversionCounts();
    const current = this.#current;
    return {
      ...counts,
      paused: this.#paused,
      waiting: this.#options.off ?? this.#away?.reason ?? '',
      current: current === undefined ? undefined : { id: current.id, name: current.name, ...current.progress },
      failed: [...this.#failures].map(([id, { attempts, reason }]) => ({
        id,
        attempts,
        reason,
        givenUp: attempts >= ATTEMPTS,
      })),
    };
  }

  /** Ends what is under way; the next start begins it anew. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#current?.abort.abort();
    await this.#running;
  }

  #wakeIn(delayMs: number): void {
    const atMs = performance.now() + delayMs;
    if (this.#closed || this.#options.off !== undefined || atMs >= this.#timerAtMs) return;
    clearTimeout(this.#timer);
    this.#timerAtMs = atMs;
    this.#timer = setTimeout(() => {
      this.#timerAtMs = Number.POSITIVE_INFINITY;
      this.#run();
    }, delayMs).unref();
  }

  #run(): void {
    this.#again = true;
    if (this.#running !== undefined) return;
    this.#running = this.#rounds().finally(() => {
      this.#running = undefined;
    });
  }

  async #rounds(): Promise<void> {
    while (this.#again && !this.#closed) {
      this.#again = false;
      try {
        while (!this.#closed && !this.#paused) {
          const next = await this.#next();
          if (next === undefined) break;
          await this.#convert(next);
        }
      } catch (error) {
        // Of metadata.db: nothing was answered to anybody, and nothing is half done.
        this.#options.log.error({ err: error }, 'converting ordinary layers failed, it is tried again later');
        this.#wakeIn(LONGEST_RETRY_MS);
      }
    }
  }

  /** The oldest that may be converted now, but nothing before what lies below it. Sets the timer when one has to wait. */
  async #next(): Promise<SnapshotRecord | undefined> {
    const now = performance.now();
    if (this.#away !== undefined && this.#away.untilMs > now) {
      this.#wakeIn(this.#away.untilMs - now);
      return undefined;
    }
    const waiting = new Set<number>();
    for (const { id, parentId } of await this.#options.metastore.pendingConversions()) {
      const failure = this.#failures.get(id);
      if (failure !== undefined && failure.attempts >= ATTEMPTS) continue;
      const early = failure !== undefined && failure.notBeforeMs > now;
      if (early) this.#wakeIn(failure.notBeforeMs - now);
      if (early || (parentId !== undefined && waiting.has(parentId))) {
        waiting.add(id);
        continue;
      }
      const snapshot = await this.#options.metastore.byId(id);
      if (snapshot !== undefined) return snapshot; // Else it was removed meanwhile.
    }
    return undefined;
  }

  async #convert(snapshot: SnapshotRecord): Promise<void> {
    const { id, name } = snapshot;
    const { log } = this.#options;
    const abort = new AbortController();
    const current = { id, name, abort, progress: { bytes: 0, entries: 0 } };
    this.#current = current;
    try {
      await this.#rememberUsage(snapshot);
      if (this.#closed || this.#paused) return;
      const args = this.#arguments(snapshot);
      log.debug({ id, name }, 'conversion of an ordinary layer begins');
      const layer = await this.#options.images.convertLayer(
        args,
        (progress) => {
          current.progress = progress;
        },
        abort.signal,
      );
      this.#away = undefined;
      this.#failures.delete(id);
      await this.#switch(snapshot, layer, args, abort.signal);
    } catch (error) {
      if (abort.signal.aborted)
        this.#options.onConverted(); // dedupd may have stored it all the same.
      else await this.#failed(snapshot, error);
    } finally {
      this.#current = undefined;
    }
  }

  /** What Usage answers must not change; containerd may not have asked yet. Errors: LAYER_NOT_LAZY without a directory. */
  async #rememberUsage({ id, usage }: SnapshotRecord): Promise<void> {
    const { paths, metastore } = this.#options;
    const directory = paths.snapshotFs(id);
    await lstat(directory).catch((error: unknown) => {
      if (!isErrno(error, 'ENOENT')) throw error;
      throw new DedupError('LAYER_NOT_LAZY', `its directory ${directory} is gone`);
    });
    if (usage !== undefined) return;
    const { bytes, inodes } = await diskUsage(directory);
    await metastore.setUsage(id, bytes, inodes);
  }

  #arguments({ id, name, parentId, parent, labels }: SnapshotRecord): ConvertLayerArgs {
    const { paths, sourceOf, log } = this.#options;
    const sources: Source[] = [];
    const reference = labels[LABEL_IMAGE_REF] ?? '';
    try {
      if (reference !== '') sources.push(sourceOf(reference));
    } catch (error) {
      log.warn({ err: error, reference }, 'a layer was unpacked under a reference that is not one');
    }
    return {
      snapshot: id,
      directory: paths.snapshotFs(id),
      bottom: parentId === undefined,
      layer: digestLabel(labels, LABEL_LAYER_DIGEST) ?? '',
      manifest: digestLabel(labels, LABEL_MANIFEST_DIGEST) ?? '',
      sources,
      namespace: namespaceOf(name) ?? '',
      chainId: chainIdOf(name) ?? '',
      parentChainId: chainIdOf(parent) ?? '',
    };
  }

  /** From here on new keys are given the layer. Errors: STORE_IO. */
  async #switch(
    { id, name }: SnapshotRecord,
    layer: LayerKey,
    args: ConvertLayerArgs,
    signal: AbortSignal,
  ): Promise<void> {
    const { metastore, describe, onConverted, log } = this.#options;
    const converted = await metastore.convert(id, layer);
    if (converted === undefined) return onConverted(); // Removed meanwhile: nobody names the layer, dedupd drops it.
    await describe(converted);
    if (args.layer === layer.digest)
      for (const source of args.sources) await metastore.addSource(layer.digest, source, true);
    log.info({ id, name, layer: layer.digest }, 'ordinary layer converted, new containers read it from the store');
    // While the directories are there.
    for (const layers of await metastore.lazyChainsWith(id)) await this.#prebuild(layers, signal);
    onConverted();
  }

  /** So that the next Prepare does not pay for it. Nobody waits for it once the signal is aborted. */
  async #prebuild(layers: readonly LayerKey[], signal: AbortSignal): Promise<void> {
    if (signal.aborted) return;
    const { promise: ended, resolve } = Promise.withResolvers<void>();
    signal.addEventListener('abort', () => resolve(), { once: true });
    try {
      await Promise.race([this.#options.images.prebuildImage(layers), ended]);
    } catch (error) {
      if (UNUSABLE.has(errorCode(error))) {
        await this.#leaveAll(layers, error instanceof Error ? error.message : String(error));
        return;
      }
      // It is built when it is mounted, and whoever mounts it is told.
      this.#options.log.debug({ err: error }, 'the image of converted layers could not be built ahead');
    }
  }

  /** No image can be made of these layers: those that were converted are the ordinary ones again that they were. */
  async #leaveAll(layers: readonly LayerKey[], reason: string): Promise<void> {
    const { metastore, log } = this.#options;
    await this.#makeOrdinary(layers, async ({ id, name }) => {
      await metastore.leave(id, reason);
      log.error({ id, name, reason }, 'no image can be made of a converted layer, it is left as it was');
    });
  }

  /** Makes those of these layers that were converted, and whose directories are there, ordinary again; how many. */
  async #makeOrdinary(
    layers: readonly LayerKey[],
    made: (ordinary: SnapshotRecord) => void | Promise<void>,
  ): Promise<number> {
    const { metastore, paths, describe } = this.#options;
    let count = 0;
    for (const { id } of await metastore.convertedAs(layers)) {
      const ordinary = existsSync(paths.snapshotFs(id)) ? await metastore.takeBack(id) : undefined;
      if (ordinary === undefined) continue;
      count++;
      await made(ordinary);
      await describe(ordinary);
    }
    return count;
  }

  async #failed({ id, name }: SnapshotRecord, error: unknown): Promise<void> {
    const { metastore, retryMs = RETRY_MS, log } = this.#options;
    const code = errorCode(error);
    const reason = error instanceof Error ? error.message : String(error);
    if (code === 'LAYER_NOT_LAZY') {
      this.#failures.delete(id);
      await metastore.leave(id, reason);
      log.info({ id, name, reason }, 'an ordinary layer is left as it is');
      return;
    }
    const nowMs = performance.now();
    if (NOT_ITS_FAULT.has(code)) {
      const pauseMs = this.#away === undefined ? retryMs : Math.min(LONGEST_RETRY_MS, this.#away.pauseMs * 2);
      if (this.#away?.reason !== reason) log.info({ reason, code }, 'ordinary layers are converted later');
      this.#away = { reason, pauseMs, untilMs: nowMs + pauseMs };
      return;
    }
    const attempts = (this.#failures.get(id)?.attempts ?? 0) + 1;
    const pauseMs = Math.min(LONGEST_RETRY_MS, retryMs * 2 ** (attempts - 1));
    this.#failures.set(id, { attempts, reason, notBeforeMs: nowMs + pauseMs });
    log.warn({ err: error, id, name, attempts, of: ATTEMPTS }, 'an ordinary layer could not be converted');
  }
}
