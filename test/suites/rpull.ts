// What `rpull` promises whatever the snapshotter is: run with containerd's overlayfs, where every layer is ordinary, and
// with ours, where some are lazy. A real containerd, runc and registry; the verb runs as a process of its own.
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type CommandResult, type TestContainerd, waitFor } from '../support/containerd.ts';
import { FaultProxy } from '../support/fault-proxy.ts';
import { busyboxEntries, type LayerSource, makeImage, pushLayout, type TestImage } from '../support/images.ts';
import type { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

/** One containerd with the snapshotter under test. */
export interface RpullSystem {
  readonly containerd: TestContainerd;
  /** Its dedupd carries out the pulls; its service need not be the snapshotter. */
  readonly product: Product;
  readonly snapshotter: string;
  /** Annotations that make a layer lazily loadable; empty when none can be. */
  readonly lazyAnnotations: Readonly<Record<string, string>>;
  /** Told of the image when it has been pushed to `host`; answers the reference to pull if it is another one. */
  published?(image: TestImage, reference: string): Promise<string | undefined>;
  /** Snapshots that the snapshotter itself still has, whatever containerd thinks. */
  ownSnapshots(): Promise<string[]>;
  /** Ends and starts the snapshotter's own processes, if it has any. */
  restartSnapshotter?(): Promise<void>;
  stop(): Promise<void>;
}

const PROGRAM = join(import.meta.dirname, '..', '..', 'src', 'dedup-snapshotter.ts');
const BLOB = /\/blobs\/sha256:/;
const MIDDLE_BYTES = 3 << 20;

/** Bytes that no compression makes fewer, the same ones every time. */
function noise(bytes: number): Buffer {
  const out = Buffer.alloc(bytes);
  for (let at = 0, count = 0; at < bytes; at += 32, count++)
    createHash('sha256').update(String(count)).digest().copy(out, at);
  return out;
}

interface Pull {
  readonly child: ChildProcess;
  /** What it has said on stderr so far. */
  readonly said: () => string;
  readonly ended: Promise<CommandResult>;
}

function startPull(
  system: RpullSystem,
  reference: string,
  flags: readonly string[] = [],
  namespace = system.containerd.namespace,
): Pull {
  const { containerd, product, snapshotter } = system;
  const where = ['--address', containerd.address, '--namespace', namespace, '--snapshotter', snapshotter];
  const args = [PROGRAM, '--config', product.configFile, 'rpull', ...where, ...flags, reference];
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (data: Buffer) => (stdout += data));
  child.stderr.on('data', (data: Buffer) => (stderr += data));
  const ended = new Promise<CommandResult>((resolve) => {
    child.once('close', (code) => resolve({ code: code ?? -1, stdout, stderr }));
  });
  return { child, said: () => stderr, ended };
}

