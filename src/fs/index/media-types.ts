// Media types of manifests and layers: which layers can be loaded lazily, and what Docker's schema 2 types are called
// in OCI. Used by publish.ts, annotate.ts and the data plane; sources: OCI image spec 1.1, Docker image manifest v2.2.
import {
  DOCKER_LIST,
  DOCKER_MANIFEST,
  INDEX_TYPES,
  MANIFEST_TYPES,
  OCI_INDEX,
  OCI_MANIFEST,
} from '../registry/manifest-json.ts';

export const OCI_CONFIG = 'application/vnd.oci.image.config.v1+json';
const DOCKER_CONFIG = 'application/vnd.docker.container.image.v1+json';

const TO_OCI: Readonly<Record<string, string>> = {
  [DOCKER_MANIFEST]: OCI_MANIFEST,
  [DOCKER_LIST]: OCI_INDEX,
  [DOCKER_CONFIG]: OCI_CONFIG,
  'application/vnd.docker.image.rootfs.diff.tar': 'application/vnd.oci.image.layer.v1.tar',
  'application/vnd.docker.image.rootfs.diff.tar.gzip': 'application/vnd.oci.image.layer.v1.tar+gzip',
  'application/vnd.docker.image.rootfs.diff.tar.zstd': 'application/vnd.oci.image.layer.v1.tar+zstd',
  'application/vnd.docker.image.rootfs.foreign.diff.tar': 'application/vnd.oci.image.layer.nondistributable.v1.tar',
  'application/vnd.docker.image.rootfs.foreign.diff.tar.gzip':
    'application/vnd.oci.image.layer.nondistributable.v1.tar+gzip',
};

/** The OCI name of a media type; the type itself when it has none. */
export function ociMediaType(mediaType: string): string {
  return TO_OCI[mediaType] ?? mediaType;
}

export function isImageManifest(mediaType: string): boolean {
  return MANIFEST_TYPES.has(mediaType);
}

export function isImageIndex(mediaType: string): boolean {
  return INDEX_TYPES.has(mediaType);
}

/** The parts of a layer descriptor that decide. */
export interface LayerDescriptor {
  readonly mediaType: string;
  readonly urls?: readonly string[] | undefined;
}

export type LayerClass = { readonly lazy: true } | { readonly lazy: false; readonly reason: string };

const LAZY_TYPES: ReadonlySet<string> = new Set([
  'application/vnd.oci.image.layer.v1.tar',
  'application/vnd.oci.image.layer.v1.tar+gzip',
  'application/vnd.oci.image.layer.v1.tar+zstd',
]);

/**
 * Whether a layer can be loaded lazily as far as its descriptor tells; the builder may still find a zstd layer that
 * has no frames to start at (LAYER_NOT_LAZY).
 */
export function classifyLayer(layer: LayerDescriptor): LayerClass {
  const type = ociMediaType(layer.mediaType);
  if (type.startsWith('application/vnd.oci.image.layer.nondistributable.')) {
    return { lazy: false, reason: 'a foreign layer: registries do not hold it' };
  }
  if (layer.urls !== undefined && layer.urls.length > 0)
    return { lazy: false, reason: 'its bytes are at URLs outside the registry' };
  if (type.endsWith('+encrypted')) return { lazy: false, reason: 'it is encrypted' };
  if (LAZY_TYPES.has(type)) return { lazy: true };
  return { lazy: false, reason: `media type ${JSON.stringify(layer.mediaType.slice(0, 200))} is not known` };
}
