// The life of an image that `rpull` brought, on the real product: shared by namespaces and registries, surviving
// collections and restarts, and gone without a trace when it is removed or its pull was killed.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isDeepStrictEqual } from 'node:util';
import { RootPaths } from '../../src/paths.ts';
import { LABEL_INDEX, LABEL_MANIFEST_DIGEST } from '../../src/snapshotter/labels.ts';
import { waitFor } from '../support/containerd.ts';
import { busyboxEntries, type LayerSource, makeImage, pushLayout, type TestImage } from '../support/images.ts';
import { FILE_BYTES, LazyNode, NOTHING_LEFT, noise, noiseSum, smallLayers } from '../support/lazy-node.ts';
import { PROGRAM } from '../support/product.ts';
import { RegistryProcess, TEST_LOGIN } from '../support/registry.ts';

/** More than a frame may hold to be one that can be started in: such a layer is not lazily loadable. */
const ONE_FRAME_BYTES = 9 << 20;
const BLOB = /\/blobs\/sha256:/;

async function assertNothingLeft(node: LazyNode, namespaces: readonly string[] = []): Promise<void> {
  const nothing = { content: [], ingests: [], snapshots: [], images: [], leases: [] };
  await node.collect();
  for (const namespace of [node.containerd.namespace, ...namespaces])
    assert.deepEqual(await node.containerd.inventory('dedup', namespace), nothing);
  assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
}

