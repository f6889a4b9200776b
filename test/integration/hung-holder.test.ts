// A dedupd that was killed while a thread of it waited for its own FUSE session, and therefore hangs with the root's lock and
// the devices of mounted images: the next one ends it, takes the devices over, and their readers go on. Started by hand and
// by the service.
import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { mkdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { RootPaths } from '../../src/paths.ts';
import { type CommandResult, run, waitFor } from '../support/containerd.ts';
import { HungHolder } from '../support/hung-holder.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { noise } from '../support/lazy-node.ts';
import { devicesOfStore, storeIdOf } from '../support/loop-names.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

const FILES = 4;
const BYTES = 300_000;

describe('a dedupd that was killed and hangs', () => {
  let registry: RegistryProcess;
  let product: Product;
  let daemon: ChildProcess | undefined;
  let layout: string;
  let shown: string;
  let storeId: string;
  let hung: HungHolder | undefined;

  async function killDaemon(): Promise<void> {
    const child = daemon!;
    daemon = undefined;
    child.kill('SIGKILL');
    await waitFor('dedupd to end', () => child.signalCode !== null);
  }

  /** A stand-in takes lock and devices, is killed, and hangs; a read of an image waits for it. */
  async function hangWithDevices(file: number): Promise<{ reading: Promise<CommandResult> }> {
    hung = await HungHolder.start({ root: product.root, runDir: product.runDir, wait: 'change', storeId });
    const reading = run('cat', [join(shown, String(file))], { allowFailure: true, timeoutMs: 60_000 });
    await hung.hang();
    return { reading };
  }

  async function assertReads(file: number): Promise<void> {
    const bytes = await readFile(join(shown, String(file)));
    assert.ok(bytes.equals(noise(BYTES, `file ${file}`)), `file ${file}`);
  }

  async function logged(file: string): Promise<string> {
    return await readFile(file, 'utf8');
  }

  before(async () => {
    registry = await RegistryProcess.start();
    // Read by the kernel alone, the image would not notice anything.
    product = await Product.create({ direct_mounts: false });
    shown = join(product.dir, 'shown');
    await mkdir(shown);
    const entries = Array.from({ length: FILES }, (_, i) => ({ name: String(i), content: noise(BYTES, `file ${i}`) }));
    const image = await makeImage({ layers: [{ entries }] });
    layout = image.dir;
    const reference = await pushLayout(layout, image.tag, registry.host, 'hung/app');
    daemon = await product.startDaemon();
    storeId = await storeIdOf(new RootPaths(product.root));
    const request = { reference, directory: shown, platform: '', credentials: '' };
    for await (const _ of product.client.mountReference(request));
    await assertReads(0);
  });
  after(async () => {
    await hung?.close();
    daemon?.kill('SIGTERM');
    await product?.stop();
    await registry?.stop();
    if (layout !== undefined) await rm(layout, { recursive: true, force: true });
  });

  test('is ended by one that is started by hand, which takes its devices over', async () => {
    await killDaemon();
    const { reading } = await hangWithDevices(1);
    daemon = await product.startDaemon();
    await hung!.ended();
    assert.notEqual((await reading).code, 0, 'what waited for the one that hung gets EIO');
    for (const file of [0, 1, 2]) await assertReads(file);
    assert.match(await logged(product.logFile), /waits for its own FUSE session: the connection was aborted/);
  });

  test('is ended by one that the service starts, which takes its devices over', async (t) => {
    await killDaemon();
    await hangWithDevices(3);
    const begun = performance.now();
    await product.start();
    await waitFor('dedupd', () => product.daemonPid().then(Boolean, () => false), 30_000);
    await hung!.ended();
    await assertReads(3);
    t.diagnostic(`read on ${Math.round(performance.now() - begun)} ms after the service was started`);
    assert.match(await logged(join(product.dir, 'dedupd.log')), /the connection was aborted/);
    await product.client.unmountReference(shown);
    await product.client.releaseImages([]);
    await product.client.retainLayers([]);
    assert.deepEqual(await devicesOfStore(storeId), []);
  });
});
