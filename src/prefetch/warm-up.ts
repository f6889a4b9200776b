// Brings images to the node before anyone asks for them: whole, or what their starts read. Puts together the resolution of a
// reference, layers, built metadata, traces and the scheduler; called by data-plane.ts for the RPC Warm and, at start, for the
// images of the configuration. Everything it fetches is fetched in the background, behind whatever somebody waits for.
import { setTimeout as sleep } from 'node:timers/promises';
import type { Config } from '../config.ts';
import type { Digest } from '../digest.ts';
import { DedupError, errorCode, wrapError } from '../errors.ts';
import type { LayerRecord, LayerSourceName } from '../fs/chunks/index-protocol.ts';
import type {
  WarmImageMessage,
  WarmLeftOutMessage,
  WarmProgressMessage,
  WarmRequestMessage,
} from '../fs/control-server.ts';
import type { MountableLayer } from '../fs/image-metadata.ts';
import type { LayerIdentity } from '../fs/layer-book.ts';
import type { WantedLayer } from '../fs/layer-intake.ts';
import type { LazyLoader } from '../fs/lazy-loader.ts';
import type { LayerMap, PieceRef } from '../fs/loadable-layer.ts';
import type { Repository } from '../fs/registry/blob-reader.ts';
import { formatPlatform, hostPlatform, parsePlatform } from '../fs/registry/image-manifest.ts';
import { formatReference, type ImageReference, parseReference } from '../fs/registry/reference.ts';
import { type ResolvedImage, type ResolvedLayer, resolveImage } from '../fs/resolve-image.ts';
import { Priority } from '../fs/span-ledger.ts';
import type { Logger } from '../log.ts';
import { BLOCK_BYTES, type ByteRange, formatBytes, roundUp } from '../units.ts';
import { MAX_CONFIG_BYTES, readTree, startCommandOf } from './image-start.ts';
import { Pace } from './pace.ts';
import { allPieces, piecesAt, spansNeeded } from './planner.ts';
import { identityOf, type Prefetch } from './prefetch.ts';
import { fetchStartFiles } from './start-files.ts';
import { findTrace } from './trace-artifact.ts';
import type { WarmEntry, WarmList } from './warm-list.ts';

/** How long an image is kept unless a caller says otherwise, milliseconds. */
const KEEP_MS = 24 * 3_600_000;
/** How often images of the configuration are looked at again, milliseconds. */
const AGAIN_MS = 24 * 3_600_000;
/** Delay before one that failed is tried again: the first, and the longest, milliseconds. */
const FIRST_RETRY_MS = 5_000;
const LAST_RETRY_MS = 30 * 60_000;
/** Before what failed is asked for once more, milliseconds. */
const SECOND_TRY_MS = 1_000;
/** Long lists are gone through for so long at a time, milliseconds, looked at after so many. */
const TURN_MS = 5;
const TURN_ITEMS = 256;
/** Pieces that no plan can bring are made here, so many at once. */
const PIECES_AT_ONCE = 16;

/** What is said of a layer that is left out, and not of the whole image. */
const LEFT_OUT_CODES = ['LAYER_NOT_LAZY', 'INDEX_INVALID', 'DIGEST_MISMATCH', 'REGISTRY_NOT_FOUND'];

export interface WarmUpOptions {
  /** A repository with the credentials given (user:password), or what is known for its host when empty. */
  readonly repository: (reference: ImageReference, credentials: string) => Repository;
  readonly remember: (host: string, credentials: string) => void;
  readonly scopeOf: (source: LayerSourceName) => string;
  /** A layer that has an index somewhere. Errors: LAYER_NOT_LAZY when it has none. */
  readonly known: (wanted: WantedLayer, signal: AbortSignal) => Promise<LayerRecord>;
  readonly find: (key: LayerIdentity) => LayerRecord | undefined;
  readonly mountable: (row: LayerRecord) => Promise<MountableLayer>;
  /** Builds the file system of an image; its metadata, where there can be such a file before a mount. */
  readonly prebuild: (layers: readonly MountableLayer[]) => Promise<string | undefined>;
  readonly prefetch: Pick<Prefetch, 'plan' | 'scheduler'>;
  readonly loader: Pick<LazyLoader, 'maps' | 'ensure' | 'readHere'>;
  readonly isPresent: (address: number, length: number) => boolean;
  readonly list: WarmList;
  readonly settings: Config['warm_up'];
  /** Look for a trace beside an image in its registry (configuration key `registry_traces`). */
  readonly registryTraces: boolean;
  /** Aborted when dedupd stops. */
  readonly stop: AbortSignal;
  readonly log: Logger;
  /** Waits for milliseconds, less when the signal is aborted: then it rejects. */
  readonly sleep?: (ms: number, signal: AbortSignal) => Promise<unknown>;
}

