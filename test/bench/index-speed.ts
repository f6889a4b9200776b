// How fast an index is built, beside the floor: zlib's bare inflate and node's gunzip of the same layer, in turns, each in
// a process of its own. Usage: node test/bench/index-speed.ts [DIRECTORY] [ROUNDS]
import { execFile, execFileSync } from 'node:child_process';
import { createReadStream, mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { createGunzip } from 'node:zlib';
import { type Digest, parseDigest } from '../../src/digest.ts';
import { buildLayerIndex } from '../../src/fs/index/builder.ts';
import { decodeLayerIndex } from '../../src/fs/index/format.ts';
import { native } from '../../src/fs/native.ts';
import { KiB, MiB } from '../../src/units.ts';

const run = promisify(execFile);
const self = fileURLToPath(import.meta.url);

interface Measured {
  readonly wallMs: number;
  readonly cpuMs: number;
  readonly tarBytes: number;
  readonly peakRssMiB: number;
  readonly [more: string]: number;
}

async function build(file: string, digest: Digest): Promise<Record<string, number>> {
  const layerBytes = statSync(file).size;
  const stream = createReadStream(file, { highWaterMark: 64 * KiB });
  const built = await buildLayerIndex({ stream, layerDigest: digest, layerBytes });
  const started = performance.now();
  decodeLayerIndex(built.indexBlob);
  const decodeMs = performance.now() - started;
  return {
    tarBytes: built.index.tarBytes,
    entries: built.index.entries.count,
    chunks: built.index.chunks.count,
    spans: built.index.spans.count,
    indexPercent: (100 * built.indexBlob.length) / layerBytes,
    framingPercent: (100 * built.index.restart.framingLength) / layerBytes,
    restartPercent: (100 * built.restartBlob.length) / layerBytes,
    decodeMs,
  };
}

/** The addon's inflater with no points but the first: bare zlib on a thread of its own. */
async function inflate(file: string): Promise<Record<string, number>> {
  const indexer = native().gzipIndexer({ spanBytes: 2 ** 50 });
  let tarBytes = 0;
  for await (const part of createReadStream(file, { highWaterMark: 128 * KiB })) {
    tarBytes += (await indexer.push(part as Buffer)).output.length;
  }
  await indexer.finish();
  indexer.close();
  return { tarBytes };
}

async function gunzip(file: string): Promise<Record<string, number>> {
  let tarBytes = 0;
  const stream = createReadStream(file).pipe(createGunzip({ chunkSize: 256 * KiB }));
  for await (const part of stream) tarBytes += (part as Buffer).length;
  return { tarBytes };
}

async function measure(kind: string, file: string, digest: string): Promise<void> {
  const cpu = process.cpuUsage();
  const started = performance.now();
  const result =
    kind === 'build'
      ? await build(file, parseDigest(digest))
      : kind === 'inflate'
        ? await inflate(file)
        : await gunzip(file);
  const wallMs = performance.now() - started - (result.decodeMs ?? 0);
  const { user, system } = process.cpuUsage(cpu);
  const peakRssMiB = process.resourceUsage().maxRSS / 1024;
  process.stdout.write(JSON.stringify({ ...result, wallMs, cpuMs: (user + system) / 1000, peakRssMiB }));
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;
}

async function main(directory: string, rounds: number): Promise<void> {
  const dir = mkdtempSync(join(tmpdir(), 'index-speed-'));
  try {
    const file = join(dir, 'layer.tgz');
    execFileSync('sh', ['-c', 'tar -C "$1" --sort=name -cf - . 2>/dev/null | gzip -6 > "$2"', 'sh', directory, file]);
    const digest = `sha256:${execFileSync('sha256sum', [file]).toString().slice(0, 64)}`;
    const kinds = ['inflate', 'build', 'gunzip'] as const;
    const results: Record<string, Measured[]> = { inflate: [], build: [], gunzip: [] };
    for (let round = 0; round < rounds; round++) {
      for (const kind of kinds) {
        const { stdout } = await run(process.execPath, [self, '--one', kind, file, digest]);
        results[kind]!.push(JSON.parse(stdout) as Measured);
      }
    }
    const rate = (kind: string): number =>
      median(results[kind]!.map(({ tarBytes, wallMs }) => tarBytes / MiB / (wallMs / 1000)));
    const ratios = results.build!.map(({ wallMs }, round) => results.inflate![round]!.wallMs / wallMs);
    const one = results.build![0]!;
    process.stdout.write(
      `${directory}: layer ${(statSync(file).size / MiB).toFixed(1)} MiB, tar ${(one.tarBytes / MiB).toFixed(1)} MiB, `,
    );
    process.stdout.write(`${one.entries} entries, ${one.chunks} chunks, ${one.spans} spans\n`);
    for (const kind of kinds) {
      const all = results[kind]!;
      process.stdout.write(
        `  ${kind.padEnd(8)} ${rate(kind).toFixed(0).padStart(5)} MiB/s  CPU ${median(all.map(({ cpuMs }) => cpuMs)).toFixed(0)} ms  ` +
          `peak ${median(all.map(({ peakRssMiB }) => peakRssMiB)).toFixed(0)} MiB\n`,
      );
    }
    process.stdout.write(
      `  build / inflate: median ${(100 * median(ratios)).toFixed(0)} % of its speed (${ratios.map((r) => (100 * r).toFixed(0)).join(', ')})\n` +
        `  index ${one.indexPercent!.toFixed(2)} %, framing ${one.framingPercent!.toFixed(2)} %, restart blob ${one.restartPercent!.toFixed(2)} % of the layer; decoded in ${median(results.build!.map(({ decodeMs }) => decodeMs!)).toFixed(0)} ms\n`,
    );
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

const [first, kind, file, digest] = process.argv.slice(2);
if (first === '--one') await measure(kind!, file!, digest!);
else await main(first ?? '/usr/share', Number(kind ?? 5));
