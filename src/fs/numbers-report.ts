// What the exporter shows, out of what the parts of the data path count. The one place where their counts become metrics.
import type { NumbersNow } from '../metrics.ts';
import type { NodeStoreStats } from './chunks/node-store.ts';
import type { LoaderStats } from './lazy-loader.ts';
import type { TransportStats } from './transport/transport.ts';

export interface CountingParts {
  readonly store: { stats(): Promise<NodeStoreStats> };
  readonly loader: { stats(): LoaderStats };
  readonly transport: { stats(): TransportStats };
  readonly registry: { readonly traffic: { readonly requests: number; readonly bytes: number } };
  readonly mounts: { list(): readonly unknown[] };
  readonly traces: { readonly queuedSpans: number; readonly recorded: number; readonly replayed: number };
}

/** Errors: CLOSED, STORE_IO. */
export async function reportNumbers(parts: CountingParts): Promise<NumbersNow> {
  const store = await parts.store.stats();
  // All of one moment: no await from here on.
  const loader = parts.loader.stats();
  const { traffic } = parts.registry;
  return {
    // The transport answers hits by itself, or leaves them to the loader (fuse-native).
    hits: parts.transport.stats().hits + Math.max(0, loader.reads - loader.misses),
    misses: loader.misses,
    failedReads: loader.failedReads,
    prefetchUsefulBytes: loader.usefulBytes,
    prefetchLateBytes: loader.lateBytes,
    prefetchWastedBytes: loader.wastedBytes,
    prefetchUnreadBytes: loader.prefetchBytes - loader.usefulBytes - loader.lateBytes - loader.wastedBytes,
    prefetchQueueSpans: parts.traces.queuedSpans,
    tracesRecorded: parts.traces.recorded,
    tracesReplayed: parts.traces.replayed,
    waitingSpans: loader.waiting,
    dataBytes: loader.wireBytes,
    dataRequests: loader.requests,
    // The registry counts bytes as they come, the loader whole answers: in between the difference is too large.
    controlBytes: loader.waiting > 0 ? undefined : traffic.bytes - loader.wireBytes,
    controlRequests: traffic.requests - loader.requests,
    presentBytes: store.presentBytes,
    chunks: store.chunks,
    imagesMounted: parts.mounts.list().length,
  };
}
