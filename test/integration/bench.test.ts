// The verb `bench` on a node with a real containerd, registry and the service: what it writes down must add up, and
// nothing may stay. Looks at no time but for its sums.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, rmdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { parseResult } from '../../src/bench/report/parse.ts';
import type { BenchResult, ColdStartResult } from '../../src/bench/result.ts';
import { TestContainerd } from '../support/containerd.ts';
import { busyboxEntries, makeImage, pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

const MIB = 1 << 20;
const NAMESPACE = 'dedup-bench';
const limit = { timeout: 300_000 };

let dir: string;
let registry: RegistryProcess;
let product: Product;
let containerd: TestContainerd;
let plain: string;
let lazy: string;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'bench-test-'));
  const data = (name: string, bytes: number) => ({ name, content: randomBytes(bytes) });
  const layers = [
    { entries: await busyboxEntries() },
    { entries: [data('needed', 2 * MIB), data('never-read', 12 * MIB)] },
  ];
  const image = await makeImage({ layers, into: join(dir, 'layout'), config: { Cmd: ['/bin/sh', '-c', 'exit 5'] } });
  registry = await RegistryProcess.start();
  plain = await pushLayout(image.dir, image.tag, registry.host, 'app', 'plain');
  lazy = `${registry.host}/app:lazy`;
  product = await Product.create();
  await product.cli(['index', plain, '--annotate', lazy]);
  await product.start();
  containerd = await TestContainerd.start({ proxies: { dedup: product.address } });
}, limit);

after(async () => {
  await containerd?.stop();
  await product?.stop();
  await registry?.stop();
  await rm(dir, { recursive: true, force: true });
  // runc and the kernel keep empty directories of a namespace.
  const places = ['/run/containerd/runc', '/sys/fs/cgroup'];
  for (const name of readdirSync('/sys/fs/cgroup')) places.push(join('/sys/fs/cgroup', name));
  for (const place of places) if (existsSync(join(place, NAMESPACE))) rmdirSync(join(place, NAMESPACE));
}, limit);

async function bench(...args: readonly string[]) {
  const node = ['--address', containerd.address, '--containerd-root', containerd.root];
  return await product.cli(['bench', ...node, ...args], { timeoutMs: 280_000, allowFailure: true });
}

const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);

function checkStart(start: ColdStartResult): void {
  const { pullMs, createMs, runMs, totalMs, controlMs } = start.phases;
  for (const value of [pullMs, createMs, runMs]) assert.ok(value > 0);
  assert.ok(Math.abs(pullMs + createMs + runMs - totalMs) < 0.01);
  assert.ok(controlMs !== undefined && controlMs > 0 && controlMs <= pullMs);
  const requests = start.requestTimes ?? [];
  assert.equal(start.requests, requests.length);
  assert.equal(start.wireBytes, sum(requests.map(({ bytes }) => bytes)));
  for (const { startMs, endMs } of requests) assert.ok(startMs >= 0 && startMs <= totalMs + 5 && endMs >= startMs);
  for (const kind of ['manifest', 'config', 'layer'] as const) {
    assert.ok(
      requests.some((request) => request.kind === kind),
      `${start.snapshotter} asked for no ${kind}`,
    );
  }
  assert.ok(start.diskBytes > 0);
  for (const { name, cpuSeconds, pssBytes } of start.processes) {
    assert.ok(cpuSeconds >= 0);
    assert.ok(name === 'commands' || pssBytes > MIB, `${name} has ${pssBytes} bytes`);
  }
}

