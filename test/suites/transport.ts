// What every transport and both layouts must do, on real kernel mounts: right bytes, metadata without the network, errors
// instead of wrong bytes, nothing left behind. Called with a way to open a data plane.
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { run } from '../support/containerd.ts';
import { FaultProxy } from '../support/fault-proxy.ts';
import { makeImage, pushLayout } from '../support/images.ts';
import { noise } from '../support/lazy-node.ts';
import { PROGRAM } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

/** A running data plane with the transport under test, on `root` and `run` below a directory of the suite. */
export interface OpenedTransport {
  mount(reference: string, directory: string): Promise<void>;
  unmount(directory: string): Promise<void>;
  /** Open descriptors of the process that serves. */
  descriptors(): number;
  close(): Promise<void>;
}

export interface TransportPlace {
  readonly dir: string;
  readonly chunkBytes: number;
}

/** Opens the transport; called again after close(), on the same directory. */
export type OpenTransport = (place: TransportPlace) => Promise<OpenedTransport>;

/** Descriptors that a process has open. */
export function descriptorsOf(pid: number | 'self'): number {
  return readdirSync(`/proc/${pid}/fd`).length;
}

const CHUNK_BYTES = 1 << 20;
const BIG_BYTES = 5 * (1 << 20) + 123;

function mountsBelow(dir: string): string[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => line.split(' ')[4]?.startsWith(dir));
}

/** sha256sum of a file, read by another process: this one may be the one that serves it. */
async function sumOf(path: string): Promise<string> {
  return (await run('sha256sum', [path], { timeoutMs: 30_000 })).stdout.slice(0, 64);
}

export function transportSuite(title: string, openTransport: OpenTransport): void {
  describe(title, () => {
    let dir: string;
    let registry: RegistryProcess;
    let proxy: FaultProxy;
    let reference: string;
    let plane: OpenedTransport | undefined;
    const files = new Map<string, Buffer>([
      ['big', noise(BIG_BYTES, 'big')],
      ['small', Buffer.from('a few bytes\n')],
      ['same-as-small', Buffer.from('a few bytes\n')],
      ['zeros', Buffer.alloc(3 << 20)],
      ['empty', Buffer.alloc(0)],
      ['late', noise(3 << 20, 'late')],
    ]);

    const open = (): Promise<OpenedTransport> => openTransport({ dir, chunkBytes: CHUNK_BYTES });
    const path = (name: string): string => join(dir, 'mnt', name);

    before(async () => {
      dir = await mkdtemp(join(tmpdir(), 'transport-'));
      await mkdir(join(dir, 'mnt'));
      registry = await RegistryProcess.start();
      proxy = await FaultProxy.start(`http://${registry.host}`);
      const layers = [
        { entries: [...files].slice(0, 3).map(([name, content]) => ({ name, content })) },
        { entries: [...files].slice(3).map(([name, content]) => ({ name, content })) },
      ];
      const image = await makeImage({ layers, into: join(dir, 'layout') });
      // With an index: what is read whole to make one would be here already.
      const pushed = await pushLayout(image.dir, image.tag, registry.host, 'files');
      await run(PROGRAM, ['index', pushed, '--annotate', `${registry.host}/files:lazy`]);
      reference = `${proxy.host}/files:lazy`;
      plane = await open();
      await plane.mount(reference, join(dir, 'mnt'));
    });

    after(async () => {
      await plane?.close();
      await proxy?.stop();
      await registry?.stop();
      await rm(dir, { recursive: true, force: true });
    });

    it('shows names and sizes without asking the registry', async () => {
      const seen = proxy.seen.length;
      const { stdout } = await run('find', [path(''), '-type', 'f', '-printf', '%f %s\n']);
      const listed = stdout.trim().split('\n').sort();
      assert.deepEqual(listed, [...files].map(([name, content]) => `${name} ${content.length}`).sort());
      assert.equal(proxy.seen.length, seen);
    });

    it('gives the right bytes, whatever is asked for in whatever order', async () => {
      const { createHash } = await import('node:crypto');
      for (const name of ['small', 'zeros', 'big', 'same-as-small', 'empty']) {
        const expected = createHash('sha256').update(files.get(name)!).digest('hex');
        assert.equal(await sumOf(path(name)), expected, name);
      }
    });

    it('gives ranges that cross chunks and end at the end of the file', async () => {
      await run('sh', ['-c', 'echo 3 > /proc/sys/vm/drop_caches']);
      const big = files.get('big')!;
      for (const [skip, count] of [
        [CHUNK_BYTES - 5, 10],
        [3 * CHUNK_BYTES - 4096, 8192],
        [BIG_BYTES - 77, 200],
      ] as const) {
        const { stdout } = await run('sh', [
          '-c',
          `tail -c +${skip + 1} ${path('big')} | head -c ${count} | base64 -w0`,
        ]);
        assert.ok(Buffer.from(stdout, 'base64').equals(big.subarray(skip, skip + count)), `at ${skip}`);
      }
    });

    it('answers an error, not other bytes, when the registry delivers wrong ones, and recovers', async () => {
      proxy.setRules({ method: 'GET', path: /blobs/, fault: { kind: 'wrongBytes', at: 1000 } });
      const failed = await run('sha256sum', [path('late')], { allowFailure: true, timeoutMs: 60_000 });
      assert.notEqual(failed.code, 0);
      assert.match(failed.stderr, /Input\/output error/);
      proxy.setRules();
      // A failed piece is remembered for about a second.
      await new Promise((resolve) => setTimeout(resolve, 1_500));
      const { createHash } = await import('node:crypto');
      assert.equal(await sumOf(path('late')), createHash('sha256').update(files.get('late')!).digest('hex'));
    });

    it('shows no FUSE mount, and after close nothing is mounted or open', async () => {
      assert.deepEqual(
        mountsBelow(dir).filter((line) => / - fuse/.test(line)),
        [],
      );
      await plane!.close();
      plane = undefined;
      assert.deepEqual(mountsBelow(dir), []);
    });

    it('finds everything it fetched after a restart, and leaks no descriptor over rounds of mounting', async () => {
      plane = await open();
      const ranges = (): number => proxy.seen.filter((request) => request.range !== undefined).length;
      const fetched = ranges();
      let before = 0;
      for (let round = 0; round < 4; round++) {
        await plane.mount(reference, join(dir, 'mnt'));
        const { createHash } = await import('node:crypto');
        assert.equal(await sumOf(path('big')), createHash('sha256').update(files.get('big')!).digest('hex'));
        await plane.unmount(join(dir, 'mnt'));
        if (round === 1) before = plane.descriptors();
      }
      assert.ok(plane.descriptors() <= before + 1, `${plane.descriptors()} descriptors, ${before} before`);
      assert.equal(ranges(), fetched, 'what was here was fetched again');
    });
  });
}
