// Has dedupd unmount the images and drop the layers that no snapshot uses, and sees to it that this happens: what fails, finds
// no quiet moment or comes too early is tried again. Called by cleanup.ts and when the service starts, which makes up for
// what an earlier one had still to do. Knows nothing of directories.
import type { Logger } from 'pino';
import { DedupError, errorCode } from '../errors.ts';
import type { Gate } from './gate.ts';
import type { ImageMounter, WaitingLayers } from './images.ts';
import type { Metastore } from './metastore-client.ts';

export interface ReleaseOptions {
  readonly metastore: Pick<Metastore, 'protectedUpTo' | 'inUse' | 'untoldSources' | 'addSource'>;
  readonly images: Pick<ImageMounter, 'answers' | 'releaseImages' | 'retainLayers' | 'prepareLayer'>;
  /** Shared by everything that takes a merged image or a lazy layer into use. */
  readonly gate: Gate;
  readonly log: Logger;
  /** The first pause before it is tried again, milliseconds; each further one is twice as long. */
  readonly firstPauseMs?: number;
  /** How long to wait for a moment in which nobody prepares a snapshot, milliseconds. */
  readonly gatePatienceMs?: number;
}

const FIRST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 60_000;
const GATE_PATIENCE_MS = 10_000;
/** What dedupd expects for a while must have ended when it is asked again. */
const AFTER_THE_MOMENT_MS = 50;
const NOBODY_WAITS: WaitingLayers = { waiting: 0, againMs: 0 };

export class Release {
  readonly #options: ReleaseOptions;
  #last: Promise<unknown> = Promise.resolve();
  /** Set while something is left to be released. */
  #timer: NodeJS.Timeout | undefined;
  #pauseMs: number;
  /** Why it did not happen since it last did: each cause is logged once. */
  readonly #told = new Set<string>();
  #closed = false;

  constructor(options: ReleaseOptions) {
    this.#options = options;
    this.#pauseMs = this.#firstPauseMs;
  }

  get #firstPauseMs(): number {
    return this.#options.firstPauseMs ?? FIRST_PAUSE_MS;
  }

  /**
   * Releases what nobody uses, after everybody who asked before. Answers why it did not happen, undefined when it did;
   * in both cases what is left is seen to later. Never rejects.
   */
  now(): Promise<string | undefined> {
    const attempt = this.#last.then(() => this.#attempt());
    this.#last = attempt;
    return attempt;
  }

  /** Releases after this time, unless somebody asks for it before. */
  later(delayMs: number): void {
    this.#againIn(delayMs);
  }

  /** Waits for what is under way and begins nothing more. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    await this.#last;
  }

  async #attempt(): Promise<string | undefined> {
    if (this.#closed) return 'the service is stopping';
    await this.#tellSources();
    try {
      if ((await this.#options.metastore.protectedUpTo()) > 0) {
        // Nothing changes that in the life of this service.
        this.#againIn(undefined);
        return 'snapshots of a lost metadata.db could not be restored, and what they use is not known';
      }
      await this.#options.images.answers();
      const { waiting, againMs } = await this.#release();
      this.#happened();
      const isKnown = waiting === 0 || againMs > 0;
      if (isKnown) this.#pauseMs = this.#firstPauseMs;
      this.#againIn(waiting === 0 ? undefined : isKnown ? againMs + AFTER_THE_MOMENT_MS : this.#nextPause());
      return undefined;
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      const againMs = this.#nextPause();
      this.#failed(error, reason, againMs);
      this.#againIn(againMs);
      return reason;
    }
  }

  /** Layers that nobody names and that stay a little longer. Errors: UNAVAILABLE, also when snapshots are being prepared. */
  async #release(): Promise<WaitingLayers> {
    const { metastore, images, gate, gatePatienceMs = GATE_PATIENCE_MS } = this.#options;
    let left = NOBODY_WAITS;
    const released = await gate.exclusive(async () => {
      const { mountIds, layers } = await metastore.inUse();
      await images.releaseImages(mountIds);
      left = await images.retainLayers(layers);
    }, gatePatienceMs);
    if (!released)
      throw new DedupError(
        'UNAVAILABLE',
        `snapshots were being prepared for ${gatePatienceMs / 1000} s without a pause`,
      );
    return left;
  }

  /** Tells dedupd of sources that it could not be told of, or leaves it to the next attempt. Never rejects. */
  async #tellSources(): Promise<void> {
    const { metastore, images, log } = this.#options;
    try {
      for (const { layer, source } of await metastore.untoldSources()) {
        await images.prepareLayer({ layer, sources: [source], manifest: '', siblings: [], budgetMs: 1000 });
        await metastore.addSource(layer.digest, source, true);
      }
    } catch (error) {
      log.debug({ err: error }, 'dedupd is told of further sources of its layers later');
    }
  }

  #nextPause(): number {
    const pauseMs = this.#pauseMs;
    this.#pauseMs = Math.min(LONGEST_PAUSE_MS, pauseMs * 2);
    return pauseMs;
  }

  /** Every attempt decides anew when the next one is; undefined: there is nothing to do. */
  #againIn(delayMs: number | undefined): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (delayMs === undefined || this.#closed) return;
    this.#timer = setTimeout(() => void this.now(), delayMs).unref();
  }

  #happened(): void {
    if (this.#told.size === 0) return;
    this.#told.clear();
    this.#options.log.info('what removed images used could not be released before and is released now');
  }

  #failed(error: unknown, reason: string, againMs: number): void {
    const code = errorCode(error);
    // Others name times and addresses, which differ.
    const cause = code === 'UNAVAILABLE' ? reason : code;
    const level = this.#told.has(cause) ? 'debug' : code === 'UNAVAILABLE' ? 'info' : 'warn';
    this.#told.add(cause);
    this.#options.log[level](
      { err: error, againMs },
      'what removed images used is not released yet, it is tried again',
    );
  }
}
