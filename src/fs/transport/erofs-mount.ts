// Puts loop devices under an EROFS mount and takes them away again: shared by the transports that serve the store
// through a file of a FUSE filesystem. Every device is released together with the mount that uses it.
import { closeSync, openSync, writeFileSync } from 'node:fs';
import { DedupError, wrapError } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES } from '../../units.ts';
import { MNT_DETACH, MS_RDONLY, native } from '../native.ts';
import type { MountSpec } from './transport.ts';

/**
 * Readahead of a mounted image, KiB. EROFS takes it from the device that holds its metadata; each READ that reaches the
 * daemon is at most this long. Reading everything takes a fourteenth less than with the kernel's 128, and larger values
 * gain nothing (test/bench/mount-readahead.ts, docs/measurements.md).
 */
const READ_AHEAD_KIB = 512;

interface Attached {
  readonly path: string;
  readonly number: number;
}

/** What to attach: the open store file of this image, and whether the loop must bypass the page cache. */
export interface DataFile {
  readonly fd: number;
  readonly directIo: boolean;
}

async function attach(fd: number, options: { directIo: boolean; offset: number; name: string }): Promise<Attached> {
  return native().loopAttach({
    fd,
    readOnly: true,
    directIo: options.directIo,
    offset: options.offset,
    sizeLimit: 0,
    blockSize: BLOCK_BYTES,
    // Set by the detach below, once the mount holds the device: set here, it would go at once.
    autoclear: false,
    name: options.name,
  });
}

function setReadAhead(device: Attached, log: Logger): void {
  try {
    writeFileSync(`/sys/block/loop${device.number}/queue/read_ahead_kb`, String(READ_AHEAD_KIB));
  } catch (error) {
    // Only speed depends on it: a container with a read-only /sys must still mount.
    log.warn({ err: error, device: device.path }, 'cannot set readahead');
  }
}

/**
 * Mounts the image of `spec` with `data` as its data device. The loop devices are marked to go with the mount.
 * Errors: KERNEL with errno and path; nothing stays attached then.
 */
export async function mountErofs(spec: MountSpec, data: DataFile, log: Logger): Promise<void> {
  const devices: Attached[] = [];
  try {
    let source: Attached;
    let options = '';
    if (spec.layout === 'flat') {
      if (spec.flatOffset === undefined) throw new DedupError('INTERNAL', 'a flat image has no offset in the store');
      source = await attach(data.fd, {
        directIo: data.directIo,
        offset: spec.flatOffset,
        name: `dedup:${spec.imageId}`,
      });
      devices.push(source);
    } else {
      const metadataFd = openSync(spec.metadata, 'r');
      try {
        source = await attach(metadataFd, { directIo: false, offset: 0, name: `dedup:${spec.imageId}:metadata` });
      } finally {
        closeSync(metadataFd);
      }
      devices.push(source);
      const store = await attach(data.fd, { directIo: data.directIo, offset: 0, name: `dedup:${spec.imageId}` });
      devices.push(store);
      options = `device=${store.path}`;
    }
    setReadAhead(source, log);
    await native().mount({
      source: source.path,
      target: spec.target,
      fstype: 'erofs',
      flags: MS_RDONLY,
      data: options,
    });
  } catch (error) {
    throw wrapError(error, `mounting image ${spec.imageId} on ${spec.target}`);
  } finally {
    // LOOP_CLR_FD on a device in use makes it go with its last user; on an unused one, now (drivers/block/loop.c).
    for (const device of devices) await native().loopDetach(device.path);
  }
}

/** Detaches a mount; not an error when nothing is mounted there. Errors: KERNEL. */
export async function unmountErofs(target: string): Promise<void> {
  try {
    await native().umount(target, MNT_DETACH);
  } catch (error) {
    const errno = error instanceof DedupError ? error.details.syscallError : undefined;
    if (errno !== 'EINVAL' && errno !== 'ENOENT') throw error;
  }
}
