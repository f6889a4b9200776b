// Finds, fetches and keeps the verified indexes of layers (docs/formats/layer-index.md). dedupd owns one IndexCatalog
// per root. It decides from `index_trust` whether referrers are asked; it never reads a layer itself.
import { mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { type Digest, digestOf } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import { orAborted } from '../../or-aborted.ts';
import type { RootPaths } from '../../paths.ts';
import type { Repository } from '../registry/blob-reader.ts';
import { listedIndexes } from './artifact.ts';
import { decodeLayerIndex } from './format.ts';
import { MAX_INDEX_BYTES } from './format-limits.ts';
import type { LayerIndex } from './layer-index.ts';

/** A layer whose index is wanted. */
export interface WantedIndex {
  readonly layerDigest: Digest;
  /** Digest of the index blob, from the annotation or a referrer. */
  readonly indexDigest: Digest;
}

export type IndexTrust = 'annotation' | 'local' | 'referrer';

interface Fetch {
  readonly promise: Promise<LayerIndex>;
  readonly abort: AbortController;
  waiters: number;
}

export class IndexCatalog {
  readonly #paths: RootPaths;
  readonly #trust: ReadonlySet<IndexTrust>;
  readonly #fetches = new Map<string, Fetch>();

  constructor(options: { readonly paths: RootPaths; readonly trust?: readonly IndexTrust[] }) {
    this.#paths = options.paths;
    this.#trust = new Set(options.trust ?? ['annotation', 'local']);
  }

  /**
   * The index of a layer, from this node or else from `repository`; verified by its digest and decoded whole, whoever
   * wrote the file. Calls for the same index share one fetch, which ends when all of them are aborted.
   * Errors: INDEX_INVALID, DIGEST_MISMATCH, CANCELLED, and those of Repository.
   */
  async load(wanted: WantedIndex, repository: Repository, signal: AbortSignal): Promise<LayerIndex> {
    signal.throwIfAborted();
    const key = `${wanted.indexDigest} ${wanted.layerDigest}`;
    let fetch = this.#fetches.get(key);
    if (fetch === undefined) {
      const abort = new AbortController();
      const started: Fetch = { promise: this.#loadOnce(wanted, repository, abort.signal), abort, waiters: 0 };
      const done = (): void => {
        if (this.#fetches.get(key) === started) this.#fetches.delete(key);
      };
      started.promise.then(done, done);
      this.#fetches.set(key, started);
      fetch = started;
    }
    fetch.waiters++;
    try {
      return await orAborted(
        fetch.promise,
        signal,
        () => new DedupError('CANCELLED', 'loading an index: cancelled', { cause: signal.reason }),
      );
    } finally {
      if (--fetch.waiters === 0 && signal.aborted) {
        this.#fetches.delete(key);
        fetch.abort.abort(signal.reason);
      }
    }
  }

  /** Loads the indexes of an image's layers at once. Results in the order asked; an error stands in its place. */
  async loadAll(
    wanted: readonly WantedIndex[],
    repository: Repository,
    signal: AbortSignal,
  ): Promise<(LayerIndex | DedupError)[]> {
    return await Promise.all(
      wanted.map((one) =>
        this.load(one, repository, signal).catch((error: unknown) =>
          error instanceof DedupError ? error : wrapError(error, `loading the index of layer ${one.layerDigest}`),
        ),
      ),
    );
  }

  /**
   * An index kept on this node, verified; undefined when there is none. `parts` as in decodeLayerIndex.
   * Errors: INDEX_INVALID, DIGEST_MISMATCH when the file is damaged (it is removed, so that it is fetched anew).
   */
  async loadLocal(wanted: WantedIndex, parts: 'all' | 'chunks' = 'all'): Promise<LayerIndex | undefined> {
    const path = this.#paths.layerIndex(wanted.indexDigest);
    let blob: Buffer;
    try {
      blob = await readFile(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw wrapError(error, `reading ${path}`, 'STORE_IO');
    }
    try {
      return verifiedIndex(blob, wanted, parts);
    } catch (error) {
      // Only damage is removed: asked for under a wrong layer, a file may still be the right index of another one.
      if (error instanceof DedupError && error.code === 'DIGEST_MISMATCH') await rm(path, { force: true });
      throw error;
    }
  }

  /** Keeps an index that was built on this node, and its restart blob. Errors: STORE_IO. */
  async keep(indexBlob: Buffer, restartBlob: Buffer): Promise<Digest> {
    const digest = digestOf(indexBlob);
    await writeDurably(this.#paths.layerRestart(digestOf(restartBlob)), restartBlob);
    await writeDurably(this.#paths.layerIndex(digest), indexBlob);
    return digest;
  }

  /** Forgets an index, and its restart blob if `restart` is given. */
  async remove(index: Digest, restart?: Digest): Promise<void> {
    await rm(this.#paths.layerIndex(index), { force: true });
    if (restart !== undefined) await rm(this.#paths.layerRestart(restart), { force: true });
  }

  /**
   * Index digests by layer, from artifacts that refer to the image manifest `subject`. Empty unless `referrer` is
   * trusted. Errors: those of Repository; REGISTRY_PROTOCOL for an artifact that is no manifest.
   */
  async referrerIndexes(subject: Digest, repository: Repository, signal: AbortSignal): Promise<Map<Digest, Digest>> {
    if (!this.#trust.has('referrer')) return new Map();
    const listed = await listedIndexes(repository, subject, signal);
    return new Map([...listed].map(([layer, { index }]) => [layer, index.digest]));
  }

  async #loadOnce(wanted: WantedIndex, repository: Repository, signal: AbortSignal): Promise<LayerIndex> {
    const local = await this.loadLocal(wanted).catch((error: unknown) => {
      // A damaged file is gone now; the registry's copy takes its place. Another layer's index stays refused below.
      if (error instanceof DedupError && error.code === 'DIGEST_MISMATCH') return undefined;
      throw error;
    });
    if (local !== undefined) return local;
    const { indexDigest } = wanted;
    const blob = await repository.readBlob(indexDigest, MAX_INDEX_BYTES, signal);
    const index = verifiedIndex(blob, wanted, 'all');
    await writeDurably(this.#paths.layerIndex(indexDigest), blob);
    return index;
  }
}

function verifiedIndex(blob: Buffer, wanted: WantedIndex, parts: 'all' | 'chunks'): LayerIndex {
  const digest = digestOf(blob);
  if (digest !== wanted.indexDigest) {
    throw new DedupError('DIGEST_MISMATCH', `index ${wanted.indexDigest} has the digest ${digest}`);
  }
  const index = decodeLayerIndex(blob, { parts });
  if (index.layerDigest !== wanted.layerDigest) {
    throw new DedupError(
      'INDEX_INVALID',
      `index ${digest} is of layer ${index.layerDigest}, not of ${wanted.layerDigest}`,
    );
  }
  return index;
}

let temporaryNumber = 0;

/** Writes a file so that after a crash it is whole or not there. Errors: STORE_IO, STORE_FULL. */
async function writeDurably(path: string, bytes: Buffer): Promise<void> {
  const temporary = `${path}.${process.pid}.${temporaryNumber++}.tmp`;
  try {
    await mkdir(dirname(path), { recursive: true, mode: 0o700 });
    const file = await open(temporary, 'wx', 0o600);
    try {
      await file.writeFile(bytes);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, path);
    const directory = await open(dirname(path), 'r');
    try {
      await directory.sync();
    } finally {
      await directory.close();
    }
  } catch (error) {
    await rm(temporary, { force: true });
    const full = ['ENOSPC', 'EDQUOT'].includes((error as NodeJS.ErrnoException).code ?? '');
    throw wrapError(error, `writing ${path}`, full ? 'STORE_FULL' : 'STORE_IO');
  }
}
