// Space of the store that is given back: addresses that are given again, pieces that are evicted. Whatever happens in
// between, what is present is right.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { copyFileSync, statfsSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { cp, mkdir, mkdtemp, open, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, it } from 'node:test';
import Database from 'better-sqlite3';
import { digestOf } from '../../../src/digest.ts';
import { DedupError } from '../../../src/errors.ts';
import { FIRST_CHUNK_ADDRESS, HEADER_ADDRESS } from '../../../src/fs/chunks/store-layout.ts';
import { native } from '../../../src/fs/native.ts';
import { isRoot } from '../../../src/runtime.ts';
import { GiB, KiB, MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  nativeWith,
  noise,
  type StoredTestLayer,
  type TestLayer,
} from '../../support/lazy-store.ts';
import { tarOf } from '../../support/tar.ts';

const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;
const code = (expected: string) => (error: unknown) => error instanceof DedupError && error.code === expected;

const undo: (() => Promise<unknown> | unknown)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
});

/** Images that a test says are mounted, by the rigs that know of them. */
const living = new Set<number>();
const EVERYTHING_GOES = { quarantineMs: 0, keepUsedMs: -2_000, livingImages: async () => living } as const;

async function rig(store: Parameters<typeof LoaderRig.create>[1] = {}, root?: string): Promise<LoaderRig> {
  living.clear();
  const made = await LoaderRig.create({}, { ...EVERYTHING_GOES, ...store }, root);
  undo.push(() => made.remove());
  told(made);
  return made;
}

/** The loader of a rig learns of dropped layers, as in dedupd. */
function told(made: LoaderRig): void {
  made.node.store.onDropped(async (layerIds) => {
    made.loader.forget(layerIds);
    await made.loader.drained();
  });
}

const source = (layer: TestLayer) => [{ host: 'one', reader: new MemoryBlobs(layer) }];
const oneFile = (seed: string, bytes: number) => layerOf([{ name: 'f', content: noise(seed, bytes) }], sizes);

async function addRead(test: LoaderRig, layer: TestLayer): Promise<StoredTestLayer> {
  const stored = await test.add(layer, source(layer));
  await test.mustEqual(stored);
  return stored;
}

async function drop(test: LoaderRig, ...keep: StoredTestLayer[]): Promise<void> {
  await test.node.store.retainLayers(keep.map(({ layerId }) => layerId));
}

/** Compares every present piece with what its layer holds, without any registry. Answers how many there were. */
async function mustBeRight(test: LoaderRig, stored: StoredTestLayer): Promise<number> {
  const { layer, addresses } = stored;
  const { entries, chunks, pieceBytes } = layer.index;
  let present = 0;
  for (const file of layer.files) {
    const entry = entries.name.indexOf(file.name);
    let at = 0;
    for (let i = 0; i < entries.chunkCount[entry]!; i++) {
      const chunk = entries.firstChunk[entry]! + i;
      for (let offset = 0; offset < chunks.length[chunk]!; offset += pieceBytes) {
        const length = Math.min(pieceBytes, chunks.length[chunk]! - offset);
        const address = addresses[chunk]! + offset;
        if (!test.node.store.isPresent(address, length)) continue;
        const bytes = Buffer.alloc(length);
        await test.node.store.read(bytes, 0, length, address);
        assert.ok(bytes.equals(file.content.subarray(at + offset, at + offset + length)), `${file.name} at ${at}`);
        present++;
      }
      at += chunks.length[chunk]!;
    }
  }
  assert.equal((await test.node.store.stats()).damagedReads, 0);
  return present;
}

function rows<T>(test: LoaderRig, sql: string): T[] {
  const db = new Database(test.node.paths.indexDb);
  try {
    return db.prepare(sql).all() as T[];
  } finally {
    db.close();
  }
}

function change(test: LoaderRig, sql: string): void {
  const db = new Database(test.node.paths.indexDb);
  db.pragma('foreign_keys = OFF');
  db.exec(sql);
  db.close();
}

/** Ends the quarantine of everything that was freed, if nothing forbids it. */
async function rest(test: LoaderRig): Promise<void> {
  await test.node.store.endQuarantine({ wait: true });
  assert.deepEqual(
    freed(test).filter(({ state }) => state !== 'free'),
    [],
  );
}