describe('an image brought by rpull', () => {
  let node: LazyNode;
  let image: TestImage;
  let lazy: string;

  before(async () => {
    node = await LazyNode.start();
    ({ image, lazy } = await node.publish('team/app', await smallLayers('one')));
  });
  after(() => node?.stop());

  async function removeImage(reference = lazy, namespace = node.containerd.namespace): Promise<void> {
    await node.containerd.ctr(['image', 'rm', '--sync', reference], { namespace });
  }

  test('runs after a forced collection and a restart of containerd; a second pull asks for no layer', async () => {
    await node.rpull(lazy);
    await node.collect();
    await node.containerd.restart();
    await node.collect();
    const { stdout } = await node.runScript(lazy, 'cat /mark; echo; sha256sum /cold');
    assert.equal(stdout, `one\n${noiseSum(FILE_BYTES, 'cold one', '/cold')}`);
    node.proxy.reset();
    const again = await node.rpull(lazy);
    assert.match(again.stdout, /2 layers: 0 lazy, 0 fetched and unpacked, 2 already here/);
    assert.equal(node.proxy.count({ path: BLOB }).requests, 0);
    assert.ok(node.proxy.count({ path: /manifests/ }).requests > 0);
    // Nobody helps here: containerd's own collection calls Cleanup.
    await removeImage();
    await waitFor('everything to be gone', async () => isDeepStrictEqual(await node.leftovers(), NOTHING_LEFT));
    await assertNothingLeft(node);
  });

  test('is taken over by a second namespace: nothing of its layers is fetched again', async () => {
    await node.rpull(lazy);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'one');
    node.proxy.reset();
    const other = `${node.containerd.namespace}-other`;
    const { address } = node.containerd;
    const { stdout } = await node.product.cli(['rpull', '-a', address, '-n', other, lazy]);
    assert.match(stdout, /2 layers: 2 lazy, 0 fetched/);
    assert.equal((await node.runScript(lazy, 'cat /mark', { namespace: other })).stdout, 'one');
    assert.deepEqual(node.fetched(image), [0, 0]);
    assert.equal(node.remoteSnapshots().length, 2, 'both namespaces share one snapshot for each layer');
    // The first one's removal takes nothing from the second.
    await removeImage();
    await node.collect();
    const { stdout: later } = await node.runScript(lazy, 'sha256sum /cold', { namespace: other });
    assert.equal(later, noiseSum(FILE_BYTES, 'cold one', '/cold'));
    await removeImage(lazy, other);
    await assertNothingLeft(node, [other]);
  });

  test('is read from a second registry that it was pulled from when the first one is gone', async () => {
    const second = await RegistryProcess.start();
    const other = `${node.containerd.namespace}-mirror`;
    try {
      const pushed = await pushLayout(image.dir, 'plain', second.host, 'mirror/app');
      const mirror = `${second.host}/mirror/app:lazy`;
      await node.product.cli(['index', pushed, '--annotate', mirror]);
      await node.rpull(lazy);
      const { address } = node.containerd;
      await node.product.cli(['rpull', '-a', address, '-n', other, mirror]);
      await waitFor('both sources', () => node.indexCount('SELECT COUNT(*) FROM sources') === 4);
      assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'one');
      await node.registry.halt();
      const { stdout } = await node.runScript(lazy, 'sha256sum /cold');
      assert.equal(stdout, noiseSum(FILE_BYTES, 'cold one', '/cold'));
      assert.ok(second.requests('GET', BLOB) > 0);
      await node.registry.launch();
      await removeImage();
      await removeImage(mirror, other);
      await assertNothingLeft(node, [other]);
    } finally {
      await second.stop();
    }
  });

  test('is not kept by what was fetched ahead once its pull has ended', async () => {
    const [bottom, top] = image.layers;
    await node.rpull(lazy);
    const labels = JSON.parse(
      (await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'info', bottom?.chainId ?? ''])).stdout,
    ) as { Labels: Record<string, string> };
    await removeImage();
    await assertNothingLeft(node);

    // A pull that ends after its first Prepare. Another repository: this one was looked at lately.
    const pushed = await pushLayout(image.dir, 'plain', node.registry.host, 'team/ahead');
    await node.product.cli(['index', pushed, '--annotate', `${node.registry.host}/team/ahead:lazy`]);
    const { client } = node.product;
    const { layer, lazy: isLazy } = await client.prepareLayer({
      layer: { digest: bottom?.digest ?? '', index: labels.Labels[LABEL_INDEX] ?? '', scope: '' },
      sources: [{ host: node.registry.host, repository: 'team/ahead' }],
      manifest: labels.Labels[LABEL_MANIFEST_DIGEST] ?? '',
      siblings: [],
      budgetMs: 5_000,
    });
    assert.equal(isLazy, true);
    const layers = () => node.indexCount('SELECT COUNT(*) FROM layers');
    await waitFor(`the index of ${top?.digest}`, () => layers() === 2);
    await client.retainLayers([layer]);
    assert.equal(layers(), 2, 'the pull goes on: it has a snapshot');
    await client.retainLayers([]);
    assert.equal(layers(), 0);
    await assertNothingLeft(node);
  });

  test('fails to be read with an error, not with wrong bytes, when every registry is gone, and is read when one is back', async () => {
    // By the trace of an earlier start it would be here already.
    rmSync(new RootPaths(node.product.root).traces, { recursive: true, force: true });
    await node.rpull(lazy);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'one');
    node.proxy.setRules({ path: BLOB, fault: { kind: 'status', status: 404 } });
    const gone = await node.runScript(lazy, 'sha256sum /cold', { allowFailure: true });
    assert.notEqual(gone.code, 0);
    assert.match(gone.stderr, /I\/O error|Input\/output error/i);
    node.proxy.reset();
    await sleep(1_100); // A failed piece is remembered for about a second.
    const { stdout } = await node.runScript(lazy, 'sha256sum /cold');
    assert.equal(stdout, noiseSum(FILE_BYTES, 'cold one', '/cold'));
    await removeImage();
    await assertNothingLeft(node);
  });
});

