// EROFS with the FUSE session as its data device: the stack a container reads through, with files of real content.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { type FuseSession, type LoopDevice, MNT_DETACH, MS_NODEV, MS_RDONLY, native } from '../../src/fs/native.ts';
import { blockSums } from '../support/block-sums.ts';

const BLOCK = 4096;
const MIB = 1 << 20;
const limit = { timeout: 40_000 };

/** Runs sha256sum in another process: this one answers the misses. */
function sums(cwd: string, names: readonly string[]): Promise<Map<string, string>> {
  return new Promise((resolve, reject) => {
    const child = spawn('timeout', ['20', 'sha256sum', ...names], { cwd });
    let out = '';
    let err = '';
    child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()));
    child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()));
    child.on('close', (code) => {
      if (code !== 0) reject(new Error(`sha256sum ended with ${code}: ${err}`));
      else
        resolve(
          new Map(
            out
              .trim()
              .split('\n')
              .map((line) => [line.slice(66), line.slice(0, 64)]),
          ),
        );
    });
  });
}

describe('EROFS over the FUSE session', () => {
  let dir: string;
  let session: FuseSession | undefined;
  let storeFd: number | undefined;
  let sumsFd: number | undefined;
  let presence: Uint8Array;
  const loops: LoopDevice[] = [];
  const expected = new Map<string, string>();
  let content: Buffer;
  let misses = 0;
  let mountPoint: string | undefined;

  before(async () => {
    dir = mkdtempSync(join(tmpdir(), 'dedup-erofs-'));
    const tree = join(dir, 'tree');
    mkdirSync(tree);
    for (const [i, bytes] of [100, 4096, 5000, MIB, 3 * MIB + 17, 9 * MIB].entries()) {
      const data = randomBytes(bytes);
      writeFileSync(join(tree, `file${i}`), data);
      expected.set(`file${i}`, createHash('sha256').update(data).digest('hex'));
    }
    const meta = join(dir, 'meta');
    const storePath = join(dir, 'store');
    execFileSync('mkfs.erofs', ['--quiet', `--chunksize=${MIB}`, `--blobdev=${storePath}`, meta, tree], {
      stdio: 'ignore',
    });
    const used = statSync(storePath).size;
    const storeBytes = 64 * MIB;
    truncateSync(storePath, storeBytes);
    content = readFileSync(storePath);
    const fd = openSync(storePath, 'r');
    storeFd = fd;
    const sumsPath = join(dir, 'sums');
    writeFileSync(sumsPath, blockSums(content));
    sumsFd = openSync(sumsPath, 'r');
    presence = native().presenceCreate(storeBytes);
    // Every second MiB is here already, the rest comes from JavaScript.
    for (let at = 0; at < used; at += 2 * MIB) native().presenceSet(presence, at / BLOCK, MIB / BLOCK, true);
    const mountDir = join(dir, 'session');
    mkdirSync(mountDir);
    session = await native().fuseStart({
      mountDir,
      storeFd: fd,
      sumsFd,
      storeBytes,
      headBytes: 0,
      tailBytes: 0,
      presence,
      threads: 3,
      maxBackground: 512,
      onMiss: (batch) => {
        misses += batch.length;
        for (const miss of batch)
          setTimeout(() => session!.reply(miss.id, [content.subarray(miss.offset, miss.offset + miss.length)]), 3);
      },
      onEnd: () => {},
    });
    const attach = async (fd: number, directIo: boolean, name: string): Promise<LoopDevice> => {
      const device = await native().loopAttach({
        fd,
        readOnly: true,
        directIo,
        offset: 0,
        sizeLimit: 0,
        blockSize: BLOCK,
        autoclear: false,
        name,
      });
      closeSync(fd);
      loops.push(device);
      return device;
    };
    const metadata = await attach(openSync(meta, 'r'), false, 'metadata');
    const data = await attach(await session!.openFile(1), true, 'data');
    mountPoint = join(dir, 'image');
    mkdirSync(mountPoint);
    await native().mount({
      source: metadata.path,
      target: mountPoint!,
      fstype: 'erofs',
      flags: MS_RDONLY | MS_NODEV,
      data: `device=${data.path}`,
    });
  });

  after(async () => {
    if (mountPoint !== undefined)
      await native()
        .umount(mountPoint, MNT_DETACH)
        .catch(() => {});
    await session?.close();
    for (const device of loops) await native().loopDetach(device.path);
    if (storeFd !== undefined) closeSync(storeFd);
    if (sumsFd !== undefined) closeSync(sumsFd);
    rmSync(dir, { recursive: true, force: true });
  });

  it('reads every file right, from verified blocks and from misses', limit, async () => {
    assert.deepEqual(await sums(mountPoint!, [...expected.keys()]), expected);
    assert.ok(misses > 0);
    assert.ok(session!.stats().hits > 0);
    assert.equal(session!.stats().errors, 0);
  });

  it('reads on through a loop device that was switched to the local file', limit, async () => {
    const fd = openSync(join(dir, 'store'), 'r');
    await native().loopChangeFd(loops[1]!.path, fd);
    closeSync(fd);
    await session!.close();
    // A remount would need the page cache gone; reading by O_DIRECT would need it not used: drop this mount's cache.
    await native().umount(mountPoint!, 0);
    await native().mount({
      source: loops[0]!.path,
      target: mountPoint!,
      fstype: 'erofs',
      flags: MS_RDONLY,
      data: `device=${loops[1]!.path}`,
    });
    assert.deepEqual(await sums(mountPoint!, [...expected.keys()]), expected);
  });
});