describe('bench', () => {
  test('measures both snapshotters cold, with floor, resources and report, and leaves nothing', limit, async () => {
    const output = join(dir, 'results');
    const command = ['--', '/bin/sh', '-c', 'cat /needed > /dev/null; echo it is ready; exec sleep 600'];
    const options = ['--lazy-image', lazy, '--pairs', '2', '--seed', '11', '--output', output];
    const { code, stdout, stderr } = await bench(plain, ...options, '--ready-line', '^it is ready$', ...command);
    assert.equal(code, 0, stderr);
    const result: BenchResult = parseResult(readFileSync(join(output, 'result.json'), 'utf8'), 'result.json');
    assert.equal(result.seed, 11);
    assert.deepEqual(result.snapshotters, ['overlayfs', 'dedup']);
    assert.equal(result.starts.length, 4);
    result.starts.forEach(checkStart);
    const of = (name: string) => result.starts.filter(({ snapshotter }) => snapshotter === name);
    const image = result.images[0]!;
    for (const start of of('overlayfs')) {
      assert.ok(start.wireBytes >= image.compressedBytes);
      assert.deepEqual(
        start.processes.map(({ name }) => name),
        ['containerd', 'commands'],
      );
    }
    const [floor] = result.floors;
    assert.ok(floor !== undefined, stderr);
    for (const start of of('dedup')) {
      assert.ok(start.wireBytes < image.compressedBytes / 2, `${start.wireBytes} of ${image.compressedBytes} bytes`);
      assert.ok(floor.neededBytes <= start.wireBytes, `${floor.neededBytes} needed, ${start.wireBytes} fetched`);
      assert.deepEqual(
        start.processes.map(({ name }) => name),
        ['containerd', 'dedup-snapshotter', 'dedupd', 'commands'],
      );
      // The second of its starts is as cold as the first.
      assert.ok(start.requests >= 6);
    }
    // What the command reads, and what the shell is made of.
    assert.ok(floor.touchedBytes >= 2 * MIB && floor.touchedBytes < 5 * MIB, `${floor.touchedBytes} bytes touched`);
    assert.ok(floor.neededBytes >= 2 * MIB && floor.roundTripMs > 0 && floor.bytesPerSecond > 0 && floor.warmRunMs > 0);
    assert.ok(image.uncompressedBytes > 14 * MIB);
    assert.deepEqual(
      result.resources.map(({ snapshotter }) => snapshotter),
      ['overlayfs', 'dedup'],
    );
    for (const { samples, marks } of result.resources) {
      assert.ok(samples.length > 0);
      assert.deepEqual(
        marks.map(({ name }) => name),
        ['pull', 'create', 'ready'],
      );
    }
    assert.ok(stdout.endsWith(`${join(output, 'report.md')}\n`), stdout);
    assert.match(readFileSync(join(output, 'report.md'), 'utf8'), /overlayfs/);

    const namespaces = (await containerd.ctr(['namespaces', 'ls', '-q'])).stdout.split('\n');
    assert.equal(namespaces.includes(NAMESPACE), false);
    const { content, snapshots } = await containerd.inventory('dedup', NAMESPACE);
    assert.deepEqual([content, snapshots], [[], []]);

    // Nothing is left to do for the same run; one more pair is measured for a longer one.
    const longer = options.with(options.indexOf('--pairs') + 1, '3');
    const more = await bench(plain, ...longer, '--resume', '--ready-line', '^it is ready$', ...command);
    assert.equal(more.code, 0, more.stderr);
    assert.equal((more.stderr.match(/^\[\d\/2/gm) ?? []).length, 2, more.stderr);
  });

  test('a container that ends before it is ready is an error with its output, and leaves nothing', limit, async () => {
    const output = join(dir, 'failed');
    const args = ['--pairs', '1', '--output', output, '--ready-port', '80'];
    const { code, stderr } = await bench(lazy, ...args, '--', '/bin/sh', '-c', 'echo no port here; exit 4');
    assert.equal(code, 1);
    assert.match(stderr, /ended with 4 before it was ready: no port here/);
    const { content, snapshots } = await containerd.inventory('overlayfs', NAMESPACE);
    assert.deepEqual([content, snapshots], [[], []]);
  });

  test('what is missing is said before anything is measured', limit, async () => {
    const none = join(dir, 'none');
    const cases: [string[], RegExp][] = [
      [['--peer', 'nobody=/run/nobody.sock'], /containerd has no snapshotter nobody; it has .*overlayfs/],
      [['--peer', 'nobody'], /NAME=SOCKET/],
      [['--pairs', '0'], /--pairs "0" is not a number/],
      [['--ready-line', '('], /not a regular expression/],
      [['--ready-line', 'x', '--ready-port', '80'], /give one of/],
      [['--snapshotters', 'zfs'], /"zfs" is not overlayfs or dedup/],
    ];
    for (const [args, message] of cases) {
      const { code, stderr } = await bench(plain, '--output', none, ...args);
      assert.equal(code, 1);
      assert.match(stderr, message);
    }
    const away = await product.cli(['bench', '--address', join(dir, 'no.sock'), plain], { allowFailure: true });
    assert.match(away.stderr, /containerd does not answer on .*no\.sock/);
    assert.equal(existsSync(none), false);
  });
});
