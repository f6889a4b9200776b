// The answer to a request for several ranges of a blob: is it one, and where do its bytes go? RFC 9110 §14.2 lets a server
// ignore, join and reorder ranges. Used by http-blob.ts, which asks for each range alone where a server cannot.
import { LRUCache } from 'lru-cache';
import { DedupError } from '../../errors.ts';
import { type ByteRange, KiB, parseContentRange } from '../../units.ts';
import type { BlobId } from './blob-reader.ts';
import { drop, type HttpExchange, header } from './http-exchange.ts';
import type { HttpResponse } from './http-transport.ts';
import { type BodyPart, boundaryOf, MultipartRanges } from './multipart-ranges.ts';
import type { WantedParts } from './wanted-parts.ts';

/** Ranges in one request: its header stays below 2.2 KiB, and servers see no attack in it (Apache refuses 200). */
export const MAX_STRETCHES = 64;

/**
 * Beside 200: how servers, and what guards them, refuse several ranges that they would send one by one. Where it means something
 * else, the request for a single range is told.
 */
export const SINGLE_RANGE_STATUSES: readonly number[] = [400, 405, 413, 414, 416, 431, 501];

/** Bytes between two ranges that a server may send to join them; a request for each range costs more. */
const MAX_GAP_BYTES = 16 * KiB;
/** Once all parts are here, the rest of the body is only read so that its connection can be used again. */
const EPILOGUE_MS = 1_000;
const EPILOGUE_BYTES = 64 * KiB;
const REMEMBERED_MS = 60 * 60_000;

/** Origins of registries that answer a request for several ranges with something else. */
export type SingleRangeServers = LRUCache<string, true>;

export function singleRangeServers(): SingleRangeServers {
  return new LRUCache({ max: 256, ttl: REMEMBERED_MS });
}

export class RangesResponse {
  readonly #response: HttpResponse;
  readonly #blob: BlobId;
  readonly #parts: WantedParts;
  readonly #doing: string;
  /** The ranges asked for that nothing in the answer covered yet; ascending. */
  #open: readonly ByteRange[];

  constructor(response: HttpResponse, blob: BlobId, asked: readonly ByteRange[], parts: WantedParts, doing: string) {
    this.#response = response;
    this.#blob = blob;
    this.#open = asked.toSorted((a, b) => a.offset - b.offset);
    this.#parts = parts;
    this.#doing = doing;
  }

  /**
   * Reads the body and tells the parts that are in it. False when the server did not send all that was asked for, and will
   * not another time. Errors: those of HttpExchange.body; REGISTRY_PROTOCOL for a malformed body, REGISTRY_HTTP for one that
   * ends early.
   */
  async read(exchange: HttpExchange, signal: AbortSignal): Promise<boolean> {
    const encoding = header(this.#response, 'content-encoding');
    const plain = encoding === undefined || encoding === 'identity';
    if (this.#response.status === 206 && plain) {
      const boundary = boundaryOf(header(this.#response, 'content-type'));
      if (boundary !== undefined) return await this.#readMultipart(boundary, exchange, signal);
      const joined = this.#joinedRange();
      if (joined !== undefined) {
        const sink = this.#parts.sink(joined.offset);
        for await (const chunk of exchange.bodyOf(joined.length, this.#response, this.#doing, signal)) sink(chunk);
        return this.#open.length === 0;
      }
    }
    drop(this.#response);
    return false;
  }

  /** The only range of an answer that is not multipart, where it is one of those asked for, or some of them joined. */
  #joinedRange(): ByteRange | undefined {
    const contentRange = parseContentRange(header(this.#response, 'content-range') ?? '');
    if (contentRange === undefined || !this.#sizeFits(contentRange.size)) return undefined;
    const { range } = contentRange;
    const contentLength = header(this.#response, 'content-length');
    if (contentLength !== undefined && contentLength !== String(range.length)) return undefined;
    return this.#cover(range) === 'wanted' ? range : undefined;
  }

  async #readMultipart(boundary: string, exchange: HttpExchange, signal: AbortSignal): Promise<boolean> {
    let wasteful = false;
    const begin = (text: string): BodyPart => {
      const contentRange = parseContentRange(text);
      const what = contentRange === undefined ? 'wrong' : this.#cover(contentRange.range);
      if (contentRange === undefined || what === 'wrong' || !this.#sizeFits(contentRange.size)) {
        throw new DedupError(
          'REGISTRY_PROTOCOL',
          `${this.#doing}: a body part has Content-Range ${JSON.stringify(text.slice(0, 80))}`,
        );
      }
      wasteful ||= what === 'wasteful';
      const { offset, length } = contentRange.range;
      return { length, sink: wasteful ? () => undefined : this.#parts.sink(offset) };
    };
    const body = new MultipartRanges(boundary, begin, this.#doing);
    let length = 0;
    let epilogue = 0;
    let complete = false;
    let timer: NodeJS.Timeout | undefined;
    try {
      for await (const chunk of exchange.body(this.#response, this.#doing, signal)) {
        length += chunk.length;
        if (complete) {
          epilogue += chunk.length;
          if (epilogue > EPILOGUE_BYTES) break;
          continue;
        }
        body.push(chunk);
        if (wasteful) return false;
        complete = body.ended || (this.#open.length === 0 && body.between);
        if (complete) timer = setTimeout(() => drop(this.#response), EPILOGUE_MS);
      }
    } catch (error) {
      if (!complete) throw error; // else everything is here; what broke after it does not matter
    } finally {
      clearTimeout(timer);
    }
    if (!complete) throw new DedupError('REGISTRY_HTTP', `${this.#doing}: the body ended after ${length} bytes`);
    return this.#open.length === 0;
  }

  #sizeFits(size: number | undefined): boolean {
    return size === undefined || size === this.#blob.size;
  }

  /** Takes `range` for what was asked for: it is one of the open ranges, or joins some of them. */
  #cover(range: ByteRange): 'wanted' | 'wasteful' | 'wrong' {
    const end = range.offset + range.length;
    const from = this.#open.findIndex(({ offset }) => offset === range.offset);
    const to = this.#open.findIndex(({ offset, length }) => offset + length === end);
    if (from < 0 || to < from) return 'wrong';
    let position = range.offset;
    for (const { offset, length } of this.#open.slice(from, to + 1)) {
      if (offset - position > MAX_GAP_BYTES) return 'wasteful';
      position = offset + length;
    }
    this.#open = [...this.#open.slice(0, from), ...this.#open.slice(to + 1)];
    return 'wanted';
  }
}
