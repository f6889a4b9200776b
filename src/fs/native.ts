// The only loader of the native addon: every native function is typed here and its errors become DedupError.
// Blocking calls run on native threads of their own, never in libuv's pool (docs/architecture.md, "Threads").
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { DedupError } from '../errors.ts';

/** Arguments of mount(2). `flags` are MS_* bits; `data` the option string. */
export interface MountArgs {
  readonly source: string;
  readonly target: string;
  readonly fstype: string;
  readonly flags: number;
  readonly data: string;
}

export interface LoopAttachArgs {
  /** Backing file, open; the kernel takes its own reference. */
  readonly fd: number;
  readonly readOnly: boolean;
  /** Ask for direct I/O on the backing file; an error when the kernel does not grant it. */
  readonly directIo: boolean;
  /** Offset of the device's first byte in the backing file, bytes. */
  readonly offset: number;
  /** Length of the device, bytes; 0 = to the end of the file. */
  readonly sizeLimit: number;
  /** Logical block size, bytes; 4096 for EROFS devices. */
  readonly blockSize: number;
  /** LO_FLAGS_AUTOCLEAR: the device goes when its last user does. */
  readonly autoclear: boolean;
  /** Name recorded in lo_file_name, at most 63 bytes. */
  readonly name: string;
  /** Use LOOP_SET_FD + LOOP_SET_STATUS64 + LOOP_SET_DIRECT_IO as on kernels before 5.8. */
  readonly forceLegacy?: boolean;
}

export interface LoopDevice {
  /** `/dev/loopN`. */
  readonly path: string;
  readonly number: number;
  /** False when the legacy ioctls were used. */
  readonly configured: boolean;
}

/** One kernel READ that could not be answered from verified blocks. */
export interface FuseMiss {
  /** Token to answer with; valid once. */
  readonly id: number;
  /** Number of the file as given to `openFile`. */
  readonly file: number;
  readonly offset: number;
  readonly length: number;
  /** Some of it was present, and is not what was written: the disk changed it. It is absent now. */
  readonly damaged: boolean;
}

export interface FuseSessionArgs {
  /** Directory on which the session is mounted for a moment; exists, private. */
  readonly mountDir: string;
  /** Open O_RDONLY descriptor of the store file; hits are read from it. Not owned by the session. */
  readonly storeFd: number;
  /** Open O_RDONLY descriptor of the sums of its blocks, which hits are compared with. Not owned by the session. */
  readonly sumsFd: number;
  /** Constant size of every file the session shows, bytes. */
  readonly storeBytes: number;
  /** Ranges answered with zeros without a look-up: the first `headBytes` and the last `tailBytes`. */
  readonly headBytes: number;
  readonly tailBytes: number;
  /** Presence bitmap: one bit per 4 KiB block of the store, from `presenceCreate`. */
  readonly presence: Uint8Array;
  /** Where hits leave the second in which they came, by MiB of the store, from `touchedCreate`. */
  readonly touched?: Uint32Array;
  /** Reader threads. */
  readonly threads: number;
  /** FUSE_INIT max_background. */
  readonly maxBackground: number;
  /** Called on the JS thread with the misses read since the last call. */
  readonly onMiss: (misses: FuseMiss[]) => void;
  /** Called once when the connection ends for a reason other than close(). */
  readonly onEnd: (errno: number) => void;
}

export interface FuseSessionStats {
  readonly requests: number;
  readonly hits: number;
  readonly misses: number;
  readonly hitBytes: number;
  /** Requests read and not yet answered. */
  readonly outstanding: number;
  readonly errors: number;
}

