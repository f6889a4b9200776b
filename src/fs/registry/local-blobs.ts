// Blobs that lie on this node already: what the data path asks of containerd's content store, without knowing it. Types
// only; implemented by src/pull/containerd-content.ts.
import type { Digest } from '../../digest.ts';

/** A blob that containerd has. */
export interface LocalBlob extends AsyncDisposable {
  readonly size: number;
  /** Its bytes, once; not verified. Errors: UNAVAILABLE, CANCELLED, NOT_FOUND when it was collected meanwhile. */
  readonly stream: AsyncIterable<Buffer>;
}

/** Opens a blob of a containerd namespace; undefined when containerd does not answer or does not have it. */
export type LocalBlobs = (namespace: string, digest: Digest, signal: AbortSignal) => Promise<LocalBlob | undefined>;
