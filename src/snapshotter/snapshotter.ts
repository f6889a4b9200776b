// The state machine behind containerd's snapshots service: which snapshot may become what, what lies below it, and
// which mounts show it. Called by snapshots-service.ts; carries no image bytes and deletes nothing outside Cleanup.
import { chmod, lchown, lstat, mkdir } from 'node:fs/promises';
import type { Logger } from 'pino';
import { DedupError, wrapError } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import { Cleaner } from './cleanup.ts';
import { Converter, type ConverterSettings } from './converter.ts';
import { deleteTree, diskUsage } from './disk-tree.ts';
import { parseFilters } from './filters.ts';
import { Gate } from './gate.ts';
import { type IdMapping, idMapping, requireMappable } from './id-mapping.ts';
import type { ImageMounter, LayerKey, Source } from './images.ts';
import { writeInfoFile } from './info-file.ts';
import { type Labels, type LayerLabels, layerLabels, remoteName } from './labels.ts';
import { LeftoverDirectories } from './leftover-directories.ts';
import { isTakenBack, LowerMounts } from './lower-mounts.ts';
import type { Metastore } from './metastore-client.ts';
import { type Lower, type Mount, mountsOf, overlayOptions, segments } from './mounts.ts';
import { Release } from './release.ts';
import { type LayerFinder, RemoteLayers } from './remote-layers.ts';
import { restore } from './restore.ts';
import { type NewSnapshot, requireMove, type SnapshotKind, type SnapshotRecord } from './snapshot-record.ts';

export interface SnapshotterOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: ImageMounter;
  /** Where an image reference points. Errors: INVALID_REFERENCE. */
  readonly sourceOf: (reference: string) => Source;
  /** Finds layers whose client names no image; absent: those are ordinary ones. */
  readonly finder?: LayerFinder | undefined;
  readonly log: Logger;
  /** containerd has been told that this snapshotter remaps IDs (capability remap-ids). */
  readonly remapIds?: boolean;
  /** What Prepare may spend on the network, milliseconds; it holds containerd's lock meanwhile. */
  readonly networkBudgetMs?: number;
  /** How long after a Remove its directory is deleted when nobody calls Cleanup, milliseconds. */
  readonly cleanupDelayMs?: number;
  /** How long after the start what an earlier service has left is released when nobody calls Cleanup, milliseconds. */
  readonly releaseDelayMs?: number;
  /** How ordinary layers are converted in the background; absent: they are not. */
  readonly convert?: ConverterSettings;
  /** How often directories of converted layers that are in use are looked at again, milliseconds. */
  readonly leftoverDelayMs?: number;
}

interface Owner {
  readonly uid: number;
  readonly gid: number;
}

const NETWORK_BUDGET_MS = 2000;
const CLEANUP_DELAY_MS = 30_000;
const LEFTOVER_DELAY_MS = 60_000;
/** What is mounted without containerd after a reboot is mounted by then, and finds what it fetched before. */
const RELEASE_DELAY_MS = 60_000;
/** Snapshots in one message of List; containerd's own server uses the same. */
const LIST_BLOCK = 100;

export class Snapshotter {
  readonly #options: SnapshotterOptions;
  readonly #metastore: Metastore;
  readonly #paths: RootPaths;
  readonly #log: Logger;
  readonly #gate = new Gate();
  readonly #release: Release;
  readonly #cleaner: Cleaner;
  readonly #remote: RemoteLayers;
  readonly #lowers: LowerMounts;
  /** Conversions of ordinary layers, for those who ask how far they are. */
  readonly converter: Converter;
  readonly leftovers: LeftoverDirectories;
  readonly #background = new Set<Promise<unknown>>();
  /** The last write of each info file that is under way, by snapshot. */
  readonly #describing = new Map<number, Promise<void>>();
  #overlay: string[] | undefined;
  #lastId = 0;
  #cleanupTimer: NodeJS.Timeout | undefined;
  #cleanupAtMs = Number.POSITIVE_INFINITY;
  #closed = false;