/** A FUSE session of our own (native/fuse). Every file below its root is the store, seen by one image. */
export interface FuseSession {
  /** Opens the file with this number (a decimal name below the root); the caller closes the descriptor. */
  openFile(file: number): Promise<number>;
  /** Answers with exactly the length asked; a different total answers EIO and throws INTERNAL. */
  reply(id: number, parts: readonly Uint8Array[]): void;
  /** Answers with an errno (positive number). */
  replyError(id: number, errno: number): void;
  /** Begins or ends noting the reads of a file, those answered natively too. */
  watchReads(file: number, on: boolean): void;
  /**
   * Reads noted since the last call, in order, four numbers each: file, offset, length (negative when it was a miss), when
   * (milliseconds of CLOCK_MONOTONIC); `lost`: how many more there were than are kept.
   */
  takeReads(): { reads: Float64Array; lost: number };
  stats(): FuseSessionStats;
  /** Answers everything outstanding with EIO, aborts the connection and joins the threads. Idempotent. */
  close(): Promise<void>;
}

/** Where inflation of a gzip stream can start: RFC 1951 block boundary or the start of a member. */
export interface RestartPoint {
  /** Offset in the uncompressed stream, bytes. */
  readonly outOffset: number;
  /** Offset in the compressed stream of the first whole byte to feed. */
  readonly inOffset: number;
  /** Bits (0–7) of the byte before `inOffset` that belong to the block. */
  readonly bits: number;
  /** Up to 32 KiB of output before the point; empty at a member's start. */
  readonly window: Buffer;
  /** True when `inOffset` is a gzip member header. */
  readonly memberStart: boolean;
}

/** Inflates a gzip stream (one or more members) and collects restart points. */
export interface GzipIndexer {
  /**
   * Feeds compressed bytes, which must not change until they are inflated; the output and points they gave. Up to 8
   * calls wait for their turn, in order; more: INVALID_ARGUMENT. Errors: LAYER_INVALID, for all that follow too.
   */
  push(input: Uint8Array): Promise<{ output: Buffer; points: RestartPoint[] }>;
  /**
   * As above, but output that fits is written to `into`, `length` bytes from `start`, and there is no `output` then.
   * The first 32 KiB of `into` are the indexer's; nobody else may use it until the promise settles.
   */
  push(
    input: Uint8Array,
    into: Uint8Array,
  ): Promise<{ output?: Buffer; start?: number; length?: number; points: RestartPoint[] }>;
  /** Declares the end of input. Errors: LAYER_INVALID when the stream is not complete. */
  finish(): Promise<void>;
  close(): void;
}

/** `offset` of a range of StreamHasher.push that stands for zeros which are not in the stream. */
export const HOLE_OFFSET = 0xffff_ffff;

/** SHA-256 of a stream as a whole and of the pieces that lie in it, on the pool's threads. */
export interface StreamHasher {
  /**
   * The next bytes of the stream; they must not change until the promise settles. `ranges`: three numbers each —
   * offset in `bytes` (or HOLE_OFFSET) and length of bytes that continue the current piece, and 1 when it ends with
   * them. The digests of the pieces that end, 32 bytes each. Any number of calls is queued and worked on in order.
   */
  push(bytes: Uint8Array, ranges: Uint32Array): Promise<Buffer>;
  /** SHA-256 of the whole stream; the last call. */
  finish(): Promise<Buffer>;
}

/** One restartable part of a compressed layer inside a fetched run. */
export interface SpanJob {
  /** Offset in `input` of the first whole byte. */
  readonly inputOffset: number;
  /** Bits of the byte before `inputOffset` (which must be in `input` when > 0). */
  readonly bits: number;
  readonly memberStart: boolean;
  readonly window: Uint8Array;
  /** Where its output goes in the result, and how much of it is wanted, bytes. */
  readonly outputOffset: number;
  readonly outputLength: number;
}

export interface DecodeJob {
  readonly compression: 'none' | 'gzip' | 'zstd';
  readonly input: Uint8Array;
  readonly spans: readonly SpanJob[];
  /** Bytes of the result. */
  readonly outputLength: number;
}

