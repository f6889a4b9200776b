// The emulated link does what its profile says, measured with independent means: ping, transfers of real TCP, counters.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { run, TestContainerd, waitFor } from '../support/containerd.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { FILE_BYTES, noiseSum, smallLayers } from '../support/lazy-node.ts';
import { CONTINENT, type Inside, LAN, Link, missingForLink, OVERSEAS, PROFILES, REGION } from '../support/link/link.ts';
import { type Transfer, transfer, transferDigest } from '../support/link/transfer.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

const missing = missingForLink();

function inside(prefix: Inside, command: readonly string[], timeoutMs = 30_000) {
  return run(prefix[0], [...prefix.slice(1), ...command], { timeoutMs });
}

/** Round trips in milliseconds, sorted. */
async function ping(link: Link, count: number): Promise<number[]> {
  const { stdout } = await inside(link.near, ['ping', '-i', '0.01', '-c', String(count), link.farAddress]);
  return [...stdout.matchAll(/time=([\d.]+) ms/g)].map(([, ms]) => Number(ms)).sort((a, b) => a - b);
}

/** The machine may be busy with something else once, but not each time. */
async function bestOf(attempts: number, enough: (result: Transfer) => boolean, attempt: () => Promise<Transfer>) {
  let best = await attempt();
  for (let i = 1; i < attempts && !enough(best); i++) {
    const next = await attempt();
    if (next.bitsPerSecond > best.bitsPerSecond) best = next;
  }
  return best;
}

/** A small image with indexes in a registry's files, put there without a link. */
async function publish(): Promise<{ readonly storageDir: string; readonly dir: string }> {
  const { dir } = await makeImage({ layers: await smallLayers('link') });
  const storageDir = await mkdtemp(join(tmpdir(), 'link-storage-'));
  await using registry = await RegistryProcess.start({ storageDir });
  const product = await Product.create();
  try {
    const pushed = await pushLayout(dir, 'latest', registry.host, 'small', 'plain');
    await product.cli(['index', pushed, '--annotate', `${registry.host}/small:lazy`]);
  } finally {
    await product.stop();
  }
  return { storageDir, dir };
}

