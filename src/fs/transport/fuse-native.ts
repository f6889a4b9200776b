// `transport: fuse-native`: the same view of the store through the fuse-native package (libfuse 2.9), kept as a choice.
// It negotiates no ASYNC_DIO, so the kernel asks for one range of an image at a time, and every read crosses the JS
// thread: slower than fuse.ts in every measurement (docs/decisions/0002-native-fuse-session.md).
import { closeSync, constants, writeFileSync } from 'node:fs';
import { type FileHandle, mkdir, open } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { constants as osConstants } from 'node:os';
import { minorOf } from '../../device-number.ts';
import { DedupError, ERROR_CODES, errorCode, wrapError } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES } from '../../units.ts';
import { MNT_DETACH, native } from '../native.ts';
import { mountErofs, unmountErofs } from './erofs-mount.ts';
import type { FuseTransportOptions } from './fuse.ts';
import type { MountSpec, Resumed, SeenRead, Transport, TransportCapabilities, TransportStats } from './transport.ts';

type Reply = (status: number, value?: unknown) => void;

/** The part of fuse-native that is used; the package has no types. */
interface FuseNative {
  mount(callback: (error: Error | null) => void): void;
}
type FuseNativeConstructor = new (
  mountPoint: string,
  operations: Record<string, (...args: never[]) => void>,
  options: Record<string, unknown>,
) => FuseNative;

const CAPABILITIES: TransportCapabilities = Object.freeze({
  name: 'fuse-native',
  parallelMisses: false,
  failsClosed: true,
  survivesDaemon: false,
  seesHits: true,
  direct: false,
});

const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;
/** Reads that are kept for takeReads(). */
const MAX_NOTED = 65_536;
const IMAGE_NAME = /^\/(\d{1,15})$/;

export class FuseNativeTransport implements Transport {
  readonly capabilities = CAPABILITIES;
  readonly #options: FuseTransportOptions;
  readonly #log: Logger;
  #root: FileHandle | undefined;
  /** Of the session's connection in fusectl. */
  #connection = 0;
  /** Tells others the number, should this process be killed and hang (root-lock.ts). */
  #mark: number | undefined;
  readonly #counters = { requests: 0, errors: 0 };
  readonly #watched = new Set<number>();
  #seen: SeenRead[] = [];

  private constructor(options: FuseTransportOptions) {
    this.#options = options;
    this.#log = options.log;
  }

