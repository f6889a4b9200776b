// Puts an image into containerd without fetching what the snapshotter can load lazily: manifest and configuration go to
// the content store, each layer is offered to the snapshotter, and only what it declines is fetched and unpacked.
// Called by image-puller.ts. Whatever happens, nothing is left behind but a whole image.
//
// Time goes into round trips, to the registry most of all, so whatever does not need an answer is not made to wait for
// it: each step below says by its arguments what it needs. What is certain at every moment is that a thing is held by the
// lease before it is made or relied upon, and that the image record comes when everything else is there.
import { randomBytes } from 'node:crypto';
import type { Digest } from '../digest.ts';
import { DedupError, wrapError } from '../errors.ts';
import type { ManifestBytes, Repository } from '../fs/registry/blob-reader.ts';
import {
  chooseManifest,
  type ImageLayer,
  imageLayers,
  MAX_JSON_BYTES,
  type Platform,
  parseManifest,
} from '../fs/registry/image-manifest.ts';
import { INDEX_TYPES, MANIFEST_TYPES } from '../fs/registry/manifest-json.ts';
import { formatReference, type ImageReference, tagOrDigest } from '../fs/registry/reference.ts';
import { orAborted } from '../or-aborted.ts';
import {
  LABEL_IMAGE_LAYERS,
  LABEL_IMAGE_REF,
  LABEL_LAYER_DIGEST,
  LABEL_MANIFEST_DIGEST,
  LABEL_SNAPSHOT_REF,
} from '../snapshotter/labels.ts';
import { hasCode } from './containerd-calls.ts';
import type { ContainerdClient, Descriptor, Labels, LeaseResource, Mount } from './containerd-client.ts';
import { PullLease } from './pull-lease.ts';
import { fitsLabel, PulledContent } from './pulled-content.ts';

/** How a layer came to be there: `stored` was read whole without being unpacked. */
export type LayerOutcome = 'present' | 'lazy' | 'stored' | 'unpacked';

/** What became of a layer that somebody made ready. */
export type Readiness =
  | { readonly kind: 'lazy' }
  | { readonly kind: 'stored'; readonly diffId: string }
  | { readonly kind: 'declined'; readonly reason: string };

export type PullEvent =
  | {
      readonly kind: 'resolved';
      readonly name: string;
      readonly manifest: Digest;
      readonly layers: readonly ImageLayer[];
    }
  | { readonly kind: 'fetching'; readonly layer: number; readonly bytes: number; readonly totalBytes: number }
  | { readonly kind: 'unpacking'; readonly layer: number }
  | { readonly kind: 'layer'; readonly layer: number; readonly outcome: LayerOutcome };

/** A layer as the manifest lists it. */
export interface ManifestLayer extends Descriptor {
  readonly annotations: Labels;
}

export interface PullOptions {
  readonly client: ContainerdClient;
  readonly repository: Repository;
  readonly reference: ImageReference;
  readonly snapshotter: string;
  readonly platform: Platform;
  readonly signal: AbortSignal;
  readonly onEvent?: (event: PullEvent) => void;
  /**
   * Asked to make the layers that the manifest lists ready to be offered, as early as possible; not for an image that
   * containerd has. `config`: the bytes of its configuration, once they are here. `onRead` is told of layers that are read
   * whole, which only those may be from the position on that `wholeFrom` resolves to: what lies below is here. Answers for
   * each layer with a promise, which never rejects, of what became of it; or nothing.
   */
  readonly makeReady?: (
    manifest: Digest,
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    onRead: (position: number, bytesDone: number) => void,
    wholeFrom: Promise<number>,
  ) => readonly (Promise<Readiness> | undefined)[];
  /**
   * Where the snapshotter that goes with this process has its directories, and whether `snapshotter` is that one, if that
   * is known; `learned` is told otherwise. Absent: it is not.
   */
  readonly own?: {
    readonly snapshots: string;
    readonly known: boolean | undefined;
    readonly learned: (ours: boolean) => void;
  };
  /** How long things outlive a killed pull at most. Default 30 s. */
  readonly leaseLifetimeMs?: number;
}

export interface PullResult {
  /** Name of the image in containerd. */
  readonly name: string;
  readonly target: Descriptor;
  readonly manifest: Digest;
  /** Bottom to top. */
  readonly layers: readonly { readonly digest: Digest; readonly size: number; readonly outcome: LayerOutcome }[];
}

export const DEFAULT_LEASE_LIFETIME_MS = 30_000;

