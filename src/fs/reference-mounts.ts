// Standalone mounts: an image reference shown on a directory without containerd. Layers without an index are read once,
// indexed here, and their chunks kept. Used by the control server for the CLI's mount and umount.
import { writeSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { z } from 'zod';
import { DedupError, wrapError } from '../errors.ts';
import type { Logger } from '../log.ts';
import type { LayerRecord, LayerSourceName } from './chunks/index-protocol.ts';
import type { MountProgressMessage } from './control-server.ts';
import { writeFileAtomically } from './image/atomic-file.ts';
import type { MountableLayer } from './image-metadata.ts';
import { classifyLayer } from './index/media-types.ts';
import type { WantedLayer } from './layer-intake.ts';
import type { MountedImage, MountTable } from './mount-table.ts';
import { MS_BIND, MS_RDONLY, MS_REMOUNT, native } from './native.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';
import { formatReference, type ImageReference, parseReference } from './registry/reference.ts';
import { type ResolvedLayer, resolveImage } from './resolve-image.ts';
import { unmountErofs } from './transport/erofs-mount.ts';

export interface ReferenceMountsOptions {
  readonly repository: (reference: ImageReference, credentials: string) => Repository;
  readonly scopeOf: (source: LayerSourceName) => string;
  /** A layer that has an index somewhere. Errors: LAYER_NOT_LAZY when it has none. */
  readonly known: (wanted: WantedLayer, signal: AbortSignal) => Promise<LayerRecord>;
  /** Reads a whole layer, indexes it and keeps its chunks. Errors: LAYER_NOT_LAZY, LAYER_INVALID, registry. */
  readonly indexHere: (
    wanted: WantedLayer,
    blob: BlobId,
    repository: Repository,
    progress: (bytesDone: number) => void,
    signal: AbortSignal,
  ) => Promise<LayerRecord>;
  readonly mountable: (row: LayerRecord) => Promise<MountableLayer>;
  readonly mounts: MountTable;
  /** Where it is written down which directories show what, for a dedupd that comes after this one. */
  readonly file: string;
  readonly log: Logger;
}

/** The file: directories with the reference that each was asked for. */
const writtenDown = z.record(z.string(), z.string());

interface Request {
  readonly reference: string;
  readonly directory: string;
  readonly platform: string;
  readonly credentials: string;
}

export class ReferenceMounts {
  readonly #options: ReferenceMountsOptions;
  readonly #byDirectory = new Map<string, MountedImage>();
  /** Directories that a mount is under way for. */
  readonly #claimed = new Set<string>();

  constructor(options: ReferenceMountsOptions) {
    this.#options = options;
  }

  /** Mounts and returns the directory. Errors: INVALID_REFERENCE, ALREADY_EXISTS, LAYER_NOT_LAZY, registry, KERNEL. */
  async mount(
    request: Request,
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string> {
    const { directory } = request;
    if (this.#byDirectory.has(directory) || this.#claimed.has(directory)) {
      throw new DedupError('ALREADY_EXISTS', `an image is mounted on ${directory} already`, {
        hint: `dedup-snapshotter umount ${directory}`,
      });
    }
    this.#claimed.add(directory);
    try {
      return await this.#mount(request, progress, signal);
    } finally {
      this.#claimed.delete(directory);
    }
  }

  async #mount(
    request: Request,
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<string> {
    const { directory } = request;
    const reference = parseReference(request.reference);
    const repository = this.#options.repository(reference, request.credentials);
    progress({ step: `resolving ${formatReference(reference)}`, bytes_done: 0, bytes_total: 0 });
    const { layers } = await resolveImage(reference, repository, request.platform, this.#options.scopeOf, signal);
    const mountable: MountableLayer[] = [];
    for (const [position, layer] of layers.entries()) {
      const row = await this.#layer(layer, `layer ${position + 1} of ${layers.length}`, repository, progress, signal);
      mountable.push(await this.#options.mountable(row));
    }
    progress({ step: 'mounting', bytes_done: 0, bytes_total: 0 });
    const image = await this.#options.mounts.mount(mountable, true);
    image.holders.set(directory, formatReference(reference));
    // Written down first: a dedupd that is killed now leaves a mount that the next one knows.
    this.#byDirectory.set(directory, image);
    this.#writeDown();
    try {
      await native().mount({ source: image.path, target: directory, fstype: '', flags: MS_BIND, data: '' });
      const flags = MS_BIND | MS_REMOUNT | MS_RDONLY;
      await native().mount({ source: '', target: directory, fstype: '', flags, data: '' });
    } catch (error) {
      this.#byDirectory.delete(directory);
      await this.#release(image, directory);
      throw wrapError(error, `showing ${formatReference(reference)} on ${directory}`);
    }
    return directory;
  }

  /**
   * Takes over the directories of an earlier dedupd, where their images were taken over: `elsewhere` names, by image,
   * every place but its own where it is mounted. Others are containerd's.
   */
  async resume(elsewhere: ReadonlyMap<number, readonly string[]>): Promise<void> {
    let directories: Readonly<Record<string, string>>;
    try {
      directories = writtenDown.parse(JSON.parse(await readFile(this.#options.file, 'utf8')));
    } catch {
      return; // None was mounted since the machine started.
    }
    for (const image of this.#options.mounts.list()) {
      for (const directory of elsewhere.get(image.id) ?? []) {
        const reference = directories[directory];
        if (reference === undefined) continue;
        image.holders.set(directory, reference);
        this.#byDirectory.set(directory, image);
      }
    }
    this.#writeDown();
  }

  #writeDown(): void {
    const directories: Record<string, string> = {};
    for (const [directory, image] of this.#byDirectory) directories[directory] = image.holders.get(directory) ?? '';
    try {
      writeFileAtomically(this.#options.file, (fd) => writeSync(fd, JSON.stringify(directories)));
    } catch (error) {
      // The mount itself is right; only a later dedupd would not know that it is ours.
      this.#options.log.warn({ err: error, file: this.#options.file }, 'standalone mounts are not written down');
    }
  }

  async #layer(
    { wanted, blob, mediaType }: ResolvedLayer,
    name: string,
    repository: Repository,
    progress: (message: MountProgressMessage) => void,
    signal: AbortSignal,
  ): Promise<LayerRecord> {
    try {
      return await this.#options.known(wanted, signal);
    } catch (error) {
      if (!(error instanceof DedupError) || error.code !== 'LAYER_NOT_LAZY') throw error;
      const kind = classifyLayer({ mediaType });
      if (!kind.lazy) throw new DedupError('LAYER_NOT_LAZY', `${name} cannot be loaded lazily: ${kind.reason}`);
      const step = `indexing ${name} (${error.message})`;
      const report = (done: number): void => progress({ step, bytes_done: done, bytes_total: blob.size });
      report(0);
      return await this.#options.indexHere(wanted, blob, repository, report, signal);
    }
  }

  /** Takes a standalone mount away. Errors: NOT_FOUND, KERNEL (EBUSY) when it is in use. */
  async unmount(directory: string): Promise<void> {
    const image = this.#byDirectory.get(directory);
    if (image === undefined) {
      throw new DedupError('NOT_FOUND', `no image of ours is mounted on ${directory}`, {
        hint: '`dedup-snapshotter images` lists them',
      });
    }
    try {
      await native().umount(directory, 0);
    } catch (cause) {
      const { code, message, details } = wrapError(cause, `unmounting ${directory}`);
      if (details.syscallError === 'EINVAL' || details.syscallError === 'ENOENT') {
        // Somebody used umount(8): the image is not shown there any more.
        this.#byDirectory.delete(directory);
        await this.#release(image, directory);
        return;
      }
      throw new DedupError(code, message, {
        cause,
        hint: `is it in use? \`fuser -vm ${directory}\` names the processes`,
      });
    }
    this.#byDirectory.delete(directory);
    await this.#release(image, directory);
  }

  /** Unmounts the image itself when neither a directory nor a snapshot shows it any more. */
  async #release(image: MountedImage, directory: string): Promise<void> {
    image.holders.delete(directory);
    this.#writeDown();
    if (image.holders.size === 0 && !image.used) await this.#options.mounts.drop(image.id);
  }

  /** Leaves every directory as it is, for whoever serves this root now. */
  abandon(): void {
    this.#byDirectory.clear();
  }

  /** Takes every standalone mount away, used or not. Idempotent. */
  async close(): Promise<void> {
    if (this.#byDirectory.size === 0) return;
    for (const [directory, image] of this.#byDirectory) {
      // Not there any more when somebody used umount(8): that must not keep the rest from being closed.
      await unmountErofs(directory);
      image.holders.delete(directory);
    }
    this.#byDirectory.clear();
    this.#writeDown();
  }
}
