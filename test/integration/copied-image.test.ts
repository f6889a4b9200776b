// An annotated image outlives the repository it was made in: copied with an ordinary tool, the original deleted, the
// registry collected, it still starts lazily from the copy.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { MiB } from '../../src/units.ts';
import { run } from '../support/containerd.ts';
import { noise } from '../support/feature-tars.ts';
import { LazyNode, smallLayers } from '../support/lazy-node.ts';

const DATA = noise(5, 8 * MiB);

describe('a copy of an annotated image', () => {
  let node: LazyNode;

  before(async () => {
    // Bytes are counted: only what is read counts here.
    node = await LazyNode.start({ config: { prefetch: { enabled: false } } });
  });

  after(async () => {
    await node?.stop();
  });

  const manifests = (repository: string): string => `http://${node.registry.host}/v2/${repository}/manifests`;

  /**
   * Gives each member of an image index a tag. docker-registry 2.8 takes the members of every image index for untagged,
   * those of ordinary multi-platform images too, and its collector would delete them.
   */
  async function tagMembers(repository: string, tag: string): Promise<void> {
    const accept = 'application/vnd.oci.image.index.v1+json';
    const index = (await (await fetch(`${manifests(repository)}/${tag}`, { headers: { accept } })).json()) as {
      manifests: { digest: string; mediaType: string }[];
    };
    assert.ok(index.manifests.length >= 2, 'the image and what carries its indexes');
    for (const [i, { digest, mediaType }] of index.manifests.entries()) {
      const body = await (await fetch(`${manifests(repository)}/${digest}`, { headers: { accept: mediaType } })).text();
      const put = { method: 'PUT', headers: { 'content-type': mediaType }, body };
      assert.equal((await fetch(`${manifests(repository)}/member-${i}`, put)).status, 201);
    }
  }

  test('starts lazily after the original is gone and the registry was collected', { timeout: 120_000 }, async () => {
    const layers = [...(await smallLayers('copied')), { entries: [{ name: 'data', content: DATA }] }];
    const { image } = await node.publish('team/app', layers);
    const from = `docker://${node.registry.host}/team/app:lazy`;
    const to = `docker://${node.registry.host}/mirror/app:v1`;
    const plain = ['--src-tls-verify=false', '--dest-tls-verify=false'];
    await run('skopeo', ['--insecure-policy', 'copy', '--all', '--quiet', ...plain, from, to]);
    await tagMembers('mirror/app', 'v1');
    await rm(join(node.registry.storageDir, 'docker/registry/v2/repositories/team'), { recursive: true });
    await node.registry.garbageCollect({ deleteUntagged: true });
    assert.equal((await fetch(`${manifests('team/app')}/lazy`)).status, 404);

    const reference = `${node.proxy.host}/mirror/app:v1`;
    node.proxy.reset();
    await node.rpull(reference);
    assert.equal(node.layerRequests(image), 0, 'the pull asks for no layer');
    const { stdout } = await node.runScript(reference, 'cat /mark');
    assert.equal(stdout, 'copied');
    const data = image.layers.at(-1)?.digest ?? '';
    const ofData = () => node.proxy.count({ method: 'GET', path: new RegExp(data) });
    assert.equal(ofData().bytes, 0, 'the container starts without what it does not read');
    const read = await node.runScript(reference, 'sha256sum /data');
    assert.equal(read.stdout.slice(0, 64), createHash('sha256').update(DATA).digest('hex'));
    assert.ok(ofData().bytes >= DATA.length);
    const whole = node.proxy.seen.filter(({ path, range }) => path.includes(`/blobs/${data}`) && range === undefined);
    assert.deepEqual(whole, [], 'only ranges of it');
    assert.ok(node.proxy.seen.every(({ path }) => path === '/v2/' || path.startsWith('/v2/mirror/app/')));
  });
});
