// What a hit costs: reads through a direct-I/O loop device over the native FUSE session, beside the same reads through
// a direct-I/O loop device over the store file itself, which is what a direct mount does. Needs root and fio. Arguments:
// rounds (default 3), numbers of the session's threads (default 1,2,4).
import { execFileSync, spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { native } from '../../src/fs/native.ts';
import { BLOCK, HEAD, STORE, startFixture, TAIL } from '../native/fuse-fixture.ts';

interface Sample {
  readonly microseconds: number;
  readonly megabytesPerSecond: number;
}

const CASES = [
  ['randread', '4k', 1],
  ['randread', '4k', 4],
  ['randread', '128k', 1],
  ['randread', '128k', 4],
  ['randread', '1m', 1],
  ['randread', '1m', 4],
  ['read', '4k', 1],
  ['read', '128k', 1],
  ['read', '1m', 1],
] as const;

/** `once`: every block is read at most once. */
function fio(path: string, order: string, blockSize: string, jobs: number, once: boolean): Promise<Sample> {
  const args = ['--name=hits', `--filename=${path}`, '--readonly', '--direct=1', `--rw=${order}`, `--bs=${blockSize}`];
  args.push(
    `--numjobs=${jobs}`,
    '--ioengine=psync',
    '--runtime=1',
    ...(once ? [] : ['--time_based']),
    `--offset=${HEAD}`,
  );
  args.push(`--size=${STORE - HEAD - TAIL}`, '--group_reporting', '--output-format=json');
  return new Promise((resolve, reject) => {
    const child = spawn('fio', args, { stdio: ['ignore', 'pipe', 'inherit'] });
    let out = '';
    child.stdout.on('data', (chunk: Buffer) => {
      out += chunk.toString();
    });
    child.on('error', reject);
    child.on('close', (code) => {
      if (code !== 0) return reject(new Error(`fio ended with ${code}`));
      const { read } = JSON.parse(out.slice(out.indexOf('{'))).jobs[0];
      resolve({ microseconds: read.clat_ns.mean / 1e3, megabytesPerSecond: read.bw_bytes / 1e6 });
    });
  });
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!;
}

function show(samples: readonly Sample[]): string {
  const times = samples.map((sample) => sample.microseconds);
  const rates = samples.map((sample) => sample.megabytesPerSecond);
  const spread = `${Math.min(...times).toFixed(0)}-${Math.max(...times).toFixed(0)}`;
  return `${median(times).toFixed(1)} us (${spread}), ${median(rates).toFixed(0)} MB/s`.padEnd(40);
}

const rounds = Number(process.argv[2] ?? 3);
const threadCounts = (process.argv[3] ?? '1,2,4').split(',').map(Number);
const results = new Map<string, Sample[]>();
for (let round = 0; round < rounds; round++) {
  for (const threads of threadCounts) {
    const fixture = await startFixture({ threads });
    fixture.present(HEAD, STORE - HEAD - TAIL);
    const fd = openSync(fixture.storePath, 'r');
    const args = { fd, readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: BLOCK, autoclear: false };
    const local = await native().loopAttach({ ...args, name: 'yardstick' });
    closeSync(fd);
    try {
      for (const [order, blockSize, jobs] of CASES) {
        for (const [what, path] of [
          [`session, ${threads} threads`, fixture.device.path],
          ['store file itself', local.path],
        ] as const) {
          // The session reads through the page cache of the store, the device over the store does not.
          for (const cold of jobs === 1 ? [false, true] : [false]) {
            if (cold) execFileSync('dd', [`if=${fixture.storePath}`, 'iflag=nocache', 'count=0', 'status=none']);
            const key = `${order} ${blockSize} x ${jobs}${cold ? ', not in the page cache' : ''}: ${what}`;
            results.set(key, [...(results.get(key) ?? []), await fio(path, order, blockSize, jobs, cold)]);
          }
        }
      }
    } finally {
      await native().loopDetach(local.path);
      await fixture.close();
    }
  }
}
for (const [key, samples] of [...results].sort(([a], [b]) => a.localeCompare(b)))
  console.log(`${key.padEnd(60)} ${show(samples)}`);
