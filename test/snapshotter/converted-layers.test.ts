// Containers, commits and diffs on layers that were converted, and whose directories are gone, under real containerd and
// runc. dedupd is a stand-in: its images are directories, too, but not those that containerd unpacked.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { mountsBelow, run, TestContainerd, waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { busyboxEntries, importImage, makeImage, type TestImage } from '../support/images.ts';
import { TestService } from '../support/snapshots-service.ts';

const IMAGE = 'registry.test/base:latest';
const SNAPSHOT = ['snapshot', '--snapshotter', 'dedup'];

describe('containerd with converted layers', () => {
  let dir: string;
  let service: TestService;
  let containerd: TestContainerd;
  let image: TestImage;
  let images: FakeImages;

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'converted-'));
    images = new FakeImages(dir);
    images.down = true;
    service = await TestService.start({ images, convert: { delayMs: 5, retryMs: 5 } });
    containerd = await TestContainerd.start({ proxies: { dedup: service.address } });
    image = await makeImage({
      layers: [
        { entries: await busyboxEntries(['sh', 'cat', 'ls', 'rm', 'mkdir', 'sleep']) },
        { entries: [{ name: 'opt/one', content: 'one\n' }] },
        { entries: [{ name: 'opt/two', content: 'two\n' }] },
      ],
    });
    await importImage(containerd, image, 'registry.test/base');
  });

  after(async () => {
    await containerd?.stop();
    await service?.stop();
    if (image !== undefined) await rm(image.dir, { recursive: true });
    await rm(dir, { recursive: true, force: true });
  });

  async function start(name: string, script: string, ...flags: string[]): Promise<string> {
    const args = ['run', '--snapshotter', 'dedup', ...flags, IMAGE, name, '/bin/sh', '-c', script];
    return (await containerd.ctr(args)).stdout;
  }
  const contents = async () => (await service.metastore.list(0, 100)).filter(({ kind }) => kind === 'committed');
  const directories = async () =>
    (await contents()).filter(({ id }) => existsSync(service.paths.snapshotFs(id))).length;

  test('a container that runs keeps the directories of its layers while they are converted, and after it they go', async () => {
    await start(
      'before',
      'while ! cat /stop 2>/dev/null; do sleep 0.1; done; cat /opt/one /opt/two > /root/seen',
      '-d',
    );
    images.down = false;
    await waitFor('the conversions', async () => (await contents()).every(({ conversion }) => conversion === 'done'));
    await service.client.cleanup();
    assert.equal(await directories(), 3);
    await containerd.ctr(['task', 'exec', '--exec-id', 'stop', 'before', '/bin/sh', '-c', 'echo > /stop']);
    await waitFor('its end', async () => /STOPPED/.test((await containerd.ctr(['task', 'ls'])).stdout));
    const { stdout } = await containerd.ctr([...SNAPSHOT, 'mounts', '/mnt', 'before']);
    const upper = /upperdir=([^,\s]+)/.exec(stdout)?.[1] ?? '';
    assert.equal(await readFile(join(upper, 'root/seen'), 'utf8'), 'one\ntwo\n');
    await containerd.ctr(['task', 'rm', 'before']);
    await containerd.ctr(['container', 'rm', 'before']);
    await containerd.gc();
    await service.client.cleanup();
    assert.equal(await directories(), 0);
  });

  test('a container on them starts, and a diff of it and a commit are as with an ordinary image', async () => {
    assert.equal(await start('reader', 'cat /opt/one /opt/two', '--rm'), 'one\ntwo\n');
    await start('writer', 'echo new > /etc/new; rm /opt/one; mkdir /made; echo more >> /opt/two');
    const diff = join(containerd.dir, 'diff.tar');
    const media = '--media-type application/vnd.oci.image.layer.v1.tar';
    await run('sh', [
      '-c',
      `ctr --address ${containerd.address} -n ${containerd.namespace} ${SNAPSHOT.join(' ')} diff ${media} writer > ${diff}`,
    ]);
    const members = (await run('tar', ['-tf', diff])).stdout.trim().split('\n').sort();
    assert.deepEqual(
      members.filter((name) => !name.endsWith('/') || name === 'made/'),
      ['etc/new', 'made/', 'opt/.wh.one', 'opt/two'],
    );
    await containerd.ctr(['container', 'rm', 'writer']);
    assert.equal(await start('again', 'cat /opt/one', '--rm'), 'one\n');
  });

  test('a key on them can be written to, committed, viewed and run from', async () => {
    const top = image.layers.at(-1)?.chainId ?? '';
    await containerd.ctr([...SNAPSHOT, 'prepare', 'work', top]);
    const target = await containerd.scratch('work');
    const { stdout } = await containerd.ctr([...SNAPSHOT, 'mounts', target, 'work']);
    await run('sh', ['-c', stdout]);
    await run('sh', ['-c', `echo by hand > ${target}/opt/hand; rm ${target}/opt/two`]);
    await run('umount', [target]);
    await containerd.ctr([...SNAPSHOT, 'commit', 'saved', 'work']);
    // Somebody may still have it mounted: it keeps its directory in this boot.
    assert.equal((await service.snapshotter.converter.status()).later, 1);
    await containerd.gc();
    const view = await containerd.ctr([...SNAPSHOT, 'view', '--target', target, 'look', 'saved']);
    await containerd.ctr([...SNAPSHOT, 'label', 'look', 'containerd.io/gc.root=2024-01-01T00:00:00Z']);
    await run('sh', ['-c', view.stdout]);
    assert.deepEqual((await readdir(join(target, 'opt'))).sort(), ['hand', 'one']);
    await run('umount', [target]);
    await containerd.ctr([...SNAPSHOT, 'rm', 'look']);
    await containerd.ctr([...SNAPSHOT, 'rm', 'saved']);
  });

  test('after removing the image and a GC nothing is left', async () => {
    await containerd.ctr(['image', 'rm', '--sync', IMAGE]);
    await containerd.gc();
    await service.client.cleanup();
    assert.deepEqual(await service.client.names(), []);
    assert.deepEqual(await readdir(service.paths.snapshots), []);
    assert.deepEqual(images.retained.at(-1), []);
    assert.deepEqual(mountsBelow(service.dir), []);
  });
});
