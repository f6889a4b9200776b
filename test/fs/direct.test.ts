// Images that are here completely are read from the store without dedupd: at the mount, or from when they have become
// complete, by readers that notice nothing, for as long as they read. Real FUSE, loop devices and EROFS; both layouts.
import assert from 'node:assert/strict';
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline/promises';
import type { Readable, Writable } from 'node:stream';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import Database from 'better-sqlite3';
import { parseConfig } from '../../src/config.ts';
import { DataPlane } from '../../src/fs/data-plane.ts';
import type { ErofsLayoutKind } from '../../src/fs/transport/transport.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { MiB } from '../../src/units.ts';
import { run, unmountBelow, waitFor } from '../support/containerd.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { noise } from '../support/lazy-node.ts';
import { quiet } from '../support/lazy-store.ts';
import { devicesOfStore, storeIdOf } from '../support/loop-names.ts';
import { PROGRAM } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

/** A process that works in a directory and reads its files, past the page cache, when told to. */
class Reader {
  readonly #child: ChildProcessByStdio<Writable, Readable, null>;
  readonly #lines: AsyncIterator<string>;

  constructor(directory: string) {
    const script = `while read name; do
      dd if="$name" iflag=nocache count=0 2>/dev/null; sha256sum < "$name" 2>&1 || echo failed; done`;
    this.#child = spawn('sh', ['-c', script], { cwd: directory, stdio: ['pipe', 'pipe', 'inherit'] });
    this.#lines = createInterface({ input: this.#child.stdout })[Symbol.asyncIterator]();
  }

