// Puts loop devices under an EROFS mount and takes them away again: shared by the transports that serve the store
// through a file of a FUSE filesystem. Every device is released together with the mount that uses it.
import { closeSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { DedupError, wrapError } from '../../errors.ts';
import type { Logger } from '../../log.ts';
import { BLOCK_BYTES } from '../../units.ts';
import { MNT_DETACH, MS_RDONLY, native } from '../native.ts';
import type { MountSpec, Resumed } from './transport.ts';

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

/** LOOP_CHANGE_FD waits some 17 ms for other processors (RCU) and uses none: side by side, sixteen take as long as one. */
const MOVES_AT_ONCE = 16;

/** What to attach: the open store file of this image, and whether the loop must bypass the page cache. */
export interface DataFile {
  readonly fd: number;
  readonly storeId: string;
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
        name: deviceName(spec.imageId, data.storeId),
      });
      devices.push(source);
    } else {
      const metadataFd = openSync(spec.metadata, 'r');
      try {
        source = await attach(metadataFd, {
          directIo: false,
          offset: 0,
          name: deviceName(spec.imageId, data.storeId, 'metadata'),
        });
      } finally {
        closeSync(metadataFd);
      }
      devices.push(source);
      const name = deviceName(spec.imageId, data.storeId);
      const store = await attach(data.fd, { directIo: data.directIo, offset: 0, name });
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

type DeviceKind = 'data' | 'metadata';

/**
 * What a device is called: who looks at all devices of the machine finds those of one store, and no other store has its
 * id. At most 63 bytes.
 */
function deviceName(imageId: number, storeId: string, kind: DeviceKind = 'data'): string {
  return `dedup:${imageId}:${storeId}${kind === 'data' ? '' : ':m'}`;
}

interface StoreDevice {
  readonly path: string;
  readonly name: string;
  readonly imageId: number;
  readonly kind: DeviceKind;
  /** It reads the store file itself. */
  readonly direct: boolean;
}

/** The devices of a store's images on this machine, whoever attached them; when `all`, an error if one cannot be asked. */
async function devicesOf(storeId: string, all = false): Promise<StoreDevice[]> {
  const found: StoreDevice[] = [];
  for (const device of readdirSync('/sys/block')) {
    const backingFile = backingFileOf(device);
    if (backingFile === undefined) continue;
    const path = `/dev/${device}`;
    try {
      const { name, device: dev, inode } = await native().loopStatus(path);
      const [, imageId, store, metadata] = /^dedup:(\d+):([0-9a-f.]+)(:m)?$/.exec(name) ?? [];
      if (store !== storeId) continue;
      // A store's id ends with device and inode number of its file (chunks/store-file.ts).
      const direct = storeId.endsWith(`.${dev.toString(16)}.${inode.toString(16)}`);
      found.push({ path, name, imageId: Number(imageId), kind: metadata === undefined ? 'data' : 'metadata', direct });
    } catch (error) {
      // Gone meanwhile, without a node, or over a file that cannot be looked at: nobody's. But whether the store is read
      // must never be guessed.
      const errno = error instanceof DedupError ? error.details.syscallError : undefined;
      const gone = errno === 'ENXIO' || errno === 'ENOENT' || errno === 'ENODEV';
      if (!gone && (all || /\/store( \(deleted\))?$/.test(backingFile))) throw error;
    }
  }
  return found;
}

/**
 * Images of a store that somebody has mounted, or that are just being mounted: seen or not, in whatever mount namespace.
 * Errors: KERNEL, and those of node:fs, when that cannot be told.
 */
export async function imagesInUse(storeId: string): Promise<ReadonlySet<number>> {
  return new Set((await devicesOf(storeId, true)).map(({ imageId }) => imageId));
}

/** The backing file of a loop device, by its name below /sys/block; undefined when it has none. */
function backingFileOf(device: string): string | undefined {
  try {
    return readFileSync(`/sys/block/${device}/loop/backing_file`, 'utf8').trim();
  } catch {
    return undefined; // Not a loop device, or not attached.
  }
}

function isAttached(device: string): boolean {
  return backingFileOf(device) !== undefined;
}

/** The data devices of a store's images, whoever attached them. Errors: KERNEL when one may read the store itself. */
export async function imageDevices(
  storeId: string,
): Promise<{ readonly imageId: number; readonly path: string; readonly direct: boolean }[]> {
  return (await devicesOf(storeId)).filter(({ kind }) => kind === 'data');
}

/** What the data device of an image is called. */
export function dataDeviceName(imageId: number, storeId: string): string {
  return deviceName(imageId, storeId);
}

/**
 * Detaches the devices that earlier sessions of this store attached and nobody uses; the kernel lets those in use go with
 * their last user, not before. To be called before the first mount of this session. Errors: none; a device that cannot
 * be detached is logged and left for the next start.
 */
export async function detachOrphans(storeId: string, log: Logger): Promise<void> {
  for (const { path, name, imageId, kind } of await devicesOf(storeId)) {
    try {
      await native().loopDetach(path, name);
      if (isAttached(basename(path))) continue; // In use.
      log.info({ image: imageId, device: path, kind }, 'a loop device that an earlier dedupd left was detached');
    } catch (error) {
      log.warn({ err: error, device: path }, 'a loop device that an earlier dedupd left cannot be detached');
    }
  }
}

/** Runs `work` for every device, some at once. It does not reject. */
async function forEachDevice(
  devices: readonly StoreDevice[],
  work: (device: StoreDevice) => Promise<void>,
): Promise<void> {
  const left = devices.values();
  await Promise.all(
    Array.from({ length: MOVES_AT_ONCE }, async () => {
      for (const device of left) await work(device);
    }),
  );
}

/**
 * Gives the data devices of an earlier session to the files of this one; those that read the store file itself need no
 * session. An address means the same chunk as long as an image that was built with it is in use, so a device of the same
 * store reads the same bytes through whatever session serves it; who knows of an image to which that does not apply does
 * not want it. As Transport.resume.
 */
export async function moveDevices(
  storeId: string,
  openFile: (imageId: number) => Promise<number>,
  wanted: (imageId: number) => boolean,
  log: Logger,
): Promise<Resumed> {
  const images = new Set<number>();
  const moved = new Set<number>();
  const failed = new Set<number>();
  const move = async ({ path, name, imageId, direct }: StoreDevice): Promise<void> => {
    if (direct) return;
    moved.add(imageId);
    let fd: number | undefined;
    try {
      fd = await openFile(imageId);
      await native().loopChangeFd(path, fd, name);
      // One that an earlier daemon attached and never mounted goes now; one in use goes with its last user.
      await native().loopDetach(path, name);
      log.info({ image: imageId, device: path }, 'an image in use goes on in this session');
    } catch (error) {
      // Its readers go on getting EIO, as they did.
      failed.add(imageId);
      log.error({ err: error, image: imageId, device: path }, 'a device in use could not be moved to this session');
    } finally {
      if (fd !== undefined) closeSync(fd);
    }
  };
  const left = (await devicesOf(storeId)).filter(({ kind, imageId }) => kind === 'data' && wanted(imageId));
  for (const { imageId } of left) images.add(imageId);
  await forEachDevice(left, move);
  for (const imageId of failed) images.delete(imageId);
  return { images, direct: new Set([...images].filter((imageId) => !moved.has(imageId))) };
}

/**
 * Has the data devices of an image read the store file (`fd`) itself. Waits for reads in flight, for `deadlineMs` at most;
 * a switch that waits longer may still come about. As Transport.complete.
 */
export async function switchToStore(
  storeId: string,
  imageId: number,
  fd: number,
  deadlineMs: number,
  log: Logger,
): Promise<void> {
  const failures: unknown[] = [];
  const change = async ({ path, name }: StoreDevice): Promise<void> => {
    // Of its own: the switch may outlast whoever owns `fd`.
    const own = openSync(`/proc/self/fd/${fd}`, 'r');
    const changed = native().loopChangeFd(path, own, name);
    const settled = (): void => closeSync(own);
    changed.then(settled, settled);
    try {
      await withDeadline(changed, deadlineMs, `${path} did not take another file within ${deadlineMs} ms`);
      log.info({ image: imageId, device: path }, 'an image that is here completely is read without dedupd from now on');
    } catch (error) {
      // Its last user has gone meanwhile.
      if (error instanceof DedupError && error.details.syscallError === 'ENXIO') return;
      failures.push(error);
    }
  };
  const devices = await devicesOf(storeId);
  await forEachDevice(
    devices.filter((device) => device.kind === 'data' && device.imageId === imageId && !device.direct),
    change,
  );
  if (failures.length > 0) throw failures[0];
}

/** Errors: DEADLINE; the work goes on. */
async function withDeadline(work: Promise<void>, deadlineMs: number, message: string): Promise<void> {
  const { promise, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(new DedupError('DEADLINE', message)), deadlineMs);
  try {
    await Promise.race([work, promise]);
  } finally {
    clearTimeout(timer);
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
