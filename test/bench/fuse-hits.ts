// What a hit costs: reads through a direct-I/O loop device over the native FUSE session, beside the same reads through
// a direct-I/O loop device over the store file itself. Needs root and fio. Argument: rounds (default 3).
import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { native } from '../../src/fs/native.ts';
import { BLOCK, HEAD, STORE, startFixture, TAIL } from '../native/fuse-fixture.ts';

interface Sample {
  readonly microseconds: number;
  readonly megabytesPerSecond: number;
}

const CASES = [
  ['4k', 1],
  ['4k', 4],
  ['128k', 1],
  ['128k', 4],
  ['1m', 1],
  ['1m', 4],
] as const;

function fio(path: string, blockSize: string, jobs: number): Promise<Sample> {
  const args = ['--name=hits', `--filename=${path}`, '--readonly', '--direct=1', '--rw=randread', `--bs=${blockSize}`];
  args.push(`--numjobs=${jobs}`, '--ioengine=psync', '--runtime=1', '--time_based', `--offset=${HEAD}`);
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
const results = new Map<string, Sample[]>();
for (let round = 0; round < rounds; round++) {
  for (const threads of [1, 2, 4]) {
    const fixture = await startFixture({ threads });
    fixture.present(HEAD, STORE - HEAD - TAIL);
    const fd = openSync(fixture.storePath, 'r');
    const args = { fd, readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: BLOCK, autoclear: false };
    const local = await native().loopAttach({ ...args, name: 'yardstick' });
    closeSync(fd);
    try {
      for (const [blockSize, jobs] of CASES) {
        for (const [what, path] of [
          [`session, ${threads} threads`, fixture.device.path],
          ['store file itself', local.path],
        ] as const) {
          const key = `${blockSize} x ${jobs} readers: ${what}`;
          results.set(key, [...(results.get(key) ?? []), await fio(path, blockSize, jobs)]);
        }
      }
    } finally {
      await native().loopDetach(local.path);
      await fixture.close();
    }
  }
}
for (const [key, samples] of [...results].sort(([a], [b]) => a.localeCompare(b)))
  console.log(`${key.padEnd(44)} ${show(samples)}`);