const freed = (test: LoaderRig) =>
  rows<{ block: number; blocks: number; state: string }>(test, 'SELECT block, blocks, state FROM freed ORDER BY block');

async function crashCopy(root: string): Promise<string> {
  const copy = await mkdtemp(join(tmpdir(), 'dedup-crash-'));
  undo.push(() => rm(copy, { recursive: true, force: true }));
  execFileSync('cp', ['-a', '--sparse=always', `${root}/.`, copy]);
  return copy;
}

/** A copy of the database as an operator takes it of an idle node. */
function backup(test: LoaderRig): string {
  const db = new Database(test.node.paths.indexDb);
  db.pragma('wal_checkpoint(TRUNCATE)');
  db.close();
  copyFileSync(test.node.paths.indexDb, `${test.node.root}/backup`);
  return `${test.node.root}/backup`;
}

async function putBack(test: LoaderRig, copy: string, options: object = {}): Promise<void> {
  test.loader.close();
  await test.node.store.close();
  copyFileSync(copy, test.node.paths.indexDb);
  await test.node.open({ ...EVERYTHING_GOES, ...options });
  test.start();
  told(test);
}

describe('addresses whose chunks are gone', () => {
  it('are given again, the smallest range that is large enough first, and what is read there is right', async () => {
    const test = await rig();
    const small = await addRead(test, await oneFile('small', 100 * KiB));
    const between = await addRead(test, await oneFile('between', 8 * KiB));
    const large = await addRead(test, await oneFile('large', 300 * KiB));
    const last = await addRead(test, await oneFile('last', 8 * KiB));
    await drop(test, between, last);
    await rest(test);
    const fits = await addRead(test, await oneFile('fits', 90 * KiB));
    assert.equal(fits.addresses[0], small.addresses[0]);
    const next = await addRead(test, await oneFile('next', 200 * KiB));
    assert.equal(next.addresses[0], large.addresses[0]);
    const upwards = await addRead(test, await oneFile('upwards', 101 * KiB));
    assert.ok(upwards.addresses[0]! > last.addresses[0]!, 'no free range holds it');
    for (const stored of [between, last, fits, next, upwards]) assert.ok((await mustBeRight(test, stored)) > 0);
    assert.deepEqual(
      freed(test).map(({ blocks, state }) => [blocks, state]),
      [
        [2, 'free'],
        [25, 'free'],
      ],
    );
  });

  it('are one range when they are neighbours', async () => {
    const test = await rig();
    const layers = [];
    for (const seed of ['a', 'b', 'c', 'd']) layers.push(await addRead(test, await oneFile(seed, 64 * KiB)));
    await drop(test, layers[1]!, layers[3]!);
    await rest(test);
    await drop(test, layers[3]!);
    await rest(test);
    assert.deepEqual(freed(test), [{ block: FIRST_CHUNK_ADDRESS / 4096, blocks: 48, state: 'free' }]);
    const whole = await addRead(test, await oneFile('whole', 192 * KiB));
    assert.equal(whole.addresses[0], FIRST_CHUNK_ADDRESS);
  });

  it('carry many more layers than the address space holds at once', async () => {
    const test = await rig({ storeBytes: 64 * GiB + 5 * MiB });
    let stays = await addRead(test, await oneFile('stays', 300 * KiB));
    for (let i = 0; i < 12; i++) {
      if (i % 4 === 3) await putBack(test, backup(test), { storeBytes: 64 * GiB + 5 * MiB });
      const stored = await addRead(test, await oneFile(`${i}`, (100 + 20 * i) * KiB));
      await drop(test, stored);
      await rest(test);
      assert.ok((await mustBeRight(test, stored)) > 0);
      stays = stored;
    }
    assert.ok((await mustBeRight(test, stays)) > 0);
    await drop(test);
    await rest(test);
    assert.deepEqual(freed(test), [], 'all of it is as if it had never been given');
    const held = await addRead(test, await oneFile('held', 500 * KiB));
    living.add(99);
    await drop(test);
    await assert.rejects(test.add(await oneFile('early', 800 * KiB), []), code('STORE_FULL'));
    living.clear();
    await rest(test);
    const late = await addRead(test, await oneFile('late', 800 * KiB));
    assert.ok(late.addresses[0]! < held.addresses[0]! + 4 * MiB);
  });

  it('stay where they are as long as an image that has no row is mounted, or it is not known which are', async () => {
    const test = await rig();
    const stored = await addRead(test, await oneFile('a', 64 * KiB));
    const { id } = await test.node.store.createImage('image', [stored.layerId]);
    living.add(id);
    await drop(test);
    assert.equal(await test.node.store.endQuarantine(), 0);
    assert.deepEqual(
      freed(test).map(({ state }) => state),
      ['quarantine'],
    );
    // Nor after a restart, nor because another image of that layer came since.
    await test.restart();
    await putBack(test, backup(test));
    const again = await test.add(stored.layer, []);
    assert.notEqual(again.addresses[0], stored.addresses[0]);
    const { id: next } = await test.node.store.createImage('image', [again.layerId]);
    assert.ok(next > id);
    living.add(next);
    assert.equal(await test.node.store.endQuarantine(), 0);
    living.delete(id);
    await rest(test);
    const there = await addRead(test, await oneFile('b', 60 * KiB));
    assert.equal(there.addresses[0], stored.addresses[0]);

    const blind = await rig({ livingImages: undefined } as never);
    const lost = await addRead(blind, await oneFile('a', 64 * KiB));
    await drop(blind);
    assert.equal(await blind.node.store.endQuarantine(), 0);
    const other = await addRead(blind, await oneFile('b', 60 * KiB));
    assert.ok(other.addresses[0]! > lost.addresses[0]!);
  });

  it('are not given while somebody in this process still writes there, and what came late is gone', async () => {
    const gate = Promise.withResolvers<void>();
    const begun = Promise.withResolvers<void>();
    const test = await rig();
    test.stop();
    test.start({
      native: {
        decodeSpans: async (job) => {
          begun.resolve();
          await gate.promise;
          return await native().decodeSpans(job);
        },
      },
    });
    const layer = await oneFile('late', 64 * KiB);
    const stored = await test.add(layer, source(layer));
    const reading = test.readFile(stored, 'f');
    reading.catch(() => undefined);
    await begun.promise;
    await drop(test);
    assert.equal(await test.node.store.endQuarantine(), 0, 'bytes are under way');
    gate.resolve();
    await reading;
    assert.equal(test.node.store.isPresent(stored.addresses[0]!, 64 * KiB), true, 'it came after the punch');
    await rest(test);
    assert.equal(test.node.store.isPresent(stored.addresses[0]!, 4096), false);
    const next = await test.add(await oneFile('next', 64 * KiB), []);
    assert.equal(next.addresses[0], stored.addresses[0]);
    // What waited to be recorded for the old chunk is not recorded for the new one.
    await test.node.store.flush();
    assert.deepEqual(rows(test, 'SELECT durable FROM chunks'), [{ durable: 0 }]);
  });

  it('rest for a while after their chunks went', async () => {
    const test = await rig({ quarantineMs: 700 });
    await addRead(test, await oneFile('a', 64 * KiB));
    await drop(test);
    assert.equal(await test.node.store.endQuarantine(), 0);
    const started = performance.now();
    while (freed(test).length > 0) await new Promise((resolve) => setTimeout(resolve, 20));
    assert.ok(performance.now() - started > 300, 'and then it ends by itself');
  });

  it('are forgotten by an older copy of the database, and images it does not know are foreign to it', async () => {
    const test = await rig();
    const old = await addRead(test, await oneFile('old', 64 * KiB));
    const stays = await addRead(test, await oneFile('stays', 64 * KiB));
    await test.node.store.flush();
    const before = backup(test);
    await drop(test, stays);
    await rest(test);
    const newer = await addRead(test, await oneFile('newer', 64 * KiB));
    assert.equal(newer.addresses[0], old.addresses[0]);
    const { id } = await test.node.store.createImage('newer', [newer.layerId]);
    living.add(id);
    await putBack(test, before);
    assert.equal(test.node.store.isForeign(id), true);
    // The copy goes on where its chunks are, and fetches them again; what it frees is not given while that image lives.
    const known = { ...old, layerId: (await test.node.store.layers())[0]!.id };
    assert.equal(await mustBeRight(test, known), 0);
    await test.mustEqual(known);
    await drop(test);
    assert.equal(await test.node.store.endQuarantine(), 0);
    const { id: later } = await test.node.store.createImage('later', []);
    assert.ok(later > id, 'no number of a living image is given again');
    assert.equal(test.node.store.isForeign(later), false);
    await putBack(test, backup(test));
    assert.equal(test.node.store.isForeign(id), true, 'at every start from then on');
    assert.equal(await test.node.store.endQuarantine(), 0);
  });

  it('are given to nobody while a stranger reads the store itself, of which an older copy knows nothing', async () => {
    const test = await rig();
    await addRead(test, await oneFile('old', 64 * KiB));
    const stays = await addRead(test, await oneFile('stays', 64 * KiB));
    await test.node.store.flush();
    const before = backup(test);
    await drop(test, stays);
    await rest(test);
    const newer = await addRead(test, await oneFile('newer', 64 * KiB));
    const { nextAddress } = await test.node.store.stats();
    const { id } = await test.node.store.createImage('newer', [newer.layerId]);
    living.add(id);
    let reading = [{ imageId: id, path: '/dev/none', direct: true }];
    await putBack(test, before, { devices: async () => reading });
    // What the copy says lies there would be written over what the stranger reads.
    assert.deepEqual(await test.node.store.layers(), []);
    const again = await addRead(test, stays.layer);
    assert.ok(again.addresses[0]! >= nextAddress);
    await test.node.store.flush();
    assert.equal(await test.node.store.evict(GiB), 0);
    await drop(test);
    const bytes = Buffer.alloc(64 * KiB);
    const handle = await open(test.node.paths.store, 'r');
    undo.push(() => handle.close());
    const there = async () => (await handle.read(bytes, 0, bytes.length, newer.addresses[0]!)).buffer;
    assert.ok((await there()).equals(newer.layer.files[0]!.content), 'nothing was punched');
    assert.equal(await test.node.store.endQuarantine(), 0);
    reading = [];
    living.clear();
    await test.node.store.direct.look();
    assert.ok((await there()).equals(Buffer.alloc(64 * KiB)), 'all of it is');
    await rest(test);
    const next = await addRead(test, await oneFile('next', 64 * KiB));
    assert.equal(next.addresses[0], FIRST_CHUNK_ADDRESS);
  });

  it('do not make an image foreign when none was given since the copy was taken', async () => {
    const test = await rig();
    const stored = await addRead(test, await oneFile('a', 64 * KiB));
    await drop(test);
    await rest(test);
    const before = backup(test);
    const again = await addRead(test, await oneFile('b', 64 * KiB));
    assert.equal(again.addresses[0], stored.addresses[0]);
    const { id } = await test.node.store.createImage('b', [again.layerId]);
    living.add(id);
    await drop(test);
    // The copy is told, for a layer was dropped since; what was free in it is not any more.
    await putBack(test, before);
    assert.equal(test.node.store.isForeign(id), false);
    assert.deepEqual(freed(test), []);
    const other = await addRead(test, await oneFile('c', 64 * KiB));
    assert.ok(other.addresses[0]! > again.addresses[0]!);
  });

  it('are looked at anew when a copy comes back that cannot be told from the database itself', async () => {
    const test = await rig();
    const stored = await addRead(test, await oneFile('a', 64 * KiB));
    await drop(test);
    await rest(test);
    const before = backup(test);
    const again = await addRead(test, await oneFile('b', 64 * KiB));
    assert.equal(again.addresses[0], stored.addresses[0]);
    const upwards = await addRead(test, await oneFile('c', 64 * KiB));
    living.add((await test.node.store.createImage('b', [again.layerId, upwards.layerId])).id);
    await putBack(test, before);
    assert.equal(await test.node.store.endQuarantine(), 0);
    const other = await addRead(test, await oneFile('d', 64 * KiB));
    assert.ok(other.addresses[0]! > upwards.addresses[0]!, 'the image that is mounted maps all below');
    living.clear();
    await rest(test);
    const next = await addRead(test, await oneFile('e', 64 * KiB));
    assert.equal(next.addresses[0], stored.addresses[0]);
  });

  it('are not given by a store whose header is of before, until it has said so', async () => {
    const test = await rig();
    await addRead(test, await oneFile('a', 64 * KiB));
    test.loader.close();
    await test.node.store.close();
    const handle = await open(test.node.paths.store, 'r+');
    const block = Buffer.alloc(4096);
    await handle.read(block, 0, 4096, HEADER_ADDRESS);
    const header = JSON.parse(block.toString('latin1').split('\n')[0]!) as Record<string, unknown>;
    assert.equal(header.reuseGeneration, 0);
    delete header.reuseGeneration;
    const json = JSON.stringify(header);
    block.fill(0);
    block.write(`${json}\n${digestOf(json)}\n`, 'latin1');
    await handle.write(block, 0, 4096, HEADER_ADDRESS);
    await test.node.open(EVERYTHING_GOES);
    test.start();
    told(test);
    await drop(test);
    await rest(test);
    await handle.read(block, 0, 4096, HEADER_ADDRESS);
    await handle.close();
    const after = JSON.parse(block.toString('latin1').split('\n')[0]!) as Record<string, unknown>;
    assert.equal(after.reuseGeneration, after.generation);
  });
});

