// What a removed image leaves goes by itself, on the real product: also when dedupd did not answer at the moment of its
// removal, and when its layers had just been converted; and a download that nobody wants any more ends at once. After
// `ctr image rm` nobody here asks for anything but numbers.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isDeepStrictEqual } from 'node:util';
import { waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { importImage, type TestImage } from '../support/images.ts';
import {
  FILE_BYTES,
  LazyNode,
  NOTHING_LEFT,
  noiseSum,
  type PublishedImage,
  smallLayers,
} from '../support/lazy-node.ts';
import { TestService } from '../support/snapshots-service.ts';

/** dedupd stands still for so long, milliseconds: longer than any call waits for it. */
const STANDS_STILL_MS = 8_000;
/** A removed image's downloads have ended by then, milliseconds. */
const STOPS_MS = 2_000;

describe('an image that is removed', () => {
  let node: LazyNode;
  let published: PublishedImage;

  before(async () => {
    node = await LazyNode.start({ config: { convert_ordinary: true } });
    published = await node.publish('team/app', await smallLayers('one'));
  });
  after(() => node?.stop());

  const remove = (reference: string) => node.containerd.ctr(['image', 'rm', '--sync', reference]);
  async function untilNothingIsLeft(timeoutMs: number): Promise<void> {
    let left: unknown;
    try {
      await waitFor(
        'everything to go',
        async () => {
          left = { ...(await node.leftovers()), present: (await node.product.stats()).present_bytes };
          return isDeepStrictEqual(left, { ...NOTHING_LEFT, present: 0 });
        },
        timeoutMs,
      );
    } catch (error) {
      assert.fail(`${error}: ${JSON.stringify(left)}`);
    }
  }

  test('while dedupd stands still is gone some seconds after it goes on', { timeout: 60_000 }, async (t) => {
    await node.rpull(published.lazy);
    const { stdout } = await node.runScript(published.lazy, 'sha256sum /cold');
    assert.equal(stdout, noiseSum(FILE_BYTES, 'cold one', '/cold'));
    assert.ok((await node.product.stats()).present_bytes >= FILE_BYTES);
    const pid = await node.product.daemonPid();
    const again = sleep(STANDS_STILL_MS);
    process.kill(pid, 'SIGSTOP');
    try {
      await remove(published.lazy);
      await again;
    } finally {
      process.kill(pid, 'SIGCONT');
    }
    const goesOnMs = performance.now();
    await untilNothingIsLeft(10_000);
    t.diagnostic(`after ${Math.round(performance.now() - goesOnMs)} ms`);
    assert.match(node.product.log(), /is not released yet/);
    assert.match(node.product.log(), /is released now/);
  });

  test('right after its layers were converted is gone when nobody expects them any more', {
    timeout: 90_000,
  }, async () => {
    const image: TestImage = published.image;
    await importImage(node.containerd, image, 'registry.test/base');
    const isConverted = async () => {
      const { stdout } = await node.product.cli(['dedup', 'status', '--json']);
      return (JSON.parse(stdout) as { done: number }).done === image.layers.length;
    };
    await waitFor('the conversions', isConverted, 30_000);
    await remove('registry.test/base:plain');
    assert.ok(node.indexCount('SELECT COUNT(*) FROM layers') > 0, 'this test is too late');
    await untilNothingIsLeft(15_000);
  });

  test('ends its downloads at once', { timeout: 60_000 }, async (t) => {
    await node.rpull(published.lazy);
    assert.equal((await node.runScript(published.lazy, 'echo starts')).stdout, 'starts\n');
    await waitFor('what was fetched ahead', () => node.proxy.active === 0);
    node.proxy.reset();
    const blobs = { method: 'GET', path: /blobs/ };
    node.proxy.setRules({ ...blobs, fault: { kind: 'stall', afterBytes: 16 * 1024 } });
    const args = ['run', '-d', '--snapshotter', 'dedup', published.lazy, 'reads', '/bin/sh', '-c', 'sha256sum /unread'];
    await node.containerd.ctr(args);
    await waitFor('a download', () => node.proxy.active > 0 && node.proxy.count(blobs).bytes > 0);
    await node.containerd.ctr(['task', 'rm', '--force', 'reads']);
    await node.containerd.ctr(['container', 'rm', 'reads']);
    assert.ok(node.proxy.active > 0, 'it goes on for the next container of this image');
    const removedMs = performance.now();
    await remove(published.lazy);
    await waitFor('the connections to be closed', () => node.proxy.active === 0, STOPS_MS);
    t.diagnostic(`after ${Math.round(performance.now() - removedMs)} ms`);
    const { requests } = node.proxy.count(blobs);
    await sleep(STOPS_MS);
    assert.equal(node.proxy.count(blobs).requests, requests, 'nothing is asked for any more');
    await untilNothingIsLeft(5_000);
  });

  test('and whose layers are not released lets "gc" fail with the reason', { timeout: 60_000 }, async () => {
    const images = new FakeImages(node.product.dir);
    const service = await TestService.start({ images });
    try {
      await node.product.configure({ address: service.address });
      assert.equal((await node.product.cli(['gc'])).stderr, '');
      images.down = true;
      const { code, stdout, stderr } = await node.product.cli(['gc'], { allowFailure: true });
      assert.equal(code, 1);
      assert.match(stderr, /^what removed images used was not released: the fake is down\n$/);
      assert.match(stdout, /freed in all/, 'the rest is done all the same');
    } finally {
      await service.stop();
      await node.product.configure({ convert_ordinary: true });
    }
  });
});