describe('the emulated link', { skip: missing === undefined ? false : `missing: ${missing}`, timeout: 120_000 }, () => {
  for (const profile of PROFILES) {
    test(`has a round trip of ${profile.roundTripMs} ms`, async () => {
      await using link = await Link.start(profile);
      const times = await ping(link, 20);
      assert.equal(times.length, 20);
      assert.ok(times[0]! >= profile.roundTripMs, `one took only ${times[0]} ms`);
      assert.ok(times[10]! <= profile.roundTripMs + 3, `median ${times[10]} ms`);
    });
  }

  for (const [profile, bytes, share] of [
    [CONTINENT, 25e6, 0.85],
    [REGION, 150e6, 0.7],
  ] as const) {
    test(`carries its rate and no more: ${profile.name}`, async () => {
      await using link = await Link.start(profile);
      const wanted = profile.bitsPerSecond * share;
      const best = await bestOf(
        3,
        ({ bitsPerSecond }) => bitsPerSecond >= wanted,
        () => transfer(link, bytes),
      );
      assert.equal(best.sha256, transferDigest(bytes));
      assert.ok(best.bitsPerSecond >= wanted, `${best.bitsPerSecond / 1e6} Mbit/s`);
      const { up, down } = await link.counters();
      assert.equal(up.refused + down.refused, 0);
      assert.ok(down.bytes >= bytes * 1.05, 'headers and framing of every packet are counted');
      // Slow start is in this, so it holds whatever the second half says.
      assert.ok(best.durationMs >= (bytes * 8 * 1000) / profile.bitsPerSecond + profile.roundTripMs);
    });
  }

  test('loses as many packets as it says, one by one, and TCP repairs it', async () => {
    await using link = await Link.start({ ...LAN, lossRate: 0.02 });
    const { sha256 } = await transfer(link, 10e6);
    assert.equal(sha256, transferDigest(10e6));
    const { down } = await link.counters();
    const all = down.packets + down.lost;
    assert.ok(all >= 10e6 / 1500, `${all} packets`);
    // Five standard deviations of 6,900 coins.
    assert.ok(Math.abs(down.lost / all - 0.02) < 0.0085, `${down.lost} of ${all} packets lost`);
    assert.equal(down.dropped, 0);
  });

  test('drops what its queue does not hold', async () => {
    await using link = await Link.start({ ...CONTINENT, queueBytes: 50_000 });
    const { sha256 } = await transfer(link, 3e6);
    assert.equal(sha256, transferDigest(3e6));
    const { down } = await link.counters();
    assert.ok(down.dropped > 0);
    assert.equal(down.lost, 0);
  });

  test('holds everything during a stall and delivers it unharmed after it', async () => {
    await using link = await Link.start(CONTINENT);
    await link.stall(1000);
    const stalledMs = performance.now();
    assert.equal((await transfer(link, 5e6)).sha256, transferDigest(5e6));
    assert.ok(performance.now() - stalledMs >= 1000);
    // In the middle of a transfer, where packets are under way.
    const running = transfer(link, 10e6);
    const received = async () => (await link.counters()).down.bytes;
    const before = await received();
    while ((await received()) < before + 2e6);
    const againMs = performance.now();
    await link.stall(500);
    const bytes = [await received(), await received()];
    if (performance.now() - againMs < 500) assert.equal(bytes[0], bytes[1]);
    assert.equal((await running).sha256, transferDigest(10e6));
    assert.ok(performance.now() - againMs >= 500);
  });

  test('changes while it runs', async () => {
    await using link = await Link.start(OVERSEAS);
    assert.ok((await ping(link, 5))[0]! >= 100);
    await link.set(LAN);
    const times = await ping(link, 20);
    assert.ok(times[0]! >= 1 && times[10]! < 50, `round trips from ${times[0]} ms, median ${times[10]} ms`);
    await link.set({ ...LAN, up: { lossRate: 1 } });
    await assert.rejects(inside(link.near, ['ping', '-c', '1', '-W', '1', link.farAddress]), /100% packet loss/);
    await assert.rejects(link.set({ ...LAN, bitsPerSecond: 0 }), /refused/);
  });

  test('stopped, leaves no namespace and says so to who goes on', async () => {
    const link = await Link.start(LAN);
    await link.stop();
    await link.stop();
    await assert.rejects(inside(link.near, ['true']), /No such file/);
    await assert.rejects(link.counters(), /ended/);
  });

  test('ends when whoever started it is killed', async () => {
    const program = `
      const { LAN, Link } = await import(${JSON.stringify(join(import.meta.dirname, '../support/link/link.ts'))});
      console.log((await Link.start(LAN)).pid);`;
    const owner = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const [line] = (await once(owner.stdout, 'data')) as [Buffer];
    const linkDir = `/proc/${Number(line.toString())}/fd`;
    assert.ok(existsSync(linkDir));
    owner.kill('SIGKILL');
    await waitFor('the link to end', () => !existsSync(linkDir) || readdirSync(linkDir).length === 0);
  });

  test('carries a lazy start: registry at the far end, containerd and the product at the near one', async () => {
    await using link = await Link.start(REGION);
    const { storageDir, dir } = await publish();
    await using registry = await RegistryProcess.start({
      storageDir,
      inside: link.far,
      address: link.farAddress,
      port: 80,
    });
    const config = { insecure_registries: [registry.host] };
    const product = await Product.create(config, { inside: link.near });
    let containerd: TestContainerd | undefined;
    try {
      await product.start();
      containerd = await TestContainerd.start({ proxies: { dedup: product.address }, inside: link.near });
      const before = (await link.counters()).down.bytes;
      const reference = `${registry.host}/small:lazy`;
      await product.cli(['rpull', '-a', containerd.address, '-n', containerd.namespace, reference]);
      const args = ['run', '--rm', '--snapshotter', 'dedup', reference, 'c1', '/bin/sh', '-c', 'sha256sum /cold'];
      const { stdout } = await containerd.ctr(args);
      assert.equal(stdout, noiseSum(FILE_BYTES, 'cold link', '/cold'));
      const lazily = (await link.counters()).down.bytes - before;
      assert.ok(lazily >= FILE_BYTES && lazily < 2 * FILE_BYTES, `${lazily} bytes for one file of ${FILE_BYTES}`);
      await containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference]);
      assert.ok((await link.counters()).down.bytes - before - lazily > 2 * FILE_BYTES);
    } finally {
      await containerd?.stop();
      await product.stop();
      await registry.stop();
      for (const path of [dir, storageDir]) await rm(path, { recursive: true, force: true });
    }
  });
});
