// `rpull` against a real containerd and registry: with containerd's own overlayfs, with our snapshots service over a data
// path that unpacks, and what only one of them can show.
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { hostPlatform } from '../../src/fs/registry/image-manifest.ts';
import type { ImageMounter, LayerKey, WaitingLayers } from '../../src/snapshotter/images.ts';
import { LABEL_IMAGE_LAYERS, LABEL_INDEX } from '../../src/snapshotter/labels.ts';
import { rpullSuite } from '../suites/rpull.ts';
import { type CommandResult, run, TestContainerd, waitFor } from '../support/containerd.ts';
import { FaultProxy } from '../support/fault-proxy.ts';
import {
  busyboxEntries,
  type ImageOptions,
  makeImage,
  makeImageIndex,
  pushImage,
  pushLayout,
  type TestImage,
} from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';
import { TestService } from '../support/snapshots-service.ts';

rpullSuite('rpull with overlayfs, where every layer is ordinary', async () => {
  const containerd = await TestContainerd.start({ extraConfig: ISOLATED });
  const product = await startProduct();
  const dir = join(containerd.root, 'io.containerd.snapshotter.v1.overlayfs', 'snapshots');
  return {
    containerd,
    product,
    snapshotter: 'overlayfs',
    lazyAnnotations: {},
    ownSnapshots: () => readdir(dir),
    stop: async () => {
      await containerd.stop();
      await product.stop();
    },
  };
});

/** Namespaces that do not take over each other's blobs: each has to be sent its own. */
const ISOLATED = '[plugins."io.containerd.metadata.v1.bolt"]\ncontent_sharing_policy = "isolated"';
const PROGRAM = join(import.meta.dirname, '..', '..', 'src', 'dedup-snapshotter.ts');
const SOME_INDEX = `sha256:${'5'.repeat(64)}`;

async function startProduct(): Promise<Product> {
  const product = await Product.create();
  await product.start();
  return product;
}

/** Layers with an index annotation are lazy; "mounted" means unpacked from the image's layout. */
class UnpackingMounter implements ImageMounter {
  readonly #dir: string;
  image: TestImage | undefined;
  #mounts = 0;

  constructor(dir: string) {
    this.#dir = dir;
  }

  async answers(): Promise<void> {}
  async prepareLayer({ layer }: { layer: LayerKey }): Promise<{ lazy: boolean; reason: string; layer: LayerKey }> {
    const lazy = layer.index === SOME_INDEX;
    return { lazy, reason: lazy ? '' : 'it has no index', layer };
  }
  async mountImage({ layers }: { layers: readonly LayerKey[] }): Promise<{ path: string; mountId: number }> {
    const path = join(this.#dir, String(++this.#mounts));
    await mkdir(path, { recursive: true });
    for (const { digest } of layers) {
      await run('tar', ['-xzf', join(this.image?.dir ?? '', 'blobs', 'sha256', digest.slice(7)), '-C', path]);
    }
    return { path, mountId: this.#mounts };
  }
  async releaseImages(): Promise<void> {}
  async retainLayers(): Promise<WaitingLayers> {
    return { waiting: 0, againMs: 0 };
  }
  async confirmLayer(): Promise<void> {}
  async layerUsage(): Promise<{ bytes: number; inodes: number }> {
    return { bytes: 4096, inodes: 1 };
  }
  async convertLayer(): Promise<LayerKey> {
    throw new Error('nobody asks for it');
  }
  async prebuildImage(): Promise<void> {}
}

rpullSuite('rpull with the snapshots service, where two of three layers are lazy', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'lazy-'));
  const mounter = new UnpackingMounter(dir);
  const service = await TestService.start({ images: mounter, cleanupDelayMs: 100 });
  const product = await startProduct();
  const containerd = await TestContainerd.start({ proxies: { dedup: service.address }, extraConfig: ISOLATED });
  return {
    containerd,
    product,
    snapshotter: 'dedup',
    lazyAnnotations: { [LABEL_INDEX]: SOME_INDEX },
    published: async (image) => {
      mounter.image = image;
      return undefined;
    },
    ownSnapshots: () => service.client.names(),
    restartSnapshotter: () => service.restart(),
    stop: async () => {
      await containerd.stop();
      await product.stop();
      await service.stop();
      await rm(dir, { recursive: true, force: true });
    },
  };
});

