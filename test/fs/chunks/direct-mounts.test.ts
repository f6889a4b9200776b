// Which images the kernel may read without dedupd, and how long what they read is kept: rows before devices, across
// crashes, lost databases and failing disks. The devices are what the test says there are.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, it, mock } from 'node:test';
import Database from 'better-sqlite3';
import type { ImageDevice } from '../../../src/fs/chunks/direct-mounts.ts';
import { native } from '../../../src/fs/native.ts';
import { KiB } from '../../../src/units.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  nativeWith,
  prose,
  type StoredTestLayer,
  TestStore,
} from '../../support/lazy-store.ts';

const sizes = { spanBytes: 64 * KiB, chunkBytes: 256 * KiB, pieceBytes: 64 * KiB } as const;
const IMAGE = 7;
const DEVICE: ImageDevice = { imageId: IMAGE, path: '/dev/loop77', direct: true };

/** A store with a layer of six files, of which the registry has everything and the store nothing. */
class DirectRig {
  readonly rig: LoaderRig;
  readonly stored: StoredTestLayer;
  /** What the machine is said to have. */
  devices: ImageDevice[] = [];
  attached = 0;

  private constructor(rig: LoaderRig, stored: StoredTestLayer) {
    this.rig = rig;
    this.stored = stored;
  }

  static async create(contiguousFiles = false): Promise<DirectRig> {
    const files = Array.from({ length: 6 }, (_, i) => ({
      name: `f${i}`,
      content: prose(`direct ${i}`, 77 + i * 99_456),
    }));
    const layer = await layerOf([...files, { name: 'hole', content: Buffer.alloc(300 * KiB) }], sizes);
    const list: { of?: DirectRig } = {};
    const rig = await LoaderRig.create({}, { devices: async () => list.of?.devices ?? [] });
    const sources = [{ host: 'one', reader: new MemoryBlobs(layer) }];
    const stored = await rig.add(layer, sources, { contiguousFiles });
    const made = new DirectRig(rig, stored);
    list.of = made;
    return made;
  }

  get store() {
    return this.rig.node.store;
  }

  async admit(attach: () => Promise<void> = async () => {}): Promise<boolean> {
    const image = { imageId: IMAGE, layers: [this.stored.layerId], metadataInStore: false };
    return await this.store.direct.admit({ ...image, loop: 'dedup:7:x', metadata: '/none' }, async () => {
      this.attached++;
      await attach();
    });
  }

  rows(sql: string, root = this.rig.node.root): unknown[] {
    const db = new Database(join(root, 'index.db'), { readonly: true });
    try {
      return db.prepare(sql).raw().all();
    } finally {
      db.close();
    }
  }

  direct(): unknown[] {
    return this.rows('SELECT mount_id FROM direct_mounts');
  }

  pins(): unknown[] {
    return this.rows('SELECT mount_id, layer_id FROM pins');
  }

  get pinned(): unknown[] {
    return [[IMAGE, this.stored.layerId]];
  }

  /** Ends the store in good order and opens it again, as a process does that has taken nothing over yet. */
  async reopen(meanwhile: () => Promise<unknown> = async () => {}): Promise<void> {
    this.rig.loader.close();
    await this.store.close();
    await meanwhile();
    await this.rig.node.open({ devices: async () => this.devices });
    this.rig.start();
    await this.store.unpinAll();
  }
}

const made: { remove(): Promise<void> }[] = [];

async function create(contiguousFiles = false): Promise<DirectRig> {
  const test = await DirectRig.create(contiguousFiles);
  made.push(test.rig);
  return test;
}

/** Has every fdatasync of this process do something else, until restored. */
async function datasyncs(test: DirectRig, instead: () => Promise<void>) {
  const handle = await open(test.rig.node.paths.indexDb);
  const prototype = Object.getPrototypeOf(handle) as { datasync(): Promise<void> };
  await handle.close();
  return mock.method(prototype, 'datasync', instead);
}

afterEach(async () => {
  mock.restoreAll();
  for (const rig of made.splice(0)) await rig.remove();
});

