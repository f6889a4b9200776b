import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { lstat, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { run } from '../../support/containerd.ts';
import { BENCH_IMAGES, benchImageSpec } from './bench-images.ts';
import { packLayer, unpackLayer } from './pack.ts';
import { type ImageRecipe, imageKey, layerKeys } from './recipe.ts';
import { pruneStore, storeImage } from './store.ts';

const BASE = { kind: 'busybox' } as const;
const root = process.getuid?.() === 0;

describe('benchmark image specifications', () => {
  for (const spec of BENCH_IMAGES) {
    it(`${spec.name}: its command is what the image starts, and version 2 is another image`, () => {
      assert.match(spec.name, /^[a-z][a-z-]*$/);
      for (const version of spec.versions) {
        const { config, layers } = spec.recipe(version);
        const { Entrypoint = [], Cmd = [] } = config as { Entrypoint?: string[]; Cmd?: string[] };
        assert.deepEqual([...Entrypoint, ...Cmd], spec.command);
        for (const layer of layers) assert.notEqual(layer.steps.length, 0);
      }
      if (spec.ready.kind === 'line')
        assert.doesNotThrow(() => new RegExp((spec.ready as { pattern: string }).pattern));
      assert.notEqual(imageKey(spec.recipe('1')), imageKey(spec.recipe('2')));
    });
  }

  it('images of the same base share its layer, in both versions', () => {
    const bases = ['interpreter', 'web-server', 'database', 'jvm'].flatMap((name) =>
      (['1', '2'] as const).map((version) => layerKeys(benchImageSpec(name).recipe(version))[0]),
    );
    assert.equal(new Set(bases).size, 1);
  });

  it('an unknown name is refused with the names there are', () => {
    assert.throws(() => benchImageSpec('none'), /no benchmark image "none"; there are interpreter, /);
  });
});

describe('cache keys', () => {
  const recipe = (packages: string[], suites = ['bookworm']): ImageRecipe => ({
    base: BASE,
    layers: [
      { suites: [], steps: [{ file: '/a', content: 'a' }] },
      { suites, steps: [{ install: packages }] },
    ],
    config: {},
  });

  it('change with packages and suites, and leave what lies below as it is', () => {
    const keys = layerKeys(recipe(['hello']));
    for (const other of [layerKeys(recipe(['hello', 'sl'])), layerKeys(recipe(['hello'], ['trixie']))]) {
      assert.deepEqual(other.slice(0, 2), keys.slice(0, 2));
      assert.notEqual(other[2], keys[2]);
    }
  });

  it('hold everything below a layer', () => {
    const changed = { ...recipe(['hello']), base: { kind: 'debian', suites: ['trixie'] } as const };
    const keys = layerKeys(recipe(['hello']));
    for (const [at, key] of layerKeys(changed).entries()) assert.notEqual(key, keys[at]);
  });

  it('of an image change with its configuration alone', () => {
    const changed = { ...recipe(['hello']), config: { Cmd: ['/bin/sh'] } };
    assert.notEqual(imageKey(changed), imageKey(recipe(['hello'])));
    assert.deepEqual(layerKeys(changed), layerKeys(recipe(['hello'])));
  });
});

describe('benchmark image layers', { skip: root ? false : 'needs root' }, () => {
  let dir: string;
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'bench-images-'));
  });
  after(async () => await rm(dir, { recursive: true, force: true }));

  it('a packed tree unpacks to the same tree, with what it deletes and hides', async () => {
    const [lower, upper] = [join(dir, 'lower'), join(dir, 'upper')];
    await mkdir(join(lower, 'replaced'), { recursive: true });
    await mkdir(join(upper, 'replaced'), { recursive: true });
    await mkdir(join(upper, 'fresh'));
    for (const name of ['replaced', 'fresh'])
      await run('setfattr', ['-n', 'trusted.overlay.opaque', '-v', 'y', join(upper, name)]);
    await run('mknod', [join(upper, 'deleted'), 'c', '0', '0']);
    await writeFile(join(upper, 'fresh', 'größe'), 'x'.repeat(70_000), { mode: 0o600 });
    await symlink('/nowhere', join(upper, 'fresh', 'link'));

    const packed = await packLayer(upper, [lower], join(dir, 'layer.tar.gz'), 1_700_000_000, dir);
    assert.equal(packed.files, 1);
    assert.deepEqual(packed.largestFile, { path: 'fresh/größe', bytes: 70_000 });
    const members = (await run('tar', ['-tzf', join(dir, 'layer.tar.gz'), '--quoting-style=literal'])).stdout;
    assert.deepEqual(members.trim().split('\n').sort(), [
      '.wh.deleted',
      'fresh/',
      'fresh/größe',
      'fresh/link',
      'replaced/',
      'replaced/.wh..wh..opq',
    ]);

    await unpackLayer(join(dir, 'layer.tar.gz'), join(dir, 'out'));
    const deleted = await lstat(join(dir, 'out', 'deleted'));
    assert.ok(deleted.isCharacterDevice() && deleted.rdev === 0);
    const file = await lstat(join(dir, 'out', 'fresh', 'größe'));
    assert.deepEqual([file.size, file.mode & 0o777, file.mtimeMs], [70_000, 0o600, 1_700_000_000_000]);
    const opaque = await run('getfattr', ['-d', '-m', 'trusted', join(dir, 'out', 'replaced')]);
    assert.match(opaque.stdout, /trusted\.overlay\.opaque="y"/);
  });

  it('is built once, as a layout that a registry client reads, and forgotten when nobody asks for it', async () => {
    const cache = join(dir, 'cache');
    const recipe: ImageRecipe = {
      base: BASE,
      layers: [
        {
          suites: [],
          steps: [
            { file: '/srv/start', content: '#!/bin/sh\necho ready\n', mode: 0o755 },
            { run: 'rm /bin/touch; /srv/start > /srv/said' },
          ],
        },
      ],
      config: { Cmd: ['/srv/start'] },
    };
    const said: string[] = [];
    // Two at once, as two test files may be.
    const [one, two] = await Promise.all([
      storeImage(cache, 'small', recipe, (text) => said.push(text)),
      storeImage(cache, 'small', recipe, (text) => said.push(text)),
    ]);
    assert.equal(said.length, 1, said.join('; '));
    assert.deepEqual(one, two);
    const { image } = one;
    assert.equal(image.layers.length, 2);
    assert.equal(image.layers[0]?.chainId, image.layers[0]?.diffId);

    const inspected = await run('skopeo', ['inspect', `oci:${one.dir}:small`]);
    const { Digest, Layers } = JSON.parse(inspected.stdout) as { Digest: string; Layers: string[] };
    assert.equal(Digest, image.manifestDigest);
    assert.deepEqual(
      Layers,
      image.layers.map((layer) => layer.digest),
    );
    const blob = join(one.dir, 'blobs', 'sha256', image.layers[1]?.digest.slice('sha256:'.length) ?? '');
    const members = (await run('tar', ['-tvzf', blob])).stdout;
    assert.match(members, /^-rwxr-xr-x .* srv\/start$/m);
    assert.match(members, /bin\/\.wh\.touch$/m);
    assert.equal((await run('tar', ['-xzOf', blob, 'srv/said'])).stdout, 'ready\n');
    assert.deepEqual(await readdir(cache).then((names) => names.sort()), ['images', 'layers', 'lock']);

    assert.deepEqual(await pruneStore(cache, [recipe]), []);
    await pruneStore(cache, []);
    assert.ok(!existsSync(one.dir));
    const mounts = await readFile('/proc/self/mountinfo', 'utf8');
    assert.ok(!mounts.includes(dir), 'a mount was left');
  });

  it('a step that fails names itself and leaves nothing in the cache', async () => {
    const cache = join(dir, 'failing');
    const recipe: ImageRecipe = {
      base: BASE,
      layers: [{ suites: [], steps: [{ run: 'echo the reason >&2; exit 3' }] }],
      config: {},
    };
    await assert.rejects(
      storeImage(cache, 'failing', recipe, () => {}),
      /the reason/,
    );
    assert.deepEqual(await readdir(cache).then((names) => names.sort()), ['layers', 'lock']);
    assert.equal((await readdir(join(cache, 'layers'))).length, 1);
  });
});
