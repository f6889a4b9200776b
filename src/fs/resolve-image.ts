// From an image reference to the layers a node must know to show the image: its manifest for a platform, its configuration, and
// each layer as LayerIntake wants it. Used where no containerd says so: standalone mounts and warm-up. Reads only manifests.
import type { Digest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { LayerSourceName } from './chunks/index-protocol.ts';
import { INDEX_ANNOTATION } from './index/layer-index.ts';
import type { WantedLayer } from './layer-intake.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';
import {
  chooseManifest,
  hostPlatform,
  imageLayers,
  MAX_JSON_BYTES,
  parseManifest,
  parsePlatform,
} from './registry/image-manifest.ts';
import { INDEX_TYPES } from './registry/manifest-json.ts';
import { formatReference, type ImageReference, tagOrDigest } from './registry/reference.ts';

export interface ResolvedLayer {
  readonly wanted: WantedLayer;
  readonly blob: BlobId;
  readonly mediaType: string;
}

export interface ResolvedImage {
  readonly manifest: Digest;
  /** Bytes of the image's configuration. */
  readonly config: Buffer;
  /** Bottom to top. */
  readonly layers: readonly ResolvedLayer[];
}

/**
 * Asks the registry what a reference stands for. `platform`: "os/architecture[/variant]", empty for this machine's; `scopeOf`
 * as LayerIntake's. Errors: INVALID_ARGUMENT, NOT_FOUND without an image for the platform, REGISTRY_PROTOCOL, registry.
 */
export async function resolveImage(
  reference: ImageReference,
  repository: Repository,
  platformText: string,
  scopeOf: (source: LayerSourceName) => string,
  signal: AbortSignal,
): Promise<ResolvedImage> {
  const what = formatReference(reference);
  const platform = platformText === '' ? hostPlatform() : parsePlatform(platformText);
  let manifest = await repository.getManifest(tagOrDigest(reference), signal);
  if (INDEX_TYPES.has(manifest.mediaType)) {
    const chosen = chooseManifest(manifest.bytes, platform, what);
    manifest = await repository.getManifest(chosen.descriptor.digest, signal);
  }
  const parsed = parseManifest(manifest.bytes, what);
  if (parsed.config.size > MAX_JSON_BYTES) {
    throw new DedupError('REGISTRY_PROTOCOL', `${what}: a configuration of ${parsed.config.size} bytes is too large`);
  }
  const configParts: Buffer[] = [];
  for await (const part of repository.readAll(parsed.config, signal)) configParts.push(part);
  const config = Buffer.concat(configParts);
  const source: LayerSourceName = { host: reference.host, repository: reference.path };
  const layers = imageLayers(config, parsed.layers, platform, what).map((layer) => ({
    wanted: {
      key: { digest: layer.digest, index: layer.annotations[INDEX_ANNOTATION] ?? '', scope: scopeOf(source) },
      sources: [source],
      manifest: manifest.digest,
      reference: what,
    },
    blob: { digest: layer.digest, size: layer.size },
    mediaType: layer.mediaType,
  }));
  return { manifest: manifest.digest, config, layers };
}