describe('DirectMounts', () => {
  for (const contiguous of [false, true]) {
    it(`admits an image once all of it is here, with row and pins on the disk before the device, files ${contiguous ? 'in one run' : 'anywhere'}`, async () => {
      const test = await create(contiguous);
      assert.equal(await test.admit(), false, 'nothing is here');
      for (const { name } of test.stored.layer.files.slice(0, -1)) {
        assert.equal(await test.admit(), false, `${name} is not here`);
        await test.rig.readFile(test.stored, name);
      }
      // Only where they lie in one run do zeros take room.
      assert.equal(await test.admit(), !contiguous);
      await test.rig.mustEqual(test.stored);
      assert.equal(test.attached, contiguous ? 0 : 1);
      await test.admit(async () => {
        assert.deepEqual([test.direct(), test.pins()], [[[IMAGE]], test.pinned]);
        // As a crash at this moment would leave it: nothing that only a log in memory holds.
        const copy = await mkdtemp(join(tmpdir(), 'dedup-direct-'));
        execFileSync('cp', ['-a', '--sparse=always', `${test.rig.node.root}/.`, copy]);
        const alive = await TestStore.create({ devices: async () => [DEVICE] }, copy);
        await alive.store.unpinAll();
        assert.deepEqual(await alive.store.retainLayers([]), [], 'kept as long as its device is there');
        await alive.store.close();
        await alive.open();
        await alive.store.unpinAll();
        assert.deepEqual(await alive.store.retainLayers([]), [test.stored.layerId], 'and not any longer');
        await alive.store.close();
        await rm(copy, { recursive: true });
      });
      assert.equal(test.attached, contiguous ? 1 : 2);
    });
  }

  it('does not admit what cannot be flushed, and nothing is recorded of it', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    const failing = await datasyncs(test, async () => {
      throw Object.assign(new Error('EIO: i/o error, fdatasync'), { code: 'EIO' });
    });
    await assert.rejects(test.admit(), { code: 'STORE_IO' });
    failing.mock.restore();
    assert.equal(await test.admit(), false, 'what was not flushed is absent again');
    assert.deepEqual([test.attached, test.direct(), test.pins()], [0, [], []]);
    await test.rig.mustEqual(test.stored);
    assert.equal(await test.admit(), true);
  });

  it('does not admit what is taken away while it is flushed', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    const chunk = test.stored.addresses.findLastIndex((address) => address > 0);
    const sync = await datasyncs(test, async () => {
      native().presenceSet(test.store.presence, test.stored.addresses[chunk]! / 4096, 1, false);
    });
    assert.equal(await test.admit(), false);
    assert.ok(sync.mock.callCount() > 0, 'it was complete until then');
    assert.deepEqual([test.attached, test.direct()], [0, []]);
  });

  it('does not admit what the disk has nothing of, whatever is recorded, and fetches it again', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    await test.store.flush();
    const chunk = test.stored.addresses.findLastIndex((address) => address > 0);
    const address = test.stored.addresses[chunk]!;
    const { fd } = test.store;
    await native().punchHole(fd, address + 8192, 4096);
    assert.deepEqual([...(await native().findHoles(fd, Float64Array.of(address / 4096, 4)))], [address / 4096 + 2, 1]);
    assert.equal(await test.admit(), false);
    assert.equal(test.store.isPresent(address + 8192, 4096), false);
    assert.deepEqual([test.attached, test.direct()], [0, []]);
    await test.rig.mustEqual(test.stored);
    assert.equal(await test.admit(), true);
  });

  it('keeps the row of a device that cannot be seen yet, and pins beyond the unmount until it is seen gone', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    await test.store.pin(IMAGE, [test.stored.layerId]);
    await test.admit(() => test.store.direct.look());
    assert.deepEqual(test.direct(), [[IMAGE]], 'it was attached after it was looked');
    test.devices = [DEVICE];
    await test.store.unpin(IMAGE);
    await test.store.direct.look();
    assert.deepEqual([test.direct(), test.pins()], [[[IMAGE]], test.pinned]);
    assert.deepEqual(await test.store.retainLayers([]), []);

    // Mounted again, otherwise: then the pins are that mount's.
    await test.store.pin(IMAGE, [test.stored.layerId]);
    test.devices = [];
    await test.store.direct.look();
    assert.deepEqual([test.direct(), test.pins()], [[], test.pinned]);
    await test.store.unpin(IMAGE);
    assert.deepEqual(test.pins(), []);
    assert.deepEqual(await test.store.retainLayers([]), [test.stored.layerId]);
  });

  it('keeps rows and pins over restarts as long as their devices are there, and does not start if that cannot be told', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    await test.admit();
    test.devices = [DEVICE];
    await test.reopen();
    assert.deepEqual([test.direct(), test.pins()], [[[IMAGE]], test.pinned]);
    assert.equal(test.store.hasForeignReaders(), false);
    await test.store.close();
    const devices = () => Promise.reject(new Error('who knows'));
    await assert.rejects(test.rig.node.open({ devices }), { message: 'who knows' });
    assert.deepEqual([test.direct(), test.pins()], [[[IMAGE]], test.pinned]);
    // Served by a session now, or attached and never given the store: not a reader of the store.
    test.devices = [{ ...DEVICE, direct: false }];
    await test.rig.node.open({ devices: async () => test.devices });
    assert.deepEqual([test.direct(), test.pins()], [[], []]);
  });

  it('frees nothing while a device reads the store that a lost index.db does not know, and makes no image of its number', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    await test.admit();
    test.devices = [DEVICE];
    const { indexDb } = test.rig.node.paths;
    await test.reopen(() => rm(indexDb));
    assert.equal(test.store.hasForeignReaders(), true);
    const again = await test.rig.add(test.stored.layer, test.rig.sources.get(test.stored.layerId)!);
    await test.rig.mustEqual(again);
    assert.ok((await test.store.createImage('again', [again.layerId])).id > IMAGE);
    const states = () => [...new Set(test.rows('SELECT state FROM freed').flat())];
    assert.deepEqual(await test.store.retainLayers([]), [again.layerId]);
    assert.equal(test.store.isPresent(again.addresses[0]!, 4096), false);
    assert.deepEqual(states(), ['to-punch']);
    await test.reopen();
    assert.deepEqual([states(), test.store.hasForeignReaders()], [['to-punch'], true]);
    test.devices = [];
    await test.reopen();
    assert.deepEqual([states(), test.store.hasForeignReaders()], [['quarantine'], false]);
  });

  it('frees what it kept back once no device is left that it does not know', async () => {
    const test = await create();
    await test.rig.mustEqual(test.stored);
    test.devices = [{ ...DEVICE, imageId: 99 }];
    let punched = 0;
    const punchHole = async (fd: number, offset: number, length: number): Promise<void> => {
      punched++;
      await native().punchHole(fd, offset, length);
    };
    test.rig.loader.close();
    await test.store.close();
    await test.rig.node.open({ devices: async () => test.devices, native: nativeWith({ punchHole }) });
    assert.deepEqual(await test.store.retainLayers([]), [test.stored.layerId]);
    assert.equal(punched, 0);
    await test.store.direct.look();
    assert.equal(punched, 0);
    test.devices = [];
    await test.store.direct.look();
    assert.ok(punched > 0);
    assert.deepEqual([...new Set(test.rows('SELECT state FROM freed').flat())], ['quarantine']);
  });
});