/** Annotations of a layer with this prefix are handed to the snapshotter (containerd snapshots.FilterInheritedLabels). */
const INHERITED_PREFIX = 'containerd.io/snapshot/';
const PREPARE_ATTEMPTS = 3;

/**
 * Pulls an image. Errors: those of the registry and of containerd, CANCELLED, REGISTRY_PROTOCOL for a malformed image,
 * DIGEST_MISMATCH when a layer does not unpack to what the configuration names, FAILED_PRECONDITION when this process
 * stood still for so long that its lease ran out.
 */
export async function pullImage(options: PullOptions): Promise<PullResult> {
  const ended = new AbortController();
  const signal = AbortSignal.any([options.signal, ended.signal]);
  // Asked for while the lease is made; whoever needs them sees their errors.
  const root = options.repository.getManifest(tagOrDigest(options.reference), signal);
  options.repository.expectReads(); // configuration and indexes are asked for together, once the manifest names them
  const record = options.client.getImage(formatReference(options.reference), { signal });
  for (const asked of [root, record]) asked.catch(() => undefined);
  let lease: PullLease;
  try {
    lease = await PullLease.start(options.client, {
      lifetimeMs: options.leaseLifetimeMs ?? DEFAULT_LEASE_LIFETIME_MS,
      onLost: (error) => ended.abort(error),
    });
  } catch (error) {
    ended.abort(error);
    throw error;
  }
  const pull = new Pull({ ...options, signal }, lease);
  let result: PullResult;
  try {
    result = await pull.run(root, record);
  } catch (error) {
    const lost = ended.signal.aborted;
    ended.abort(error);
    // What is still being written would be made after everything else was collected.
    await pull.settled();
    // With a collection at once: a failed pull leaves nothing. When even that fails, the lease runs out by itself.
    await lease.end(true).catch(() => undefined);
    throw lost ? ended.signal.reason : error;
  }
  // The image is whole and recorded; a lease that cannot be deleted now runs out by itself.
  await lease.end(false).catch(() => undefined);
  return result;
}

class Pull {
  readonly #options: PullOptions;
  readonly #client: ContainerdClient;
  readonly #lease: PullLease;
  readonly #name: string;
  readonly #content: PulledContent;
  readonly #underWay: Promise<unknown>[] = [];
  readonly #config = Promise.withResolvers<Buffer>();
  /** The lowest layer that containerd lacks, by its position; that of none when it has all. */
  readonly #missing = Promise.withResolvers<number>();

  constructor(options: PullOptions, lease: PullLease) {
    this.#options = options;
    this.#client = options.client;
    this.#lease = lease;
    this.#name = formatReference(options.reference);
    const { client, reference, signal } = options;
    this.#content = new PulledContent({ client, lease, reference, signal });
  }

