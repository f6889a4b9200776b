import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { gzipSync } from 'node:zlib';
import { type Digest, digestOf } from '../../../src/digest.ts';
import { DedupError } from '../../../src/errors.ts';
import { listedIndexes } from '../../../src/fs/index/artifact.ts';
import { IndexPublisher, knownIndexes } from '../../../src/fs/index/index-publisher.ts';
import { OciLayout } from '../../../src/fs/registry/oci-layout.ts';
import type { Logger } from '../../../src/log.ts';
import { RootPaths } from '../../../src/paths.ts';
import { indexOf } from '../../support/build-index.ts';
import { tarOf } from '../../support/tar.ts';

interface Layer {
  readonly digest: Digest;
  readonly size: number;
  readonly index: Digest;
  readonly restart: Digest;
  readonly blobs: readonly Buffer[];
  /** As index.db knows it, by default made here. */
  row(trust?: Row['trust']): Row;
}

interface Row {
  readonly digest: string;
  readonly indexDigest: string;
  readonly restartDigest: string;
  readonly restartSize: number;
  readonly trust: 'annotation' | 'local' | 'referrer';
  readonly condemned: boolean;
}

const signal = (): AbortSignal => AbortSignal.timeout(10_000);

describe('IndexPublisher', () => {
  let dir: string;
  let paths: RootPaths;
  let repository: OciLayout;
  let rows: Row[];
  let said: { readonly layers?: readonly string[]; readonly said: string }[];
  let publisher: IndexPublisher;

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedup-publisher-'));
    paths = new RootPaths(join(dir, 'root'));
    await mkdir(paths.layers, { recursive: true });
    repository = await OciLayout.open(join(dir, 'layout'), { create: true });
    rows = [];
    said = [];
    publisher = newPublisher();
  });
  afterEach(() => rm(dir, { recursive: true, force: true }));

  function newPublisher(): IndexPublisher {
    const note = ({ layers }: { layers?: readonly string[] }, text: string) => {
      said.push({ ...(layers === undefined ? {} : { layers }), said: text });
    };
    return new IndexPublisher({
      paths,
      find: (digest) => knownIndexes(digest, rows, undefined, ['annotation', 'local', 'referrer']),
      stop: signal(),
      log: { info: note, warn: note, debug: note } as unknown as Logger,
    });
  }

  /** A layer whose index is on this node. */
  async function layer(name: string): Promise<Layer> {
    const bytes = gzipSync(tarOf([{ name, content: name.repeat(100) }]));
    const { indexBlob, restartBlob } = await indexOf(bytes);
    const [digest, index, restart] = [digestOf(bytes), digestOf(indexBlob), digestOf(restartBlob)];
    await writeFile(paths.layerIndex(index), indexBlob);
    await writeFile(paths.layerRestart(restart), restartBlob);
    const restartSize = restartBlob.length;
    const row: Layer['row'] = (trust = 'local') => ({
      digest,
      indexDigest: index,
      restartDigest: restart,
      restartSize,
      trust,
      condemned: false,
    });
    return { digest, size: bytes.length, index, restart, blobs: [indexBlob, restartBlob], row };
  }

  async function image(...layers: readonly Layer[]): Promise<Digest> {
    const mediaType = 'application/vnd.oci.image.layer.v1.tar+gzip';
    const config = { mediaType: 'application/vnd.oci.image.config.v1+json', digest: digestOf('{}'), size: 2 };
    const listed = layers.map(({ digest, size }) => ({ mediaType, digest, size }));
    const manifest = 'application/vnd.oci.image.manifest.v1+json';
    const bytes = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: manifest, config, layers: listed }));
    await repository.putManifest(digestOf(bytes), manifest, bytes, signal());
    return digestOf(bytes);
  }

  /** Index digests by layer, as the next node finds them. */
  async function found(manifest: Digest): Promise<[string, string][]> {
    return [...(await listedIndexes(repository, manifest, signal()))].map(([of, { index }]) => [of, index.digest]);
  }

  it('lists a layer that another image of the repository brought the index of, beside those made here', async () => {
    const [base, top] = [await layer('base'), await layer('top')];
    rows = [base.row(), (await layer('one')).row()];
    // As another node did it.
    await publisher.publish(await image(base, await layer('one')), repository);
    rows = [base.row('referrer'), top.row()];
    const second = await image(base, top);
    await newPublisher().publish(second, repository);
    assert.deepEqual(await found(second), [
      [base.digest, base.index],
      [top.digest, top.index],
    ]);
    assert.ok(await repository.hasBlob(top.restart, signal()));
  });

  it('leaves an index out that came with an image of another repository, and says so once', async () => {
    const [base, top] = [await layer('base'), await layer('top')];
    for (const trust of ['annotation', 'referrer'] as const) {
      said = [];
      rows = [base.row(trust), top.row()];
      const manifest = await image(base, top);
      publisher = newPublisher();
      for (let i = 0; i < 3; i++) await publisher.publish(manifest, repository);
      assert.deepEqual(await found(manifest), [[top.digest, top.index]]);
      assert.equal(await repository.hasBlob(base.index, signal()), false);
      const left = said.filter(({ layers }) => layers !== undefined);
      assert.deepEqual(
        left.map(({ layers }) => layers),
        [[base.digest]],
      );
    }
    // A node that made it adds it, and keeps what is listed.
    rows = [base.row()];
    await newPublisher().publish(await image(base, top), repository);
    assert.deepEqual((await found(await image(base, top))).toSorted(), [
      ...[
        [base.digest, base.index],
        [top.digest, top.index],
      ].toSorted(),
    ]);
  });

  it('waits for a layer without an index, and says once which', async () => {
    const [base, top] = [await layer('base'), await layer('top')];
    const manifest = await image(base, top);
    rows = [base.row()];
    for (let i = 0; i < 3; i++) await publisher.publish(manifest, repository);
    assert.deepEqual(await found(manifest), []);
    assert.deepEqual(
      said.map(({ layers }) => layers),
      [[top.digest]],
    );
    rows.push(top.row());
    await publisher.publish(manifest, repository);
    assert.equal((await found(manifest)).length, 2);
  });

  it('pushes nothing where all of it is listed', async () => {
    const base = await layer('base');
    const manifest = await image(base);
    rows = [base.row()];
    await publisher.publish(manifest, repository);
    const refusing = Object.assign(repository, {
      putManifest: () => Promise.reject(new DedupError('REGISTRY_AUTH', 'not you')),
    });
    said = [];
    await newPublisher().publish(manifest, refusing);
    assert.deepEqual(said, []);
  });

  it('never publishes an index that was found to be wrong, or whose origin is not trusted', async () => {
    const base = await layer('base');
    const [local, referrer] = [base.row(), base.row('referrer')];
    assert.deepEqual(knownIndexes(base.digest, [{ ...local, condemned: true }], undefined, ['local']), []);
    assert.deepEqual(knownIndexes(base.digest, [referrer], undefined, ['annotation', 'local']), []);
    const kept = { layer: base.digest, index: base.index, restart: base.restart, bytes: 1 };
    const [found] = knownIndexes(base.digest, [referrer], kept, ['annotation', 'local']);
    assert.equal(found?.madeHere, true, 'this node made the same one');
  });
});
