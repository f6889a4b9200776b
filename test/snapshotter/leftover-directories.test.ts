// Directories of converted layers: they go once no key was given them and no mount of the machine names them, whatever its
// mount namespace and however it names them. Real overlay and bind mounts; dedupd is a stand-in.
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readlinkSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { RootPaths } from '../../src/paths.ts';
import { isRoot } from '../../src/runtime.ts';
import { mountedDirectories } from '../../src/snapshotter/mount-users.ts';
import { run, unmountBelow, waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { commitByHand, lowersOf, unpack } from '../support/ordinary-layers.ts';
import { TestService } from '../support/snapshots-service.ts';

const skip = isRoot() ? false : 'needs root: mounts';

describe('directories of converted layers', { skip }, () => {
  let dir: string;
  let images: FakeImages;
  let service: TestService;
  const children: ChildProcess[] = [];

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'leftover-'));
    images = new FakeImages(dir);
    service = await TestService.start({ images, convert: { delayMs: 5, retryMs: 5 } });
  });
  afterEach(async () => {
    for (const child of children.splice(0)) child.kill('SIGKILL');
    await unmountBelow(dir);
    await service.stop();
    await rm(dir, { recursive: true });
  });

  const idOf = async (name: string): Promise<number> => (await service.metastore.get(name)).id;
  const directoryOf = async (name: string): Promise<string> => service.paths.snapshotFs(await idOf(name));
  const converted = (name: string) =>
    waitFor(`conversion of ${name}`, async () => (await service.metastore.get(name)).directory === 'waits');
  const there = async (...names: string[]): Promise<boolean[]> =>
    Promise.all(names.map(async (name) => existsSync(await directoryOf(name))));
  const reasons = async (): Promise<Record<string, string>> =>
    Object.fromEntries((await service.snapshotter.leftovers.waiting()).map(({ name, reason }) => [name, reason]));

  /** Two layers of one image, not converted before `images.down` is taken back. */
  async function twoLayers(): Promise<{ a: string; b: string }> {
    images.down = true;
    const a = await unpack(service.client, 'a');
    return { a, b: await unpack(service.client, 'b', a) };
  }

  async function convert(...names: string[]): Promise<void> {
    images.down = false;
    for (const name of names) await converted(name);
  }

  async function mountPoint(name: string): Promise<string> {
    const path = join(dir, name);
    await mkdir(path);
    return path;
  }

  /** A process in a mount namespace of its own in which `script` has been run; ends with the test. */
  async function elsewhere(script: string, ...flags: string[]): Promise<ChildProcess> {
    const args = [
      '--mount',
      '--propagation',
      'private',
      ...flags,
      'sh',
      '-ec',
      `${script}\necho ready\nexec sleep 120`,
    ];
    const child = spawn('unshare', args, { stdio: ['ignore', 'pipe', 'inherit'] });
    children.push(child);
    let said = '';
    child.stdout?.on('data', (part: Buffer) => {
      said += part.toString();
    });
    await waitFor('the other mount namespace', () => said.includes('ready'));
    assert.notEqual(readlinkSync(`/proc/${child.pid}/ns/mnt`), readlinkSync('/proc/self/ns/mnt'));
    return child;
  }

  async function ended(child: ChildProcess): Promise<void> {
    const exit = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await exit;
  }

  test('go by themselves; the snapshot with its description stays, and reads come from the layer', async () => {
    const a = await unpack(service.client, 'a');
    await converted(a);
    assert.match((await reasons())[a] ?? '', /next Cleanup/);
    await service.client.cleanup();
    assert.deepEqual(await readdir(service.paths.snapshot(await idOf(a))), ['info.json']);
    assert.deepEqual(await reasons(), {});
    const [lower = ''] = lowersOf(await service.client.view('view', a));
    assert.match(await readFile(join(lower, 'a'), 'utf8'), /^content of a/);
    await service.restart();
    await service.client.cleanup();
    assert.deepEqual(await readdir(service.paths.snapshot(await idOf(a))), ['info.json']);
    await service.client.remove('view');
    await service.client.remove(a);
    await service.client.cleanup();
    assert.deepEqual(await readdir(service.paths.snapshots), []);
  });

  test('stay while a key that was given them exists, whether it is mounted or not, and go soon after it', async () => {
    const { a, b } = await twoLayers();
    await service.client.prepare('key', b);
    await service.client.view('view', a);
    await convert(b);
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
    assert.deepEqual(await reasons(), { [a]: 'was given to view', [b]: 'was given to key' });
    await service.client.remove('key');
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, false]);
    await service.restart();
    await service.client.cleanup();
    assert.deepEqual(await there(a), [true]);
    await service.client.remove('view');
    // Without a Cleanup of containerd's: what is in use is looked at again.
    await waitFor('the last directory', async () => !existsSync(await directoryOf(a)));
  });

  test('a commit on top keeps nothing, since only keys are given directories', async () => {
    const { a } = await twoLayers();
    const hand = await commitByHand(service.client, 'hand', a);
    await convert(a);
    await service.client.cleanup();
    assert.deepEqual(await there(a, hand), [false, true]);
  });

  test('stay while a mount names them that outlived its key: an overlay, a bind of one, or of a part of one', async () => {
    const { a, b } = await twoLayers();
    const [mount] = await service.client.prepare('key', b);
    const over = await mountPoint('over');
    await run('mount', ['-t', 'overlay', '-o', mount?.options.join(',') ?? '', 'overlay', over]);
    await service.client.remove('key');
    await convert(b);
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
    assert.match((await reasons())[b] ?? '', new RegExp(`mounted at ${over} \\(seen by process \\d+\\)`));
    assert.match(await readFile(join(over, 'a'), 'utf8'), /^content of a/);
    const part = await mountPoint('part');
    await writeFile(join(part, 'file'), '');
    await run('mount', ['--bind', join(await directoryOf(a), 'a'), join(part, 'file')]);
    await run('umount', [over]);
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, false]);
    await run('umount', [join(part, 'file')]);
    await service.client.cleanup();
    assert.deepEqual(await there(a), [false]);
  });

  test('stay while another mount namespace names them, in paths that are relative or not', async () => {
    const { a, b } = await twoLayers();
    const [fsA, fsB] = [await directoryOf(a), await directoryOf(b)];
    const point = await mountPoint('point');
    const relative = `lowerdir=${await idOf(b)}/fs:${await idOf(a)}/fs`;
    const first = await elsewhere(`cd ${service.paths.snapshots}; mount -t overlay -o ${relative} overlay ${point}`);
    const second = await elsewhere(`mount --bind ${fsA} ${point}`, '--user', '--map-root-user');
    await convert(b);
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
    assert.match((await reasons())[b] ?? '', new RegExp(`process ${first.pid}\\)`));
    await ended(first);
    await service.client.cleanup();
    assert.deepEqual([existsSync(fsA), existsSync(fsB)], [true, false]);
    assert.match((await reasons())[a] ?? '', new RegExp(`process ${second.pid}\\)`));
    await ended(second);
    await service.client.cleanup();
    assert.equal(existsSync(fsA), false);
  });

  test('are told from those of other snapshotters with the same numbers', async () => {
    const paths = new RootPaths(join(dir, 'ours'));
    const place = async (...parts: string[]) => {
      const path = join(dir, ...parts);
      await mkdir(path, { recursive: true });
      return path;
    };
    for (const id of ['1', '2', '3', '4', '5']) await place('ours/snapshots', id, 'fs');
    await symlink(paths.root, join(dir, 'alias'));
    const lower = async (name: string, ...directories: string[]) => {
      const point = await mountPoint(name);
      const other = await place(`${name}-other`);
      const options = `lowerdir=${[...directories, other].join(':')}`;
      await run('mount', ['-t', 'overlay', '-o', options, 'overlay', point]);
    };
    await lower('theirs', await place('overlayfs/snapshots/1/fs'));
    await lower('upper', await place('overlayfs/snapshots/2/fs'), paths.snapshotFs(2));
    await lower('aliased', join(dir, 'alias/snapshots/3/fs'));
    await lower('unclear', await place('mapped/4/fs'));
    await lower('moved', await place('before/snapshots/5/fs'));
    const found = await mountedDirectories(paths);
    assert.deepEqual(
      [1, 2, 3, 4, 5].map((id) => found.get(id)?.split(' ')[0]),
      [undefined, join(dir, 'upper'), join(dir, 'aliased'), join(dir, 'unclear'), undefined],
    );
    // Nobody knows what it was.
    await rename(join(dir, 'before'), join(dir, 'after'));
    assert.equal((await mountedDirectories(paths)).get(5)?.split(' ')[0], join(dir, 'moved'));
    await run('umount', [join(dir, 'moved')]);
    // By its real name the root is known whatever it is called in the configuration.
    assert.equal((await mountedDirectories(new RootPaths(join(dir, 'alias')))).has(3), true);
    assert.equal((await mountedDirectories(new RootPaths(join(dir, 'alias')))).has(2), true);
    // And by what the file system that it lies on calls it.
    await place('other-name');
    await run('mount', ['--bind', paths.root, join(dir, 'other-name')]);
    await run('mount', ['--bind', join(paths.snapshotFs(5)), await mountPoint('bound')]);
    assert.equal((await mountedDirectories(new RootPaths(join(dir, 'other-name')))).has(5), true);
  });

  test('stay while dedupd is away, and are directories again when it does not know the layer', async () => {
    const { a, b } = await twoLayers();
    await convert(b);
    images.down = true;
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
    assert.match((await reasons())[a] ?? '', /waits for dedupd: .*the fake is down/);
    await service.snapshotter.converter.pause();
    images.down = false;
    for (const { layer } of images.converted) images.forgotten.add(layer);
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
    assert.equal((await service.snapshotter.converter.status()).pending, 2);
    assert.deepEqual(lowersOf(await service.client.prepare('key', b)), [await directoryOf(b), await directoryOf(a)]);
  });

  test('stay while a lost metadata.db is not whole again: what could not be restored may use them', async () => {
    const { a, b } = await twoLayers();
    await service.client.prepare('key', b);
    await convert(b);
    const key = await idOf('key');
    await service.down();
    for (const suffix of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + suffix, { force: true });
    await writeFile(join(service.paths.snapshot(key), 'info.json'), 'unreadable');
    await service.up();
    await service.client.cleanup();
    assert.deepEqual(await there(a, b), [true, true]);
  });

  test('a deletion that was interrupted is gone on with, also from a metadata.db that is made again', async () => {
    const { a, b } = await twoLayers();
    await convert(b);
    for (const name of [a, b]) assert.equal(await service.metastore.giveUpDirectory(await idOf(name)), true);
    // One was killed before, the other after its first step.
    await rename(await directoryOf(b), service.paths.snapshotGoing(await idOf(b)));
    await service.restart();
    await service.client.cleanup();
    assert.deepEqual(await reasons(), {});
    for (const name of [a, b]) {
      assert.deepEqual(await readdir(service.paths.snapshot(await idOf(name))), ['info.json']);
    }
    const c = await unpack(service.client, 'c');
    await converted(c);
    const id = await idOf(c);
    await service.down();
    await rename(service.paths.snapshotFs(id), service.paths.snapshotGoing(id));
    for (const suffix of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + suffix, { force: true });
    await service.up();
    await service.client.cleanup();
    assert.deepEqual(await readdir(service.paths.snapshot(id)), ['info.json']);
    // What is going is not taken back.
    images.forgotten.add(images.converted.at(-1)?.layer ?? '');
    await assert.rejects(service.client.prepare('key', c), /cannot look it up/);
  });
});
