// Access traces in a registry without the referrers API: pushed, found, replaced, and kept apart from what others put there.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { type Digest, digestOf, parseDigest } from '../../src/digest.ts';
import { errorCode } from '../../src/errors.ts';
import { INDEX_ARTIFACT_TYPE } from '../../src/fs/index/layer-index.ts';
import { indexImage } from '../../src/fs/index/publish.ts';
import { pushArtifactManifest } from '../../src/fs/registry/artifact.ts';
import type { Repository } from '../../src/fs/registry/blob-reader.ts';
import { OciLayout } from '../../src/fs/registry/oci-layout.ts';
import { RegistryPool } from '../../src/fs/registry/pool.ts';
import { parseReference } from '../../src/fs/registry/reference.ts';
import { addReferrerTag, referrerTag } from '../../src/fs/registry/referrer-tag.ts';
import { type AccessTrace, formatTrace } from '../../src/prefetch/access-trace.ts';
import { findTrace, pushTrace, TRACE_ARTIFACT_TYPE } from '../../src/prefetch/trace-artifact.ts';
import { makeImage, pushLayout, type TestImage } from '../support/images.ts';
import { RegistryProcess } from '../support/registry.ts';

const signal = AbortSignal.timeout(90_000);

function trace(layers: readonly Digest[], updatedMs: number): AccessTrace {
  const read = { atMs: 0, chunk: digestOf('chunk'), offset: 0, length: 4096, count: 1, path: 'bin/a b', fileOffset: 0 };
  const names = { repository: 'registry.example/app', tag: '1', manifest: '' };
  return { ...names, layers, runs: 2, seesHits: true, updatedMs, events: [{ ...read, outcome: 'miss' }] };
}

