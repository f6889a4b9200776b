// Ours three times, by what it finds of earlier starts: nothing, the trace of one start of the same image, or that of one
// start of the image's other version.
import type { BenchTarget, Contender } from '../../../src/bench/contenders.ts';
import type { AccessTrace } from '../../../src/prefetch/access-trace.ts';
import type { DedupdStats } from '../../../src/snapshotter/dedupd-client.ts';
import type { Product } from '../../support/product.ts';
import type { TraceDirectory } from './trace-directory.ts';

export const WITHOUT = 'dedup';
export const WITH = 'dedup-trace';
export const STALE = 'dedup-stale';

/** What is known of an image under test. */
export interface TracedImage {
  readonly layers: readonly string[];
  readonly own: AccessTrace;
  /** Of the other version, with this one's repository. */
  readonly stale: AccessTrace;
}

/** Those that only grow. */
const COUNTERS = [
  'requests',
  'control_requests',
  'wire_bytes',
  'misses',
  'prefetch_bytes',
  'prefetch_useful_bytes',
  'prefetch_late_bytes',
  'prefetch_wasted_bytes',
  'asked_bytes',
  'asked_present_bytes',
] as const satisfies readonly (keyof DedupdStats)[];

export interface TraceContenders {
  readonly ours: Contender;
  readonly product: Product;
  readonly directory: TraceDirectory;
  readonly imageOf: (target: BenchTarget) => TracedImage;
  readonly say: (text: string) => void;
}

export function traceContenders(setup: TraceContenders): Contender[] {
  return [
    traceContender(setup, WITHOUT, () => []),
    traceContender(setup, WITH, ({ own }) => [own]),
    traceContender(setup, STALE, ({ stale }) => [stale]),
  ];
}

function traceContender(
  { ours, product, directory, imageOf, say }: TraceContenders,
  name: string,
  tracesOf: (image: TracedImage) => readonly AccessTrace[],
): Contender {
  let [mark, before]: [string | undefined, DedupdStats | undefined] = [undefined, undefined];
  return {
    ...ours,
    name,
    prepare: async (target) => {
      const image = imageOf(target);
      await directory.set(tracesOf(image));
      mark = await directory.mark(image.layers);
      before = await product.stats();
    },
    // What prefetch brought in vain is known when the recording has ended.
    counters: async (target) => {
      if (!(await directory.endedSince(imageOf(target).layers, mark)))
        say(`${name}, ${target.image.name}: the start wrote no trace`);
      const after = await product.stats();
      return Object.fromEntries(COUNTERS.map((key) => [key, after[key] - before![key]]));
    },
  };
}
