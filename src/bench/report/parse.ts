// A result read back from a file. The file may be old, of another program or edited by hand, so all of it is checked: a
// number that is missing would otherwise be a wrong table.
import { z } from 'zod';
import { DedupError } from '../../errors.ts';
import type { BenchResult } from '../result.ts';

const amount = z.number().nonnegative();
const time = z.number();

const ready = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('exit') }),
  z.object({ kind: z.literal('line'), pattern: z.string() }),
  z.object({ kind: z.literal('port'), port: z.int() }),
]);

const image = z.object({
  name: z.string().min(1),
  composition: z.string(),
  compressedBytes: amount,
  uncompressedBytes: amount,
  layers: amount,
  command: z.array(z.string()),
  ready,
});

const link = z.object({
  name: z.string().min(1),
  roundTripMs: amount.exactOptional(),
  bitsPerSecond: amount.exactOptional(),
  lossRatio: amount.exactOptional(),
  tls: z.boolean(),
});

const start = z.object({
  snapshotter: z.string(),
  image: z.string(),
  link: z.string(),
  order: amount,
  pair: amount,
  phases: z.object({
    controlMs: amount.exactOptional(),
    pullMs: amount,
    createMs: amount,
    runMs: amount,
    totalMs: amount,
  }),
  requests: amount,
  wireBytes: amount,
  processes: z.array(
    z.object({
      name: z.string(),
      cpuSeconds: amount,
      idleCpuSeconds: amount.exactOptional(),
      pssBytes: amount,
      writtenBytes: amount,
    }),
  ),
  diskBytes: time,
  deviceBytes: time.exactOptional(),
  counters: z.record(z.string(), time).exactOptional(),
  requestTimes: z
    .array(
      z.object({
        startMs: time,
        endMs: time,
        bytes: amount,
        kind: z.enum(['manifest', 'config', 'index', 'window', 'layer', 'token', 'other']),
      }),
    )
    .exactOptional(),
});

const floor = z.object({
  image: z.string(),
  link: z.string(),
  roundTripMs: amount,
  bytesPerSecond: amount,
  controlRoundTrips: amount,
  neededBytes: amount,
  touchedBytes: amount,
  dependentMisses: amount,
  warmRunMs: amount,
  totalMs: amount,
});

const trace = z.object({
  snapshotter: z.string(),
  image: z.string(),
  link: z.string(),
  marks: z.array(z.object({ name: z.string(), atMs: time })),
  samples: z.array(
    z.object({
      atMs: time,
      cpuCores: amount,
      memoryBytes: amount,
      diskWriteBytesPerSecond: amount,
      networkBytesPerSecond: amount,
    }),
  ),
});

const schema = z.object({
  format: z.literal('dedup-snapshotter-bench/1'),
  startedAt: z.string(),
  seed: z.int(),
  machine: z.object({
    cores: amount,
    cpuModel: z.string(),
    memoryBytes: amount,
    kernel: z.string(),
    versions: z.record(z.string(), z.string()),
  }),
  images: z.array(image),
  links: z.array(link),
  snapshotters: z.array(z.string().min(1)),
  starts: z.array(start),
  floors: z.array(floor),
  resources: z.array(trace),
});

/** A result from the text of its file, called `name` in errors. Throws INVALID_ARGUMENT with what is wrong and where. */
export function parseResult(text: string, name: string): BenchResult {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new DedupError('INVALID_ARGUMENT', `${name} is not JSON`, { cause });
  }
  const parsed = schema.safeParse(value);
  if (!parsed.success) {
    throw new DedupError('INVALID_ARGUMENT', `${name} is no benchmark result: ${z.prettifyError(parsed.error)}`);
  }
  return parsed.data;
}