describe('eviction', () => {
  const evictAll = (test: LoaderRig) => test.node.store.evict(GiB);

  it('takes what was not used for longest, punches it, and it is fetched again when it is read', async () => {
    const test = await rig();
    const first = await addRead(test, await oneFile('first', 2 * MiB));
    const second = await addRead(test, await oneFile('second', 2 * MiB));
    const third = await addRead(test, await oneFile('third', 2 * MiB));
    await test.node.store.flush();
    // Used long ago, in this order; but the first was read since, which nobody has told the database.
    for (const [i, { layerId }] of [first, second, third].entries())
      change(
        test,
        `UPDATE chunks SET last_used = ${1000 + i} WHERE id IN (SELECT chunk_id FROM layer_chunks WHERE layer_id = ${layerId})`,
      );
    test.node.store.touched.fill(0);
    await test.mustEqual(first);
    const disk = await test.node.store.diskBytes();
    assert.equal(await test.node.store.evict(3 * MiB), 3 * MiB);
    assert.equal(await mustBeRight(test, first), 32);
    assert.equal(await mustBeRight(test, second), 0);
    assert.equal(await mustBeRight(test, third), 16);
    assert.ok(disk - (await test.node.store.diskBytes()) >= 3 * MiB);
    assert.deepEqual(rows(test, 'SELECT * FROM evicted'), []);
    await test.mustEqual(second);
    await test.restart();
    // It was not flushed since; what was evicted must not be believed.
    for (const stored of [first, second, third]) await test.mustEqual(stored);
  });

  it('leaves what nobody could send again, what is read without us, what was used just now, and what is being read in', async () => {
    const test = await rig();
    const shared = { name: 'shared', content: noise('shared', 100 * KiB) };
    const make = (seed: string) => layerOf([{ name: 'f', content: noise(seed, 200 * KiB) }, shared], sizes);
    const lazy = await addRead(test, await make('lazy'));
    const local = await addRead(test, await make('local'));
    const direct = await addRead(test, await oneFile('direct', 200 * KiB));
    await test.node.store.flush();
    await test.node.store.pin(7, [direct.layerId]);
    change(test, `DELETE FROM sources WHERE layer_id = ${local.layerId}`);
    change(test, `INSERT INTO direct_mounts VALUES (7, '/dev/none', '/none', 0)`);
    const keeper = test.node.store.keepChunks({ scope: '', ...sizes });
    const pieces = await layerOf([{ name: 'f', content: noise('lazy', 200 * KiB) }], sizes);
    const { pieceDigest } = pieces.index.chunks;
    for (let at = 0, i = 0; at < 200 * KiB; at += 64 * KiB, i++) {
      const bytes = noise('lazy', 200 * KiB).subarray(at, at + 64 * KiB);
      const digest = Buffer.from(pieceDigest.subarray(i * 32, i * 32 + 32));
      await keeper.onPiece({ chunk: 0, piece: i, digest, length: bytes.length, parts: [bytes] });
    }
    await keeper.settled();
    assert.equal(await evictAll(test), 0, 'one is being read in, the others must stay');
    await keeper[Symbol.asyncDispose]();
    assert.equal(await evictAll(test), 200 * KiB);
    assert.equal(await mustBeRight(test, local), 6);
    assert.equal(await mustBeRight(test, lazy), 2, 'what it shares with a layer that is only here');
    assert.equal(await mustBeRight(test, direct), 4);
    change(test, 'DELETE FROM direct_mounts');
    assert.equal(await evictAll(test), 200 * KiB);
    const careful = await rig({ keepUsedMs: 10_000 });
    const fresh = await addRead(careful, await oneFile('fresh', 200 * KiB));
    await careful.node.store.flush();
    assert.equal(await evictAll(careful), 0);
    assert.equal(await mustBeRight(careful, fresh), 4);
  });

  it('commits the loss before it punches, and never records it as durable again', async () => {
    const seen: number[] = [];
    let file = '';
    const test = await rig({
      native: nativeWith({
        punchHole: async (fd, offset, length) => {
          const db = new Database(file, { readonly: true });
          seen.push(db.prepare('SELECT count(*) FROM chunks WHERE durable <> 0').pluck().get() as number);
          db.close();
          await native().punchHole(fd, offset, length);
        },
      }),
    });
    file = test.node.paths.indexDb;
    const stored = await addRead(test, await oneFile('a', 900 * KiB));
    await test.node.store.flush();
    // Some of it waits to be recorded once more.
    await test.node.store.evict(64 * KiB);
    await test.mustEqual(stored);
    seen.length = 0;
    assert.ok((await evictAll(test)) > 0);
    assert.ok(seen.length > 0);
    for (const left of seen) assert.equal(left, 0);
    const present = await mustBeRight(test, stored);
    await test.node.store.flush();
    const masks = rows<{ durable: number }>(test, 'SELECT durable FROM chunks').map(({ durable }) => durable);
    const bits = masks.reduce((sum, mask) => sum + mask.toString(2).split('1').length - 1, 0);
    assert.equal(bits, present);
  });

  it('does not take what is just being written, and a write waits for the punch', async () => {
    const order: string[] = [];
    const punching = Promise.withResolvers<void>();
    let slow = false;
    const test = await rig({
      native: nativeWith({
        punchHole: async (fd, offset, length) => {
          if (slow) await punching.promise;
          order.push('punch');
          await native().punchHole(fd, offset, length);
        },
        storePieces: async (job) => {
          order.push('store');
          return await native().storePieces(job);
        },
      }),
    });
    const stored = await addRead(test, await oneFile('a', 64 * KiB));
    await test.node.store.flush();
    order.length = 0;
    slow = true;
    const evicting = evictAll(test);
    while (test.node.store.isPresent(stored.addresses[0]!, 4096))
      await new Promise((resolve) => setTimeout(resolve, 1));
    const reading = test.mustEqual(stored);
    await new Promise((resolve) => setTimeout(resolve, 100));
    assert.deepEqual(order, [], 'the bytes are here, and wait');
    punching.resolve();
    await evicting;
    await reading;
    assert.deepEqual(order, ['punch', 'punch', 'store']);
    assert.equal(await mustBeRight(test, stored), 1);
  });

  it('goes on beside readers of the same pieces, who get every byte', async () => {
    const test = await rig();
    const layers: StoredTestLayer[] = [];
    for (const seed of ['a', 'b', 'c']) layers.push(await addRead(test, await oneFile(seed, 700 * KiB)));
    let reading = true;
    let evicted = 0;
    const evictor = (async () => {
      while (reading) {
        await test.node.store.flush();
        evicted += await test.node.store.evict(300 * KiB);
      }
    })();
    await Promise.all(
      layers.map(async (stored) => {
        for (let i = 0; i < 10 || (evicted < 3 * MiB && i < 1000); i++) await test.mustEqual(stored);
      }),
    );
    reading = false;
    await evictor;
    assert.ok(evicted >= 3 * MiB, `${evicted} bytes were evicted meanwhile`);
    assert.equal((await test.node.store.stats()).damagedReads, 0);
  });

  it('keeps the store within its quota, in the background', async () => {
    const quotaBytes = 2 * MiB;
    const test = await rig({ quotaBytes, flushDelayMs: 1 });
    const layers: StoredTestLayer[] = [];
    for (let i = 0; i < 6; i++) layers.push(await addRead(test, await oneFile(`${i}`, 900 * KiB)));
    const within = async () => {
      const { presentBytes } = await test.node.store.stats();
      return presentBytes <= quotaBytes;
    };
    for (let i = 0; i < 200 && !(await within()); i++) {
      // Only what is durable can go; what comes asks again.
      await new Promise((resolve) => setTimeout(resolve, 25));
      if (i % 20 === 19) await test.mustEqual(layers[i % 6]!);
    }
    assert.ok(await within());
    const { evictedBytes } = await test.node.store.stats();
    assert.ok(evictedBytes >= 3 * MiB);
    for (const stored of layers) await test.mustEqual(stored);
    // One that is too full at its start does the same.
    await test.node.store.flush();
    test.loader.close();
    await test.node.store.close();
    await test.node.open({ ...EVERYTHING_GOES, quotaBytes: MiB });
    for (let i = 0; i < 200 && (await test.node.store.stats()).presentBytes > MiB; i++)
      await new Promise((resolve) => setTimeout(resolve, 25));
    assert.ok((await test.node.store.stats()).presentBytes <= MiB);
    test.start();
  });

  it('makes room on a full disk for what is read, and a read fails where nothing can go', {
    skip: !isRoot() && 'needs root: a disk of its own',
  }, async () => {
    const dir = await mkdtemp(join(tmpdir(), 'small-disk-'));
    undo.push(() => rm(dir, { recursive: true, force: true }));
    await mkdir(join(dir, 'root'));
    execFileSync('truncate', ['-s', '48M', join(dir, 'disk')]);
    execFileSync('mkfs.ext4', ['-q', '-b', '4096', '-m', '0', join(dir, 'disk')]);
    execFileSync('mount', ['-o', 'loop', join(dir, 'disk'), join(dir, 'root')]);
    undo.push(() => execFileSync('umount', [join(dir, 'root')]));
    const test = await rig({ reserveBytes: MiB }, join(dir, 'root', 'node'));
    const here = await addRead(test, await oneFile('here', 4 * MiB));
    await test.node.store.flush();
    const wanted = await oneFile('wanted', 3 * MiB);
    const stored = await test.add(wanted, source(wanted));
    const filler = join(dir, 'root', 'filler');
    const fill = (): void => {
      assert.throws(() => writeFileSync(filler, Buffer.alloc(64 * MiB)), { code: 'ENOSPC' });
      assert.equal(statfsSync(join(dir, 'root')).bavail, 0);
    };
    change(test, 'UPDATE sources SET layer_id = -layer_id');
    fill();
    await assert.rejects(test.mustEqual(stored), code('STORE_FULL'));
    assert.equal(await mustBeRight(test, here), 64);
    await rm(filler);
    change(test, 'UPDATE sources SET layer_id = -layer_id');
    fill();
    // What nobody waits for takes nobody's place, whether its room is counted right or not.
    truncateSync(filler, statSync(filler).size - 2 * MiB);
    {
      await using keeper = test.node.store.keepChunks({ scope: '', ...sizes, requireRoom: async () => {} });
      const tar = tarOf([{ name: 'f', content: noise('background', 3 * MiB) }]);
      await assert.rejects(
        indexOf(tar, { ...sizes, onPiece: keeper.onPiece }).then(() => keeper.settled()),
        code('STORE_FULL'),
      );
    }
    assert.equal(await mustBeRight(test, here), 64);
    fill();
    await new Promise((resolve) => setTimeout(resolve, 1_100)); // The failure is remembered for a second.
    await test.mustEqual(stored);
    assert.equal(await mustBeRight(test, here), 0);
  });
});

