import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { parseConfig } from '../../src/config.ts';
import { digestOf, parseDigest } from '../../src/digest.ts';
import { DataPlane } from '../../src/fs/data-plane.ts';
import { buildLayerIndex } from '../../src/fs/index/builder.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { isRoot } from '../../src/runtime.ts';
import { noise, quiet } from '../support/lazy-store.ts';
import { tarOf } from '../support/tar.ts';

const skip = isRoot() ? false : 'needs root: a FUSE session';

describe('DataPlane', { skip }, () => {
  let dir: string;
  let plane: DataPlane;
  let registry: Server;
  let host: string;
  /** Ends the registry's silence: everything is answered with 404. */
  const speak = Promise.withResolvers<void>();
  const asked = Promise.withResolvers<void>();
  const paths: string[] = [];

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedup-plane-'));
    registry = createServer((request, response) => {
      if (request.url !== '/v2/') asked.resolve();
      paths.push(request.url ?? '');
      void speak.promise.then(() => response.writeHead(404).end());
    });
    await new Promise<void>((resolve) => registry.listen(0, '127.0.0.1', resolve));
    host = `127.0.0.1:${(registry.address() as AddressInfo).port}`;
    const config = parseConfig({ root: join(dir, 'root'), run_dir: join(dir, 'run') });
    plane = await DataPlane.open({
      config,
      paths: new RootPaths(config.root),
      run: new RunPaths(config.run_dir),
      log: quiet,
    });
  });

  after(async () => {
    speak.resolve();
    await plane?.close();
    registry?.closeAllConnections();
    registry?.close();
    await rm(dir, { recursive: true, force: true });
  });

  /** A layer whose index is on this node. */
  async function layerHere(seed: string): Promise<{ digest: string; index: string; scope: string }> {
    const blob = tarOf([{ name: seed, content: noise(seed, 5000) }]);
    const made = await buildLayerIndex({
      stream: (async function* () {
        yield blob;
      })(),
      layerDigest: digestOf(blob),
      layerBytes: blob.length,
    });
    const paths = new RootPaths(plane.root);
    const index = digestOf(made.indexBlob);
    await mkdir(paths.layers, { recursive: true });
    await writeFile(paths.layerIndex(index), made.indexBlob);
    return { digest: digestOf(blob), index, scope: '' };
  }

  const prepare = (layer: { digest: string; index: string; scope: string }) =>
    plane.prepareLayer({
      layer,
      sources: [{ host, repository: 'app' }],
      manifest: '',
      siblings: [],
      budget_ms: 300,
      size: 0,
    });

  it('keeps a layer that is promised while an older list of layers to retain is worked on', async () => {
    const layer = await layerHere('one');
    assert.equal((await prepare(layer)).lazy, true);
    // Another pull waits for its registry, and with it whoever retains layers.
    const silent = { digest: digestOf('nothing'), index: digestOf('no index'), scope: '' };
    assert.equal((await prepare(silent)).lazy, false);
    await asked.promise;
    const retaining = plane.retainLayers([]);
    // The caller has given up meanwhile, and others may prepare again.
    const answer = await prepare(layer);
    assert.equal(answer.lazy, true);
    speak.resolve();
    await retaining;
    assert.ok((await plane.layerUsage(answer.layer)).bytes > 0);
    // A list that was made after that decides.
    assert.equal((await plane.retainLayers([])).dropped, 1);
    await assert.rejects(plane.layerUsage(answer.layer));
  });

  it('builds the file system of layers ahead of their mount, and says when it does not know one', async () => {
    const { layer } = await prepare(await layerHere('ahead'));
    await plane.prebuildImage([layer]);
    const images = new RootPaths(plane.root).images;
    const made = (await readdir(images)).filter((name) => name.endsWith('.erofs'));
    assert.equal(made.length, 1);
    const { mountId } = await plane.mountImage([layer], true, []);
    assert.equal(`${mountId}.erofs`, made[0]);
    await plane.releaseImages([]);
    await plane.retainLayers([]);
    await assert.rejects(plane.prebuildImage([layer]), { code: 'NOT_FOUND' });
  });

  it('believes referrers of the repository that an image is pulled from, and of no other that has its layers', async () => {
    speak.resolve();
    const root = await mkdtemp(join(dir, 'referrers-'));
    const config = parseConfig({
      root: join(root, 'root'),
      run_dir: join(root, 'run'),
      index_trust: ['annotation', 'referrer'],
    });
    const trusting = await DataPlane.open({
      config,
      paths: new RootPaths(config.root),
      run: new RunPaths(config.run_dir),
      log: quiet,
    });
    try {
      const answer = await trusting.prepareLayer({
        layer: { digest: digestOf('a layer'), index: '', scope: '' },
        sources: ['own', 'elsewhere'].map((repository) => ({ host, repository })),
        manifest: digestOf('a manifest'),
        siblings: [],
        budget_ms: 5000,
        size: 0,
      });
      assert.equal(answer.lazy, false);
      assert.ok(paths.some((path) => path.startsWith('/v2/own/')));
      assert.ok(!paths.some((path) => path.startsWith('/v2/elsewhere/')));
    } finally {
      await trusting.close();
    }
  });

  it('numbers what is in the store and mounted, for the exporter', async () => {
    const { layer } = await prepare(await layerHere('numbers'));
    const before = await plane.numbers();
    assert.ok(before.chunks > 0);
    await plane.mountImage([layer], true, []);
    const after = await plane.numbers();
    assert.equal(after.imagesMounted, before.imagesMounted + 1);
    for (const [name, value] of Object.entries(after))
      assert.ok(value === undefined || value >= 0, `${name}: ${value}`);
    await plane.releaseImages([]);
    await plane.retainLayers([]);
  });

  it('does not build on a damaged index file, but asks the registry for it again', async () => {
    const layer = await layerHere('two');
    const answer = await prepare(layer);
    assert.equal(answer.lazy, true);
    const file = new RootPaths(plane.root).layerIndex(parseDigest(layer.index));
    const good = await readFile(file);
    const damaged = Buffer.from(good);
    damaged[damaged.length >> 1]! ^= 1;
    await writeFile(file, damaged);
    speak.resolve();
    // This registry does not have it: an error, and no image of what the file says.
    await assert.rejects(plane.mountImage([answer.layer], true, []), { code: 'REGISTRY_NOT_FOUND' });
    assert.equal(existsSync(file), false);
    await writeFile(file, good);
    const { path } = await plane.mountImage([answer.layer], true, []);
    assert.deepEqual(await readdir(path), ['two']);
    await plane.releaseImages([]);
    await plane.retainLayers([]);
  });
});
