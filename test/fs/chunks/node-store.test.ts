import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { copyFile, mkdtemp, open, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, it, mock } from 'node:test';
import Database from 'better-sqlite3';
import { DedupError } from '../../../src/errors.ts';
import { FIRST_CHUNK_ADDRESS, HEADER_ADDRESS } from '../../../src/fs/chunks/store-layout.ts';
import { native } from '../../../src/fs/native.ts';
import { GiB, KiB, MiB } from '../../../src/units.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  nativeWith,
  noise,
  prose,
  type TestFile,
  TestStore,
} from '../../support/lazy-store.ts';

const rigs: { remove(): Promise<void> }[] = [];
const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;
const code = (expected: string) => (error: unknown) => error instanceof DedupError && error.code === expected;

function keep<T extends { remove(): Promise<void> }>(made: T): T {
  rigs.push(made);
  return made;
}

async function rig(...args: Parameters<typeof LoaderRig.create>): Promise<LoaderRig> {
  return keep(await LoaderRig.create(...args));
}

afterEach(async () => {
  mock.restoreAll();
  for (const made of rigs.splice(0)) await made.remove();
});

function files(seed: string, count = 12): TestFile[] {
  return Array.from({ length: count }, (_, i) => ({ name: `f${i}`, content: prose(`${seed}${i}`, 77 + i * 23_456) }));
}

/** A copy of a root as a crash of the process would leave it: the database with its log, the store as it is. */
async function crashCopy(root: string): Promise<string> {
  const copy = await mkdtemp(join(tmpdir(), 'dedup-crash-'));
  execFileSync('cp', ['-a', '--sparse=always', `${root}/.`, copy]);
  return copy;
}

/** Moves the log of an open database into its file, the way an idle node has it. */
function checkpoint(file: string): void {
  const db = new Database(file);
  db.pragma('wal_checkpoint(TRUNCATE)');
  db.close();
}

function rows(file: string, sql: string): unknown[] {
  const db = new Database(file, { readonly: true });
  try {
    return db.prepare(sql).all();
  } finally {
    db.close();
  }
}

function presentPieces(test: LoaderRig, layerId: number): number {
  const { layer, addresses } = test.layers.get(layerId)!;
  const { chunks } = layer.index;
  let present = 0;
  for (let i = 0; i < chunks.count; i++)
    if (addresses[i]! > 0 && test.node.store.isPresent(addresses[i]!, chunks.length[i]!)) present++;
  return present;
}