  /** Resolves when nothing that run() began is under way. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#underWay);
  }

  /** `resolving`: what the reference stands for; `record`: the image of that name that containerd has. */
  async run(
    resolving: Promise<ManifestBytes>,
    record: Promise<{ readonly digest: string } | undefined>,
  ): Promise<PullResult> {
    const { repository, platform, signal } = this.#options;
    const root = await resolving;
    const isKnown = (await record)?.digest === root.digest;
    let manifest = root;
    if (INDEX_TYPES.has(root.mediaType)) {
      const { descriptor, position } = chooseManifest(root.bytes, platform, this.#name);
      // The reference may stand before the manifest: the collector passes over what is not there.
      this.#begin(this.#store(root, { [`containerd.io/gc.ref.content.m.${position}`]: descriptor.digest }));
      manifest = await repository.getManifest(descriptor.digest, signal);
    }
    if (!MANIFEST_TYPES.has(manifest.mediaType)) {
      throw new DedupError(
        'REGISTRY_PROTOCOL',
        `${this.#name} is not an image but ${JSON.stringify(manifest.mediaType)}`,
        {
          hint: 'Docker schema 1 images must be pushed again by a current tool; other artifacts cannot be run',
        },
      );
    }
    const parsed = parseManifest(manifest.bytes, this.#name);
    const onRead = (layer: number, bytes: number): void => {
      this.#emit({ kind: 'fetching', layer, bytes, totalBytes: parsed.layers[layer]?.size ?? 0 });
    };
    const makeReady = () => {
      const wholeFrom = Promise.all([this.#isOurs(), this.#missing.promise]).then(([ours, missing]) =>
        ours ? missing : parsed.layers.length,
      );
      wholeFrom.catch(() => undefined); // nobody may be interested
      return this.#options.makeReady?.(manifest.digest, parsed.layers, this.#config.promise, onRead, wholeFrom) ?? [];
    };
    const ready = isKnown ? undefined : makeReady();
    // Of an image that containerd has it has the configuration, too.
    const config = isKnown ? undefined : this.#fetchConfig(parsed.config);
    this.#begin(this.#store(manifest, { 'containerd.io/gc.ref.content.config': parsed.config.digest }));
    const layers = await this.#storeConfig(parsed.config, config, (bytes) =>
      imageLayers(bytes, parsed.layers, platform, this.#name),
    );
    this.#emit({ kind: 'resolved', name: this.#name, manifest: manifest.digest, layers });

    const outcomes = await this.#layers(layers, manifest.digest, () => ready ?? makeReady());
    await Promise.all(this.#underWay);
    // Everything is there and held. Only now may it have a name.
    const target = { mediaType: root.mediaType, digest: root.digest, size: root.bytes.length };
    await this.#client.putImage({ name: this.#name, labels: {}, target }, this.#scope());
    return {
      name: this.#name,
      target,
      manifest: manifest.digest,
      layers: layers.map(({ digest, size }, position) => ({ digest, size, outcome: outcomes[position] ?? 'present' })),
    };
  }

  /** Whether the snapshotter is the one of this product: its mounts tell. Never rejects. */
  async #isOurs(): Promise<boolean> {
    const { own, snapshotter } = this.#options;
    if (own === undefined || own.known !== undefined) return own?.known ?? false;
    const key = `dedup-probe-${randomBytes(6).toString('hex')}`;
    try {
      await this.#lease.expect(this.#snapshot(key));
      const mounts = await this.#client.prepareSnapshot(snapshotter, key, '', {}, this.#scope());
      await this.#client.removeSnapshot(snapshotter, key);
      const ours = mounts.some(({ source }) => source.startsWith(`${own.snapshots}/`));
      own.learned(ours);
      return ours;
    } catch {
      return false; // The first layer's own Prepare says what is wrong.
    } finally {
      this.#lease.forget(this.#snapshot(key));
    }
  }

  /** Lets a step go on beside the others. Its failure is told before the image gets its name. */
  #begin(step: Promise<unknown>): void {
    step.catch(() => undefined); // run() looks at it at its end; until then others may fail first
    this.#underWay.push(step);
  }

  #emit(event: PullEvent): void {
    this.#options.onEvent?.(event);
  }

  #scope(): { lease: string; signal: AbortSignal } {
    return { lease: this.#lease.current, signal: this.#options.signal };
  }

  #snapshot(key: string): LeaseResource {
    return { id: key, type: `snapshots/${this.#options.snapshotter}` };
  }

  // --- content ---------------------------------------------------------------------------------------------------

  async #fetchConfig(config: Descriptor): Promise<Buffer> {
    if (config.size > MAX_JSON_BYTES) {
      throw new DedupError('REGISTRY_PROTOCOL', `the configuration of ${this.#name} has ${config.size} bytes`);
    }
    const parts: Buffer[] = [];
    for await (const part of this.#options.repository.readAll(config, this.#options.signal)) parts.push(part);
    return Buffer.concat(parts);
  }