/** Pieces to verify and write: parallel arrays. */
export interface StorePiecesJob {
  /** Store file, open O_RDWR | O_DIRECT. */
  readonly fd: number;
  /** Sums of the store's blocks (native/store/block_sums.h), open for writing. */
  readonly sumsFd: number;
  readonly source: Uint8Array;
  /** Offset and length of each piece in `source`, bytes. */
  readonly offsets: Float64Array;
  readonly lengths: Uint32Array;
  /** 32 bytes per piece. */
  readonly digests: Uint8Array;
  /** Store address of each piece, bytes, 4 KiB aligned. */
  readonly addresses: Float64Array;
  readonly presence: Uint8Array;
}

/** A range of the store to read. */
export interface ReadStoreJob {
  readonly fd: number;
  readonly sumsFd: number;
  readonly presence: Uint8Array;
  readonly target: Uint8Array;
  /** Where in `target` the bytes go. */
  readonly at: number;
  readonly length: number;
  readonly address: number;
}

/** What became of a read: `damaged` bytes are not what was written, and absent from now on. */
export type StoreRead = 'read' | 'absent' | 'damaged';

interface Addon {
  mount(args: MountArgs): Promise<void>;
  umount(target: string, flags: number): Promise<void>;
  loopAttach(args: LoopAttachArgs): Promise<LoopDevice>;
  /**
   * Detaches a device at once, or, while somebody uses it, with its last user. Errors: KERNEL; ENXIO also when it is not
   * called `name` (any name when absent).
   */
  loopDetach(path: string, name?: string): Promise<void>;
  /**
   * Name that a device was attached with, and the backing file's device and inode number as in fs.Stats. Errors: KERNEL
   * (ENXIO) when it has no backing file.
   */
  loopStatus(path: string): Promise<{ name: string; device: number; inode: number }>;
  /** Errors: KERNEL; ENXIO also when the device is not called `name` (any name when absent). */
  loopChangeFd(path: string, fd: number, name?: string): Promise<void>;
  /** Takes an exclusive flock(2) without waiting; false when another holds it. */
  flock(fd: number): boolean;
  /** A buffer whose memory starts at a multiple of 4096. */
  alignedBuffer(bytes: number): Buffer;
  /** Extended attributes of `path` (bytes) itself, names as latin1, a symlink not followed; blocks: never below a lazy mount. */
  readXattrs(path: Uint8Array): { name: string; value: Buffer }[];
  /** fallocate(2) PUNCH_HOLE | KEEP_SIZE. */
  punchHole(fd: number, offset: number, length: number): Promise<void>;
  /**
   * Blocks of 4 KiB without data in ranges of a file (lseek(2), SEEK_HOLE); ranges and result are first block and number
   * of blocks, alternating. Moves the offset of the descriptor. Errors: KERNEL.
   */
  findHoles(fd: number, ranges: Float64Array): Promise<Float64Array>;
  /** One byte per page of an open file: 1 when the page cache holds it (mincore(2)). Reads none of it. */
  residentPages(fd: number, length: number): Promise<Uint8Array>;
  /** Shared memory (memfd) for one bit per 4 KiB block of `storeBytes`, all zero; pages appear when touched. */
  presenceCreate(storeBytes: number): Uint8Array;
  /** Shared memory for one 32-bit number per MiB of `storeBytes`, all zero; pages appear when touched. */
  touchedCreate(storeBytes: number): Uint32Array;
  /** Sets or clears `count` bits from `firstBlock`, with release order. */
  presenceSet(presence: Uint8Array, firstBlock: number, count: number, value: boolean): void;
  /** True when all `count` bits from `firstBlock` are set, with acquire order. */
  presenceTest(presence: Uint8Array, firstBlock: number, count: number): boolean;
  /** How often blocks were made absent in this process: unchanged, none was in between. */
  presenceClearEpoch(): number;
  fuseStart(args: FuseSessionArgs): Promise<FuseSession>;
  /** Marks this process as the one that serves a FUSE connection, as sessions of fuseStart do themselves; the caller closes it. */
  fuseMark(connection: number): number;
  gzipIndexer(options: { spanBytes: number }): GzipIndexer;
  streamHasher(): StreamHasher;
  /** What decodeSpans inflates gzip with: ISA-L where libisal.so.2 is installed and DEDUP_NO_ISAL is not set. */
  inflater(): 'isa-l' | 'zlib';
  /** Inflates spans in parallel on native threads. Errors: LAYER_INVALID. */
  decodeSpans(job: DecodeJob): Promise<Buffer>;
  /**
   * Verifies each piece (SHA-256), writes the good ones zero-padded to 4 KiB with O_DIRECT, joining neighbours, and
   * writes their sums, and then sets their presence. Result: one byte per piece: 1 written, 0 digest mismatch. Errors: STORE_IO, STORE_FULL.
   */
  storePieces(job: StorePiecesJob): Promise<Uint8Array>;
  /** Reads present blocks and compares each with its sum. Errors: STORE_IO. */
  readStore(job: ReadStoreJob): Promise<StoreRead>;
  /** SHA-256 of `bytes` on a native thread. */
  sha256(bytes: Uint8Array): Promise<Buffer>;
  /** Gives the calling thread, and no other, what CPU (SCHED_IDLE) and disk nobody else wants. Errors: KERNEL. */
  idleThread(): void;
}

