// Puts an image into containerd without fetching what the snapshotter can load lazily: manifest and configuration go to
// the content store, each layer is offered to the snapshotter, and only what it declines is fetched and unpacked.
// Called by the rpull verb. Whatever happens, nothing is left behind but a whole image.
import { randomBytes } from 'node:crypto';
import type { Digest } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import type { ManifestBytes, Repository } from '../../fs/registry/blob-reader.ts';
import {
  chooseManifest,
  type ImageLayer,
  imageLayers,
  MAX_JSON_BYTES,
  type Platform,
  parseManifest,
} from '../../fs/registry/image-manifest.ts';
import { INDEX_TYPES, MANIFEST_TYPES } from '../../fs/registry/manifest-json.ts';
import { formatReference, type ImageReference, tagOrDigest } from '../../fs/registry/reference.ts';
import {
  LABEL_IMAGE_LAYERS,
  LABEL_IMAGE_REF,
  LABEL_LAYER_DIGEST,
  LABEL_MANIFEST_DIGEST,
  LABEL_SNAPSHOT_REF,
} from '../../snapshotter/labels.ts';
import {
  type ContainerdClient,
  type Descriptor,
  hasCode,
  type Labels,
  type LeaseResource,
  type Mount,
} from './client.ts';
import { PullLease } from './pull-lease.ts';

/** How a layer came to be there. */
export type LayerOutcome = 'present' | 'lazy' | 'unpacked';

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

export interface PullOptions {
  readonly client: ContainerdClient;
  readonly repository: Repository;
  readonly reference: ImageReference;
  readonly snapshotter: string;
  readonly platform: Platform;
  readonly signal: AbortSignal;
  readonly onEvent?: (event: PullEvent) => void;
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

/** containerd refuses labels whose name and value together are longer (containerd labels/validate.go). */
const MAX_LABEL_BYTES = 4096;
/** Annotations of a layer with this prefix are handed to the snapshotter (containerd snapshots.FilterInheritedLabels). */
const INHERITED_PREFIX = 'containerd.io/snapshot/';
const PREPARE_ATTEMPTS = 3;

/**
 * Pulls an image. Errors: those of the registry and of containerd, CANCELLED, REGISTRY_PROTOCOL for a malformed image,
 * DIGEST_MISMATCH when a layer does not unpack to what the configuration names, FAILED_PRECONDITION when this process
 * stood still for so long that its lease ran out.
 */
export async function pullImage(options: PullOptions): Promise<PullResult> {
  const lost = new AbortController();
  const lease = await PullLease.start(options.client, {
    lifetimeMs: options.leaseLifetimeMs ?? DEFAULT_LEASE_LIFETIME_MS,
    onLost: (error) => lost.abort(error),
  });
  let result: PullResult;
  try {
    const signal = AbortSignal.any([options.signal, lost.signal]);
    result = await new Pull({ ...options, signal }, lease).run();
  } catch (error) {
    // With a collection at once: a failed pull leaves nothing. When even that fails, the lease runs out by itself.
    await lease.end(true).catch(() => undefined);
    throw lost.signal.aborted ? lost.signal.reason : error;
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

  constructor(options: PullOptions, lease: PullLease) {
    this.#options = options;
    this.#client = options.client;
    this.#lease = lease;
    this.#name = formatReference(options.reference);
  }

  async run(): Promise<PullResult> {
    const { repository, reference, platform, signal } = this.#options;
    const root = await repository.getManifest(tagOrDigest(reference), signal);
    let manifest = root;
    if (INDEX_TYPES.has(root.mediaType)) {
      const { descriptor, position } = chooseManifest(root.bytes, platform, this.#name);
      manifest = await repository.getManifest(descriptor.digest, signal);
      // Only what is here is referred to, though the collector would ignore a reference to what is not.
      await this.#store(root, { [`containerd.io/gc.ref.content.m.${position}`]: manifest.digest });
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
    await this.#store(manifest, { 'containerd.io/gc.ref.content.config': parsed.config.digest });
    const config = await this.#storeConfig(parsed.config);
    const layers = imageLayers(config, parsed.layers, platform, this.#name);
    this.#emit({ kind: 'resolved', name: this.#name, manifest: manifest.digest, layers });

    const outcomes = await this.#layers(layers, manifest.digest);
    const top = layers.at(-1);
    if (top !== undefined) {
      const label = { [`containerd.io/gc.ref.snapshot.${this.#options.snapshotter}`]: top.chainId };
      await this.#client.setContentLabels(parsed.config.digest, label, this.#scope());
    }
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

  async #storeConfig(config: Descriptor): Promise<Buffer> {
    if (config.size > MAX_JSON_BYTES) {
      throw new DedupError('REGISTRY_PROTOCOL', `the configuration of ${this.#name} has ${config.size} bytes`);
    }
    await this.#write(config, {}, () => this.#options.repository.readAll(config, this.#options.signal));
    return await this.#client.readContent(config.digest, MAX_JSON_BYTES, this.#scope());
  }

  /** Puts a manifest or index into the content store. */
  async #store({ digest, bytes }: ManifestBytes, labels: Labels): Promise<void> {
    await this.#write({ digest, size: bytes.length }, labels, async function* () {
      yield bytes;
    });
  }

  /**
   * Puts a blob of any size into the content store, with these labels and its source; asks for its bytes only when the
   * namespace lacks it. When this returns, the blob is there and held.
   */
  async #write(
    blob: { digest: Digest; size: number },
    labels: Labels,
    bytes: () => AsyncIterable<Buffer>,
  ): Promise<void> {
    const content: LeaseResource = { id: blob.digest, type: 'content' };
    const ref = `${this.#lease.name}-${blob.digest}`;
    const ingest: LeaseResource = { id: ref, type: 'ingests' };
    await this.#lease.expect(content, ingest);
    try {
      await this.#ingest(ref, blob, { ...labels, ...this.#sourceLabel('') }, bytes);
    } catch (error) {
      if (!hasCode(error, 'ALREADY_EXISTS')) {
        await this.#client.abortIngest(ref).catch(() => undefined); // the lease takes care of what stays
        throw error;
      }
      // It was there before, or somebody else was faster: hold it, then add to its labels what is ours.
      await this.#lease.hold(content);
      const known = (await this.#client.contentInfo(blob.digest, this.#scope()))?.labels ?? {};
      await this.#client.setContentLabels(
        blob.digest,
        { ...labels, ...this.#sourceLabel(known[this.#sourceName] ?? '') },
        this.#scope(),
      );
    } finally {
      this.#lease.forget(ingest);
    }
  }

  /** Errors: ALREADY_EXISTS. A blob that another namespace has is taken over without being sent. */
  async #ingest(
    ref: string,
    blob: { digest: Digest; size: number },
    labels: Labels,
    bytes: () => AsyncIterable<Buffer>,
  ): Promise<void> {
    const lease = this.#lease.current;
    let writer = await this.#client.openWriter(ref, blob, { lease, signal: this.#options.signal });
    try {
      if (writer.offset !== blob.size) for await (const part of bytes()) await writer.write(part);
      if (!this.#lease.mayEndUnder(lease)) {
        // The commit belongs to the lease that the stream was opened under, which may have run out by now.
        await writer.close();
        writer = await this.#client.openWriter(ref, blob, this.#scope());
      }
      await writer.commit(blob, labels);
    } catch (error) {
      writer.cancel();
      throw error;
    }
  }

  /** containerd names the host without its port (containerd remotes/docker/handler.go). */
  get #sourceName(): string {
    return `containerd.io/distribution.source.${this.#options.reference.host.replace(/:\d+$/, '')}`;
  }

