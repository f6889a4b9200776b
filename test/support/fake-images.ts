// A stand-in for dedupd: layers are directories given by the test, a merged image is a copy of them one over the
// other. Records every call. For tests of what the snapshots service asks, not of what dedupd does.
import { existsSync } from 'node:fs';
import { cp, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import type {
  ConvertLayerArgs,
  ConvertProgress,
  ImageMounter,
  LayerKey,
  MountedImage,
  MountImageArgs,
  PrepareLayerArgs,
  PrepareLayerResult,
  WaitingLayers,
} from '../../src/snapshotter/images.ts';

const COPY = { recursive: true, verbatimSymlinks: true };

export class FakeImages implements ImageMounter {
  readonly #dir: string;
  readonly #layers = new Map<string, string>();
  readonly #ids = new Map<string, number>();
  readonly prepared: PrepareLayerArgs[] = [];
  readonly mounted: { layers: string[]; bottom: boolean }[] = [];
  /** What was said to lie below, of each call in `mounted`. */
  readonly below: MountImageArgs['below'][] = [];
  readonly released: (readonly number[])[] = [];
  readonly retained: string[][] = [];
  /** What the next calls of retainLayers answer; then that nothing waits. */
  readonly waiting: WaitingLayers[] = [];
  readonly converted: ConvertLayerArgs[] = [];
  readonly prebuilt: string[][] = [];
  /** Thrown by prebuildImage. */
  unbuildable: DedupError | undefined;
  /** Awaited inside prebuildImage. */
  whileBuilding: () => Promise<void> = async () => {};
  /** Digests of layers that it does not know any more. */
  readonly forgotten = new Set<string>();
  /** Awaited inside convertLayer, before the directory is read. */
  whileConverting: (
    args: ConvertLayerArgs,
    onProgress: (progress: ConvertProgress) => void,
    signal: AbortSignal,
  ) => Promise<void> = async () => {};
  /** Set: every call fails as when dedupd is down. */
  down = false;
  rootOwner: { rootUid?: number; rootGid?: number } = {};
  /** Awaited inside mountImage, after the mount was made. */
  afterMount: () => Promise<void> = async () => {};

  constructor(dir: string) {
    this.#dir = dir;
  }

  /** Makes a layer lazily loadable; it holds one file of its name. */
  async addLayer(digest: string, file: string): Promise<void> {
    const dir = join(this.#dir, 'layers', digest);
    await mkdir(dir, { recursive: true });
    await writeFile(join(dir, file), `${file} of ${digest}\n`);
    this.#layers.set(digest, dir);
  }

  #requireUp(): void {
    if (this.down) throw new DedupError('UNAVAILABLE', 'the fake is down');
  }

  #requireKnown(digest: string): void {
    if (this.forgotten.has(digest)) throw new DedupError('NOT_FOUND', `layer ${digest} is not known`);
  }

  async answers(): Promise<void> {
    this.#requireUp();
  }

  async prepareLayer(args: PrepareLayerArgs): Promise<PrepareLayerResult> {
    this.#requireUp();
    this.prepared.push(args);
    const lazy = this.#layers.has(args.layer.digest) && !this.forgotten.has(args.layer.digest);
    return { lazy, reason: lazy ? '' : 'no index is known', layer: { ...args.layer, index: 'sha256:index' } };
  }

  async mountImage(args: MountImageArgs): Promise<MountedImage> {
    this.#requireUp();
    const digests = args.layers.map(({ digest }) => digest);
    this.mounted.push({ layers: digests, bottom: args.bottom });
    this.below.push(args.below);
    for (const digest of digests) this.#requireKnown(digest);
    const key = `${digests.join()} ${args.bottom}`;
    const mountId = this.#ids.get(key) ?? this.#ids.size + 1;
    this.#ids.set(key, mountId);
    const path = join(this.#dir, 'mounts', String(mountId));
    if (!existsSync(path)) {
      await mkdir(path, { recursive: true });
      for (const digest of digests) await cp(this.#layers.get(digest) ?? '', path, COPY);
    }
    await this.afterMount();
    return { path, mountId, ...this.rootOwner };
  }

  async releaseImages(inUse: readonly number[]): Promise<void> {
    this.#requireUp();
    this.released.push(inUse);
  }

  async retainLayers(layers: readonly LayerKey[]): Promise<WaitingLayers> {
    this.#requireUp();
    this.retained.push(layers.map(({ digest }) => digest).sort());
    return this.waiting.shift() ?? { waiting: 0, againMs: 0 };
  }

  /** The directory becomes a layer, named by its digest if it has one. */
  async convertLayer(
    args: ConvertLayerArgs,
    onProgress: (progress: ConvertProgress) => void,
    signal: AbortSignal,
  ): Promise<LayerKey> {
    this.#requireUp();
    this.converted.push(args);
    await this.whileConverting(args, onProgress, signal);
    const digest = args.layer === '' ? digestOf(`directory ${args.snapshot}`) : args.layer;
    const dir = join(this.#dir, 'layers', digest);
    await cp(args.directory, dir, COPY);
    this.#layers.set(digest, dir);
    this.forgotten.delete(digest);
    return { digest, index: 'sha256:local', scope: '' };
  }

  async prebuildImage(layers: readonly LayerKey[]): Promise<void> {
    this.#requireUp();
    this.prebuilt.push(layers.map(({ digest }) => digest));
    await this.whileBuilding();
    if (this.unbuildable !== undefined) throw this.unbuildable;
  }

  async confirmLayer({ digest }: LayerKey): Promise<void> {
    this.#requireUp();
    this.#requireKnown(digest);
  }

  async layerUsage({ digest }: LayerKey): Promise<{ bytes: number; inodes: number }> {
    this.#requireUp();
    this.#requireKnown(digest);
    return { bytes: 12345, inodes: 6 };
  }
}