function locate(): string {
  const here = dirname(fileURLToPath(import.meta.url));
  const candidates = [
    process.env.DEDUP_SNAPSHOTTER_ADDON,
    join(here, '../../native/build/dedup_native.node'),
    join(here, '../native/dedup_native.node'),
  ];
  for (const path of candidates) if (path !== undefined && existsSync(path)) return path;
  throw new DedupError('KERNEL_UNSUPPORTED', 'the native addon is missing', { hint: 'run `make build` first' });
}

interface NativeFailure extends Error {
  code?: string;
  errno?: number;
  path?: string;
}

function convert(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof DedupError) return error;
  const failure = error as NativeFailure;
  if (failure.code === undefined) return error;
  const known = [
    'LAYER_INVALID',
    'STORE_IO',
    'STORE_FULL',
    'CLOSED',
    'INVALID_ARGUMENT',
    'INTERNAL',
    'KERNEL_UNSUPPORTED',
  ];
  const code = known.find((name) => name === failure.code) ?? 'KERNEL';
  return new DedupError(code as 'KERNEL', failure.message, {
    cause: error,
    details: { errno: failure.errno, path: failure.path, syscallError: failure.code },
  });
}

/** The single wrapper for native errors: an object whose every method rejects or throws DedupError. */
function guarded<T extends object>(target: T): T {
  return new Proxy(target, {
    get(object, key, receiver) {
      const value: unknown = Reflect.get(object, key, receiver === proxyOf.get(object) ? object : receiver);
      if (typeof value !== 'function') return value;
      return (...args: unknown[]) => {
        try {
          const result: unknown = value.apply(object, args);
          if (!(result instanceof Promise)) return wrapObject(result);
          return result.then(wrapObject, (error: unknown) => {
            throw convert(error);
          });
        } catch (error) {
          throw convert(error);
        }
      };
    },
  });
}

const proxyOf = new WeakMap<object, object>();

function wrapObject(value: unknown): unknown {
  if (value === null || typeof value !== 'object' || ArrayBuffer.isView(value) || Array.isArray(value)) return value;
  const prototype: unknown = Object.getPrototypeOf(value);
  return prototype === Object.prototype ? value : guarded(value);
}

let loaded: Addon | undefined;

/** The addon, loaded at the first call. Errors: KERNEL_UNSUPPORTED when it was not built. */
export function native(): Addon {
  if (loaded === undefined) {
    const raw = createRequire(import.meta.url)(locate()) as Addon;
    const proxy = guarded(raw);
    proxyOf.set(raw, proxy);
    loaded = proxy;
  }
  return loaded;
}

/** mount(2) flags (include/uapi/linux/mount.h). */
export const MS_RDONLY = 1;
export const MS_NODEV = 4;
export const MS_REMOUNT = 32;
export const MS_BIND = 4096;
export const MNT_DETACH = 2;