  /** This repository added to those that a blob is known to come from. */
  #sourceLabel(known: string): Labels {
    const repositories = known.split(',').filter((repository) => repository !== '');
    const value = [...new Set([...repositories, this.#options.reference.path])].sort().join(',');
    return fitsLabel(this.#sourceName, value) ? { [this.#sourceName]: value } : {};
  }

  // --- layers ----------------------------------------------------------------------------------------------------

  async #layers(layers: readonly ImageLayer[], manifest: Digest): Promise<LayerOutcome[]> {
    const outcomes: LayerOutcome[] = layers.map(() => 'present');
    let next = await this.#firstMissing(layers);
    for (let position = 0; position < next; position++)
      this.#emit({ kind: 'layer', layer: position, outcome: 'present' });
    for (; next < layers.length; next++) {
      const layer = layers[next] as ImageLayer;
      const below = layers[next - 1];
      const doing = `layer ${next + 1} of ${layers.length} (${layer.digest})`;
      try {
        await this.#lease.expect(this.#snapshot(layer.chainId));
        outcomes[next] = await this.#layer(layers, next, manifest);
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
    for (let count = layers.length; count > 0; count--) {
      const key = (layers[count - 1] as ImageLayer).chainId;
      const isThere = () => this.#client.hasSnapshot(this.#options.snapshotter, key, this.#scope());
      if (!(await isThere())) continue;
      // A collection may have come between; once held it stays, if it is still there.
      await this.#lease.hold(this.#snapshot(key));
      if (await isThere()) return count;
      this.#lease.forget(this.#snapshot(key));
    }
    return 0;
  }

  async #layer(layers: readonly ImageLayer[], position: number, manifest: Digest): Promise<LayerOutcome> {
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
        await this.#lease.hold(this.#snapshot(layer.chainId));
        if (await this.#client.hasSnapshot(snapshotter, layer.chainId, this.#scope())) return 'lazy';
        // containerd itself tries again here: the snapshot was removed between the two calls, or the key was taken.
        if (attempt === PREPARE_ATTEMPTS) throw error;
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
    await this.#write(layer, {}, async function* () {
      let bytes = 0;
      emit(bytes);
      for await (const part of repository.readAll(layer, signal)) {
        yield part;
        emit((bytes += part.length));
      }
    });
    this.#emit({ kind: 'unpacking', layer: position });
    const { mediaType, digest, size } = layer;
    const diffId = await this.#client.applyDiff({ mediaType, digest, size }, mounts, { signal });
    if (diffId !== layer.diffId) {
      throw new DedupError(
        'DIGEST_MISMATCH',
        `layer ${layer.digest} unpacks to ${diffId}, but the image configuration names ${layer.diffId}`,
        { hint: 'the image is damaged or was tampered with; push it again from its source' },
      );
    }
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

function fitsLabel(name: string, value: string): boolean {
  return Buffer.byteLength(name) + Buffer.byteLength(value) <= MAX_LABEL_BYTES;
}
