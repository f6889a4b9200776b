// The write stream of containerd's content service: brings one blob into an ingest and makes it content. Opened by
// containerd-client.ts, used by pull.ts; checks nothing itself, containerd does when it commits.
import type * as grpc from '@grpc/grpc-js';
import type { Digest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import type { Labels } from './containerd-client.ts';

/** Bytes of content in one message; containerd takes 16 MiB. */
const WRITE_PIECE_BYTES = 1024 * 1024;
const MAX_UNANSWERED_PIECES = 3;

/** WriteAction of content.proto. */
const WRITE_ACTIONS = { STAT: 0, WRITE: 1, COMMIT: 2 } as const;

/** WriteContentResponse of content.proto. */
export interface WriteResponse {
  readonly action: number;
  readonly offset: number;
  readonly total: number;
  readonly digest: string;
}

interface WriteRequest {
  readonly action: 'STAT' | 'WRITE' | 'COMMIT';
  readonly ref?: string;
  readonly total?: number;
  readonly expected?: Digest;
  readonly offset?: number;
  readonly data?: Uint8Array;
  readonly labels?: Labels;
}

/** One open writer of an ingest. Bytes are sent in large pieces, a few of them ahead of containerd's answers. */
export class ContentWriter {
  readonly #call: grpc.ClientDuplexStream<object, WriteResponse>;
  readonly #responses: AsyncIterator<WriteResponse>;
  readonly #mapError: (error: unknown) => DedupError;
  /** Not sent yet. */
  #gathered: Uint8Array[] = [];
  #gatheredBytes = 0;
  #unanswered = 0;
  /** Where the next piece goes: what containerd has and what is on its way there. */
  #offset = 0;

  constructor(call: grpc.ClientDuplexStream<object, WriteResponse>, mapError: (error: unknown) => DedupError) {
    this.#call = call;
    this.#responses = call[Symbol.asyncIterator]() as AsyncIterator<WriteResponse>;
    this.#mapError = mapError;
  }

  /** Names the ingest and answers how many bytes containerd has of it. Errors: see `openWriter`. */
  async open(ref: string, blob: { digest: Digest; size: number }): Promise<void> {
    this.#send({ action: 'STAT', ref, total: blob.size, expected: blob.digest });
    this.#offset = (await this.#answers(0)) ?? 0;
  }

  /** Bytes of the ingest that were there or have been given to `write`. */
  get offset(): number {
    return this.#offset + this.#gatheredBytes;
  }

  /** Appends bytes, which must not change afterwards. */
  async write(data: Uint8Array): Promise<void> {
    this.#gathered.push(data);
    this.#gatheredBytes += data.length;
    if (this.#gatheredBytes < WRITE_PIECE_BYTES) return;
    this.#send({ action: 'WRITE', ...this.#piece() });
    await this.#answers(MAX_UNANSWERED_PIECES);
  }

  /** Makes the ingest a blob. Errors: FAILED_PRECONDITION for another size or digest; ALREADY_EXISTS. */
  async commit(blob: { digest: Digest; size: number }, labels: Labels): Promise<void> {
    this.#send({ action: 'COMMIT', ...this.#piece(), total: blob.size, expected: blob.digest, labels });
    await this.#answers(0);
    await this.#end();
  }

  /** Lets go of the ingest and waits until containerd has done so too; what was written stays. */
  async close(): Promise<void> {
    if (this.#gatheredBytes > 0) this.#send({ action: 'WRITE', ...this.#piece() });
    await this.#answers(0);
    await this.#end();
  }

  /** Lets go at once; what is on its way may be lost. */
  cancel(): void {
    this.#call.cancel();
  }

  /** What was gathered, as one piece of the ingest. */
  #piece(): { offset: number; data: Uint8Array } {
    const data = this.#gathered.length === 1 ? (this.#gathered[0] as Uint8Array) : Buffer.concat(this.#gathered);
    const offset = this.#offset;
    this.#gathered = [];
    this.#gatheredBytes = 0;
    this.#offset += data.length;
    return { offset, data };
  }

  #send(request: WriteRequest): void {
    this.#unanswered++;
    this.#call.write({ ...request, action: WRITE_ACTIONS[request.action] });
  }

  /** Waits until no more than `most` messages are unanswered; the offset of the last answer, if one came. */
  async #answers(most: number): Promise<number | undefined> {
    let offset: number | undefined;
    try {
      for (; this.#unanswered > most; this.#unanswered--) {
        const response = await this.#responses.next();
        if (response.done === true) throw new DedupError('UNAVAILABLE', 'containerd ended the write without an answer');
        offset = response.value.offset;
      }
    } catch (error) {
      throw this.#mapError(error);
    }
    return offset;
  }

  async #end(): Promise<void> {
    this.#call.end();
    try {
      while ((await this.#responses.next()).done !== true);
    } catch {
      // Everything sent was answered, so nothing is lost with the stream.
    }
  }
}
