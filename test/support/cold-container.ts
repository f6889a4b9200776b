// A running container of a lazy image of its own, with many files that are read one by one from outside, as the container
// sees them; each has its own bytes, so that every read can be judged. For tests that take something away meanwhile.
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { waitFor } from './containerd.ts';
import { busyboxEntries, type LayerSource } from './images.ts';
import { type LazyNode, noise, type PublishedImage } from './lazy-node.ts';

export const COLD_FILE_BYTES = 256 * 1024;
/** Files of one image, unless the test says how many. */
export const COLD_FILES = 250;
/** A span of 1 MiB holds four files: every fifth is in a span of its own. */
export const COLD_STRIDE = 5;
const READ_TIMEOUT_MS = 60_000;

function layers(bottom: LayerSource, seed: string, count: number): LayerSource[] {
  const content = (i: number) => noise(COLD_FILE_BYTES, `${seed} ${i}`);
  const files = Array.from({ length: count }, (_, i) => ({ name: `data/f${i}`, content: content(i) }));
  return [bottom, { entries: [{ name: 'data/', type: 'dir' as const }, ...files] }];
}

/** SHA-256 of a file, or 'EIO'. Errors: any other; a read that hangs. */
export async function sumOfFile(path: string): Promise<string> {
  const hash = createHash('sha256');
  const stream = createReadStream(path);
  const timer = setTimeout(
    () => stream.destroy(new Error(`reading ${path} took ${READ_TIMEOUT_MS} ms`)),
    READ_TIMEOUT_MS,
  );
  try {
    for await (const part of stream) hash.update(part as Buffer);
    return hash.digest('hex');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EIO') return 'EIO';
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

export class ColdContainer {
  readonly name: string;
  readonly pid: number;
  /** Of which it runs. */
  readonly published: PublishedImage;
  readonly #seed: string;
  readonly #node: LazyNode;

  private constructor(node: LazyNode, name: string, seed: string, published: PublishedImage, pid: number) {
    this.#node = node;
    this.name = name;
    this.#seed = seed;
    this.published = published;
    this.pid = pid;
  }

  /** Makes an image that nothing is here of, pulls it, and starts a container of it that stays. */
  static async start(node: LazyNode, name: string, seed: string, files = COLD_FILES): Promise<ColdContainer> {
    const bottom = { entries: await busyboxEntries(['sh', 'sleep', 'sha256sum']) };
    const published = await node.publish(`cold/${name}`, layers(bottom, seed, files));
    await node.rpull(published.lazy);
    const command = ['/bin/sleep', '1000000'];
    await node.containerd.ctr(['run', '-d', '--snapshotter', 'dedup', published.lazy, name, ...command]);
    const pid = await pidOf(node, name);
    if (pid === undefined) throw new Error(`container ${name} does not run`);
    return new ColdContainer(node, name, seed, published, pid);
  }

  /** True as long as it is the process that was started. */
  async runs(): Promise<boolean> {
    return (await pidOf(this.#node, this.name)) === this.pid;
  }

  /** SHA-256 of file `i` as the container sees it now, or 'EIO'. Errors: any other; a read that hangs. */
  read(i: number): Promise<string> {
    return sumOfFile(`/proc/${this.pid}/root/data/f${i}`);
  }

  /** As read, of any file. */
  readPath(path: string): Promise<string> {
    return sumOfFile(`/proc/${this.pid}/root${path}`);
  }

  /** What read() is to answer. */
  sumOf(i: number): string {
    return createHash('sha256')
      .update(noise(COLD_FILE_BYTES, `${this.#seed} ${i}`))
      .digest('hex');
  }

  /** Ends and removes the container; its image stays. */
  async remove(): Promise<void> {
    const { containerd } = this.#node;
    await containerd.ctr(['task', 'kill', '-s', 'SIGKILL', this.name]);
    await waitFor('the container to end', async () => (await pidOf(this.#node, this.name)) === undefined);
    await containerd.ctr(['task', 'rm', this.name]);
    await containerd.ctr(['container', 'rm', this.name]);
  }
}

/** Undefined unless the container's task runs. */
export async function pidOf(node: LazyNode, name: string): Promise<number | undefined> {
  const { stdout } = await node.containerd.ctr(['task', 'ls']);
  const [, pid, status] = new RegExp(`^${name}\\s+(\\d+)\\s+(\\S+)`, 'm').exec(stdout) ?? [];
  return status === 'RUNNING' ? Number(pid) : undefined;
}