describe('NodeStore', () => {
  it('gives chunks aligned addresses in layer order, each distinct chunk one', async () => {
    const twice = prose('twice', 9000);
    const layer = await layerOf(
      [
        ...files('a'),
        { name: 'x', content: twice },
        { name: 'y', content: twice },
        { name: 'z', content: Buffer.alloc(5000) },
      ],
      sizes,
    );
    const test = await rig();
    const { addresses } = await test.add(layer, []);
    const { chunks } = layer.index;
    const zero = chunks.zero.indexOf(1);
    assert.equal(addresses[zero], 0);
    assert.equal(addresses[zero - 1], addresses[zero - 2]);
    let next = FIRST_CHUNK_ADDRESS;
    for (let i = 0; i < zero - 1; i++) {
      assert.equal(addresses[i], next);
      next += Math.ceil(chunks.length[i]! / 4096) * 4096;
    }
  });

  it('gives a layer added again, also after a restart, the same addresses', async () => {
    const layer = await layerOf(files('a'), sizes);
    const test = await rig();
    const first = await test.add(layer, []);
    const again = await test.add(layer, [{ host: 'two', reader: new MemoryBlobs() }]);
    assert.equal(again.layerId, first.layerId);
    assert.deepEqual(again.addresses, first.addresses);
    await test.node.store.close();
    await test.node.open();
    assert.deepEqual(await test.node.store.layerAddresses(first.layerId), first.addresses);
    const [record] = await test.node.store.layers();
    assert.equal(record!.digest, layer.id.digest);
    assert.deepEqual(record!.sources, [{ host: 'two', repository: 'test' }]);
  });

  it("answers the guide's SQL and counts the layers that use a chunk", async () => {
    const shared = files('a');
    const one = await layerOf(shared, sizes);
    const two = await layerOf(
      [
        ...shared,
        ...shared.map(({ content }, i) => ({ name: `again${i}`, content })),
        { name: 'new', content: prose('n', 100) },
      ],
      sizes,
    );
    const test = await rig();
    await test.add(one, []);
    const query = 'SELECT COUNT(*) AS n, SUM(size) AS bytes FROM chunks WHERE ref_count > 1;';
    assert.deepEqual(rows(test.node.paths.indexDb, query), [{ n: 0, bytes: null }]);
    const second = await test.add(two, []);
    const bytes = shared.reduce((sum, { content }) => sum + content.length, 0);
    assert.deepEqual(rows(test.node.paths.indexDb, query), [{ n: one.index.chunks.count, bytes }]);
    assert.deepEqual(await test.node.store.retainLayers([second.layerId]), [1]);
    assert.deepEqual(rows(test.node.paths.indexDb, query), [{ n: 0, bytes: null }]);
  });

  it('believes only durable presence after a crash', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.readFile(stored, 'f2');
    await test.node.store.flush();
    const durable = presentPieces(test, stored.layerId);
    await test.mustEqual(stored);
    assert.ok(presentPieces(test, stored.layerId) > durable);
    const after = await rig({}, {}, await crashCopy(test.node.root));
    after.layers.set(stored.layerId, stored);
    after.sources.set(stored.layerId, [{ host: 'one', reader: registry }]);
    assert.equal(presentPieces(after, stored.layerId), durable);
    registry.requests.length = 0;
    await after.readFile(stored, 'f2');
    assert.equal(registry.requests.length, 0);
    await after.mustEqual(stored);
    assert.ok(registry.requests.length > 0);
  });

  it('has everything that was read after an orderly restart', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.mustEqual(stored);
    await test.restart(async () => {
      assert.deepEqual((await stat(test.node.paths.indexDb)).size > 0, true);
      await assert.rejects(stat(`${test.node.paths.indexDb}-wal`), { code: 'ENOENT' });
    });
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.equal(registry.requests.length, 0);
  });

  it('does not take a hole of the store for content', async () => {
    const layer = await layerOf([{ name: 'zeros', content: Buffer.alloc(40_000) }, ...files('a')], sizes);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs() }], { contiguousFiles: true });
    assert.equal(presentPieces(test, stored.layerId), 0);
    await assert.rejects(test.readFile(stored, 'f3'), code('REGISTRY_NOT_FOUND'));
  });

  it('drops the presence that an older database records beside a newer store', async () => {
    const old = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(old);
    const test = await rig();
    const stored = await test.add(old, [{ host: 'one', reader: registry }]);
    await test.mustEqual(stored);
    await test.node.store.flush();
    checkpoint(test.node.paths.indexDb);
    const backup = join(test.node.root, 'index.db.bak');
    await copyFile(test.node.paths.indexDb, backup);
    // The store goes on: the old layer's chunks are punched out.
    await test.node.store.retainLayers([]);
    const { nextAddress } = await test.node.store.stats();
    await test.restart(() => copyFile(backup, test.node.paths.indexDb));
    assert.equal(presentPieces(test, stored.layerId), 0);
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.ok(registry.requests.length > 0);
    const other = await test.add(await layerOf(files('b'), sizes), []);
    assert.ok(Math.min(...other.addresses) >= nextAddress);
  });

  it('never gives an address twice, also when an older database comes back', async () => {
    const test = await rig();
    await test.add(await layerOf(files('a'), sizes), []);
    checkpoint(test.node.paths.indexDb);
    const backup = join(test.node.root, 'index.db.bak');
    await copyFile(test.node.paths.indexDb, backup);
    const later = await test.add(await layerOf(files('b'), sizes), []);
    await test.node.store.close();
    await copyFile(backup, test.node.paths.indexDb);
    await test.node.open();
    const other = await test.add(await layerOf(files('c'), sizes), []);
    assert.ok(Math.min(...other.addresses) > Math.max(...later.addresses));
  });

  it('drops recorded presence when the store file is another or an older one', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    const early = join(test.node.root, 'store.early');
    execFileSync('cp', ['--sparse=always', test.node.paths.store, early]);
    await test.mustEqual(stored);
    const victim = await test.add(await layerOf(files('b'), sizes), []);
    await test.node.store.retainLayers([stored.layerId]);
    assert.ok(victim.layerId > stored.layerId);
    test.loader.close();
    await test.node.store.close();
    execFileSync('cp', ['--sparse=always', early, test.node.paths.store]);
    await test.node.open();
    assert.equal(presentPieces(test, stored.layerId), 0);
    test.start();
    await test.mustEqual(stored);
    test.loader.close();
    await test.node.store.close();
    await rm(test.node.paths.store);
    await test.node.open();
    assert.equal(presentPieces(test, stored.layerId), 0);
  });

  it('tells a database of before the last start from its own, also where nothing was removed since', async () => {
    const test = keep(await TestStore.create());
    await test.store.createImage('before', []);
    const images = async (of: TestStore) => (await of.store.images()).map(({ key }) => key);
    checkpoint(test.paths.indexDb);
    const backup = join(test.root, 'index.db.bak');
    await copyFile(test.paths.indexDb, backup);
    await test.store.close();
    await test.open();
    assert.deepEqual(await images(test), ['before'], 'an orderly restart');
    await test.store.createImage('after', []);
    const crashed = keep(await TestStore.create({}, await crashCopy(test.root)));
    assert.deepEqual(await images(crashed), ['before', 'after'], 'a crash');
    await test.store.close();
    await copyFile(backup, test.paths.indexDb);
    await test.open();
    // The number of an image is the name of its file, which another history has written since.
    assert.deepEqual(await images(test), []);
    const after = keep(await TestStore.create({}, await crashCopy(test.root)));
    assert.deepEqual(await images(after), [], 'also when the start that told it crashed');
  });

  it('makes pieces absent again when fdatasync fails, and never records them', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.readFile(stored, 'f3');
    await test.node.store.flush();
    const durable = presentPieces(test, stored.layerId);
    await test.mustEqual(stored);
    const handle = await open(test.node.paths.indexDb);
    const datasync = mock.method(Object.getPrototypeOf(handle), 'datasync', async () => {
      throw Object.assign(new Error('EIO: i/o error, fdatasync'), { code: 'EIO' });
    });
    await handle.close();
    await assert.rejects(test.node.store.flush(), code('STORE_IO'));
    assert.equal(datasync.mock.callCount(), 2, 'the store and its sums');
    assert.equal(presentPieces(test, stored.layerId), durable);
    datasync.mock.restore();
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.ok(registry.requests.length > 0);
  });

  it('does not trust a write that a failed fdatasync overtook', async () => {
    const layer = await layerOf(files('a'), sizes);
    const gate = Promise.withResolvers<void>();
    let held = 0;
    const slow = nativeWith({
      storePieces: async (job) => {
        const written = await native().storePieces(job);
        if (held++ > 0) await gate.promise;
        return written;
      },
    });
    const test = await rig({}, { native: slow });
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    await test.readFile(stored, 'f1');
    const reading = test.readFile(stored, 'f11');
    reading.catch(() => undefined);
    while (held < 2) await new Promise((resolve) => setTimeout(resolve, 5));
    const handle = await open(test.node.paths.indexDb);
    const datasync = mock.method(Object.getPrototypeOf(handle), 'datasync', async () => {
      throw Object.assign(new Error('EIO'), { code: 'EIO' });
    });
    await handle.close();
    await assert.rejects(test.node.store.flush(), code('STORE_IO'));
    datasync.mock.restore();
    gate.resolve();
    await assert.rejects(reading, code('STORE_IO'));
    assert.equal(presentPieces(test, stored.layerId), 0);
  });

  it('commits the loss of rows before it punches, and frees the disk', async () => {
    const layer = await layerOf([{ name: 'big', content: noise('big', 3 * MiB) }], sizes);
    const punched: { rows: unknown[]; offset: number }[] = [];
    let file = '';
    const watching = nativeWith({
      punchHole: async (fd, offset, length) => {
        punched.push({ rows: rows(file, 'SELECT * FROM chunks'), offset });
        await native().punchHole(fd, offset, length);
      },
    });
    const test = await rig({}, { native: watching });
    file = test.node.paths.indexDb;
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    await test.mustEqual(stored);
    const used = (await stat(test.node.paths.store)).blocks * 512;
    assert.deepEqual(await test.node.store.retainLayers([]), [stored.layerId]);
    assert.ok(punched.length > 0);
    for (const { rows: left } of punched) assert.deepEqual(left, []);
    assert.ok(used - (await stat(test.node.paths.store)).blocks * 512 >= 3 * MiB);
    assert.equal(test.node.store.isPresent(stored.addresses[0]!, 4096), false);
    assert.equal(test.node.store.find(stored.addresses[0]!), undefined);
    const again = await test.add(layer, []);
    assert.ok(again.addresses[0]! > stored.addresses.at(-1)!);
  });

  it('punches at the next start what it could not punch before', async () => {
    const layer = await layerOf([{ name: 'big', content: noise('big', 3 * MiB) }], sizes);
    const failing = nativeWith({ punchHole: () => Promise.reject(new DedupError('STORE_IO', 'no')) });
    const test = await rig({}, { native: failing });
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    await test.mustEqual(stored);
    await test.node.store.retainLayers([]);
    test.loader.close();
    await test.node.store.close();
    const used = (await stat(test.node.paths.store)).blocks * 512;
    await test.node.open();
    assert.ok(used - (await stat(test.node.paths.store)).blocks * 512 >= 3 * MiB);
    assert.deepEqual(rows(test.node.paths.indexDb, "SELECT count(*) AS n FROM freed WHERE state = 'to-punch'"), [
      { n: 0 },
    ]);
  });

  it('keeps the layers that a mount pins', async () => {
    const test = await rig();
    const one = await test.add(await layerOf(files('a'), sizes), []);
    const two = await test.add(await layerOf(files('b'), sizes), []);
    await test.node.store.pin(7, [one.layerId]);
    assert.deepEqual(await test.node.store.retainLayers([]), [two.layerId]);
    assert.equal(test.node.store.find(one.addresses[0]!)?.address, one.addresses[0]);
    await test.node.store.unpin(7);
    assert.deepEqual(await test.node.store.retainLayers([]), [one.layerId]);
  });

  it('has a database that a plain copy at any moment leaves usable', async () => {
    const test = await rig();
    const copies = await mkdtemp(join(tmpdir(), 'dedup-copies-'));
    try {
      let adding = true;
      const work = (async () => {
        for (let i = 0; i < 8; i++) {
          const many = Array.from({ length: 400 }, (_, k) => ({
            name: `${k}`,
            content: Buffer.from(`content ${i} ${k}`),
          }));
          await test.add(await layerOf(many, { compression: 'none' }), []);
        }
        adding = false;
      })();
      let copied = 0;
      while (adding) {
        await copyFile(test.node.paths.indexDb, join(copies, `${copied++}`));
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      await work;
      assert.ok(copied > 3);
      for (let i = 0; i < copied; i++) {
        const db = new Database(join(copies, `${i}`));
        assert.equal(db.pragma('integrity_check', { simple: true }), 'ok');
        db.close();
      }
    } finally {
      await rm(copies, { recursive: true });
    }
  });

  it('moves a damaged database aside and begins a new one with addresses not given before', async () => {
    const layer = await layerOf(files('a'), sizes);
    const test = await rig();
    const stored = await test.add(layer, []);
    await test.node.store.close();
    const handle = await open(test.node.paths.indexDb, 'r+');
    // As after a crash in the middle of something worse: not closed, and a page of rows is rubbish.
    await handle.write(noise('rubbish', 4096), 0, 4096, 4096);
    await handle.write(noise('rubbish', 4096), 0, 4096, 8192);
    await handle.close();
    await test.node.open();
    assert.deepEqual(await test.node.store.layers(), []);
    const again = await test.add(layer, []);
    assert.ok(Math.min(...again.addresses) > Math.max(...stored.addresses));
  });

  it('refuses a database of a newer version and leaves it as it is', async () => {
    const test = await rig();
    const stored = await test.add(await layerOf(files('a'), sizes), []);
    await test.node.store.close();
    const setVersion = (version: number): void => {
      const db = new Database(test.node.paths.indexDb);
      db.pragma(`user_version = ${version}`);
      db.close();
    };
    setVersion(99);
    await assert.rejects(test.node.open(), code('FAILED_PRECONDITION'));
    setVersion(1);
    await test.node.open();
    assert.deepEqual(
      (await test.node.store.layers()).map(({ id }) => id),
      [stored.layerId],
    );
  });

  it('never gives a reader the hole of a range that is punched while it is read', async () => {
    const layer = await layerOf([{ name: 'a', content: noise('a', 64 * KiB) }], sizes);
    // The disk is slow: the range is gone before it is read.
    const late = nativeWith({
      readStore: async (job) => {
        await test.node.store.retainLayers([]);
        return await native().readStore(job);
      },
    });
    const test = await rig({}, { native: late });
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    await test.readFile(stored, 'a');
    const bytes = Buffer.alloc(64 * KiB);
    await assert.rejects(test.node.store.read(bytes, 0, bytes.length, stored.addresses[0]!), code('STORE_IO'));
  });

  it('does not serve what the disk changed, says so, and reads it again from the registry', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.mustEqual(stored);
    await test.node.store.flush();
    const flip = async (address: number): Promise<void> => {
      const handle = await open(test.node.paths.store, 'r+');
      const byte = Buffer.alloc(1);
      await handle.read(byte, 0, 1, address);
      byte[0]! ^= 0x10;
      await handle.write(byte, 0, 1, address);
      await handle.close();
    };
    const damage = async (): Promise<void> => {
      for (const address of stored.addresses) await flip(address + 17);
    };
    await damage();
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.ok(registry.requests.length > 0);
    assert.ok((await test.node.store.stats()).damagedReads > 0);
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.equal(registry.requests.length, 0, 'what was fetched again is right');
    // While nobody was looking, and with no registry to ask: no byte rather than a wrong one.
    await test.restart(() => damage());
    registry.blobs.clear();
    for (const { name } of layer.files) await assert.rejects(test.readFile(stored, name), code('REGISTRY_NOT_FOUND'));
  });

  it('believes nothing when the sums of the blocks are gone, and what is written anew is believed', async () => {
    const layer = await layerOf(files('a'), sizes);
    const registry = new MemoryBlobs(layer);
    const test = await rig();
    const stored = await test.add(layer, [{ host: 'one', reader: registry }]);
    await test.mustEqual(stored);
    await test.restart(() => rm(test.node.paths.storeSums));
    assert.equal(presentPieces(test, stored.layerId), 0);
    await test.mustEqual(stored);
    await test.restart();
    registry.requests.length = 0;
    await test.mustEqual(stored);
    assert.equal(registry.requests.length, 0);
    assert.equal((await test.node.store.stats()).damagedReads, 0);
  });

  it('refuses a store of another size and a header it cannot read', async () => {
    const test = keep(await TestStore.create());
    await test.store.close();
    await assert.rejects(test.open({ storeBytes: 256 * GiB }), code('STORE_CORRUPT'));
    const handle = await open(test.paths.store, 'r+');
    await handle.write(Buffer.from('x'), 0, 1, HEADER_ADDRESS + 20);
    await handle.close();
    await assert.rejects(test.open(), code('STORE_CORRUPT'));
  });

  it('refuses a layer when the address space is used up, and keeps what it has', async () => {
    const test = await rig({}, { storeBytes: 64 * GiB + 5 * MiB });
    const fits = await test.add(await layerOf([{ name: 'a', content: noise('a', 900 * KiB) }], sizes), []);
    await assert.rejects(
      test.add(await layerOf([{ name: 'b', content: noise('b', 200 * KiB) }], sizes), []),
      code('STORE_FULL'),
    );
    assert.deepEqual(await test.node.store.layerAddresses(fits.layerId), fits.addresses);
    assert.equal((await test.node.store.layers()).length, 1);
  });

  it('closes only after the writes that use its file have ended', async () => {
    const layer = await layerOf(files('a'), sizes);
    const gate = Promise.withResolvers<void>();
    let ended = false;
    const slow = nativeWith({
      storePieces: async (job) => {
        await gate.promise;
        const written = await native().storePieces(job);
        ended = true;
        return written;
      },
    });
    const test = await rig({}, { native: slow });
    const stored = await test.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
    const reading = test.readFile(stored, 'f5');
    reading.catch(() => undefined);
    await new Promise((resolve) => setTimeout(resolve, 50));
    test.loader.close();
    const closing = test.node.store.close().then(() => ended);
    gate.resolve();
    assert.equal(await closing, true);
    await assert.rejects(reading, code('CLOSED'));
  });

  it('says by name when it is used after it was closed', async () => {
    const test = keep(await TestStore.create());
    await test.store.close();
    await test.store.close();
    await assert.rejects(test.store.layers(), code('CLOSED'));
    await assert.rejects(async () => test.store.retainLayers([]), code('CLOSED'));
    assert.throws(() => test.store.find(0), code('CLOSED'));
  });
});
