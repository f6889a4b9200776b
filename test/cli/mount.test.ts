// `mount` and `umount` without containerd and without the service: annotated images and images that have no index yet,
// what `images` says of them, what is left afterwards, and errors that say what to do.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { type CommandResult, mountsBelow, run, unmountBelow, waitFor } from '../support/containerd.ts';
import { FaultProxy } from '../support/fault-proxy.ts';
import { makeImage, pushLayout, type TestImage } from '../support/images.ts';
import { loopDevices, noise } from '../support/lazy-node.ts';
import { Product } from '../support/product.ts';
import { freePort, RegistryProcess } from '../support/registry.ts';

const BIG = 5 << 20;

interface Listing {
  readonly images: readonly {
    readonly path: string;
    readonly reference: string;
    readonly layers: readonly string[];
    readonly total_bytes: number;
    readonly present_bytes: number;
  }[];
  readonly stats: { readonly chunks: number };
}

const sha256 = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');

describe('mount and umount', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let product: Product;
  let image: TestImage;
  let plain: string;
  let lazy: string;
  let dir: string;

  before(async () => {
    registry = await RegistryProcess.start();
    proxy = await FaultProxy.start(`http://${registry.host}`);
    product = await Product.create();
    dir = await mkdtemp(join(tmpdir(), 'standalone-'));
    const layers = [
      {
        entries: [
          { name: 'etc/', type: 'dir' as const, mode: 0o755 },
          { name: 'etc/one', content: 'one', mode: 0o640 },
          { name: 'etc/gone', content: 'gone' },
        ],
      },
      {
        entries: [
          { name: 'big', content: noise(BIG, 'big') },
          { name: 'etc/.wh.gone', content: '' },
        ],
      },
    ];
    image = await makeImage({ layers, tag: 'plain' });
    await pushLayout(image.dir, 'plain', registry.host, 'app');
    plain = `${proxy.host}/app:plain`;
    lazy = `${proxy.host}/app:lazy`;
    await product.cli(['index', `${registry.host}/app:plain`, '--annotate', `${registry.host}/app:lazy`]);
  });

  after(async () => {
    if (dir !== undefined) await unmountBelow(dir);
    await product?.stop();
    await proxy?.stop();
    await registry?.stop();
    if (image !== undefined) await rm(image.dir, { recursive: true, force: true });
    if (dir !== undefined) await rm(dir, { recursive: true, force: true });
  });

  async function target(name: string): Promise<string> {
    const path = join(dir, name);
    await mkdir(path);
    return path;
  }

  async function images(): Promise<Listing> {
    return JSON.parse((await product.cli(['images', '--json'])).stdout) as Listing;
  }

  /** Not by this process: a read that misses waits for dedupd, and would hold one of libuv's threads. */
  async function assertWhole(path: string): Promise<void> {
    const { stdout } = await run('sha256sum', [join(path, 'big'), join(path, 'etc/one')]);
    assert.deepEqual(
      stdout.split('\n').map((line) => line.split(' ')[0]),
      [sha256(noise(BIG, 'big')), sha256(Buffer.from('one')), ''],
    );
    assert.deepEqual((await readdir(join(path, 'etc'))).toSorted(), ['one']);
    assert.equal((await stat(join(path, 'etc/one'))).mode & 0o777, 0o640);
  }

  function assertNothingMounted(): void {
    assert.deepEqual(mountsBelow(dir), []);
    assert.deepEqual(mountsBelow(product.dir), []);
    assert.deepEqual(
      loopDevices((file) => file.startsWith(product.dir)),
      [],
    );
  }

  async function refused(args: readonly string[]): Promise<CommandResult> {
    const result = await product.cli(args, { allowFailure: true });
    assert.equal(result.code, 1, args.join(' '));
    return result;
  }

  test('an annotated image: nothing of its layers is fetched until it is read, and then no more than that', async () => {
    const path = await target('lazy');
    proxy.reset();
    const { stdout } = await product.cli(['mount', lazy, path]);
    assert.equal(stdout, `${lazy} is mounted on ${path}\n`);
    for (const { digest } of image.layers) assert.equal(proxy.count({ path: new RegExp(digest) }).requests, 0);
    assert.deepEqual((await readdir(path)).toSorted(), ['big', 'etc']);

    const [shown] = (await images()).images;
    assert.equal(shown?.path, path);
    assert.equal(shown?.reference, lazy);
    assert.deepEqual(
      shown?.layers,
      image.layers.map(({ digest }) => digest),
    );
    assert.equal(shown?.present_bytes, 0);
    const table = (await product.cli(['images'])).stdout;
    assert.match(table, new RegExp(`2 +\\S+ \\S+ +0% +fuse +${path} +${lazy}`));

    await assertWhole(path);
    assert.equal((await images()).images[0]?.present_bytes, shown?.total_bytes);
    await assert.rejects(run('touch', [join(path, 'new')]), /Read-only file system/);
    await product.cli(['umount', path]);
    assertNothingMounted();
    assert.deepEqual((await images()).images, []);
    assert.deepEqual(await readdir(path), []);
  });

  test('an image without an index is read once to make one, and what was read stays', async () => {
    const path = await target('plain');
    const { stderr } = await product.cli(['mount', plain, path]);
    assert.match(stderr, /indexing layer 2 of 2 \(it has no index annotation\)/);
    proxy.reset();
    await assertWhole(path);
    const lazily = proxy.count({ path: /\/blobs\// }).bytes;
    await product.cli(['umount', path]);
    assertNothingMounted();
    proxy.reset();
    await product.cli(['mount', plain, path]);
    await assertWhole(path);
    const again = proxy.count({ path: /\/blobs\// }).bytes;
    assert.ok(again < 10_000, `${again} bytes fetched for an image that is here (${lazily} at its first reading)`);
    await product.cli(['umount', path]);
    assertNothingMounted();
  });

  test('an image without an index is refused where "index_trust" allows none made here', async () => {
    const path = await target('untrusted');
    await product.stopDaemon();
    await product.configure({ index_trust: ['annotation'] });
    const { stderr } = await refused(['mount', plain, path]);
    assert.match(stderr, /has no index, and "index_trust" allows none made here.*add "local"/s);
    await product.cli(['mount', lazy, path]);
    await assertWhole(path);
    await product.cli(['umount', path]);
    await product.stopDaemon();
    await product.configure({});
    assertNothingMounted();
  });

  test('a directory can show one image at a time, and one image can be shown on two', async () => {
    const [one, two] = [await target('one'), await target('two')];
    await product.cli(['mount', lazy, one]);
    await product.cli(['mount', lazy, two]);
    const { stderr } = await refused(['mount', lazy, one]);
    assert.match(stderr, /mounted on .*\/one already.*umount .*\/one/s);
    await product.cli(['umount', one]);
    await assertWhole(two);
    await product.cli(['umount', two]);
    assertNothingMounted();
  });

  test('of two mounts on one directory at once one is refused, and nothing stays', async () => {
    const path = await target('both');
    const results = await Promise.all(
      [lazy, lazy].map((reference) => product.cli(['mount', reference, path], { allowFailure: true })),
    );
    assert.deepEqual(results.map(({ code }) => code).sort(), [0, 1]);
    await assertWhole(path);
    await product.cli(['umount', path]);
    assertNothingMounted();
  });

  test('a directory in use is not taken away under its user', async () => {
    const path = await target('busy');
    await product.cli(['mount', lazy, path]);
    const { promise, resolve } = Promise.withResolvers<void>();
    const user = run('sh', ['-c', `exec sleep 30 < ${path}/etc/one`], { timeoutMs: 3_000, allowFailure: true });
    void user.then(() => resolve());
    await waitFor('it to be open', async () => (await run('fuser', ['-m', path], { allowFailure: true })).code === 0);
    const { stderr } = await refused(['umount', path]);
    assert.match(stderr, /Device or resource busy.*fuser -vm/s);
    await promise;
    await product.cli(['umount', path]);
    assertNothingMounted();
  });

  test('a mount that umount(8) took away is gone for dedupd too, and does not disturb its end', async () => {
    const path = await target('by-hand');
    await product.cli(['mount', lazy, path]);
    await run('umount', [path]);
    await product.cli(['umount', path]);
    assertNothingMounted();
    const other = await target('by-hand-2');
    await product.cli(['mount', lazy, path]);
    await product.cli(['mount', lazy, other]);
    await run('umount', [path]);
    await product.stopDaemon();
    assertNothingMounted();
  });

  test('mounts that a killed dedupd left are shown on by the next one, and belong to it', async () => {
    const path = await target('killed');
    await product.cli(['mount', lazy, path]);
    await product.stopDaemon('SIGKILL');
    assert.ok(mountsBelow(dir).includes(path));
    // Any verb that needs a daemon starts the next one.
    await product.cli(['mount', lazy, await target('after')]);
    await assertWhole(path);
    await assertWhole(join(dir, 'after'));
    assert.deepEqual([...new Set((await images()).images.map(({ reference }) => reference))], [lazy]);
    await product.cli(['umount', path]);
    assert.equal(mountsBelow(dir).includes(path), false);
    await product.cli(['umount', join(dir, 'after')]);
    // A container may use it, for all dedupd knows: it is unmounted when the service says so, or with dedupd.
    await product.stopDaemon();
    assertNothingMounted();
  });

  test('an orderly stop of dedupd takes its mounts with it', async () => {
    const path = await target('stopped');
    await product.cli(['mount', lazy, path]);
    await assertWhole(path);
    await product.stopDaemon();
    assertNothingMounted();
  });

  test('errors say what to do', async () => {
    const path = await target('errors');
    assert.match((await refused(['mount', 'Upper/Case', path])).stderr, /\[INVALID_REFERENCE\]\n.*lower case/);
    const missing = join(dir, 'not', 'there');
    assert.match((await refused(['mount', lazy, missing])).stderr, /no such directory.*\n.*mkdir -p/);
    const unknown = await refused(['mount', `${proxy.host}/app:unknown`, path]);
    assert.match(unknown.stderr, /app.*unknown.*\[REGISTRY_NOT_FOUND\]/s);
    assert.match((await refused(['umount', path])).stderr, /no image of ours is mounted on .*images/s);
    assert.match((await refused(['mount', '-u', 'alice', lazy, path])).stderr, /user:password/);
    assert.match((await refused(['mount', '--platform', 'linux/s390x', lazy, path])).stderr, /s390x/);
    const nobody = `127.0.0.1:${await freePort()}/app:1`;
    const down = await refused(['mount', nobody, path]);
    assert.match(down.stderr, /127\.0\.0\.1.*ECONNREFUSED.*\[REGISTRY_HTTP\]/s);
    assertNothingMounted();
    assert.equal((await readFile(join(product.dir, 'dedupd.log'), 'utf8')).includes('alice'), false);
  });
});
