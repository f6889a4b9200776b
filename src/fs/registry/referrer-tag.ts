// The tag that lists the referrers of a manifest on registries without the referrers API. Written by `index` after a
// push whose answer had no OCI-Subject header; read by the repositories themselves.
import { type Digest, digestHex } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import type { Repository } from './blob-reader.ts';
import { type Descriptor, OCI_INDEX, parseIndex } from './manifest-json.ts';

export function referrerTag(subject: Digest): string {
  return `sha256-${digestHex(subject)}`;
}

export interface Referrer {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly artifactType: string;
  readonly annotations?: Readonly<Record<string, string>>;
}

/**
 * Adds `referrer` to the tag of `subject`, keeping what others put there. Not atomic: of two writers at once one may
 * lose, which the specification accepts. Source: OCI distribution spec 1.1, "Pushing Manifests with Subject".
 * `replaces` says which earlier entries it takes the place of (by default the same digest).
 */
export async function addReferrerTag(
  repository: Repository,
  subject: Digest,
  referrer: Referrer,
  signal: AbortSignal,
  replaces: (other: Descriptor) => boolean = () => false,
): Promise<void> {
  const tag = referrerTag(subject);
  let manifests: Descriptor[] = [];
  try {
    const index = await repository.getManifest(tag, signal);
    manifests = parseIndex(index.bytes, `reading ${tag} of ${repository.name}`);
  } catch (error) {
    if (!(error instanceof DedupError && error.code === 'REGISTRY_NOT_FOUND')) throw error;
  }
  const kept = manifests.filter((other) => other.digest !== referrer.digest && !replaces(other));
  const index = { schemaVersion: 2, mediaType: OCI_INDEX, manifests: [...kept, referrer] };
  await repository.putManifest(tag, OCI_INDEX, Buffer.from(JSON.stringify(index)), signal);
}
