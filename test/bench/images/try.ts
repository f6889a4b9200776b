// Starts benchmark images in a containerd of their own with overlayfs, without network, and says whether and when each
// was ready: proves that an image is what its specification says. Needs root; builds what is missing.
//   node test/bench/images/try.ts [NAME…] [--version 1|2]
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { waitReady } from '../../../src/bench/ready.ts';
import { run, TestContainerd } from '../../support/containerd.ts';
import { BENCH_IMAGES, type BuiltBenchImage, benchImages, type ImageVersion } from './bench-images.ts';

const READY_TIMEOUT_MS = 120_000;

async function tryImage(containerd: TestContainerd, image: BuiltBenchImage): Promise<string> {
  const reference = `bench.test/images:${image.tag}`;
  const archive = join(containerd.dir, 'image.tar');
  await run('tar', ['-C', image.dir, '--exclude=./image.json', '-cf', archive, '.'], { timeoutMs: 300_000 });
  await containerd.ctr(['images', 'import', '--base-name', 'bench.test/images', archive], { timeoutMs: 600_000 });
  await run('rm', [archive]);
  const pidFile = join(containerd.dir, `${image.tag}.pid`);
  const node = ['--address', containerd.address, '--namespace', containerd.namespace];
  const beganMs = performance.now();
  const child = spawn('ctr', [...node, 'run', '--rm', '--pid-file', pidFile, reference, image.tag], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text;
    });
  const ended = new Promise((resolve) => child.once('close', resolve));
  try {
    const readyMs = await waitReady(image.spec.ready, { child, pidFile, timeoutMs: READY_TIMEOUT_MS });
    const last = output.trim().split('\n').at(-1) ?? '';
    return `${image.tag}: ready ${(readyMs - beganMs).toFixed(0)} ms after ctr run; ${last.slice(0, 160)}`;
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
