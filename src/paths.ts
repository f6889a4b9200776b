// Every path the product uses, joined in one place. Only the names live here; nobody else joins them.
import { join } from 'node:path';
import type { Digest } from './digest.ts';
import { digestHex } from './digest.ts';

export const DEFAULT_CONFIG_FILE = '/etc/dedup-snapshotter/config.json';
export const DEFAULT_ROOT = '/var/lib/containerd/io.containerd.snapshotter.v1.dedup';
export const DEFAULT_ADDRESS = '/run/containerd/dedup-snapshotter.sock';
export const DEFAULT_RUN_DIR = '/run/dedup-snapshotter';
export const DEFAULT_LOG_DIR = '/var/log/dedup-snapshotter';
export const DEFAULT_CONTAINERD_ADDRESS = '/run/containerd/containerd.sock';

/** Paths below the root directory. */
export class RootPaths {
  readonly root: string;

  constructor(root: string) {
    this.root = root;
  }

  /** Locked by the one `dedupd` of this root. */
  get lock(): string {
    return join(this.root, 'dedupd.lock');
  }
  get snapshots(): string {
    return join(this.root, 'snapshots');
  }
  /** Directory of one snapshot, by its number. */
  snapshot(id: number): string {
    return join(this.snapshots, String(id));
  }
  /** Upper directory of an active snapshot and content of a committed one. */
  snapshotFs(id: number): string {
    return join(this.snapshots, String(id), 'fs');
  }
  /** The directory of a converted snapshot that is being deleted. */
  snapshotGoing(id: number): string {
    return join(this.snapshots, String(id), 'fs.going');
  }
  snapshotWork(id: number): string {
    return join(this.snapshots, String(id), 'work');
  }
  get metadataDb(): string {
    return join(this.root, 'metadata.db');
  }
  get chunks(): string {
    return join(this.root, 'chunks');
  }
  get store(): string {
    return join(this.chunks, 'store');
  }
  /** Sums of the store's blocks, by which changed ones are told (native/store/block_sums.h). */
  get storeSums(): string {
    return join(this.chunks, 'sums');
  }
  /** Disk space that is given up when the disk is full, so that it can be cleaned. */
  get storeReserve(): string {
    return join(this.root, 'reserve');
  }
  get indexDb(): string {
    return join(this.root, 'index.db');
  }
  get images(): string {
    return join(this.root, 'images');
  }
  /** Verified index blob of a layer, by the digest of the index. */
  layerIndex(index: Digest): string {
    return join(this.images, 'layers', `${digestHex(index)}.index`);
  }
  /** Restart blob of a layer (framing and windows), by its digest. */
  layerRestart(restart: Digest): string {
    return join(this.images, 'layers', `${digestHex(restart)}.restart`);
  }
  /** Which indexes are kept of layers that have gone. */
  get keptIndexes(): string {
    return join(this.images, 'kept');
  }
  get layers(): string {
    return join(this.images, 'layers');
  }
  /** EROFS metadata of a merged image, by its number. */
  imageMetadata(id: number): string {
    return join(this.images, `${id}.erofs`);
  }
  /** Which images were brought here ahead, and until when they are kept. */
  get warmList(): string {
    return join(this.root, 'warm.json');
  }
  get traces(): string {
    return join(this.root, 'traces');
  }
  /** Mount points of merged images; 0700. */
  get mounts(): string {
    return join(this.root, 'mounts');
  }
  mountPoint(id: number): string {
    return join(this.mounts, String(id));
  }
}

/** Paths in the run directory; all of it is gone after a reboot. */
export class RunPaths {
  readonly dir: string;

  constructor(dir: string) {
    this.dir = dir;
  }

  /** gRPC socket of dedupd. */
  get dedupdSocket(): string {
    return join(this.dir, 'dedupd.sock');
  }
  /** Which directories show images without containerd; as long as the machine runs. */
  get standaloneMounts(): string {
    return join(this.dir, 'standalone-mounts.json');
  }
  /** Where a FUSE session is mounted for the moment it takes to open its root. */
  get fuseMount(): string {
    return join(this.dir, 'fuse');
  }
  /** Where the kernel's list of FUSE connections is mounted for the moment it takes to end one. */
  get fuseControl(): string {
    return join(this.dir, 'fusectl');
  }
}
