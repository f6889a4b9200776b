// The manifest that holds the index blobs of one image, and the reports that `index` gives. Shared by publish.ts, which
// indexes, and annotate.ts, which pushes re-annotated copies.
import { type Digest, isDigest, parseDigest } from '../../digest.ts';
import {
  type Artifact,
  type ArtifactBlob,
  type ArtifactContent,
  listAsReferrer,
  pushArtifactManifest,
  type Subject,
} from '../registry/artifact.ts';
import type { Repository } from '../registry/blob-reader.ts';
import {
  INDEX_ARTIFACT_TYPE,
  INDEX_LAYER_MEDIA_TYPE,
  INDEXED_LAYER_ANNOTATION,
  RESTART_LAYER_MEDIA_TYPE,
} from './layer-index.ts';
import { type Json, type ManifestDescriptor, type ParsedManifest, parseManifest } from './manifests.ts';

/** Referrers of one image that are looked at; more are somebody's mistake or attack. */
const MAX_REFERRERS = 8;

export interface ImageLocation {
  readonly repository: Repository;
  /** Tag, or digest of a source. */
  readonly reference: string;
}

/** What became of one layer. */
export interface LayerReport {
  readonly digest: Digest;
  readonly size: number;
  /** Why it cannot be loaded lazily; absent when it can. */
  readonly reason?: string;
  readonly tarBytes?: number;
  readonly index?: { readonly digest: Digest; readonly size: number };
  readonly restart?: { readonly digest: Digest; readonly size: number };
}

export interface ImageReport {
  readonly platform: string;
  /** Manifest that was indexed. */
  readonly manifest: Digest;
  /** Artifact that holds its indexes; absent when no layer can be loaded lazily. */
  readonly artifact?: Digest;
  /** Its re-annotated copy, with `annotate`. */
  readonly annotated?: Digest;
  readonly layers: readonly LayerReport[];
}

export interface IndexReport {
  readonly images: readonly ImageReport[];
  /** The image index pushed with `annotate`. */
  readonly pushed?: Digest;
}

export type IndexEvent =
  | { readonly kind: 'layer-start'; readonly digest: Digest; readonly size: number }
  | { readonly kind: 'layer-progress'; readonly digest: Digest; readonly layerBytes: number }
  | { readonly kind: 'layer-end'; readonly report: LayerReport }
  | { readonly kind: 'copy'; readonly digest: Digest; readonly size: number };

/** One image manifest of the source. */
export interface SourceImage {
  readonly descriptor: ManifestDescriptor;
  readonly bytes: Buffer;
  readonly manifest: ParsedManifest;
  readonly platform: Json;
  readonly diffIds: readonly string[];
}

export function layerReports(image: SourceImage, layers: ReadonlyMap<Digest, LayerReport>): LayerReport[] {
  return image.manifest.layers.map((layer) => layers.get(layer.digest)!);
}

/** The manifest that holds the index blobs of one image; undefined when no layer has an index. */
function indexArtifact(subject: Subject, layers: readonly LayerReport[]): ArtifactContent | undefined {
  const blobs: ArtifactBlob[] = [];
  const seen = new Set<Digest>();
  for (const { digest, index, restart } of layers) {
    if (index === undefined || restart === undefined || seen.has(digest)) continue;
    seen.add(digest);
    const annotations = { [INDEXED_LAYER_ANNOTATION]: digest };
    blobs.push({ mediaType: INDEX_LAYER_MEDIA_TYPE, digest: index.digest, size: index.size, annotations });
    blobs.push({ mediaType: RESTART_LAYER_MEDIA_TYPE, digest: restart.digest, size: restart.size, annotations });
  }
  return blobs.length === 0 ? undefined : { artifactType: INDEX_ARTIFACT_TYPE, subject, layers: blobs };
}

/** Pushes the manifest that holds the index blobs of one image; undefined when no layer has an index. */
export async function pushArtifact(
  repository: Repository,
  subject: Subject,
  layers: readonly LayerReport[],
  signal: AbortSignal,
): Promise<Artifact | undefined> {
  const content = indexArtifact(subject, layers);
  return content === undefined ? undefined : await pushArtifactManifest(repository, content, signal);
}

/**
 * Pushes the manifest that holds the index blobs of an image, so that it is found as a referrer of `subject`, also in
 * registries that list none by themselves. The blobs are there. Its digest, or undefined when no layer has an index.
 */
export async function pushReferrer(
  repository: Repository,
  subject: Subject,
  layers: readonly LayerReport[],
  signal: AbortSignal,
): Promise<Digest | undefined> {
  const content = indexArtifact(subject, layers);
  if (content === undefined) return undefined;
  const artifact = await pushArtifactManifest(repository, content, signal);
  await listAsReferrer(repository, artifact, content, signal);
  return artifact.digest;
}

/** What is listed of one layer. */
export type ListedIndex = Required<Pick<LayerReport, 'index'>> & Pick<LayerReport, 'restart'>;

/**
 * The index blobs that artifacts beside the image manifest `subject` list, by layer; of several for one layer the first.
 * Errors: those of Repository; REGISTRY_PROTOCOL for an artifact that is no manifest.
 */
export async function listedIndexes(
  repository: Repository,
  subject: Digest,
  signal: AbortSignal,
): Promise<Map<Digest, ListedIndex>> {
  const found = new Map<Digest, ListedIndex>();
  const referrers = await repository.referrers(subject, INDEX_ARTIFACT_TYPE, signal);
  for (const { digest: artifact } of referrers.slice(0, MAX_REFERRERS)) {
    const manifest = await repository.getManifest(artifact, signal);
    const { layers } = parseManifest(manifest.bytes, `reading artifact ${artifact} from ${repository.name}`);
    const ofLayers = (mediaType: string): Map<Digest, { digest: Digest; size: number }> => {
      const blobs = new Map<Digest, { digest: Digest; size: number }>();
      for (const { mediaType: type, digest, size, annotations } of layers) {
        const layer = annotations?.[INDEXED_LAYER_ANNOTATION];
        if (type !== mediaType || layer === undefined || !isDigest(layer) || blobs.has(layer)) continue;
        blobs.set(layer, { digest, size });
      }
      return blobs;
    };
    const restarts = ofLayers(RESTART_LAYER_MEDIA_TYPE);
    for (const [layer, index] of ofLayers(INDEX_LAYER_MEDIA_TYPE)) {
      const restart = restarts.get(layer);
      if (!found.has(layer)) found.set(layer, restart === undefined ? { index } : { index, restart });
    }
  }
  return found;
}

/** True when both blobs of an index lie in the repository. Errors: those of Repository; INVALID_ARGUMENT for what is no digest. */
export async function holdsIndex(
  repository: Repository,
  { indexDigest, restartDigest }: { readonly indexDigest: string; readonly restartDigest: string },
  signal: AbortSignal,
): Promise<boolean> {
  const blobs = [indexDigest, restartDigest].map((blob) => repository.hasBlob(parseDigest(blob), signal));
  return (await Promise.all(blobs)).every((has) => has);
}
