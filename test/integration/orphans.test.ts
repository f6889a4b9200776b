// What a dedupd that was killed in the middle of something leaves — loop devices, a FUSE mount, files, directories — is
// gone once the next one has started; what is in use, or belongs to somebody else, is not touched. Real devices and mounts.
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync } from 'node:child_process';
import { closeSync, existsSync, openSync, readdirSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import Database from 'better-sqlite3';
import { parseConfig } from '../../src/config.ts';
import { DataPlane } from '../../src/fs/data-plane.ts';
import { MNT_DETACH, MS_RDONLY, native } from '../../src/fs/native.ts';
import { imageDevices } from '../../src/fs/transport/erofs-mount.ts';
import { createLogger } from '../../src/log.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { mountsBelow, run, unmountBelow, waitFor } from '../support/containerd.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { noise } from '../support/lazy-node.ts';
import { devicesOfStore, loopNames, storeIdOf } from '../support/loop-names.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

describe('a start beside what an earlier life of this root has left', () => {
  let dir: string;
  let paths: RootPaths;
  let runPaths: RunPaths;
  let storeId: string;
  let erofs: string;
  const attached = new Map<string, string>();

  /** dedupd's work, begun and ended in this process. */
  async function startAndStop(): Promise<void> {
    const plane = await DataPlane.open({
      config: parseConfig({ root: paths.root }),
      paths,
      run: runPaths,
      log: createLogger('test', { level: 'error', fd: 2 }),
    });
    await plane.close();
  }

  async function attach(name: string): Promise<string> {
    const fd = openSync(erofs, 'r');
    const rest = { readOnly: true, directIo: false, offset: 0, sizeLimit: 0, blockSize: 4096, autoclear: false };
    try {
      const { path } = await native().loopAttach({ fd, ...rest, name });
      attached.set(path, name);
      return path;
    } finally {
      closeSync(fd);
    }
  }

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'orphans-'));
    paths = new RootPaths(join(dir, 'root'));
    runPaths = new RunPaths(join(dir, 'run'));
    await mkdir(paths.root);
    await startAndStop();
    storeId = await storeIdOf(paths);
    erofs = join(dir, 'image.erofs');
    await mkdir(join(dir, 'tree'));
    await writeFile(join(dir, 'tree', 'mark'), 'in use');
    execFileSync('mkfs.erofs', ['--quiet', erofs, join(dir, 'tree')]);
  });
  after(async () => {
    await unmountBelow(dir);
    for (const [path, name] of attached)
      await native()
        .loopDetach(path, name)
        .catch(() => undefined);
    await rm(dir, { recursive: true, force: true });
  });

  test('its loop devices that nobody uses are detached, those in use go with their last user, others are left alone', async () => {
    const unused = [await attach(`dedup:6:${storeId}`), await attach(`dedup:6:${storeId}:m`)];
    const mounted = await attach(`dedup:7:${storeId}:m`);
    const target = join(dir, 'mounted');
    await mkdir(target);
    await native().mount({ source: mounted, target, fstype: 'erofs', flags: MS_RDONLY, data: '' });
    const opened = await attach(`dedup:8:${storeId}`);
    const holder = openSync(opened, 'r');
    const otherStore = `${storeId.slice(0, -1)}${storeId.endsWith('0') ? '1' : '0'}`;
    const foreign = [
      await attach(`dedup:6:${otherStore}`),
      await attach(`dedup:6:${otherStore}:m`),
      await attach(`x:dedup:6:${storeId}`),
      await attach(erofs),
    ];
    await startAndStop();
    let names = await loopNames();
    for (const path of unused) assert.notEqual(names.get(path), attached.get(path), `${path} is gone`);
    for (const path of [mounted, opened, ...foreign]) assert.equal(names.get(path), attached.get(path));
    assert.equal(await readFile(join(target, 'mark'), 'utf8'), 'in use');

    await native().umount(target, 0);
    closeSync(holder);
    names = await loopNames();
    for (const path of [mounted, opened]) assert.notEqual(names.get(path), attached.get(path), `${path} is gone`);
    for (const path of foreign) {
      const device = path.slice('/dev/'.length);
      assert.equal(readFileSync(`/sys/block/${device}/loop/autoclear`, 'utf8').trim(), '0', 'nobody asked it to go');
      await native().loopDetach(path, attached.get(path));
    }
  });

  test('a FUSE session that was never hidden is detached, one in another place and another file system are not', async () => {
    const other = join(dir, 'other-fuse');
    const below = join(runPaths.dir, 'tmpfs');
    for (const target of [other, below]) await mkdir(target, { recursive: true });
    await native().mount({ source: 'tmpfs', target: below, fstype: 'tmpfs', flags: 0, data: '' });
    // Twice where ours was: two dedupds ended there.
    for (const target of [runPaths.fuseMount, runPaths.fuseMount, other]) {
      const fd = openSync('/dev/fuse', 'r+');
      const data = `fd=${fd},rootmode=40000,user_id=0,group_id=0`;
      await native().mount({ source: 'dedup', target, fstype: 'fuse.dedup', flags: MS_RDONLY, data });
      closeSync(fd);
    }
    assert.throws(() => readdirSync(runPaths.fuseMount), { code: 'ENOTCONN' });
    // And one while it ended the session of a third.
    await mkdir(runPaths.fuseControl);
    await native().mount({ source: 'none', target: runPaths.fuseControl, fstype: 'fusectl', flags: 0, data: '' });
    await startAndStop();
    assert.deepEqual(mountsBelow(dir).sort(), [other, below].sort());
    assert.deepEqual(readdirSync(runPaths.fuseMount), []);
    for (const target of [other, below]) await native().umount(target, MNT_DETACH);
  });

  test('half-written files, files without a row and directories of mounts go; names that are not ours stay', async () => {
    const digest = 'a'.repeat(64);
    const gone = [
      `${paths.imageMetadata(7)}.tmp-4711`,
      paths.imageMetadata(99),
      join(paths.layers, `${digest}.index.4711.0.tmp`),
      join(paths.layers, `${digest}.restart.4711.12.tmp`),
      join(paths.layers, `${digest}.index`),
      `${runPaths.standaloneMounts}.tmp-4711`,
    ];
    const kept = [
      join(paths.images, 'notes.txt'),
      join(paths.images, 'image.erofs'),
      join(paths.layers, 'notes.tmp'),
      join(paths.mounts, 'notes'),
      join(paths.mounts, '78', 'file'),
      join(runPaths.dir, 'another.json.tmp-4711'),
    ];
    for (const file of [...gone, ...kept]) {
      await mkdir(dirname(file), { recursive: true });
      await writeFile(file, 'x');
    }
    await mkdir(paths.mountPoint(77), { recursive: true });
    await startAndStop();
    assert.deepEqual(gone.filter(existsSync), []);
    assert.deepEqual(kept.filter(existsSync), kept);
    assert.equal(existsSync(paths.mountPoint(77)), false);
  });
});

