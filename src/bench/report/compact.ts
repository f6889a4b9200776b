// A result small enough to be committed beside the documentation: every figure of every table stays; of request times and
// resource samples only what the charts there draw.
import type { BenchResult, ColdStartResult, ResourceSample, ResourceTrace } from '../result.ts';
import { cellOf, typicalStart } from './cells.ts';

/** Samples of a trace at most: more than a chart has pixels for tell nothing. */
const MOST_SAMPLES = 160;

/** Keeps the time line of one typical start of each snapshotter where `drawn` says that it is shown. */
export function compactResult(
  result: BenchResult,
  drawn: (place: { readonly image: string; readonly link: string }) => boolean,
): BenchResult {
  const typical = new Set<ColdStartResult>();
  for (const { image, link, snapshotter } of cellsShown(result, drawn)) {
    const cell = cellOf(result, image, link, snapshotter);
    const start = cell && typicalStart(cell, (each) => (each.requestTimes ?? []).length > 0);
    if (start !== undefined) typical.add(start);
  }
  return {
    ...result,
    starts: result.starts.map((start) => {
      const { requestTimes, ...figures } = start;
      return typical.has(start) && requestTimes !== undefined ? { ...figures, requestTimes } : figures;
    }),
    resources: result.resources.map(thinned),
  };
}

function cellsShown(result: BenchResult, drawn: (place: { image: string; link: string }) => boolean) {
  return result.links.flatMap(({ name: link }) =>
    result.images
      .filter(({ name: image }) => drawn({ image, link }))
      .flatMap(({ name: image }) => result.snapshotters.map((snapshotter) => ({ image, link, snapshotter }))),
  );
}

/** Neighbouring samples become their mean, so that the area under a curve, the sum, stays what it was. */
function thinned(trace: ResourceTrace): ResourceTrace {
  const width = Math.ceil(trace.samples.length / MOST_SAMPLES);
  if (width <= 1) return trace;
  const samples: ResourceSample[] = [];
  for (let at = 0; at < trace.samples.length; at += width) samples.push(mean(trace.samples.slice(at, at + width)));
  return { ...trace, samples };
}

function mean(samples: readonly ResourceSample[]): ResourceSample {
  const of = (key: keyof ResourceSample): number =>
    samples.reduce((sum, sample) => sum + sample[key], 0) / samples.length;
  return {
    // A sample speaks for the time before it, so the group stands where its last one stood.
    atMs: samples.at(-1)!.atMs,
    cpuCores: of('cpuCores'),
    memoryBytes: of('memoryBytes'),
    diskWriteBytesPerSecond: of('diskWriteBytesPerSecond'),
    networkBytesPerSecond: of('networkBytesPerSecond'),
  };
}
