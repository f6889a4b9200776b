import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { DedupError } from '../../src/errors.ts';
import type { MountableLayer } from '../../src/fs/image-metadata.ts';
import { MountTable, type MountTableOptions } from '../../src/fs/mount-table.ts';
import type { MountSpec } from '../../src/fs/transport/transport.ts';
import { RootPaths } from '../../src/paths.ts';
import { MiB, TiB } from '../../src/units.ts';
import { quiet } from '../support/lazy-store.ts';

const layer = (layerId: number): MountableLayer => ({ layerId, digest: `layer ${layerId}`, indexPath: '/none' });

describe('MountTable', () => {
  let root: string;
  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'dedup-mounts-'));
  });
  after(() => rm(root, { recursive: true, force: true }));

  let tables = 0;
  /** A table whose transport mounts nothing and whose builder writes an empty file of `metadataBytes`. */
  function tableWith(options: Partial<MountTableOptions> & { metadataBytes?: number }) {
    const { metadataBytes = 8192, ...rest } = options;
    const specs: MountSpec[] = [];
    const placed: number[] = [];
    const unmounted: string[] = [];
    const ids = new Map<string, number>();
    const table = new MountTable({
      paths: new RootPaths(join(root, String(tables++))),
      transport: {
        mount: async (spec: MountSpec) => void specs.push(spec),
        unmount: async (target: string) => void unmounted.push(target),
      } as unknown as MountTableOptions['transport'],
      layout: 'flat',
      direct: false,
      images: {
        storeBytes: TiB,
        imageFor: async (key) => {
          if (!ids.has(key)) ids.set(key, ids.size + 1);
          return ids.get(key)!;
        },
        layerAddresses: async () => new Float64Array(0),
        checkIndex: async () => {},
        placeMetadata: async (address) => void placed.push(address),
        pin: async () => {},
        unpin: async () => {},
        isForeign: () => false,
        admitDirect: async () => false,
        lookAtDirect: async () => {},
        known: async () => [],
      },
      build: async ({ output }) => {
        await mkdir(dirname(output), { recursive: true });
        await writeFile(output, '');
        await truncate(output, metadataBytes);
        return {} as never;
      },
      log: quiet,
      ...rest,
    });
    return { table, specs, placed, unmounted };
  }

  it('gives no region of the store to an image while a loop device lies over it', async () => {
    const held: number[] = [];
    const { table, specs } = tableWith({ loopOffsets: () => held });
    const free = async (): Promise<void> => void (await table.release(new Set(), () => false));
    await table.mount([layer(1)], true);
    // Detached, but a process still works in it.
    held.push(specs[0]!.flatOffset!);
    await free();
    for (let id = 2; id < 600; id++) {
      await table.mount([layer(id)], true);
      await free();
    }
    assert.deepEqual(
      specs.slice(1).filter(({ flatOffset }) => flatOffset === held[0]),
      [],
    );
  });

  it('refuses metadata that would lie over that of another image', async () => {
    const { table, placed } = tableWith({ metadataBytes: 256 * MiB + 4096 });
    await assert.rejects(
      table.mount([layer(1)], true),
      (error) => error instanceof DedupError && error.code === 'IMAGE_INVALID',
    );
    assert.deepEqual(placed, []);
  });

  it('keeps an image that was idle for long once it is asked for again', async (t) => {
    let now = 0;
    t.mock.method(performance, 'now', () => now);
    const { table, unmounted } = tableWith({ layout: 'device' });
    const image = await table.mount([layer(1)], true);
    await table.release(new Set(), () => true);
    now = 601_000;
    assert.equal(await table.mount([layer(1)], true), image);
    // Its key is not among those in use yet.
    await table.release(new Set(), () => true);
    assert.deepEqual(unmounted, []);
  });
});