describe('a dedupd that is killed while it mounts', () => {
  const IMAGES = 8;
  const KILLS = 4;
  let registry: RegistryProcess;
  let product: Product;
  let daemon: ChildProcess | undefined;
  const layouts: string[] = [];
  const references: string[] = [];

  async function endDaemon(signal: NodeJS.Signals): Promise<void> {
    const child = daemon;
    if (child === undefined) return;
    daemon = undefined;
    child.kill(signal);
    await waitFor('dedupd to end', () => child.exitCode !== null || child.signalCode !== null);
  }

  before(async () => {
    registry = await RegistryProcess.start();
    product = await Product.create();
    for (let i = 0; i < IMAGES; i++) {
      const image = await makeImage({ layers: [{ entries: [{ name: 'mark', content: noise(5000, `image ${i}`) }] }] });
      layouts.push(image.dir);
      references.push(await pushLayout(image.dir, image.tag, registry.host, `killed/${i}`));
      await mkdir(directory(i), { recursive: true });
    }
  });
  after(async () => {
    await endDaemon('SIGTERM');
    await product?.stop();
    await registry?.stop();
    for (const layout of layouts) await rm(layout, { recursive: true, force: true });
  });

  const directory = (i: number): string => join(product.dir, 'shown', String(i));

  /** Mounts image `i`; false when dedupd was killed meanwhile. */
  async function show(i: number): Promise<boolean> {
    const request = { reference: references[i]!, directory: directory(i), platform: '', credentials: '' };
    try {
      for await (const { done } of product.client.mountReference(request)) if (done) return true;
    } catch {
      // Whether it was killed is what the caller looks at.
    }
    return false;
  }

  test('the next one has two devices for every mounted image and no other, and what it took over can be read', async () => {
    daemon = await product.startDaemon();
    const paths = new RootPaths(product.root);
    const storeId = await storeIdOf(paths);
    const hideAll = async (): Promise<void> => {
      for (let i = 0; i < IMAGES; i++) await product.client.unmountReference(directory(i)).catch(() => undefined);
    };
    const hide = async (): Promise<void> => {
      await hideAll();
      await waitFor('devices to go', async () => (await devicesOfStore(storeId)).length === 0);
    };
    // Indexes are made and images built once: later rounds only mount.
    for (let i = 0; i < IMAGES; i++) assert.ok(await show(i));
    await hide();

    const rows = (): unknown[] => {
      const db = new Database(paths.indexDb, { readonly: true });
      try {
        return db.prepare('SELECT mount_id FROM direct_mounts ORDER BY 1').pluck().all();
      } finally {
        db.close();
      }
    };
    /** Images that are read from the store itself: every one of these is here completely. */
    const direct = async (): Promise<number[]> => {
      const devices = (await imageDevices(storeId)).filter((device) => device.direct);
      return devices.map(({ imageId }) => imageId).sort((a, b) => a - b);
    };

    let kills = 0;
    let rowsLeft = 0;
    for (let round = 0; round < 10 * KILLS && kills < KILLS; round++) {
      const showing = Promise.all(references.map((_, i) => show(i)));
      const wanted = 1 + (round % (2 * IMAGES - 1));
      const deadline = performance.now() + 20_000;
      // Without a pause: a mount takes a few milliseconds.
      while ((await devicesOfStore(storeId)).length < wanted && performance.now() < deadline) await setImmediate();
      await endDaemon('SIGKILL');
      await showing;
      // A device too many, or one over a mount that would stay for ever: it was killed in the middle of a mount.
      const left = await devicesOfStore(storeId);
      const stays = left.filter(
        (path) => readFileSync(`/sys/block/${path.slice(5)}/loop/autoclear`, 'utf8').trim() === '0',
      );
      if (stays.length > 0) kills++;
      const before = rows();
      rowsLeft += before.length;
      for (const id of await direct()) assert.ok(before.includes(id), 'no device reads the store without a row');

      daemon = await product.startDaemon();
      assert.deepEqual(rows(), await direct());
      const mounted = mountsBelow(paths.mounts);
      assert.equal((await devicesOfStore(storeId)).length, 2 * mounted.length);
      for (let i = 0; i < IMAGES; i++) {
        if (!mountsBelow(product.dir).includes(directory(i))) continue;
        assert.equal((await run('sha256sum', [join(directory(i), 'mark')])).code, 0);
      }
      // What was taken over stays mounted until it is known that no snapshot shows it either.
      await hideAll();
      await product.client.releaseImages([]);
      await product.client.retainLayers([]);
      assert.deepEqual(await devicesOfStore(storeId), []);
      assert.deepEqual(mountsBelow(paths.mounts), []);
      assert.deepEqual(rows(), []);
      for (let i = 0; i < IMAGES; i++) assert.ok(await show(i), `image ${i} can be mounted again`);
      await hide();
    }
    assert.ok(rowsLeft > 0, 'no kill left a row');
    assert.ok(kills > 0, 'no kill left devices which nothing but the next start takes away');
  });
});
