// Pushes the indexes that this node made of an image's layers beside the image, for other nodes to find as a referrer.
// Runs in the background after a pull or a conversion; a registry that does not take them costs nobody anything.
import { readFile, stat } from 'node:fs/promises';
import { LRUCache } from 'lru-cache';
import type { Digest } from '../../digest.ts';
import { ERROR_CODES, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import type { RootPaths } from '../../paths.ts';
import type { Repository } from '../registry/blob-reader.ts';
import { parseManifest } from '../registry/image-manifest.ts';
import { holdsIndex, type LayerReport, listedIndexes, pushReferrer } from './artifact.ts';
import type { IndexTrust } from './discovery.ts';
import type { KeptIndex } from './kept-indexes.ts';
import { INDEX_ANNOTATION } from './layer-index.ts';

/** An index of a layer that this node believes. */
export interface KnownIndex {
  readonly indexDigest: string;
  readonly restartDigest: string;
  readonly restartSize: number;
  /** True when this node made it out of the layer; false when a registry gave it. */
  readonly madeHere: boolean;
}

/** The indexes of a layer among these rows and those kept, made here first; of other origin only where `trust` has it. */
export function knownIndexes(
  layer: Digest,
  rows: readonly KnownLayer[],
  kept: KeptIndex | undefined,
  trust: readonly IndexTrust[],
): KnownIndex[] {
  return rows
    .filter((row) => row.digest === layer && !row.condemned)
    .map((row) => ({ ...row, madeHere: row.trust === 'local' || row.indexDigest === kept?.index }))
    .filter(({ madeHere, trust: origin }) => madeHere || trust.includes(origin))
    .sort((a, b) => Number(b.madeHere) - Number(a.madeHere));
}

type KnownLayer = Omit<KnownIndex, 'madeHere'> & {
  readonly digest: string;
  readonly trust: IndexTrust;
  readonly condemned: boolean;
};

export interface IndexPublisherOptions {
  readonly paths: RootPaths;
  /** What is known of a layer here, best first; nothing when its index is still to be made. */
  readonly find: (layer: Digest) => readonly KnownIndex[];
  /** Aborted when the daemon stops. */
  readonly stop: AbortSignal;
  readonly log: Logger;
}

type Described = Pick<LayerReport, 'index' | 'restart'>;

/** What there is to push beside an image. */
interface Due {
  readonly reports: readonly LayerReport[];
  /** What each index made here consists of. */
  readonly own: readonly KnownIndex[];
  /** Layers left out: their indexes came with images of other repositories. */
  readonly foreign: readonly Digest[];
  /** False when the registry lists all of it already. */
  readonly news: boolean;
}

/** An image in a repository, as the log names it. */
interface Image {
  readonly key: string;
  readonly repository: Repository;
  readonly bytes: Uint8Array;
  readonly subject: { readonly mediaType: string; readonly digest: Digest; readonly size: number };
}

export class IndexPublisher {
  readonly #options: IndexPublisherOptions;
  /** Images that need no further look: published, or refused by their registry. */
  readonly #done = new LRUCache<string, true>({ max: 1000 });
  /** Why images are not published, or not whole, as it was said. */
  readonly #said = new LRUCache<string, true>({ max: 1000 });
  readonly #running = new Map<string, Promise<void>>();

  constructor(options: IndexPublisherOptions) {
    this.#options = options;
  }

  /**
   * Pushes the indexes of an image once all of its layers that have no index annotation are known here. An index that this
   * node did not make goes along only where it lies in the image's own repository already. Never rejects: what goes wrong,
   * or keeps an image from being published, is logged, once per image.
   */
  publish(manifest: Digest, repository: Repository): Promise<void> {
    const key = `${repository.name}@${manifest}`;
    if (this.#done.has(key)) return Promise.resolve();
    let running = this.#running.get(key);
    if (running === undefined) {
      running = this.#publish(manifest, repository, key).finally(() => this.#running.delete(key));
      this.#running.set(key, running);
    }
    return running;
  }

  async #publish(manifest: Digest, repository: Repository, key: string): Promise<void> {
    const { log, stop } = this.#options;
    try {
      const { bytes, mediaType } = await repository.getManifest(manifest, stop);
      const image = { key, repository, bytes, subject: { mediaType, digest: manifest, size: bytes.length } };
      const due = await this.#due(image);
      if (due === undefined) return;
      if (due.news) {
        const artifact = await this.#push(image, due);
        log.info({ image: key, artifact }, 'the indexes of an image were pushed beside it');
      }
      if (due.foreign.length === 0) this.#done.set(key, true);
      else
        this.#say(image, due.foreign, 'indexes of layers are not pushed beside an image: other repositories gave them');
    } catch (error) {
      if (stop.aborted) return;
      // Whoever may read an image may often not write beside it; asking again with every container changes nothing.
      if (!ERROR_CODES[errorCode(error)].retryable) this.#done.set(key, true);
      log.warn({ err: error, image: key }, 'the indexes of an image could not be pushed beside it; they are kept here');
    }
  }

  #say({ key }: Image, layers: readonly Digest[], what: string): void {
    if (this.#said.has(`${key} ${what}`)) return;
    this.#said.set(`${key} ${what}`, true);
    this.#options.log.info({ image: key, layers }, what);
  }

  /** Undefined while layers have no index at all; said once. */
  async #due(image: Image): Promise<Due | undefined> {
    const { find, stop } = this.#options;
    const { repository, bytes, subject } = image;
    const layers = parseManifest(bytes, `manifest ${subject.digest}`).layers.filter(
      ({ annotations }) => annotations[INDEX_ANNOTATION] === undefined,
    );
    const listed = await listedIndexes(repository, subject.digest, stop);
    const missing = layers.filter(({ digest }) => !listed.has(digest) && find(digest).length === 0);
    if (missing.length > 0) {
      const waiting = missing.map(({ digest }) => digest);
      this.#say(image, waiting, 'the indexes of an image are pushed beside it once these layers have one, too');
      return undefined;
    }
    const reports: LayerReport[] = [];
    const own: KnownIndex[] = [];
    const foreign: Digest[] = [];
    let news = false;
    for (const { digest, size } of layers) {
      const known = find(digest);
      const made = known.find(({ madeHere }) => madeHere);
      const before = listed.get(digest);
      const described =
        made === undefined ? (before ?? (await this.#beside(known, repository))) : await this.#described(made);
      if (described === undefined) {
        foreign.push(digest);
        continue;
      }
      if (made !== undefined) own.push(made);
      news ||= described.index?.digest !== before?.index?.digest;
      reports.push({ digest, size, ...described });
    }
    return { reports, own, foreign, news };
  }

  /**
   * Of indexes that a registry gave, the one that lies in this repository: whoever put it there may list it beside any image
   * of it. Pushing another repository's index would let that one's writers say what this one's images hold.
   */
  async #beside(known: readonly KnownIndex[], repository: Repository): Promise<Described | undefined> {
    for (const index of known) {
      if (await holdsIndex(repository, index, this.#options.stop)) return await this.#described(index);
    }
    return undefined;
  }

  async #described(known: KnownIndex): Promise<Described> {
    const index = known.indexDigest as Digest;
    const { size } = await stat(this.#options.paths.layerIndex(index));
    return {
      index: { digest: index, size },
      restart: { digest: known.restartDigest as Digest, size: known.restartSize },
    };
  }

  async #push({ repository, subject }: Image, { reports, own }: Due): Promise<Digest | undefined> {
    const { paths, stop } = this.#options;
    for (const { indexDigest, restartDigest } of own) {
      const [index, restart] = [indexDigest as Digest, restartDigest as Digest];
      await repository.putBlob(index, await readFile(paths.layerIndex(index)), stop);
      await repository.putBlob(restart, await readFile(paths.layerRestart(restart)), stop);
    }
    return await pushReferrer(repository, subject, reports, stop);
  }
}
