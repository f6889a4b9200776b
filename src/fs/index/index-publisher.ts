// Pushes the indexes that this node made of an image's layers beside the image, for other nodes to find as a referrer.
// Runs in the background after a pull or a conversion; a registry that does not take them costs nobody anything.
import { readFile } from 'node:fs/promises';
import { LRUCache } from 'lru-cache';
import type { Digest } from '../../digest.ts';
import { DedupError, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import type { RootPaths } from '../../paths.ts';
import type { Repository } from '../registry/blob-reader.ts';
import { parseManifest } from '../registry/image-manifest.ts';
import { type LayerReport, pushReferrer } from './artifact.ts';
import { INDEX_ANNOTATION } from './layer-index.ts';

/** What is known here of a layer that this node has indexed. */
export interface LocalIndex {
  readonly indexDigest: string;
  readonly restartDigest: string;
}

export interface IndexPublisherOptions {
  readonly paths: RootPaths;
  /** The index that this node made of a layer; undefined when it made none. */
  readonly find: (layer: Digest) => LocalIndex | undefined;
  /** Aborted when the daemon stops. */
  readonly stop: AbortSignal;
  readonly log: Logger;
}

export class IndexPublisher {
  readonly #options: IndexPublisherOptions;
  /** Images that need no further look: published, or refused by their registry. */
  readonly #done = new LRUCache<string, true>({ max: 1000 });
  readonly #running = new Map<string, Promise<void>>();

  constructor(options: IndexPublisherOptions) {
    this.#options = options;
  }

  /**
   * Pushes the indexes of an image once all of its layers that have no index annotation have been indexed here. Never
   * rejects: what goes wrong is logged, once per image.
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
    const { log } = this.#options;
    try {
      const artifact = await this.#push(manifest, repository);
      if (artifact === undefined) return; // Layers are still to come.
      this.#done.set(key, true);
      log.info({ image: key, artifact }, 'the indexes of an image were pushed beside it');
    } catch (error) {
      if (this.#options.stop.aborted) return;
      // Whoever may read an image may often not write beside it; asking again with every container changes nothing.
      if (errorCode(error) !== 'DEADLINE') this.#done.set(key, true);
      log.warn({ err: error, image: key }, 'the indexes of an image could not be pushed beside it; they are kept here');
    }
  }

  async #push(manifest: Digest, repository: Repository): Promise<Digest | undefined> {
    const { paths, find, stop } = this.#options;
    const { bytes, mediaType } = await repository.getManifest(manifest, stop);
    const reports: LayerReport[] = [];
    for (const { digest, size, annotations } of parseManifest(bytes, `manifest ${manifest}`).layers) {
      if (annotations[INDEX_ANNOTATION] !== undefined) continue;
      const local = find(digest);
      if (local === undefined) return undefined;
      const index = await readFile(paths.layerIndex(local.indexDigest as Digest));
      const restart = await readFile(paths.layerRestart(local.restartDigest as Digest));
      await repository.putBlob(local.indexDigest as Digest, index, stop);
      await repository.putBlob(local.restartDigest as Digest, restart, stop);
      reports.push({
        digest,
        size,
        index: { digest: local.indexDigest as Digest, size: index.length },
        restart: { digest: local.restartDigest as Digest, size: restart.length },
      });
    }
    const artifact = await pushReferrer(repository, { mediaType, digest: manifest, size: bytes.length }, reports, stop);
    if (artifact === undefined) throw new DedupError('NOT_FOUND', 'no layer of the image lacks an index');
    return artifact;
  }
}
