// Pushes a copy of an image whose layer descriptors name their indexes, as an image index that also lists the artifacts
// holding them, so that copies, mirrors and garbage collection keep both. Called by publish.ts. Layers and
// configuration stay as they are, byte for byte.
import { type Digest, digestOf, isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { GiB } from '../../units.ts';
import type { BlobId, Repository } from '../registry/blob-reader.ts';
import { OCI_INDEX, OCI_MANIFEST } from '../registry/manifest-json.ts';
import {
  type ImageLocation,
  type ImageReport,
  type IndexEvent,
  type IndexReport,
  type LayerReport,
  layerReports,
  pushArtifact,
  type SourceImage,
} from './artifact.ts';
import { ARTIFACT_ANNOTATION, INDEX_ANNOTATION, INDEX_ARTIFACT_TYPE } from './layer-index.ts';
import {
  type Json,
  type ManifestDescriptor,
  parseImageIndex,
  parseManifest,
  platformName,
  toBytes,
} from './manifests.ts';
import { classifyLayer, isImageIndex, isImageManifest, ociMediaType } from './media-types.ts';

/** What a repository may offer beside Repository to take large blobs; without it they pass through memory. */
interface BlobReceiver {
  putBlobStream?(blob: BlobId, bytes: AsyncIterable<Uint8Array>, signal: AbortSignal): Promise<void>;
  /** Takes a blob from another repository of the same registry; false when the registry does not. */
  mountBlob?(blob: Digest, fromPath: string, signal: AbortSignal): Promise<boolean>;
}

/** Largest blob that is copied through memory, bytes. */
const MAX_MEMORY_BLOB_BYTES = 2 * GiB;

interface AnnotateArgs {
  readonly source: ImageLocation;
  readonly target: ImageLocation;
  readonly images: readonly SourceImage[];
  /** The source's image index; undefined when it is a single image. */
  readonly indexJson: Json | undefined;
  /** Members of that index that are not indexed, by their place in it. */
  readonly others: ReadonlyMap<number, ManifestDescriptor>;
  readonly layers: ReadonlyMap<Digest, LayerReport>;
  readonly signal: AbortSignal;
  readonly onEvent: ((event: IndexEvent) => void) | undefined;
}

/** Pushes the annotated copy under the target's tag. Errors: as indexImage; INVALID_ARGUMENT for a target by digest. */
export async function annotateImage(args: AnnotateArgs): Promise<IndexReport> {
  const { source, target, signal } = args;
  if (isDigest(target.reference)) {
    throw new DedupError('INVALID_ARGUMENT', 'the new name of an image is a tag; its digest follows from its contents');
  }
  const copier = new Copier(source.repository, target.repository, signal, args.onEvent);
  const reports: ImageReport[] = [];
  const annotated: Json[] = [];
  const artifacts: Json[] = [];
  for (const image of args.images) {
    const layers = layerReports(image, args.layers);
    await copier.imageBlobs(image.manifest);
    const bytes = annotatedManifest(image, layers);
    const digest = digestOf(bytes);
    await target.repository.putManifest(digest, OCI_MANIFEST, bytes, signal);
    const subject = { mediaType: OCI_MANIFEST, digest, size: bytes.length };
    const artifact = await pushArtifact(target.repository, subject, layers, signal);
    const before = rawMember(args, image);
    annotated.push({ ...before, ...subject, platform: before.platform ?? image.platform });
    if (artifact !== undefined) artifacts.push(artifactMember(artifact.digest, artifact.bytes.length));
    reports.push({
      platform: platformName(image.platform),
      manifest: image.descriptor.digest,
      annotated: digest,
      ...(artifact === undefined ? {} : { artifact: artifact.digest }),
      layers,
    });
  }
  const members = await inOrder(args, annotated, copier);
  const bytes = toBytes({
    ...(args.indexJson ?? {}),
    schemaVersion: 2,
    mediaType: OCI_INDEX,
    manifests: [...members, ...artifacts],
  });
  await target.repository.putManifest(target.reference, OCI_INDEX, bytes, signal);
  return { images: reports, pushed: digestOf(bytes) };
}

/** The member of the source's index for `image` as it stands there, with all its fields. */
function rawMember(args: AnnotateArgs, image: SourceImage): Json {
  const manifests = (args.indexJson?.manifests ?? []) as Json[];
  return manifests.find((member) => member.digest === image.descriptor.digest) ?? {};
}

function artifactMember(digest: Digest, size: number): Json {
  return {
    mediaType: OCI_MANIFEST,
    digest,
    size,
    annotations: { [ARTIFACT_ANNOTATION]: INDEX_ARTIFACT_TYPE },
    platform: { architecture: 'unknown', os: 'unknown' },
  };
}

/** Annotated members where the originals stood, others unchanged; artifacts of an earlier `index` are left out. */
async function inOrder(args: AnnotateArgs, annotated: readonly Json[], copier: Copier): Promise<Json[]> {
  if (args.indexJson === undefined) return [...annotated];
  const members: Json[] = [];
  let next = 0;
  for (const [position, raw] of (args.indexJson.manifests as Json[]).entries()) {
    const other = args.others.get(position);
    if (other === undefined) {
      members.push(annotated[next++]!);
    } else if (other.annotations?.[ARTIFACT_ANNOTATION] !== INDEX_ARTIFACT_TYPE) {
      await copier.manifest(other);
      members.push(raw);
    }
  }
  return members;
}

/** The image's manifest with OCI types and one annotation per lazily loadable layer. */
function annotatedManifest(image: SourceImage, layers: readonly LayerReport[]): Buffer {
  const { json } = image.manifest;
  const config = json.config as Json;
  return toBytes({
    ...json,
    mediaType: OCI_MANIFEST,
    config: { ...config, mediaType: ociMediaType(config.mediaType as string) },
    layers: (json.layers as Json[]).map((layer, position) => {
      const annotations = { ...(layer.annotations as Json | undefined) };
      delete annotations[INDEX_ANNOTATION];
      const index = layers[position]!.index;
      if (index !== undefined) annotations[INDEX_ANNOTATION] = index.digest;
      const { annotations: _before, ...rest } = layer;
      const type = ociMediaType(layer.mediaType as string);
      return { ...rest, mediaType: type, ...(Object.keys(annotations).length > 0 ? { annotations } : {}) };
    }),
  });
}

/** Copies what an image needs to another repository; does nothing when source and target are one. */
class Copier {
  readonly #source: Repository;
  readonly #target: Repository & BlobReceiver;
  readonly #signal: AbortSignal;
  readonly #onEvent: ((event: IndexEvent) => void) | undefined;
  readonly #same: boolean;

  constructor(
    source: Repository,
    target: Repository,
    signal: AbortSignal,
    onEvent: ((event: IndexEvent) => void) | undefined,
  ) {
    this.#source = source;
    this.#target = target;
    this.#signal = signal;
    this.#onEvent = onEvent;
    this.#same = source.name === target.name;
  }

  async imageBlobs(manifest: { config: ManifestDescriptor; layers: readonly ManifestDescriptor[] }): Promise<void> {
    if (this.#same) return;
    for (const blob of [manifest.config, ...manifest.layers]) {
      // Foreign layers are not in the registry; whoever pulls fetches them from their URLs.
      const kind = classifyLayer(blob);
      if (!kind.lazy && (blob.urls?.length ?? 0) > 0) continue;
      await this.#blob(blob);
    }
  }

  /** A manifest or index that is passed through, with everything below it. */
  async manifest(descriptor: ManifestDescriptor): Promise<void> {
    if (this.#same) return;
    const { bytes, mediaType } = await this.#source.getManifest(descriptor.digest, this.#signal);
    const doing = `copying ${descriptor.digest} from ${this.#source.name}`;
    if (isImageIndex(descriptor.mediaType)) {
      for (const child of parseImageIndex(bytes, doing).manifests) await this.manifest(child);
    } else if (isImageManifest(descriptor.mediaType)) {
      await this.imageBlobs(parseManifest(bytes, doing));
    }
    await this.#target.putManifest(descriptor.digest, mediaType, bytes, this.#signal);
  }

  async #blob(blob: BlobId): Promise<void> {
    const target = this.#target;
    if (await target.hasBlob(blob.digest, this.#signal)) return;
    this.#onEvent?.({ kind: 'copy', digest: blob.digest, size: blob.size });
    if (this.#source.host === target.host && target.mountBlob !== undefined) {
      if (await target.mountBlob(blob.digest, this.#source.path, this.#signal)) return;
    }
    const bytes = this.#source.readAll({ digest: blob.digest, size: blob.size }, this.#signal);
    if (target.putBlobStream !== undefined) {
      await target.putBlobStream({ digest: blob.digest, size: blob.size }, bytes, this.#signal);
      return;
    }
    if (blob.size > MAX_MEMORY_BLOB_BYTES) {
      throw new DedupError(
        'UNIMPLEMENTED',
        `copying blob ${blob.digest} of ${blob.size} bytes to ${target.name}: it is too large`,
        {
          hint: 'copy the image with another tool first, then annotate it in its new place',
        },
      );
    }
    const parts: Buffer[] = [];
    for await (const part of bytes) parts.push(part);
    await target.putBlob(blob.digest, Buffer.concat(parts), this.#signal);
  }
}
