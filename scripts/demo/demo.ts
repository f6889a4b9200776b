// The main job, shown: two real images on one base, pushed to a real registry, started cold by real containerd and runc,
// once with containerd's overlayfs and once with ours. Leaves a clean machine. Run by `make demo`.
import { readdirSync, readFileSync } from 'node:fs';
import { pssBytes } from '../../src/bench/process-use.ts';
import { isRoot } from '../../src/runtime.ts';
import { formatBytes } from '../../src/units.ts';
import { type ColdStart, coldStart, type Way } from '../../test/support/cold-start.ts';
import { TestContainerd } from '../../test/support/containerd.ts';
import { debianImages, NGINX_IMAGE, PYTHON_IMAGE } from '../../test/support/debian-images.ts';
import { pushLayout } from '../../test/support/images.ts';
import { Product } from '../../test/support/product.ts';
import { RegistryProcess } from '../../test/support/registry.ts';

const IMAGES = [
  { spec: PYTHON_IMAGE, command: ['python3', '-c', 'import json, re, subprocess; print("python is ready")'] },
  { spec: NGINX_IMAGE, command: ['nginx', '-V'] },
];

function say(text: string): void {
  process.stdout.write(`==> ${text}\n`);
}

/** Mounts, loop devices and processes that belong to this machine's state; compared before and after. */
function machineState(): string[] {
  const mounts = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => / - (erofs|fuse|overlay)/.test(line));
  const loops = readdirSync('/sys/block').filter((name) => name.startsWith('loop') && hasBacking(name));
  const processes = readdirSync('/proc').filter((name) => /^\d+$/.test(name) && isOurs(name));
  return [
    ...mounts.map((line) => `mount ${line}`),
    ...loops.map((name) => `loop device ${name}`),
    ...processes.map((pid) => `process ${pid}`),
  ];
}

function hasBacking(loop: string): boolean {
  try {
    return readFileSync(`/sys/block/${loop}/loop/backing_file`, 'utf8') !== '';
  } catch {
    return false; // The device is free.
  }
}

function isOurs(pid: string): boolean {
  try {
    return /dedupd|dedup-snapshotter\.js|docker-registry|containerd/.test(readFileSync(`/proc/${pid}/cmdline`, 'utf8'));
  } catch {
    return false; // It has ended.
  }
}

const seconds = (ms: number): string => `${(ms / 1000).toFixed(2)} s`;

function printTable(rows: readonly { image: string; way: Way; result: ColdStart }[]): void {
  const header = [
    'image',
    'snapshotter',
    'pull',
    'create',
    'first output',
    'total',
    'over the wire',
    'requests',
    'disk',
  ];
  const cells = rows.map(({ image, way, result }) => [
    image,
    way === 'dedup' ? 'dedup (ours)' : way,
    seconds(result.pullMs),
    seconds(result.createMs),
    seconds(result.firstOutputMs),
    seconds(result.totalMs),
    formatBytes(result.wireBytes),
    String(result.requests),
    formatBytes(result.diskBytes),
  ]);
  const widths = header.map((title, at) => Math.max(title.length, ...cells.map((row) => row[at]!.length)));
  for (const row of [header, widths.map((width) => '-'.repeat(width)), ...cells]) {
    process.stdout.write(
      `${row
        .map((text, at) => text.padEnd(widths[at]!))
        .join('  ')
        .trimEnd()}\n`,
    );
  }
}

if (!isRoot()) {
  process.stderr.write('demo: needs root: it mounts file systems and runs containers. Try: sudo make demo\n');
  process.exit(1);
}

const stateBefore = machineState();
const { dir, images } = await debianImages(
  IMAGES.map(({ spec }) => spec),
  say,
);
say('starting a registry on loopback');
const registry = await RegistryProcess.start();
const product = await Product.create({ log_level: 'info' });
let containerd: TestContainerd | undefined;
try {
  const rows: { image: string; way: Way; result: ColdStart }[] = [];
  for (const { spec } of IMAGES) {
    const plain = await pushLayout(dir, spec.tag, registry.host, spec.tag, 'plain');
    say(
      `pushed ${spec.tag}: ${formatBytes(images.get(spec.tag)!.layers.reduce((sum, layer) => sum + layer.size, 0))} in ${images.get(spec.tag)!.layers.length} layers; indexing it`,
    );
    await product.cli(['index', plain, '--annotate', `${registry.host}/${spec.tag}:lazy`]);
  }
  say('starting dedup-snapshotter and containerd');
  await product.start();
  containerd = await TestContainerd.start({ proxies: { dedup: product.address } });
  const setup = { containerd, registry, product };
  for (const way of ['overlayfs', 'dedup'] as const) {
    for (const { spec, command } of IMAGES) {
      say(`cold start of ${spec.tag} with ${way === 'dedup' ? 'dedup (ours)' : way}`);
      const tag = way === 'dedup' ? 'lazy' : 'plain';
      rows.push({
        image: spec.tag,
        way,
        result: await coldStart(setup, way, `${registry.host}/${spec.tag}:${tag}`, command),
      });
    }
  }
  process.stdout.write('\n');
  printTable(rows);
  const stats = await product.stats();
  const service = pssBytes(product.servicePid!);
  const daemon = pssBytes(await product.daemonPid());
  process.stdout.write(
    `\nThe second image of each way shares the base of the first: overlayfs fetches only its own layer, and ours only what\n` +
      `it reads and is not here yet. Our two processes take ${formatBytes(service + daemon)} of memory (PSS: ${formatBytes(service)} + ${formatBytes(daemon)}).\n` +
      `Lazy reads: ${formatBytes(stats.wire_bytes)} in ${stats.requests} requests for ${formatBytes(stats.span_bytes)} of touched spans.\n`,
  );
} finally {
  say('cleaning up');
  await containerd?.stop();
  await product.stop();
  await registry.stop();
}
const left = machineState().filter((thing) => !stateBefore.includes(thing));
if (left.length > 0) {
  process.stderr.write(`demo: left behind:\n  ${left.join('\n  ')}\n`);
  process.exitCode = 1;
} else say('nothing is left: no mounts, devices, processes or files');
