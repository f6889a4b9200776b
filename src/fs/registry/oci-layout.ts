// A Repository over an OCI image layout directory (`oci:/path[:tag]`): reading, and writing with atomic renames. Used
// by the CLI in place of a registry; touches no network.
import { randomUUID } from 'node:crypto';
import { constants } from 'node:fs';
import { access, type FileHandle, mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { type Digest, digestHex, digestOf, isDigest, parseDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { type ByteRange, KiB } from '../../units.ts';
import type { BlobId, ManifestBytes, OnPart } from './blob-reader.ts';
import { throwIfAborted } from './http-transport.ts';
import {
  annotationsOf,
  type Descriptor,
  mediaTypeOf,
  parseIndex,
  type ReferrerDescriptor,
  referrersIn,
} from './manifest-json.ts';
import { referrerTag } from './referrer-tag.ts';
import { checkRange, type StreamingRepository, verified, verifiedBlob } from './verified-stream.ts';
import { WantedParts } from './wanted-parts.ts';

const TAG_ANNOTATION = 'org.opencontainers.image.ref.name';
const READ_BYTES = 256 * KiB;

/** A directory and a tag from `oci:/path[:tag]`; undefined for any other text. The tag defaults to "latest". */
export function parseLayoutReference(text: string): { readonly dir: string; readonly tag: string } | undefined {
  if (!text.startsWith('oci:')) return undefined;
  const rest = text.slice(4);
  const colon = rest.lastIndexOf(':');
  const hasTag = colon > rest.lastIndexOf('/');
  const dir = hasTag ? rest.slice(0, colon) : rest;
  const tag = hasTag ? rest.slice(colon + 1) : 'latest';
  if (dir === '' || tag === '') {
    throw new DedupError('INVALID_REFERENCE', `invalid layout reference ${JSON.stringify(text.slice(0, 300))}`, {
      hint: 'write it like oci:/path/to/directory:tag',
    });
  }
  return { dir: resolve(dir), tag };
}

export class OciLayout implements StreamingRepository {
  readonly host = 'oci';
  readonly path: string;
  readonly traffic = { requests: 0, bytes: 0 };
  /** Changes of index.json, one after the other. */
  #writes: Promise<unknown> = Promise.resolve();

  private constructor(dir: string) {
    this.path = dir;
  }

  /** Errors: NOT_FOUND when `dir` is not a layout and `create` is not set. */
  static async open(dir: string, options: { readonly create?: boolean } = {}): Promise<OciLayout> {
    const layout = new OciLayout(resolve(dir));
    try {
      await access(join(layout.path, 'oci-layout'), constants.R_OK);
    } catch (cause) {
      if (options.create !== true) {
        throw new DedupError('NOT_FOUND', `${layout.path} is not an OCI image layout`, {
          cause,
          hint: 'it needs the files oci-layout and index.json, and the directory blobs',
        });
      }
      await mkdir(join(layout.path, 'blobs', 'sha256'), { recursive: true });
      await layout.#writeFile(join(layout.path, 'index.json'), '{"schemaVersion":2,"manifests":[]}');
      await layout.#writeFile(join(layout.path, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}');
    }
    return layout;
  }

  get name(): string {
    return `oci:${this.path}`;
  }

  async readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer> {
    checkRange(blob, range);
    const out = Buffer.allocUnsafe(range.length);
    if (range.length === 0) return out;
    await using file = await this.#openBlob(blob.digest, signal);
    await this.#checkSize(file, blob);
    await this.#fill(file, out, range.offset, blob);
    return out;
  }

  async readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void> {
    const parts = new WantedParts(blob, ranges, onPart);
    if (parts.complete) return;
    await using file = await this.#openBlob(blob.digest, signal);
    await this.#checkSize(file, blob);
    for (const range of parts.missing()) {
      const sink = parts.sink(range.offset);
      for await (const chunk of this.#chunksOf(file, blob, range, signal)) sink(chunk);
    }
  }

  readAll(blob: BlobId, signal: AbortSignal): AsyncIterable<Buffer> {
    return verified(blob, this.streamRange(blob, { offset: 0, length: blob.size }, signal), this.name);
  }

  async *streamRange(blob: BlobId, range: ByteRange, signal: AbortSignal): AsyncGenerator<Buffer> {
    checkRange(blob, range);
    await using file = await this.#openBlob(blob.digest, signal);
    await this.#checkSize(file, blob);
    yield* this.#chunksOf(file, blob, range, signal);
  }

  async *#chunksOf(
    file: FileHandle,
    blob: BlobId,
    range: ByteRange,
    signal: AbortSignal,
  ): AsyncGenerator<Buffer, void, undefined> {
    const end = range.offset + range.length;
    for (let offset = range.offset; offset < end; ) {
      throwIfAborted(signal, `reading blob ${blob.digest} from ${this.name}`);
      const chunk = Buffer.allocUnsafe(Math.min(READ_BYTES, end - offset));
      await this.#fill(file, chunk, offset, blob);
      offset += chunk.length;
      yield chunk;
    }
  }

  async getManifest(tagOrDigest: string, signal: AbortSignal): Promise<ManifestBytes> {
    throwIfAborted(signal, `reading manifest ${tagOrDigest} from ${this.name}`);
    const entries = await this.#index();
    const entry = entries.find((one) =>
      isDigest(tagOrDigest) ? one.digest === tagOrDigest : annotationsOf(one)[TAG_ANNOTATION] === tagOrDigest,
    );
    if (entry === undefined && !isDigest(tagOrDigest)) {
      const tags = entries.flatMap((one) => annotationsOf(one)[TAG_ANNOTATION] ?? []);
      throw new DedupError('REGISTRY_NOT_FOUND', `${this.name} has no tag ${JSON.stringify(tagOrDigest)}`, {
        hint: `its tags are: ${tags.join(', ') || 'none'}`,
      });
    }
    const digest = parseDigest(entry?.digest ?? tagOrDigest);
    const bytes = await this.#readBlob(digest);
    if (digestOf(bytes) !== digest) {
      throw new DedupError('DIGEST_MISMATCH', `manifest ${digest} in ${this.name} has the digest ${digestOf(bytes)}`);
    }
    return { digest, mediaType: entry?.mediaType ?? mediaTypeOf(undefined, bytes), bytes };
  }

  expectReads(): void {}

  async hasBlob(blob: Digest, signal: AbortSignal): Promise<boolean> {
    throwIfAborted(signal, `looking for blob ${blob} in ${this.name}`);
    try {
      await access(this.#file(blob));
      return true;
    } catch {
      // Whatever keeps it from being reached, writing it anew is right, or fails with the reason.
      return false;
    }
  }

  async readBlob(digest: Digest, maxBytes: number, signal: AbortSignal): Promise<Buffer> {
    await using file = await this.#openBlob(digest, signal);
    const { size } = await file.stat();
    if (size > maxBytes) {
      throw new DedupError(
        'REGISTRY_PROTOCOL',
        `blob ${digest} of ${this.name} has ${size} bytes; at most ${maxBytes} are read`,
      );
    }
    return verifiedBlob(digest, await file.readFile(), this.name);
  }

  async putBlob(digest: Digest, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    if (digestOf(bytes) !== digest) {
      throw new DedupError('DIGEST_MISMATCH', `writing blob ${digest} to ${this.name}: the bytes have another digest`);
    }
    if (await this.hasBlob(digest, signal)) return;
    await this.#writeFile(this.#file(digest), bytes);
  }

  /**
   * Writes a manifest. Under a tag it becomes an entry of index.json, and so does a referrer; a manifest pushed by digest
   * is otherwise taken for a part of an index that follows.
   */
  async putManifest(
    tagOrDigest: string,
    mediaType: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<{ subjectKnown: boolean }> {
    const digest = digestOf(bytes);
    if (isDigest(tagOrDigest) && tagOrDigest !== digest) {
      throw new DedupError('DIGEST_MISMATCH', `writing manifest ${tagOrDigest} to ${this.name}: it is ${digest}`);
    }
    await this.putBlob(digest, bytes, signal);
    const { subject, artifactType } = referrerParts(bytes);
    const entry: Descriptor = {
      mediaType,
      digest,
      size: bytes.length,
      ...(subject === undefined || artifactType === undefined ? {} : { artifactType }),
    };
    if (isDigest(tagOrDigest)) {
      if (subject !== undefined) {
        await this.#change((entries) => (entries.some((one) => one.digest === digest) ? entries : [...entries, entry]));
      }
    } else {
      const tagged = { ...entry, annotations: { [TAG_ANNOTATION]: tagOrDigest } };
      await this.#change((entries) => [
        ...entries.filter((one) => annotationsOf(one)[TAG_ANNOTATION] !== tagOrDigest),
        tagged,
      ]);
    }
    return { subjectKnown: subject !== undefined };
  }

  async referrers(subject: Digest, artifactType: string, signal: AbortSignal): Promise<ReferrerDescriptor[]> {
    const doing = `listing referrers of ${subject} in ${this.name}`;
    throwIfAborted(signal, doing);
    const found = new Map<string, ReferrerDescriptor>();
    for (const entry of await this.#index()) {
      if (!isDigest(entry.digest)) continue;
      if (annotationsOf(entry)[TAG_ANNOTATION] === referrerTag(subject)) {
        const listed = referrersIn((await this.getManifest(entry.digest, signal)).bytes, artifactType, doing);
        for (const one of listed) found.set(one.digest, one);
        continue;
      }
      const { bytes } = await this.getManifest(entry.digest, signal);
      const parts = referrerParts(bytes);
      if (parts.subject === subject && parts.artifactType === artifactType) {
        found.set(entry.digest, { digest: entry.digest, size: entry.size, mediaType: entry.mediaType });
      }
    }
    return [...found.values()];
  }

  #file(digest: Digest): string {
    return join(this.path, 'blobs', 'sha256', digestHex(digest));
  }

  async #index(): Promise<Descriptor[]> {
    this.traffic.requests++;
    try {
      return parseIndex(await readFile(join(this.path, 'index.json')), `reading index.json of ${this.name}`);
    } catch (cause) {
      if (cause instanceof DedupError) throw cause;
      throw new DedupError('REGISTRY_NOT_FOUND', `cannot read index.json of ${this.name}`, { cause });
    }
  }

  /** Replaces index.json by what `edit` makes of its entries; fields it does not know are kept. */
  async #change(edit: (entries: Descriptor[]) => Descriptor[]): Promise<void> {
    const write = this.#writes.then(async () => {
      const path = join(this.path, 'index.json');
      const bytes = await readFile(path);
      const manifests = edit(parseIndex(bytes, `reading index.json of ${this.name}`));
      const whole = JSON.parse(bytes.toString('utf8')) as object;
      await this.#writeFile(path, JSON.stringify({ ...whole, manifests }));
    });
    this.#writes = write.catch(() => undefined); // its caller gets the error; the next change starts afresh
    await write;
  }

  async #openBlob(digest: Digest, signal: AbortSignal): Promise<FileHandle> {
    throwIfAborted(signal, `reading blob ${digest} from ${this.name}`);
    this.traffic.requests++;
    try {
      return await open(this.#file(digest), 'r');
    } catch (cause) {
      const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
      throw new DedupError(
        missing ? 'REGISTRY_NOT_FOUND' : 'REGISTRY_HTTP',
        `cannot open blob ${digest} of ${this.name}`,
        {
          cause,
          details: { permanent: true },
        },
      );
    }
  }

  async #checkSize(file: FileHandle, blob: BlobId): Promise<void> {
    const { size } = await file.stat();
    if (size !== blob.size) {
      throw new DedupError(
        'REGISTRY_PROTOCOL',
        `blob ${blob.digest} of ${this.name} has ${size} bytes, not ${blob.size}`,
      );
    }
  }

  async #fill(file: FileHandle, out: Buffer, offset: number, blob: BlobId): Promise<void> {
    let filled = 0;
    while (filled < out.length) {
      const { bytesRead } = await file.read(out, filled, out.length - filled, offset + filled);
      if (bytesRead === 0)
        throw new DedupError('REGISTRY_PROTOCOL', `blob ${blob.digest} of ${this.name} is truncated`);
      filled += bytesRead;
    }
    this.traffic.bytes += out.length;
  }

  async #readBlob(digest: Digest): Promise<Buffer> {
    try {
      const bytes = await readFile(this.#file(digest));
      this.traffic.requests++;
      this.traffic.bytes += bytes.length;
      return bytes;
    } catch (cause) {
      throw new DedupError('REGISTRY_NOT_FOUND', `cannot read manifest ${digest} of ${this.name}`, { cause });
    }
  }

  /** Makes or replaces a file so that a crash leaves the old content or the new one. */
  async #writeFile(path: string, bytes: Uint8Array | string): Promise<void> {
    const temporary = `${path}.${randomUUID()}.tmp`;
    await mkdir(join(path, '..'), { recursive: true });
    try {
      {
        await using file = await open(temporary, 'wx', 0o644);
        await file.writeFile(bytes);
        await file.sync();
      }
      await rename(temporary, path);
    } catch (error) {
      await rm(temporary, { force: true });
      throw error;
    }
  }
}

/** Subject and artifact type of a manifest; a missing artifact type is the media type of its configuration. */
function referrerParts(bytes: Uint8Array): { subject: string | undefined; artifactType: string | undefined } {
  try {
    const manifest = JSON.parse(Buffer.from(bytes).toString('utf8')) as {
      subject?: { digest?: unknown };
      artifactType?: unknown;
      config?: { mediaType?: unknown };
    } | null;
    const text = (value: unknown) => (typeof value === 'string' && value !== '' ? value : undefined);
    return {
      subject: text(manifest?.subject?.digest),
      artifactType: text(manifest?.artifactType) ?? text(manifest?.config?.mediaType),
    };
  } catch {
    // A manifest that is not JSON refers to nothing; whoever reads it as an image refuses it.
    return { subject: undefined, artifactType: undefined };
  }
}
