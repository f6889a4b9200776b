import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { digestHex, digestOf } from '../../../src/digest.ts';
import { OciLayout, parseLayoutReference } from '../../../src/fs/registry/oci-layout.ts';
import { blobReaderSuite, soon, withCode } from '../../suites/blob-reader.ts';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';

blobReaderSuite('an OCI layout directory', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'layout-'));
  return {
    repository: await OciLayout.open(dir, { create: true }),
    corrupt: async (digest, offset) => {
      const file = join(dir, 'blobs/sha256', digestHex(digest));
      const bytes = await readFile(file);
      bytes[offset] = bytes[offset]! ^ 0xff;
      await writeFile(file, bytes);
    },
    close: async () => await rm(dir, { recursive: true, force: true }),
  };
});

test('a layout reference is a directory and a tag', () => {
  assert.deepEqual(parseLayoutReference('oci:/a/b:v1'), { dir: '/a/b', tag: 'v1' });
  assert.deepEqual(parseLayoutReference('oci:/a/b'), { dir: '/a/b', tag: 'latest' });
  assert.deepEqual(parseLayoutReference('oci:/a:b/c'), { dir: '/a:b/c', tag: 'latest' });
  assert.equal(parseLayoutReference('nginx:latest'), undefined);
  assert.throws(() => parseLayoutReference('oci:'), withCode('INVALID_REFERENCE'));
  assert.throws(() => parseLayoutReference('oci:/a:'), withCode('INVALID_REFERENCE'));
});

test('a directory that is not a layout is refused unless it is to be made', async (t) => {
  const dir = await mkdtemp(join(tmpdir(), 'layout-'));
  t.after(() => rm(dir, { recursive: true, force: true }));
  await assert.rejects(OciLayout.open(dir), withCode('NOT_FOUND'));
  await OciLayout.open(join(dir, 'new'), { create: true });
  await OciLayout.open(join(dir, 'new'));
});

test('many tags written at once all end up in index.json, and nothing else is left behind', async (t) => {
  const dir = await mkdtemp(join(tmpdir(), 'layout-'));
  t.after(() => rm(dir, { recursive: true, force: true }));
  const layout = await OciLayout.open(dir, { create: true });
  const tags = Array.from({ length: 12 }, (_, i) => `t${i}`);
  await Promise.all(
    tags.map((tag) =>
      layout.putManifest(tag, MANIFEST, Buffer.from(JSON.stringify({ schemaVersion: 2, tag })), soon()),
    ),
  );
  const index = JSON.parse(await readFile(join(dir, 'index.json'), 'utf8')) as { manifests: object[] };
  assert.equal(index.manifests.length, tags.length);
  assert.deepEqual((await readdir(dir)).sort(), ['blobs', 'index.json', 'oci-layout']);
  assert.equal((await readdir(join(dir, 'blobs/sha256'))).length, tags.length);
});

test('parts of an index pushed by digest are blobs, not entries of index.json', async (t) => {
  const dir = await mkdtemp(join(tmpdir(), 'layout-'));
  t.after(() => rm(dir, { recursive: true, force: true }));
  const layout = await OciLayout.open(dir, { create: true });
  const part = Buffer.from('{"schemaVersion":2}');
  await layout.putManifest(digestOf(part), MANIFEST, part, soon());
  assert.equal(await readFile(join(dir, 'index.json'), 'utf8'), '{"schemaVersion":2,"manifests":[]}');
  assert.equal((await layout.getManifest(digestOf(part), soon())).digest, digestOf(part));
});

test('a truncated index.json is a clear error', async (t) => {
  const dir = await mkdtemp(join(tmpdir(), 'layout-'));
  t.after(() => rm(dir, { recursive: true, force: true }));
  const layout = await OciLayout.open(dir, { create: true });
  await writeFile(join(dir, 'index.json'), '{"manifests":[');
  await assert.rejects(layout.getManifest('any', soon()), withCode('REGISTRY_PROTOCOL', /not an image index/));
});
