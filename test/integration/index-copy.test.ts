import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { type Digest, digestOf, parseDigest } from '../../src/digest.ts';
import { IndexCatalog } from '../../src/fs/index/discovery.ts';
import { INDEX_ANNOTATION, INDEX_ARTIFACT_TYPE } from '../../src/fs/index/layer-index.ts';
import { indexImage } from '../../src/fs/index/publish.ts';
import { RestartReader, WindowCache } from '../../src/fs/index/restart-reader.ts';
import { native } from '../../src/fs/native.ts';
import type { Repository } from '../../src/fs/registry/blob-reader.ts';
import { RegistryPool } from '../../src/fs/registry/pool.ts';
import { RootPaths } from '../../src/paths.ts';
import { MiB } from '../../src/units.ts';
import { noise, text } from '../support/gzip-streams.ts';
import { makeImage, pushImage, pushLayout } from '../support/images.ts';
import { RegistryProcess } from '../support/registry.ts';
import { tarOf } from '../support/tar.ts';

const run = promisify(execFile);
const top = await mkdtemp(join(tmpdir(), 'index-copy-'));
const registry = await RegistryProcess.start();
const pool = new RegistryPool();
after(async () => {
  await pool.close();
  await registry.stop();
  await rm(top, { recursive: true, force: true });
});
const signal = AbortSignal.timeout(120_000);
const repository = (path: string): Repository => pool.repository({ host: registry.host, path });

const TAR = tarOf([
  { name: 'etc/', type: 'dir' },
  { name: 'etc/app', content: 'app\n' },
  { name: 'data', content: Buffer.concat([noise(2 * MiB), text(3 * MiB), noise(MiB)]) },
]);
const image = await makeImage({
  layers: [{ tar: TAR }, { entries: [{ name: 'zstd', content: 'small' }], compression: 'zstd' }],
  into: await mkdtemp(join(top, 'layout-')),
});
await pushLayout(image.dir, 'latest', registry.host, 'team/app');

interface Json {
  digest: Digest;
  manifests: Json[];
  layers: { digest: Digest; size: number; annotations?: Record<string, string> }[];
}

/** Reads the first layer of an annotated image through its index alone: every span, from its restart point. */
async function readLazily(from: Repository, tag: string): Promise<void> {
  const index = JSON.parse((await from.getManifest(tag, signal)).bytes.toString()) as Json;
  const manifest = JSON.parse((await from.getManifest(index.manifests[0]!.digest, signal)).bytes.toString()) as Json;
  const layer = manifest.layers[0]!;
  const catalog = new IndexCatalog({ paths: new RootPaths(await mkdtemp(join(top, 'root-'))) });
  const wanted = { layerDigest: layer.digest, indexDigest: parseDigest(layer.annotations![INDEX_ANNOTATION]!) };
  const decoded = await catalog.load(wanted, from, signal);
  const { spans } = decoded;
  const windows = new RestartReader(decoded, join(top, 'not-local'), new WindowCache(MiB));
  assert.ok(spans.count >= 5, `${spans.count} spans`);
  for (let i = 0; i < spans.count; i++) {
    const lead = spans.bits[i]! > 0 ? 1 : 0;
    const offset = spans.inOffset[i]! - lead;
    const end = spans.inOffset[i + 1] ?? layer.size;
    const outputLength = (spans.outOffset[i + 1] ?? decoded.tarBytes) - spans.outOffset[i]!;
    const input = await from.readRange(
      { digest: layer.digest, size: layer.size },
      { offset, length: end - offset },
      signal,
    );
    const [window] = await windows.readWindows(i, 1, from, signal);
    const output = await native().decodeSpans({
      compression: decoded.compression,
      input,
      spans: [
        {
          inputOffset: lead,
          bits: spans.bits[i]!,
          memberStart: spans.memberStart[i] === 1,
          window: window!,
          outputOffset: 0,
          outputLength,
        },
      ],
      outputLength,
    });
    assert.ok(output.equals(TAR.subarray(spans.outOffset[i]!, spans.outOffset[i]! + outputLength)), `span ${i}`);
  }
}