describe('what an image needs', () => {
  it('is shared with other images only, not with a part of itself that was mounted before it was here whole', async () => {
    const test = await rig();
    const [a, b, c] = await Promise.all(['a', 'b', 'c'].map(async (seed) => oneFile(seed, 100 * KiB)));
    const [bottom, top, other] = [await addRead(test, a!), await addRead(test, b!), await addRead(test, c!)];
    const { store } = test.node;
    const part = await store.createImage('part', [bottom.layerId]);
    await store.pin(part.id, [bottom.layerId]);
    const whole = await store.createImage('whole', [bottom.layerId, top.layerId], { ahead: true });
    const use = async (): Promise<number[][]> =>
      (await store.imageUse()).map(({ id, totalBytes, sharedBytes }) => [id, totalBytes / KiB, sharedBytes / KiB]);
    assert.deepEqual(await use(), [
      [part.id, 100, 100],
      [whole.id, 200, 0],
    ]);
    await store.unpin(part.id);
    assert.deepEqual(await use(), [[whole.id, 200, 0]]);
    const third = await store.createImage('other', [bottom.layerId, other.layerId]);
    assert.deepEqual(await use(), [
      [whole.id, 200, 100],
      [third.id, 200, 100],
    ]);
    // Pulled by itself: it is an image.
    assert.equal((await store.createImage('part', [bottom.layerId], { ahead: true })).id, part.id);
    assert.deepEqual((await use())[0], [part.id, 100, 100]);
  });
});

