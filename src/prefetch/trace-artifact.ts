// Access traces beside their image in a registry: pushed as an artifact that refers to it, and found again by nodes that pull
// it (docs/formats/trace.md). What is found is a hint from anybody: at worst it fetches ahead what nobody reads.
import { type Digest, digestOf } from '../digest.ts';
import { DedupError, errorCode } from '../errors.ts';
import { parseManifest } from '../fs/index/manifests.ts';
import { type ArtifactContent, listAsReferrer, pushArtifactManifest, type Subject } from '../fs/registry/artifact.ts';
import type { Repository } from '../fs/registry/blob-reader.ts';
import { CREATED_ANNOTATION } from '../fs/registry/manifest-json.ts';
import { type AccessTrace, formatTrace, MAX_TRACE_BYTES, parseTrace } from './access-trace.ts';

/** Artifact type of the manifest, and media type of its only layer: the text form. */
export const TRACE_ARTIFACT_TYPE = 'application/vnd.dedup-snapshotter.trace.v1';
/** Artifacts of one image that are looked at: anybody who may push can add some. */
const MAX_REFERRERS = 4;

/**
 * Pushes a trace as a referrer of the image manifest `subject`; the digest of its artifact. Where the registry does not list
 * referrers by itself, it takes the place of the trace pushed before. Errors: those of Repository; TRACE_INVALID when
 * its text form is too long to be read again.
 */
export async function pushTrace(
  repository: Repository,
  subject: Subject,
  trace: AccessTrace,
  signal: AbortSignal,
): Promise<Digest> {
  const bytes = Buffer.from(formatTrace(trace), 'latin1');
  if (bytes.length > MAX_TRACE_BYTES) {
    throw new DedupError('TRACE_INVALID', `the trace has ${bytes.length} bytes; at most ${MAX_TRACE_BYTES} are read`);
  }
  const digest = digestOf(bytes);
  await repository.putBlob(digest, bytes, signal);
  const content: ArtifactContent = {
    artifactType: TRACE_ARTIFACT_TYPE,
    subject,
    layers: [{ mediaType: TRACE_ARTIFACT_TYPE, digest, size: bytes.length }],
    annotations: { [CREATED_ANNOTATION]: new Date(trace.updatedMs).toISOString() },
  };
  const artifact = await pushArtifactManifest(repository, content, signal);
  await listAsReferrer(repository, artifact, content, signal);
  return artifact.digest;
}

/**
 * The latest trace beside the image manifest `subject` that is of an image with these layers; undefined when there is none.
 * Artifacts that are damaged, gone, or of other layers are passed over. Errors: those of Repository when the registry does
 * not answer as it should.
 */
export async function findTrace(
  repository: Repository,
  subject: Digest,
  layers: readonly Digest[],
  signal: AbortSignal,
): Promise<AccessTrace | undefined> {
  const referrers = await repository.referrers(subject, TRACE_ARTIFACT_TYPE, signal);
  const age = ({ created = '' }: { created?: string }): number => Date.parse(created) || 0;
  const latest = referrers.toSorted((a, b) => age(b) - age(a)).slice(0, MAX_REFERRERS);
  let best: AccessTrace | undefined;
  for (const { digest } of latest) {
    const trace = await readArtifact(repository, digest, signal).catch(passOver);
    if (trace === undefined || !sameLayers(trace.layers, layers)) continue;
    if (best === undefined || trace.updatedMs > best.updatedMs) best = trace;
  }
  return best;
}

export function sameLayers(a: readonly Digest[], b: readonly Digest[]): boolean {
  return a.length === b.length && a.every((layer, at) => layer === b[at]);
}

/** Errors: those of Repository; REGISTRY_PROTOCOL and TRACE_INVALID for what is no such artifact. */
async function readArtifact(
  repository: Repository,
  digest: Digest,
  signal: AbortSignal,
): Promise<AccessTrace | undefined> {
  const { bytes } = await repository.getManifest(digest, signal);
  const { layers } = parseManifest(bytes, `reading artifact ${digest} from ${repository.name}`);
  const blob = layers.find(({ mediaType }) => mediaType === TRACE_ARTIFACT_TYPE);
  if (blob === undefined || blob.size > MAX_TRACE_BYTES) return undefined;
  const text = await repository.readBlob(blob.digest, MAX_TRACE_BYTES, signal);
  return parseTrace(text.toString('latin1'), `the trace ${blob.digest} in ${repository.name}`);
}

/** What is wrong with one artifact is no word on the next one; a registry that does not answer is. */
function passOver(error: unknown): undefined {
  const own = ['REGISTRY_NOT_FOUND', 'REGISTRY_PROTOCOL', 'DIGEST_MISMATCH', 'TRACE_INVALID'];
  if (!own.includes(errorCode(error))) throw error;
}
