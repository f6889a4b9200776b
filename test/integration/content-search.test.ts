// Layers whose client names no image (containerd 2.0, and later ones without the export): they are looked for in
// containerd's content while containerd waits for the answer. Real containerd, registry and product.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { parseDigest } from '../../src/digest.ts';
import { ContainerdClient } from '../../src/pull/containerd-client.ts';
import { LABEL_IMAGE_REF, LABEL_INDEX, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF } from '../../src/snapshotter/labels.ts';
import { waitFor } from '../support/containerd.ts';
import { containerdVersion } from '../support/containerd-version.ts';
import type { TestImage } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT, smallLayers } from '../support/lazy-node.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

/** gRPC status ALREADY_EXISTS. */
const ALREADY_EXISTS = 6;
const LEASE = 'by-hand';
const VERSION = containerdVersion();

/** A socket that passes everything on to another; while it is closed, connections wait. */
class Gate {
  readonly address: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #waiting: (() => void)[] = [];
  #closed = false;

  private constructor(address: string, target: string) {
    this.address = address;
    this.#server = createServer((from) => {
      const pass = () => {
        const to = connect(target);
        this.#sockets.add(to);
        for (const [one, other] of [
          [from, to],
          [to, from],
        ] as const) {
          one.pipe(other);
          one.once('error', () => other.destroy());
        }
      };
      this.#sockets.add(from);
      if (this.#closed) this.#waiting.push(pass);
      else pass();
    });
  }

  static async start(address: string, target: string): Promise<Gate> {
    const gate = new Gate(address, target);
    gate.#server.listen(address);
    await once(gate.#server, 'listening');
    return gate;
  }

  /** Connections that wait. */
  get waiting(): number {
    return this.#waiting.length;
  }

  close(): void {
    this.#closed = true;
  }

  open(): void {
    this.#closed = false;
    for (const pass of this.#waiting.splice(0)) pass();
  }

  stop(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
  }
}

describe('layers without an image reference', () => {
  let node: LazyNode;
  let image: TestImage;
  let plain: string;
  let lazy: string;
  /** On the service's way to containerd. */
  let gate: Gate;
  let client: SnapshotsClient;
  let indexes: string[];

  const prepare = (key: string, layer: number) =>
    client.prepare(key, image.layers[layer - 1]?.chainId ?? '', {
      [LABEL_SNAPSHOT_REF]: image.layers[layer]?.chainId ?? '',
      [LABEL_INDEX]: indexes[layer] ?? '',
    });

  /** Restarts the product; with `mirrors` it finds the registry although containerd does not tell its port. */
  async function configure(mirrors: boolean): Promise<void> {
    await node.product.stopService();
    await node.product.stopDaemon();
    await node.product.configure({
      prefetch: { enabled: false },
      containerd_address: gate.address,
      mirrorRegistry: mirrors ? [{ host: node.proxy.host, insecure: true }] : [],
    });
    await node.startService();
  }

  /** Manifests and configuration as a pull leaves them, without layers. */
  const fetchMetadata = () => node.containerd.ctr(['content', 'fetch', '--plain-http', '--metadata-only', lazy]);

  async function removeAll(): Promise<void> {
    for (const { chainId } of image.layers.toReversed()) {
      await client.remove(chainId).catch((error: { code: number }) => assert.equal(error.code, 5));
    }
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.collect();
    assert.deepEqual(await node.leftovers(), NOTHING_LEFT);
  }

  before(async () => {
    node = await LazyNode.start({ containerd: { exports: false } });
    ({ image, plain, lazy } = await node.publish('team/app', await smallLayers('whole')));
    gate = await Gate.start(join(node.containerd.dir, 'gate.sock'), node.containerd.address);
    await configure(true);
    await node.rpull(lazy);
    indexes = [];
    for (const { chainId } of image.layers) {
      const { stdout } = await node.containerd.ctr(['snapshots', '--snapshotter', 'dedup', 'info', chainId]);
      indexes.push((JSON.parse(stdout) as { Labels: Record<string, string> }).Labels[LABEL_INDEX] ?? '');
    }
    await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
    await node.collect();
    await node.containerd.ctr(['leases', 'create', '--id', LEASE]);
    const { address, namespace } = node.containerd;
    client = new SnapshotsClient(address, { snapshotter: 'dedup', namespace, lease: LEASE });
  });

  after(async () => {
    client?.close();
    gate?.stop();
    await node?.stop();
  });

  test('an image in the content store tells what the layer is and where it is from: lazy', async () => {
    await fetchMetadata();
    node.proxy.reset();
    await assert.rejects(prepare('one', 0), { code: ALREADY_EXISTS });
    await assert.rejects(prepare('two', 1), { code: ALREADY_EXISTS });
    assert.deepEqual(node.fetched(image), [0, 0]);
    assert.deepEqual(
      node.remoteSnapshots(),
      image.layers.map(({ digest }) => digest),
    );
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    await removeAll();
  });

  test('a collection that waits for the end of the Prepare does not keep the service from looking', async () => {
    await fetchMetadata();
    await node.containerd.ctr(['content', 'fetch', '--plain-http', '--metadata-only', plain]);
    const { address, namespace } = node.containerd;
    const containerd = new ContainerdClient({ address, namespace });
    // Content and a snapshot that only a lease holds: the collection that its deletion asks for wants the locks of both
    // stores, and no collection before it can have them.
    const digest = parseDigest(image.manifest.digest);
    await containerd.createLease('collect', {});
    await containerd.addToLease('collect', { id: digest, type: 'content' });
    await containerd.prepareSnapshot('dedup', 'doomed', '', {}, { lease: 'collect' });
    await node.containerd.ctr(['image', 'rm', '--sync', plain]);
    assert.notEqual(await containerd.contentInfo(digest), undefined);
    gate.close();
    try {
      const prepared = prepare('one', 0).then(
        () => 'ordinary',
        (error: { code: number }) => error.code,
      );
      // The service looks: containerd is inside Prepare and holds the snapshotter's lock.
      await waitFor('the service to look', () => gate.waiting > 0);
      let collected = false;
      const collection = containerd.deleteLease('collect', true).then(() => {
        collected = true;
      });
      await waitFor('the collection to pass its database', async () => !(await containerd.contentInfo(digest)));
      assert.equal(collected, false, 'the collection did not wait for the Prepare');
      gate.open();
      assert.equal(await prepared, ALREADY_EXISTS);
      await collection;
    } finally {
      gate.open();
      containerd.close();
    }
    await removeAll();
  });

  test(`ctr image pull, which tells ${VERSION.ctrPull} without the export`, async () => {
    const told = VERSION.ctrPull !== 'nothing';
    node.proxy.reset();
    await node.containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', lazy]);
    assert.deepEqual(node.fetched(image), told ? [0, 0] : image.layers.map(({ size }) => size));
    const { stdout } = await node.containerd.ctr([
      'snapshots',
      '--snapshotter',
      'dedup',
      'info',
      image.layers[0]?.chainId ?? '',
    ]);
    const { Labels } = JSON.parse(stdout) as { Labels?: Record<string, string> };
    assert.equal(Labels?.[LABEL_IMAGE_REF], undefined);
    assert.equal(Labels?.[LABEL_LAYER_DIGEST], undefined);
    assert.equal(Labels?.[LABEL_INDEX], told ? indexes[0] : undefined);
    assert.equal((await node.runScript(lazy, 'cat /mark')).stdout, 'whole');
    await removeAll();
  });

  test('a source that does not serve is not asked again for the next layer: ordinary, and the log says why', async () => {
    await configure(false);
    await fetchMetadata();
    assert.equal((await prepare('one', 0)).length, 1);
    await client.remove('one');
    assert.equal((await prepare('two', 0)).length, 1);
    await client.remove('two');
    assert.match(node.product.log(), /its index could not be had a moment ago/);
    await removeAll();
    // Without the image there is nothing to be found.
    assert.equal((await prepare('three', 0)).length, 1);
    assert.match(node.product.log(), /no image in containerd's content lists it/);
    await client.remove('three');
  });
});
