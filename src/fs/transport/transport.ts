// How the kernel asks for missing bytes: the interface that every transport implements, and what differs between them
// as data. Declared for mount-table.ts; implemented by fuse.ts and fuse-native.ts; chosen by select.ts alone.
import type { ByteRange } from '../../units.ts';

export type TransportName = 'fuse' | 'fuse-native';

/** EROFS layout that a kernel can mount: with a device table (≥ 5.16), or one device that holds all (older). */
export type ErofsLayoutKind = 'device' | 'flat';

export interface TransportCapabilities {
  readonly name: TransportName;
  /** Several misses of one image can be outstanding at once. */
  readonly parallelMisses: boolean;
  /** A reader of a mounted image gets EIO, not zeros, when the daemon dies. */
  readonly failsClosed: boolean;
  /** A successor process can take the session over. */
  readonly survivesDaemon: boolean;
  /** The daemon sees reads of bytes that are present. */
  readonly seesHits: boolean;
  /** An image that is here completely can be read from the store file itself, without the daemon: mount and complete. */
  readonly direct: boolean;
}

/** What a transport needs to mount one merged image. */
export interface MountSpec {
  /** Number of the image, unique per root; also names its view of the store. */
  readonly imageId: number;
  /** EROFS metadata file of the image. */
  readonly metadata: string;
  readonly layout: ErofsLayoutKind;
  /** Where the flat layout's metadata lies in the store, bytes; undefined for the device layout. */
  readonly flatOffset: number | undefined;
  /** Existing directory to mount on. */
  readonly target: string;
  /** Every byte of it is in the store for good: the kernel reads the store file itself. Only with that capability. */
  readonly direct?: boolean;
}

/** Images of an earlier daemon that go on, by number. */
export interface Resumed {
  /** Those all of whose devices give right bytes now. */
  readonly images: ReadonlySet<number>;
  /** Those of them all of whose devices read the store file itself, as they did. */
  readonly direct: ReadonlySet<number>;
}

/** The LazyLoader as a transport sees it. */
export interface ByteSource {
  /** Buffers that together are exactly the bytes of `range` of the store, verified. Throws DedupError. */
  read(range: ByteRange, imageId: number): Promise<readonly Uint8Array[]>;
}

/** A read of an image as the transport saw it. */
export interface SeenRead {
  readonly imageId: number;
  /** Address in the store, bytes. */
  readonly offset: number;
  readonly length: number;
  readonly missed: boolean;
  /** Of a clock of its own, milliseconds: differences count. */
  readonly atMs: number;
}

export interface TransportStats {
  readonly requests: number;
  readonly hits: number;
  readonly misses: number;
  readonly hitBytes: number;
  readonly errors: number;
}

export interface Transport extends AsyncDisposable {
  readonly capabilities: TransportCapabilities;
  /** Mounts the image read-only on `spec.target`. Errors: KERNEL, KERNEL_UNSUPPORTED. */
  mount(spec: MountSpec): Promise<void>;
  /**
   * Gives images that an earlier daemon mounted, and that are still in use, to this session: later reads are right again.
   * `wanted` is asked for each image before its device is moved; false leaves it alone.
   */
  resume(wanted: (imageId: number) => boolean): Promise<Resumed>;
  /**
   * Has every device of an image, mounted or only held by somebody, read the store file itself; the caller knows that
   * every byte of it is there for good. Errors: KERNEL, DEADLINE when reads in flight do not end: then some devices may
   * have been switched or be so later, and it can be asked again; KERNEL_UNSUPPORTED without the capability.
   */
  complete(imageId: number): Promise<void>;
  /** Detaches the mount; its devices go with the last user. Idempotent. Errors: KERNEL. */
  unmount(target: string): Promise<void>;
  /**
   * Begins or ends noting the reads of an image: all that the transport sees (capability `seesHits`). An image that is
   * read directly shows none.
   */
  watchReads(imageId: number, on: boolean): void;
  /** Reads of watched images since the last call, in order. What nobody takes in time is lost in the end. */
  takeReads(): SeenRead[];
  stats(): TransportStats;
  /** Answers what is outstanding with EIO and ends the session. Idempotent. */
  close(): Promise<void>;
}
