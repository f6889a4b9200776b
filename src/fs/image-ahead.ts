// Images whose layers are made ready before anybody asks for them: at the first Prepare that names the image, or by a pull of
// our own, which also has layers read whole that nothing names an index of. Called by data-plane.ts.
import { LRUCache } from 'lru-cache';
import type { Digest } from '../digest.ts';
import { DedupError, errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import { orAborted } from '../or-aborted.ts';
import type { LayerRecord, LayerSourceName } from './chunks/index-protocol.ts';
import { EagerLayers } from './eager-layers.ts';
import { EXPECTED_MS } from './expected-layers.ts';
import type { MountableLayer } from './image-metadata.ts';
import { INDEX_ANNOTATION } from './index/layer-index.ts';
import { classifyLayer } from './index/media-types.ts';
import type { LayerBook } from './layer-book.ts';
import type { LayerIntake, WantedLayer } from './layer-intake.ts';
import type { Repository } from './registry/blob-reader.ts';
import { MAX_JSON_BYTES, parseManifest } from './registry/image-manifest.ts';

/** What became of a layer that was made ready. */
export type Readiness =
  | { readonly kind: 'lazy' }
  /** It was read whole; `diffId` is what its bytes decompress to. */
  | { readonly kind: 'stored'; readonly diffId: string }
  | { readonly kind: 'declined'; readonly reason: string };

/** An image whose layers are made ready before anybody asks for them. */
export interface ImageAhead {
  /** For each layer of the manifest: what became of it, never rejected. Absent: it is an ordinary one. */
  readonly layers: readonly (Promise<Readiness> | undefined)[];
  /** Says that the pull has ended: what nobody's snapshot names is not kept for it any more. */
  ended(): void;
}

/** A layer as a manifest lists it. */
export interface ManifestLayer {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly annotations: Readonly<Record<string, string>>;
}

/** What a pull calls an image. */
export interface ImageName {
  readonly manifest: Digest;
  readonly source: LayerSourceName;
  /** Absent where the client names none. */
  readonly tag?: string | undefined;
}

/** Told how many compressed bytes of a layer, by its position, have been read; for layers that are read whole. */
export type ReadProgress = (position: number, bytesDone: number) => void;

export interface ImagesAheadOptions {
  readonly intake: LayerIntake;
  readonly book: LayerBook;
  readonly repository: (source: LayerSourceName) => Repository;
  /** True where layers without an index may be indexed here and their chunks have places of their own. */
  readonly readsWhole: boolean;
  /** Gets ready to build a file system, while indexes are on their way. */
  readonly expectBuild: () => void;
  /**
   * Builds the file system of an image whose indexes are all here, before anyone mounts it, and begins to fetch what its
   * start will read; `config` are the bytes of its configuration.
   */
  readonly prebuild: (layers: readonly MountableLayer[], config: Promise<Buffer>) => Promise<void>;
  /** Told of an image whose layers are all known, before its file system is built. */
  readonly known: (layers: readonly LayerRecord[], about: ImageName) => void;
  /** Told of an image of which layers were indexed here, with every pull of it. */
  readonly indexed: (manifest: Digest, source: LayerSourceName) => void;
  /** Aborted when the daemon stops. */
  readonly stop: AbortSignal;
  readonly log: Logger;
}

const NOBODY = (): boolean => false;

export class ImagesAhead {
  readonly #options: ImagesAheadOptions;
  readonly #intake: LayerIntake;
  readonly #eager: EagerLayers;
  /** Images that were looked at as a whole lately, by manifest and source. */
  readonly #prepared = new LRUCache<string, true>({ max: 1000, ttl: EXPECTED_MS });

  constructor(options: ImagesAheadOptions) {
    this.#options = options;
    const { intake } = options;
    this.#intake = intake;
    this.#eager = new EagerLayers({
      // The pull that waits for it keeps it from then on; when none does any more, nothing has to.
      takeIn: (wanted, blob, source, progress, signal) => intake.takeIn(wanted, blob, source, progress, signal, true),
      stop: options.stop,
    });
  }

  /** True while layers are read whole for a pull. */
  get isReading(): boolean {
    return this.#eager.isReading;
  }

  /**
   * At the first call that names an image: the indexes of all its layers are fetched together, and if every layer is
   * lazy its file system is built, while the client still asks for one layer after the other.
   */
  ofPrepare(manifest: Digest, sources: readonly LayerSourceName[]): void {
    const source = sources[0];
    const key = imageKey(manifest, source);
    if (source === undefined || this.#prepared.has(key)) return;
    this.#prepared.set(key, true);
    const fetchAhead = async (): Promise<void> => {
      const { bytes } = await this.#options.repository(source).getManifest(manifest, this.#options.stop);
      const { layers, config } = parseManifest(bytes, `manifest ${manifest}`);
      const rows = this.#addLayers(manifest, layers, sources, NOBODY);
      const configuration = this.#options
        .repository(source)
        .readBlob(config.digest, MAX_JSON_BYTES, this.#options.stop);
      void this.#tellIndexed(rows, manifest, source);
      await this.#build(rows, configuration, { manifest, source });
    };
    fetchAhead().catch((error: unknown) => this.#aheadFailed(manifest, source, error));
  }

  /**
   * The same for a pull of our own, which has the manifest in its hands and waits for each layer without a budget. Layers
   * are read whole from the position on that `wholeFrom` resolves to.
   */
  ofPull(
    manifest: Digest,
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    source: LayerSourceName & { readonly tag?: string | undefined },
    onRead: ReadProgress,
    wholeFrom: Promise<number>,
  ): ImageAhead {
    const end = new AbortController();
    const underWay = (): boolean => !end.signal.aborted;
    const stored = new Set<number>();
    const { host, repository } = source;
    const rows = this.#addLayers(manifest, layers, [{ host, repository }], underWay, (wanted, position) => {
      const { mediaType, digest, size } = layers[position]!;
      if (!this.#options.readsWhole) return undefined;
      if (!classifyLayer({ mediaType }).lazy) return undefined;
      const progress = (bytesDone: number): void => onRead(position, bytesDone);
      const signal = AbortSignal.any([end.signal, this.#options.stop]);
      const readWhole = async (): Promise<LayerRecord> => {
        // A pull that has ended says no more.
        const from = await orAborted(wholeFrom, signal, () => signal.reason);
        if (position < from) throw new DedupError('LAYER_NOT_LAZY', 'it is here, or for another snapshotter');
        stored.add(position);
        return this.#eager.read(wanted, { digest, size }, this.#options.repository(source), progress, signal);
      };
      // An index may be kept here of an earlier pull, or be found as a referrer.
      return this.#intake.layer(wanted, this.#options.stop).catch(async (error: unknown) => {
        if (errorCode(error) !== 'LAYER_NOT_LAZY') throw error;
        return await readWhole();
      });
    });
    this.#prepared.set(imageKey(manifest, source), true);
    const building = this.#build(rows, config, { manifest, source, tag: source.tag });
    building.catch((error: unknown) => this.#aheadFailed(manifest, source, error));
    void this.#tellIndexed(rows, manifest, source);
    return {
      layers: rows.map((row, position) =>
        row?.then(
          ({ diffId }): Readiness => (stored.has(position) ? { kind: 'stored', diffId } : { kind: 'lazy' }),
          // Where an index was named, its Prepare says why it is not lazy.
          (error: unknown): Readiness => ({
            kind: 'declined',
            reason: error instanceof Error ? error.message : String(error),
          }),
        ),
      ),
      ended: () => end.abort(new DedupError('CANCELLED', 'the pull has ended')),
    };
  }

  /**
   * Once nothing is awaited any more: of an image that has a layer indexed here, now or by an earlier pull, which may not have
   * come to publish it. Never rejects.
   */
  async #tellIndexed(
    layers: readonly (Promise<LayerRecord> | undefined)[],
    manifest: Digest,
    source: LayerSourceName,
  ): Promise<void> {
    const rows = await Promise.allSettled(layers);
    const made = rows.some((row) => row.status === 'fulfilled' && row.value?.trust === 'local');
    if (made && !this.#options.stop.aborted) this.#options.indexed(manifest, source);
  }

  /** Nothing depends on it: every Prepare asks for its own layer, and says why if that fails too. */
  #aheadFailed(manifest: Digest, source: LayerSourceName, error: unknown): void {
    this.#prepared.delete(imageKey(manifest, source));
    this.#options.log.debug({ err: error, manifest }, 'preparing an image ahead failed');
  }

  /** `readWhole`: what to do with a layer that nothing names an index of; absent, or without an answer: nothing. */
  #addLayers(
    manifest: Digest,
    layers: readonly Pick<ManifestLayer, 'digest' | 'annotations'>[],
    sources: readonly LayerSourceName[],
    underWay: () => boolean,
    readWhole?: (wanted: WantedLayer, position: number) => Promise<LayerRecord> | undefined,
  ): (Promise<LayerRecord> | undefined)[] {
    const scope = sources[0] === undefined ? '' : this.#intake.scopeOf(sources[0]);
    const image: number[] = [];
    return layers.map(({ digest, annotations }, position) => {
      const index = annotations[INDEX_ANNOTATION] ?? '';
      const key = { digest, index, scope };
      const wanted = { key, sources, manifest, reference: '' };
      const known = this.#options.book.find(key) !== undefined;
      const named = index !== '' || known;
      const layer = named ? this.#intake.layer(wanted, this.#options.stop) : readWhole?.(wanted, position);
      return layer?.then((row) => {
        image.push(row.id);
        if (!known) this.#intake.expected.forPull(row.id, image, underWay);
        return row;
      });
    });
  }

  /** Builds the file system of an image of which every layer is lazy. Errors: those of the layers. */
  async #build(
    layers: readonly (Promise<LayerRecord> | undefined)[],
    config: Promise<Buffer>,
    about: ImageName,
  ): Promise<void> {
    config.catch(() => undefined); // Looked at once the layers are here.
    if (layers.every((layer) => layer !== undefined)) this.#options.expectBuild();
    const rows = await Promise.all(layers);
    const lazy = rows.filter((row) => row !== undefined);
    if (lazy.length < rows.length) return;
    this.#options.known(lazy, about);
    await this.#options.prebuild(await Promise.all(lazy.map((row) => this.#intake.mountable(row))), config);
  }

  /** Says that layers were dropped: an image that had them is prepared anew when it is pulled again. */
  dropped(): void {
    this.#prepared.clear();
  }
}

function imageKey(manifest: Digest, source: LayerSourceName | undefined): string {
  return `${manifest} ${source?.host}/${source?.repository}`;
}
