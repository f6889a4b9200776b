// A stand-in for a dedupd, in a process of its own: holds a root's lock, serves a FUSE session that answers no read, and has
// a thread of its own wait for it. Killed then, it hangs for ever. The file is both: the parent's handle and the child's
// program. Whatever becomes of the test, close() ends the process.
import assert from 'node:assert/strict';
import { type ChildProcess, fork } from 'node:child_process';
import {
  closeSync,
  constants,
  existsSync,
  fstatSync,
  openSync,
  read,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
} from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { minorOf } from '../../src/device-number.ts';
import { type FuseMiss, native } from '../../src/fs/native.ts';
import { lockRoot } from '../../src/fs/root-lock.ts';
import { abortConnection } from '../../src/fs/transport/connections.ts';
import { moveDevices } from '../../src/fs/transport/erofs-mount.ts';
import { createLogger } from '../../src/log.ts';
import { RootPaths, RunPaths } from '../../src/paths.ts';
import { waitFor } from './containerd.ts';

const STORE = 64 << 20;
const HEAD = 1 << 20;
const BLOCK = 4096;
/** Where nothing is present: a read of it waits. */
const COLD = 16 << 20;
const DEVICE = 'hung-holder';

/**
 * What a thread of the holder waits for: a read of its own file, the mount of a loop device over it, or such a device to get
 * another file while the mount reads from it.
 */
export type Wait = 'read' | 'mount' | 'change';

interface Held {
  /** Number of the session's connection. */
  readonly connection: number;
}

export class HungHolder {
  readonly root: string;
  readonly runDir: string;
  readonly #child: ChildProcess;
  readonly #connection: number;
  #readEnded: string | undefined;
  #exited = false;

  private constructor(root: string, runDir: string, child: ChildProcess, connection: number) {
    this.root = root;
    this.runDir = runDir;
    this.#child = child;
    this.#connection = connection;
    child.on('message', (message: { read?: string }) => {
      this.#readEnded = message.read;
    });
    child.once('exit', () => {
      this.#exited = true;
    });
  }

  /**
   * Returns once a request of the holder's own thread has been read by its session. `storeId`: the loop devices of this store
   * are moved to the session first, as a dedupd does that takes over.
   */
  static async start(options: { root: string; runDir: string; wait: Wait; storeId?: string }): Promise<HungHolder> {
    const { root, runDir, wait, storeId = '' } = options;
    const child = fork(fileURLToPath(import.meta.url), ['holder', root, runDir, wait, storeId]);
    const held = await new Promise<Held>((resolve, reject) => {
      child.once('message', (message: Held) => resolve(message));
      child.once('exit', (code, signal) => reject(new Error(`the holder ended: ${code ?? signal}`)));
    });
    return new HungHolder(root, runDir, child, held.connection);
  }

  get pid(): number {
    return this.#child.pid!;
  }

  get paths(): RootPaths {
    return new RootPaths(this.root);
  }

  get run(): RunPaths {
    return new RunPaths(this.runDir);
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /** Kills it, and makes sure that this does not end it. */
  async hang(): Promise<void> {
    this.signal('SIGKILL');
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    assert.ok(this.hangs(), 'it was killed and has not ended');
    const fd = openSync(this.paths.lock, 'r');
    assert.equal(native().flock(fd), false, 'its lock is held');
    closeSync(fd);
  }

  /** It was killed, its main thread has ended, and another one has not. */
  hangs(): boolean {
    const status = existsSync(`/proc/${this.pid}`) ? readFileSync(`/proc/${this.pid}/status`, 'utf8') : '';
    return !this.#exited && /^State:\s+Z/m.test(status) && this.#threads() > 1;
  }

  #threads(): number {
    return Number(/^Threads:\s+(\d+)/m.exec(readFileSync(`/proc/${this.pid}/status`, 'utf8'))?.[1]);
  }