  constructor(options: SnapshotterOptions) {
    const { paths, metastore, images, sourceOf, finder, log } = options;
    this.#options = options;
    this.#metastore = metastore;
    this.#paths = paths;
    this.#log = log;
    const gate = this.#gate;
    const describe = (snapshot: SnapshotRecord): Promise<void> => this.#describe(snapshot);
    this.converter = new Converter({
      ...(options.convert ?? { off: 'nothing is set up to convert layers' }),
      paths,
      metastore,
      images,
      sourceOf,
      describe,
      onConverted: () => this.#scheduleCleanup(),
      log,
    });
    const takeBack = (layers: readonly LayerKey[]): Promise<number> => this.converter.takeBack(layers);
    this.leftovers = new LeftoverDirectories({ paths, metastore, images, gate, describe, takeBack, log });
    const onLeftovers = (): void => this.#scheduleCleanup(options.leftoverDelayMs ?? LEFTOVER_DELAY_MS);
    this.#release = new Release({ metastore, images, gate, log });
    this.#cleaner = new Cleaner({
      paths,
      metastore,
      release: this.#release,
      leftovers: this.leftovers,
      onLeftovers,
      log,
    });
    const budgetMs = options.networkBudgetMs ?? NETWORK_BUDGET_MS;
    this.#remote = new RemoteLayers({ metastore, images, sourceOf, finder, budgetMs, log });
    this.#lowers = new LowerMounts({ paths, metastore, images, remote: this.#remote, takeBack, log });
  }

  /** Reconciles directories with the database; call once, before serving. Errors: STORE_IO. */
  async start(): Promise<void> {
    this.#lastId = await restore(this.#paths, this.#metastore, this.#log);
    const left = [await this.#metastore.removedIds(), await this.#metastore.leftoverDirectories()];
    if (left.some((list) => list.length > 0)) this.#scheduleCleanup();
    // What an earlier service had still to release, and whatever came up without one.
    this.#release.later(this.#options.releaseDelayMs ?? RELEASE_DELAY_MS);
    await this.converter.start();
  }

  /**
   * A writable snapshot on top of `parent` ("" for none). With a `containerd.io/snapshot.ref` label whose layer can be
   * loaded lazily there is nothing to write: it is committed at once and the answer is ALREADY_EXISTS.
   * Errors: ALREADY_EXISTS, NOT_FOUND or INVALID_ARGUMENT for the parent, UNAVAILABLE when a lazy parent cannot be mounted,
   * CANCELLED: a caller that has gone never hears of the snapshot, so none is left.
   */
  async prepare(key: string, parent: string, labels: Labels, signal = NEVER): Promise<Mount[]> {
    requireName(key, 'key');
    return this.#gate.shared(async () => {
      await this.#refuseExisting(key);
      const chain = await this.#metastore.chain(parent);
      const wanted = layerLabels(labels);
      if (wanted !== undefined) await this.#prepareRemote(key, parent, labels, wanted, signal);
      return this.#createOn(chain, { name: key, kind: 'active', parent, labels }, signal);
    });
  }

  /** A read-only snapshot of `parent`. Errors as prepare. */
  async view(key: string, parent: string, labels: Labels, signal = NEVER): Promise<Mount[]> {
    requireName(key, 'key');
    return this.#gate.shared(async () => {
      await this.#refuseExisting(key);
      return this.#createOn(await this.#metastore.chain(parent), { name: key, kind: 'view', parent, labels }, signal);
    });
  }

  /**
   * The mounts of an active snapshot or view: the same lower set as when it was made. Lazy lowers that are not mounted
   * any more (after a reboot) are mounted again. Errors: NOT_FOUND, FAILED_PRECONDITION when committed, UNAVAILABLE.
   */
  async mounts(key: string): Promise<Mount[]> {
    return this.#gate.shared(async () => {
      const snapshot = await this.#metastore.get(key);
      requireMove(snapshot, 'mounts');
      const lowers = await this.#lowers.again(snapshot);
      return this.#answer(snapshot, lowers, this.#mappingOf(snapshot.labels));
    });
  }

  /**
   * Makes an active snapshot a committed one called `name`. `parent` may only be the one it has.
   * Errors: NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION. No file is touched before it is answered: containerd waits
   * inside a transaction of its own.
   */
  async commit(name: string, key: string, labels: Labels, parent = ''): Promise<void> {
    requireName(name, 'name');
    requireName(key, 'key');
    if (parent !== '' && (await this.#metastore.get(key)).parent !== parent) {
      throw new DedupError('UNIMPLEMENTED', `snapshot ${JSON.stringify(key)} cannot be moved to another parent`);
    }
    const committed = await this.#metastore.commit(key, name, labels);
    this.#describeLater(committed);
    this.converter.kick();
  }

  /** Forgets a snapshot; its files go in Cleanup. Errors: NOT_FOUND, FAILED_PRECONDITION with children. */
  async remove(key: string): Promise<void> {
    const { id } = await this.#metastore.remove(key);
    this.converter.removed(id);
    this.#scheduleCleanup();
  }

  /** Errors: NOT_FOUND. */
  stat(key: string): Promise<SnapshotRecord> {
    return this.#metastore.get(key);
  }

  /** Changes labels by field mask (labels.ts, maskedLabels). Errors: NOT_FOUND, INVALID_ARGUMENT. */
  async update(name: string, labels: Labels, fields: readonly string[]): Promise<SnapshotRecord> {
    const updated = await this.#metastore.update(name, labels, fields);
    this.#describeLater(updated);
    return updated;
  }

  /** Blocks of snapshots that pass the filters; nothing is locked between blocks. Errors: INVALID_ARGUMENT. */
  async *list(filters: readonly string[]): AsyncGenerator<SnapshotRecord[]> {
    const matches = parseFilters(filters);
    let pending: SnapshotRecord[] = [];
    for (let after = 0; ; ) {
      const block = await this.#metastore.list(after, LIST_BLOCK);
      const last = block.at(-1);
      if (last === undefined) break;
      after = last.id;
      pending.push(...block.filter(matches));
      if (pending.length < LIST_BLOCK) continue;
      yield pending.slice(0, LIST_BLOCK);
      pending = pending.slice(LIST_BLOCK);
    }
    if (pending.length > 0) yield pending;
  }

  /**
   * Bytes and inodes of one snapshot without what lies below it. Of an active one what its upper directory takes now;
   * of a committed one a constant: containerd asks once and keeps the answer. Errors: NOT_FOUND, UNAVAILABLE.
   */
  async usage(key: string): Promise<{ bytes: number; inodes: number }> {
    const snapshot = await this.#metastore.get(key);
    if (snapshot.usage !== undefined) return snapshot.usage;
    const usage =
      snapshot.layer === undefined
        ? await diskUsage(this.#paths.snapshotFs(snapshot.id))
        : await this.#options.images.layerUsage(snapshot.layer);
    if (snapshot.kind !== 'committed') return usage;
    return (await this.#metastore.setUsage(snapshot.id, usage.bytes, usage.inodes)) ?? usage;
  }

  /**
   * Deletes what removed snapshots left and lets dedupd release what nobody uses. Answers why that was not released,
   * undefined when it was; it is tried again. Errors: STORE_IO.
   */
  cleanup(): Promise<string | undefined> {
    clearTimeout(this.#cleanupTimer);
    this.#cleanupAtMs = Number.POSITIVE_INFINITY;
    return this.#cleaner.run().finally(() => this.converter.spaceGivenBack());
  }

  /** Waits for what is under way. Closes neither the metastore nor the mounter. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#cleanupTimer);
    await this.#release.close();
    await this.converter.close();
    while (this.#background.size > 0) await Promise.all(this.#background);
  }

  async #refuseExisting(key: string): Promise<void> {
    if ((await this.#metastore.find(key)) === undefined) return;
    throw new DedupError('ALREADY_EXISTS', `snapshot ${JSON.stringify(key)} exists`);
  }

  /** Throws ALREADY_EXISTS when there is, or can be, a committed snapshot for (ref, parent); else returns. */
  async #prepareRemote(
    key: string,
    parent: string,
    labels: Labels,
    wanted: LayerLabels,
    signal: AbortSignal,
  ): Promise<void> {
    const { ref } = wanted;
    const existing = await this.#metastore.findByRef(ref, parent);
    if (existing !== undefined) {
      const { layer } = existing;
      if (layer !== undefined) {
        const source = await this.#remote.keepSource(wanted, layer);
        if (source !== undefined) this.#inBackground(() => this.#remote.tell(layer, source), 'telling a source');
      }
      throw alreadyThere(ref);
    }
    const layer = await this.#remote.tryPrepare(key, wanted);
    if (layer === undefined) return;
    await this.#commitRemote(key, parent, labels, ref, layer, signal);
    throw alreadyThere(ref);
  }

  async #commitRemote(
    key: string,
    parent: string,
    labels: Labels,
    ref: string,
    layer: LayerKey,
    signal: AbortSignal,
  ): Promise<void> {
    const id = ++this.#lastId;
    const wanted = remoteName(key, ref);
    const name = (await this.#metastore.find(wanted)) === undefined ? wanted : `${wanted}#${id}`;
    const snapshot: NewSnapshot = { id, name, kind: 'committed', parent, labels, lowers: [], layer };
    await this.#insert(snapshot, () => this.#makeDirectories(snapshot, undefined), signal);
    this.#log.info(
      { layer: layer.digest, name, id },
      'layer committed as a remote snapshot, its content is loaded lazily',
    );
  }

  /** As #create; where layers have become directories again, with what the chain is then. */
  async #createOn(
    chain: readonly SnapshotRecord[],
    wanted: Omit<NewSnapshot, 'id' | 'lowers'>,
    signal: AbortSignal,
  ): Promise<Mount[]> {
    try {
      return await this.#create(wanted, chain, signal);
    } catch (error) {
      if (!isTakenBack(error)) throw error;
      return await this.#create(wanted, await this.#metastore.chain(wanted.parent), signal);
    }
  }

  async #create(
    wanted: Omit<NewSnapshot, 'id' | 'lowers'>,
    chain: readonly SnapshotRecord[],
    signal: AbortSignal,
  ): Promise<Mount[]> {
    const wantedLowers = segments(chain);
    const mapping = this.#mappingOf(wanted.labels);
    if (mapping !== undefined) requireMappable(wantedLowers);
    const id = ++this.#lastId;
    const { lowers, top } = await this.#lowers.mount(wantedLowers);
    // The owner comes with the mount: this process touches no path below a lazy one.
    const mountedOwner = top === undefined ? undefined : { uid: top.rootUid ?? 0, gid: top.rootGid ?? 0 };
    const owner: Owner | undefined = mapping?.owner ?? mountedOwner;
    const snapshot = { ...wanted, id, lowers };
    await this.#insert(snapshot, () => this.#makeDirectories(snapshot, owner), signal);
    return this.#answer(snapshot, lowers, mapping);
  }

  #answer(
    { id, kind }: { readonly id: number; readonly kind: SnapshotKind },
    lowers: readonly Lower[],
    mapping: IdMapping | undefined,
  ): Mount[] {
    // What is mounted is written to unless it is a view.
    const mounted = { id, kind: kind === 'view' ? kind : ('active' as const), mapping };
    return mountsOf(mounted, lowers, this.#paths, this.#overlayOptions());
  }

  /** Without the capability the labels come, too, but what lies below is a copy that containerd has changed itself. */
  #mappingOf(labels: Labels): IdMapping | undefined {
    return this.#options.remapIds === true ? idMapping(labels) : undefined;
  }

  /** Makes the directory, then the record; a record never stands without its directory. */
  async #insert(snapshot: NewSnapshot, makeDirectories: () => Promise<void>, signal: AbortSignal): Promise<void> {
    const requireCaller = (): void => {
      if (signal.aborted) throw new DedupError('CANCELLED', `the caller of snapshot ${snapshot.name} has gone`);
    };
    try {
      requireCaller();
      await makeDirectories();
      requireCaller();
      await this.#metastore.insert(snapshot);
    } catch (error) {
      await deleteTree(this.#paths.snapshot(snapshot.id)).catch((cause: unknown) => {
        // The next start finds it without a record and deletes it.
        this.#log.warn({ err: cause, id: snapshot.id }, 'a half-made snapshot is left until the next start');
      });
      throw error instanceof DedupError ? error : wrapError(error, 'making a snapshot directory', 'STORE_IO');
    }
    // A committed one may have been found by somebody else already; a key belongs to its caller alone.
    if (!signal.aborted || snapshot.kind === 'committed') return;
    // containerd removes what it does not know only together with something else of this snapshotter.
    await this.remove(snapshot.name);
    requireCaller();
  }

  async #makeDirectories(snapshot: NewSnapshot, given: Owner | undefined): Promise<void> {
    const { id, kind, lowers } = snapshot;
    await mkdir(this.#paths.snapshot(id), { mode: 0o700 });
    if (kind === 'active') await mkdir(this.#paths.snapshotWork(id), { mode: 0o711 });
    if (kind === 'active' || (kind === 'view' && lowers.length === 0)) {
      const fs = this.#paths.snapshotFs(id);
      await mkdir(fs);
      // The upper directory's attributes are those of the mounted root: mode whatever our umask, owner as below it.
      await chmod(fs, 0o755);
      const below = lowers[0];
      const owner = given ?? (below?.kind === 'normal' ? await lstat(this.#paths.snapshotFs(below.id)) : undefined);
      if (owner !== undefined) await lchown(fs, owner.uid, owner.gid);
    }
    await writeInfoFile(this.#paths, snapshot);
  }

  #overlayOptions(): string[] {
    this.#overlay ??= overlayOptions();
    return this.#overlay;
  }

  /** Writes what is known of a snapshot beside it, after what was known before. Errors: those of node:fs. */
  #describe(snapshot: SnapshotRecord): Promise<void> {
    const written = (this.#describing.get(snapshot.id) ?? Promise.resolve()).then(() =>
      writeInfoFile(this.#paths, snapshot),
    );
    const last = written
      .catch(() => undefined)
      .then(() => {
        if (this.#describing.get(snapshot.id) === last) this.#describing.delete(snapshot.id);
      });
    this.#describing.set(snapshot.id, last);
    return written;
  }

  #describeLater(snapshot: SnapshotRecord): void {
    // Now, so that it has its place in the order; the error is told in the background.
    const written = this.#describe(snapshot);
    this.#inBackground(() => written, 'describing a snapshot');
  }

  #inBackground(work: () => Promise<unknown>, doing: string): void {
    const task = work().catch((error: unknown) => {
      // The answer has been given; what is missing is written or told again later.
      this.#log.warn({ err: error }, `${doing} failed`);
    });
    this.#background.add(task);
    // `task` never rejects, so neither does this.
    void task.finally(() => this.#background.delete(task));
  }

  #scheduleCleanup(delayMs = this.#options.cleanupDelayMs ?? CLEANUP_DELAY_MS): void {
    const atMs = performance.now() + delayMs;
    if (this.#closed || atMs >= this.#cleanupAtMs) return;
    clearTimeout(this.#cleanupTimer);
    this.#cleanupAtMs = atMs;
    this.#cleanupTimer = setTimeout(() => {
      this.#cleanupAtMs = Number.POSITIVE_INFINITY;
      this.#inBackground(() => this.#cleaner.run(), 'cleaning up');
    }, delayMs);
    this.#cleanupTimer.unref();
  }
}

/** The signal of callers that stay. */
const NEVER = new AbortController().signal;

function requireName(name: string, what: string): void {
  if (name === '') throw new DedupError('INVALID_ARGUMENT', `a snapshot's ${what} must not be empty`);
}

function alreadyThere(ref: string): DedupError {
  return new DedupError('ALREADY_EXISTS', `a snapshot for ${ref} exists`);
}
