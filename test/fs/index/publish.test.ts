import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { type Digest, digestOf, parseDigest } from '../../../src/digest.ts';
import { DedupError, type ErrorCode } from '../../../src/errors.ts';
import { decodeLayerIndex } from '../../../src/fs/index/format.ts';
import {
  ARTIFACT_ANNOTATION,
  INDEX_ANNOTATION,
  INDEX_ARTIFACT_TYPE,
  INDEXED_LAYER_ANNOTATION,
} from '../../../src/fs/index/layer-index.ts';
import { classifyLayer } from '../../../src/fs/index/media-types.ts';
import { type IndexOptions, indexImage } from '../../../src/fs/index/publish.ts';
import { OciLayout } from '../../../src/fs/registry/oci-layout.ts';
import { noise } from '../../support/gzip-streams.ts';
import { makeImage, makeImageIndex } from '../../support/images.ts';
import { tarOf } from '../../support/tar.ts';

const top = await mkdtemp(join(tmpdir(), 'publish-'));
after(() => rm(top, { recursive: true, force: true }));
const fresh = (): Promise<string> => mkdtemp(join(top, 'layout-'));
const signal = AbortSignal.timeout(60_000);

const base = { entries: [{ name: 'base', content: noise(100_000) }] };
const app = { entries: [{ name: 'app', content: 'app\n'.repeat(10_000) }], compression: 'zstd' as const };

interface Json {
  [key: string]: unknown;
  mediaType: string;
  digest: Digest;
  layers: Json[];
  manifests: Json[];
  config: Json;
  annotations?: Record<string, string>;
}

async function manifest(layout: OciLayout, name: string): Promise<Json> {
  return JSON.parse((await layout.getManifest(name, signal)).bytes.toString()) as Json;
}

async function blob(layout: OciLayout, digest: Digest): Promise<Buffer> {
  return await layout.readBlob(digest, 64 << 20, signal);
}

function fails(promise: Promise<unknown>, code: ErrorCode): Promise<void> {
  return assert.rejects(promise, (error: unknown) => {
    assert.ok(error instanceof DedupError, String(error));
    assert.equal(error.code, code, error.message);
    return true;
  });
}

async function annotate(
  source: OciLayout,
  from: string,
  target: OciLayout,
  to: string,
  more: Partial<IndexOptions> = {},
) {
  return await indexImage({
    source: { repository: source, reference: from },
    annotate: { target: { repository: target, reference: to }, replace: false },
    signal,
    ...more,
  });
}

