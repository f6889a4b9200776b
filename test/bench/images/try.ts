// Starts benchmark images in a containerd of their own with overlayfs, without network, and says whether and when each
// was ready: proves that an image is what its specification says. Needs root; builds what is missing.
//   node test/bench/images/try.ts [NAME…] [--version 1|2]
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import type { Ready } from '../../../src/bench/result.ts';
import { run, TestContainerd } from '../../support/containerd.ts';
import { BENCH_IMAGES, type BuiltBenchImage, benchImages, type ImageVersion } from './bench-images.ts';

const READY_TIMEOUT_MS = 120_000;
const POLL_MS = 5;

/** True when a process of the network namespace of `pid` listens on the TCP port. Source: proc(5), net/tcp. */
function listens(pid: number, port: number): boolean {
  const wanted = `:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  return ['tcp', 'tcp6'].some((table) => {
    try {
      return readFileSync(`/proc/${pid}/net/${table}`, 'utf8')
        .split('\n')
        .map((line) => line.trim().split(/\s+/))
        .some((fields) => fields[1]?.endsWith(wanted) === true && fields[3] === '0A');
    } catch {
      return false; // not there yet, or there no more
    }
  });
}

/** Resolves when the container is ready; throws when it ends or the time is over before. */
async function untilReady(ready: Ready, child: ChildProcess, output: () => string, pid: () => Promise<number>) {
  const deadline = Date.now() + READY_TIMEOUT_MS;
  const pattern = ready.kind === 'line' ? new RegExp(ready.pattern, 'm') : undefined;
  for (let task = 0; ; await sleep(POLL_MS)) {
    const ended = child.exitCode !== null;
    if (ready.kind === 'exit' && child.exitCode === 0) return;
    if (pattern?.test(output()) === true) return;
    if (ready.kind === 'port' && !ended) {
      if (task === 0) task = await pid();
      if (task !== 0 && listens(task, ready.port)) return;
    }
    if (ended) throw new Error(`ended with ${child.exitCode} before it was ready:\n${output()}`);
    if (Date.now() > deadline) throw new Error(`not ready within ${READY_TIMEOUT_MS} ms:\n${output()}`);
  }
}

async function tryImage(containerd: TestContainerd, image: BuiltBenchImage): Promise<string> {
  const reference = `bench.test/images:${image.tag}`;
  const archive = join(containerd.dir, 'image.tar');
  await run('tar', ['-C', image.dir, '--exclude=./image.json', '-cf', archive, '.'], { timeoutMs: 300_000 });
  await containerd.ctr(['images', 'import', '--base-name', 'bench.test/images', archive], { timeoutMs: 600_000 });
  await run('rm', [archive]);
  const began = performance.now();
  const arguments_ = ['--address', containerd.address, '--namespace', containerd.namespace];
  const child = spawn('ctr', [...arguments_, 'run', '--rm', reference, image.tag], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text;
    });
  const ended = new Promise((resolve) => child.once('close', resolve));
  const pid = async () => {
    const tasks = await containerd.ctr(['tasks', 'ls'], { allowFailure: true });
    return Number(tasks.stdout.match(new RegExp(`^${image.tag}\\s+(\\d+)`, 'm'))?.[1] ?? 0);
  };
  try {
    await untilReady(image.spec.ready, child, () => output, pid);
    const readyMs = performance.now() - began;
    const last = output.trim().split('\n').at(-1) ?? '';
    return `${image.tag}: ready after ${readyMs.toFixed(0)} ms; ${last.slice(0, 160)}`;
  } finally {
    await containerd.ctr(['tasks', 'kill', '--all', '--signal', 'SIGKILL', image.tag], { allowFailure: true });
    await ended;
    await containerd.ctr(['images', 'rm', '--sync', reference], { timeoutMs: 120_000 });
  }
}

const { values, positionals } = parseArgs({ allowPositionals: true, options: { version: { type: 'string' } } });
const versions: ImageVersion[] = values.version === '1' || values.version === '2' ? [values.version] : ['1', '2'];
const names = positionals.length > 0 ? positionals : BENCH_IMAGES.map((spec) => spec.name);
const images = await benchImages(names, versions, (text) => console.log(text));
const containerd = await TestContainerd.start({ lifetimeSeconds: 1800 });
try {
  for (const image of images) {
    try {
      console.log(await tryImage(containerd, image));
    } catch (error) {
      console.log(`${image.tag}: FAILED ${error instanceof Error ? error.message : error}`);
      process.exitCode = 1;
    }
  }
} finally {
  await containerd.stop();
}