describe('a crash', () => {
  it('at any punch or write leaves a store in which what is present is right', async () => {
    const copies: string[] = [];
    let root = '';
    let steps = 0;
    const snap = async (): Promise<void> => {
      if (root !== '' && steps++ % 2 === 0) copies.push(await crashCopy(root));
    };
    const test = await rig({
      native: nativeWith({
        punchHole: async (fd, offset, length) => {
          await snap();
          await native().punchHole(fd, offset, length);
          await snap();
        },
        storePieces: async (job) => {
          const written = await native().storePieces(job);
          await snap();
          return written;
        },
      }),
    });
    const all: StoredTestLayer[] = [];
    const shared = { name: 's', content: noise('shared', 150 * KiB) };
    const make = (seed: string) => layerOf([shared, { name: 'f', content: noise(seed, 400 * KiB) }], sizes);
    for (const seed of ['a', 'b', 'c']) all.push(await addRead(test, await make(seed)));
    await test.node.store.flush();
    root = test.node.root;
    await test.node.store.evict(200 * KiB);
    await test.mustEqual(all[1]!);
    await drop(test, all[1]!, all[2]!);
    await rest(test);
    all.push(await addRead(test, await make('d')));
    await test.node.store.flush();
    await test.node.store.evict(300 * KiB);
    root = '';
    assert.ok(copies.length >= 8, `${copies.length} crashes`);
    let present = 0;
    for (const copy of copies) {
      const after = await rig({}, copy);
      const known = await after.node.store.layers();
      for (const { id, digest } of known) {
        const { layer } = all.find((stored) => stored.layer.id.digest === digest)!;
        const stored = { layer, layerId: id, addresses: await after.node.store.layerAddresses(id) };
        after.layers.set(id, stored);
        after.sources.set(id, source(layer));
        present += await mustBeRight(after, stored);
        await after.mustEqual(stored);
      }
      assert.deepEqual(rows(after, 'SELECT * FROM evicted'), []);
      const { presentBytes } = await after.node.store.stats();
      const { blocks } = await stat(after.node.paths.store);
      // Header, and what a hole of less than a block of the file system cannot free.
      assert.ok(blocks * 512 <= presentBytes + 64 * KiB, 'nothing that was punched or evicted is left on the disk');
    }
    assert.ok(present > 0);
  });

  it('leaves nothing on the disk of chunks whose rows it took, nor of a database that was damaged', async () => {
    const test = await rig();
    const kept = await addRead(test, await layerOf([{ name: 'kept', content: noise('kept', 300 * KiB) }], sizes));
    await addRead(test, await layerOf([{ name: 'gone', content: noise('gone', 900 * KiB) }], sizes));
    await drop(test, kept);
    await rest(test);
    await test.node.store.flush();
    const before = await crashCopy(test.node.root);
    // One takes a range that was free, the other goes upwards.
    for (const bytes of [900, 2500])
      await addRead(test, await layerOf([{ name: 'lost', content: noise(`lost ${bytes}`, bytes * KiB) }], sizes));
    await test.node.store.flush();
    const copy = await crashCopy(test.node.root);
    for (const suffix of ['', '-wal', '-shm'])
      await cp(join(before, `index.db${suffix}`), join(copy, `index.db${suffix}`));
    const onDisk = async (of: LoaderRig): Promise<number> => (await stat(of.node.paths.store)).blocks * 512;
    assert.ok((await stat(join(copy, 'chunks/store'))).blocks * 512 > 3000 * KiB, 'the copy has what was lost');
    const after = await rig({}, copy);
    const { presentBytes } = await after.node.store.stats();
    assert.ok(presentBytes >= 300 * KiB);
    assert.ok((await onDisk(after)) <= presentBytes + 64 * KiB, `${await onDisk(after)} for ${presentBytes}`);
    after.layers.set(kept.layerId, kept);
    after.sources.set(kept.layerId, source(kept.layer));
    await after.mustEqual(kept);
    await after.node.store.close();
    await writeFile(after.node.paths.indexDb, 'no database');
    await after.node.open(EVERYTHING_GOES);
    assert.ok((await onDisk(after)) <= 64 * KiB);
  });
});