describe('an image without an index', () => {
  let node: LazyNode;
  let image: TestImage;
  let plain: string;
  before(async () => {
    node = await LazyNode.start();
    const layers: LayerSource[] = [
      { entries: await busyboxEntries(['sh', 'cat', 'sha256sum']) },
      {
        entries: [
          { name: 'cold', content: noise(FILE_BYTES, 'cold plain') },
          { name: 'both', content: 'middle' },
        ],
      },
      {
        entries: [
          { name: 'top', content: 'top' },
          { name: 'both', content: 'top' },
          { name: 'again', content: noise(FILE_BYTES, 'cold plain') },
        ],
      },
    ];
    ({ image, plain } = await node.publish('team/plain', layers));
  });
  after(() => node?.stop());

  async function runsRight(reference: string): Promise<void> {
    const { stdout } = await node.runScript(reference, 'cat /top /both; sha256sum /cold /again');
    const sums = ['/cold', '/again'].map((path) => noiseSum(FILE_BYTES, 'cold plain', path));
    assert.equal(stdout, `toptop${sums.join('')}`);
  }

  test('is read whole, once, and then needs its registry no more', async () => {
    node.proxy.reset();
    const { stdout } = await node.rpull(plain);
    assert.match(stdout, /3 layers: 0 lazy, 3 read and stored .*0 fetched and unpacked, 0 already here/);
    assert.deepEqual(
      node.fetched(image),
      image.layers.map(({ size }) => size),
    );
    const { content } = await node.containerd.inventory('dedup');
    assert.deepEqual(content.toSorted(), [image.manifest.digest, image.config.digest].toSorted());
    await node.registry.halt();
    try {
      await node.collect();
      await node.containerd.restart();
      await runsRight(plain);
    } finally {
      await node.registry.launch();
    }
  });

  test('stores what two of its files share once', async () => {
    const { chunks, present_bytes: present } = await node.product.stats();
    assert.ok(present < 2 * FILE_BYTES, `${present} bytes in ${chunks} chunks`);
  });

  test('is lazy when it is pulled again after it was removed: its index was kept', async () => {
    await node.containerd.ctr(['image', 'rm', '--sync', plain]);
    await assertNothingLeft(node);
    node.proxy.reset();
    const { stdout } = await node.rpull(plain);
    assert.match(stdout, /3 layers: 3 lazy/);
    await runsRight(plain);
    const fetched = node.fetched(image);
    assert.ok(
      fetched.every((bytes, i) => bytes <= (image.layers[i]?.size ?? 0)),
      `${fetched}`,
    );
    await node.containerd.ctr(['image', 'rm', '--sync', plain]);
    await assertNothingLeft(node);
  });

  test('is refused when it decompresses to something else than its configuration names', async () => {
    const diffIds = [`sha256:${'0'.repeat(64)}`];
    const liar = await makeImage({ layers: [{ entries: [{ name: 'a', content: 'a' }] }], diffIds });
    try {
      const reference = await pushLayout(liar.dir, 'latest', node.registry.host, 'team/liar');
      const { code, stderr } = await node.rpull(reference, [], { allowFailure: true });
      assert.equal(code, 1);
      assert.match(stderr, /unpacks to sha256:[0-9a-f]{64}, but .*DIGEST_MISMATCH/);
      await assertNothingLeft(node);
    } finally {
      await rm(liar.dir, { recursive: true });
    }
  });

  test('that is given up while it is read leaves nothing', async () => {
    const bytes = 12 << 20;
    const fresh = await node.publish('team/given-up', [{ entries: [{ name: 'big', content: noise(bytes, 'big') }] }]);
    node.proxy.setRules({
      path: new RegExp(fresh.image.layers[0]?.digest ?? ''),
      fault: { kind: 'stall', ms: 20_000, afterBytes: bytes - (1 << 20) },
    });
    const { address, namespace } = node.containerd;
    const args = ['--config', node.product.configFile, 'rpull', '-a', address, '-n', namespace, fresh.plain];
    const child = spawn(PROGRAM, args, { stdio: 'ignore' });
    await waitFor('chunks of it to be stored', () => node.indexCount('SELECT COUNT(*) FROM held_chunks') > 0);
    child.kill('SIGINT');
    assert.deepEqual(await once(child, 'close'), [1, null]);
    node.proxy.reset();
    await assertNothingLeft(node);
    for (const table of ['chunks', 'held_chunks']) assert.equal(node.indexCount(`SELECT COUNT(*) FROM ${table}`), 0);
  });

  test('is read only from the lowest layer on that is not here, whatever brought those below', async () => {
    const layers = async (mark: string): Promise<LayerSource[]> => [
      {
        entries: [...(await busyboxEntries(['sh', 'sha256sum'])), { name: 'base', content: noise(FILE_BYTES, 'base') }],
      },
      { entries: [{ name: 'mark', content: noise(FILE_BYTES, mark) }] },
    ];
    const one = await node.publish('team/base-one', await layers('one'));
    const byAnnotation = async () => {
      await node.rpull(one.lazy);
      return one.lazy;
    };
    const byContainerd = async () => {
      await node.containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', 'dedup', one.plain]);
      return one.plain;
    };
    for (const bring of [byAnnotation, byContainerd]) {
      const brought = await bring();
      const two = await node.publish(`team/${bring.name.toLowerCase()}`, await layers(bring.name));
      node.proxy.reset();
      const { stdout, stderr } = await node.rpull(two.plain);
      assert.deepEqual(node.fetched(two.image), [0, two.image.layers[1]?.size]);
      assert.match(stdout, /2 layers: 0 lazy, 1 read and stored .*0 fetched and unpacked, 1 already here/);
      assert.doesNotMatch(stderr, /layer 1\/2 \S+: fetching/);
      const sums = await node.runScript(two.plain, 'sha256sum /base /mark');
      const said = noiseSum(FILE_BYTES, 'base', '/base') + noiseSum(FILE_BYTES, bring.name, '/mark');
      assert.equal(sums.stdout, said);
      for (const name of [two.plain, brought]) await node.containerd.ctr(['image', 'rm', '--sync', name]);
      await assertNothingLeft(node);
    }
  });
});

