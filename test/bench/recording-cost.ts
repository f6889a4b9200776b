// What recording a start costs: the reads of one (about 3,000 of up to 128 KiB, over an image of 3,000 files: as many parts of 64 KiB as the interpreter image touches) are noted, named and
// merged into a trace as dedupd does it, and the processor time is printed beside that of a whole start.
//   node test/bench/recording-cost.ts [--rounds 20]
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { median } from '../../src/bench/floor.ts';
import { digestOf } from '../../src/digest.ts';
import { buildLayerIndex } from '../../src/fs/index/builder.ts';
import { decodeLayerIndex } from '../../src/fs/index/format.ts';
import { LayerMap } from '../../src/fs/loadable-layer.ts';
import { SpanLedger } from '../../src/fs/span-ledger.ts';
import type { SeenRead } from '../../src/fs/transport/transport.ts';
import { filesOfChunks } from '../../src/prefetch/prefetch.ts';
import { Recorder, type RecorderOptions } from '../../src/prefetch/recorder.ts';
import { TraceStore } from '../../src/prefetch/trace-store.ts';
import { KiB, MiB, roundUp } from '../../src/units.ts';
import { layerOf, noise, quiet } from '../support/lazy-store.ts';

/** Processor time of dedupd for one start of the interpreter image with a trace (docs/measurements.md), milliseconds. */
const START_MS = 1_900;
const FILES = 3_000;
const READS = 3_000;

const { values } = parseArgs({ options: { rounds: { type: 'string', default: '20' } } });

const content = noise('files', 24 * KiB);
const layer = await layerOf(
  Array.from({ length: FILES }, (_, i) => ({
    name: `usr/lib/python3/dist-packages/package-${i % 300}/module-${i}.py`,
    content: Buffer.concat([Buffer.from(`${i}\n`), content.subarray(0, 2 * KiB + ((i * 977) % (20 * KiB)))]),
  })),
  { compression: 'gzip', chunkBytes: 4 * MiB, spanBytes: MiB },
);
async function* stream(): AsyncGenerator<Buffer> {
  yield layer.blob;
}
const { indexBlob } = await buildLayerIndex({
  stream: stream(),
  layerDigest: layer.id.digest,
  layerBytes: layer.id.size,
});
const { chunks } = layer.index;
const addresses = new Float64Array(chunks.count);
let next = MiB;
for (let i = 0; i < chunks.count; i++) {
  addresses[i] = next;
  next += roundUp(chunks.length[i]!, 4 * KiB);
}
const map = new LayerMap(1, {
  index: layer.index,
  addresses,
  windows: { readWindows: async () => [] },
  sources: () => [],
});

function reads(): SeenRead[] {
  return Array.from({ length: READS }, (_, i) => {
    const length = i % 3 === 0 ? 128 * KiB : 16 * KiB;
    const offset = MiB + (((i * 7_919) % READS) / READS) * (next - MiB - length);
    return { imageId: 1, offset: Math.floor(offset / 4096) * 4096, length, missed: i % 9 === 0, atMs: i };
  });
}

const directory = await mkdtemp(join(tmpdir(), 'recording-cost-'));
try {
  const [noting, saving]: [number[], number[]] = [[], []];
  for (let round = 0; round < Number(values.rounds); round++) {
    const traces = new TraceStore(join(directory, String(round % 2)));
    let pending = reads();
    const transport: RecorderOptions['transport'] = {
      capabilities: { seesHits: true } as RecorderOptions['transport']['capabilities'],
      watchReads: () => undefined,
      takeReads: () => pending.splice(0, 300),
    };
    const filesOf = async (_map: LayerMap, wanted: ReadonlySet<number>) =>
      filesOfChunks(decodeLayerIndex(indexBlob), layer.index.chunkBytes, wanted);
    const ledger = new SpanLedger();
    const recorder = new Recorder({ transport, ledger, traces, filesOf, log: quiet });
    const identity = { layers: [digestOf('layer')], repository: 'registry.example/app', tag: '1', manifest: '' };
    recorder.begin({ imageId: 1, identity, maps: [map] });
    const before = process.cpuUsage();
    while (pending.length > 0) await new Promise((resolve) => setTimeout(resolve, 50));
    const noted = process.cpuUsage(before);
    pending = [];
    await recorder.close();
    const all = process.cpuUsage(before);
    noting.push((noted.user + noted.system) / 1000);
    saving.push((all.user + all.system - noted.user - noted.system) / 1000);
  }
  const [note, save] = [median(noting), median(saving)];
  const share = (ms: number): string => `${((ms / START_MS) * 100).toFixed(1)} %`;
  process.stdout.write(
    `${READS} reads of ${FILES} files, ${values.rounds} starts: noting ${note.toFixed(1)} ms, naming and saving ${save.toFixed(1)} ms of processor time: ${share(note)} and ${share(save)} of a start's ${START_MS} ms\n`,
  );
} finally {
  await rm(directory, { recursive: true, force: true });
}
