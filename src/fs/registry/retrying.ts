// Wraps a repository so that what may pass is tried again: backoff with jitter, Retry-After, a deadline, and broken
// streams continued where they ended. Made by pool.ts. It never repeats what the same bytes or words would repeat.
import { setTimeout as sleep } from 'node:timers/promises';
import type { Digest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import type { ByteRange } from '../../units.ts';
import type { BlobId, ManifestBytes, OnPart } from './blob-reader.ts';
import { abortError } from './http-transport.ts';
import type { ReferrerDescriptor } from './manifest-json.ts';
import { checkRange, type StreamingRepository, verified } from './verified-stream.ts';
import { WantedParts } from './wanted-parts.ts';

/** What the registry client needs of a logger; pino's fits. */
export interface RegistryLog {
  debug(details: object, message: string): void;
  warn(details: object, message: string): void;
}

export interface RetryOptions {
  /** Attempts without progress, the first included. Default 6. */
  readonly attempts?: number;
  /** Pause before the second attempt, doubled each time, half of it random. Default 100. */
  readonly baseDelayMs?: number;
  /** Longest pause that is not asked for by the server. Default 5,000. */
  readonly maxDelayMs?: number;
  /** Longest time for one call, pauses included; streams are bound by attempts and stalls instead. Default 60,000. */
  readonly deadlineMs?: number;
}

const CODES = new Set(['REGISTRY_HTTP', 'DEADLINE', 'UNAVAILABLE']);

/** Can the same request succeed a little later? */
export function mayPass(error: unknown): error is DedupError {
  return (
    error instanceof DedupError &&
    CODES.has(error.code) &&
    error.details.permanent !== true &&
    error.details.byCaller !== true
  );
}

export class RetryingRepository implements StreamingRepository {
  readonly #inner: StreamingRepository;
  readonly #attempts: number;
  readonly #baseDelayMs: number;
  readonly #maxDelayMs: number;
  readonly #deadlineMs: number;
  readonly #log: RegistryLog | undefined;

  constructor(inner: StreamingRepository, options: RetryOptions = {}, log?: RegistryLog) {
    this.#inner = inner;
    this.#attempts = options.attempts ?? 6;
    this.#baseDelayMs = options.baseDelayMs ?? 100;
    this.#maxDelayMs = options.maxDelayMs ?? 5_000;
    this.#deadlineMs = options.deadlineMs ?? 60_000;
    this.#log = log;
  }

  get name(): string {
    return this.#inner.name;
  }
  get host(): string {
    return this.#inner.host;
  }
  get path(): string {
    return this.#inner.path;
  }
  get traffic(): { readonly requests: number; readonly bytes: number } {
    return this.#inner.traffic;
  }

  readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer> {
    return this.#withDeadline(`reading from blob ${blob.digest}`, signal, async (bounded, endsAt) => {
      checkRange(blob, range);
      const out = Buffer.allocUnsafe(range.length);
      let filled = 0;
      for await (const chunk of this.#stream(blob, range, bounded, endsAt)) {
        chunk.copy(out, filled);
        filled += chunk.length;
      }
      return out;
    });
  }

  readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void> {
    return this.#withDeadline(`reading from blob ${blob.digest}`, signal, async (bounded, endsAt) => {
      let failures = 0;
      const parts = new WantedParts(blob, ranges, (index, bytes) => {
        failures = 0;
        onPart(index, bytes);
      });
      while (!parts.complete) {
        try {
          await parts.readFrom(this.#inner, blob, bounded);
        } catch (error) {
          // Everything wanted is here; what broke after it does not matter.
          if (parts.complete && mayPass(error)) return;
          failures++;
          await this.#pause(error, failures, endsAt, bounded);
        }
      }
    });
  }

  readAll(blob: BlobId, signal: AbortSignal): AsyncIterable<Buffer> {
    return verified(blob, this.streamRange(blob, { offset: 0, length: blob.size }, signal), this.name);
  }

  streamRange(blob: BlobId, range: ByteRange, signal: AbortSignal): AsyncIterable<Buffer> {
    // The consumer's own pace counts into a stream's time: only attempts and stalls bound it.
    return this.#stream(blob, range, signal, Number.POSITIVE_INFINITY);
  }

  async *#stream(
    blob: BlobId,
    range: ByteRange,
    signal: AbortSignal,
    endsAt: number,
  ): AsyncGenerator<Buffer, void, undefined> {
    checkRange(blob, range);
    const end = range.offset + range.length;
    let offset = range.offset;
    let failures = 0;
    while (offset < end) {
      try {
        for await (const chunk of this.#inner.streamRange(blob, { offset, length: end - offset }, signal)) {
          offset += chunk.length;
          failures = 0;
          yield chunk;
        }
      } catch (error) {
        // Everything wanted is here; what broke after it does not matter.
        if (offset === end && mayPass(error)) return;
        failures++;
        await this.#pause(error, failures, endsAt, signal);
      }
    }
  }

  getManifest(tagOrDigest: string, signal: AbortSignal): Promise<ManifestBytes> {
    return this.#retry('reading a manifest', signal, (bounded) => this.#inner.getManifest(tagOrDigest, bounded));
  }

  expectReads(): void {
    this.#inner.expectReads();
  }

  hasBlob(blob: Digest, signal: AbortSignal): Promise<boolean> {
    return this.#retry('looking for a blob', signal, (bounded) => this.#inner.hasBlob(blob, bounded));
  }

  readBlob(digest: Digest, maxBytes: number, signal: AbortSignal): Promise<Buffer> {
    return this.#retry('reading a blob', signal, (bounded) => this.#inner.readBlob(digest, maxBytes, bounded));
  }

  putBlob(digest: Digest, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    return this.#retry('pushing a blob', signal, (bounded) => this.#inner.putBlob(digest, bytes, bounded));
  }

  putManifest(
    tagOrDigest: string,
    mediaType: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<{ subjectKnown: boolean }> {
    return this.#retry('pushing a manifest', signal, (bounded) =>
      this.#inner.putManifest(tagOrDigest, mediaType, bytes, bounded),
    );
  }

  referrers(subject: Digest, artifactType: string, signal: AbortSignal): Promise<ReferrerDescriptor[]> {
    return this.#retry('listing referrers', signal, (bounded) => this.#inner.referrers(subject, artifactType, bounded));
  }

  #retry<T>(doing: string, signal: AbortSignal, call: (bounded: AbortSignal) => Promise<T>): Promise<T> {
    return this.#withDeadline(doing, signal, async (bounded, endsAt) => {
      for (let failures = 1; ; failures++) {
        try {
          return await call(bounded);
        } catch (error) {
          await this.#pause(error, failures, endsAt, bounded);
        }
      }
    });
  }

  /** Runs `call` with a signal that also fires at the deadline. */
  async #withDeadline<T>(
    doing: string,
    signal: AbortSignal,
    call: (bounded: AbortSignal, endsAt: number) => Promise<T>,
  ): Promise<T> {
    const controller = new AbortController();
    const message = `${doing} in ${this.name}: not done within ${this.#deadlineMs} ms`;
    const expired = new DedupError('DEADLINE', message, { details: { byCaller: true } });
    const timer = setTimeout(() => controller.abort(expired), this.#deadlineMs);
    try {
      return await call(AbortSignal.any([signal, controller.signal]), performance.now() + this.#deadlineMs);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Waits before the next attempt, or throws `error` when there is to be none. */
  async #pause(error: unknown, failures: number, endsAt: number, signal: AbortSignal): Promise<void> {
    if (!mayPass(error) || signal.aborted || failures >= this.#attempts) throw error;
    const backoff = Math.min(this.#maxDelayMs, this.#baseDelayMs * 2 ** (failures - 1));
    const asked = error.details.retryAfterMs;
    const delayMs = Math.max(backoff * (0.5 + Math.random() / 2), typeof asked === 'number' ? asked : 0);
    const leftMs = Math.min(endsAt - performance.now(), this.#deadlineMs);
    // Waiting into the deadline would only hide the real error behind "out of time".
    if (delayMs >= leftMs) throw error;
    const details = { registry: this.host, code: error.code, failures, delayMs: Math.round(delayMs) };
    this.#log?.debug(details, `trying again: ${error.message}`);
    try {
      await sleep(delayMs, undefined, { signal });
    } catch {
      throw abortError(signal, 'waiting to try again');
    }
  }
}
