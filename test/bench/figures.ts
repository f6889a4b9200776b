// Figures of docs/measurements.md beside cold starts (standard.ts): everything read, bytes on the wire, memory, and what
// many rounds leave behind. Real registry, containerd and runc on unthrottled loopback.
//   node test/bench/figures.ts [--pairs 10] [--rounds 50] [all|wire|memory…]
import { readdirSync, readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { cpuSeconds, pssBytes } from '../../src/bench/process-use.ts';
import { coldStart, dropCaches, forgetImage, type Way } from '../support/cold-start.ts';
import { run, TestContainerd } from '../support/containerd.ts';
import { debianImages, NGINX_IMAGE, PYTHON_IMAGE } from '../support/debian-images.ts';
import { pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

const { values, positionals } = parseArgs({
  options: { pairs: { type: 'string', default: '10' }, rounds: { type: 'string', default: '50' } },
  allowPositionals: true,
});
const PAIRS = Number(values.pairs);
const ROUNDS = Number(values.rounds);
const wanted = (section: string): boolean => positionals.length === 0 || positionals.includes(section);

const IMAGES = [
  { spec: PYTHON_IMAGE, command: ['python3', '-c', 'import json, re, subprocess; print("python is ready")'] },
  { spec: NGINX_IMAGE, command: ['nginx', '-V'] },
];

function quantile(sorted: readonly number[], q: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN;
}

/** "median (quartiles)" in seconds. */
function spread(ms: readonly number[]): string {
  const sorted = [...ms].sort((a, b) => a - b);
  const at = (q: number): string => (quantile(sorted, q) / 1000).toFixed(2);
  return `${at(0.5)} s (${at(0.25)}–${at(0.75)})`;
}

function say(text: string): void {
  process.stdout.write(`${text}\n`);
}

/** Descriptors of a process, mounts and busy loop devices: what may leak. */
function inventory(pids: readonly number[]): { descriptors: number; mounts: number; loops: number } {
  const descriptors = pids.reduce((sum, pid) => sum + readdirSync(`/proc/${pid}/fd`).length, 0);
  const mounts = readFileSync('/proc/self/mountinfo', 'utf8').split('\n').length;
  const loops = readdirSync('/sys/block').filter((name) => readdirSync(`/sys/block/${name}`).includes('loop')).length;
  return { descriptors, mounts, loops };
}

const MB = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;

const { dir, images } = await debianImages(
  IMAGES.map(({ spec }) => spec),
  say,
);
const registry = await RegistryProcess.start();
const product = await Product.create({ log_level: 'info' });
let containerd: TestContainerd | undefined;
try {
  for (const { spec } of IMAGES) {
    const plain = await pushLayout(dir, spec.tag, registry.host, spec.tag, 'plain');
    await product.cli(['index', plain, '--annotate', `${registry.host}/${spec.tag}:lazy`]);
  }
  await product.start();
  containerd = await TestContainerd.start({ proxies: { dedup: product.address }, lifetimeSeconds: 7200 });
  const setup = { containerd, registry, product };
  const reference = (tag: string, way: Way): string => `${registry.host}/${tag}:${way === 'dedup' ? 'lazy' : 'plain'}`;

  if (wanted('all')) {
    say(`\n## Everything read, cold: pull with overlayfs against rpull + reading every file (${PAIRS} pairs)\n`);
    say('| image | overlayfs download and unpack | ours: read everything | with rpull | ratio of medians |');
    say('| --- | --- | --- | --- | --- |');
    for (const { spec } of IMAGES) {
      const [pullMs, readMs, bothMs]: [number[], number[], number[]] = [[], [], []];
      for (let pair = 0; pair < PAIRS; pair++) {
        const plain = reference(spec.tag, 'overlayfs');
        dropCaches();
        let started = performance.now();
        await containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', plain]);
        pullMs.push(performance.now() - started);
        await forgetImage(containerd, plain);

        const lazy = reference(spec.tag, 'dedup');
        dropCaches();
        started = performance.now();
        await product.cli(['rpull', '-a', containerd.address, '-n', containerd.namespace, lazy]);
        const key = `read-${spec.tag}-${pair}`;
        const target = await containerd.scratch(key);
        const chain = images.get(spec.tag)!.layers.at(-1)!.chainId;
        const snapshots = ['snapshots', '--snapshotter', 'dedup'];
        await containerd.ctr([...snapshots, 'view', key, chain]);
        const { stdout } = await containerd.ctr([...snapshots, 'mounts', target, key]);
        await run('sh', ['-c', stdout]);
        const readStarted = performance.now();
        // Into a pipe: GNU tar does not read files when its output is /dev/null itself.
        await run('sh', ['-c', `tar cf - -C ${target} . | cat > /dev/null`], { timeoutMs: 300_000 });
        readMs.push(performance.now() - readStarted);
        bothMs.push(performance.now() - started);
        await run('umount', [target]);
        // A collection may have taken it: a view of ctr has no lease.
        await containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'rm', key], { allowFailure: true });
        await forgetImage(containerd, lazy);
      }
      const median = (of: number[]): number =>
        quantile(
          [...of].sort((a, b) => a - b),
          0.5,
        );
      say(
        `| ${spec.tag} | ${spread(pullMs)} | ${spread(readMs)} | ${spread(bothMs)} | ${(median(readMs) / median(pullMs)).toFixed(2)} (${(median(bothMs) / median(pullMs)).toFixed(2)} with rpull) |`,
      );
    }
  }

  if (wanted('wire')) {
    say("\n## Bytes on the wire for the demo's commands, and what the second image fetches\n");
    say(
      '| image | layer bytes | data fetched (with windows) | spans waited for | fetched ahead | ratio | control | present before |',
    );
    say('| --- | --- | --- | --- | --- | --- | --- | --- |');
    let before = await product.stats();
    for (const { spec, command } of IMAGES) {
      const present = before.present_bytes;
      await coldStart(setup, 'dedup', reference(spec.tag, 'dedup'), command);
      const after = await product.stats();
      const wire = after.wire_bytes - before.wire_bytes;
      const spans = after.span_bytes - before.span_bytes;
      const ahead = after.ahead_bytes - before.ahead_bytes;
      say(
        `| ${spec.tag} | ${MB(images.get(spec.tag)!.layers.reduce((sum, layer) => sum + layer.size, 0))} | ${MB(wire)} | ${MB(spans)} | ${MB(ahead)} | ` +
          `${(wire / spans).toFixed(3)} | ${MB(after.control_bytes - before.control_bytes)} | ${MB(present)} |`,
      );
      before = after;
    }
    const service = product.servicePid!;
    const daemon = await product.daemonPid();
    say(
      `\nPSS after it: dedup-snapshotter ${MB(pssBytes(service))}, dedupd ${MB(pssBytes(daemon))}, together ${MB(pssBytes(service) + pssBytes(daemon))}`,
    );
    for (const { spec } of IMAGES) await forgetImage(containerd, reference(spec.tag, 'dedup'));
  }

  if (wanted('memory')) {
    say(`\n## ${ROUNDS} rounds of pull, run, remove\n`);
    say('| round | PSS dedup-snapshotter | PSS dedupd | descriptors | mounts | loop devices | CPU s of both |');
    say('| --- | --- | --- | --- | --- | --- | --- |');
    const service = product.servicePid!;
    const daemon = await product.daemonPid();
    let first = 0;
    let last = 0;
    for (let round = 1; round <= ROUNDS; round++) {
      const { spec, command } = IMAGES[round % IMAGES.length]!;
      await coldStart(setup, 'dedup', reference(spec.tag, 'dedup'), command);
      await forgetImage(containerd, reference(spec.tag, 'dedup'));
      last = pssBytes(service) + pssBytes(daemon);
      if (round === 5) first = last;
      if (round === 1 || round % 5 === 0) {
        const { descriptors, mounts, loops } = inventory([service, daemon]);
        say(
          `| ${round} | ${MB(pssBytes(service))} | ${MB(pssBytes(daemon))} | ${descriptors} | ${mounts} | ${loops} | ${[service, daemon].reduce((sum, pid) => sum + cpuSeconds(pid, { children: false }), 0).toFixed(1)} |`,
        );
      }
    }
    say(`\ngrowth from round 5 to round ${ROUNDS}: ${MB(last - first)}`);
  }
} finally {
  await containerd?.stop();
  await product.stop();
  await registry.stop();
}