describe('an image of which one layer cannot be lazy', () => {
  let node: LazyNode;
  let image: TestImage;
  let lazy: string;

  before(async () => {
    node = await LazyNode.start();
    const layers: LayerSource[] = [
      { entries: await busyboxEntries(['sh', 'cat', 'sha256sum']) },
      {
        compression: 'zstd',
        entries: [
          { name: 'middle', content: noise(ONE_FRAME_BYTES, 'middle') },
          { name: 'both', content: 'middle' },
        ],
      },
      {
        entries: [
          { name: 'top', content: 'top' },
          { name: 'both', content: 'top' },
          { name: 'cold', content: noise(FILE_BYTES, 'cold mixed') },
        ],
      },
    ];
    ({ image, lazy } = await node.publish('team/mixed', layers));
  });
  after(() => node?.stop());

  async function runsRight(): Promise<void> {
    const { stdout } = await node.runScript(lazy, 'cat /top /both; sha256sum /middle');
    assert.equal(stdout, `toptop${noiseSum(ONE_FRAME_BYTES, 'middle', '/middle')}`);
  }

  test('that layer alone is fetched, applied and committed, and all of them are one file system', async () => {
    node.proxy.reset();
    const { stdout } = await node.rpull(lazy);
    assert.match(stdout, /3 layers: 2 lazy, 1 fetched and unpacked/);
    const [bottom, middle = 0, top] = node.fetched(image);
    const size = image.layers[1]?.size ?? 0;
    // It is begun to be read whole, until it shows that it cannot be indexed.
    assert.ok(middle >= size && middle <= 2 * size, `${middle} of ${size} bytes`);
    assert.deepEqual([bottom, top], [0, 0]);
    await runsRight();
    await node.collect();
    await node.containerd.restart();
    await runsRight();
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await assertNothingLeft(node);
  });

  test('a second namespace goes on from its own registry when the first one is down, lazy and ordinary layers alike', async () => {
    const second = await RegistryProcess.start();
    const other = `${node.containerd.namespace}-mirror`;
    try {
      const pushed = await pushLayout(image.dir, 'plain', second.host, 'mirror/mixed');
      const mirror = `${second.host}/mirror/mixed:lazy`;
      await node.product.cli(['index', pushed, '--annotate', mirror]);
      await node.rpull(lazy);
      assert.equal((await node.runScript(lazy, 'cat /both')).stdout, 'top');
      await node.registry.halt();
      const { stdout } = await node.product.cli(['rpull', '-a', node.containerd.address, '-n', other, mirror]);
      assert.match(
        stdout,
        /3 layers: .*0 fetched and unpacked/,
        'the layer that the first namespace unpacked serves both',
      );
      assert.equal(node.remoteSnapshots().length, 2);
      // The first namespace's image goes; nothing of it can be had from its registry any more.
      await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
      await node.collect();
      const pulled = second.requests('GET', BLOB);
      const script = 'cat /top /both; sha256sum /middle /cold';
      const result = await node.runScript(mirror, script, { namespace: other });
      const sums = [noiseSum(ONE_FRAME_BYTES, 'middle', '/middle'), noiseSum(FILE_BYTES, 'cold mixed', '/cold')];
      assert.equal(result.stdout, `toptop${sums.join('')}`);
      assert.ok(second.requests('GET', BLOB) > pulled, 'what was not here came from the second registry');
      await node.registry.launch();
      await node.containerd.ctr(['image', 'rm', '--sync', mirror], { namespace: other });
      await assertNothingLeft(node, [other]);
    } finally {
      await second.stop();
    }
  });

  test('a pull that is killed at any moment leaves nothing a moment later', async () => {
    const flags = ['--config', node.product.configFile, 'rpull', '--lease-seconds', '600'];
    const where = ['-a', node.containerd.address, '-n', node.containerd.namespace];
    const pull = () => spawn(PROGRAM, [...flags, ...where, lazy], { stdio: 'ignore' });
    const startedMs = performance.now();
    const [code] = (await once(pull(), 'exit')) as [number];
    assert.equal(code, 0);
    const wholeMs = performance.now() - startedMs;
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await assertNothingLeft(node);

    const logged = (text: string) => node.product.log().split(text).length - 1;
    const answered = () => logged('"call":"PullImage","ms"');
    const ended = () => logged('"call":"PullImage"');
    const outcomes: string[] = [];
    for (let round = 0; round < 10; round++) {
      const killedAfterMs = Math.round(wholeMs * (0.3 + 0.08 * (round + Math.random())));
      const [begunBefore, answeredBefore] = [logged('pull begins'), answered()];
      const child = pull();
      const killed = once(child, 'exit');
      await sleep(killedAfterMs);
      child.kill('SIGKILL');
      await killed;
      await waitFor('the pull to have ended', () => ended() === logged('pull begins'));
      const left = await node.containerd.inventory('dedup');
      assert.deepEqual(left.leases, []);
      const begun = logged('pull begins') > begunBefore;
      outcomes.push(answered() > answeredBefore ? 'whole' : begun ? 'cut' : 'early');
      for (const name of left.images) await node.containerd.ctr(['image', 'rm', '--sync', name]);
      // containerd looks for snapshots that it does not know only when it removes one of the same snapshotter.
      await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'prepare', 'another']);
      await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'rm', 'another']);
      await assertNothingLeft(node).catch((error: unknown) => {
        throw new Error(`round ${round}, killed after ${killedAfterMs} of ${Math.round(wholeMs)} ms`, { cause: error });
      });
    }
    assert.ok(outcomes.filter((outcome) => outcome === 'cut').length >= 2, `hardly a pull was cut: ${outcomes}`);
    await node.rpull(lazy);
    await runsRight();
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await assertNothingLeft(node);
  });
});

