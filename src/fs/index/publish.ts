// Builds the indexes of an image's layers and pushes them: as a referrer of the unmodified image, or with a
// re-annotated copy of it (annotate.ts). Called by the `index` verb. Whatever it pushes is a function of the image
// and the program's version alone.
import PQueue from 'p-queue';
import { type Digest, digestOf } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { MiB } from '../../units.ts';
import type { Repository } from '../registry/blob-reader.ts';
import { annotateImage } from './annotate.ts';
import {
  type ImageLocation,
  type ImageReport,
  type IndexEvent,
  type IndexReport,
  type LayerReport,
  layerReports,
  pushReferrer,
  type SourceImage,
} from './artifact.ts';
import { type BuiltIndex, buildLayerIndex } from './builder.ts';
import {
  type Json,
  type ManifestDescriptor,
  matchesPlatform,
  parseConfig,
  parseImageIndex,
  parseManifest,
  platformName,
} from './manifests.ts';
import { classifyLayer, isImageIndex, isImageManifest } from './media-types.ts';

const MAX_CONFIG_BYTES = 16 * MiB;

export interface IndexOptions {
  readonly source: ImageLocation;
  /** Push a re-annotated copy of the image here, instead of a referrer of the image as it is. */
  readonly annotate?: { readonly target: ImageLocation; readonly replace: boolean } | undefined;
  /** Only this platform, "os/arch[/variant]"; default: all. */
  readonly platform?: string | undefined;
  /** Layers read at once. */
  readonly concurrency?: number;
  readonly chunkBytes?: number;
  readonly signal: AbortSignal;
  readonly onEvent?: (event: IndexEvent) => void;
}

/**
 * Indexes an image or a multi-platform image and pushes the result. Errors: REGISTRY_*, DIGEST_MISMATCH (a layer or its
 * diffID is not what the image says), FAILED_PRECONDITION (in place without `replace`), NOT_FOUND (no such platform).
 */
export async function indexImage(options: IndexOptions): Promise<IndexReport> {
  const { source, annotate, signal } = options;
  if (annotate !== undefined) refuseInPlace(source, annotate);
  const root = await source.repository.getManifest(source.reference, signal);
  const { images, indexJson, others } = await readImages(options, root);
  const destination = annotate?.target.repository ?? source.repository;
  const layers = await indexLayers(images, destination, options);
  if (annotate !== undefined) {
    return await annotateImage({
      source,
      target: annotate.target,
      images,
      indexJson,
      others,
      layers,
      signal,
      onEvent: options.onEvent,
    });
  }
  const reports: ImageReport[] = [];
  for (const image of images) {
    const report = layerReports(image, layers);
    const { digest, mediaType, size } = image.descriptor;
    const artifact = await pushReferrer(source.repository, { mediaType, digest, size }, report, signal);
    reports.push({
      platform: platformName(image.platform),
      manifest: digest,
      ...(artifact === undefined ? {} : { artifact }),
      layers: report,
    });
  }
  return { images: reports };
}

function refuseInPlace(source: ImageLocation, annotate: NonNullable<IndexOptions['annotate']>): void {
  const { target, replace } = annotate;
  const same = source.repository.name === target.repository.name && source.reference === target.reference;
  if (!same || replace) return;
  throw new DedupError(
    'FAILED_PRECONDITION',
    `the new name is that of the image itself: ${target.repository.name}:${target.reference}`,
    {
      hint: 'give --replace to change the image in place, or another name',
    },
  );
}

/** The manifests that are to be indexed, and of a multi-platform image what else it lists. */
async function readImages(
  options: IndexOptions,
  root: { readonly digest: Digest; readonly mediaType: string; readonly bytes: Buffer },
): Promise<{ images: SourceImage[]; indexJson: Json | undefined; others: Map<number, ManifestDescriptor> }> {
  const { source, platform, signal } = options;
  const doing = `reading ${source.reference} from ${source.repository.name}`;
  const others = new Map<number, ManifestDescriptor>();
  if (isImageManifest(root.mediaType)) {
    const descriptor: ManifestDescriptor = {
      mediaType: root.mediaType,
      digest: root.digest,
      size: root.bytes.length,
      urls: undefined,
      annotations: undefined,
      platform: undefined,
    };
    const image = await readImage(source.repository, descriptor, root.bytes, signal);
    if (platform !== undefined && !matchesPlatform(image.platform, platform)) throw noPlatform(doing, platform);
    return { images: [image], indexJson: undefined, others };
  }
  if (!isImageIndex(root.mediaType)) {
    throw new DedupError(
      'UNIMPLEMENTED',
      `${doing}: manifests of type ${JSON.stringify(root.mediaType)} cannot be indexed`,
      {
        hint: 'push the image again with a current tool; schema 1 is no longer supported',
      },
    );
  }
  const { json, manifests } = parseImageIndex(root.bytes, doing);
  const images: SourceImage[] = [];
  for (const [position, child] of manifests.entries()) {
    const wanted = isImage(child) && (platform === undefined || matchesPlatform(child.platform, platform));
    if (!wanted) {
      others.set(position, child);
      continue;
    }
    const { bytes } = await source.repository.getManifest(child.digest, signal);
    images.push(await readImage(source.repository, child, bytes, signal));
  }
  if (images.length === 0) throw noPlatform(doing, platform ?? 'any');
  return { images, indexJson: json, others };
}

