// The client of dedupd against dedupd's own control server with a stand-in for the data plane.
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { DedupError, type ErrorCode } from '../../src/errors.ts';
import { type ControlledPlane, startControlServer } from '../../src/fs/control-server.ts';
import { DedupdClient } from '../../src/snapshotter/dedupd-client.ts';

const layer = { digest: 'sha256:d', index: 'sha256:i', scope: '' };

describe('the client of dedupd', () => {
  let dir: string;
  let address: string;
  let server: { close(): Promise<void> } | undefined;
  let client: DedupdClient | undefined;
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedupd-client-'));
    address = join(dir, 'dedupd.sock');
  });
  after(() => rm(dir, { recursive: true }));
  afterEach(async () => {
    client?.close();
    await server?.close();
    server = undefined;
  });

  async function serve(calls: Partial<ControlledPlane>): Promise<void> {
    const log = pino({ level: 'silent' });
    const plane = { root: '/r', transportName: 'fake', ...calls } as ControlledPlane;
    server = await startControlServer({
      address,
      plane,
      version: '0',
      log,
      servesRoot: () => true,
      onShutdown: () => {},
    });
  }

  function connect(root?: string): DedupdClient {
    client = new DedupdClient(root === undefined ? { address } : { address, root });
    return client;
  }

  function code(name: ErrorCode, text = /./) {
    return (error: unknown) => error instanceof DedupError && error.code === name && text.test(error.message);
  }

  test('calls arrive with their values and answers come back', async () => {
    const seen: unknown[] = [];
    await serve({
      prepareLayer: async (request) => {
        seen.push(request.budget_ms, request.sources, request.manifest, request.siblings);
        return { lazy: true, reason: '', layer: { ...request.layer, scope: 'host' } };
      },
      mountImage: async (layers, bottom, below) => {
        seen.push(layers, bottom, below);
        return { path: '/r/mounts/7', mountId: 7, rootUid: 1000, rootGid: 4294967294 };
      },
      releaseImages: async (inUse) => seen.push(inUse),
      retainLayers: async (layers) => {
        seen.push(layers);
        return { dropped: 2, waiting: 1, again_ms: 9_000 };
      },
      confirmLayer: async () => {},
      layerUsage: async () => ({ bytes: 2 ** 40, inodes: 3 }),
    });
    const dedupd = connect('/r');
    assert.equal((await dedupd.hello()).pid, process.pid);
    const sources = [{ host: 'h', repository: 'r' }];
    const prepared = await dedupd.prepareLayer({ layer, sources, manifest: 'm', siblings: [layer], budgetMs: 2000 });
    assert.deepEqual(prepared, { lazy: true, reason: '', layer: { ...layer, scope: 'host' } });
    const below = [
      { kind: 'directory', path: '/r/snapshots/3/fs' } as const,
      { kind: 'layers', layers: [layer] } as const,
    ];
    const mounted = await dedupd.mountImage({ layers: [layer], bottom: false, below });
    assert.deepEqual(mounted, { path: '/r/mounts/7', mountId: 7, rootUid: 1000, rootGid: 4294967294 });
    await dedupd.releaseImages([7, 8]);
    assert.deepEqual(await dedupd.retainLayers([layer]), { waiting: 1, againMs: 9_000 });
    const belowMessages = [
      { directory: '/r/snapshots/3/fs', layers: [] },
      { directory: '', layers: [layer] },
    ];
    assert.deepEqual(seen, [1800, sources, 'm', [layer], [layer], false, belowMessages, [7, 8], [layer]]);
    assert.deepEqual(await dedupd.layerUsage(layer), { bytes: 2 ** 40, inodes: 3 });
  });

  test('an error of the daemon keeps its code, a missing daemon is UNAVAILABLE', async () => {
    const dedupd = connect();
    await assert.rejects(dedupd.stats(), code('UNAVAILABLE', /does not answer/));
    await serve({
      mountImage: async () => {
        throw new DedupError('IMAGE_INVALID', 'no such\nlayer', { hint: 'look' });
      },
    });
    const call = () => dedupd.mountImage({ layers: [layer], bottom: true, below: [] });
    await assert.rejects(
      call(),
      (error: unknown) =>
        code('IMAGE_INVALID', /^dedupd: no such\nlayer$/)(error) && (error as DedupError).hint === 'look',
    );
    await server?.close();
    await assert.rejects(call(), code('UNAVAILABLE'));
    await serve({ mountImage: async () => ({ path: '/again', mountId: 1, rootUid: 0, rootGid: 0 }) });
    assert.equal((await call()).path, '/again');
  });

  test('a daemon that has just come is reached by the next call, whatever the channel waits for', async () => {
    const dedupd = connect();
    // Every attempt in vain makes the channel wait longer before the next.
    for (let i = 0; i < 40; i++) {
      await assert.rejects(dedupd.stats(), code('UNAVAILABLE', /does not answer/));
      await sleep(25);
    }
    await serve({ mountImage: async () => ({ path: '/come', mountId: 1, rootUid: 0, rootGid: 0 }) });
    assert.equal((await dedupd.mountImage({ layers: [layer], bottom: true, below: [] })).path, '/come');
  });

  test('a mount that finds nobody waits for a daemon that is being started; other calls do not', async () => {
    let revived = 0;
    const image = { path: '/anew', mountId: 1, rootUid: 0, rootGid: 0 };
    const revive = async () => {
      revived++;
      await sleep(100);
      await serve({ mountImage: async () => image });
      // What the supervisor does: asks until it answers.
      while (!(await client?.hello().catch(() => undefined))) await sleep(25);
    };
    client = new DedupdClient({ address, revive });
    await assert.rejects(client.stats(), code('UNAVAILABLE'));
    assert.equal(revived, 0);
    assert.deepEqual(await client.mountImage({ layers: [layer], bottom: true, below: [] }), image);
    assert.equal(revived, 1);
    client.close();
    await server?.close();
    client = new DedupdClient({ address, revive: () => Promise.reject(new Error('given up')) });
    const call = client.mountImage({ layers: [layer], bottom: true, below: [] });
    await assert.rejects(call, code('UNAVAILABLE', /does not answer/));
  });

  test('a Prepare that takes longer than its budget ends with DEADLINE in time', async () => {
    await serve({ prepareLayer: () => sleep(3000).then(() => Promise.reject(new Error('late'))) });
    const startedMs = performance.now();
    const call = connect().prepareLayer({ layer, sources: [], manifest: '', siblings: [], budgetMs: 300 });
    await assert.rejects(call, code('DEADLINE'));
    assert.ok(performance.now() - startedMs < 600);
  });

  test('a daemon of another root is refused before anything is asked of it', async () => {
    let asked = 0;
    await serve({ retainLayers: async () => ({ dropped: ++asked, waiting: 0, again_ms: 0 }) });
    await assert.rejects(connect('/other').retainLayers([]), code('FAILED_PRECONDITION', /serves \/r, not \/other/));
    assert.equal(asked, 0);
  });

  test('a conversion is a stream that ends with the layer, with an error, or with its caller', async () => {
    const seen: unknown[] = [];
    const ended = Promise.withResolvers<void>();
    await serve({
      convertLayer: async (request, progress, signal) => {
        seen.push(request);
        if (request.layer === 'left') throw new DedupError('LAYER_NOT_LAZY', 'metacopy');
        progress({ bytes: 2 ** 40, entries: 5, total: 2 ** 41, held: 'somebody reads' });
        if (request.layer !== 'long') return { ...layer, digest: request.layer };
        await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve()));
        ended.resolve();
        throw signal.reason;
      },
      prebuildImage: async (layers) => void seen.push(layers),
    });
    const args = {
      snapshot: 7,
      directory: '/r/snapshots/7/fs',
      bottom: true,
      layer: 'sha256:d',
      manifest: 'm',
      sources: [{ host: 'h', repository: 'r' }],
      namespace: 'k8s.io',
      chainId: 'c',
      parentChainId: 'p',
      bytes: 2 ** 41,
    };
    const dedupd = connect();
    const steps: unknown[] = [];
    const convert = (name: string, signal: AbortSignal, onStep = () => {}) => {
      const show = (step: unknown): void => {
        steps.push(step);
        onStep();
      };
      return dedupd.convertLayer({ ...args, layer: name }, show, signal);
    };
    const stays = new AbortController().signal;
    assert.deepEqual(await convert('sha256:d', stays), layer);
    assert.deepEqual(steps, [{ bytes: 2 ** 40, entries: 5, total: 2 ** 41, held: 'somebody reads' }]);
    const { chainId, parentChainId, ...same } = args;
    assert.deepEqual(seen, [{ ...same, chain_id: chainId, parent_chain_id: parentChainId }]);
    await assert.rejects(convert('left', stays), code('LAYER_NOT_LAZY', /metacopy/));
    const stop = new AbortController();
    await assert.rejects(
      convert('long', stop.signal, () => stop.abort()),
      code('CANCELLED'),
    );
    await ended.promise;
    await dedupd.prebuildImage([layer]);
    assert.deepEqual(seen.at(-1), [layer]);
    // dedupd stops, or dies.
    const long = convert('long', stays, () => void server?.close());
    await assert.rejects(long, (error: unknown) => ['CANCELLED', 'UNAVAILABLE'].includes((error as DedupError).code));
    await assert.rejects(convert('sha256:d', stays), code('UNAVAILABLE', /does not answer/));
  });

  test('progress of a standalone mount is a stream that ends with the path', async () => {
    await serve({
      mountReference: async (_request, progress) => {
        progress({ step: 'index', bytes_done: 1, bytes_total: 2 });
        return '/there';
      },
    });
    const steps: string[] = [];
    const request = { reference: 'a/b:c', directory: '/there', platform: '', credentials: '' };
    for await (const message of connect().mountReference(request))
      steps.push(`${message.step} ${message.done} ${message.path}`);
    assert.deepEqual(steps, ['index false ', 'mounted true /there']);
  });
});
