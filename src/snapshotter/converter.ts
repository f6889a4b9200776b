// Converts ordinary layers in the background, one at a time: dedupd cuts the directory that containerd unpacked into chunks,
// and from then on new keys are given the layer instead. Started by Commit and at start; never called inside one of
// containerd's transactions. Deletes nothing: leftover-directories.ts does.
import { lstat } from 'node:fs/promises';
import type { Logger } from 'pino';
import { DedupError, type ErrorCode, errorCode } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { ConvertedChains } from './converted-chains.ts';
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
import { RoomWaits } from './room-waits.ts';
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
  /** Called when a layer was converted and an image made of it: its directory may go; or the layer, removed meanwhile. */
  readonly onConverted: () => void;
  readonly log: Logger;
}

export interface ConverterStatus extends ConversionCounts {
  readonly paused: boolean;
  /** Why nothing is under way although something is pending; "" when there is no reason. */
  readonly waiting: string;
  readonly current: (ConvertProgress & { readonly id: number; readonly name: string }) | undefined;
  /** Layers, or images of converted ones, that failed: tried again later, or at the next start when `givenUp`. */
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

/** Failures that say nothing of any layer: dedupd is away, stopping, or older than us. */
const NOT_ITS_FAULT: ReadonlySet<ErrorCode> = new Set([
  'UNAVAILABLE',
  'CANCELLED',
  'DEADLINE',
  'CLOSED',
  'UNIMPLEMENTED',
]);

export class Converter {
  readonly #options: ConverterOptions;
  readonly #failures = new Map<number, Failure>();
  readonly #room: RoomWaits;
  readonly #chains: ConvertedChains;
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
    const { paths, metastore, images, describe, onConverted, retryMs = RETRY_MS, log } = options;
    this.#options = options;
    this.#room = new RoomWaits(retryMs);
    this.#chains = new ConvertedChains({ paths, metastore, images, describe, onProven: onConverted, retryMs, log });
  }

  /** Goes on where an earlier service ended. Errors: STORE_IO. */
  async start(): Promise<void> {
    this.#paused = (await this.#options.metastore.setting(PAUSED)) === '1';
    // Also where nothing is converted any more: what was may still have its directory.
    this.#wakeIn(this.#options.delayMs ?? DELAY_MS);
  }

