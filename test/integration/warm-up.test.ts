// `dedupd warm` on a whole node: what it fetches, what it leaves, what is kept of it, and that the registry is not needed afterwards.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { type Digest, digestBytes, digestOf, parseDigest } from '../../src/digest.ts';
import { pieceBytesFor } from '../../src/fs/index/builder.ts';
import { TraceStore } from '../../src/prefetch/trace-store.ts';
import { type CommandResult, run, waitFor } from '../support/containerd.ts';
import { FILE_BYTES, LazyNode, noise, noiseSum, type PublishedImage, smallLayers } from '../support/lazy-node.ts';
import { PROGRAM } from '../support/product.ts';

const DEDUPD = join(PROGRAM, '..', 'dedupd');
/** A file of a trace, in a chunk of its own. */
const TRACED_BYTES = 1 << 20;
const PIECE_BYTES = pieceBytesFor(4 << 20);

/** What an index calls a chunk of several pieces (docs/formats/layer-index.md). */
function chunkName(bytes: Buffer): Digest {
  const names: Uint8Array[] = [];
  for (let at = 0; at < bytes.length; at += PIECE_BYTES)
    names.push(digestBytes(digestOf(bytes.subarray(at, at + PIECE_BYTES))));
  return digestOf(Buffer.concat(names));
}