function noPlatform(doing: string, platform: string): DedupError {
  return new DedupError('NOT_FOUND', `${doing}: there is no image for platform ${platform}`);
}

/** Whether a member of an image index is an image: attestations and artifacts have platform unknown/unknown. */
function isImage(child: ManifestDescriptor): boolean {
  return isImageManifest(child.mediaType) && child.artifactType === undefined && child.platform?.os !== 'unknown';
}

async function readImage(
  repository: Repository,
  descriptor: ManifestDescriptor,
  bytes: Buffer,
  signal: AbortSignal,
): Promise<SourceImage> {
  const manifest = parseManifest(bytes, `reading manifest ${descriptor.digest} from ${repository.name}`);
  const { config } = manifest;
  const doing = `reading configuration ${config.digest} from ${repository.name}`;
  if (config.size > MAX_CONFIG_BYTES)
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: it has ${config.size} bytes`);
  const parts: Buffer[] = [];
  for await (const part of repository.readAll(config, signal)) parts.push(part);
  const { platform, diffIds } = parseConfig(Buffer.concat(parts), doing);
  return { descriptor, bytes, manifest, platform: descriptor.platform ?? platform, diffIds };
}

/** Indexes every distinct layer once and pushes its blobs to `destination`. */
async function indexLayers(
  images: readonly SourceImage[],
  destination: Repository,
  options: IndexOptions,
): Promise<Map<Digest, LayerReport>> {
  const reports = new Map<Digest, LayerReport>();
  const queue = new PQueue({ concurrency: options.concurrency ?? 2 });
  const stop = new AbortController();
  const signal = AbortSignal.any([options.signal, stop.signal]);
  const jobs: Promise<void>[] = [];
  const seen = new Map<Digest, string | undefined>();
  for (const image of images) {
    for (const [position, layer] of image.manifest.layers.entries()) {
      const diffId = image.diffIds[position];
      if (seen.has(layer.digest)) {
        if (seen.get(layer.digest) !== diffId) throw wrongDiffId(layer.digest, diffId);
        continue;
      }
      seen.set(layer.digest, diffId);
      const job = async (): Promise<void> => {
        signal.throwIfAborted();
        const report = await indexLayer(layer, diffId, destination, { ...options, signal });
        reports.set(layer.digest, report);
        options.onEvent?.({ kind: 'layer-end', report });
      };
      jobs.push(queue.add(job));
    }
  }
  try {
    await Promise.all(jobs);
  } catch (error) {
    // The others must have ended before their repository goes away.
    stop.abort(error);
    await Promise.allSettled(jobs);
    throw error;
  }
  return reports;
}

function wrongDiffId(layer: Digest, diffId: string | undefined): DedupError {
  return new DedupError(
    'DIGEST_MISMATCH',
    `layer ${layer} uncompressed does not have the diffID ${diffId ?? '(none)'} of the image's configuration`,
  );
}

async function indexLayer(
  layer: ManifestDescriptor,
  diffId: string | undefined,
  destination: Repository,
  options: IndexOptions,
): Promise<LayerReport> {
  const { digest, size } = layer;
  const { onEvent, signal } = options;
  const kind = classifyLayer(layer);
  if (!kind.lazy) return { digest, size, reason: kind.reason };
  onEvent?.({ kind: 'layer-start', digest, size });
  let built: BuiltIndex;
  try {
    built = await buildLayerIndex({
      stream: options.source.repository.readAll({ digest, size }, signal),
      layerDigest: digest,
      layerBytes: size,
      verifiedStream: true,
      ...(options.chunkBytes === undefined ? {} : { chunkBytes: options.chunkBytes }),
      onProgress: (layerBytes) => onEvent?.({ kind: 'layer-progress', digest, layerBytes }),
      signal,
    });
  } catch (error) {
    // Such a layer is unpacked by containerd, which decides for itself whether it can be.
    if (error instanceof DedupError && (error.code === 'LAYER_NOT_LAZY' || error.code === 'LAYER_INVALID')) {
      return { digest, size, reason: error.message };
    }
    throw error;
  }
  const { index, indexBlob, restartBlob } = built;
  if (diffId !== undefined && diffId !== index.diffId) throw wrongDiffId(digest, diffId);
  const indexDigest = digestOf(indexBlob);
  await destination.putBlob(indexDigest, indexBlob, signal);
  await destination.putBlob(index.restart.digest, restartBlob, signal);
  return {
    digest,
    size,
    tarBytes: index.tarBytes,
    index: { digest: indexDigest, size: indexBlob.length },
    restart: { digest: index.restart.digest, size: restartBlob.length },
  };
}