describe('traces in a registry', () => {
  const dir = mkdtempSync(join(tmpdir(), 'trace-artifact-'));
  const pool = new RegistryPool();
  let registry: RegistryProcess;
  let image: TestImage;
  let layers: Digest[];
  before(async () => {
    registry = await RegistryProcess.start();
    image = await makeImage({ layers: [{ entries: [{ name: 'a', content: 'a' }] }], into: dir });
    layers = image.layers.map(({ digest }) => parseDigest(digest));
  });
  after(async () => {
    await pool.close();
    await registry.stop();
    rmSync(dir, { recursive: true });
  });

  /** A repository of its own that has the image, and the image's manifest in it. */
  async function pushed(name: string) {
    const reference = await pushLayout(dir, 'latest', registry.host, name);
    const repository = pool.repository(parseReference(reference));
    const { digest, mediaType, bytes } = await repository.getManifest('latest', signal);
    return { repository, subject: { digest, mediaType, size: bytes.length } };
  }

  async function listed(repository: Repository, subject: Digest): Promise<{ digest: string; artifactType: string }[]> {
    const { bytes } = await repository.getManifest(referrerTag(subject), signal);
    return (JSON.parse(bytes.toString()) as { manifests: { digest: string; artifactType: string }[] }).manifests;
  }

  /** Has an artifact listed that says it is a trace and holds these bytes. */
  async function pushOther(repository: Repository, subject: Digest, bytes: Buffer, mediaType: string): Promise<Digest> {
    await repository.putBlob(digestOf(bytes), bytes, signal);
    const { digest } = await pushArtifactManifest(
      repository,
      {
        artifactType: TRACE_ARTIFACT_TYPE,
        subject: { mediaType: image.manifest.mediaType, digest: subject, size: image.manifest.size },
        layers: [{ mediaType, digest: digestOf(bytes), size: bytes.length }],
      },
      signal,
    );
    const entry = { mediaType: image.manifest.mediaType, digest, size: 1, artifactType: TRACE_ARTIFACT_TYPE };
    await addReferrerTag(repository, subject, entry, signal);
    return digest;
  }

  it('finds the trace that was pushed, and nothing where none was', async () => {
    const { repository, subject } = await pushed('found');
    assert.equal(await findTrace(repository, subject.digest, layers, signal), undefined);
    const own = trace(layers, 1_700_000_000_000);
    const artifact = await pushTrace(repository, subject, own, signal);
    assert.deepEqual(await findTrace(repository, subject.digest, layers, signal), own);
    assert.equal(await findTrace(repository, subject.digest, [...layers, ...layers], signal), undefined);
    const manifest = JSON.parse((await repository.getManifest(artifact, signal)).bytes.toString());
    assert.equal(manifest.artifactType, TRACE_ARTIFACT_TYPE);
    assert.equal(manifest.subject.digest, subject.digest);
    assert.equal(manifest.layers.length, 1);
    assert.equal(manifest.layers[0].digest, digestOf(Buffer.from(formatTrace(own), 'latin1')));
    assert.equal(await pushTrace(repository, subject, own, signal), artifact, 'again: the same bytes');
  });

  it('keeps one trace an image in the list of referrers, and all that is not a trace', async () => {
    const { repository, subject } = await pushed('replaced');
    const report = await indexImage({ source: { repository, reference: 'latest' }, signal });
    for (const updatedMs of [1000, 3000, 2000]) await pushTrace(repository, subject, trace(layers, updatedMs), signal);
    const list = await listed(repository, subject.digest);
    assert.deepEqual(
      list.map(({ artifactType }) => artifactType),
      [INDEX_ARTIFACT_TYPE, TRACE_ARTIFACT_TYPE],
    );
    assert.equal((await findTrace(repository, subject.digest, layers, signal))?.updatedMs, 2000, 'pushed last');
    const indexes = await repository.referrers(subject.digest, INDEX_ARTIFACT_TYPE, signal);
    assert.deepEqual(
      indexes.map(({ digest }) => digest),
      [report.images[0]!.artifact],
    );
    await indexImage({ source: { repository, reference: 'latest' }, signal });
    assert.equal((await listed(repository, subject.digest)).length, 2, 'an index leaves the trace alone, too');
  });

  it('passes over artifacts that are damaged, gone, foreign or of other layers, and takes the latest of the rest', async () => {
    const { repository, subject } = await pushed('foreign');
    const bytes = (of: AccessTrace) => Buffer.from(formatTrace(of), 'latin1');
    const push = (content: Buffer, type = TRACE_ARTIFACT_TYPE) => pushOther(repository, subject.digest, content, type);
    await push(Buffer.from('dedup-trace 1\nnonsense'));
    await push(bytes(trace([digestOf('another image')], 9000)));
    await push(bytes(trace(layers, 9000)), 'text/plain');
    assert.equal(await findTrace(repository, subject.digest, layers, signal), undefined);
    await pushTrace(repository, subject, trace(layers, 4000), signal);
    await push(Buffer.from('dedup-trace 2\n'));
    await push(bytes(trace(layers, 3000)));
    const gone = await push(bytes(trace(layers, 5000)));
    assert.equal((await findTrace(repository, subject.digest, layers, signal))?.updatedMs, 5000);
    await fetch(`http://${registry.host}/v2/foreign/manifests/${gone}`, { method: 'DELETE' });
    assert.equal((await findTrace(repository, subject.digest, layers, signal))?.updatedMs, 4000);
    await registry.corruptBlob(digestOf(bytes(trace(layers, 4000))), 20);
    assert.equal((await findTrace(repository, subject.digest, layers, signal))?.updatedMs, 3000);
  });

  it('looks at four artifacts, the latest by their date, and no more', async () => {
    const traces = [1, 2, 3, 4, 5, 6].map((day) => trace(layers, Date.UTC(2025, 0, day)));
    const blobs = traces.map((of) => Buffer.from(formatTrace(of), 'latin1'));
    let reads = 0;
    const layout = await OciLayout.open(dir);
    const many: Repository = Object.assign(Object.create(layout) as Repository, {
      referrers: async () =>
        traces.map(({ updatedMs }, at) => ({
          ...{ digest: digestOf(`${at}`), size: 1, mediaType: 'm', created: new Date(updatedMs).toISOString() },
        })),
      getManifest: async (digest: string) => {
        const at = traces.findIndex((_, i) => digestOf(`${i}`) === digest);
        const blob = { mediaType: TRACE_ARTIFACT_TYPE, digest: digestOf(blobs[at]!), size: blobs[at]!.length };
        const config = { mediaType: 'c', digest: digestOf('{}'), size: 2 };
        return {
          digest,
          mediaType: 'm',
          bytes: Buffer.from(JSON.stringify({ schemaVersion: 2, config, layers: [blob] })),
        };
      },
      readBlob: async (digest: Digest) => {
        reads++;
        return blobs.find((blob) => digestOf(blob) === digest)!;
      },
    });
    assert.equal((await findTrace(many, digestOf('image'), layers, signal))?.updatedMs, Date.UTC(2025, 0, 6));
    assert.equal(reads, 4);
  });

  it('says when the registry does not answer', async () => {
    const nobody = pool.repository(parseReference('127.0.0.1:1/app'));
    const ended = AbortSignal.timeout(300);
    await assert.rejects(findTrace(nobody, digestOf('image'), layers, ended), (error) =>
      ['REGISTRY_HTTP', 'DEADLINE', 'CANCELLED'].includes(errorCode(error)),
    );
  });
});
