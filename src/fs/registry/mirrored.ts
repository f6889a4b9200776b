// Reads from mirrors in their order before the registry that the image names; writes only to that registry. Made by
// pool.ts. A mirror that fails is passed over for a while, one without a blob is not asked for that blob again soon.
import { LRUCache } from 'lru-cache';
import type { Digest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import type { ByteRange } from '../../units.ts';
import type { BlobId, ManifestBytes, OnPart } from './blob-reader.ts';
import type { ReferrerDescriptor } from './manifest-json.ts';
import type { RegistryLog } from './retrying.ts';
import { checkRange, type StreamingRepository, verified } from './verified-stream.ts';
import { WantedParts } from './wanted-parts.ts';

const COOL_DOWN_MS = 30_000;
const MISSING_MS = 5 * 60_000;

interface Mirror {
  readonly repository: StreamingRepository;
  /** Not asked before this moment of the monotonic clock, in ms. */
  coolUntil: number;
}

export class MirroredRepository implements StreamingRepository {
  readonly #mirrors: readonly Mirror[];
  readonly #origin: StreamingRepository;
  readonly #log: RegistryLog | undefined;
  /** "<number of mirror> <digest or tag>" of what a mirror said it does not have. */
  readonly #missing = new LRUCache<string, true>({ max: 4096, ttl: MISSING_MS });

  constructor(mirrors: readonly StreamingRepository[], origin: StreamingRepository, log?: RegistryLog) {
    this.#mirrors = mirrors.map((repository) => ({ repository, coolUntil: 0 }));
    this.#origin = origin;
    this.#log = log;
  }

  get name(): string {
    return this.#origin.name;
  }
  get host(): string {
    return this.#origin.host;
  }
  get path(): string {
    return this.#origin.path;
  }

  get traffic(): { readonly requests: number; readonly bytes: number } {
    const all = [this.#origin, ...this.#mirrors.map(({ repository }) => repository)].map(({ traffic }) => traffic);
    return {
      requests: all.reduce((sum, { requests }) => sum + requests, 0),
      bytes: all.reduce((sum, { bytes }) => sum + bytes, 0),
    };
  }

  readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer> {
    return this.#firstOf(blob.digest, signal, (repository) => repository.readRange(blob, range, signal));
  }

  async readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void> {
    const parts = new WantedParts(blob, ranges, onPart);
    for (const mirror of this.#usable(blob.digest)) {
      try {
        await parts.readFrom(mirror.repository, blob, signal);
        return;
      } catch (error) {
        this.#note(mirror, blob.digest, error, signal);
      }
    }
    await parts.readFrom(this.#origin, blob, signal);
  }

  readAll(blob: BlobId, signal: AbortSignal): AsyncIterable<Buffer> {
    return verified(blob, this.streamRange(blob, { offset: 0, length: blob.size }, signal), this.name);
  }

  async *streamRange(blob: BlobId, range: ByteRange, signal: AbortSignal): AsyncGenerator<Buffer> {
    checkRange(blob, range);
    const end = range.offset + range.length;
    let offset = range.offset;
    for (const mirror of this.#usable(blob.digest)) {
      try {
        for await (const chunk of mirror.repository.streamRange(blob, { offset, length: end - offset }, signal)) {
          offset += chunk.length;
          yield chunk;
        }
        return;
      } catch (error) {
        this.#note(mirror, blob.digest, error, signal);
        if (offset === end) return;
      }
    }
    yield* this.#origin.streamRange(blob, { offset, length: end - offset }, signal);
  }

  getManifest(tagOrDigest: string, signal: AbortSignal): Promise<ManifestBytes> {
    return this.#firstOf(tagOrDigest, signal, (repository) => repository.getManifest(tagOrDigest, signal));
  }

  expectReads(): void {
    const [mirror] = this.#usable('');
    (mirror?.repository ?? this.#origin).expectReads();
  }

  /** Asks the origin only: the answer decides whether a push there can be left out. */
  hasBlob(blob: Digest, signal: AbortSignal): Promise<boolean> {
    return this.#origin.hasBlob(blob, signal);
  }

  readBlob(digest: Digest, maxBytes: number, signal: AbortSignal): Promise<Buffer> {
    return this.#firstOf(digest, signal, (repository) => repository.readBlob(digest, maxBytes, signal));
  }

  putBlob(digest: Digest, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    return this.#origin.putBlob(digest, bytes, signal);
  }

  putManifest(
    tagOrDigest: string,
    mediaType: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<{ subjectKnown: boolean }> {
    return this.#origin.putManifest(tagOrDigest, mediaType, bytes, signal);
  }

  /** The first list that is not empty: a mirror may lack referrers that the origin has. */
  async referrers(subject: Digest, artifactType: string, signal: AbortSignal): Promise<ReferrerDescriptor[]> {
    for (const mirror of this.#usable(subject)) {
      try {
        const found = await mirror.repository.referrers(subject, artifactType, signal);
        if (found.length > 0) return found;
      } catch (error) {
        this.#note(mirror, subject, error, signal);
      }
    }
    return await this.#origin.referrers(subject, artifactType, signal);
  }

  async #firstOf<T>(
    what: string,
    signal: AbortSignal,
    call: (repository: StreamingRepository) => Promise<T>,
  ): Promise<T> {
    for (const mirror of this.#usable(what)) {
      try {
        return await call(mirror.repository);
      } catch (error) {
        this.#note(mirror, what, error, signal);
      }
    }
    return await call(this.#origin);
  }

  *#usable(what: string): Generator<Mirror> {
    for (const [number, mirror] of this.#mirrors.entries()) {
      if (mirror.coolUntil <= performance.now() && !this.#missing.has(`${number} ${what}`)) yield mirror;
    }
  }

  /** Decides what a mirror's failure means for later; rethrows what is the caller's own doing. */
  #note(mirror: Mirror, what: string, error: unknown, signal: AbortSignal): void {
    if (signal.aborted || !(error instanceof DedupError) || error.code === 'INVALID_ARGUMENT') throw error;
    if (error.code === 'REGISTRY_NOT_FOUND') {
      this.#missing.set(`${this.#mirrors.indexOf(mirror)} ${what}`, true);
      return;
    }
    mirror.coolUntil = performance.now() + COOL_DOWN_MS;
    const details = { mirror: mirror.repository.host, code: error.code, coolDownMs: COOL_DOWN_MS };
    this.#log?.warn(details, `mirror failed, using the next one: ${error.message}`);
  }
}