describe('index', () => {
  test('pushes the indexes of an unmodified image as its referrer, the same bytes every time', async () => {
    const image = await makeImage({ layers: [base, app], into: await fresh() });
    const layout = await OciLayout.open(image.dir);
    const run = () => indexImage({ source: { repository: layout, reference: 'latest' }, signal });
    const report = await run();
    assert.deepEqual(await run(), report);
    const referrers = await layout.referrers(parseDigest(image.manifest.digest), INDEX_ARTIFACT_TYPE, signal);
    assert.deepEqual(
      referrers.map(({ digest }) => digest),
      [report.images[0]!.artifact],
    );
    const artifact = await manifest(layout, referrers[0]!.digest);
    assert.equal((artifact.subject as Json).digest, image.manifest.digest);
    assert.deepEqual(
      artifact.layers.map(({ annotations }) => annotations![INDEXED_LAYER_ANNOTATION]),
      image.layers.flatMap(({ digest }) => [digest, digest]),
    );
    const index = decodeLayerIndex(await blob(layout, artifact.layers[2]!.digest));
    assert.deepEqual(
      [index.layerDigest, index.diffId, index.compression],
      [image.layers[1]!.digest, image.layers[1]!.diffId, 'zstd'],
    );
    assert.equal(artifact.layers[3]!.digest, index.restart.digest);
    assert.equal((await blob(layout, index.restart.digest)).length, index.restart.size);
  });

  test('--annotate pushes a copy that names its indexes, with layers and configuration untouched', async () => {
    const image = await makeImage({
      layers: [base, { ...app, annotations: { kept: 'yes', [INDEX_ANNOTATION]: 'old' } }],
      into: await fresh(),
    });
    const source = await OciLayout.open(image.dir);
    const target = await OciLayout.open(await fresh(), { create: true });
    const report = await annotate(source, 'latest', target, 'lazy');
    const index = await manifest(target, 'lazy');
    assert.equal(index.mediaType, 'application/vnd.oci.image.index.v1+json');
    assert.equal(digestOf((await target.getManifest('lazy', signal)).bytes), report.pushed);
    assert.deepEqual(index.manifests[0]!.platform, { architecture: 'amd64', os: 'linux' });
    assert.deepEqual(index.manifests[1]!.platform, { architecture: 'unknown', os: 'unknown' });
    assert.equal(index.manifests[1]!.digest, report.images[0]!.artifact);
    assert.deepEqual(index.manifests[1]!.annotations, { [ARTIFACT_ANNOTATION]: INDEX_ARTIFACT_TYPE });
    const copy = await manifest(target, index.manifests[0]!.digest);
    assert.deepEqual(copy.config, image.config);
    assert.deepEqual(
      copy.layers.map(({ digest }) => digest),
      image.layers.map(({ digest }) => digest),
    );
    assert.equal(copy.layers[1]!.annotations!.kept, 'yes');
    for (const [i, layer] of copy.layers.entries()) {
      assert.ok(await target.hasBlob(layer.digest, signal));
      const decoded = decodeLayerIndex(await blob(target, parseDigest(layer.annotations![INDEX_ANNOTATION]!)));
      assert.equal(decoded.layerDigest, image.layers[i]!.digest);
    }
    assert.ok(await target.hasBlob(copy.config.digest, signal));
    assert.deepEqual(await annotate(source, 'latest', target, 'lazy'), report, 'again: the same');
    const twice = await annotate(target, 'lazy', target, 'lazier');
    assert.equal(twice.pushed, report.pushed, 'annotating an annotated image changes nothing');
  });

  test('--annotate keeps every platform and what else an image index lists', async () => {
    const dir = await fresh();
    const amd64 = { os: 'linux', architecture: 'amd64' };
    const arm = { os: 'linux', architecture: 'arm64', variant: 'v8' };
    const one = await makeImage({ layers: [base], into: dir, tag: 'one', platform: amd64 });
    const two = await makeImage({ layers: [base, app], into: dir, tag: 'two', platform: arm });
    const attestation = await makeImage({
      layers: [{ tar: Buffer.alloc(1024), compression: 'none' }],
      into: dir,
      tag: 'att',
    });
    await makeImageIndex(dir, 'multi', [
      { image: one, platform: amd64 },
      { image: attestation, platform: { os: 'unknown', architecture: 'unknown' } },
      { image: two, platform: arm },
    ]);
    const source = await OciLayout.open(dir);
    const target = await OciLayout.open(await fresh(), { create: true });
    const report = await annotate(source, 'multi', target, 'lazy');
    assert.deepEqual(
      report.images.map(({ platform }) => platform),
      ['linux/amd64', 'linux/arm64/v8'],
    );
    const index = await manifest(target, 'lazy');
    assert.equal(index.manifests.length, 5);
    assert.deepEqual(
      index.manifests.slice(0, 3).map(({ platform }) => platform),
      [amd64, { os: 'unknown', architecture: 'unknown' }, arm],
    );
    assert.equal(index.manifests[1]!.digest, attestation.manifest.digest);
    await target.getManifest(attestation.manifest.digest, signal);

    const some = await annotate(source, 'multi', target, 'some', { platform: 'linux/arm64' });
    assert.deepEqual(
      some.images.map(({ platform }) => platform),
      ['linux/arm64/v8'],
    );
    const partly = await manifest(target, 'some');
    assert.equal(partly.manifests[0]!.digest, one.manifest.digest, 'others stay as they are');
    await fails(annotate(source, 'multi', target, 'none', { platform: 'linux/s390x' }), 'NOT_FOUND');
  });

  test('--annotate turns Docker schema 2 types into OCI ones and leaves the configuration bytes alone', async () => {
    const image = await makeImage({
      layers: [base, { ...app, compression: 'gzip' }],
      into: await fresh(),
      docker: true,
    });
    const source = await OciLayout.open(image.dir);
    await annotate(source, 'latest', source, 'lazy');
    const index = await manifest(source, 'lazy');
    const copy = await manifest(source, index.manifests[0]!.digest);
    assert.equal(copy.mediaType, 'application/vnd.oci.image.manifest.v1+json');
    assert.equal(copy.config.mediaType, 'application/vnd.oci.image.config.v1+json');
    assert.equal(copy.config.digest, image.config.digest);
    for (const layer of copy.layers) assert.equal(layer.mediaType, 'application/vnd.oci.image.layer.v1.tar+gzip');
  });

  test('changes an image in place only when told to', async () => {
    const image = await makeImage({ layers: [base], into: await fresh() });
    const layout = await OciLayout.open(image.dir);
    await fails(annotate(layout, 'latest', layout, 'latest'), 'FAILED_PRECONDITION');
    const target = { repository: layout, reference: 'latest' };
    const report = await annotate(layout, 'latest', layout, 'latest', { annotate: { target, replace: true } });
    assert.equal((await layout.getManifest('latest', signal)).digest, report.pushed);
  });

  test('lists layers that cannot be loaded lazily with the reason, and annotates the others', async () => {
    const dir = await fresh();
    const large = { entries: [{ name: 'large', content: noise(9 * 1024 * 1024) }], compression: 'zstd' as const };
    const broken = { tar: Buffer.alloc(5000, 'x') };
    const image = await makeImage({ layers: [base, large, broken], into: dir });
    const layout = await OciLayout.open(dir);
    const report = await annotate(layout, 'latest', layout, 'lazy');
    const reasons = report.images[0]!.layers.map(({ reason }) => reason);
    assert.equal(reasons[0], undefined);
    assert.match(reasons[1]!, /without frames/);
    assert.match(reasons[2]!, /tar header/);
    const copy = await manifest(layout, (await manifest(layout, 'lazy')).manifests[0]!.digest);
    assert.deepEqual(
      copy.layers.map(({ annotations }) => annotations !== undefined),
      [true, false, false],
    );
    assert.equal(image.layers.length, 3);
  });

  test('pushes no artifact for an image without any lazily loadable layer', async () => {
    const image = await makeImage({ layers: [{ tar: Buffer.alloc(5000, 'x') }], into: await fresh() });
    const layout = await OciLayout.open(image.dir);
    const report = await indexImage({ source: { repository: layout, reference: 'latest' }, signal });
    assert.equal(report.images[0]!.artifact, undefined);
    assert.deepEqual(await layout.referrers(parseDigest(image.manifest.digest), INDEX_ARTIFACT_TYPE, signal), []);
  });

  test('refuses an image whose layers are not what its configuration says', async () => {
    const image = await makeImage({ layers: [base], into: await fresh(), diffIds: [digestOf('something else')] });
    const layout = await OciLayout.open(image.dir);
    await fails(annotate(layout, 'latest', layout, 'lazy'), 'DIGEST_MISMATCH');
    await fails(layout.getManifest('lazy', signal), 'REGISTRY_NOT_FOUND');
  });

  test('refuses a damaged layer and a missing image', async () => {
    const image = await makeImage({ layers: [base, app], into: await fresh() });
    const layout = await OciLayout.open(image.dir);
    const path = join(image.dir, 'blobs', 'sha256', image.layers[0]!.digest.slice(7));
    const bytes = await readFile(path);
    bytes[bytes.length >> 1]! ^= 1;
    await writeFile(path, bytes);
    await fails(annotate(layout, 'latest', layout, 'lazy'), 'DIGEST_MISMATCH');
    await fails(annotate(layout, 'nothing', layout, 'lazy'), 'REGISTRY_NOT_FOUND');
  });

  test('knows from a descriptor what cannot be loaded lazily', () => {
    const oci = 'application/vnd.oci.image.layer.v1.tar';
    for (const type of [oci, `${oci}+gzip`, `${oci}+zstd`, 'application/vnd.docker.image.rootfs.diff.tar.gzip']) {
      assert.deepEqual(classifyLayer({ mediaType: type }), { lazy: true });
    }
    const reason = (mediaType: string, urls?: string[]): string => {
      const kind = classifyLayer({ mediaType, urls });
      return kind.lazy ? 'lazy' : kind.reason;
    };
    assert.match(reason('application/vnd.docker.image.rootfs.foreign.diff.tar.gzip'), /foreign/);
    assert.match(reason('application/vnd.oci.image.layer.nondistributable.v1.tar'), /foreign/);
    assert.match(reason(`${oci}+gzip`, ['https://example.com/layer']), /URLs/);
    assert.match(reason(`${oci}+gzip+encrypted`), /encrypted/);
    assert.match(reason('application/vnd.cncf.helm.chart'), /not known/);
  });
});

test('an image with an empty layer is indexed whole', async () => {
  const image = await makeImage({ layers: [base, { tar: tarOf([]) }], into: await fresh() });
  const layout = await OciLayout.open(image.dir);
  const report = await indexImage({ source: { repository: layout, reference: 'latest' }, signal });
  assert.ok(report.images[0]!.layers.every(({ index }) => index !== undefined));
  assert.equal(image.layers[1]!.diffId, digestOf(tarOf([])));
});
