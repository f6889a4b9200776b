import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { afterEach, describe, it } from 'node:test';
import Database from 'better-sqlite3';
import { DedupError } from '../../../src/errors.ts';
import type { ChunkKeeper } from '../../../src/fs/chunks/chunk-keeper.ts';
import { KiB, MiB } from '../../../src/units.ts';
import { indexOf } from '../../support/build-index.ts';
import { nativeWith, noise, prose, TestStore } from '../../support/lazy-store.ts';
import { tarOf } from '../../support/tar.ts';

const sizes = { chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;
const rigs: TestStore[] = [];

afterEach(async () => {
  for (const made of rigs.splice(0)) await made.remove();
});

async function rig(...args: Parameters<typeof TestStore.create>): Promise<TestStore> {
  const made = await TestStore.create(...args);
  rigs.push(made);
  return made;
}

/** Files of every kind of size: small ones, some of several chunks, one whose end is the end of a piece and of a chunk. */
const contents: readonly Buffer[] = [
  ...Array.from({ length: 40 }, (_, i) => prose(`small${i}`, 50 + i * 977)),
  noise('large', 3 * 512 * 1024 + 12_345),
  noise('whole pieces', 7 * 64 * 1024),
  noise('whole chunks', 2 * 512 * 1024),
  Buffer.alloc(700_000),
  Buffer.concat([Buffer.alloc(512 * 1024), noise('behind a hole', 1000)]),
  noise('whole pieces', 7 * 64 * 1024),
];

function layer(files = contents): Buffer {
  return tarOf(files.map((content, i) => ({ name: `f${i}`, content })));
}

const UNCOUNTED = `SELECT (SELECT count(*) FROM chunks WHERE ref_count = 0) + (SELECT count(*) FROM held_chunks)`;
const ALL = `SELECT (SELECT count(*) FROM chunks) + (SELECT count(*) FROM held_chunks)`;

function count(test: TestStore, sql: string): number {
  const db = new Database(test.paths.indexDb, { readonly: true });
  try {
    return db.prepare(sql).pluck().get() as number;
  } finally {
    db.close();
  }
}

const unreferenced = (test: TestStore): number => count(test, UNCOUNTED);
const chunkCount = (test: TestStore): number => count(test, ALL);

async function read(keeper: ChunkKeeper, bytes: Buffer) {
  const built = await indexOf(bytes, { ...sizes, onPiece: keeper.onPiece, bufferBytes: 50_000 });
  await keeper.settled();
  return built;
}

/** Adds the layer that was read, and checks every chunk of it in the store against the tar. */
async function addAndCheck(test: TestStore, bytes: Buffer, built: Awaited<ReturnType<typeof read>>): Promise<void> {
  const { index, indexBlob } = built;
  const { store } = test;
  const { addresses } = await store.addLayer(index, {
    scope: '',
    indexDigest: `sha256:${createHash('sha256').update(indexBlob).digest('hex')}`,
    sources: [],
    trust: 'local',
    contiguousFiles: false,
  });
  const { chunks } = index;
  for (let i = 0; i < chunks.count; i++) {
    const length = chunks.length[i]!;
    if (chunks.zero[i] === 1) continue;
    assert.ok(store.isPresent(addresses[i]!, length), `chunk ${i} is here`);
    const target = Buffer.alloc(Math.ceil(length / 4096) * 4096);
    await store.read(target, 0, target.length, addresses[i]!);
    const offset = chunks.tarOffset[i]!;
    assert.deepEqual(target.subarray(0, length), bytes.subarray(offset, offset + length), `chunk ${i}`);
  }
}

describe('ChunkKeeper', () => {
  it('has every chunk of a layer in the store when the layer is added, holes excepted', async () => {
    const test = await rig();
    const bytes = layer();
    await using keeper = test.store.keepChunks({ scope: '', ...sizes });
    const built = await read(keeper, bytes);
    assert.equal(chunkCount(test), unreferenced(test), 'no layer counts them yet');
    await addAndCheck(test, bytes, built);
    assert.equal(unreferenced(test), 0);
    await keeper[Symbol.asyncDispose]();
    await test.store.flush();
    await test.store.close();
    await test.open();
    await addAndCheck(test, bytes, built);
  });

  it('writes nothing twice: what another layer brought is only counted', async () => {
    const test = await rig();
    await using first = test.store.keepChunks({ scope: '', ...sizes });
    await addAndCheck(test, layer(), await read(first, layer()));
    const bytes = layer([...contents, noise('new', 100_000)]);
    const before = (await test.store.stats()).storedBytes;
    await using second = test.store.keepChunks({ scope: '', ...sizes });
    await addAndCheck(test, bytes, await read(second, bytes));
    assert.equal((await test.store.stats()).storedBytes - before, Math.ceil(100_000 / 4096) * 4096);
    assert.equal(second.storedBytes, 100_000);
  });

  it('frees the chunks of a layer that was given up, but not those that another one is being read with', async () => {
    const test = await rig();
    const { store } = test;
    const shared = contents.slice(0, 20);
    await using other = store.keepChunks({ scope: '', ...sizes });
    const built = await read(other, layer(shared));
    const given = store.keepChunks({ scope: '', ...sizes });
    await read(given, layer());
    await given[Symbol.asyncDispose]();
    assert.equal(chunkCount(test), shared.length);
    await addAndCheck(test, layer(shared), built);
    assert.equal(
      (await store.stats()).presentBytes,
      shared.reduce((sum, { length }) => sum + Math.ceil(length / 4096) * 4096, 0),
    );
  });

  it('keeps what it holds when the only layer that counted it is dropped', async () => {
    const test = await rig();
    const { store } = test;
    const first = store.keepChunks({ scope: '', ...sizes });
    await addAndCheck(test, layer(), await read(first, layer()));
    await first[Symbol.asyncDispose]();
    const bytes = layer([...contents, noise('new', 100_000)]);
    await using second = store.keepChunks({ scope: '', ...sizes });
    const built = await read(second, bytes);
    assert.equal((await store.retainLayers([])).length, 1);
    await addAndCheck(test, bytes, built);
    assert.equal(unreferenced(test), 0);
  });

  it('gives a layer that is added meanwhile the chunks it holds, with what is durable of them', async () => {
    const test = await rig();
    const keeper = test.store.keepChunks({ scope: '', ...sizes });
    await read(keeper, layer());
    await test.store.flush();
    const bytes = layer(contents.slice(0, 45));
    await addAndCheck(test, bytes, await indexOf(bytes, sizes));
    await keeper[Symbol.asyncDispose]();
    assert.equal(unreferenced(test), 0, 'what only the keeper held is gone');
    const present = (await test.store.stats()).presentBytes;
    assert.ok(present > 0);
    await test.store.close();
    await test.open();
    assert.equal((await test.store.stats()).presentBytes, present, 'it was recorded as durable before it had a row');
    await addAndCheck(test, bytes, await indexOf(bytes, sizes));
  });

  it('gives held chunks that a layer counted and let go to the layer they are held for', async () => {
    const test = await rig();
    const { store } = test;
    await using keeper = store.keepChunks({ scope: '', ...sizes });
    const built = await read(keeper, layer());
    const other = layer(contents.slice(0, 45));
    await addAndCheck(test, other, await indexOf(other, sizes));
    assert.equal((await store.retainLayers([])).length, 1);
    await addAndCheck(test, layer(), built);
    assert.equal(unreferenced(test), 0);
  });

  it('frees at the next start what a killed process held', async () => {
    const test = await rig();
    const keeper = test.store.keepChunks({ scope: '', ...sizes });
    await read(keeper, layer());
    await test.store.flush();
    assert.ok(unreferenced(test) > 0);
    await test.store.close();
    await test.open();
    assert.equal(chunkCount(test), 0);
    assert.equal((await test.store.stats()).presentBytes, 0);
  });

  it('tells a failed write by the next piece, and at the end', async () => {
    const failing = nativeWith({
      storePieces: () => Promise.reject(new DedupError('STORE_FULL', 'the disk is full')),
    });
    const test = await rig({ native: failing });
    await using keeper = test.store.keepChunks({ scope: '', ...sizes });
    const full = (error: unknown) => error instanceof DedupError && error.code === 'STORE_FULL';
    await assert.rejects(indexOf(layer([noise('much', 12 * MiB)]), { ...sizes, onPiece: keeper.onPiece }), full);
    await assert.rejects(keeper.settled(), full);
  });
});
