// Finds a layer by its index among the image manifests of containerd's content store, for clients that tell the
// snapshotter of a layer but not of its image. Called by the service inside Prepare; only reads.
import { LRUCache } from 'lru-cache';
import type { Digest } from '../digest.ts';
import { MAX_JSON_BYTES, parseManifest } from '../fs/registry/image-manifest.ts';
import { LABEL_INDEX } from '../snapshotter/labels.ts';
import { type CallScope, hasCode } from './containerd-calls.ts';
import { ContainerdClient, type ContentInfo, type Labels } from './containerd-client.ts';

/** containerd gives it to image manifests while it pulls, before it prepares their layers (images/handlers.go). */
const MANIFESTS = 'labels."containerd.io/gc.ref.content.config"';
/** Followed by the host without its port; the value lists repositories (core/remotes/docker/handler.go). */
const SOURCE_LABEL = 'containerd.io/distribution.source.';
/** Manifests looked into for one layer, newest first: that of the pull under way has just been labelled. */
const MANIFESTS_READ = 200;

export interface FoundLayer {
  readonly digest: Digest;
  readonly manifest: Digest;
  /** Where the manifest was fetched from. The host has no port, whatever the registry's is. */
  readonly sources: readonly { readonly host: string; readonly repository: string }[];
}

export class ManifestSearch {
  readonly #address: string;
  /** Layers by index, of manifests that were read. */
  readonly #read = new LRUCache<Digest, ReadonlyMap<string, Digest>>({ max: 2 * MANIFESTS_READ });

  /** `address`: containerd's socket. */
  constructor(address: string) {
    this.#address = address;
  }

  /** The layer with this index, as the newest manifest of the namespace lists it. Errors: UNAVAILABLE, CANCELLED. */
  async find(namespace: string, index: Digest, signal: AbortSignal): Promise<FoundLayer | undefined> {
    const client = new ContainerdClient({ address: this.#address, namespace });
    try {
      const manifests = await client.listContent([MANIFESTS], { signal });
      manifests.sort(newestFirst);
      for (const info of manifests.slice(0, MANIFESTS_READ)) {
        const digest = (await this.#layers(client, info, { signal })).get(index);
        if (digest !== undefined) return { digest, manifest: info.digest, sources: sourcesOf(info.labels) };
      }
      return undefined;
    } finally {
      client.close();
    }
  }

  async #layers(client: ContainerdClient, info: ContentInfo, scope: CallScope): Promise<ReadonlyMap<string, Digest>> {
    const known = this.#read.get(info.digest);
    if (known !== undefined) return known;
    const layers = new Map<string, Digest>();
    try {
      const bytes = await client.readContent(info.digest, MAX_JSON_BYTES, scope);
      for (const { digest, annotations } of parseManifest(bytes, `manifest ${info.digest}`).layers) {
        const index = annotations[LABEL_INDEX];
        if (index !== undefined) layers.set(index, digest);
      }
    } catch (error) {
      if (hasCode(error, 'NOT_FOUND')) return layers; // It has just been collected.
      // What is no manifest of an image, or larger than one, lists no layer that is asked for.
      if (!hasCode(error, 'REGISTRY_PROTOCOL') && !hasCode(error, 'INVALID_ARGUMENT')) throw error;
    }
    this.#read.set(info.digest, layers);
    return layers;
  }
}

function newestFirst(a: ContentInfo, b: ContentInfo): number {
  return b.updated_at.seconds - a.updated_at.seconds || b.updated_at.nanos - a.updated_at.nanos;
}

function sourcesOf(labels: Labels): { host: string; repository: string }[] {
  return Object.entries(labels)
    .filter(([name]) => name.startsWith(SOURCE_LABEL))
    .flatMap(([name, repositories]) => {
      const host = name.slice(SOURCE_LABEL.length);
      return repositories.split(',').map((repository) => ({ host, repository }));
    })
    .filter(({ host, repository }) => host !== '' && repository !== '');
}