  /** Mounts the session, keeps its root open and detaches it. Errors: KERNEL. */
  static async start(options: FuseTransportOptions): Promise<FuseNativeTransport> {
    const transport = new FuseNativeTransport(options);
    await mkdir(options.mountDir, { recursive: true, mode: 0o700 });
    const Fuse = createRequire(import.meta.url)('fuse-native') as FuseNativeConstructor;
    const fuse = new Fuse(options.mountDir, transport.#operations(), {
      fsname: 'dedup',
      maxRead: 1 << 20,
      // The package answers for us after a time-out of its own otherwise: with data it does not have.
      timeout: false,
    });
    try {
      await new Promise<void>((resolve, reject) => fuse.mount((error) => (error === null ? resolve() : reject(error))));
      transport.#root = await open(options.mountDir, constants.O_RDONLY | constants.O_DIRECTORY);
      // A FUSE file system's connection has the minor number of its device.
      transport.#connection = minorOf((await transport.#root.stat({ bigint: true })).dev);
      transport.#mark = native().fuseMark(transport.#connection);
      await native().umount(options.mountDir, MNT_DETACH);
    } catch (error) {
      throw wrapError(error, `starting fuse-native on ${options.mountDir}`, 'KERNEL');
    }
    return transport;
  }

  #operations(): Record<string, (...args: never[]) => void> {
    const epoch = new Date(0);
    const attributes = (mode: number, size: number): unknown => {
      return { mtime: epoch, atime: epoch, ctime: epoch, nlink: 1, size, mode, uid: 0, gid: 0 };
    };
    return {
      getattr: (path: string, reply: Reply) => {
        if (path === '/') reply(0, attributes(S_IFDIR | 0o700, 4096));
        else if (IMAGE_NAME.test(path)) reply(0, attributes(S_IFREG | 0o400, this.#options.store.storeBytes));
        else reply(-osConstants.errno.ENOENT);
      },
      readdir: (_path: string, reply: Reply) => reply(0, []),
      open: (path: string, flags: number, reply: Reply) => {
        const image = IMAGE_NAME.exec(path)?.[1];
        if (image === undefined) reply(-osConstants.errno.ENOENT);
        else if ((flags & 3) !== constants.O_RDONLY) reply(-osConstants.errno.EACCES);
        else reply(0, Number(image));
      },
      release: (_path: string, _fd: number, reply: Reply) => reply(0),
      read: (path: string, _fd: number, into: Buffer, length: number, offset: number, reply: Reply) => {
        void this.#read(path, into, length, offset).then((status) => reply(status));
      },
    } as Record<string, (...args: never[]) => void>;
  }

  /** Fills `into` with exactly `length` bytes and gives `length`, or gives a negative errno. Never rejects. */
  async #read(path: string, into: Buffer, length: number, offset: number): Promise<number> {
    this.#counters.requests++;
    try {
      const { store } = this.#options;
      const head = Math.max(0, Math.min(length, store.headBytes - offset));
      const tail = Math.max(0, Math.min(length - head, offset + length - (store.storeBytes - store.tailBytes)));
      const wanted = length - head - tail;
      into.fill(0, 0, head);
      into.fill(0, length - tail, length);
      let at = head;
      if (wanted > 0) {
        const image = Number(IMAGE_NAME.exec(path)?.[1] ?? 0);
        this.#note(image, offset + head, wanted);
        for (const part of await this.#options.source.read({ offset: offset + head, length: wanted }, image)) {
          into.set(part, at);
          at += part.length;
        }
      }
      if (at + tail !== length) throw new DedupError('INTERNAL', `a read of ${length} bytes gave ${at + tail}`);
      return length;
    } catch (error) {
      this.#counters.errors++;
      this.#log.warn({ err: error, path, offset, length }, 'a read fails');
      return -osConstants.errno[ERROR_CODES[errorCode(error)].errno];
    }
  }

  async mount(spec: MountSpec): Promise<void> {
    if (this.#root === undefined) throw new DedupError('CLOSED', 'the fuse-native transport is closed');
    const file = await open(`/proc/self/fd/${this.#root.fd}/${spec.imageId}`, constants.O_RDONLY);
    try {
      await mountErofs(spec, { fd: file.fd, directIo: true, storeId: this.#options.store.id }, this.#log);
    } finally {
      await file.close();
    }
  }

  async resume(): Promise<Resumed> {
    // Its session takes one request at a time: moving a device waits for reads that the session would have to answer.
    return { images: new Set(), direct: new Set() };
  }

  async complete(): Promise<void> {
    // For the same reason.
    throw new DedupError('KERNEL_UNSUPPORTED', 'fuse-native does not let go of its devices');
  }

  async unmount(target: string): Promise<void> {
    await unmountErofs(target);
  }

  /** Every read passes here: whether it is a miss is seen before it is served. */
  #note(imageId: number, offset: number, length: number): void {
    if (!this.#watched.has(imageId) || this.#seen.length >= MAX_NOTED) return;
    const { presence } = this.#options.store;
    const missed = !native().presenceTest(presence, Math.floor(offset / BLOCK_BYTES), Math.ceil(length / BLOCK_BYTES));
    this.#seen.push({ imageId, offset, length, missed, atMs: performance.now() });
  }

  watchReads(imageId: number, on: boolean): void {
    if (on) this.#watched.add(imageId);
    else this.#watched.delete(imageId);
  }

  takeReads(): SeenRead[] {
    const seen = this.#seen;
    this.#seen = [];
    return seen;
  }

  stats(): TransportStats {
    const { requests, errors } = this.#counters;
    return { requests, hits: 0, misses: requests, hitBytes: 0, errors };
  }

  async close(): Promise<void> {
    const root = this.#root;
    if (root === undefined) return;
    this.#root = undefined;
    try {
      writeFileSync(`/sys/fs/fuse/connections/${this.#connection}/abort`, '1');
    } catch (error) {
      // Without fusectl the connection ends with this process; readers get ENOTCONN or EIO then, never zeros.
      this.#log.debug({ err: error }, 'the fuse-native connection was not aborted');
    }
    // Before the root: once that has gone the number may be another session's.
    if (this.#mark !== undefined) closeSync(this.#mark);
    await root.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