  /**
   * Answers with the layers as soon as the configuration's bytes are here; storing it goes on beside what follows.
   * `fetching`: its bytes, where they have been asked for.
   */
  async #storeConfig(
    config: Descriptor,
    fetching: Promise<Buffer> | undefined,
    parse: (bytes: Buffer) => ImageLayer[],
  ): Promise<ImageLayer[]> {
    const { snapshotter } = this.#options;
    const fetched = (): Promise<Buffer> => fetching ?? this.#fetchConfig(config);
    const { promise, resolve, reject } = Promise.withResolvers<ImageLayer[]>();
    let labels: Labels | undefined;
    this.#config.promise.catch(() => undefined); // nobody may be interested
    const learn = (bytes: Buffer): void => {
      this.#config.resolve(bytes);
      const layers = parse(bytes);
      const top = layers.at(-1);
      // It may stand before the snapshot, as above.
      labels = top === undefined ? {} : { [`containerd.io/gc.ref.snapshot.${snapshotter}`]: top.chainId };
      resolve(layers);
    };
    const store = async (): Promise<void> => {
      if (fetching !== undefined) learn(await fetching);
      await this.#content.write(
        config,
        () => labels ?? {},
        async function* () {
          const bytes = await fetched();
          if (labels === undefined) learn(bytes);
          yield bytes;
        },
      );
      if (labels !== undefined) return;
      // It was there already, here or in another namespace.
      learn(await this.#client.readContent(config.digest, MAX_JSON_BYTES, this.#scope()));
      await this.#client.setContentLabels(config.digest, labels ?? {}, this.#scope());
    };
    const storing = store();
    this.#begin(storing);
    storing.catch((error: unknown) => {
      reject(error);
      this.#config.reject(error);
    });
    return await promise;
  }

  /** Puts a manifest or index into the content store. */
  async #store({ digest, bytes }: ManifestBytes, labels: Labels): Promise<void> {
    await this.#content.write(
      { digest, size: bytes.length },
      () => labels,
      async function* () {
        yield bytes;
      },
    );
  }

  // --- layers ----------------------------------------------------------------------------------------------------

  /** `makeReady`: per layer, when it can be offered, where somebody makes it ready. */
  async #layers(
    layers: readonly ImageLayer[],
    manifest: Digest,
    makeReady: () => readonly (Promise<Readiness> | undefined)[],
  ): Promise<LayerOutcome[]> {
    const outcomes: LayerOutcome[] = layers.map(() => 'present');
    let next = await this.#firstMissing(layers);
    this.#missing.resolve(next);
    const ready = next < layers.length ? makeReady() : [];
    // Held before they exist: the lease need not be touched between one layer and the next.
    const held = layers.map((layer, position) => {
      if (position < next || ready[position] === undefined) return undefined;
      const hold = this.#lease.hold(this.#snapshot(layer.chainId));
      this.#begin(hold);
      const both = Promise.all([hold, ready[position]]);
      both.catch(() => undefined); // looked at when it is this layer's turn, if it comes to that
      return both;
    });
    for (let position = 0; position < next; position++)
      this.#emit({ kind: 'layer', layer: position, outcome: 'present' });
    for (; next < layers.length; next++) {
      const layer = layers[next] as ImageLayer;
      const below = layers[next - 1];
      const doing = `layer ${next + 1} of ${layers.length} (${layer.digest})`;
      try {
        const readied = held[next];
        const { signal } = this.#options;
        let readiness: Readiness | undefined;
        if (readied === undefined) await this.#lease.expect(this.#snapshot(layer.chainId));
        else [, readiness] = await orAborted(readied, signal, () => signal.reason);
        if (readiness?.kind === 'stored') requireDiffId(layer, readiness.diffId);
        const outcome = await this.#layer(layers, next, manifest, readied !== undefined);
        outcomes[next] = outcome === 'lazy' && readiness?.kind === 'stored' ? 'stored' : outcome;
      } catch (error) {
        throw wrapError(error, doing);
      }
      // A snapshot keeps those below it.
      if (below !== undefined) this.#lease.forget(this.#snapshot(below.chainId));
      this.#emit({ kind: 'layer', layer: next, outcome: outcomes[next] as LayerOutcome });
    }
    return outcomes;
  }

  /** How many layers from the bottom are there already. A snapshot cannot be without those below it. */
  async #firstMissing(layers: readonly ImageLayer[]): Promise<number> {
    const { snapshotter } = this.#options;
    const isThere = ({ chainId }: ImageLayer) => this.#client.hasSnapshot(snapshotter, chainId, this.#scope());
    const there = await Promise.all(layers.map(isThere));
    for (let count = there.lastIndexOf(true) + 1; count > 0; count--) {
      const layer = layers[count - 1] as ImageLayer;
      // A collection may have come between; once held it stays, if it is still there.
      await this.#lease.hold(this.#snapshot(layer.chainId));
      if (await isThere(layer)) return count;
      this.#lease.forget(this.#snapshot(layer.chainId));
    }
    return 0;
  }

  /** `held`: the lease holds the layer's snapshot whoever makes it. */
  async #layer(
    layers: readonly ImageLayer[],
    position: number,
    manifest: Digest,
    held: boolean,
  ): Promise<LayerOutcome> {
    const { snapshotter } = this.#options;
    const layer = layers[position] as ImageLayer;
    const parent = layers[position - 1]?.chainId ?? '';
    const labels = this.#snapshotLabels(layers, position, manifest);
    for (let attempt = 1; ; attempt++) {
      // The form of the key is containerd's own: it tells people what the snapshot is for.
      const key = `extract-${Date.now()}-${randomBytes(3).toString('hex')} ${layer.chainId}`;
      await this.#lease.expect(this.#snapshot(key));
      try {
        const mounts = await this.#client.prepareSnapshot(snapshotter, key, parent, labels, this.#scope());
        await this.#unpack(layer, position, key, mounts, labels);
        return 'unpacked';
      } catch (error) {
        if (!hasCode(error, 'ALREADY_EXISTS')) {
          await this.#client.removeSnapshot(snapshotter, key).catch(() => undefined); // the lease takes care of it
          throw error;
        }
        // Another pull may have made it, and containerd does not say: held first, then looked for.
        if (!held) await this.#lease.hold(this.#snapshot(layer.chainId));
        if (await this.#client.hasSnapshot(snapshotter, layer.chainId, this.#scope())) return 'lazy';
        // containerd itself tries again here: the snapshot was removed between the two calls, or the key was taken.
        if (attempt === PREPARE_ATTEMPTS) {
          throw new DedupError(
            'ALREADY_EXISTS',
            `containerd has a snapshot ${layer.chainId} that ${snapshotter} lost`,
            {
              cause: error,
              hint: 'run "dedup-snapshotter repair", then pull again',
            },
          );
        }
      } finally {
        this.#lease.forget(this.#snapshot(key));
      }
    }
  }

  /** Fetches a layer the snapshotter does not load itself, unpacks it and commits the snapshot. */
  async #unpack(
    layer: ImageLayer,
    position: number,
    key: string,
    mounts: readonly Mount[],
    labels: Labels,
  ): Promise<void> {
    const { repository, snapshotter, signal } = this.#options;
    const emit = (bytes: number) => this.#emit({ kind: 'fetching', layer: position, bytes, totalBytes: layer.size });
    await this.#content.write(
      layer,
      () => ({}),
      async function* () {
        let bytes = 0;
        emit(bytes);
        for await (const part of repository.readAll(layer, signal)) {
          yield part;
          emit((bytes += part.length));
        }
      },
    );
    this.#emit({ kind: 'unpacking', layer: position });
    const { mediaType, digest, size } = layer;
    const diffId = await this.#client.applyDiff({ mediaType, digest, size }, mounts, { signal });
    requireDiffId(layer, diffId);
    try {
      await this.#client.commitSnapshot(snapshotter, layer.chainId, key, labels, this.#scope());
    } catch (error) {
      if (!hasCode(error, 'ALREADY_EXISTS')) throw error;
      await this.#client.removeSnapshot(snapshotter, key); // somebody else was faster with the same layer
      await this.#lease.hold(this.#snapshot(layer.chainId));
    }
    // The blob has served its purpose: nothing refers to it, so it goes with the lease.
    this.#lease.forget({ id: layer.digest, type: 'content' });
  }

  /** What the snapshotter is told of a layer: the same as by containerd's CRI plugin with annotations on. */
  #snapshotLabels(layers: readonly ImageLayer[], position: number, manifest: Digest): Labels {
    const layer = layers[position] as ImageLayer;
    const labels: Record<string, string> = {};
    for (const [name, value] of Object.entries(layer.annotations)) {
      if (name.startsWith(INHERITED_PREFIX) && fitsLabel(name, value)) labels[name] = value;
    }
    labels[LABEL_SNAPSHOT_REF] = layer.chainId;
    if (fitsLabel(LABEL_IMAGE_REF, this.#name)) labels[LABEL_IMAGE_REF] = this.#name;
    labels[LABEL_MANIFEST_DIGEST] = manifest;
    labels[LABEL_LAYER_DIGEST] = layer.digest;
    let above = '';
    for (const { digest } of layers.slice(position)) {
      const longer = above === '' ? digest : `${above},${digest}`;
      if (!fitsLabel(LABEL_IMAGE_LAYERS, longer)) break;
      above = longer;
    }
    labels[LABEL_IMAGE_LAYERS] = above;
    return labels;
  }
}

/** Errors: DIGEST_MISMATCH when the layer decompresses to something else than the configuration names. */
function requireDiffId(layer: ImageLayer, diffId: string): void {
  if (diffId === layer.diffId) return;
  throw new DedupError(
    'DIGEST_MISMATCH',
    `layer ${layer.digest} unpacks to ${diffId}, but the image configuration names ${layer.diffId}`,
    { hint: 'the image is damaged or was tampered with; push it again from its source' },
  );
}
