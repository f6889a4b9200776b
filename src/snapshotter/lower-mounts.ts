// The lazy lowers of snapshots, mounted by dedupd: for a new key, and again for one that exists. Where dedupd has forgotten
// layers, sees to it that it learns of them. Called by the snapshotter, inside its gate.
import type { Logger } from 'pino';
import { DedupError, errorCode } from '../errors.ts';
import type { RootPaths } from '../paths.ts';
import type { ImageMounter, LayerKey, MountedImage } from './images.ts';
import type { Metastore } from './metastore-client.ts';
import { describeBelow, type Lower, type Segment } from './mounts.ts';
import type { RemoteLayers } from './remote-layers.ts';
import type { SnapshotRecord } from './snapshot-record.ts';

export interface LowerMountsOptions {
  readonly paths: RootPaths;
  readonly metastore: Metastore;
  readonly images: ImageMounter;
  readonly remote: RemoteLayers;
  /** Makes converted snapshots the ordinary ones they were, as far as their directories are there; how many it did. */
  readonly takeBack: (layers: readonly LayerKey[]) => Promise<number>;
  readonly log: Logger;
}

/** True for the error of a mount of layers that are directories again: whoever looks at the chain anew can go on. */
export function isTakenBack(error: unknown): boolean {
  return error instanceof DedupError && error.details.takenBack !== undefined;
}

export class LowerMounts {
  readonly #options: LowerMountsOptions;

  constructor(options: LowerMountsOptions) {
    this.#options = options;
  }

  /**
   * Mounts the lowers of a new key, top to bottom. `top` is the image of the first, if that one is lazy. Errors:
   * UNAVAILABLE, and then isTakenBack when layers are directories again; those of dedupd.
   */
  async mount(wanted: readonly Segment[]): Promise<{ lowers: Lower[]; top: MountedImage | undefined }> {
    const lowers: Lower[] = [];
    let top: MountedImage | undefined;
    for (const [position, segment] of wanted.entries()) {
      if (segment.kind === 'normal') {
        lowers.push(segment);
        continue;
      }
      const image = await this.#mountImage(segment, wanted.slice(position + 1));
      if (lowers.length === 0) top = image;
      lowers.push({ ...segment, path: image.path, mountId: image.mountId });
    }
    return { lowers, top };
  }

  /** Mounts what is not mounted any more (after a reboot) of the lowers that a key was given. Errors: as mount. */
  async again(snapshot: SnapshotRecord): Promise<readonly Lower[]> {
    const lowers: Lower[] = [];
    let moved = false;
    for (const [position, lower] of snapshot.lowers.entries()) {
      if (lower.kind === 'normal') {
        lowers.push(lower);
        continue;
      }
      const { path, mountId } = await this.#mountImage(lower, snapshot.lowers.slice(position + 1));
      if (path !== lower.path || mountId !== lower.mountId) {
        moved = true;
        this.#options.log.warn(
          { id: snapshot.id, was: lower.path, path },
          'a merged image has moved below an existing snapshot',
        );
      }
      lowers.push({ ...lower, path, mountId });
    }
    if (moved) await this.#options.metastore.setLowers(snapshot.id, lowers);
    return lowers;
  }

  /** `below`: the lowers under this one, top to bottom. */
  async #mountImage(segment: Segment & { kind: 'lazy' }, below: readonly Segment[]): Promise<MountedImage> {
    const { images, remote, paths, takeBack } = this.#options;
    const { layers, bottom } = segment;
    const mount = () => images.mountImage({ layers, bottom, below: describeBelow(below, paths) });
    try {
      return await mount();
    } catch (error) {
      // A node whose index.db was lost, or is an older copy, does not know layers that snapshots name.
      const all = [...layers, ...below.flatMap((lower) => (lower.kind === 'lazy' ? lower.layers : []))];
      if (errorCode(error) !== 'NOT_FOUND') throw error;
      const takenBack = await takeBack(all);
      if (takenBack > 0) {
        throw new DedupError('UNAVAILABLE', 'this node has forgotten layers of the image and converts them again', {
          hint: 'try again in a moment; "dedup-snapshotter dedup status" shows how far it is',
          details: { takenBack },
        });
      }
      await remote.learnAgain(all);
      return await mount();
    }
  }
}
