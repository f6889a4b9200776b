// The transport that must always work: a FUSE session of our own (native/fuse) whose files are the store, and one
// direct-I/O loop device per mounted image over its file. Hits are answered natively; misses come here and go to the
// LazyLoader. Owns the session; must not touch any path below a lazy mount.
import { closeSync, openSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { constants as osConstants } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { DedupError, ERROR_CODES, errorCode } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { type FuseMiss, type FuseSession, native } from '../native.ts';
import { mountErofs, moveDevices, switchToStore, unmountErofs } from './erofs-mount.ts';
import type {
  ByteSource,
  MountSpec,
  Resumed,
  SeenRead,
  Transport,
  TransportCapabilities,
  TransportStats,
} from './transport.ts';

/** Threads that read requests. Two keep up with both cores of a small node; more only queue behind them. */
const READER_THREADS = 2;

/** With the kernel's default of 12, stalled misses of one image held the hits of another (docs/architecture.md). */
const MAX_BACKGROUND = 512;

/** Longest wait for reads in flight when an image becomes direct, milliseconds: twice, and those who read anew wait too. */
const SWITCH_MS = 20_000;

export interface StoreView {
  /** Name of the store file, which no other has: devices of another store are never moved to it. */
  readonly id: string;
  /** O_RDONLY descriptor of the store file. */
  readonly fd: number;
  /** O_RDONLY descriptor of the sums of its blocks. */
  readonly sumsFd: number;
  readonly storeBytes: number;
  readonly headBytes: number;
  readonly tailBytes: number;
  readonly presence: Uint8Array;
  /** Where hits leave their marks. */
  readonly touched: Uint32Array;
  /** Told of every read that met blocks which the disk had changed. */
  damaged(address: number, length: number): void;
}

export interface FuseTransportOptions {
  readonly mountDir: string;
  readonly store: StoreView;
  readonly source: ByteSource;
  readonly log: Logger;
}

const CAPABILITIES: TransportCapabilities = Object.freeze({
  name: 'fuse',
  parallelMisses: true,
  failsClosed: true,
  survivesDaemon: false,
  seesHits: true,
  direct: true,
});

export class FuseTransport implements Transport {
  readonly capabilities = CAPABILITIES;
  readonly #source: ByteSource;
  readonly #storeId: string;
  readonly #storeFd: number;
  readonly #damaged: (address: number, length: number) => void;
  readonly #log: Logger;
  #session: FuseSession | undefined;
  /** Misses that are not answered yet, by image. */
  readonly #outstanding = new Map<number, number>();

  private constructor(options: FuseTransportOptions) {
    this.#source = options.source;
    this.#storeId = options.store.id;
    this.#storeFd = options.store.fd;
    this.#damaged = (address, length) => options.store.damaged(address, length);
    this.#log = options.log;
  }

  /** Opens the session. Errors: KERNEL (no /dev/fuse, not root), KERNEL_UNSUPPORTED (no ASYNC_DIO). */
  static async start(options: FuseTransportOptions): Promise<FuseTransport> {
    const transport = new FuseTransport(options);
    await mkdir(options.mountDir, { recursive: true, mode: 0o700 });
    transport.#session = await native().fuseStart({
      mountDir: options.mountDir,
      storeFd: options.store.fd,
      sumsFd: options.store.sumsFd,
      storeBytes: options.store.storeBytes,
      headBytes: options.store.headBytes,
      tailBytes: options.store.tailBytes,
      presence: options.store.presence,
      touched: options.store.touched,
      threads: READER_THREADS,
      maxBackground: MAX_BACKGROUND,
      onMiss: (misses) => {
        for (const miss of misses) void transport.#take(miss);
      },
      onEnd: (errno) => {
        options.log.error({ errno }, 'the FUSE connection was ended from outside; lazy images answer EIO');
      },
    });
    return transport;
  }

  async #take(miss: FuseMiss): Promise<void> {
    const { file } = miss;
    this.#outstanding.set(file, (this.#outstanding.get(file) ?? 0) + 1);
    await this.#answer(miss);
    const left = this.#outstanding.get(file)! - 1;
    if (left > 0) this.#outstanding.set(file, left);
    else this.#outstanding.delete(file);
  }

  /** Answers one miss exactly once: with all its bytes or with an errno. Never rejects. */
  async #answer(miss: FuseMiss): Promise<void> {
    const session = this.#session;
    if (session === undefined) return; // close() has answered it
    if (miss.damaged) this.#damaged(miss.offset, miss.length);
    let parts: readonly Uint8Array[];
    try {
      parts = await this.#source.read({ offset: miss.offset, length: miss.length }, miss.file);
    } catch (error) {
      const { errno } = ERROR_CODES[errorCode(error)];
      this.#log.warn({ err: error, image: miss.file, offset: miss.offset, length: miss.length }, 'a read fails');
      this.#settle(session, miss.id, () => session.replyError(miss.id, osConstants.errno[errno]));
      return;
    }
    this.#settle(session, miss.id, () => session.reply(miss.id, parts));
  }

  #settle(session: FuseSession, id: number, send: () => void): void {
    try {
      send();
    } catch (error) {
      // A reply that races with close() finds its request answered (EIO) already: that is close()'s promise.
      if (this.#session === undefined || errorCode(error) === 'CLOSED') return;
      this.#log.error({ err: error }, 'a reply to the kernel failed');
      try {
        session.replyError(id, osConstants.errno.EIO);
      } catch {
        // Answered already: a reply that failed after it took the request has sent EIO itself.
      }
    }
  }

  #open(): FuseSession {
    if (this.#session === undefined) throw new DedupError('CLOSED', 'the FUSE transport is closed');
    return this.#session;
  }

  /** Opens an image's view of the store; the caller closes the descriptor. Errors: KERNEL, CLOSED. */
  openFile(imageId: number): Promise<number> {
    return this.#open().openFile(imageId);
  }

  async mount(spec: MountSpec): Promise<void> {
    const fd =
      spec.direct === true ? openSync(`/proc/self/fd/${this.#storeFd}`, 'r') : await this.openFile(spec.imageId);
    try {
      await mountErofs(spec, { fd, directIo: true, storeId: this.#storeId }, this.#log);
    } finally {
      closeSync(fd);
    }
  }

  resume(wanted: (imageId: number) => boolean): Promise<Resumed> {
    const session = this.#open();
    return moveDevices(this.#storeId, (imageId) => session.openFile(imageId), wanted, this.#log);
  }

  async complete(imageId: number): Promise<void> {
    // A device waits for its requests in flight: those that wait for a registry are not to hold the others.
    const deadline = performance.now() + SWITCH_MS;
    while (this.#outstanding.has(imageId)) {
      if (performance.now() > deadline) throw new DedupError('DEADLINE', `image ${imageId} goes on waiting for bytes`);
      await sleep(20);
    }
    await switchToStore(this.#storeId, imageId, this.#storeFd, SWITCH_MS, this.#log);
  }

  async unmount(target: string): Promise<void> {
    await unmountErofs(target);
  }

  watchReads(imageId: number, on: boolean): void {
    this.#session?.watchReads(imageId, on);
  }

  takeReads(): SeenRead[] {
    const { reads, lost } = this.#session?.takeReads() ?? { reads: new Float64Array(0), lost: 0 };
    if (lost > 0) this.#log.debug({ lost }, 'reads came faster than they were noted');
    const seen: SeenRead[] = [];
    for (let at = 0; at < reads.length; at += 4) {
      const length = reads[at + 2]!;
      seen.push({
        imageId: reads[at]!,
        offset: reads[at + 1]!,
        length: Math.abs(length),
        missed: length < 0,
        atMs: reads[at + 3]!,
      });
    }
    return seen;
  }

  stats(): TransportStats {
    return this.#open().stats();
  }

  async close(): Promise<void> {
    const session = this.#session;
    this.#session = undefined;
    await session?.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
