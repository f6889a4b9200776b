// What the benchmark must know of an image before it is pulled: sizes and digests, asked of the registry in the same way
// for every snapshotter and outside of what is measured.

import type { Digest } from '../digest.ts';
import type { Repository } from '../fs/registry/blob-reader.ts';
import { chooseManifest, hostPlatform, parseManifest } from '../fs/registry/image-manifest.ts';
import { INDEX_TYPES } from '../fs/registry/manifest-json.ts';
import { formatReference, type ImageReference, tagOrDigest } from '../fs/registry/reference.ts';

export interface ImageFacts {
  readonly config: Digest;
  /** Bottom to top. Sizes are compressed, bytes. */
  readonly layers: readonly { readonly digest: Digest; readonly size: number }[];
}

/** This machine's image behind a reference. Errors: those of the registry; NOT_FOUND when there is none for it. */
export async function imageFacts(repository: Repository, reference: ImageReference): Promise<ImageFacts> {
  const signal = AbortSignal.timeout(60_000);
  const name = formatReference(reference);
  let manifest = await repository.getManifest(tagOrDigest(reference), signal);
  if (INDEX_TYPES.has(manifest.mediaType)) {
    const { descriptor } = chooseManifest(manifest.bytes, hostPlatform(), name);
    manifest = await repository.getManifest(descriptor.digest, signal);
  }
  const { config, layers } = parseManifest(manifest.bytes, name);
  return { config: config.digest, layers: layers.map(({ digest, size }) => ({ digest, size })) };
}
