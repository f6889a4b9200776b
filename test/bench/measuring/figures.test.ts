// Arithmetic and parsing between what is measured and what is reported.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { parsePeer, peer } from '../../../src/bench/contenders.ts';
import { controlRoundTrips, floorMs, median, tcpRoundTripMs } from '../../../src/bench/floor.ts';
import { requestKind } from '../../../src/bench/meter.ts';
import { splitCommand } from '../../../src/bench/node-commands.ts';
import { ProcessMeter, socketOwner } from '../../../src/bench/process-use.ts';
import { busySeconds, diskWrittenBytes } from '../../../src/bench/resources.ts';
import type { BenchResult, ColdStartResult } from '../../../src/bench/result.ts';
import { ResultFile } from '../../../src/bench/result-file.ts';

const TERMS = {
  image: 'i',
  link: 'l',
  roundTripMs: 20,
  bytesPerSecond: 1_000_000,
  controlRoundTrips: 3,
  neededBytes: 500_000,
  touchedBytes: 1,
  dependentMisses: 1,
  warmRunMs: 100,
};

test('the floor is control, the larger of bytes and misses, and the run', () => {
  assert.equal(floorMs(TERMS), 60 + 500 + 100);
  assert.equal(floorMs({ ...TERMS, neededBytes: 0 }), 60 + 20 + 100);
  assert.equal(controlRoundTrips({ tls: true }), controlRoundTrips({ tls: false }) + 1);
});

test('the median is of the sorted values', () => {
  assert.equal(median([9, 1, 2]), 2);
  assert.equal(median([4, 1, 2, 10]), 3);
});

test('a round trip is measured with real connections, a closed port is an error', async () => {
  const server = createServer((socket) => socket.destroy());
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  assert.ok(typeof address === 'object' && address !== null);
  assert.ok((await tcpRoundTripMs('127.0.0.1', address.port)) > 0);
  await new Promise((resolve) => server.close(resolve));
  await assert.rejects(tcpRoundTripMs('127.0.0.1', address.port), /ECONNREFUSED/);
});

test('requests are told apart by path and digest', () => {
  const [layer, config, other] = ['a', 'b', 'c'].map((hex) => `sha256:${hex.repeat(64)}`);
  const blobs = { layers: new Set([layer!]), configs: new Set([config!]) };
  assert.equal(requestKind('/v2/a/manifests/latest', blobs), 'manifest');
  assert.equal(requestKind(`/v2/a/blobs/${layer}`, blobs), 'layer');
  assert.equal(requestKind(`/v2/a/blobs/${config}`, blobs), 'config');
  assert.equal(requestKind(`/v2/a/blobs/${other}`, blobs), 'index');
  assert.equal(requestKind(`/v2/a/blobs/${other}`, { ...blobs, restarts: new Set([other!]) }), 'window');
  assert.equal(requestKind('/token?scope=x', blobs), 'token');
  assert.equal(requestKind('/v2/', blobs), 'other');
});

test('a peer is a name, a socket and a command with placeholders', async () => {
  assert.deepEqual(parsePeer('star=/run/s.sock'), { name: 'star', socket: '/run/s.sock', pullCommand: [] });
  const spec = parsePeer('star=/run/s.sock,tool -a {address} "{image}" --with {snapshotter},{namespace}');
  const node = {
    inside: ['in'],
    address: '/c.sock',
    namespace: 'n',
    pullFlags: ['--plain-http'],
    containerdRoot: '/c',
    containerd: () => Promise.resolve({ name: 'containerd', pid: process.pid }),
  };
  const image = { name: 'i', composition: '', compressedBytes: 1, uncompressedBytes: 1, layers: 1, command: [] };
  const target = {
    image: { ...image, ready: { kind: 'exit' } as const },
    plain: 'host/i:plain',
    lazy: 'host/i:lazy',
    blobs: { layers: new Set<string>(), configs: new Set<string>() },
  };
  const words = ['in', 'tool', '-a', '/c.sock', 'host/i:plain', '--with', 'star,n'];
  assert.deepEqual(peer(node, spec).pullCommand(target), words);
  const plain = peer(node, parsePeer('star=/run/s.sock')).pullCommand(target).join(' ');
  assert.match(plain, /^in ctr .* image pull --plain-http --snapshotter star host\/i:plain$/);
  assert.throws(() => parsePeer('star'), /NAME=SOCKET/);
});

test('command lines are split at spaces, not in quotes', () => {
  assert.deepEqual(splitCommand(` a  "b c" d'e f'g ""`), ['a', 'b c', 'de fg', '']);
  assert.throws(() => splitCommand('a "b'), /quote/);
});

test('whoever listens on a socket is found, and nobody where nobody does', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'owner-'));
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(join(dir, 's.sock'), resolve));
  try {
    assert.equal(socketOwner(join(dir, 's.sock')), process.pid);
    assert.equal(socketOwner(join(dir, 'none.sock')), undefined);
  } finally {
    server.close();
    rmSync(dir, { recursive: true, force: true });
  }
});

test('a process is charged with what it used since the beginning', () => {
  const meter = new ProcessMeter([{ name: 'me', pid: process.pid }]);
  const until = performance.now() + 100;
  let spun = 0;
  while (performance.now() < until) spun++;
  const [me, commands] = meter.use();
  assert.ok(spun > 0 && me !== undefined && me.cpuSeconds > 0 && me.cpuSeconds < 10);
  assert.ok(me.pssBytes > 1e6);
  assert.equal(commands?.name, 'commands');
});

test('counters of the machine are read by column', () => {
  assert.equal(busySeconds('cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 2 3'), 1.71);
  const diskstats = ' 254 0 vda 1 0 2 3 4 5 600 7 0 0 0\n 254 1 vda1 1 0 2 3 4 5 600 7 0 0 0\n';
  assert.equal(diskWrittenBytes(diskstats, new Set(['vda'])), 600 * 512);
});

test('a result file is complete after every start, and is continued by the run it belongs to', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'result-'));
  try {
    const fresh: BenchResult = {
      format: 'dedup-snapshotter-bench/1',
      startedAt: '2026-01-01T00:00:00Z',
      seed: 5,
      machine: { cores: 1, cpuModel: 'm', memoryBytes: 1, kernel: 'k', versions: {} },
      images: [],
      links: [],
      snapshotters: ['overlayfs', 'dedup'],
      starts: [],
      floors: [],
      resources: [],
    };
    const start: Omit<ColdStartResult, 'order'> = {
      snapshotter: 'dedup',
      image: 'i',
      link: 'l',
      pair: 0,
      phases: { pullMs: 1, createMs: 1, runMs: 1, totalMs: 3 },
      requests: 1,
      wireBytes: 1,
      processes: [],
      diskBytes: 0,
    };
    const path = join(dir, 'deep', 'result.json');
    await (await ResultFile.open(path, fresh, { resume: false })).addStart(start);
    const again = await ResultFile.open(path, fresh, { resume: true });
    assert.equal(again.has(start), true);
    assert.equal(again.has({ ...start, pair: 1 }), false);
    await again.addStart({ ...start, pair: 1 });
    assert.deepEqual(
      again.result.starts.map(({ order }) => order),
      [0, 1],
    );
    await assert.rejects(ResultFile.open(path, { ...fresh, seed: 6 }, { resume: true }), /of another run/);
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
});