type Show = (message: Omit<WarmProgressMessage, 'reference'>) => void;
type Part = 'all' | 'trace' | 'registry' | 'version' | 'start' | 'nothing';

/** An image on its way. */
interface Warming {
  readonly name: string;
  readonly reference: ImageReference;
  readonly repository: Repository;
  readonly image: ResolvedImage;
  readonly rows: readonly LayerRecord[];
  readonly maps: readonly LayerMap[];
  /** Built metadata; undefined where a layer is left out, or none can be built before the mount. */
  readonly metadata: string | undefined;
  readonly bytesPerSecond: number | undefined;
  readonly show: Show;
  readonly signal: AbortSignal;
}

export class WarmUp {
  readonly #options: WarmUpOptions;
  readonly #sleep: (ms: number, signal: AbortSignal) => Promise<unknown>;
  /** Layers of images that are being warmed, which no list names yet. */
  readonly #underWay = new Set<ReadonlySet<number>>();

  constructor(options: WarmUpOptions) {
    this.#options = options;
    this.#sleep = options.sleep ?? ((ms, signal) => sleep(ms, undefined, { signal, ref: false }));
  }

  /** Numbers of the layers that are kept for having been warmed. */
  kept(): Set<number> {
    const kept = new Set<number>();
    for (const layers of this.#underWay) for (const id of layers) kept.add(id);
    for (const { layers } of this.#options.list.entries()) {
      for (const key of layers) {
        const row = this.#options.find(key);
        if (row !== undefined) kept.add(row.id);
      }
    }
    return kept;
  }

  listed(): WarmImageMessage[] {
    return this.#options.list.entries().map(({ reference, platform, layers, untilMs }) => ({
      reference,
      platform,
      layers: layers.length,
      until_ms: untilMs,
      configured: isConfigured(this.#options.settings, reference),
    }));
  }

  /**
   * Images are not kept any more for having been warmed; how many. Errors: INVALID_REFERENCE, NOT_FOUND when one was not
   * warmed, FAILED_PRECONDITION when the configuration names it; then all stay.
   */
  forget(references: readonly string[]): number {
    const names = references.map((text) => formatReference(parseReference(text)));
    for (const name of names) {
      if (isConfigured(this.#options.settings, name)) {
        throw new DedupError('FAILED_PRECONDITION', `${name} is kept warm by the configuration`, {
          hint: 'take it out of "warm_up.images" and restart dedupd',
        });
      }
      if (!this.#options.list.entries().some(({ reference }) => reference === name)) {
        throw new DedupError('NOT_FOUND', `${name} was not warmed, or its time is over`, {
          hint: '`dedupd warm --list` shows what is kept',
        });
      }
    }
    return this.#options.list.forget(new Set(names));
  }

  /**
   * Brings one image here; resolves to the last message when all that was planned is here. What came before a failure stays,
   * and is kept. Errors: INVALID_REFERENCE, INVALID_ARGUMENT, NOT_FOUND without such an image, LAYER_NOT_LAZY when none of its
   * layers can be loaded lazily, UNAVAILABLE when something could not be fetched, CANCELLED, and those of the registry.
   */
  async warm(
    request: WarmRequestMessage,
    show: (message: WarmProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<WarmProgressMessage> {
    const keepMs = request.keep_ms || KEEP_MS;
    return await this.#warm(request, Date.now() + keepMs, show, AbortSignal.any([signal, this.#options.stop]));
  }

  async #warm(
    request: WarmRequestMessage,
    untilMs: number,
    tell: (message: WarmProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<WarmProgressMessage> {
    const { settings, list, loader } = this.#options;
    const reference = parseReference(request.reference);
    const name = formatReference(reference);
    const show: Show = (message) => tell({ ...message, reference: name });
    const repository = this.#options.repository(reference, request.credentials);
    show(step('resolve'));
    const image = await this.#resolve(reference, repository, request.platform, signal);
    if (request.credentials !== '') this.#options.remember(reference.host, request.credentials);
    const held = new Set<number>();
    this.#underWay.add(held);
    try {
      show(step('index'));
      const leftOut: WarmLeftOutMessage[] = [];
      const found = await Promise.all(image.layers.map((layer) => this.#layer(layer, held, leftOut, signal)));
      const rows = found.filter((row) => row !== undefined);
      if (rows.length === 0) throw noneLazy(name, leftOut);
      const keys = rows.map(({ digest, indexDigest: index, scope }) => ({ digest, index, scope }));
      const platform = formatPlatform(request.platform === '' ? hostPlatform() : parsePlatform(request.platform));
      // Now, not at the end: what is interrupted stays for whoever goes on with it.
      const kept: WarmEntry = list.put({ reference: name, platform, layers: keys, untilMs });
      show(step('build'));
      const mountable = await Promise.all(rows.map((row) => this.#options.mountable(row)));
      const metadata = leftOut.length > 0 ? undefined : await this.#options.prebuild(mountable);
      const maps = await loader.maps(rows.map(({ id }) => id));
      signal.throwIfAborted();
      const bytesPerSecond = request.bytes_per_second || settings.rate_bytes_per_second || undefined;
      const warming = { name, reference, repository, image, rows, maps, metadata, bytesPerSecond, show, signal };
      const { part, bytes } = await this.#fetchPart(warming, request.all);
      return {
        ...step('done', bytes, bytes),
        reference: name,
        part,
        manifest: image.manifest,
        layers: image.layers.length,
        left_out: leftOut,
        until_ms: kept.untilMs,
      };
    } catch (error) {
      throw signal.aborted ? cancelled(name, signal, error) : error;
    } finally {
      this.#underWay.delete(held);
    }
  }

  async #resolve(
    reference: ImageReference,
    repository: Repository,
    platform: string,
    signal: AbortSignal,
  ): Promise<ResolvedImage> {
    try {
      return await resolveImage(reference, repository, platform, this.#options.scopeOf, signal);
    } catch (cause) {
      const name = formatReference(reference);
      if (signal.aborted) throw cancelled(name, signal, cause);
      if (errorCode(cause) !== 'REGISTRY_NOT_FOUND') throw cause;
      const hint = `is the name right? ${reference.host} has no ${reference.path} with that tag or digest`;
      throw new DedupError('NOT_FOUND', `there is no image ${name}`, { cause, hint });
    }
  }

  /** The row of a layer, which is held from then on; undefined when it is left out. */
  async #layer(
    { wanted }: ResolvedLayer,
    held: Set<number>,
    leftOut: WarmLeftOutMessage[],
    signal: AbortSignal,
  ): Promise<LayerRecord | undefined> {
    try {
      const row = await this.#options.known(wanted, signal);
      held.add(row.id);
      return row;
    } catch (error) {
      if (!LEFT_OUT_CODES.includes(errorCode(error))) throw error;
      leftOut.push({ digest: wanted.key.digest, reason: (error as Error).message });
      return undefined;
    }
  }

  async #fetchPart(warming: Warming, all: boolean): Promise<{ part: Part; bytes: number }> {
    const { maps, metadata } = warming;
    if (all) return { part: 'all', bytes: await this.#fetch(allPieces(maps), warming) };
    const foreseen = await this.#foresee(warming);
    // Another version's trace may say nothing of this one.
    if (foreseen !== undefined && foreseen.pieces.length > 0) {
      const part = foreseen.from === 'node' ? 'trace' : foreseen.from;
      return { part, bytes: await this.#fetch(foreseen.pieces, warming) };
    }
    return metadata === undefined ? { part: 'nothing', bytes: 0 } : await this.#fetchStart(metadata, warming);
  }

  #foresee({ reference, repository, image, rows, metadata, signal }: Warming): ReturnType<Prefetch['plan']> {
    const about = {
      manifest: image.manifest,
      tag: reference.tag,
      repository: `${reference.host}/${reference.path}`,
    };
    return this.#options.prefetch.plan(
      {
        layerIds: rows.map(({ id }) => id),
        identity: identityOf(rows, about),
        registry: this.#options.registryTraces
          ? (layers: readonly Digest[]) => findTrace(repository, image.manifest, layers, signal)
          : undefined,
        signal,
      },
      metadata,
    );
  }

  /** Fetches what the image's command is certain to read. */
  async #fetchStart(metadata: string, warming: Warming): Promise<{ part: Part; bytes: number }> {
    const { image, maps, rows, signal, show } = warming;
    const { loader, isPresent } = this.#options;
    const tree = image.config.length > MAX_CONFIG_BYTES ? undefined : await readTree(metadata);
    if (tree === undefined) return { part: 'nothing', bytes: 0 };
    const pace = new Pace(warming.bytesPerSecond);
    const options = { layers: rows.map(({ id }) => id), priority: Priority.background, signal };
    const asked: PieceRef[] = [];
    let [done, total] = [0, 0];
    const ensure = async (ranges: readonly ByteRange[]): Promise<void> => {
      const pieces = ranges.flatMap((range) => [...piecesAt(range, maps)]);
      asked.push(...pieces);
      const bytes = await compressedBytes(pieces, isPresent);
      total += bytes;
      await pace.take(bytes, signal);
      await loader.ensure(ranges, options);
      done += bytes;
      show(step('fetch', done, total));
    };
    await fetchStartFiles(tree, startCommandOf(image.config), {
      ensure,
      read: async (ranges) => {
        await ensure(ranges);
        return Buffer.concat(await Promise.all(ranges.map((range) => loader.readHere(range))));
      },
    });
    // Single files are hints there, and pass over their failures; here somebody wants to know.
    signal.throwIfAborted();
    return { part: 'start', bytes: done + (await this.#fetch(asked, warming)) };
  }

  /**
   * Fetches what is absent of pieces; once more where something failed. Returns the compressed bytes that were wanted.
   * Errors: UNAVAILABLE naming how much is missing.
   */
  async #fetch(pieces: Iterable<PieceRef>, warming: Warming): Promise<number> {
    const { isPresent } = this.#options;
    const { name, show, signal } = warming;
    let missing = await absent(pieces, isPresent);
    const total = await compressedBytes(missing, isPresent);
    if (total > 0) show(step('fetch', 0, total));
    let allCame = await this.#run(missing, total, warming);
    missing = await absent(missing, isPresent);
    if (missing.length > 0 && !allCame) {
      await this.#sleep(SECOND_TRY_MS, signal);
      allCame = await this.#run(missing, total, warming);
      missing = await absent(missing, isPresent);
    }
    // Zeros that no span holds, pieces that reach over more spans than are decoded at once, and what was evicted meanwhile; or
    // the first of many that do not come: it says why.
    const failure = await this.#make(allCame ? missing : missing.slice(0, 1), warming);
    missing = await absent(missing, isPresent);
    if (missing.length === 0) return total;
    const bytes = missing.reduce((sum, { length }) => sum + length, 0);
    const why = failure instanceof Error ? `: ${failure.message}` : '';
    throw new DedupError(
      'UNAVAILABLE',
      `${name}: ${formatBytes(bytes)} in ${missing.length} pieces are missing still${why}`,
      {
        cause: failure,
        hint:
          failure === undefined
            ? 'is "quota_bytes" too small for it? what is not used gives way there'
            : 'run it again: what is here is not fetched again',
      },
    );
  }

  /** Has the scheduler fetch what is absent of pieces, until nothing comes any more. Returns whether all came that was asked for. */
  async #run(pieces: Iterable<PieceRef>, total: number, warming: Warming): Promise<boolean> {
    const { signal, bytesPerSecond, show } = warming;
    let done = 0;
    let allCame = true;
    await this.#options.prefetch.scheduler.run({
      spans: spansNeeded(pieces, this.#options.isPresent),
      maxUnreadBytes: Number.POSITIVE_INFINITY,
      ...(bytesPerSecond === undefined ? {} : { bytesPerSecond }),
      priority: Priority.background,
      signal,
      onProgress: (bytes, complete) => {
        if (!complete) allCame = false;
        else show(step('fetch', Math.min((done += bytes), total), total));
      },
    });
    signal.throwIfAborted();
    return allCame;
  }

  /** Brings pieces here one by one, out of whatever spans they need. Returns the first failure. */
  async #make(pieces: readonly PieceRef[], { rows, signal, bytesPerSecond }: Warming): Promise<unknown> {
    const pace = new Pace(bytesPerSecond);
    const options = { layers: rows.map(({ id }) => id), priority: Priority.background, signal };
    for (let at = 0; at < pieces.length; at += PIECES_AT_ONCE) {
      const some = pieces.slice(at, at + PIECES_AT_ONCE);
      try {
        await pace.take(await compressedBytes(some, this.#options.isPresent), signal);
        await this.#options.loader.ensure(some.map(blocksOf), options);
      } catch (error) {
        signal.throwIfAborted();
        return error;
      }
    }
    return undefined;
  }

  /** Brings the images of the configuration here, one after the other, and again every day; until dedupd stops. Never rejects. */
  async keepConfigured(): Promise<void> {
    const { settings, stop, log } = this.#options;
    if (settings.images.length === 0) return;
    try {
      for (;;) {
        await this.#warmConfigured();
        await this.#sleep(AGAIN_MS, stop);
      }
    } catch (error) {
      if (!stop.aborted) log.error({ err: error }, 'the images of the configuration are not kept warm any more');
    }
  }

  /** All of them once; those that fail again and again, with growing delay. Rejects when dedupd stops. */
  async #warmConfigured(): Promise<void> {
    const { settings, stop, log } = this.#options;
    const told = new Set<string>();
    let waiting: readonly string[] = [...new Set(settings.images)];
    for (let delayMs = FIRST_RETRY_MS; waiting.length > 0; delayMs = Math.min(LAST_RETRY_MS, delayMs * 2)) {
      const failed: string[] = [];
      for (const reference of waiting) {
        stop.throwIfAborted();
        try {
          const request = { reference, platform: '', credentials: '', bytes_per_second: 0, keep_ms: 0 };
          // Kept while it is configured, and no longer: its own time is over at once.
          const result = await this.#warm({ ...request, all: settings.all }, 0, () => {}, stop);
          log.info({ reference, part: result.part, bytes: result.bytes_total, leftOut: result.left_out }, 'warmed');
        } catch (error) {
          stop.throwIfAborted();
          failed.push(reference);
          const level = told.has(reference) ? 'debug' : 'warn';
          log[level]({ err: error, reference }, 'an image cannot be warmed now; it is tried again');
          told.add(reference);
        }
      }
      waiting = failed;
      if (waiting.length > 0) await this.#sleep(delayMs, stop);
    }
  }
}

/** True when the configuration names an image, in whatever form. */
export function isConfigured({ images }: Config['warm_up'], reference: string): boolean {
  return images.some((text) => {
    try {
      return formatReference(parseReference(text)) === reference;
    } catch {
      return false; // Said when it is warmed.
    }
  });
}

function step(name: WarmProgressMessage['step'], done = 0, total = 0): Omit<WarmProgressMessage, 'reference'> {
  const rest = { part: '', manifest: '', layers: 0, left_out: [], until_ms: 0 };
  return { step: name, bytes_done: done, bytes_total: total, ...rest };
}

function cancelled(name: string, signal: AbortSignal, cause: unknown): DedupError {
  const why = signal.reason instanceof Error ? signal.reason.message : 'it was given up';
  return wrapError(new DedupError('CANCELLED', why, { cause }), `warming ${name}`);
}

function noneLazy(name: string, leftOut: readonly WarmLeftOutMessage[]): DedupError {
  const reason = leftOut[0]?.reason ?? 'it has no layers';
  return new DedupError('LAYER_NOT_LAZY', `no layer of ${name} can be loaded lazily: ${reason}`, {
    hint: `give it an index: dedup-snapshotter index ${name}`,
  });
}

/** Compressed bytes of the spans that absent pieces need. */
async function compressedBytes(pieces: Iterable<PieceRef>, isPresent: WarmUpOptions['isPresent']): Promise<number> {
  let sum = 0;
  await inTurns(spansNeeded(pieces, isPresent), ({ bytes }) => {
    sum += bytes;
  });
  return sum;
}

async function absent(pieces: Iterable<PieceRef>, isPresent: WarmUpOptions['isPresent']): Promise<PieceRef[]> {
  const found: PieceRef[] = [];
  await inTurns(pieces, (piece) => {
    if (!isPresent(piece.address, piece.length)) found.push(piece);
  });
  return found;
}

/** Does something for each of very many, and lets others have the thread in between: readers are answered on it. */
async function inTurns<T>(items: Iterable<T>, each: (item: T) => void): Promise<void> {
  let [count, sinceMs] = [0, performance.now()];
  for (const item of items) {
    each(item);
    if (++count % TURN_ITEMS !== 0 || performance.now() - sinceMs < TURN_MS) continue;
    await new Promise((resolve) => setImmediate(resolve));
    sinceMs = performance.now();
  }
}

/** The whole blocks of a piece. */
function blocksOf({ address, length }: PieceRef): ByteRange {
  return { offset: address, length: roundUp(length, BLOCK_BYTES) };
}
