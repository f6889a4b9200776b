// What is known of the requests of one start: seen at the registry's side, never asked of the snapshotter. Implemented by
// the counting proxy (any registry) and, in tests' private world, by the registry's own access log.
import type { RequestTime } from './result.ts';

/** One answered request. Times are milliseconds since the epoch, with a fraction. */
export interface MeteredRequest {
  readonly startedAt: number;
  readonly endedAt: number;
  /** Of the body. */
  readonly bytes: number;
  /** Path of the URL with its query. */
  readonly path: string;
}

export interface Meter {
  /** Requests that began in [fromAt, toAt], in order of their beginning. Waits for those still being answered. */
  requests(fromAt: number, toAt: number): Promise<readonly MeteredRequest[]>;
}

/** Digests that tell blobs apart. */
export interface ImageBlobs {
  readonly layers: ReadonlySet<string>;
  readonly configs: ReadonlySet<string>;
  /** Restart blobs, read for the windows of spans; absent: they count as indexes. */
  readonly restarts?: ReadonlySet<string>;
}

export function requestKind(path: string, blobs: ImageBlobs): RequestTime['kind'] {
  if (path.includes('/manifests/')) return 'manifest';
  const digest = /\/blobs\/(sha256:[0-9a-f]{64})/.exec(path)?.[1];
  if (digest !== undefined) {
    if (blobs.layers.has(digest)) return 'layer';
    if (blobs.restarts?.has(digest) === true) return 'window';
    return blobs.configs.has(digest) ? 'config' : 'index';
  }
  return /token/.test(path) ? 'token' : 'other';
}

/** The clock of MeteredRequest for a performance.now() of this process. */
export function epochMs(monotonicMs: number): number {
  return Date.now() - performance.now() + monotonicMs;
}

/** Requests on the clock of a start that began at `fromAt`. */
export function requestTimes(requests: readonly MeteredRequest[], fromAt: number, blobs: ImageBlobs): RequestTime[] {
  const rounded = (ms: number): number => Math.round(Math.max(0, ms) * 10) / 10;
  return requests.map(({ startedAt, endedAt, bytes, path }) => ({
    startMs: rounded(startedAt - fromAt),
    endMs: rounded(Math.max(startedAt, endedAt) - fromAt),
    bytes,
    kind: requestKind(path, blobs),
  }));
}