export function rpullSuite(title: string, start: () => Promise<RpullSystem>): void {
  describe(title, () => {
    let system: RpullSystem;
    let registry: RegistryProcess;
    let proxy: FaultProxy;
    let image: TestImage;
    let reference: string;
    let isLazy: boolean;

    before(async () => {
      registry = await RegistryProcess.start();
      proxy = await FaultProxy.start(`http://${registry.host}`);
      system = await start();
      isLazy = Object.keys(system.lazyAnnotations).length > 0;
      const annotations = system.lazyAnnotations;
      const layers: LayerSource[] = [
        { entries: await busyboxEntries(['sh', 'cat', 'sha256sum']), annotations },
        {
          entries: [
            { name: 'middle', content: noise(MIDDLE_BYTES) },
            { name: 'both', content: 'middle' },
          ],
        },
        {
          entries: [
            { name: 'top', content: 'top' },
            { name: 'both', content: 'top' },
          ],
          annotations,
        },
      ];
      image = await makeImage({ layers });
      reference = await pushLayout(image.dir, image.tag, registry.host, 'team/app', '1');
      // Pulled through the proxy, which counts and can be told to misbehave.
      reference = reference.replace(registry.host, proxy.host);
      reference = (await system.published?.(image, reference)) ?? reference;
    });

    after(async () => {
      await system?.stop();
      await proxy?.stop();
      await registry?.stop();
      if (image !== undefined) await rm(image.dir, { recursive: true });
    });

    async function pull(...flags: string[]): Promise<string> {
      const { code, stdout, stderr } = await startPull(system, reference, flags).ended;
      assert.equal(code, 0, stderr);
      return stdout;
    }

    async function runsRight(name: string): Promise<void> {
      const script = 'cat /top; cat /both; sha256sum /middle';
      const args = ['run', '--rm', '--snapshotter', system.snapshotter, reference, name, '/bin/sh', '-c', script];
      const { stdout } = await system.containerd.ctr(args);
      const sum = createHash('sha256').update(noise(MIDDLE_BYTES)).digest('hex');
      assert.equal(stdout, `toptop${sum}  /middle\n`);
    }

    async function removeImage(): Promise<void> {
      await system.containerd.ctr(['image', 'rm', '--sync', reference]);
    }

    const nothing = { content: [], ingests: [], snapshots: [], images: [], leases: [] };

    async function assertNothingLeft(namespace?: string): Promise<void> {
      assert.deepEqual(await system.containerd.inventory(system.snapshotter, namespace), nothing);
    }

    async function assertOwnNothing(): Promise<void> {
      await waitFor(
        'the snapshotter to have removed everything',
        async () => (await system.ownSnapshots()).length === 0,
        5_000,
      );
    }

    test('fetches only layers that are not lazy, and the image runs after a forced collection and a restart', async () => {
      proxy.reset();
      const summary = await pull();
      const fetched = image.layers.filter(
        ({ digest }) => proxy.count({ method: 'GET', path: new RegExp(digest) }).requests > 0,
      );
      const expected = isLazy ? [image.layers[1]] : image.layers;
      assert.deepEqual(
        fetched.map(({ digest }) => digest),
        expected.map((layer) => layer?.digest),
      );
      assert.match(summary, isLazy ? /3 layers: 2 lazy, 1 fetched/ : /3 layers: 0 lazy, 3 fetched/);
      await system.containerd.gc();
      await system.containerd.restart();
      await system.restartSnapshotter?.();
      await system.containerd.gc();
      await runsRight('after-restart');
      const { leases, ingests } = await system.containerd.inventory(system.snapshotter);
      assert.deepEqual({ leases, ingests }, { leases: [], ingests: [] });
    });

    test('keeps in the content store what describes the image, and nothing else', async () => {
      const { content } = await system.containerd.inventory(system.snapshotter);
      assert.deepEqual(content.toSorted(), [image.manifest.digest, image.config.digest].toSorted());
      const { stdout } = await system.containerd.ctr(['content', 'ls']);
      assert.match(
        stdout,
        new RegExp(`containerd.io/gc.ref.snapshot.${system.snapshotter}=${image.layers[2]?.chainId}`),
      );
      assert.match(stdout, /containerd.io\/distribution.source.127.0.0.1=team\/app/);
    });

    test('hands the snapshotter what it needs to load a layer', async () => {
      const bottom = image.layers[0];
      const { stdout } = await system.containerd.ctr([
        'snapshots',
        '--snapshotter',
        system.snapshotter,
        'info',
        bottom?.chainId ?? '',
      ]);
      const { Labels } = JSON.parse(stdout) as { Labels: Record<string, string> };
      assert.deepEqual(Labels, {
        ...system.lazyAnnotations,
        'containerd.io/snapshot.ref': bottom?.chainId,
        'containerd.io/snapshot/cri.image-ref': reference,
        'containerd.io/snapshot/cri.layer-digest': bottom?.digest,
        'containerd.io/snapshot/cri.manifest-digest': image.manifest.digest,
        'containerd.io/snapshot/cri.image-layers': image.layers.map(({ digest }) => digest).join(','),
      });
    });

    test('a second pull asks for no layer', async () => {
      proxy.reset();
      assert.match(await pull(), /3 already here/);
      assert.equal(proxy.count({ path: BLOB }).requests, 0);
      assert.ok(proxy.count({ path: /manifests/ }).requests >= 1);
    });

    test('removing the image leaves nothing', async () => {
      await removeImage();
      await assertNothingLeft();
      await assertOwnNothing();
    });

    /** A kill in the middle of a transfer must find one. */
    function stallMiddleLayer(): void {
      proxy.setRules({
        path: new RegExp(image.layers[1]?.digest ?? ''),
        fault: { kind: 'stall', ms: 300, afterBytes: MIDDLE_BYTES / 2 },
      });
    }

    test('killed at any point it leaves nothing a moment later: dedupd ends the pull', async () => {
      const points: [name: string, when: RegExp][] = [
        ['manifest', /manifest sha256/],
        ['fetching', /layer 2\/3 \S+: fetching/],
        ['unpacking', /layer 2\/3 \S+: unpacking/],
        ['unpacked', /layer 2\/3 \S+: unpacked/],
        ['last', /layer 3\/3/],
      ];
      stallMiddleLayer();
      let cut = 0;
      for (const [name, when] of points) {
        const namespace = `${system.containerd.namespace}-${name}`;
        const { child, said, ended } = startPull(system, reference, ['--lease-seconds', '600'], namespace);
        await waitFor(`rpull to say ${when}`, () => when.test(said()) || child.exitCode !== null);
        if (name === 'fetching') await sleep(150);
        child.kill('SIGKILL');
        // The last steps take hardly longer than the kill.
        const { code } = await ended;
        assert.ok(code === -1 || (code === 0 && name !== 'manifest' && name !== 'fetching'), `${name}: ${code}`);
        await waitFor('the pull to have ended', async () => {
          const { leases } = await system.containerd.inventory(system.snapshotter, namespace);
          return leases.length === 0;
        });
        const { images, ingests } = await system.containerd.inventory(system.snapshotter, namespace);
        // Killed after the record was made: the image is whole.
        for (const image of images) await system.containerd.ctr(['image', 'rm', '--sync', image], { namespace });
        if (images.length === 0) cut++;
        assert.deepEqual(ingests, []);
        await assertNothingLeft(namespace);
      }
      assert.ok(cut >= 2, `only ${cut} kills hit a pull under way`);
      proxy.reset();
      await assertOwnNothing();
    });

    test('when dedupd is killed the pull fails, and leaves nothing once its lease has run out', async () => {
      const points: [name: string, when: RegExp][] = [
        ['fetching', /layer 2\/3 \S+: fetching/],
        ['unpacked', /layer 2\/3 \S+: unpacked/],
      ];
      stallMiddleLayer();
      let leftovers = 0;
      for (const [name, when] of points) {
        const namespace = `${system.containerd.namespace}-dead-${name}`;
        const pid = await system.product.daemonPid();
        const { child, said, ended } = startPull(system, reference, ['--lease-seconds', '2'], namespace);
        await waitFor(`rpull to say ${when}`, () => when.test(said()) || child.exitCode !== null);
        process.kill(pid, 'SIGKILL');
        const { code, stderr } = await ended;
        const left = await system.containerd.inventory(system.snapshotter, namespace);
        if (left.leases.length > 0) {
          leftovers++;
          assert.equal(code, 1, name);
          assert.match(stderr, /UNAVAILABLE/);
        }
        await waitFor('the lease to run out', async () => {
          await system.containerd.gc();
          return (await system.containerd.inventory(system.snapshotter, namespace)).leases.length === 0;
        });
        for (const image of (await system.containerd.inventory(system.snapshotter, namespace)).images)
          await system.containerd.ctr(['image', 'rm', '--sync', image], { namespace });
        await assertNothingLeft(namespace);
        await waitFor('a new dedupd', () =>
          system.product.daemonPid().then(
            (now) => now !== pid,
            () => false,
          ),
        );
      }
      assert.ok(leftovers > 0, 'no kill hit a pull under way');
      proxy.reset();
      await assertOwnNothing();
    });

    test('a pull that takes longer than its leases is whole though collections run meanwhile', async () => {
      proxy.setRules({
        path: new RegExp(image.layers[1]?.digest ?? ''),
        fault: { kind: 'stall', ms: 3_500, afterBytes: MIDDLE_BYTES / 2 },
      });
      const { ended } = startPull(system, reference, ['--lease-seconds', '1.5']);
      let over = false;
      const result = ended.finally(() => {
        over = true;
      });
      let collections = 0;
      for (; !over; collections++) {
        await system.containerd.gc();
        await sleep(100);
      }
      const { code, stderr } = await result;
      assert.equal(code, 0, stderr);
      assert.ok(collections > 5);
      await system.containerd.gc();
      await runsRight('after-long-pull');
      await removeImage();
      await assertNothingLeft();
      proxy.reset();
    });

    test('several pulls of one image at once all succeed, and the image is whole', async () => {
      const pulls = [1, 2, 3].map(() => startPull(system, reference).ended);
      for (const { code, stderr } of await Promise.all(pulls)) assert.equal(code, 0, stderr);
      await system.containerd.gc();
      await runsRight('after-many-pulls');
      await removeImage();
      await assertNothingLeft();
      await assertOwnNothing();
    });

    test('interrupted it leaves nothing, at once', async () => {
      proxy.setRules({
        path: new RegExp(image.layers[1]?.digest ?? ''),
        fault: { kind: 'stall', ms: 5_000, afterBytes: MIDDLE_BYTES / 2 },
      });
      const { child, said, ended } = startPull(system, reference);
      await waitFor('the transfer', () => /layer 2\/3 \S+: fetching/.test(said()));
      child.kill('SIGINT');
      const { code, stderr } = await ended;
      assert.equal(code, 1);
      assert.match(stderr, /interrupted.*\[CANCELLED\]/);
      await assertNothingLeft();
      await assertOwnNothing();
      proxy.reset();
    });

    test('a layer that cannot be had leaves nothing, and the message says which', async () => {
      proxy.setRules({ path: new RegExp(image.layers[1]?.digest ?? ''), fault: { kind: 'status', status: 404 } });
      const { code, stderr } = await startPull(system, reference).ended;
      assert.equal(code, 1);
      assert.match(stderr, /layer 2 of 3 .*REGISTRY_NOT_FOUND/);
      await assertNothingLeft();
      await assertOwnNothing();
      proxy.reset();
    });
  });
}
