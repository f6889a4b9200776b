// Which manifest in a registry a trace belongs to: the image that has exactly its layers. Used before a trace is pushed; a
// trace beside another image would only ever be passed over.
import { isDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import { parseImageIndex, parseManifest } from '../fs/index/manifests.ts';
import { isImageIndex, isImageManifest } from '../fs/index/media-types.ts';
import type { Subject } from '../fs/registry/artifact.ts';
import type { ManifestBytes, Repository } from '../fs/registry/blob-reader.ts';
import type { TraceIdentity } from './access-trace.ts';
import { sameLayers } from './trace-artifact.ts';

/** Members of a multi-platform image that are looked at. */
const MAX_MEMBERS = 64;

/**
 * The image manifest behind a tag or digest whose layers are those of `trace`; of a multi-platform image the member that
 * has them. Errors: FAILED_PRECONDITION when there is none; those of Repository.
 */
export async function findSubject(
  repository: Repository,
  tagOrDigest: string,
  trace: Pick<TraceIdentity, 'layers' | 'manifest'>,
  signal: AbortSignal,
): Promise<Subject> {
  const name = `${repository.name}${isDigest(tagOrDigest) ? '@' : ':'}${tagOrDigest}`;
  const suits = ({ bytes, digest }: ManifestBytes): boolean =>
    sameLayers(
      parseManifest(bytes, `reading manifest ${digest} from ${repository.name}`).layers.map((layer) => layer.digest),
      trace.layers,
    );
  const root = await repository.getManifest(tagOrDigest, signal);
  if (isImageManifest(root.mediaType)) {
    if (suits(root)) return subjectOf(root);
    throw otherLayers(`${name} does not have the layers of the trace`);
  }
  if (!isImageIndex(root.mediaType)) throw otherLayers(`${name} is no image`);
  const members = parseImageIndex(root.bytes, `reading ${name}`).manifests.filter(
    ({ mediaType, artifactType, platform }) =>
      isImageManifest(mediaType) && artifactType === undefined && platform?.os !== 'unknown',
  );
  // The one that was recorded spares asking for the others.
  members.sort((a, b) => Number(b.digest === trace.manifest) - Number(a.digest === trace.manifest));
  for (const { digest } of members.slice(0, MAX_MEMBERS)) {
    const member = await repository.getManifest(digest, signal);
    if (suits(member)) return subjectOf(member);
  }
  throw otherLayers(`no image of ${name} has the layers of the trace`);
}

function subjectOf({ digest, mediaType, bytes }: ManifestBytes): Subject {
  return { digest, mediaType, size: bytes.length };
}

function otherLayers(message: string): DedupError {
  return new DedupError('FAILED_PRECONDITION', message, {
    hint: 'a trace is of one build of an image: record one of this build, or name the image that it is of with --to',
  });
}
