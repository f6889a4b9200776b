// Takes a multipart/byteranges body apart while it streams (RFC 9110 §14.6, RFC 2046 §5.1). Used by http-blob.ts, which
// says where the bytes of each body part go. Looks for boundaries only where a body part must end.
import { DedupError } from '../../errors.ts';
import { KiB } from '../../units.ts';
import type { Sink } from './wanted-parts.ts';

/** More than a boundary and the header fields of a body part, or the preamble before the first one, ever take. */
const MAX_HEAD_BYTES = 8 * KiB;

/** The boundary from a Content-Type of multipart/byteranges; undefined for any other type, or without a usable one. */
export function boundaryOf(contentType: string | undefined): string | undefined {
  const [type = '', ...parameters] = (contentType ?? '').split(';');
  if (type.trim().toLowerCase() !== 'multipart/byteranges') return undefined;
  for (const parameter of parameters) {
    // RFC 2046 §5.1.1: at most 70 characters, none of which needs an escape inside quotes.
    const match = /^\s*boundary=(?:"([^"\\\r\n]{1,70})"|([^\s"]{1,70}))\s*$/i.exec(parameter);
    if (match !== null) return match[1] ?? match[2];
  }
  return undefined;
}

/** Where a body part goes: its length in bytes, as its Content-Range says, and what takes them. */
export interface BodyPart {
  readonly length: number;
  readonly sink: Sink;
}

export class MultipartRanges {
  readonly #delimiter: Buffer;
  readonly #begin: (contentRange: string) => BodyPart;
  readonly #doing: string;
  /** What came since the last byte of a body part and is not understood yet; never more than MAX_HEAD_BYTES and a chunk. */
  #pending: Buffer = Buffer.alloc(0);
  #current: BodyPart | undefined;
  /** Bytes of the current body part still to come. */
  #left = 0;
  #first = true;
  #ended = false;

  /** `begin` gets the Content-Range of each body part and may refuse it by throwing. `doing` opens every message. */
  constructor(boundary: string, begin: (contentRange: string) => BodyPart, doing: string) {
    this.#delimiter = Buffer.from(`\r\n--${boundary}`, 'latin1');
    this.#begin = begin;
    this.#doing = doing;
  }

  /** True after the last boundary; what follows it is ignored. */
  get ended(): boolean {
    return this.#ended;
  }

  /** True while no body part is being received. */
  get between(): boolean {
    return this.#current === undefined;
  }

  /** Takes the next bytes of the body. Errors: REGISTRY_PROTOCOL for what is not multipart, and those of `begin`. */
  push(chunk: Buffer): void {
    let rest = chunk;
    while (rest.length > 0 && !this.#ended) {
      if (this.#current === undefined) {
        rest = this.#takeHead(rest);
        continue;
      }
      const data = rest.subarray(0, this.#left);
      this.#left -= data.length;
      rest = rest.subarray(data.length);
      this.#current.sink(data);
      if (this.#left === 0) this.#current = undefined;
    }
  }

  /** Adds `bytes` to what comes between two body parts; returns what follows it, once it is complete. */
  #takeHead(bytes: Buffer): Buffer {
    // A head is short: most of a chunk behind it is data that must not be copied to find that out.
    const room = MAX_HEAD_BYTES - this.#pending.length;
    const head = this.#pending.length === 0 ? bytes.subarray(0, room) : this.#joined(bytes.subarray(0, room));
    const length = this.#headLength(head);
    if (length === undefined) {
      if (head.length >= MAX_HEAD_BYTES) this.#malformed(`no body part begins within ${MAX_HEAD_BYTES} bytes`);
      this.#pending = Buffer.from(head); // a chunk must not stay in memory for its last bytes
      return bytes.subarray(bytes.length);
    }
    const taken = length - this.#pending.length;
    this.#pending = Buffer.alloc(0);
    return bytes.subarray(taken);
  }

  #joined(bytes: Buffer): Buffer {
    return Buffer.concat([this.#pending, bytes]);
  }

  /** Length of boundary and header fields at the start of `head`, having begun that body part; undefined: more must come. */
  #headLength(head: Buffer): number | undefined {
    const lineStart = this.#delimiterEnd(head);
    if (lineStart === undefined || head.length < lineStart + 2) return undefined;
    if (head[lineStart] === 0x2d && head[lineStart + 1] === 0x2d) {
      this.#ended = true;
      return head.length;
    }
    const lineEnd = head.indexOf('\r\n', lineStart, 'latin1');
    if (lineEnd < 0) return undefined;
    if (!/^[ \t]*$/.test(head.toString('latin1', lineStart, lineEnd)))
      this.#malformed('a boundary with more behind it');
    const end = head.indexOf('\r\n\r\n', lineEnd, 'latin1');
    if (end < 0) return undefined;
    this.#first = false;
    const part = this.#begin(this.#contentRangeIn(head.toString('latin1', lineEnd + 2, end)));
    this.#left = part.length;
    this.#current = part.length === 0 ? undefined : part;
    return end + 4;
  }

  /** Where the boundary at the start of `head` ends; before the first body part it may stand at a later line. */
  #delimiterEnd(head: Buffer): number | undefined {
    const { length } = this.#delimiter;
    if (this.#first) {
      // The very first line has no line break before it that would belong to the boundary.
      if (startsWith(head, this.#delimiter.subarray(2))) return head.length < length - 2 ? undefined : length - 2;
      const at = head.indexOf(this.#delimiter);
      return at < 0 ? undefined : at + length;
    }
    if (!startsWith(head, this.#delimiter)) this.#malformed('a body part does not end where its Content-Range says');
    return head.length < length ? undefined : length;
  }

  #contentRangeIn(fields: string): string {
    let found: string | undefined;
    for (const line of fields.split('\r\n')) {
      const colon = line.indexOf(':');
      const name = line.slice(0, Math.max(colon, 0)).toLowerCase();
      const value = line.slice(colon + 1).trim();
      if (name === 'content-encoding' && value.toLowerCase() !== 'identity') {
        this.#malformed(`a body part is encoded with ${value.slice(0, 40)}`);
      }
      if (name !== 'content-range') continue;
      if (found !== undefined) this.#malformed('a body part with two Content-Range fields');
      found = value;
    }
    return found ?? this.#malformed('a body part without Content-Range');
  }

  #malformed(what: string): never {
    throw new DedupError('REGISTRY_PROTOCOL', `${this.#doing}: ${what}`);
  }
}

/** Are `bytes` and `prefix` the same as far as the shorter one goes? */
function startsWith(bytes: Buffer, prefix: Buffer): boolean {
  const length = Math.min(bytes.length, prefix.length);
  return bytes.subarray(0, length).equals(prefix.subarray(0, length));
}
