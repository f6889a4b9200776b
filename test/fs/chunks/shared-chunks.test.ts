// Big files across versions: what did not change at its place is one chunk of the store, whichever layer brings it.
import assert from 'node:assert/strict';
import { stat } from 'node:fs/promises';
import { afterEach, before, describe, it } from 'node:test';
import Database from 'better-sqlite3';
import { BLOCK_BYTES, KiB, MiB } from '../../../src/units.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  noise,
  type StoredTestLayer,
  type TestLayer,
} from '../../support/lazy-store.ts';

const CHUNK_BYTES = 4 * MiB;
const FILE_BYTES = 20 * MiB;
/** Extents of the file, as file systems count them to it. */
const SLACK_BYTES = 256 * KiB;

interface ChunkRow {
  readonly id: number;
  readonly size: number;
  readonly refs: number;
}

const rigs: LoaderRig[] = [];
afterEach(async () => {
  for (const rig of rigs.splice(0)) await rig.remove();
});

function chunkRows(rig: LoaderRig): ChunkRow[] {
  const db = new Database(rig.node.paths.indexDb, { readonly: true });
  try {
    return db.prepare<[], ChunkRow>('SELECT id, size, ref_count AS refs FROM chunks ORDER BY id').all();
  } finally {
    db.close();
  }
}

async function storeDisk(rig: LoaderRig): Promise<number> {
  return (await stat(rig.node.paths.store)).blocks * 512;
}

describe('a big file that changed in one place', () => {
  let layers: [TestLayer, TestLayer];

  before(async () => {
    const content = noise('model', FILE_BYTES);
    const changed = Buffer.from(content);
    changed.fill('changed', 2 * CHUNK_BYTES + 1_234_567, 2 * CHUNK_BYTES + 1_234_600);
    layers = [
      await layerOf([{ name: 'model.bin', content }]),
      await layerOf([{ name: 'model.bin', content: changed }]),
    ];
  });

  async function stored(
    rig: LoaderRig,
  ): Promise<{ first: StoredTestLayer; second: StoredTestLayer; blobs: MemoryBlobs }> {
    const blobs = new MemoryBlobs(...layers);
    const sources = [{ host: 'registry', reader: blobs }];
    return { first: await rig.add(layers[0], sources), second: await rig.add(layers[1], sources), blobs };
  }

  it('shares every other chunk of 4 MiB with its earlier version: rows, disk and wire', async () => {
    const rig = await LoaderRig.create();
    rigs.push(rig);
    const empty = await storeDisk(rig);
    const { first, second, blobs } = await stored(rig);

    const shared = [...first.addresses].map((address, chunk) => address === second.addresses[chunk]);
    assert.deepEqual(shared, [true, true, false, true, true]);
    const rows = chunkRows(rig);
    assert.deepEqual(
      rows.map(({ size, refs }) => [size, refs]),
      [2, 2, 1, 2, 2, 1].map((refs) => [CHUNK_BYTES, refs]),
    );
    assert.deepEqual(
      rows.map(({ id }) => id * BLOCK_BYTES),
      [...first.addresses, second.addresses[2]],
    );

    await rig.mustEqual(first);
    const ofFirst = await storeDisk(rig);
    assert.ok(ofFirst - empty >= FILE_BYTES && ofFirst - empty < FILE_BYTES + SLACK_BYTES, `${ofFirst - empty}`);

    blobs.requests.length = 0;
    await rig.mustEqual(second);
    const ofSecond = (await storeDisk(rig)) - ofFirst;
    assert.ok(ofSecond >= CHUNK_BYTES && ofSecond < CHUNK_BYTES + SLACK_BYTES, `${ofSecond}`);
    // Its spans of 1 MiB, and one at each edge that holds a part of it.
    assert.ok(blobs.bytes >= CHUNK_BYTES && blobs.bytes < CHUNK_BYTES + 3 * MiB, `${blobs.bytes}`);
    assert.ok(blobs.requests.every(({ digest }) => digest === second.layer.id.digest));
  });

  it('keeps the shared chunks when the earlier version goes', async () => {
    const rig = await LoaderRig.create();
    rigs.push(rig);
    const { first, second, blobs } = await stored(rig);
    await rig.mustEqual(first);
    await rig.mustEqual(second);
    assert.deepEqual(await rig.node.store.retainLayers([second.layerId]), [first.layerId]);
    assert.deepEqual(
      chunkRows(rig).map(({ refs }) => refs),
      [1, 1, 1, 1, 1],
    );
    blobs.requests.length = 0;
    await rig.mustEqual(second);
    assert.deepEqual(blobs.requests, []);
  });
});
