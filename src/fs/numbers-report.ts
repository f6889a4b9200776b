// What the exporter and the RPC Stats show, out of what the parts of the data path count. The one place where their counts become
// metrics.
import type { NumbersNow } from '../metrics.ts';
import type { NodeStoreStats } from './chunks/node-store.ts';
import type { StatsMessage } from './control-server.ts';
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

export interface StatsParts extends Pick<CountingParts, 'store' | 'loader' | 'transport' | 'registry'> {
  readonly traces: { readonly asked: { readonly bytes: number; readonly presentBytes: number } };
}

/** Requests and bytes of everything but ranges of layers. */
interface ControlTraffic {
  readonly requests: number;
  readonly bytes: number;
  /** False while answers are on their way: the registry counts bytes as they come, the loader whole answers. */
  readonly exact: boolean;
}

function controlTraffic(loader: LoaderStats, { traffic }: CountingParts['registry']): ControlTraffic {
  return {
    requests: traffic.requests - loader.requests,
    bytes: traffic.bytes - loader.wireBytes,
    exact: loader.waiting === 0,
  };
}

/** What the exporter shows. Errors: CLOSED, STORE_IO. */
export async function reportNumbers(parts: CountingParts): Promise<NumbersNow> {
  const store = await parts.store.stats();
  // All of one moment: no await from here on.
  const loader = parts.loader.stats();
  const control = controlTraffic(loader, parts.registry);
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
    controlBytes: control.exact ? control.bytes : undefined,
    controlRequests: control.requests,
    presentBytes: store.presentBytes,
    chunks: store.chunks,
    imagesMounted: parts.mounts.list().length,
  };
}

/** The answer to the RPC Stats; bytes of control traffic are too many while answers are on their way. Errors: CLOSED, STORE_IO. */
export async function reportStats(parts: StatsParts): Promise<StatsMessage> {
  const store = await parts.store.stats();
  const loader = parts.loader.stats();
  const control = controlTraffic(loader, parts.registry);
  return {
    chunks: store.chunks,
    chunk_bytes: store.chunkBytes,
    present_bytes: store.presentBytes,
    requests: loader.requests,
    wire_bytes: loader.wireBytes,
    misses: loader.misses,
    hits: parts.transport.stats().hits,
    span_bytes: loader.spanBytes,
    control_bytes: control.bytes,
    control_requests: control.requests,
    ahead_bytes: loader.aheadBytes,
    prefetch_bytes: loader.prefetchBytes,
    prefetch_useful_bytes: loader.usefulBytes,
    prefetch_late_bytes: loader.lateBytes,
    prefetch_wasted_bytes: loader.wastedBytes,
    asked_bytes: parts.traces.asked.bytes,
    asked_present_bytes: parts.traces.asked.presentBytes,
  };
}
