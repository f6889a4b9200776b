// What stays and what goes of images, layers and their files, by what the service says it uses. Called by data-plane.ts;
// the only one that drops layers.
import { readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { type Digest, isDigest } from '../digest.ts';
import type { RootPaths } from '../paths.ts';
import type { NodeStore } from './chunks/node-store.ts';
import type { LayerKeyMessage, RetainedMessage } from './control-server.ts';
import type { ImagesAhead } from './image-ahead.ts';
import type { KeptIndexes } from './index/kept-indexes.ts';
import type { LayerBook } from './layer-book.ts';
import type { LayerIntake } from './layer-intake.ts';
import type { MountTable } from './mount-table.ts';

/** Layers that snapshots name, and those that were here when the list was made. */
interface NamedLayers {
  readonly layers: readonly LayerKeyMessage[];
  readonly before: ReadonlySet<number>;
}

export interface RetentionOptions {
  readonly paths: RootPaths;
  readonly store: NodeStore;
  readonly book: LayerBook;
  readonly kept: KeptIndexes;
  readonly intake: LayerIntake;
  readonly ahead: ImagesAhead;
  readonly mounts: MountTable;
  /** Layers that were brought here ahead of everybody who might name them. */
  readonly warmed: () => ReadonlySet<number>;
  /** Has reads of these layers, as long as `goes` says so, fail instead of waiting for a registry, until the answer is called. */
  readonly suspend: (layerIds: readonly number[], goes: (layerId: number) => boolean) => () => void;
}

export class Retention {
  readonly #options: RetentionOptions;
  /** Mount ids that keys of the snapshotter were given, as told last. */
  #inUse: ReadonlySet<number> = new Set();
  /** Layers that snapshots named last, and those that were here then. */
  #named: NamedLayers | undefined;

  constructor(options: RetentionOptions) {
    this.#options = options;
  }

  /** Unmounts images that are not among these and that nobody else uses; how many. Errors: KERNEL. */
  async releaseImages(inUse: readonly number[]): Promise<number> {
    this.#inUse = new Set(inUse);
    return await this.#options.mounts.release(this.#inUse, () => true);
  }

  /**
   * Drops layers that are not among these and that nobody is about to use; how many, and how many of those not named
   * stay. Errors: KERNEL, STORE_IO.
   */
  async retainLayers(layers: readonly LayerKeyMessage[]): Promise<RetainedMessage> {
    const { book, intake } = this.#options;
    const startedMs = performance.now();
    // The list was made before this call: what somebody is about to name is not judged by it, however long it is kept.
    const expected = new Set(intake.expected.still(this.#idsOf(layers)));
    const before = new Set(
      book
        .all()
        .map(({ id }) => id)
        .filter((id) => !expected.has(id)),
    );
    intake.forgetPromisesBefore(startedMs);
    this.#named = { layers, before };
    const dropped = await this.#retain(this.#named, (kept) => this.#unmount(kept));
    return { dropped, ...this.#waiting(layers) };
  }

  /**
   * Unmounts images that nobody uses, at once those whose layers go. A read of such a layer that nobody can want any more
   * holds the kernel's unmount up for as long as a registry makes it wait: it ends first.
   */
  async #unmount(kept: (layerId: number) => boolean): Promise<void> {
    const { book, intake, mounts, suspend } = this.#options;
    const used = mounts.list().filter(({ id, holders }) => this.#inUse.has(id) || holders.size > 0);
    const stays = new Set(used.flatMap(({ layers }) => layers.map(({ layerId }) => layerId)));
    // Asked again at each read: somebody may be told meanwhile that a layer is here, and read it at once.
    const goes = (id: number): boolean => !kept(id) && !stays.has(id) && !intake.expected.has(id);
    const going = book.all().filter(({ id }) => goes(id));
    const resume = suspend(
      going.map(({ id }) => id),
      goes,
    );
    try {
      await mounts.release(this.#inUse, kept);
    } finally {
      resume();
    }
  }

  /** What is here, not named, and not kept for good either. */
  #waiting(layers: readonly LayerKeyMessage[]): { waiting: number; again_ms: number } {
    const { book, intake, mounts } = this.#options;
    const kept = new Set([...this.#idsOf(layers), ...this.#options.warmed()]);
    // Those of a directory of the CLI; an image that is only kept mounted for the next container goes with its layers.
    for (const image of mounts.list())
      if (image.holders.size > 0) for (const layer of image.layers) kept.add(layer.layerId);
    const waiting = book.all().filter(({ id }) => !kept.has(id));
    const ends = waiting.map(({ id }) => intake.expected.endsInMs(id) ?? 0);
    return { waiting: waiting.length, again_ms: ends.length === 0 ? 0 : Math.min(...ends) };
  }

  /** The same again by the list that came last. Which images are in use is told together with a list only. */
  async dropUnnamed(): Promise<number> {
    return this.#named === undefined ? 0 : await this.#retain(this.#named, () => Promise.resolve());
  }

  /**
   * Drops layers that were here when the list was made and that neither it nor anybody since names; before, unmounts
   * images by `release`, which is told what is kept.
   */
  async #retain(
    { layers, before }: NamedLayers,
    release: (kept: (layerId: number) => boolean) => Promise<unknown>,
  ): Promise<number> {
    const { store, book, intake, ahead, mounts } = this.#options;
    const keep = this.#idsOf(layers);
    const warmed = this.#options.warmed();
    // The caller may give up waiting and let others prepare: what they are told meanwhile is not on its list.
    const kept = (id: number): boolean => keep.has(id) || warmed.has(id) || intake.isPromised(id) || !before.has(id);
    await release(kept);
    const named = new Set(keep);
    for (const image of mounts.list()) for (const layer of image.layers) keep.add(layer.layerId);
    // Layers of an image that is just being pulled have no snapshot yet.
    for (const adding of intake.underWay()) await adding.then((row) => keep.add(row.id)).catch(() => undefined);
    for (const layerId of intake.expected.still(named)) keep.add(layerId);
    let asked = false;
    let dropped: number[] = [];
    try {
      dropped = await store.retainLayers((id) => {
        asked = true;
        const stays = kept(id) || intake.expected.has(id);
        // Nobody is told any more that it is here.
        if (!stays) book.forget(id);
        return stays;
      });
    } finally {
      if (asked) await book.reload();
    }
    if (dropped.length === 0) return 0;
    ahead.dropped();
    await this.removeOrphanFiles();
    return dropped.length;
  }

  /** Numbers of those of these layers that are here. */
  #idsOf(layers: readonly LayerKeyMessage[]): Set<number> {
    return new Set(layers.map((key) => this.#options.book.find(key)?.id).filter((id) => id !== undefined));
  }

  /** Deletes metadata and index files that no row names any more. Errors: those of node:fs. */
  async removeOrphanFiles(): Promise<void> {
    const { paths, store, intake } = this.#options;
    // Files are listed before rows are looked at: one that is being made has its row by then.
    const metadata = await readdir(paths.images).catch(() => []);
    const indexes = await readdir(paths.layers).catch(() => []);
    await Promise.allSettled(intake.underWay());
    const images = new Set((await store.images()).map((image) => `${image.id}.erofs`));
    for (const name of metadata) {
      // N.erofs.tmp-PID is what the build of image N is writing.
      const file = /^\d+\.erofs/.exec(name)?.[0];
      if (file !== undefined && !images.has(file)) await rm(join(paths.images, name), { force: true });
    }
    const kept = this.#namedIndexFiles();
    for (const name of indexes) {
      const path = join(paths.layers, name);
      if (kept.has(path) || !/\.(index|restart)$/.test(name)) continue;
      // A file may be here already whose row comes in a moment, or has come since; looked at anew for each that may go.
      const arriving = intake.arriving();
      if (arriving === undefined) return;
      const comes = [...arriving].some((index) => isDigest(index) && path === paths.layerIndex(index));
      if (!comes && !this.#namedIndexFiles().has(path)) await rm(path, { force: true });
    }
  }

  /** Files of index and restart blobs that rows name, or that are kept. */
  #namedIndexFiles(): Set<string> {
    const { paths, book, kept } = this.#options;
    const named = new Set<string>();
    for (const row of book.all()) {
      named.add(paths.layerIndex(row.indexDigest as Digest)).add(paths.layerRestart(row.restartDigest as Digest));
    }
    for (const { index, restart } of kept.all()) named.add(paths.layerIndex(index)).add(paths.layerRestart(restart));
    return named;
  }
}