describe('rpull', () => {
  let registry: RegistryProcess;
  let containerd: TestContainerd;
  let product: Product;
  const layouts: string[] = [];

  before(async () => {
    registry = await RegistryProcess.start();
    product = await startProduct();
    containerd = await TestContainerd.start();
  });
  after(async () => {
    await containerd?.stop();
    await product?.stop();
    await registry?.stop();
    for (const dir of layouts) await rm(dir, { recursive: true });
  });

  async function image(options: ImageOptions): Promise<TestImage> {
    const made = await makeImage(options);
    if (!layouts.includes(made.dir)) layouts.push(made.dir);
    return made;
  }

  async function rpull(...args: string[]): Promise<CommandResult> {
    const where = ['--address', containerd.address, '--namespace', containerd.namespace, '--snapshotter', 'overlayfs'];
    const words = [PROGRAM, '--config', product.configFile, 'rpull', ...where, ...args];
    return await run(process.execPath, words, { allowFailure: true });
  }

  async function assertNothingLeft(): Promise<void> {
    const nothing = { content: [], ingests: [], snapshots: [], images: [], leases: [] };
    assert.deepEqual(await containerd.inventory('overlayfs'), nothing);
  }

  test('takes the image of an index that suits the platform, and leaves the others alone', async () => {
    const here = await image({ layers: [{ entries: await busyboxEntries(['sh', 'cat']) }], tag: 'here' });
    const there = await image({
      layers: [{ entries: [{ name: 'arm', content: 'arm' }] }],
      platform: { os: 'linux', architecture: 'arm64', variant: 'v8' },
      into: here.dir,
      tag: 'there',
    });
    const own = { os: 'linux', architecture: hostPlatform().architecture };
    const index = await makeImageIndex(here.dir, 'both', [
      { image: there, platform: { os: 'linux', architecture: 'arm64', variant: 'v8' } },
      { image: here, platform: own },
    ]);
    const reference = await pushLayout(here.dir, 'both', registry.host, 'multi');
    const pulled = await rpull(reference);
    assert.equal(pulled.code, 0, pulled.stderr);
    const content = async () => {
      await containerd.gc(); // blobs of unpacked layers go with the lease
      return (await containerd.inventory('overlayfs')).content.toSorted();
    };
    assert.deepEqual(await content(), [index.digest, here.manifest.digest, here.config.digest].toSorted());
    const { stdout } = await containerd.ctr([
      'run',
      '--rm',
      '--snapshotter',
      'overlayfs',
      reference,
      'multi',
      '/bin/sh',
      '-c',
      'echo ran',
    ]);
    assert.equal(stdout, 'ran\n');

    const other = await rpull('--platform', 'linux/arm64', reference);
    assert.equal(other.code, 0, other.stderr);
    const both = [index, here.manifest, here.config, there.manifest, there.config].map(({ digest }) => digest);
    assert.deepEqual(await content(), both.toSorted());

    const none = await rpull('--platform', 'linux/s390x', reference);
    assert.equal(none.code, 1);
    assert.match(none.stderr, /no image for linux\/s390x.*\n.*linux\/arm64\/v8/);
    await containerd.ctr(['image', 'rm', '--sync', reference]);
    await assertNothingLeft();
  });

  test('pulls images with Docker media types as they are', async () => {
    const docker = await image({ layers: [{ entries: await busyboxEntries(['sh', 'cat']) }], docker: true });
    const reference = await pushImage(docker, registry.host, 'docker');
    const pulled = await rpull(reference);
    assert.equal(pulled.code, 0, pulled.stderr);
    const { content } = await containerd.inventory('overlayfs');
    assert.ok(content.includes(docker.manifest.digest));
    const { stdout } = await containerd.ctr([
      'run',
      '--rm',
      '--snapshotter',
      'overlayfs',
      reference,
      'docker',
      '/bin/sh',
      '-c',
      'echo ran',
    ]);
    assert.equal(stdout, 'ran\n');
    await containerd.ctr(['image', 'rm', '--sync', reference]);
    await assertNothingLeft();
  });

  test('refuses a layer that unpacks to something else than the configuration names', async () => {
    const diffIds = [`sha256:${'0'.repeat(64)}`];
    const liar = await image({ layers: [{ entries: [{ name: 'a', content: 'a' }] }], diffIds });
    const { code, stderr } = await rpull(await pushLayout(liar.dir, 'latest', registry.host, 'liar'));
    assert.equal(code, 1);
    assert.match(stderr, /unpacks to sha256:[0-9a-f]{64}, but .*DIGEST_MISMATCH/);
    await assertNothingLeft();
  });

  test('names no more layers in a label than containerd takes', async () => {
    const layers = Array.from({ length: 60 }, (_, number) => ({
      entries: [{ name: `f${number}`, content: String(number) }],
    }));
    const deep = await image({ layers });
    const reference = await pushLayout(deep.dir, 'latest', registry.host, 'deep');
    const { code, stderr } = await rpull(reference);
    assert.equal(code, 0, stderr);
    const bottom = deep.layers[0]?.chainId ?? '';
    const { stdout } = await containerd.ctr(['snapshots', '--snapshotter', 'overlayfs', 'info', bottom]);
    const { Labels } = JSON.parse(stdout) as { Labels: Record<string, string> };
    const named = Labels[LABEL_IMAGE_LAYERS]?.split(',') ?? [];
    const digests = deep.layers.map(({ digest }) => digest);
    assert.ok(named.length > 50 && named.length < 60);
    assert.deepEqual(named, digests.slice(0, named.length));
    await containerd.ctr(['image', 'rm', '--sync', reference]);
    await assertNothingLeft();
  });

  test('when containerd ends in mid-pull it fails, and a later collection leaves nothing', async () => {
    await using proxy = await FaultProxy.start(`http://${registry.host}`);
    const big = await image({
      layers: [{ entries: [{ name: 'a', content: 'a'.repeat(100_000) }], compression: 'none' }],
    });
    const reference = await pushLayout(big.dir, 'latest', registry.host, 'big');
    proxy.setRules({
      path: new RegExp(big.layers[0]?.digest ?? ''),
      fault: { kind: 'stall', ms: 1_500, afterBytes: 50_000 },
    });
    const pull = rpull('--lease-seconds', '2', reference.replace(registry.host, proxy.host));
    await waitFor('the transfer', () => proxy.count({ path: new RegExp(big.layers[0]?.digest ?? '') }).bytes > 0);
    await containerd.down('SIGKILL');
    const { code, stderr } = await pull;
    assert.equal(code, 1);
    assert.match(stderr, /UNAVAILABLE/);
    await containerd.up();
    await waitFor('the lease to run out', async () => {
      await containerd.gc();
      return (await containerd.inventory('overlayfs')).leases.length === 0;
    });
    await assertNothingLeft();
  });

  test('says what to do when something is wrong', async () => {
    const cases: [string[], RegExp][] = [
      [['--address', '/nowhere.sock', 'x'], /is containerd running\?.*\/nowhere\.sock/],
      [['--platform', 'arm', 'x'], /linux\/arm64\/v8/],
      [['-u', 'alice', 'x'], /user:password/],
      [['--lease-seconds', 'soon', 'x'], /1 to 86400/],
      [['Upper/Case:1'], /lower/],
    ];
    for (const [args, expected] of cases) {
      const { code, stderr } = await rpull(...args);
      assert.equal(code, 1, args.join(' '));
      assert.match(stderr, expected);
    }
    // With no dedupd, and with one that is not wanted.
    for (const [config, expected] of [
      [{}, /UNAVAILABLE\]\n {2}start the service/],
      [{ enable_lazy: false }, /lazy loading is off: "enable_lazy" is false.*\n.*own client/],
      [{ enable_lasy: false }, /enable_lasy/],
    ] as const) {
      const idle = await Product.create(config);
      const words = [PROGRAM, '--config', idle.configFile, 'rpull', 'x'];
      const { code, stderr } = await run(process.execPath, words, { allowFailure: true });
      await idle.stop();
      assert.equal(code, 1);
      assert.match(stderr, expected);
    }
    const empty = await image({ layers: [{ entries: [{ name: 'a', content: 'a' }] }] });
    const reference = await pushLayout(empty.dir, 'latest', registry.host, 'plain');
    const { stderr } = await rpull('--snapshotter', 'missing', reference);
    assert.match(stderr, /proxy_plugins/);
    await assertNothingLeft();
  });
});
