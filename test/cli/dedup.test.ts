// `dedup status`, `pause` and `resume` against the service: what a person and a program read.
import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { run, waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { commitByHand, unpack } from '../support/ordinary-layers.ts';
import { Product } from '../support/product.ts';
import { TestService } from '../support/snapshots-service.ts';

const LONG = { bytes: 3 * 1024 * 1024, entries: 42, total: 7 * 1024 * 1024 };

const PROGRAM = join(import.meta.dirname, '..', '..', 'src', 'dedup-snapshotter.ts');

describe('dedup', () => {
  let dir: string;
  let images: FakeImages;
  let service: TestService;

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedup-verb-'));
    images = new FakeImages(dir);
    service = await TestService.start({ images, convert: { delayMs: 5, retryMs: 60_000 } });
    await writeFile(join(dir, 'config.json'), JSON.stringify({ address: service.address }));
  });
  afterEach(async () => {
    await service.stop();
    await rm(dir, { recursive: true });
  });

  const dedup = (...words: string[]) =>
    run(process.execPath, [PROGRAM, '--config', join(dir, 'config.json'), 'dedup', ...words], { allowFailure: true });

  test('status says what was converted, what is under way, what stays and why; pause and resume what they did', async () => {
    const goOn = Promise.withResolvers<void>();
    images.whileConverting = async ({ layer }, onProgress) => {
      if (layer === digestOf('left')) throw new DedupError('LAYER_NOT_LAZY', 'it redirects directories');
      if (layer === digestOf('bad')) throw new DedupError('STORE_IO', 'no luck');
      if (layer !== digestOf('long')) return;
      onProgress({ ...LONG, held: 'somebody pulls' });
      await goOn.promise;
    };
    const done = await unpack(service.client, 'done');
    await waitFor('one', async () => (await service.metastore.get(done)).conversion === 'done');
    const hand = await commitByHand(service.client, 'hand', done);
    const left = await unpack(service.client, 'left');
    await unpack(service.client, 'bad');
    const long = await unpack(service.client, 'long', hand);
    await waitFor('the long one', async () => (await service.snapshotter.converter.status()).current?.entries === 42);
    const bad = (await service.metastore.pendingConversions())[0]?.id;
    const directory = `  ${done}: is looked at in the next Cleanup`;
    const whole = [
      'conversions: on',
      `under way: ${long}, 3.0 MiB of about 7.0 MiB read in 42 entries`,
      '  held up for a moment: somebody pulls',
      'pending: 2',
      'done: 1',
      'after the next start of the machine, because committed by hand: 1',
      'left as they are, until "resume": 1',
      `  ${left}: it redirects directories`,
      'failed: 1',
      `  snapshot ${bad}: no luck (attempt 1)`,
      'directories of converted layers that are still there: 1',
      directory,
    ];
    assert.deepEqual((await dedup('status')).stdout.trimEnd().split('\n'), whole);
    const json = JSON.parse((await dedup('status', '--json')).stdout);
    assert.deepEqual(
      [json.paused, json.pending, json.done, json.later, json.current, json.left[0].reason, json.failed[0].given_up],
      [
        false,
        2,
        1,
        1,
        { snapshot: (await service.metastore.get(long)).id, name: long, ...LONG, held: 'somebody pulls' },
        'it redirects directories',
        false,
      ],
    );
    goOn.resolve();
    await waitFor('the long one', async () => (await service.metastore.get(long)).conversion === 'done');
    assert.match((await dedup('pause')).stdout, /^conversions: paused\npending: 1\ndone: 2\n/);
    assert.equal(await service.metastore.setting('conversions.paused'), '1');
    images.whileConverting = async () => {};
    assert.equal(JSON.parse((await dedup('resume', '--json')).stdout).paused, false);
    await waitFor('the bad one', async () => (await service.metastore.pendingConversions()).length === 0);
    // What was left, too: its reason may have passed.
    assert.equal((await service.metastore.get(left)).conversion, 'done');
  });

  test('a service that does not run is told, with what to do', async () => {
    await service.down();
    const { code, stderr } = await dedup('status');
    assert.equal(code, 1);
    assert.match(stderr, /does not answer on .*\[UNAVAILABLE\]\n {2}start it: systemctl start dedup-snapshotter/);
  });

  test('the service says which key of its configuration switches conversions off', async () => {
    const product = await Product.create({ convert_ordinary: false, enable_lazy: false });
    try {
      await product.start();
      const words = ['--config', product.configFile, 'dedup', 'status', '--json'];
      const status = JSON.parse((await run(process.execPath, [PROGRAM, ...words])).stdout);
      assert.deepEqual([status.waiting, status.pending], ['"convert_ordinary" is false', 0]);
    } finally {
      await product.stop();
    }
  });
});