  /** Says that there may be something to convert; it is looked for a little later. */
  kick(): void {
    if (this.#options.off === undefined) this.#wakeIn(this.#options.delayMs ?? DELAY_MS);
  }

  /** Room may have come up on the disk. */
  spaceGivenBack(): void {
    if (this.#room.lookAgain()) this.kick();
  }

  /** Ends the conversion of a snapshot that was removed. */
  removed(id: number): void {
    this.#failures.delete(id);
    this.#room.forget(id);
    this.#chains.removed(id);
    if (this.#current?.id === id) this.#current.abort.abort();
  }

  /** Ends what is under way; it starts over after resume(). Outlives the service. Errors: STORE_IO. */
  async pause(): Promise<void> {
    await this.#options.metastore.changeSetting(PAUSED, '1');
    this.#paused = true;
    this.#abort();
    await this.#running;
  }

  /** Goes on; what was given up is tried again, and what was left: its reason may have passed. Errors: STORE_IO. */
  async resume(): Promise<void> {
    await this.#options.metastore.changeSetting(PAUSED, '0');
    await this.#options.metastore.retryLeft();
    this.#paused = false;
    this.#failures.clear();
    this.#room.clear();
    this.#chains.retry();
    this.#away = undefined;
    this.#wakeIn(0);
  }

  /**
   * Makes converted snapshots the ordinary ones they were, because dedupd does not know their layers any more; as far as
   * their directories are there. They are converted anew. Answers how many. Errors: STORE_IO.
   */
  async takeBack(layers: readonly LayerKey[]): Promise<number> {
    const count = await this.#chains.makeOrdinary(layers, ({ id, name }) => {
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
      waiting: this.#options.off ?? this.#away?.reason ?? (current === undefined ? this.#room.reason : ''),
      current: current === undefined ? undefined : { id: current.id, name: current.name, ...current.progress },
      failed: [
        ...[...this.#failures].map(([id, { attempts, reason }]) => ({
          id,
          attempts,
          reason,
          givenUp: attempts >= ATTEMPTS,
        })),
        ...[...this.#chains.unbuilt].map(([id, { attempts, reason, givenUp }]) => ({ id, attempts, reason, givenUp })),
      ],
    };
  }

  /** Ends what is under way; the next start begins it anew. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#abort();
    await this.#running;
  }

  #abort(): void {
    this.#current?.abort.abort();
    this.#chains.abort();
  }

  #wakeIn(delayMs: number): void {
    const atMs = performance.now() + delayMs;
    if (this.#closed || atMs >= this.#timerAtMs) return;
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

  #stopped(): boolean {
    return this.#closed || this.#paused;
  }

  async #rounds(): Promise<void> {
    while (this.#again && !this.#closed) {
      this.#again = false;
      try {
        while (!this.#stopped()) {
          // While the directories are there, and so that the next Prepare does not pay for it.
          const againMs = await this.#chains.prove(() => this.#stopped());
          if (againMs !== undefined) this.#wakeIn(againMs);
          const next = this.#stopped() || this.#options.off !== undefined ? undefined : await this.#next();
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
      const notBeforeMs = Math.max(failure?.notBeforeMs ?? 0, this.#room.notBeforeMs(id) ?? 0);
      const early = notBeforeMs > now;
      if (early) this.#wakeIn(notBeforeMs - now);
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
    const progress: ConvertProgress = { bytes: 0, entries: 0, total: 0, held: '' };
    const current = { id, name, abort, progress };
    this.#current = current;
    try {
      const bytes = await this.#rememberUsage(snapshot);
      current.progress = { ...progress, total: bytes };
      if (this.#stopped()) return;
      const args = this.#arguments(snapshot, this.#room.needed(id, bytes));
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
      this.#room.forget(id);
      await this.#switch(snapshot, layer, args);
    } catch (error) {
      if (abort.signal.aborted)
        this.#options.onConverted(); // dedupd may have stored it all the same.
      else await this.#failed(snapshot, error, current.progress.bytes > 0);
    } finally {
      this.#current = undefined;
    }
  }

  /** What Usage answers must not change; containerd may not have asked yet. Its bytes. Errors: LAYER_NOT_LAZY without a directory. */
  async #rememberUsage({ id, usage }: SnapshotRecord): Promise<number> {
    const { paths, metastore } = this.#options;
    const directory = paths.snapshotFs(id);
    await lstat(directory).catch((error: unknown) => {
      if (!isErrno(error, 'ENOENT')) throw error;
      throw new DedupError('LAYER_NOT_LAZY', `its directory ${directory} is gone`);
    });
    if (usage !== undefined) return usage.bytes;
    const { bytes, inodes } = await diskUsage(directory);
    await metastore.setUsage(id, bytes, inodes);
    return bytes;
  }

  #arguments({ id, name, parentId, parent, labels }: SnapshotRecord, bytes: number): ConvertLayerArgs {
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
      bytes,
    };
  }

  /** From here on new keys are given the layer. Errors: STORE_IO. */
  async #switch({ id, name }: SnapshotRecord, layer: LayerKey, args: ConvertLayerArgs): Promise<void> {
    const { metastore, describe, onConverted, log } = this.#options;
    const converted = await metastore.convert(id, layer);
    if (converted === undefined) return onConverted(); // Removed meanwhile: nobody names the layer, dedupd drops it.
    await describe(converted);
    if (args.layer === layer.digest)
      for (const source of args.sources) await metastore.addSource(layer.digest, source, true);
    log.info({ id, name, layer: layer.digest }, 'ordinary layer converted, new containers read it from the store');
  }

  /** `begun`: some of it had been read. */
  async #failed({ id, name }: SnapshotRecord, error: unknown, begun: boolean): Promise<void> {
    const { metastore, retryMs = RETRY_MS, log } = this.#options;
    const code = errorCode(error);
    const reason = error instanceof Error ? error.message : String(error);
    if (code === 'LAYER_NOT_LAZY') {
      this.#failures.delete(id);
      this.#room.forget(id);
      await metastore.leave(id, reason);
      log.info({ id, name, reason }, 'an ordinary layer is left as it is');
      return;
    }
    if (code === 'STORE_FULL') {
      this.#away = undefined;
      const fresh = this.#room.add(id, reason.replace(/^dedupd: /u, ''), begun);
      if (fresh || begun) log.info({ id, name, reason, begun }, 'an ordinary layer waits for room');
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
