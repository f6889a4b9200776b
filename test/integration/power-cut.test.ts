// The machine loses power during fills, removals and commits: for many moments, the disk as it may be then. What the node
// store serves afterwards is right, what it calls present is there, and the databases open.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import Database from 'better-sqlite3';
import { errorCode } from '../../src/errors.ts';
import { openMetastore } from '../../src/snapshotter/metastore-client.ts';
import { KiB } from '../../src/units.ts';
import { LoaderRig, layerOf, MemoryBlobs, prose, type StoredTestLayer, type TestLayer } from '../support/lazy-store.ts';
import { seededRandom } from '../support/random-layers.ts';
import { RecordingDisk } from '../support/recording-disk.ts';

const CUTS = Number(process.env.POWER_CUTS ?? 25);
const SEED = Number(process.env.POWER_CUT_SEED ?? 20261127);
const sizes = { spanBytes: 128 * KiB, chunkBytes: 512 * KiB, pieceBytes: 64 * KiB } as const;

describe('a power cut', () => {
  let disk: RecordingDisk;
  const layers = new Map<string, TestLayer>();

  before(async () => {
    disk = await RecordingDisk.create(256);
    for (const name of ['a', 'b', 'c', 'd']) {
      const files = Array.from({ length: 12 }, (_, i) => ({
        name: `f${i}`,
        content: prose(`${name}${i}`, 77 + i * 63_456),
      }));
      const layer = await layerOf(files, sizes);
      layers.set(layer.id.digest, layer);
    }
    await work(disk.mountPoint);
    await disk.stop();
  });
  after(() => disk?.remove());

  /** Fills, removes and commits, with flushes of their own accord as well as asked for. */
  async function work(root: string): Promise<void> {
    const registry = new MemoryBlobs(...layers.values());
    const rig = await LoaderRig.create({}, { flushDelayMs: 20, reserveBytes: 256 * KiB }, root);
    const metastore = await openMetastore(join(root, 'metadata.db'));
    const stored: StoredTestLayer[] = [];
    let id = 0;
    for (const layer of [...layers.values(), ...layers.values()]) {
      const added = await rig.add(layer, [{ host: 'one', reader: registry }]);
      stored.push(added);
      for (const { name } of layer.files) {
        assert.ok((await rig.readFile(added, name)).length > 0);
        id++;
        await metastore.insert({ id, name: `key-${id}`, kind: 'active', parent: '', labels: {}, lowers: [] });
        await metastore.commit(`key-${id}`, `name-${id}`, {});
      }
      // What the kernel does twice a minute.
      if (stored.length % 2 === 1) execFileSync('sync', ['-f', root]);
      if (stored.length % 2 === 0) await rig.node.store.flush();
      // Two layers go; when they come again they get other addresses.
      if (stored.length % 3 === 0) {
        const gone = stored.slice(-3, -1).map(({ layerId }) => layerId);
        rig.loader.forget(await rig.node.store.retainLayers((layerId) => !gone.includes(layerId)));
      }
    }
    await metastore.close();
    rig.loader.close();
    await rig.node.store.close();
  }

  test(`at ${CUTS} moments: nothing wrong is served, and what is called present is there`, async (t) => {
    const random = seededRandom(SEED);
    const seen = { present: 0, absent: 0, layers: 0, snapshots: 0 };
    for (let cut = 0; cut < CUTS; cut++) {
      const moment = random(1_000_000) / 1_000_000;
      await disk.afterPowerCut(moment, random, async (root) => {
        const where = `seed ${SEED}, cut ${cut} at ${moment}`;
        const rig = await LoaderRig.create({}, { reserveBytes: 256 * KiB }, root);
        try {
          for (const { id, digest } of await rig.node.store.layers()) {
            const layer = layers.get(digest);
            assert.ok(layer !== undefined, where);
            const stored = { layer, layerId: id, addresses: await rig.node.store.layerAddresses(id) };
            rig.layers.set(id, stored);
            seen.layers++;
            // Without a registry: every file is right, or it is an error.
            rig.sources.set(id, [{ host: 'none', reader: new MemoryBlobs() }]);
            for (const { name, content } of layer.files) {
              try {
                assert.ok((await rig.readFile(stored, name)).equals(content), `${where}: ${name} is wrong`);
                seen.present++;
              } catch (error) {
                assert.equal(errorCode(error), 'REGISTRY_NOT_FOUND', `${where}: ${String(error)}`);
                seen.absent++;
              }
            }
            rig.sources.set(id, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
          }
          // The flush came before the record: no sum had to tell.
          assert.equal((await rig.node.store.stats()).damagedReads, 0, where);
        } finally {
          await rig.remove().catch(async () => await rig.node.store.close());
        }
      });
      await disk.afterPowerCut(moment, random, async (root) => {
        const file = join(root, 'metadata.db');
        await (await openMetastore(file)).close();
        const db = new Database(file, { readonly: true });
        assert.equal(db.pragma('integrity_check', { simple: true }), 'ok');
        const names = db.prepare('SELECT name FROM snapshots ORDER BY id').pluck().all() as string[];
        db.close();
        // The last ones may be missing, none before them.
        const expected = names.map(
          (name, i) => `${i === names.length - 1 && name.startsWith('key') ? 'key' : 'name'}-${i + 1}`,
        );
        assert.deepEqual(names, expected);
        seen.snapshots += names.length;
      });
    }
    t.diagnostic(JSON.stringify({ ...disk.recorded, ...seen }));
    assert.ok(
      seen.present > 0 && seen.absent > 0 && seen.layers > CUTS / 2 && seen.snapshots > 0,
      JSON.stringify(seen),
    );
  });
});
