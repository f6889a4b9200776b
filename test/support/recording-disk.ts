// A block device that writes down every write and flush it gets, so that a test can have the disk as a power cut at any
// moment would have left it: everything before the last flush, and of the rest what chance decides. A child process
// serves the file below the loop device (fuse-native: any file system will do), so that the test may wait for it.
import { type ChildProcess, fork } from 'node:child_process';
import {
  closeSync,
  constants,
  copyFileSync,
  fdatasyncSync,
  openSync,
  readFileSync,
  readSync,
  statSync,
  writeSync,
} from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { run, unmountBelow, waitFor } from './containerd.ts';

const RECORD_BYTES = 16;
/** Length of a record that stands for a flush. */
const FLUSH = 0;

interface Written {
  readonly offset: number;
  /** Where its bytes begin in the log; `length` of them. */
  readonly at: number;
  readonly length: number;
}

export class RecordingDisk {
  readonly dir: string;
  /** Where the ext4 file system of the disk is mounted. */
  readonly mountPoint: string;
  readonly #server: ChildProcess;

  private constructor(dir: string, server: ChildProcess) {
    this.dir = dir;
    this.mountPoint = join(dir, 'mnt');
    this.#server = server;
  }

  /** An empty ext4 file system of `mib` MiB, mounted, every write of which is recorded from here on. */
  static async create(mib: number): Promise<RecordingDisk> {
    const dir = await mkdtemp(join(tmpdir(), 'recording-disk-'));
    for (const name of ['fuse', 'mnt', 'replay']) await mkdir(join(dir, name));
    await run('truncate', ['-s', `${mib}M`, join(dir, 'disk')]);
    await run('mkfs.ext4', [
      '-q',
      '-b',
      '4096',
      '-m',
      '0',
      '-E',
      'lazy_itable_init=0,lazy_journal_init=0',
      join(dir, 'disk'),
    ]);
    await run('cp', ['--sparse=always', join(dir, 'disk'), join(dir, 'empty')]);
    const server = fork(import.meta.filename, ['serve', dir], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
    const disk = new RecordingDisk(dir, server);
    try {
      await waitFor(
        'the recording disk',
        () => server.exitCode !== null || statSync(join(dir, 'fuse', 'disk'), { throwIfNoEntry: false }) !== undefined,
      );
      // Nothing is written in an order that nobody asked for.
      await run('mount', ['-o', 'loop,data=writeback', join(dir, 'fuse', 'disk'), disk.mountPoint]);
      return disk;
    } catch (error) {
      await disk.remove();
      throw error;
    }
  }

  /** Takes the disk away; its log stays. */
  async stop(): Promise<void> {
    await run('umount', [this.mountPoint], { allowFailure: true });
    await unmountBelow(this.dir);
    this.#server.kill();
    await waitFor(
      'the recording disk to end',
      () => this.#server.exitCode !== null || this.#server.signalCode !== null,
    );
  }

  async remove(): Promise<void> {
    await this.stop();
    await rm(this.dir, { recursive: true, force: true });
  }

  /** What was written, and after how many writes the flushes came. */
  #log(): { writes: Written[]; flushes: number[] } {
    const log = readFileSync(join(this.dir, 'log'));
    const writes: Written[] = [];
    const flushes: number[] = [];
    for (let at = 0; at + RECORD_BYTES <= log.length; ) {
      const offset = Number(log.readBigUInt64LE(at));
      const length = log.readUInt32LE(at + 8);
      at += RECORD_BYTES;
      if (length === FLUSH) flushes.push(writes.length);
      else writes.push({ offset, at, length });
      at += length;
    }
    return { writes, flushes };
  }

  get recorded(): { writes: number; flushes: number } {
    const { writes, flushes } = this.#log();
    return { writes: writes.length, flushes: flushes.length };
  }

