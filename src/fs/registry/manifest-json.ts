// The little this folder must know of manifests: their media types and the descriptors of a list of referrers. What
// manifests mean for images is decided elsewhere.
import { z } from 'zod';
import { type Digest, isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';

export interface ReferrerDescriptor {
  digest: Digest;
  size: number;
  mediaType: string;
  /** When it was made, as its annotation says: whoever looks at a few only wants the latest. */
  created?: string;
}

export const OCI_EMPTY = 'application/vnd.oci.empty.v1+json';
/** Annotation of manifests: RFC 3339 (OCI image spec, annotations.md). */
export const CREATED_ANNOTATION = 'org.opencontainers.image.created';
export const OCI_MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
export const OCI_INDEX = 'application/vnd.oci.image.index.v1+json';
export const DOCKER_MANIFEST = 'application/vnd.docker.distribution.manifest.v2+json';
export const DOCKER_LIST = 'application/vnd.docker.distribution.manifest.list.v2+json';

export const MANIFEST_TYPES: ReadonlySet<string> = new Set([OCI_MANIFEST, DOCKER_MANIFEST]);
export const INDEX_TYPES: ReadonlySet<string> = new Set([OCI_INDEX, DOCKER_LIST]);

const descriptor = z.looseObject({
  mediaType: z.string(),
  digest: z.string(),
  size: z.int().min(0),
  artifactType: z.string().optional(),
});
export type Descriptor = z.infer<typeof descriptor>;

const imageIndex = z.looseObject({ manifests: z.array(descriptor).nullable().default([]) });

/** The descriptors of an image index. Errors: REGISTRY_PROTOCOL when it is not one. */
export function parseIndex(bytes: Uint8Array, doing: string): Descriptor[] {
  try {
    return imageIndex.parse(JSON.parse(Buffer.from(bytes).toString('utf8'))).manifests ?? [];
  } catch (cause) {
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the answer is not an image index`, { cause });
  }
}

/** Of others' making and not checked by the schema: lists are written back as they were read. */
export function annotationsOf(entry: Descriptor): Readonly<Record<string, string | undefined>> {
  const annotations = (entry as { annotations?: unknown }).annotations;
  return typeof annotations === 'object' && annotations !== null ? (annotations as Record<string, string>) : {};
}

/** The descriptors of one artifact type in a list of referrers. */
export function referrersIn(bytes: Uint8Array, artifactType: string, doing: string): ReferrerDescriptor[] {
  return parseIndex(bytes, doing).flatMap((entry) => {
    const { digest, size, mediaType } = entry;
    if (entry.artifactType !== artifactType || !isDigest(digest)) return [];
    const created = annotationsOf(entry)[CREATED_ANNOTATION];
    return [{ digest, size, mediaType, ...(typeof created === 'string' ? { created } : {}) }];
  });
}

/** The media type of a manifest: what the server says, else what the manifest says of itself. */
export function mediaTypeOf(contentType: string | undefined, bytes: Uint8Array): string {
  const said = (contentType ?? '').split(';')[0]?.trim().toLowerCase() ?? '';
  if (said.startsWith('application/vnd.')) return said;
  try {
    const own = (JSON.parse(Buffer.from(bytes).toString('utf8')) as { mediaType?: unknown } | null)?.mediaType;
    if (typeof own === 'string' && own !== '') return own;
  } catch {
    // Not JSON: the caller refuses it when it parses it; here only the name of its type is wanted.
  }
  return said;
}
