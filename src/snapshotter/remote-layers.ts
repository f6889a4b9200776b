// Decides whether the layer of one Prepare can be a remote snapshot, within the time Prepare may hold containerd's
// lock, and remembers every source a layer was offered from. Called by the snapshotter; commits nothing itself.
import { LRUCache } from 'lru-cache';
import type { Logger } from 'pino';
import type { Digest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { ImageMounter, LayerKey, Source } from './images.ts';
import { type LayerLabels, namespaceOf } from './labels.ts';
import type { Metastore } from './metastore-client.ts';

/** A layer as an image lists it, and where the image is. */
export interface LocatedLayer {
  readonly digest: Digest;
  /** Absent when the client does not say. */
  readonly manifest?: Digest | undefined;
  readonly sources: readonly Source[];
}

/** Looks for a layer among the images of a namespace, where the client names its index but no image. */
export interface LayerFinder {
  /** Undefined when no image there lists the index. Errors: UNAVAILABLE, CANCELLED. */
  find(namespace: string, index: Digest, signal: AbortSignal): Promise<LocatedLayer | undefined>;
}

export interface RemoteLayersOptions {
  readonly metastore: Metastore;
  readonly images: ImageMounter;
  /** Where an image reference points. Errors: INVALID_REFERENCE. */
  readonly sourceOf: (reference: string) => Source;
  /** Absent: a layer whose client names no image is an ordinary one. */
  readonly finder?: LayerFinder | undefined;
  /** What Prepare may spend on the network, milliseconds. */
  readonly budgetMs: number;
  readonly log: Logger;
}

/** Distinct reasons kept so that each is logged once; beyond that it starts anew, to stay bounded. */
const REASONS_KEPT = 1000;
/** Most of the budget that finding a layer may take. */
const FIND_SHARE = 0.5;
/**
 * How long a source that was found and did not serve is not tried again, milliseconds: it may be the wrong port of the
 * right host, which never answers, and a pull asks for every layer.
 */
const USELESS_MS = 60_000;

export class RemoteLayers {
  readonly #options: RemoteLayersOptions;
  readonly #said = new Set<string>();
  /** Sources that were found, and did not serve. */
  readonly #useless = new LRUCache<string, true>({ max: 1000, ttl: USELESS_MS });

  constructor(options: RemoteLayersOptions) {
    this.#options = options;
  }

  /**
   * The layer as dedupd knows it, or undefined with the reason logged once: then it is unpacked normally. `key` is that
   * of the Prepare: it begins with containerd's namespace.
   */
  async tryPrepare(key: string, labels: LayerLabels): Promise<LayerKey | undefined> {
    const { metastore, images, budgetMs } = this.#options;
    const startedMs = performance.now();
    try {
      const located = this.#named(labels) ?? (await this.#find(key, labels));
      if (typeof located === 'string') return this.#ordinary(labels, located);
      const { digest, manifest, sources } = located;
      const { lazy, reason, layer } = await images.prepareLayer({
        layer: { digest, index: labels.index ?? '', scope: '' },
        sources: mergeSources(sources, await metastore.sources(digest)),
        manifest: manifest ?? '',
        siblings: labels.siblings.map((sibling) => ({ digest: sibling, index: '', scope: '' })),
        budgetMs: Math.max(1, Math.round(budgetMs - (performance.now() - startedMs))),
      });
      if (!lazy) {
        if (labels.imageRef === undefined) for (const source of sources) this.#useless.set(sourceKey(source), true);
        return this.#ordinary(labels, reason);
      }
      for (const source of sources) await metastore.addSource(digest, source, true);
      return layer;
    } catch (error) {
      if (!(error instanceof DedupError)) throw error;
      return this.#ordinary(labels, `${error.message} (${error.code})`);
    }
  }

  /** The layer as the labels name it; undefined when they do not. Errors: INVALID_REFERENCE. */
  #named(labels: LayerLabels): LocatedLayer | undefined {
    const { layer: digest, imageRef, manifest } = labels;
    if (digest === undefined || imageRef === undefined) return undefined;
    return { digest, manifest, sources: [this.#options.sourceOf(imageRef)] };
  }

  /** The layer as an image of the node lists it, or why there is none. */
  async #find(key: string, labels: LayerLabels): Promise<LocatedLayer | string> {
    const { finder, budgetMs } = this.#options;
    const reason = `the client sends no ${labels.layer === undefined ? 'layer digest' : 'image reference'} with the layer`;
    const namespace = namespaceOf(key);
    if (finder === undefined || namespace === undefined || labels.index === undefined) return reason;
    let found: LocatedLayer | undefined;
    try {
      found = await finder.find(namespace, labels.index, AbortSignal.timeout(budgetMs * FIND_SHARE));
    } catch (error) {
      if (!(error instanceof DedupError)) throw error;
      return `${reason}, and ${error.message} (${error.code})`;
    }
    if (found === undefined) return `${reason}, and no image in containerd's content lists it`;
    const sources = found.sources.filter((source) => !this.#useless.has(sourceKey(source)));
    if (sources.length > 0) return { ...found, sources };
    return `${reason}, and where containerd says that its image is from, its index could not be had a moment ago`;
  }

  /** Keeps a further source of a layer whose snapshot exists already; the source, when the labels name one. */
  async keepSource(labels: LayerLabels, layer: LayerKey): Promise<Source | undefined> {
    const { metastore, sourceOf, log } = this.#options;
    if (labels.imageRef === undefined) return undefined;
    // One that was compressed anew, or a converted one without a name of its own: that registry has not got it.
    if (labels.layer !== undefined && labels.layer !== layer.digest) return undefined;
    let source: Source;
    try {
      source = sourceOf(labels.imageRef);
    } catch (error) {
      log.warn({ err: error, reference: labels.imageRef }, 'a layer was offered under a reference that is not one');
      return undefined;
    }
    await metastore.addSource(layer.digest, source, false);
    return source;
  }

  /** Tells dedupd of a kept source; when that fails, Cleanup tells it again. Errors: STORE_IO. */
  async tell(layer: LayerKey, source: Source): Promise<void> {
    const { metastore, images, log } = this.#options;
    try {
      await images.prepareLayer({ layer, sources: [source], manifest: '', siblings: [], budgetMs: 1000 });
    } catch (error) {
      log.debug({ err: error, layer: layer.digest }, 'a further source is told to dedupd later');
      return;
    }
    await metastore.addSource(layer.digest, source, true);
  }

  /**
   * Tells dedupd of layers that it has forgotten, with the sources that are known here. Errors: UNAVAILABLE when one of
   * them cannot be learned now.
   */
  async learnAgain(layers: readonly LayerKey[]): Promise<void> {
    const { metastore, images, budgetMs, log } = this.#options;
    log.warn({ layers: layers.length }, 'dedupd has forgotten layers of a snapshot, they are looked up again');
    const reasons = await Promise.all(
      layers.map(async (layer) => {
        const sources = await metastore.sources(layer.digest);
        const { lazy, reason } = await images.prepareLayer({ layer, sources, manifest: '', siblings: [], budgetMs });
        return lazy ? '' : reason;
      }),
    );
    const reason = reasons.find((text) => text !== '');
    if (reason !== undefined) {
      throw new DedupError(
        'UNAVAILABLE',
        `this node has forgotten a layer of the image and cannot look it up: ${reason}`,
        {
          hint: 'try again, or remove the image and pull it again',
        },
      );
    }
  }

  #ordinary(labels: LayerLabels, reason: string): undefined {
    const { log } = this.#options;
    const line = `${labels.layer ?? ''} ${reason}`;
    if (this.#said.has(line)) return undefined;
    if (this.#said.size >= REASONS_KEPT) this.#said.clear();
    this.#said.add(line);
    log.info(
      { layer: labels.layer, image: labels.imageRef, reason },
      'layer is not lazily loadable, it is pulled and unpacked the normal way',
    );
    return undefined;
  }
}

function sourceKey({ host, repository }: Source): string {
  return `${host}/${repository}`;
}

/** `first`, then what else is known. */
function mergeSources(first: readonly Source[], known: readonly Source[]): Source[] {
  const keys = new Set(first.map(sourceKey));
  return [...first, ...known.filter((source) => !keys.has(sourceKey(source)))];
}
