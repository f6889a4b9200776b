// Builds the images of chains that conversions have made lazy, before their directories may go: layers of which no image can
// be made are ordinary ones again. Run by converter.ts between two conversions, and after a restart in between again.
import { existsSync } from 'node:fs';
import type { Logger } from 'pino';
import { type ErrorCode, errorCode } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import type { ImageMounter, LayerKey } from './images.ts';
import type { Metastore } from './metastore-client.ts';
import type { SnapshotRecord } from './snapshot-record.ts';

export interface ConvertedChainsOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: Pick<ImageMounter, 'prebuildImage'>;
  /** Writes what is known of a snapshot beside it. */
  readonly describe: (snapshot: SnapshotRecord) => Promise<void>;
  /** Called when the directory of a converted layer may go. */
  readonly onProven: () => void;
  /** The first pause after a failure, milliseconds; each further one is twice as long. */
  readonly retryMs: number;
  readonly log: Logger;
}

/** A chain whose image could not be built, for a reason that may pass. */
export interface UnbuiltChain {
  readonly attempts: number;
  readonly reason: string;
  readonly givenUp: boolean;
  /** Not before, by performance.now(). */
  readonly notBeforeMs: number;
}

const LONGEST_RETRY_MS = 60_000;
/** Attempts in the life of a service; the directories stay. */
const ATTEMPTS = 5;

/** Failures of building an image that say that it can never be built. */
const UNUSABLE: ReadonlySet<ErrorCode> = new Set(['IMAGE_INVALID', 'INDEX_INVALID', 'LAYER_INVALID']);
/** Failures that say nothing of the image. */
const PASSING: ReadonlySet<ErrorCode> = new Set(['UNAVAILABLE', 'CANCELLED', 'CLOSED', 'UNIMPLEMENTED', 'STORE_FULL']);

/** `unusable`: its layers are ordinary ones again; `later`: nobody knows yet. */
type Outcome = { readonly is: 'built' | 'unusable' } | { readonly is: 'later'; readonly error: unknown };

export class ConvertedChains {
  readonly #options: ConvertedChainsOptions;
  /** By the converted snapshot that waits for it. */
  readonly #unbuilt = new Map<number, UnbuiltChain>();
  #building: { readonly id: number; readonly abort: AbortController } | undefined;

  constructor(options: ConvertedChainsOptions) {
    this.#options = options;
  }

  get unbuilt(): ReadonlyMap<number, UnbuiltChain> {
    return this.#unbuilt;
  }

  /** Ends what is under way; nothing is proven by it. */
  abort(): void {
    this.#building?.abort.abort();
  }

  /** Nobody waits for a snapshot that was removed. */
  removed(id: number): void {
    this.#unbuilt.delete(id);
    if (this.#building?.id === id) this.abort();
  }

  /** What was given up may be tried again. */
  retry(): void {
    this.#unbuilt.clear();
  }

  /**
   * Builds what has to be built before directories may go. Answers in how many milliseconds to look again; undefined when
   * there is nothing left that would change by itself. Errors: STORE_IO.
   */
  async prove(stop: () => boolean): Promise<number | undefined> {
    const { metastore, onProven } = this.#options;
    const outcomes = new Map<string, Outcome>();
    let againMs: number | undefined;
    const unproven = await metastore.unproven();
    for (const id of this.#unbuilt.keys()) if (!unproven.includes(id)) this.#unbuilt.delete(id);
    for (const id of unproven) {
      const failure = this.#unbuilt.get(id);
      if (failure?.givenUp === true) continue;
      const restMs = (failure?.notBeforeMs ?? 0) - performance.now();
      const waitsMs = restMs > 0 ? restMs : await this.#proveOne(id, outcomes, stop);
      if (stop()) return undefined;
      if (waitsMs !== undefined) {
        againMs = Math.min(againMs ?? waitsMs, waitsMs);
        continue;
      }
      onProven();
    }
    return againMs;
  }

  /** Milliseconds to its next attempt; undefined when its directory may go, or stays for good. */
  async #proveOne(id: number, outcomes: Map<string, Outcome>, stop: () => boolean): Promise<number | undefined> {
    const { metastore } = this.#options;
    for (const layers of await metastore.lazyChainsWith(id)) {
      if (stop()) return undefined;
      const chain = JSON.stringify(layers);
      const outcome = outcomes.get(chain) ?? (await this.#build(id, layers));
      if (outcome === undefined || stop()) return undefined;
      outcomes.set(chain, outcome);
      if (outcome.is === 'later') return this.#later(id, outcome.error);
      if (outcome.is === 'unusable') break; // Its chains are not lazy any more.
    }
    this.#unbuilt.delete(id);
    await metastore.proven(id);
    return undefined;
  }

  /** Undefined when it was ended: nobody knows. */
  async #build(id: number, layers: readonly LayerKey[]): Promise<Outcome | undefined> {
    const abort = new AbortController();
    const { promise: ended, resolve } = Promise.withResolvers<undefined>();
    abort.signal.addEventListener('abort', () => resolve(undefined), { once: true });
    this.#building = { id, abort };
    const build = this.#options.images.prebuildImage(layers).then(
      (): Outcome => ({ is: 'built' }),
      (error: unknown): Outcome => ({ is: 'later', error }),
    );
    try {
      const outcome = await Promise.race([build, ended]);
      if (outcome?.is !== 'later') return outcome;
      const { error } = outcome;
      if (UNUSABLE.has(errorCode(error))) {
        await this.#leaveAll(layers, error instanceof Error ? error.message : String(error));
        return { is: 'unusable' };
      }
      // dedupd does not know one of them: leftover-directories.ts asks for each, and takes that one back.
      return errorCode(error) === 'NOT_FOUND' ? { is: 'built' } : outcome;
    } finally {
      this.#building = undefined;
    }
  }

  #later(id: number, error: unknown): number | undefined {
    const { retryMs, log } = this.#options;
    const before = this.#unbuilt.get(id)?.attempts ?? 0;
    const attempts = Math.min(before + 1, ATTEMPTS);
    const givenUp = attempts === ATTEMPTS && !PASSING.has(errorCode(error));
    const pauseMs = Math.min(LONGEST_RETRY_MS, retryMs * 2 ** before);
    const reason = `no image was made of it yet: ${error instanceof Error ? error.message : String(error)}`;
    this.#unbuilt.set(id, { attempts, reason, givenUp, notBeforeMs: performance.now() + pauseMs });
    // It is built when it is mounted, and whoever mounts it is told; its directory stays.
    log.debug({ err: error, id, attempts }, 'the image of converted layers could not be built ahead');
    return givenUp ? undefined : pauseMs;
  }

  /** No image can be made of these layers: those that were converted are the ordinary ones again that they were. */
  async #leaveAll(layers: readonly LayerKey[], reason: string): Promise<void> {
    const { metastore, log } = this.#options;
    await this.makeOrdinary(layers, async ({ id, name }) => {
      await metastore.leave(id, reason);
      log.error({ id, name, reason }, 'no image can be made of a converted layer, it is left as it was');
    });
  }

  /** Makes those of these layers that were converted, and whose directories are there, ordinary again; how many. */
  async makeOrdinary(
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
}