  ended(): Promise<void> {
    return waitFor('the holder to end', () => this.#exited);
  }

  /** Has a holder that lives answer what its thread waits for; what the thread was told. */
  async answer(): Promise<string> {
    this.#child.send('answer');
    await waitFor('the answer', () => this.#readEnded !== undefined);
    return this.#readEnded!;
  }

  async close(): Promise<void> {
    this.signal('SIGKILL');
    const control = await mkdtemp(join(tmpdir(), 'hung-holder-'));
    const ended = (): boolean => this.#exited;
    // The number is another session's once the process has gone: not before it must be.
    const alone = await waitFor('the holder to end', ended, 1_000).catch(() => 'hangs');
    if (alone === 'hangs') await abortConnection(this.#connection, join(control, 'fusectl'), async () => true);
    await waitFor('the holder to end', ended);
    await rm(control, { recursive: true });
  }
}

async function hold(root: string, runDir: string, wait: Wait, storeId: string): Promise<void> {
  const run = new RunPaths(runDir);
  const log = createLogger('holder', { level: 'error', fd: 2 });
  const paths = new RootPaths(root);
  await lockRoot(paths, run, log);
  await mkdir(run.fuseMount, { recursive: true });
  const store = join(runDir, 'holder-store');
  closeSync(openSync(store, 'w'));
  // A device takes only a file of the size that it has.
  const storeBytes = statSync(paths.store, { throwIfNoEntry: false })?.size ?? STORE;
  truncateSync(store, storeBytes);
  const misses: FuseMiss[] = [];
  let onMiss = (): void => {};
  const missed = new Promise<void>((resolve) => {
    onMiss = resolve;
  });
  const session = await native().fuseStart({
    mountDir: run.fuseMount,
    storeFd: openSync(store, 'r'),
    sumsFd: openSync('/dev/null', 'r'),
    storeBytes,
    headBytes: HEAD,
    tailBytes: HEAD,
    presence: native().presenceCreate(storeBytes),
    threads: 2,
    maxBackground: 64,
    onMiss: (batch) => {
      misses.push(...batch);
      onMiss();
    },
    onEnd: () => {},
  });
  // Whoever calls it is connected, and waits.
  rmSync(run.dedupdSocket, { force: true });
  createServer().listen(run.dedupdSocket);
  if (storeId !== '') {
    const file = (image: number): Promise<number> => session.openFile(image);
    const { images } = await moveDevices(storeId, file, () => true, log);
    assert.ok(images.size > 0, 'there are devices to take over');
  }
  const fd = await session.openFile(1);
  const connection = minorOf(fstatSync(fd, { bigint: true }).dev);
  const told = (error: unknown): void => {
    process.send?.({ read: (error as NodeJS.ErrnoException | null)?.code ?? 'bytes' });
  };
  if (wait === 'read') {
    // Past the page cache: what waits for a page there can be killed.
    const direct = openSync(`/proc/self/fd/${fd}`, constants.O_RDONLY | constants.O_DIRECT);
    read(direct, native().alignedBuffer(BLOCK), 0, BLOCK, COLD, told);
  } else {
    const rest = { readOnly: true, directIo: true, offset: COLD, sizeLimit: 0, blockSize: BLOCK, autoclear: true };
    const { path } = await native().loopAttach({ fd, ...rest, name: DEVICE });
    // It goes with its last user: the mount that fails, or this process.
    void native().mount({ source: path, target: root, fstype: 'ext4', flags: 1, data: '' }).then(told, told);
    await missed;
    if (wait === 'change') void native().loopChangeFd(path, await session.openFile(2), DEVICE);
  }
  await missed;
  // A change of the file goes its way meanwhile.
  setTimeout(() => process.send?.({ connection }), wait === 'change' ? 300 : 0);
  process.on('message', () => {
    for (const { id, length } of misses.splice(0)) session.reply(id, [new Uint8Array(length)]);
  });
}

if (process.argv[2] === 'holder') {
  const [root, runDir, wait, storeId] = process.argv.slice(3);
  await hold(root!, runDir!, wait as Wait, storeId!);
}
