// Bench: EROFS metadata for 100,000 entries. Wall clock and peak memory of the process that builds it, and where the
// time goes. Run: node test/bench/erofs-build.ts [entries]
import { openSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildImage } from '../../src/fs/image/build-image.ts';
import { writeImage } from '../../src/fs/image/erofs/writer.ts';
import { mergeLayers } from '../../src/fs/image/merge.ts';
import { decodeLayerIndex, encodeLayerIndex } from '../../src/fs/index/format.ts';
import { MiB } from '../../src/units.ts';
import { type EntrySpec, FakeStore, layerIndexOf, makeLayer } from '../support/layer-maker.ts';

const entries = Number(process.argv[2] ?? 100_000);
const dir = await mkdtemp(join(tmpdir(), 'erofs-bench-'));
try {
  const store = new FakeStore(join(dir, 'store'), 1024 * 1024 * MiB);
  // Shape of a Debian root file system: a directory per ten files, names of some fifteen bytes, three layers.
  const request: { index: string; addresses: Float64Array }[] = [];
  for (let layer = 0; layer < 3; layer++) {
    const specs: EntrySpec[] = [];
    const share = Math.floor(entries / 3);
    for (let i = 0; specs.length < share; i++) {
      const directory = `usr/lib/package-${layer}-${Math.floor(i / 100)}/module-${i % 100}`;
      if (i % 100 === 0) specs.push({ name: directory.slice(0, directory.lastIndexOf('/')) });
      specs.push({ name: directory });
      for (let f = 0; f < 8 && specs.length < share; f++)
        specs.push({ name: `${directory}/file-${f}-${i}.so`, content: `${layer}/${i}/${f}` });
      specs.push({ name: `${directory}/link-to-${i}`, link: `../file-${i}` });
    }
    const made = makeLayer(specs, store, { writeContent: false });
    const path = join(dir, `${layer}.index`);
    writeFileSync(path, encodeLayerIndex(layerIndexOf(made)));
    request.push({ index: path, addresses: made.addresses });
  }
  const output = join(dir, 'image');
  const layout = { kind: 'device', deviceBlocks: store.bytes / 4096 } as const;
  if (process.argv[3] === 'inline') {
    const started = performance.now();
    const layers = request.map(({ index, addresses }) => ({ ...decodeLayerIndex(readFileSync(index)), addresses }));
    const decoded = performance.now();
    const tree = mergeLayers(
      layers.map((layer) => layer.entries),
      { bottom: true },
    );
    const merged = performance.now();
    writeImage(openSync(output, 'w'), tree, layers, layout);
    const written = performance.now();
    console.log({ decodeMs: decoded - started, mergeMs: merged - decoded, writeMs: written - merged });
  }
  for (let round = 0; round < 3; round++) {
    const started = performance.now();
    const result = await buildImage({ layers: request, bottom: true, layout, output });
    const wallMs = Math.round(performance.now() - started);
    const callerPeakMiB = Math.round(Number(process.resourceUsage().maxRSS) / 1024);
    console.log({ ...result, wallMs, peakMiB: Math.round(result.peakBytes / MiB), callerPeakMiB });
  }
  store.close();
} finally {
  await rm(dir, { recursive: true, force: true });
}