describe('an image annotated in a real registry', () => {
  const source = (): { repository: Repository; reference: string } => ({
    repository: repository('team/app'),
    reference: 'latest',
  });

  test('keeps its indexes through `skopeo copy --all` and a garbage collection that deletes untagged manifests', async () => {
    const report = await indexImage({
      source: source(),
      annotate: { target: { repository: repository('team/app'), reference: 'lazy' }, replace: false },
      signal,
    });
    assert.ok(report.images[0]!.layers.every(({ reason }) => reason === undefined));
    await readLazily(repository('team/app'), 'lazy');
    await run('skopeo', [
      '--insecure-policy',
      'copy',
      '--all',
      '--preserve-digests',
      '--src-tls-verify=false',
      '--dest-tls-verify=false',
      `docker://${registry.host}/team/app:lazy`,
      `docker://${registry.host}/mirror/app:copied`,
    ]);
    const copied = await repository('mirror/app').getManifest('copied', signal);
    assert.equal(copied.digest, report.pushed);
    // This registry's collector (2.8) takes the members of every image index for untagged, those of ordinary
    // multi-platform images too; they are tagged here so that what is proved is that members keep the index blobs.
    const { annotated, artifact } = report.images[0]!;
    const stray = Buffer.from(
      (await repository('team/app').getManifest(artifact!, signal)).bytes.toString().replace('}', '} '),
    );
    for (const path of ['team/app', 'mirror/app']) {
      for (const [tag, digest] of [
        ['image', annotated!],
        ['indexes', artifact!],
      ] as const) {
        const { mediaType, bytes } = await repository(path).getManifest(digest, signal);
        await repository(path).putManifest(tag, mediaType, bytes, signal);
      }
      await repository(path).putManifest(digestOf(stray), 'application/vnd.oci.image.manifest.v1+json', stray, signal);
    }
    await registry.garbageCollect({ deleteUntagged: true });
    for (const path of ['team/app', 'mirror/app']) {
      await repository(path).getManifest(artifact!, signal);
      const gone = repository(path).getManifest(digestOf(stray), signal);
      await assert.rejects(gone, { code: 'REGISTRY_NOT_FOUND' }, 'the collection deleted what is untagged');
    }
    await readLazily(repository('mirror/app'), 'copied');
    await readLazily(repository('team/app'), 'lazy');
  });

  test('is found as a referrer through the tag scheme where the registry has no referrers API', async () => {
    const report = await indexImage({ source: source(), signal });
    const subject = report.images[0]!.manifest;
    const found = await repository('team/app').referrers(subject, INDEX_ARTIFACT_TYPE, signal);
    assert.deepEqual(
      found.map(({ digest }) => digest),
      [report.images[0]!.artifact],
    );
    await indexImage({ source: source(), signal });
    assert.equal((await repository('team/app').referrers(subject, INDEX_ARTIFACT_TYPE, signal)).length, 1);
    const catalog = new IndexCatalog({ paths: new RootPaths(top), trust: ['referrer'] });
    const indexes = await catalog.referrerIndexes(subject, repository('team/app'), signal);
    assert.deepEqual(
      [...indexes.values()],
      report.images[0]!.layers.map(({ index }) => index!.digest),
    );
  });

  test('may be pushed as Docker schema 2, and annotated into another repository', async () => {
    const docker = await makeImage({
      layers: [{ tar: TAR }],
      into: await mkdtemp(join(top, 'docker-')),
      docker: true,
      tag: 'v2',
    });
    await pushImage(docker, registry.host, 'old/app');
    const report = await indexImage({
      source: { repository: repository('old/app'), reference: 'v2' },
      annotate: { target: { repository: repository('new/app'), reference: 'lazy' }, replace: false },
      signal,
    });
    assert.notEqual(report.pushed, undefined);
    await readLazily(repository('new/app'), 'lazy');
  });

  test('is made by the command line, which prints the layers and the new name', async () => {
    const config = join(top, 'config.json');
    await writeFile(config, '{}');
    const main = join(import.meta.dirname, '..', '..', 'src', 'cli', 'main.ts');
    const script = `import { runCommandLine } from ${JSON.stringify(main)}; await runCommandLine(process.argv);`;
    const entry = join(top, 'cli.ts');
    await writeFile(entry, script);
    const cli = (...args: string[]) => run(process.execPath, [entry, '--config', config, 'index', ...args]);
    const { stdout } = await cli(`${registry.host}/team/app:latest`, '--annotate', `${registry.host}/cli/app:lazy`);
    const pushed = await repository('cli/app').getManifest('lazy', signal);
    assert.match(stdout, new RegExp(`pushed ${registry.host}/cli/app:lazy@${pushed.digest}`));
    assert.match(stdout, /lazy {2}index \d+\.\d\d %/);
    const json = JSON.parse(
      (await cli(`oci:${image.dir}:latest`, '--annotate', `${registry.host}/cli/app:again`, '--json')).stdout,
    ) as {
      pushed: string;
    };
    assert.equal(json.pushed, pushed.digest, 'from a layout: the same bytes');
    const same = `${registry.host}/team/app:latest`;
    await assert.rejects(cli(same, '--annotate', same), /--replace/);
    assert.equal(digestOf(pushed.bytes), pushed.digest);
  });
});
