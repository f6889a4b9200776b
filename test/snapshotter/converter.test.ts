// Conversions of ordinary layers: which are converted and in which order, what a failure, a pause, a restart and a dedupd
// that is away or forgets do, and what containerd sees of it.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { pino } from 'pino';
import { digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { ServiceClient } from '../../src/snapshotter/service-client.ts';
import { refused } from '../suites/snapshotter.ts';
import { run, waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { chainOf, commitByHand, lowersOf, unpack, unpackLabels } from '../support/ordinary-layers.ts';
import { TestService, type TestServiceOptions } from '../support/snapshots-service.ts';

describe('ordinary layers are converted', () => {
  let dir: string;
  let images: FakeImages;
  let options: TestServiceOptions & { boot: string };
  let service: TestService;
  let lines: { msg: string }[];

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'convert-'));
    images = new FakeImages(dir);
    lines = [];
    const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
    options = { images, log, boot: 'first boot', convert: { delayMs: 5, retryMs: 5 } };
    service = await TestService.start(options);
  });
  afterEach(async () => {
    await service.stop();
    await rm(dir, { recursive: true });
  });

  const idOf = async (name: string): Promise<number> => (await service.metastore.get(name)).id;
  const isConverted = async (name: string) => (await service.metastore.get(name)).conversion === 'done';
  const converted = (name: string) => waitFor(`the conversion of ${name}`, () => isConverted(name));
  /** Its image was made, too: the directory may go. */
  const proven = (name: string) =>
    waitFor(`the image of ${name}`, async () => (await service.metastore.get(name)).directory === 'waits');
  const status = () => service.snapshotter.converter.status();
  /** Lower directories of a new key; snapshots by name, merged images as "image". */
  async function below(key: string, parent: string): Promise<string[]> {
    const found: string[] = [];
    for (const path of lowersOf(await service.client.prepare(key, parent))) {
      const id = /snapshots\/(\d+)\/fs$/.exec(path)?.[1];
      found.push(id === undefined ? 'image' : ((await service.metastore.byId(Number(id)))?.name ?? ''));
    }
    return found;
  }

  test('what lies below comes first, and dedupd is told what the labels say', async () => {
    images.down = true;
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    const other = await unpack(service.client, 'other', '', {});
    const c = await unpack(service.client, 'c', b);
    images.down = false;
    await converted(c);
    assert.deepEqual(
      images.converted.map(({ directory }) => directory),
      await Promise.all([a, b, other, c].map(async (name) => service.paths.snapshotFs(await idOf(name)))),
    );
    const [bottom, above, plain] = images.converted;
    assert.deepEqual(bottom, {
      snapshot: await idOf(a),
      directory: service.paths.snapshotFs(await idOf(a)),
      bottom: true,
      layer: digestOf('a'),
      manifest: digestOf('manifest'),
      sources: [{ host: 'registry.test', repository: 'app' }],
      namespace: 'ns',
      chainId: chainOf('a'),
      parentChainId: '',
      bytes: (await service.metastore.get(a)).usage?.bytes,
    });
    assert.equal(above?.bottom, false);
    assert.deepEqual([plain?.layer, plain?.manifest, plain?.sources], ['', '', []]);
    // The image of each whole chain is built ahead, once.
    await waitFor('the last image', () => images.prebuilt.length === 2);
    assert.deepEqual(images.prebuilt, [
      [digestOf(`directory ${await idOf(other)}`)],
      ['a', 'b', 'c'].map((name) => digestOf(name)),
    ]);
    assert.deepEqual(await service.metastore.sources(digestOf('a')), bottom?.sources);
    assert.deepEqual(await below('key', c), ['image']);
    assert.deepEqual((await readdir(join(dir, 'mounts/1'))).sort(), ['a', 'b', 'c']);
  });

  test('the image is built ahead when the layer that was missing is not the top one', async () => {
    const bottom = await commitByHand(service.client, 'bottom', '');
    const top = await unpack(service.client, 'top', bottom);
    await converted(top);
    assert.deepEqual(images.prebuilt, []);
    options.boot = 'second boot';
    await service.restart();
    await converted(bottom);
    await waitFor('the image', () => images.prebuilt.length > 0);
    assert.deepEqual(images.prebuilt, [[digestOf(`directory ${await idOf(bottom)}`), digestOf('top')]]);
  });

  test('a key keeps the directories it was given, a new one gets the layer', async () => {
    images.down = true;
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    const before = await service.client.prepare('before', b);
    const view = await service.client.view('view', a);
    images.down = false;
    await converted(b);
    assert.deepEqual(await service.client.mounts('before'), before);
    assert.deepEqual(await service.client.mounts('view'), view);
    assert.deepEqual(await below('after', b), ['image']);
    assert.deepEqual((await service.client.view('view after', a))[0]?.options, ['ro', 'rbind']);
    await service.restart();
    assert.deepEqual(await service.client.mounts('before'), before);
  });

  test('what was committed by hand is converted in another boot only, an unpack at once', async () => {
    const base = await unpack(service.client, 'base');
    const hand = await commitByHand(service.client, 'hand', base);
    const above = await unpack(service.client, 'above', hand);
    await converted(above);
    await service.restart();
    await service.client.prepare('key', above);
    assert.deepEqual(images.converted.map(({ snapshot }) => snapshot).sort(), [await idOf(base), await idOf(above)]);
    const { pending, later, done } = await status();
    assert.deepEqual({ pending, later, done }, { pending: 0, later: 1, done: 2 });
    assert.deepEqual(await below('mixed', above), ['image', hand, 'image']);
    options.boot = 'second boot';
    await service.restart();
    await converted(hand);
    assert.deepEqual(await below('whole', above), ['image']);
  });

  test('changes on top of a converted layer are made and committed as before', async () => {
    const a = await unpack(service.client, 'a');
    await converted(a);
    const hand = await commitByHand(service.client, 'changed', a);
    assert.deepEqual(await below('key', hand), [hand, 'image']);
    assert.deepEqual(
      lowersOf(await service.client.view('view', hand)).map((path) => path.startsWith(service.paths.snapshots)),
      [true, false],
    );
    await service.client.remove('key');
    await service.client.remove('view');
    await service.client.remove(hand);
    await service.client.remove(a);
    assert.deepEqual(await service.client.names(), []);
  });

  test('a second namespace adopts a converted layer, and its source is kept', async () => {
    const a = await unpack(service.client, 'a');
    await converted(a);
    const labels = { ...unpackLabels('a'), 'containerd.io/snapshot/cri.image-ref': 'mirror.test/copy:2' };
    await refused(service.client.prepare('other/9/extract', '', labels), 'alreadyExists');
    assert.deepEqual(await service.client.names(`labels."containerd.io/snapshot.ref"==${chainOf('a')},parent==""`), [
      a,
    ]);
    assert.equal((await service.metastore.sources(digestOf('a'))).length, 2);
    // One that is known by another digest here is not had from there.
    const recompressed = { ...labels, 'containerd.io/snapshot/cri.layer-digest': digestOf('recompressed') };
    await refused(service.client.prepare('third/9/extract', '', recompressed), 'alreadyExists');
    assert.equal((await service.metastore.sources(digestOf('a'))).length, 2);
    await service.client.cleanup();
    assert.deepEqual(images.retained.at(-1), [digestOf('a')]);
  });

  test('Usage answers the same before and after, asked or not, and from a rebuilt metadata.db', async () => {
    images.down = true;
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    const du = async (name: string) => {
      const path = service.paths.snapshotFs(await idOf(name));
      const words = async (flag: string) => Number((await run('du', ['-s', flag, path])).stdout.split('\t')[0]);
      return { size: await words('-B1'), inodes: await words('--inodes') };
    };
    const wanted = [await du(a), await du(b)];
    assert.deepEqual(await service.client.usage(a), wanted[0]);
    const usages = async () => [await service.client.usage(a), await service.client.usage(b)];
    images.down = false;
    await converted(b);
    assert.deepEqual(await usages(), wanted);
    // Mounts of others on this machine may name directories as relative as these.
    await waitFor('its directory to go', async () => {
      await service.client.cleanup();
      return !existsSync(service.paths.snapshotFs(await idOf(a)));
    });
    assert.deepEqual(await usages(), wanted);
    await service.down();
    for (const suffix of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + suffix, { force: true });
    await service.up();
    assert.deepEqual(await usages(), wanted);
  });

  test('a restart in the middle starts the conversion over', async () => {
    const begun = Promise.withResolvers<void>();
    const progress = { bytes: 700, entries: 3, total: 900, held: '' };
    images.whileConverting = async (_args, onProgress, signal) => {
      onProgress(progress);
      begun.resolve();
      await new Promise((_, reject) => signal.addEventListener('abort', () => reject(new Error('ended'))));
    };
    const a = await unpack(service.client, 'a');
    await begun.promise;
    const { current, pending } = await status();
    assert.deepEqual([current, pending], [{ id: await idOf(a), name: a, ...progress }, 1]);
    images.whileConverting = async () => {};
    await service.restart();
    await converted(a);
    assert.equal(images.converted.length, 2);
  });

  test('a conversion whose snapshot is removed is ended, and the next one begins', async () => {
    const begun = Promise.withResolvers<void>();
    images.whileConverting = (_args, _onProgress, signal) => {
      images.whileConverting = async () => {};
      begun.resolve();
      return new Promise((_, reject) => signal.addEventListener('abort', () => reject(new Error('ended'))));
    };
    const a = await unpack(service.client, 'a');
    await begun.promise;
    const b = await unpack(service.client, 'b');
    await service.client.remove(a);
    await converted(b);
    await service.client.cleanup();
    assert.deepEqual(images.retained.at(-1), [digestOf('b')]);
  });

  test('a pause ends what is under way, outlives a restart, and ends with resume', async () => {
    const begun = Promise.withResolvers<void>();
    images.whileConverting = (_args, _onProgress, signal) => {
      begun.resolve();
      return new Promise((_, reject) => signal.addEventListener('abort', () => reject(new Error('ended'))));
    };
    const a = await unpack(service.client, 'a');
    await begun.promise;
    let client = new ServiceClient(service.address);
    const paused = await client.conversions('Pause');
    assert.deepEqual([paused.paused, paused.pending, paused.current], [true, 1, null]);
    client.close();
    images.whileConverting = async () => {};
    await service.restart();
    const b = await unpack(service.client, 'b', a);
    client = new ServiceClient(service.address);
    assert.deepEqual((await client.conversions('Status')).pending, 2);
    assert.equal(images.converted.length, 1);
    assert.deepEqual(await below('meanwhile', b), [b, a]);
    assert.equal((await client.conversions('Resume')).paused, false);
    await converted(b);
    assert.equal((await client.conversions('Status')).done, 2);
    client.close();
  });

  test('a layer that cannot be converted is left alone for good, with the reason', async () => {
    images.whileConverting = async ({ layer }) => {
      if (layer === digestOf('a')) throw new DedupError('LAYER_NOT_LAZY', 'it has a trusted.overlay.metacopy');
    };
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    await converted(b);
    images.whileConverting = async () => {};
    await service.restart();
    const c = await unpack(service.client, 'c', b);
    await converted(c);
    assert.equal(images.converted.filter(({ layer }) => layer === digestOf('a')).length, 1);
    const { left, pending } = await status();
    assert.deepEqual(
      [left, pending],
      [[{ id: await idOf(a), name: a, reason: 'it has a trusted.overlay.metacopy' }], 0],
    );
    assert.deepEqual(await below('key', c), ['image', a]);
    assert.deepEqual(images.prebuilt, []);
  });

  test('layers of which no image can be made are the directories again that they were', async () => {
    images.unbuildable = new DedupError('IMAGE_INVALID', 'too many directories in its path');
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    await waitFor('both to be left', async () => (await status()).left.length === 2);
    const { left, pending, done } = await status();
    assert.deepEqual(
      left.map(({ name, reason }) => [name, reason]),
      [a, b].map((name) => [name, 'too many directories in its path']),
    );
    assert.deepEqual([pending, done], [0, 0]);
    assert.deepEqual(await below('key', b), [b, a]);
  });

  test('another failure is tried again a few times, before what lies on it, and then given up until resume', async () => {
    images.whileConverting = async ({ layer }) => {
      if (layer === digestOf('a')) throw new DedupError('STORE_IO', 'the disk is tired');
    };
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    await converted(b);
    const tried = () => images.converted.map(({ layer }) => (layer === digestOf('a') ? 'a' : 'b')).join('');
    assert.equal(tried(), 'aaaaab');
    const { failed } = await status();
    assert.deepEqual(failed, [{ id: await idOf(a), attempts: 5, reason: 'the disk is tired', givenUp: true }]);
    images.whileConverting = async () => {};
    await service.snapshotter.converter.resume();
    await converted(a);
    assert.deepEqual((await status()).failed, []);
  });

  test('while dedupd is away or its disk is full, conversions wait for it without giving up', async () => {
    images.down = true;
    const a = await unpack(service.client, 'a');
    await waitFor('the reason', async () => (await status()).waiting === 'the fake is down');
    images.down = false;
    let full = 0;
    images.whileConverting = async () => {
      if (++full <= 3) throw new DedupError('STORE_FULL', 'no room');
    };
    await converted(a);
    const { waiting, failed } = await status();
    assert.deepEqual([full, waiting, failed], [4, '', []]);
    assert.equal(lines.filter(({ msg }) => msg === 'ordinary layers are converted later').length, 1);
  });

  const noRoom = () => new DedupError('STORE_FULL', 'dedupd: no room: 9.0 GiB needed, 1.0 GiB free');
  const asked = (name: string) => images.converted.filter(({ layer }) => layer === digestOf(name));

  test('a layer for which there is no room waits without being read, what lies on it too, and others go on', async () => {
    images.whileConverting = async ({ layer }) => {
      if (layer === digestOf('large')) throw noRoom();
    };
    const large = await unpack(service.client, 'large');
    const above = await unpack(service.client, 'above', large);
    const other = await unpack(service.client, 'other');
    await converted(other);
    await waitFor('a few looks', () => asked('large').length >= 4);
    const { waiting, pending, failed, current } = await status();
    assert.deepEqual(
      { waiting, pending, failed, current },
      { waiting: 'no room: 9.0 GiB needed, 1.0 GiB free', pending: 2, failed: [], current: undefined },
    );
    assert.equal(asked('above').length, 0);
    assert.equal(lines.filter(({ msg }) => msg === 'an ordinary layer waits for room').length, 1);
    const { usage } = await service.metastore.get(large);
    assert.deepEqual(new Set(asked('large').map(({ bytes }) => bytes)), new Set([usage?.bytes]));
    images.whileConverting = async () => {};
    await converted(above);
    assert.equal((await status()).waiting, '');
  });

  test('pauses between two looks for room grow, and end when space was given back', async () => {
    await service.stop();
    service = await TestService.start({ ...options, convert: { delayMs: 5, retryMs: 600_000 } });
    images.whileConverting = async () => {
      throw noRoom();
    };
    const a = await unpack(service.client, 'a');
    await waitFor('the first look', async () => (await status()).waiting !== '');
    await unpack(service.client, 'b', a);
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.equal(images.converted.length, 1);
    images.whileConverting = async () => {};
    await service.client.cleanup();
    await converted(a);
  });

  test('a layer that was stopped for room in the middle must find more of it, and is not read again soon', async () => {
    const stopped: number[] = [];
    images.whileConverting = async ({ bytes }, onProgress) => {
      stopped.push(bytes, performance.now());
      if (stopped.length > 4) return;
      onProgress({ bytes: 1, entries: 1, total: bytes, held: '' });
      throw noRoom();
    };
    const a = await unpack(service.client, 'a');
    await waitFor('the first reading', () => stopped.length > 0);
    await service.client.cleanup();
    await converted(a);
    const bytes = (await service.metastore.get(a)).usage?.bytes ?? 0;
    const [first, firstMs = 0, second, secondMs = 0, third, thirdMs = 0] = stopped;
    assert.deepEqual([first, second, third], [bytes, 2 * bytes, 4 * bytes]);
    // The first pause is 5 ms.
    assert.ok(secondMs - firstMs >= 290 && thirdMs - secondMs >= 590, `${stopped}`);
  });

  test('what was left is tried again after resume: the reason may have passed', async () => {
    images.whileConverting = async () => {
      throw new DedupError('LAYER_NOT_LAZY', 'kernels before 5.16 keep ordinary layers');
    };
    const a = await unpack(service.client, 'a');
    await waitFor('it to be left', async () => (await status()).left.length === 1);
    images.whileConverting = async () => {};
    await service.snapshotter.converter.resume();
    await converted(a);
    assert.deepEqual((await status()).left, []);
  });

  for (const restarted of [false, true]) {
    const when = restarted ? ', also after a restart in between' : '';
    test(`directories stay while their image is built ahead, and are used again when it cannot be${when}`, async () => {
      const building = Promise.withResolvers<void>();
      const goOn = Promise.withResolvers<void>();
      images.whileBuilding = () => {
        building.resolve();
        return goOn.promise;
      };
      const a = await unpack(service.client, 'a');
      await converted(a);
      await building.promise;
      await service.client.cleanup();
      assert.ok(existsSync(service.paths.snapshotFs(await idOf(a))));
      const [waiting] = await service.snapshotter.leftovers.waiting();
      assert.equal(waiting?.reason, 'stays until an image was made of the layer');
      if (restarted) {
        await service.down();
        await service.up();
        await service.client.cleanup();
        assert.ok(existsSync(service.paths.snapshotFs(await idOf(a))));
      }
      images.unbuildable = new DedupError('IMAGE_INVALID', 'too many directories in its path');
      goOn.resolve();
      await waitFor('it to be left', async () => (await status()).left.length === 1);
      await service.client.cleanup();
      assert.deepEqual(await below('key', a), [a]);
      assert.match((await status()).left[0]?.reason ?? '', /too many directories/);
    });
  }

  test('directories of layers below stay, too, while the image of what was converted on them is built', async () => {
    images.whileConverting = async ({ layer }) => {
      if (layer === digestOf('b')) throw new DedupError('UNAVAILABLE', 'not yet');
    };
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    await converted(a);
    images.unbuildable = new DedupError('IMAGE_INVALID', 'too many directories in its path');
    const goOn = Promise.withResolvers<void>();
    images.whileBuilding = () => goOn.promise;
    images.whileConverting = async () => {};
    await converted(b);
    await service.client.cleanup();
    goOn.resolve();
    await waitFor('both to be left', async () => (await status()).left.length === 2);
    assert.deepEqual(await below('key', b), [b, a]);
  });

  test('directories stay while their image cannot be built for a reason that may pass', async () => {
    images.unbuildable = new DedupError('STORE_IO', 'the disk is tired');
    const a = await unpack(service.client, 'a');
    await converted(a);
    await waitFor('it to be given up', async () => (await status()).failed[0]?.givenUp === true);
    await service.client.cleanup();
    assert.ok(existsSync(service.paths.snapshotFs(await idOf(a))));
    assert.match((await status()).failed[0]?.reason ?? '', /no image was made of it yet: the disk is tired/);
    images.unbuildable = undefined;
    await service.snapshotter.converter.resume();
    await waitFor('its directory to go', async () => {
      await service.client.cleanup();
      return !existsSync(service.paths.snapshotFs(await idOf(a)));
    });
    assert.deepEqual((await status()).failed, []);
  });

  test('a layer that dedupd forgot is a directory again, and converted anew', async () => {
    const a = await unpack(service.client, 'a');
    const b = await unpack(service.client, 'b', a);
    await converted(b);
    const frozen = await service.client.prepare('frozen', b);
    images.whileConverting = () => Promise.reject(new DedupError('UNAVAILABLE', 'not yet'));
    images.forgotten.add(digestOf('a')).add(digestOf('b'));
    assert.deepEqual(await below('key', b), [b, a]);
    // A key that was given the layer is not given anything else.
    await refused(service.client.mounts('frozen'), 'unavailable', /cannot look it up/);
    assert.deepEqual(
      (await service.metastore.inUse()).layers.map(({ digest }) => digest).sort(),
      [digestOf('a'), digestOf('b')].sort(),
    );
    images.whileConverting = async () => {};
    await converted(b);
    assert.deepEqual(await service.client.mounts('frozen'), frozen);
    assert.deepEqual(await below('next', b), ['image']);
  });

  test('a forgotten layer whose directory is gone says what to do', async () => {
    const a = await unpack(service.client, 'a', '', {});
    await proven(a);
    await service.client.cleanup();
    assert.ok(!existsSync(service.paths.snapshotFs(await idOf(a))));
    images.forgotten.add(digestOf(`directory ${await idOf(a)}`));
    await refused(service.client.prepare('key', a), 'unavailable', /remove the image and pull it again/);
    assert.equal(await isConverted(a), true);
  });

  test('a Prepare that is under way during the switch holds the directory that it was given', async () => {
    images.down = true;
    const a = await unpack(service.client, 'a');
    images.down = false;
    await converted(a);
    await service.snapshotter.converter.pause();
    const b = await unpack(service.client, 'b', a);
    const mounting = Promise.withResolvers<void>();
    const goOn = Promise.withResolvers<void>();
    images.afterMount = () => {
      mounting.resolve();
      return goOn.promise;
    };
    const prepared = service.client.prepare('key', b);
    await mounting.promise;
    await service.snapshotter.converter.resume();
    await converted(b);
    const cleaned = service.client.cleanup();
    goOn.resolve();
    const lowers = lowersOf(await prepared);
    await cleaned;
    assert.equal(lowers[0], service.paths.snapshotFs(await idOf(b)));
    assert.ok((await stat(lowers[0] ?? '')).isDirectory());
    assert.deepEqual(await below('next', b), ['image']);
  });

  for (const gone of [false, true]) {
    test(`a lost metadata.db is made again with converted layers, their directories ${gone ? 'gone' : 'there'}`, async () => {
      const a = await unpack(service.client, 'a');
      const b = await unpack(service.client, 'b', a);
      const hand = await commitByHand(service.client, 'hand', b);
      await converted(b);
      for (const name of [a, b]) await proven(name);
      const key = await service.client.prepare('key', hand);
      if (gone) await service.client.cleanup();
      assert.equal(existsSync(service.paths.snapshotFs(await idOf(a))), !gone);
      await service.down();
      for (const suffix of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + suffix, { force: true });
      images.converted.length = 0;
      await service.up();
      assert.deepEqual(await service.client.mounts('key'), key);
      assert.deepEqual(await below('next', b), ['image']);
      const { pending, later, done } = await status();
      assert.deepEqual({ pending, later, done }, { pending: 0, later: 1, done: 2 });
      // Where the directories are there, an image is made first: nobody remembers whether it was.
      await waitFor('its directory to go', async () => {
        await service.client.cleanup();
        return (await readdir(service.paths.snapshot(await idOf(a)))).join() === 'info.json';
      });
      assert.deepEqual(images.converted, []);
    });
  }
});