  async sum(name: string): Promise<string> {
    this.#child.stdin.write(`${name}\n`);
    return String((await this.#lines.next()).value).split(' ')[0]!;
  }

  async end(): Promise<void> {
    const ended = new Promise((resolve) => this.#child.once('exit', resolve));
    this.#child.stdin.end();
    await ended;
  }
}

const FILES = new Map<string, Buffer>([
  ['first', noise(3 * MiB + 5, 'first')],
  ['second', noise(2 * MiB, 'second')],
  ['small', Buffer.from('a few bytes\n')],
  ['zeros', Buffer.alloc(MiB)],
  ['last', noise(2 * MiB + 99, 'last')],
]);
const SUMS = new Map([...FILES].map(([name, content]) => [name, createHash('sha256').update(content).digest('hex')]));

let registry: RegistryProcess;
let layout: string;
before(async () => {
  registry = await RegistryProcess.start();
  const entries = [...FILES].map(([name, content]) => ({ name, content }));
  const image = await makeImage({ layers: [{ entries: entries.slice(0, 2) }, { entries: entries.slice(2) }] });
  layout = image.dir;
  const pushed = await pushLayout(image.dir, image.tag, registry.host, 'files', 'plain');
  await run(PROGRAM, ['index', pushed, '--annotate', `${registry.host}/files:lazy`]);
});
after(async () => {
  await registry?.stop();
  await rm(layout, { recursive: true, force: true });
});

for (const kind of ['device', 'flat'] as const satisfies ErofsLayoutKind[]) {
  describe(`an image that is here completely, ${kind} layout`, () => {
    let dir: string;
    let paths: RootPaths;
    let storeId: string;
    let plane: DataPlane | undefined;
    let reader: Reader | undefined;

    async function open(config: Record<string, unknown> = {}): Promise<DataPlane> {
      plane = await DataPlane.open({
        // Nothing is fetched but what is read.
        config: parseConfig({
          root: paths.root,
          chunk_size: MiB,
          transport: 'fuse',
          prefetch: { enabled: false },
          ...config,
        }),
        paths,
        run: new RunPaths(join(dir, 'run')),
        log: quiet,
        layout: kind,
      });
      return plane;
    }

    before(async () => {
      dir = await mkdtemp(join(tmpdir(), 'direct-'));
      paths = new RootPaths(join(dir, 'root'));
      await mkdir(join(dir, 'mnt'));
      await mkdir(paths.root);
      await open();
      storeId = await storeIdOf(paths);
    });
    after(async () => {
      await reader?.end();
      await plane?.close();
      await unmountBelow(dir);
      await rm(dir, { recursive: true, force: true });
    });

    const directory = () => join(dir, 'mnt');
    async function mount(): Promise<void> {
      const request = {
        reference: `${registry.host}/files:lazy`,
        directory: directory(),
        platform: '',
        credentials: '',
      };
      await plane!.mountReference(request, () => {}, AbortSignal.timeout(60_000));
    }
    const transports = async () => (await plane!.listImages()).map(({ transport }) => transport);

    /** The numbers of images that index.db has in `table`. */
    function images(table: 'direct_mounts' | 'pins'): number[] {
      const db = new Database(paths.indexDb, { readonly: true });
      try {
        return db.prepare(`SELECT DISTINCT mount_id FROM ${table}`).pluck().all() as number[];
      } finally {
        db.close();
      }
    }

    function freed(): unknown[] {
      const db = new Database(paths.indexDb, { readonly: true });
      try {
        return db.prepare('SELECT DISTINCT state FROM freed').pluck().all();
      } finally {
        db.close();
      }
    }

    async function readAll(by: Reader): Promise<void> {
      for (const [name, sum] of SUMS) assert.equal(await by.sum(name), sum, name);
    }

    it('is read through dedupd while a piece is missing, and not any more from when it has come, as readers go on', async () => {
      await mount();
      assert.deepEqual(await transports(), ['fuse']);
      reader = new Reader(directory());
      for (const [name, sum] of [...SUMS].slice(0, -1)) assert.equal(await reader.sum(name), sum, name);
      await sleep(2_500); // It has been looked at least once whether that is all.
      assert.deepEqual([await transports(), images('direct_mounts')], [['fuse'], []]);

      const others = [1, 2, 3].map(() => new Reader(directory()));
      let goesOn = true;
      const rounds = others.map(() => 0);
      const reading = Promise.all(
        others.map(async (other, i) => {
          while (goesOn) {
            for (const name of ['first', 'second', 'small', 'zeros']) {
              assert.equal(await other.sum(name), SUMS.get(name), name);
            }
            rounds[i]!++;
          }
        }),
      );
      reading.catch(() => undefined); // Awaited below.
      const further = async () => {
        const reached = rounds.map((round) => round + 2);
        await waitFor('readers', () => rounds.every((round, i) => round >= reached[i]!));
      };
      try {
        await further();
        assert.equal(await reader.sum('last'), SUMS.get('last'));
        await waitFor('the switch', async () => (await transports())[0] === 'direct');
        await further();
      } finally {
        goesOn = false;
        await reading.finally(() => Promise.all(others.map((other) => other.end())));
      }
    });

    it('costs dedupd nothing then, and has a row and pins', async () => {
      const before = await plane!.stats();
      await readAll(reader!);
      const after = await plane!.stats();
      assert.deepEqual([after.hits, after.misses], [before.hits, before.misses]);
      assert.equal(images('direct_mounts').length, 1);
      assert.deepEqual(images('pins'), images('direct_mounts'));
    });

    it('is read on when dedupd has ended, and by the next one is kept as long as anybody reads', async () => {
      await plane!.close();
      await readAll(reader!);
      const [image] = images('direct_mounts');
      assert.notEqual(image, undefined);

      await open();
      await readAll(reader!);
      assert.deepEqual(images('direct_mounts'), [image]);
      assert.equal((await plane!.retainLayers([])).dropped, 0, 'nothing of it is dropped');
      assert.deepEqual(images('pins'), [image]);

      await reader!.end();
      reader = undefined;
      await waitFor('the devices to go', async () => (await devicesOfStore(storeId)).length === 0);
      assert.deepEqual(images('direct_mounts'), [image], 'nobody has looked');
      await plane!.releaseImages([]);
      assert.deepEqual([images('direct_mounts'), images('pins')], [[], []]);
    });

    it('is read from the store at once when it is mounted, and row, pins and devices go with its mount', async () => {
      await mount();
      assert.deepEqual(await transports(), ['direct']);
      assert.deepEqual([images('direct_mounts').length, images('pins').length], [1, 1]);
      const before = await plane!.stats();
      const again = new Reader(directory());
      await readAll(again);
      await again.end();
      assert.equal((await plane!.stats()).hits, before.hits);
      await plane!.unmountReference(directory());
      assert.deepEqual([images('direct_mounts'), images('pins'), await devicesOfStore(storeId)], [[], [], []]);
    });

    it('is read through dedupd all the same if the configuration says so', async () => {
      await plane!.close();
      await open({ direct_mounts: false });
      await mount();
      assert.deepEqual(await transports(), ['fuse']);
      const by = new Reader(directory());
      await readAll(by);
      const { hits } = await plane!.stats();
      await readAll(by);
      assert.ok((await plane!.stats()).hits > hits, 'each time anew');
      await by.end();
      assert.deepEqual(images('direct_mounts'), []);
      await plane!.unmountReference(directory());
    });

    it('is never freed under a reader, nor taken for another, when index.db is lost', async () => {
      await plane!.close();
      await open();
      await mount();
      assert.deepEqual(await transports(), ['direct']);
      reader = new Reader(directory());
      const [image] = images('direct_mounts');
      await plane!.close();
      await rm(paths.indexDb);
      await open();
      await mount();
      assert.deepEqual(await transports(), ['fuse'], 'nothing is known to be here');
      const by = new Reader(directory());
      await readAll(by);
      await waitFor('the other image to be direct', async () => (await transports())[0] === 'direct');
      assert.equal(images('direct_mounts').includes(image!), false);
      await by.end();
      await plane!.unmountReference(directory());
      assert.equal((await plane!.retainLayers([])).dropped, 2);
      await plane!.close();
      await open();
      assert.deepEqual(freed(), ['to-punch'], 'nothing is given back');
      await readAll(reader);

      await reader.end();
      reader = undefined;
      await plane!.releaseImages([]);
      assert.deepEqual(freed(), ['quarantine']);
    });
  });
}
