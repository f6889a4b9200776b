// Measures the node store and the loader over a registry in memory: time to record a large layer, throughput of reading
// a gzip layer whole, and what a miss costs beside the network. Run: node test/bench/lazy-loader.ts [MiB of content]
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';
import { MiB } from '../../src/units.ts';
import { LoaderRig, layerOf, layerOfTar, MemoryBlobs, type StoredTestLayer } from '../support/lazy-store.ts';

const megabytes = Number(process.argv[2] ?? 128);

function quantile(values: readonly number[], q: number): string {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) * q)]!.toFixed(2);
}

/** Reads all of a layer as readahead would: ranges of 128 KiB in store order, `depth` at a time. */
async function readAll(rig: LoaderRig, stored: StoredTestLayer, depth: number, rangeBytes: number): Promise<number> {
  const { chunks } = stored.layer.index;
  const ends = new Map<number, number>();
  for (let i = 0; i < chunks.count; i++) {
    const address = stored.addresses[i]!;
    if (address > 0) ends.set(address, Math.ceil(chunks.length[i]! / 4096) * 4096);
  }
  const ranges: { offset: number; length: number }[] = [];
  for (const [offset, length] of [...ends].sort((a, b) => a[0] - b[0])) {
    const last = ranges.at(-1);
    if (last !== undefined && last.offset + last.length === offset && last.length + length <= rangeBytes)
      last.length += length;
    else
      for (let at = 0; at < length; at += rangeBytes)
        ranges.push({ offset: offset + at, length: Math.min(rangeBytes, length - at) });
  }
  let bytes = 0;
  let next = 0;
  const reader = async (): Promise<void> => {
    for (;;) {
      const range = ranges[next++];
      if (range === undefined) return;
      for (const part of await rig.loader.read(range, { layers: [stored.layerId] })) bytes += part.length;
    }
  };
  await Promise.all(Array.from({ length: depth }, reader));
  return bytes;
}

const dir = mkdtempSync(join(tmpdir(), 'dedup-bench-'));
try {
  // Real content: what this machine has below /usr, cut at the size asked for.
  const list = execFileSync('bash', [
    '-c',
    `find /usr/lib /usr/bin /usr/share -xdev -type f -size -20M -printf '%s %p\\n' 2>/dev/null | sort -k2 | awk -v max=${megabytes * MiB} '{s+=$1; if (s>max) exit; sub(/^[0-9]+ /,""); print}'`,
  ]);
  const tar = execFileSync('tar', ['-cf', '-', '--no-recursion', '--verbatim-files-from', '-T', '-'], {
    input: list,
    maxBuffer: 4096 * MiB,
    stdio: ['pipe', 'pipe', 'ignore'],
  });
  const layer = await layerOfTar(tar, []);
  let started = performance.now();
  gunzipSync(layer.blob);
  const gunzipMs = performance.now() - started;
  console.log(
    `layer: ${(tar.length / MiB).toFixed(0)} MiB tar, ${(layer.blob.length / MiB).toFixed(0)} MiB gzip, ${layer.index.chunks.count} chunks, ${layer.index.spans.count} spans; ` +
      `one zlib inflate of it: ${gunzipMs.toFixed(0)} ms (${(tar.length / MiB / (gunzipMs / 1000)).toFixed(0)} MiB/s)`,
  );

  for (const [depth, rangeBytes] of [
    [1, 128 * 1024],
    [8, 128 * 1024],
    [8, MiB],
  ] as const) {
    const registry = new MemoryBlobs(layer);
    const rig = await LoaderRig.create({}, {}, mkdtempSync(join(dir, 'root-')));
    const stored = await rig.add(layer, [{ host: 'one', reader: registry }]);
    const cpu = process.cpuUsage();
    started = performance.now();
    const bytes = await readAll(rig, stored, depth, rangeBytes);
    const ms = performance.now() - started;
    const used = process.cpuUsage(cpu);
    const stats = rig.loader.stats();
    console.log(
      `fill, ${depth} readers of ${rangeBytes / 1024} KiB: ${ms.toFixed(0)} ms, ${(bytes / MiB / (ms / 1000)).toFixed(0)} MiB/s, cpu ${((used.user + used.system) / 1000).toFixed(0)} ms, ` +
        `${registry.requests.length} requests, wire/spans ${(registry.bytes / stats.spanBytes).toFixed(3)}, rss ${(process.memoryUsage().rss / MiB).toFixed(0)} MiB`,
    );
    started = performance.now();
    await rig.node.store.flush();
    console.log(`  flush and record: ${(performance.now() - started).toFixed(0)} ms`);
    await rig.remove();
  }

  {
    const rig = await LoaderRig.create({}, {}, mkdtempSync(join(dir, 'root-')));
    const registry = new MemoryBlobs(layer);
    const { layerId, addresses } = await rig.add(layer, [{ host: 'one', reader: registry }]);
    const miss: number[] = [];
    const hit: number[] = [];
    const count = layer.index.chunks.count;
    for (let i = 0; i < 100; i++) {
      const chunk = Math.floor((i * count) / 100);
      if (addresses[chunk]! === 0) continue;
      const range = { offset: addresses[chunk]!, length: 4096 };
      const before = registry.requests.length;
      started = performance.now();
      await rig.loader.read(range, { layers: [layerId] });
      if (registry.requests.length > before) miss.push(performance.now() - started);
      started = performance.now();
      await rig.loader.read(range, { layers: [layerId] });
      hit.push(performance.now() - started);
    }
    console.log(
      `miss of 4 KiB (whole span fetched, inflated, verified, written): median ${quantile(miss, 0.5)} ms, p95 ${quantile(miss, 0.95)} ms, of ${miss.length}`,
    );
    console.log(`present 4 KiB through read(): median ${quantile(hit, 0.5)} ms`);
    await rig.remove();
  }

  {
    const many = Array.from({ length: 50_000 }, (_, i) => ({
      name: `${i}`,
      content: Buffer.from(`content of file ${i}`),
    }));
    const wide = await layerOf(many, { compression: 'none' });
    const rig = await LoaderRig.create({}, {}, mkdtempSync(join(dir, 'root-')));
    started = performance.now();
    await rig.add(wide, []);
    const first = performance.now() - started;
    const other = { ...wide, indexDigest: layer.indexDigest };
    started = performance.now();
    await rig.add(other, []);
    const second = performance.now() - started;
    started = performance.now();
    await rig.node.store.retainLayers([1]);
    console.log(
      `50,000 chunks: first layer ${first.toFixed(0)} ms, a second one with the same chunks ${second.toFixed(0)} ms, dropping it ${(performance.now() - started).toFixed(0)} ms`,
    );
    const size = readFileSync(rig.node.paths.indexDb).length;
    await rig.node.store.close();
    console.log(
      `index.db: ${(Math.max(size, readFileSync(rig.node.paths.indexDb).length) / 50_000).toFixed(0)} bytes a chunk`,
    );
    started = performance.now();
    await rig.node.open();
    console.log(`opening it: ${(performance.now() - started).toFixed(0)} ms`);
    await rig.remove();
  }
} finally {
  rmSync(dir, { recursive: true, force: true });
}