  /**
   * The disk after a power cut at `moment` (0 to 1 of all writes): what came before the last flush is there, of the rest
   * each write by the toss of `random`. Mounted, which replays its journal; `visit` gets the mount point.
   */
  async afterPowerCut(
    moment: number,
    random: (below: number) => number,
    visit: (mountPoint: string) => Promise<void>,
  ): Promise<void> {
    const { writes, flushes } = this.#log();
    const end = Math.floor(moment * writes.length);
    const flushed = flushes.findLast((count) => count <= end) ?? 0;
    const kept = writes.slice(0, end).filter((_, i) => i < flushed || random(2) === 1);
    const image = join(this.dir, 'after');
    const mountPoint = join(this.dir, 'replay');
    copyFileSync(join(this.dir, 'empty'), image, constants.COPYFILE_FICLONE);
    const log = openSync(join(this.dir, 'log'), 'r');
    const disk = openSync(image, 'r+');
    for (const { offset, at, length } of kept) {
      const bytes = Buffer.allocUnsafe(length);
      readSync(log, bytes, 0, length, at);
      writeSync(disk, bytes, 0, length, offset);
    }
    closeSync(log);
    closeSync(disk);
    await run('mount', ['-o', 'loop', image, mountPoint]);
    try {
      await visit(mountPoint);
    } finally {
      await run('umount', [mountPoint]);
      await rm(image);
    }
  }
}

type Reply = (status: number, value?: unknown) => void;

/** Child: serves DIR/disk as DIR/fuse/disk and appends every write and flush to DIR/log. */
function serve(dir: string): void {
  const disk = openSync(join(dir, 'disk'), 'r+');
  const log = openSync(join(dir, 'log'), 'a');
  const { size } = statSync(join(dir, 'disk'));
  const record = (offset: number, bytes?: Buffer): void => {
    const head = Buffer.alloc(RECORD_BYTES);
    head.writeBigUInt64LE(BigInt(offset));
    head.writeUInt32LE(bytes?.length ?? FLUSH, 8);
    writeSync(log, bytes === undefined ? head : Buffer.concat([head, bytes]));
  };
  const epoch = new Date(0);
  const attributes = (mode: number, bytes: number) => ({
    mtime: epoch,
    atime: epoch,
    ctime: epoch,
    nlink: 1,
    size: bytes,
    mode,
    uid: 0,
    gid: 0,
  });
  const operations = {
    getattr: (path: string, reply: Reply) => {
      if (path === '/') reply(0, attributes(0o040700, 4096));
      else if (path === '/disk') reply(0, attributes(0o100600, size));
      else reply(-2);
    },
    readdir: (_path: string, reply: Reply) => reply(0, ['disk']),
    open: (_path: string, _flags: number, reply: Reply) => reply(0, 1),
    release: (_path: string, _fd: number, reply: Reply) => reply(0),
    read: (_path: string, _fd: number, into: Buffer, length: number, offset: number, reply: Reply) =>
      reply(readSync(disk, into, 0, length, offset)),
    write: (_path: string, _fd: number, bytes: Buffer, length: number, offset: number, reply: Reply) => {
      const part = bytes.subarray(0, length);
      writeSync(disk, part, 0, length, offset);
      record(offset, part);
      reply(length);
    },
    fsync: (_path: string, _fd: number, _dataOnly: boolean, reply: Reply) => {
      record(0);
      reply(0);
    },
  };
  type FuseConstructor = new (
    at: string,
    operations: object,
    options: object,
  ) => {
    mount(done: (error: Error | null) => void): void;
  };
  const Fuse = createRequire(import.meta.url)('fuse-native') as FuseConstructor;
  new Fuse(join(dir, 'fuse'), operations, { fsname: 'recording-disk', bigWrites: true, timeout: false }).mount(
    (error) => {
      if (error !== null) throw error;
    },
  );
  process.on('disconnect', () => process.exit(0));
  process.on('exit', () => fdatasyncSync(log));
}

if (process.argv[2] === 'serve') serve(process.argv[3]!);
