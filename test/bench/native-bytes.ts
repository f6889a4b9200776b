// How fast the native byte paths are: indexing a gzip layer, decoding spans of it, verifying and writing pieces.
// Usage: node test/bench/native-bytes.ts LAYER.tar.gz [DIR]; DIR (default: the temporary directory) holds the store file.
// The yardstick is node's own gunzip of the same bytes, in the same run, round by round.
import { createHash, randomFillSync } from 'node:crypto';
import { closeSync, constants, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';
import { native, type RestartPoint, type SpanJob } from '../../src/fs/native.ts';
import { GiB, KiB, MiB } from '../../src/units.ts';

const ROUNDS = 7;
const PUSH_BYTES = 256 * KiB;

function report(name: string, bytes: number, timesMs: number[]): void {
  const rates = timesMs.map((ms) => bytes / 1e3 / ms).sort((a, b) => a - b);
  const median = rates[Math.floor(rates.length / 2)]!.toFixed(0);
  console.log(`${name.padEnd(44)} ${median.padStart(6)} MB/s   (${rates[0]!.toFixed(0)}–${rates.at(-1)!.toFixed(0)})`);
}

async function timed(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

async function indexAll(gzip: Buffer): Promise<RestartPoint[]> {
  const indexer = native().gzipIndexer({ spanBytes: 1 * MiB });
  const points: RestartPoint[] = [];
  for (let at = 0; at < gzip.length; at += PUSH_BYTES) {
    points.push(...(await indexer.push(gzip.subarray(at, at + PUSH_BYTES))).points);
  }
  await indexer.finish();
  indexer.close();
  return points;
}

async function decodeAll(gzip: Buffer, points: RestartPoint[], plainBytes: number, perJob: number): Promise<void> {
  for (let i = 0; i < points.length; i += perJob) {
    const group = points.slice(i, i + perJob);
    const first = group[0]!.outOffset;
    const spans = group.map((point, k): SpanJob => {
      const end = points[i + k + 1]?.outOffset ?? plainBytes;
      const { bits, memberStart, window, inOffset, outOffset } = point;
      return {
        inputOffset: inOffset,
        bits,
        memberStart,
        window,
        outputOffset: outOffset - first,
        outputLength: end - outOffset,
      };
    });
    const outputLength = (points[i + perJob]?.outOffset ?? plainBytes) - first;
    await native().decodeSpans({ compression: 'gzip', input: gzip, spans, outputLength });
  }
}

async function storeAll(dir: string, totalBytes: number, pieceBytes: number, jobs: number): Promise<number> {
  const fd = openSync(
    join(dir, 'store'),
    constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC | constants.O_DIRECT,
  );
  const sumsFd = openSync(join(dir, 'sums'), constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC);
  try {
    ftruncateSync(fd, GiB);
    const presence = native().presenceCreate(GiB);
    const jobBytes = 8 * MiB;
    const source = randomFillSync(Buffer.alloc(jobBytes));
    const count = jobBytes / pieceBytes;
    const at = Float64Array.from({ length: count }, (_, i) => i * pieceBytes);
    const digests = Buffer.concat([...at].map((o) => sha256(source.subarray(o, o + pieceBytes))));
    const lengths = new Uint32Array(count).fill(pieceBytes);
    return await timed(async () => {
      for (let base = 0; base < totalBytes; base += jobBytes * jobs) {
        const running = Array.from({ length: jobs }, (_, k) => {
          const addresses = at.map((offset) => base + k * jobBytes + offset);
          return native().storePieces({ fd, sumsFd, source, offsets: at, lengths, digests, addresses, presence });
        });
        await Promise.all(running);
      }
    });
  } finally {
    closeSync(fd);
    closeSync(sumsFd);
  }
}

function sha256(bytes: Uint8Array): Buffer {
  return createHash('sha256').update(bytes).digest();
}

const [layer, parent = tmpdir()] = process.argv.slice(2);
if (layer === undefined) throw new Error('usage: node test/bench/native-bytes.ts LAYER.tar.gz [DIR]');
const gzip = readFileSync(layer);
const plainBytes = gunzipSync(gzip, { maxOutputLength: 2 * GiB }).length;
const times = new Map<string, number[]>();
const add = (name: string, ms: number) => times.set(name, [...(times.get(name) ?? []), ms]);
const points = await indexAll(gzip);
for (let round = 0; round < ROUNDS; round++) {
  add('node gunzipSync', await timed(async () => gunzipSync(gzip, { maxOutputLength: 2 * GiB, chunkSize: 256 * KiB })));
  add('gzipIndexer, 256 KiB a push', await timed(() => indexAll(gzip)));
  add('decodeSpans, 1 span a job (one thread)', await timed(() => decodeAll(gzip, points, plainBytes, 1)));
  add('decodeSpans, 16 spans a job (all threads)', await timed(() => decodeAll(gzip, points, plainBytes, 16)));
}
console.log(`${plainBytes} bytes, ${points.length} restart points, medians of ${ROUNDS} interleaved rounds`);
for (const [name, list] of times) report(name, plainBytes, list);

const dir = mkdtempSync(join(parent, 'bench-store-'));
try {
  const total = 256 * MiB;
  for (const [label, pieceBytes] of [
    ['8 KiB', 8 * KiB],
    ['1 MiB', MiB],
  ] as const) {
    for (const jobs of [1, 4]) {
      const list: number[] = [];
      for (let round = 0; round < ROUNDS; round++) list.push(await storeAll(dir, total, pieceBytes, jobs));
      report(`storePieces, ${label} pieces, ${jobs} at once`, total, list);
    }
  }
} finally {
  rmSync(dir, { recursive: true });
}
