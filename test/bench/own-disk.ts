// A disk of a benchmark's own: an ext4 file system on a loop device over a sparse file. What is written to it is written by
// what is measured and by its file system, whatever else the machine does. It is slower than the disk it lies on.
import { readFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { run } from '../support/containerd.ts';

export class OwnDisk {
  readonly #dir: string;
  readonly #loop: string;

  private constructor(dir: string, loop: string) {
    this.#dir = dir;
    this.#loop = loop;
  }

  /** Makes and mounts it; `bytes` is its size. Errors: those of mkfs.ext4, losetup and mount. */
  static async create(bytes: number): Promise<OwnDisk> {
    const dir = await mkdtemp(join(tmpdir(), 'bench-disk-'));
    const image = join(dir, 'disk');
    let loop = '';
    try {
      await mkdir(join(dir, 'mnt'));
      await run('truncate', ['-s', String(bytes), image]);
      // Everything is initialized now, not by the kernel while something is measured.
      await run('mkfs.ext4', ['-q', '-m', '0', '-E', 'lazy_itable_init=0,lazy_journal_init=0', image], {
        timeoutMs: 300_000,
      });
      loop = (await run('losetup', ['--direct-io=on', '--find', '--show', image])).stdout.trim();
      await run('mount', ['-t', 'ext4', loop, join(dir, 'mnt')]);
    } catch (error) {
      if (loop !== '') await run('losetup', ['--detach', loop], { allowFailure: true });
      await rm(dir, { recursive: true, force: true });
      throw error;
    }
    return new OwnDisk(dir, loop);
  }

  get mountPoint(): string {
    return join(this.#dir, 'mnt');
  }

  /** Bytes that have reached it so far. Seventh field of block/stat: sectors of 512 bytes (kernel, Documentation/block/stat.rst). */
  writtenBytes(): number {
    const fields = readFileSync(`/sys/block/${basename(this.#loop)}/stat`, 'utf8')
      .trim()
      .split(/\s+/);
    return Number(fields[6]) * 512;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await run('umount', [this.mountPoint], { timeoutMs: 300_000 });
    await run('losetup', ['--detach', this.#loop]);
    await rm(this.#dir, { recursive: true, force: true });
  }
}