describe('warm-up', () => {
  let node: LazyNode;
  before(async () => {
    node = await LazyNode.start();
  });
  after(() => node?.stop());
  beforeEach(() => node.proxy.reset());

  function warm(args: readonly string[], options: { allowFailure?: boolean } = {}): Promise<CommandResult> {
    const words = ['--config', node.product.configFile, 'warm', ...args];
    return run(DEDUPD, words, { timeoutMs: 120_000, ...options });
  }

  const layerBytes = ({ image }: PublishedImage): number => image.layers.reduce((sum, { size }) => sum + size, 0);
  const fetched = ({ image }: PublishedImage): number => node.fetched(image).reduce((sum, bytes) => sum + bytes, 0);
  const layersHere = (): number => node.indexCount('SELECT COUNT(*) FROM layers');

  /** What containerd's clean-up does here: the snapshotter says which layers it names. */
  async function cleanUp(): Promise<void> {
    const client = node.snapshots();
    try {
      await client.cleanup();
    } finally {
      client.close();
    }
  }

  test('brings all of an image, which then starts and is read right without its registry', async () => {
    const published = await node.publish('team/whole', await smallLayers('whole'));
    const { stdout } = await warm(['--all', published.lazy]);
    assert.match(stdout, /MiB fetched \(all of it\); kept until /);
    assert.ok(fetched(published) > 2 * FILE_BYTES);
    await node.rpull(published.lazy);
    node.proxy.reset();
    await node.registry.halt();
    try {
      const read = await node.runScript(
        published.lazy,
        'cat /mark; sha256sum /cold /unread; sha256sum /bin/* >/dev/null',
      );
      const sums = ['cold', 'unread'].map((name) => noiseSum(FILE_BYTES, `${name} whole`, `/${name}`));
      assert.equal(read.stdout, `whole${sums.join('')}`);
      assert.equal(node.layerRequests(published.image), 0);
    } finally {
      await node.registry.launch();
    }
    const again = await warm(['--all', '--json', published.lazy]);
    assert.equal(JSON.parse(again.stdout)[0].fetched_bytes, 0);
    assert.equal(fetched(published), 0, 'what is here is not fetched again');
  });

  test('with a trace it brings the traced part and no more', async () => {
    const layers = [
      ...(await smallLayers('traced')),
      { entries: [{ name: 'traced', content: noise(TRACED_BYTES, 'traced') }] },
    ];
    const published = await node.publish('team/traced', layers);
    await new TraceStore(join(node.product.root, 'traces')).save({
      layers: published.image.layers.map(({ digest }) => parseDigest(digest)),
      repository: `${node.proxy.host}/team/traced`,
      tag: 'lazy',
      manifest: '',
      runs: 1,
      seesHits: true,
      updatedMs: Date.now(),
      events: [
        {
          atMs: 0,
          chunk: chunkName(noise(TRACED_BYTES, 'traced')),
          offset: 0,
          length: TRACED_BYTES,
          count: 1,
          path: 'traced',
          fileOffset: 0,
          outcome: 'miss',
        },
      ],
    });
    node.proxy.reset();
    const [result] = JSON.parse((await warm(['--json', published.lazy])).stdout);
    assert.equal(result.part, 'trace');
    const [bottom = -1, middle = -1, top = -1] = node.fetched(published.image);
    assert.deepEqual([bottom, middle], [0, 0]);
    assert.ok(top >= TRACED_BYTES && top < 1.2 * TRACED_BYTES, `${top} bytes of the traced layer`);
    await node.rpull(published.lazy);
    node.proxy.setRules({
      path: new RegExp(published.image.layers[2]!.digest),
      fault: { kind: 'status', status: 500 },
    });
    const { stdout } = await node.runScript(published.lazy, 'sha256sum /traced');
    assert.equal(stdout, noiseSum(TRACED_BYTES, 'traced', '/traced'));
  });

  test('without a trace it brings what the command reads first', async () => {
    const layers = [...(await smallLayers('start'))];
    const published = await node.publish('team/start', layers, { Entrypoint: ['/bin/sh'] });
    const [result] = JSON.parse((await warm(['--json', published.lazy])).stdout);
    assert.equal(result.part, 'start');
    const [bottom = 0, top = 0] = node.fetched(published.image);
    assert.ok(bottom > 0 || result.fetched_bytes === 0, 'the shell, unless another image brought it');
    assert.equal(top, 0);
  });

  test('interrupted and run again, it fetches only the rest', async () => {
    const published = await node.publish('team/interrupted', [
      { entries: [{ name: 'cold', content: noise(4 * FILE_BYTES, 'interrupted') }] },
    ]);
    node.proxy.reset();
    const args = ['--config', node.product.configFile, 'warm', '--all', '--rate', '2MB/s', published.lazy];
    const child = spawn(DEDUPD, args, { stdio: ['ignore', 'ignore', 'pipe'] });
    let said = '';
    child.stderr.on('data', (data: Buffer) => (said += data.toString()));
    const startedMs = performance.now();
    await waitFor('a part to come', () => fetched(published) > FILE_BYTES / 2, 20_000);
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGINT');
    assert.equal(await ended, 1);
    assert.match(said, /interrupted \[CANCELLED\]\n {2}run it again/);
    const seconds = (performance.now() - startedMs) / 1000;
    const first = fetched(published);
    assert.ok(first < 2e6 * seconds + 2.5e6, `${first} bytes in ${seconds} s at 2 MB/s`);
    await waitFor('dedupd to have given it up', () => node.product.log().includes('the client has gone'));
    await warm(['--all', published.lazy]);
    const both = fetched(published);
    // What a request that was under way brought without its end is fetched twice at most.
    assert.ok(both < layerBytes(published) + 2.5e6, `${both} bytes of a layer of ${layerBytes(published)}`);
  });

  test('what could not be fetched is said, and what came before stays', async () => {
    const published = await node.publish('team/failing', [
      { entries: [{ name: 'cold', content: noise(FILE_BYTES, 'failing') }] },
    ]);
    const { digest } = published.image.layers[0]!;
    node.proxy.setRules({ path: new RegExp(digest), fault: { kind: 'status', status: 503 } });
    const { code, stderr } = await warm(['--all', published.lazy], { allowFailure: true });
    assert.equal(code, 1);
    assert.match(stderr, /MiB in \d+ pieces are missing still: .* \[UNAVAILABLE\]/);
    node.proxy.reset();
    await warm(['--all', published.lazy]);
  });

  test('its layers outlive clean-ups and dedupd, until they are forgotten', async () => {
    for (const reference of JSON.parse((await warm(['--list', '--json'])).stdout))
      await warm(['--forget', reference.reference]);
    const published = await node.publish('team/kept', await smallLayers('kept'));
    await cleanUp();
    const before = layersHere();
    await warm(['--all', published.lazy]);
    const own = layersHere() - before;
    assert.ok(own > 0);
    await cleanUp();
    await cleanUp();
    assert.equal(layersHere(), before + own);
    await node.product.stopDaemon();
    await waitFor('dedupd to be started again', () => node.product.daemonPid().then(Boolean, () => false), 20_000);
    await cleanUp();
    await cleanUp();
    assert.equal(layersHere(), before + own);
    node.proxy.reset();
    await warm(['--all', published.lazy]);
    assert.equal(fetched(published), 0, 'it is all here');
    assert.match((await warm(['--list'])).stdout, /team\/kept:lazy {2}linux\/\w+ {2}2 layers {2}until 2/);
    await warm(['--forget', published.lazy]);
    await cleanUp();
    await cleanUp();
    assert.equal(layersHere(), before);
    assert.match(readFileSync(join(node.product.root, 'warm.json'), 'utf8'), /"images": \[\]/);
    const { code, stderr } = await warm(['--forget', published.lazy], { allowFailure: true });
    assert.equal(code, 1);
    assert.match(stderr, /was not warmed.*\[NOT_FOUND\]\n.*--list/);
  });

  test('an image that is not there, and one that cannot be lazy, are told apart', async () => {
    const published = await node.publish('team/plain', [{ entries: [{ name: 'only', content: 'here' }] }]);
    const missing = await warm([`${node.proxy.host}/team/nowhere:1`], { allowFailure: true });
    assert.match(missing.stderr, /there is no image .*nowhere:1 \[NOT_FOUND\]/);
    const plain = await warm([published.plain], { allowFailure: true });
    assert.match(plain.stderr, /no layer of .* can be loaded lazily.*\[LAYER_NOT_LAZY\]\n.*dedup-snapshotter index/);
  });

  test('images of the configuration come by themselves, also when their registry is late', async () => {
    const published = await node.publish('team/configured', [
      { entries: [{ name: 'cold', content: noise(FILE_BYTES, 'configured') }] },
    ]);
    node.proxy.reset();
    await node.product.configure({
      convert_ordinary: false,
      warm_up: { images: [published.lazy], all: true },
    });
    await node.product.stopService();
    await node.product.stopDaemon();
    await node.registry.halt();
    try {
      await node.startService();
      await waitFor('the first attempt', () => node.product.log().includes('an image cannot be warmed now'), 20_000);
    } finally {
      await node.registry.launch();
    }
    await waitFor('the image', () => fetched(published) >= FILE_BYTES, 30_000);
    await waitFor('its end', () => node.product.log().includes('"warmed"'));
    assert.match((await warm(['--list'])).stdout, /team\/configured:lazy .* as long as the configuration names it/);
    const { stderr } = await warm(['--forget', published.lazy], { allowFailure: true });
    assert.match(stderr, /\[FAILED_PRECONDITION\]\n.*warm_up\.images/);
  });
});
