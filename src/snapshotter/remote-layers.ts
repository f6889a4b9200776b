// Decides whether the layer of one Prepare can be a remote snapshot, within the time Prepare may hold containerd's
// lock, and remembers every source a layer was offered from. Called by the snapshotter; commits nothing itself.
import type { Logger } from 'pino';
import { DedupError } from '../errors.ts';
import type { ImageMounter, LayerKey, Source } from './images.ts';
import type { LayerLabels } from './labels.ts';
import type { Metastore } from './metastore-client.ts';

export interface RemoteLayersOptions {
  readonly metastore: Metastore;
  readonly images: ImageMounter;
  /** Where an image reference points. Errors: INVALID_REFERENCE. */
  readonly sourceOf: (reference: string) => Source;
  /** What Prepare may spend on the network, milliseconds. */
  readonly budgetMs: number;
  readonly log: Logger;
}

/** Distinct reasons kept so that each is logged once; beyond that it starts anew, to stay bounded. */
const REASONS_KEPT = 1000;

export class RemoteLayers {
  readonly #options: RemoteLayersOptions;
  readonly #said = new Set<string>();

  constructor(options: RemoteLayersOptions) {
    this.#options = options;
  }

  /** The layer as dedupd knows it, or undefined with the reason logged once: then it is unpacked normally. */
  async tryPrepare(labels: LayerLabels): Promise<LayerKey | undefined> {
    const { metastore, images, budgetMs } = this.#options;
    const { layer: digest, imageRef } = labels;
    if (digest === undefined || imageRef === undefined) {
      const missing = digest === undefined ? 'layer digest' : 'image reference';
      return this.#ordinary(labels, `the client sends no ${missing} with the layer`);
    }
    try {
      const source = this.#options.sourceOf(imageRef);
      const { lazy, reason, layer } = await images.prepareLayer({
        layer: { digest, index: labels.index ?? '', scope: '' },
        sources: mergeSource(await metastore.sources(digest), source),
        manifest: labels.manifest ?? '',
        siblings: labels.siblings.map((sibling) => ({ digest: sibling, index: '', scope: '' })),
        budgetMs,
      });
      if (!lazy) return this.#ordinary(labels, reason);
      await metastore.addSource(digest, source, true);
      return layer;
    } catch (error) {
      if (!(error instanceof DedupError)) throw error;
      return this.#ordinary(labels, `${error.message} (${error.code})`);
    }
  }

  /** Keeps a further source of a layer whose snapshot exists already; the source, when the labels name one. */
  async keepSource(labels: LayerLabels, layer: LayerKey): Promise<Source | undefined> {
    const { metastore, sourceOf, log } = this.#options;
    if (labels.imageRef === undefined) return undefined;
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

  /** Tells dedupd of layers that it has forgotten, with the sources that are known here; true when it has them all. */
  async learnAgain(layers: readonly LayerKey[]): Promise<boolean> {
    const { metastore, images, budgetMs, log } = this.#options;
    log.warn({ layers: layers.length }, 'dedupd has forgotten layers of a snapshot, they are looked up again');
    const results = await Promise.all(
      layers.map(async (layer) => {
        const sources = await metastore.sources(layer.digest);
        if (sources.length === 0) return false;
        return (await images.prepareLayer({ layer, sources, manifest: '', siblings: [], budgetMs })).lazy;
      }),
    );
    return results.every(Boolean);
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

function mergeSource(known: readonly Source[], source: Source): Source[] {
  return [source, ...known.filter(({ host, repository }) => host !== source.host || repository !== source.repository)];
}