describe('an image of a registry that asks who you are', () => {
  const login = `${TEST_LOGIN.username}:${TEST_LOGIN.password}`;
  let node: LazyNode;
  let lazy: string;

  before(async () => {
    node = await LazyNode.start({ registry: { htpasswd: TEST_LOGIN.htpasswd } }, login);
    ({ lazy } = await node.publish('team/secret', await smallLayers('secret')));
  });
  after(() => node?.stop());

  test('rpull without credentials says what to do', async () => {
    const { code, stderr } = await node.rpull(lazy, [], { allowFailure: true });
    assert.equal(code, 1);
    assert.match(stderr, /REGISTRY_AUTH/);
    assert.match(stderr, /-u|--user|credentials/);
    await assertNothingLeft(node);
  });

  test('later reads use the credentials given to rpull', async () => {
    await node.rpull(lazy, ['-u', login]);
    const { stdout } = await node.runScript(lazy, 'cat /mark');
    assert.equal(stdout, 'secret');
  });

  test('dedupd keeps them in memory only: after it restarted, reads fail with a hint until rpull brings them again', async () => {
    const before = await node.product.daemonPid();
    process.kill(before, 'SIGKILL');
    await waitFor('a new dedupd', async () => (await node.product.daemonPid().catch(() => before)) !== before);
    const refused = await node.runScript(lazy, 'sha256sum /cold', { allowFailure: true });
    assert.notEqual(refused.code, 0);
    assert.match(node.product.log(), /REGISTRY_AUTH/);
    assert.match(node.product.log(), /credentials file, or pass -u user:password/);
    await node.rpull(lazy, ['-u', login]);
    await sleep(1_100); // A failed piece is remembered for about a second.
    const { stdout } = await node.runScript(lazy, 'sha256sum /cold');
    assert.equal(stdout, noiseSum(FILE_BYTES, 'cold secret', '/cold'));
  });

  test('no log has the password', () => {
    assert.equal(node.product.log().includes(TEST_LOGIN.password), false);
  });
});
