// The pure part of a pull: which manifest of an index, which layers, and what is refused.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { digestOf } from '../../../src/digest.ts';
import { errorCode } from '../../../src/errors.ts';
import { chooseManifest, imageLayers, parseManifest, parsePlatform } from '../../../src/fs/registry/image-manifest.ts';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const a = digestOf('a');
const b = digestOf('b');

function json(value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value));
}

function refused(code: string, pattern: RegExp) {
  return (error: unknown) => errorCode(error) === code && pattern.test((error as Error).message);
}

describe('platforms', () => {
  const platforms = ['linux/amd64', 'linux/arm/v6', 'linux/arm/v7', 'linux/arm64', 'windows/amd64', 'unknown/unknown'];
  const index = json({
    manifests: platforms.map((platform) => {
      const [os, architecture, variant] = platform.split('/');
      return { mediaType: MANIFEST, digest: digestOf(platform), size: 1, platform: { os, architecture, variant } };
    }),
  });
  const choose = (wanted: string) => chooseManifest(index, parsePlatform(wanted), 'the image');

  test('the manifest is the one of the platform, with its position', () => {
    assert.deepEqual(choose('linux/amd64'), {
      descriptor: { mediaType: MANIFEST, digest: digestOf('linux/amd64'), size: 1 },
      position: 0,
    });
    assert.equal(choose('windows/amd64').position, 4);
  });
  test('a variant that is asked for must be there; without a wish the newest is taken', () => {
    assert.equal(choose('linux/arm/v6').position, 1);
    assert.equal(choose('linux/arm').position, 2);
    assert.equal(choose('linux/arm64/v8').position, 3);
    assert.throws(() => choose('linux/arm/v5'), refused('NOT_FOUND', /linux\/arm\/v5/));
  });
  test('names that machines give themselves are understood', () => {
    assert.equal(choose('linux/x86_64').position, 0);
    assert.equal(choose('linux/aarch64').position, 3);
  });
  test('what is not a platform is refused with an example', () => {
    for (const text of ['', 'linux', 'linux/', 'linux/amd64/', 'a/b/c/d']) {
      assert.throws(() => parsePlatform(text), refused('INVALID_ARGUMENT', /not a platform/));
    }
  });
  test('artifacts without a platform are never chosen', () => {
    assert.throws(() => choose('unknown/unknown'), refused('NOT_FOUND', /no image/));
  });
});

describe('layers', () => {
  const layers = [a, b].map((digest) => ({ mediaType: 'x', digest, size: 1, annotations: {} }));
  const config = (diffIds: string[], platform = {}) =>
    json({ ...platform, rootfs: { type: 'layers', diff_ids: diffIds } });
  const amd64 = parsePlatform('linux/amd64');

  test('chain IDs are those of the image specification', () => {
    const [bottom, top] = imageLayers(config([a, b]), layers, amd64, 'the image');
    assert.equal(bottom?.chainId, a);
    assert.equal(top?.chainId, digestOf(`${a} ${b}`));
  });
  test('a configuration with another number of layers is refused', () => {
    assert.throws(() => imageLayers(config([a]), layers, amd64, 'the image'), refused('REGISTRY_PROTOCOL', /2 layers/));
  });
  test('an image for another machine is refused by name', () => {
    const arm = config([a, b], { os: 'linux', architecture: 'arm64' });
    assert.throws(() => imageLayers(arm, layers, amd64, 'the image'), refused('NOT_FOUND', /is for linux\/arm64/));
  });
  test('malformed manifests are refused with the place', () => {
    const good = { mediaType: 'x', digest: a, size: 1 };
    const cases: [unknown, RegExp][] = [
      [{ layers: [] }, /config/],
      [{ config: { ...good, digest: 'md5:1' }, layers: [] }, /config\.digest is not a SHA-256 digest/],
      [{ config: good, layers: [{ ...good, size: -1 }] }, /layers\.0\.size/],
      [{ config: good, layers: [{ ...good, annotations: { a: 1 } }] }, /layers\.0\.annotations/],
    ];
    for (const [manifest, where] of cases) {
      assert.throws(() => parseManifest(json(manifest), 'the manifest'), refused('REGISTRY_PROTOCOL', where));
    }
    assert.throws(() => parseManifest(Buffer.from('{'), 'the manifest'), refused('REGISTRY_PROTOCOL', /not JSON/));
    assert.throws(() => parseManifest(Buffer.from('null'), 'the manifest'), refused('REGISTRY_PROTOCOL', /expected/));
  });
  test('an image without layers is one', () => {
    const { layers: none } = parseManifest(json({ config: { mediaType: 'x', digest: a, size: 1 }, layers: null }), 'x');
    assert.deepEqual(imageLayers(config([]), none, amd64, 'x'), []);
  });
});
