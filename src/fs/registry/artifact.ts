// Manifests that carry blobs of ours beside an image and refer to it, and how they are pushed so that they are found as its
// referrers. Called for layer indexes and access traces; what the blobs mean is theirs.
import { type Digest, digestOf } from '../../digest.ts';
import type { Repository } from './blob-reader.ts';
import { OCI_EMPTY, OCI_MANIFEST } from './manifest-json.ts';
import { addReferrerTag } from './referrer-tag.ts';

const EMPTY_JSON = Buffer.from('{}');

export interface ArtifactBlob {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly annotations?: Readonly<Record<string, string>>;
}

/** The image manifest that an artifact belongs to. */
export type Subject = Pick<ArtifactBlob, 'mediaType' | 'digest' | 'size'>;

/** An artifact manifest to be; its blobs are in the repository already. */
export interface ArtifactContent {
  readonly artifactType: string;
  readonly subject: Subject;
  readonly layers: readonly ArtifactBlob[];
  readonly annotations?: Readonly<Record<string, string>>;
}

/** What was pushed. */
export interface Artifact {
  readonly bytes: Buffer;
  readonly digest: Digest;
  /** True when the registry lists it as a referrer by itself. */
  readonly subjectKnown: boolean;
}

/** Pushes the manifest, the same bytes for the same content. Errors: those of Repository. */
export async function pushArtifactManifest(
  repository: Repository,
  content: ArtifactContent,
  signal: AbortSignal,
): Promise<Artifact> {
  const { artifactType, subject, layers, annotations } = content;
  const config = digestOf(EMPTY_JSON);
  await repository.putBlob(config, EMPTY_JSON, signal);
  const manifest = {
    schemaVersion: 2,
    mediaType: OCI_MANIFEST,
    artifactType,
    config: { mediaType: OCI_EMPTY, digest: config, size: EMPTY_JSON.length },
    layers,
    subject: { mediaType: subject.mediaType, digest: subject.digest, size: subject.size },
    ...(annotations === undefined ? {} : { annotations }),
  };
  const bytes = Buffer.from(JSON.stringify(manifest));
  const digest = digestOf(bytes);
  const { subjectKnown } = await repository.putManifest(digest, OCI_MANIFEST, bytes, signal);
  return { bytes, digest, subjectKnown };
}

/**
 * Has a pushed artifact found as a referrer also in registries that list none by themselves. In their list it takes the
 * place of earlier ones of its type, so that the list does not grow; those of other types stay.
 */
export async function listAsReferrer(
  repository: Repository,
  artifact: Artifact,
  content: ArtifactContent,
  signal: AbortSignal,
): Promise<void> {
  if (artifact.subjectKnown) return;
  const { artifactType, subject, annotations } = content;
  const referrer = {
    mediaType: OCI_MANIFEST,
    digest: artifact.digest,
    size: artifact.bytes.length,
    artifactType,
    ...(annotations === undefined ? {} : { annotations }),
  };
  await addReferrerTag(repository, subject.digest, referrer, signal, (other) => other.artifactType === artifactType);
}
