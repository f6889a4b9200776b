import assert from 'node:assert/strict';
import { statfsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { gzipSync } from 'node:zlib';
import { parseConfig } from '../../src/config.ts';
import { digestOf } from '../../src/digest.ts';
import type { ConvertLayerMessage, ConvertProgressMessage } from '../../src/fs/control-server.ts';
import { DataPlane } from '../../src/fs/data-plane.ts';
import type { LocalBlobs } from '../../src/fs/registry/local-blobs.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { isRoot } from '../../src/runtime.ts';
import { GiB, MiB } from '../../src/units.ts';
import { run } from '../support/containerd.ts';
import { noise, prose, quiet } from '../support/lazy-store.ts';
import { tarOf } from '../support/tar.ts';
import { assertSameTree } from '../support/tree-walk.ts';

const skip = isRoot() ? false : 'needs root: a FUSE session';
const NOBODY = new AbortController().signal;
const nothing = (): void => undefined;

describe('ordinary layers', { skip }, () => {
  let dir: string;
  let directory: string;
  let plane: DataPlane;
  /** Blobs of a containerd that is not there: namespace and digest, as asked for. */
  let asked: string[];
  const undo: (() => Promise<unknown>)[] = [];
  const content = new Map<string, Buffer>();

  const blobs: LocalBlobs = async (namespace, digest) => {
    asked.push(`${namespace} ${digest}`);
    const blob = content.get(digest);
    if (blob === undefined) return undefined;
    return {
      size: blob.length,
      stream: (async function* () {
        for (let at = 0; at < blob.length; at += 100_000) yield blob.subarray(at, at + 100_000);
      })(),
      [Symbol.asyncDispose]: async () => {},
    };
  };

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'dedup-ordinary-'));
    directory = join(dir, 'fs');
    await mkdir(join(directory, 'etc'), { recursive: true });
    for (let i = 0; i < 50; i++) await writeFile(join(directory, 'etc', `f${i}`), prose(`f${i}`, 10 + i * 1000));
    await writeFile(join(directory, 'large'), noise('large', 9_000_000));
    await symlink('etc/f1', join(directory, 'link'));
    content.clear();
    asked = [];
    await open();
  });

  afterEach(async () => {
    await plane?.close();
    for (const step of undo.splice(0)) await step();
    await rm(dir, { recursive: true, force: true });
  });

  async function open(config: Readonly<Record<string, unknown>> = {}): Promise<void> {
    const parsed = parseConfig({ root: join(dir, 'root'), run_dir: join(dir, 'run'), ...config });
    const paths = new RootPaths(parsed.root);
    const run = new RunPaths(parsed.run_dir);
    plane = await DataPlane.open({ config: parsed, paths, run, localBlobs: blobs, log: quiet });
  }

  const plain = (): ConvertLayerMessage => ({
    snapshot: 1,
    directory,
    bottom: true,
    layer: '',
    manifest: '',
    sources: [],
    namespace: 'default',
    chain_id: '',
    parent_chain_id: '',
    bytes: 0,
  });

  /** The same tree as a blob that containerd has. */
  async function inContent(): Promise<ConvertLayerMessage> {
    const tar = join(dir, 'layer.tar');
    await run('tar', ['--numeric-owner', '--format=posix', '-C', directory, '-cf', tar, '.']);
    const blob = gzipSync(await readFile(tar));
    content.set(digestOf(blob), blob);
    // At the bottom the chain ID is that of the uncompressed layer.
    const chain_id = digestOf(await readFile(tar));
    const sources = [{ host: 'registry.invalid', repository: 'app' }];
    return { ...plain(), layer: digestOf(blob), sources, chain_id };
  }

  async function assertShows(key: { digest: string; index: string; scope: string }): Promise<void> {
    const { path } = await plane.mountImage([key], true, []);
    assertSameTree(path, directory, { ignoreMtimeOf: [''] });
    await plane.releaseImages([]);
  }

  it('are read from their directory when nothing else is known, and shown as it was', async () => {
    const seen: number[] = [];
    const row = await plane.convertLayer(plain(), ({ bytes }) => seen.push(bytes), NOBODY);
    assert.ok(seen.length > 1 && seen.at(-1)! > 9_000_000, `${seen}`);
    assert.deepEqual(asked, []);
    await assertShows(row);
  });

  it('survive a crash right after they were converted: all of them is on the disk', async () => {
    const row = await plane.convertLayer(plain(), nothing, NOBODY);
    const copy = join(dir, 'crashed');
    await run('cp', ['-a', '--sparse=always', join(dir, 'root'), copy]);
    await plane.close();
    await rm(join(dir, 'root'), { recursive: true });
    await run('mv', [copy, join(dir, 'root')]);
    await open();
    await assertShows(row);
  });

  it("are read from containerd's copy when its digest and source are known, which leaves an index behind", async () => {
    const layer = await inContent();
    const row = await plane.convertLayer(layer, nothing, NOBODY);
    assert.deepEqual(asked, [`default ${layer.layer}`]);
    assert.equal(row.digest, layer.layer);
    await assertShows(row);
    // The image is removed, and pulled again: nothing need be read to know what is in the layer.
    const { dropped, waiting, again_ms } = await plane.retainLayers([]);
    assert.deepEqual([dropped, waiting], [0, 1], 'it is kept for its caller');
    assert.ok(again_ms > 5_000 && again_ms <= 10_000, `for ${again_ms} ms`);
    const key = { digest: layer.layer, index: '', scope: '' };
    const request = { layer: key, sources: layer.sources, manifest: '', siblings: [], budget_ms: 500, size: 0 };
    assert.equal((await plane.prepareLayer(request)).lazy, true);
    assert.deepEqual(await plane.retainLayers([]), { dropped: 1, waiting: 0, again_ms: 0 });
    // Nobody has read from that registry, and it does not answer: the ordinary way will tell.
    const again = await plane.prepareLayer(request);
    assert.equal(again.lazy, false, again.reason);
  });

  it('are read from their directory where no index is to be left behind, or containerd has collected its copy', async () => {
    const layer = await inContent();
    await plane.close();
    await open({ publish_index: 'off' });
    const off = await plane.convertLayer(layer, nothing, NOBODY);
    assert.deepEqual(asked, []);
    assert.notEqual(off.digest, layer.layer);
    await plane.close();
    await open();
    content.clear();
    const collected = await plane.convertLayer(layer, nothing, NOBODY);
    assert.deepEqual(asked, [`default ${layer.layer}`]);
    assert.equal(collected.index, off.index);
    await assertShows(collected);
  });

  it('are read from their directory when a link leads into a layer below, of which containerd made a copy', async () => {
    const layer = await inContent();
    const linked = gzipSync(tarOf([{ name: 'copied', type: 'hardlink', linkname: 'below' }]));
    content.set(digestOf(linked), linked);
    const row = await plane.convertLayer({ ...layer, layer: digestOf(linked) }, nothing, NOBODY);
    assert.notEqual(row.digest, digestOf(linked));
    await assertShows(row);
  });

  it('are read from their directory when labels name another blob than the one that was unpacked', async () => {
    const layer = await inContent();
    const other = gzipSync(tarOf([{ name: 'evil', content: 'evil' }]));
    content.set(digestOf(other), other);
    const row = await plane.convertLayer({ ...layer, layer: digestOf(other) }, nothing, NOBODY);
    assert.deepEqual(asked, [`default ${digestOf(other)}`]);
    assert.notEqual(row.digest, digestOf(other));
    await assertShows(row);
  });

  it('are verified anew where recorded presence cannot be believed, and told apart when something is missing', async () => {
    const row = await plane.convertLayer(plain(), nothing, NOBODY);
    const database = join(dir, 'root', 'index.db');
    await plane.close();
    await run('cp', [database, `${database}.bak`]);
    for (const damage of [false, true]) {
      await open();
      await plane.confirmLayer(row);
      await plane.close();
      // The copy is older than the last start.
      await run('cp', [`${database}.bak`, database]);
      if (damage)
        await run('fallocate', ['--punch-hole', '-o', String(64 * GiB), '-l', '4096', join(dir, 'root/chunks/store')]);
      await open();
      if (damage) await assert.rejects(plane.confirmLayer(row), { code: 'NOT_FOUND' });
      else await assertShows(row);
      await plane.close();
    }
    await open();
  });

  it('are read from their directory when what containerd has is not what it is named after', async () => {
    const layer = await inContent();
    const damaged = Buffer.from(content.get(layer.layer)!);
    damaged[damaged.length >> 1]! ^= 1;
    content.set(layer.layer, damaged);
    const row = await plane.convertLayer(layer, nothing, NOBODY);
    assert.notEqual(row.digest, layer.layer);
    await assertShows(row);
  });

  it('take no more disk space when they are converted again, and none when that was given up', async () => {
    const stop = new AbortController();
    const halfway = ({ bytes }: { bytes: number }): void => {
      if (bytes > 4_500_000) stop.abort(new Error('enough'));
    };
    await assert.rejects(plane.convertLayer(plain(), halfway, stop.signal));
    assert.equal((await plane.stats()).present_bytes, 0);
    await plane.convertLayer(plain(), nothing, NOBODY);
    const { present_bytes: once } = await plane.stats();
    await plane.convertLayer({ ...plain(), snapshot: 2 }, nothing, NOBODY);
    assert.equal((await plane.stats()).present_bytes, once);
  });

  /** The root on a disk of its own. */
  async function onDisk(mib: number): Promise<string> {
    await plane.close();
    const root = join(dir, 'root');
    await rm(root, { recursive: true });
    await mkdir(root);
    await run('truncate', ['-s', `${mib}M`, join(dir, 'disk')]);
    await run('mkfs.ext4', ['-q', '-b', '4096', '-m', '0', join(dir, 'disk')]);
    await run('mount', ['-o', 'loop', join(dir, 'disk'), root]);
    undo.push(async () => {
      await plane.close();
      await run('umount', [root]);
    });
    await open();
    return root;
  }

  it('are not begun where there is no room for them', async () => {
    const root = await onDisk(512);
    const before = statfsSync(root).bavail;
    const seen: unknown[] = [];
    const large = { ...plain(), bytes: 300 * MiB };
    await assert.rejects(
      plane.convertLayer(large, (step) => seen.push(step), NOBODY),
      { code: 'STORE_FULL', message: /^no room: 300\.0 MiB needed, \d+\.\d MiB free beside the 256\.0 MiB / },
    );
    assert.deepEqual(seen, []);
    assert.equal(statfsSync(root).bavail, before);
    await plane.close();
    await open({ quota_bytes: 8 * MiB });
    const message = 'no room in quota_bytes: 9.0 MiB needed, 8.0 MiB free';
    await assert.rejects(plane.convertLayer({ ...plain(), bytes: 9 * MiB }, nothing, NOBODY), { message });
    await plane.close();
    await open();
    await assertShows(await plane.convertLayer({ ...plain(), bytes: 9 * MiB }, nothing, NOBODY));
  });

  it('stop where their room is taken meanwhile: others keep theirs, and what was written is given back', async () => {
    const root = await onDisk(512);
    const other = await plane.convertLayer(plain(), nothing, NOBODY);
    const { present_bytes } = await plane.stats();
    const large = join(dir, 'large-layer');
    await mkdir(large);
    await run('sh', ['-c', `head -c ${300 * MiB} /dev/urandom > ${large}/random`]);
    const freeBytes = () => statfsSync(root).bavail * 4096;
    let lowest = freeBytes();
    const progress = () => {
      lowest = Math.min(lowest, freeBytes());
    };
    const request = { ...plain(), snapshot: 2, directory: large };
    for (const bytes of [0, 8 * MiB]) {
      // Its size is not known, or more than was said.
      await assert.rejects(plane.convertLayer({ ...request, bytes }, progress, NOBODY), { code: 'STORE_FULL' });
      assert.ok(lowest > 240 * MiB && lowest < 300 * MiB, `${lowest / MiB} MiB`);
    }
    assert.equal((await plane.stats()).present_bytes, present_bytes);
    await assertShows(other);
  });

  it('say what they come to, and why nothing is done while the node is in use', async () => {
    const seen: ConvertProgressMessage[] = [];
    const layer = { ...(await inContent()), bytes: 9 * MiB };
    const inUse = 'somebody pulls, mounts or waits for a read';
    const mounts = setInterval(() => void plane.mountImage([], true, []).catch(nothing), 5);
    const see = (step: ConvertProgressMessage): void => {
      seen.push(step);
      if (step.held === inUse) clearInterval(mounts);
    };
    await plane.convertLayer(layer, see, NOBODY).finally(() => clearInterval(mounts));
    const blob = content.values().next().value?.length;
    assert.deepEqual(seen[0], { bytes: 0, total: 9 * MiB, entries: 0, held: 'containerd is asked for its copy' });
    assert.deepEqual([seen.at(-1)?.total, seen.at(-1)?.held], [blob, '']);
    assert.ok(seen.some(({ held }) => held === inUse));
  });

  it('of which the file system cannot show a part are left alone, by name', async () => {
    await run('mkfifo', [join(directory, 'fifo')]);
    await run('python3', [
      '-c',
      'import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])',
      join(directory, 's'),
    ]);
    await assert.rejects(plane.convertLayer(plain(), nothing, NOBODY), { code: 'LAYER_NOT_LAZY', message: /\bs\b/ });
    assert.equal((await plane.stats()).chunks, 0);
  });
});
