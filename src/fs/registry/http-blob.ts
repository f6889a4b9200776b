// A Repository over HTTP: the OCI distribution protocol, every answer checked for status, range and length. Made by
// pool.ts and wrapped by retrying.ts; it never retries on its own, apart from one renewal of a token or redirect.
import { LRUCache } from 'lru-cache';
import { type Digest, digestOf, isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { type ByteRange, httpRange, MiB } from '../../units.ts';
import type { Authorizer, Scope } from './auth.ts';
import type { BlobId, ManifestBytes, OnPart } from './blob-reader.ts';
import { discard, drop, type ExchangeRequest, HttpExchange, header } from './http-exchange.ts';
import {
  MAX_STRETCHES,
  RangesResponse,
  SINGLE_RANGE_STATUSES,
  type SingleRangeServers,
  singleRangeServers,
} from './http-ranges.ts';
import type { HttpResponse, HttpTransport } from './http-transport.ts';
import { INDEX_TYPES, MANIFEST_TYPES, mediaTypeOf, type ReferrerDescriptor, referrersIn } from './manifest-json.ts';
import { serverOf } from './reference.ts';
import { referrerTag } from './referrer-tag.ts';
import { checkRange, type StreamingRepository, verified, verifiedBlob } from './verified-stream.ts';
import { fewAtOnce, WantedParts } from './wanted-parts.ts';

/** More than any registry accepts for a manifest (the common limit is 4 MiB). */
const MAX_MANIFEST_BYTES = 8 * MiB;
const MAX_REFERRER_PAGES = 20;
/** How long connections may be prepared for. */
const EXPECT_MS = 5_000;
/** Signed URLs live for some minutes to an hour; a renewed one costs one request. */
const REDIRECT_TTL_MS = 4 * 60_000;

const ACCEPTED_MANIFESTS = [...MANIFEST_TYPES, ...INDEX_TYPES, '*/*;q=0.1'].join(', ');

export interface HttpRepositoryOptions {
  readonly host: string;
  readonly path: string;
  readonly transport: HttpTransport;
  readonly authorizer?: Authorizer;
  /** Address of the server, e.g. "https://registry-1.docker.io"; default: https, or what a loopback or insecure host speaks. */
  readonly endpoint?: string;
  /** The registry this server mirrors; sent along as `ns`, by which mirrors of several registries tell them apart. */
  readonly mirrorOf?: string;
  /** What is known of servers, shared by all repositories of a process. Default: this repository's own. */
  readonly singleRangeServers?: SingleRangeServers;
}

export class HttpRepository implements StreamingRepository {
  readonly host: string;
  readonly path: string;
  readonly #transport: HttpTransport;
  readonly #exchange: HttpExchange;
  readonly #endpoint: string | undefined;
  readonly #mirrorOf: string | undefined;
  readonly #singleRangeServers: SingleRangeServers;
  readonly #redirects = new LRUCache<Digest, URL>({ max: 1024, ttl: REDIRECT_TTL_MS });

  constructor(options: HttpRepositoryOptions) {
    this.host = options.host;
    this.path = options.path;
    this.#transport = options.transport;
    this.#exchange = new HttpExchange(options.transport, options.authorizer);
    this.#endpoint = options.endpoint;
    this.#mirrorOf = options.mirrorOf;
    this.#singleRangeServers = options.singleRangeServers ?? singleRangeServers();
  }

  get name(): string {
    return `${this.host}/${this.path}`;
  }

  get traffic(): { readonly requests: number; readonly bytes: number } {
    return this.#exchange.traffic;
  }

  async readRange(blob: BlobId, range: ByteRange, signal: AbortSignal): Promise<Buffer> {
    checkRange(blob, range);
    const out = Buffer.allocUnsafe(range.length);
    let filled = 0;
    for await (const chunk of this.streamRange(blob, range, signal)) {
      chunk.copy(out, filled);
      filled += chunk.length;
    }
    return out;
  }

  async readRanges(blob: BlobId, ranges: readonly ByteRange[], signal: AbortSignal, onPart: OnPart): Promise<void> {
    const parts = new WantedParts(blob, ranges, onPart);
    if (parts.complete) return;
    const { origin } = await this.#url('', signal);
    while (!this.#singleRangeServers.has(origin)) {
      const stretches = parts.missing().slice(0, MAX_STRETCHES);
      if (stretches.length < 2) break;
      await this.#readSeveral(blob, stretches, parts, origin, signal);
    }
    await fewAtOnce(parts.missing(), async (stretch) => {
      const sink = parts.sink(stretch.offset);
      for await (const chunk of this.streamRange(blob, stretch, signal)) sink(chunk);
    });
  }

  /** Asks for `stretches` in one request. Afterwards all are told, or the server is known to need a request for each. */
  async #readSeveral(
    blob: BlobId,
    stretches: readonly ByteRange[],
    parts: WantedParts,
    origin: string,
    signal: AbortSignal,
  ): Promise<void> {
    const wanted = stretches.reduce((sum, { length }) => sum + length, 0);
    const doing = `reading ${wanted} bytes in ${stretches.length} ranges of blob ${blob.digest} from ${this.name}`;
    const response = await this.#openBlob(blob, httpRange(...stretches), SINGLE_RANGE_STATUSES, doing, signal);
    const answer = new RangesResponse(response, blob, stretches, parts, doing);
    let able = false;
    try {
      able = await answer.read(this.#exchange, signal);
    } catch (error) {
      // A server that has this wrong has it wrong the next time, too, and may be right about single ranges; whatever may pass
      // says nothing about it.
      able = !(error instanceof DedupError && error.code === 'REGISTRY_PROTOCOL');
      if (able) throw error;
    } finally {
      if (!able) this.#singleRangeServers.set(origin, true);
    }
  }

  readAll(blob: BlobId, signal: AbortSignal): AsyncIterable<Buffer> {
    return verified(blob, this.streamRange(blob, { offset: 0, length: blob.size }, signal), this.name);
  }

  async *streamRange(blob: BlobId, range: ByteRange, signal: AbortSignal): AsyncGenerator<Buffer> {
    checkRange(blob, range);
    if (range.length === 0) return;
    const doing = `reading ${range.length} bytes at ${range.offset} of blob ${blob.digest} from ${this.name}`;
    const whole = range.offset === 0 && range.length === blob.size;
    const response = await this.#openBlob(blob, whole ? undefined : httpRange(range), [], doing, signal);
    this.#checkHead(response, blob, range, doing);
    yield* this.#exchange.bodyOf(range.length, response, doing, signal);
  }

  /** A response for the blob with status 200, 206 or one of `others`, through a remembered redirect where there is one. */
  async #openBlob(
    blob: BlobId,
    range: string | undefined,
    others: readonly number[],
    doing: string,
    signal: AbortSignal,
  ): Promise<HttpResponse> {
    const answers = (status: number) => status === 200 || status === 206 || others.includes(status);
    const headers = { 'accept-encoding': 'identity', ...(range === undefined ? {} : { range }) };
    const request = { method: 'GET', headers, lane: 'data', signal } as const;
    const origin = await this.#url(`blobs/${blob.digest}`, signal);
    const remembered = this.#redirects.get(blob.digest);
    if (remembered !== undefined) {
      const response = await this.#exchange.send({ ...request, url: remembered }).catch((error: unknown) => {
        this.#forget(blob.digest, remembered);
        throw error;
      });
      // Signed URLs expire with 400, 401, 403, 404 or 410, depending on who serves them: ask the registry for a new one.
      const expired = [400, 401, 403, 404, 410].includes(response.status);
      if (answers(response.status) && !expired) return response;
      this.#forget(blob.digest, remembered);
      if (!expired) throw await this.#exchange.failure(response, doing, signal);
      await discard(response);
    }
    const response = await this.#exchange.send({ ...request, url: origin, scope: this.#scope('pull') });
    if (!answers(response.status)) throw await this.#exchange.failure(response, doing, signal);
    // On the registry itself a request needs authorization, which a remembered URL does not get.
    const found = response.status === 200 || response.status === 206;
    if (found && response.url.origin !== origin.origin) this.#redirects.set(blob.digest, response.url);
    return response;
  }

  /** Drops a redirect that went wrong, unless another request has learnt a new one meanwhile. */
  #forget(digest: Digest, redirect: URL): void {
    if (this.#redirects.get(digest) === redirect) this.#redirects.delete(digest);
  }

  /** Refuses an answer whose head says that other bytes than the wanted ones follow. */
  #checkHead(response: HttpResponse, blob: BlobId, range: ByteRange, doing: string): void {
    const refuse = (what: string): never => {
      drop(response);
      throw new DedupError('REGISTRY_PROTOCOL', `${doing}: ${what}`, { details: { status: response.status } });
    };
    const encoding = header(response, 'content-encoding');
    if (encoding !== undefined && encoding !== 'identity') refuse(`the body is encoded with ${encoding.slice(0, 40)}`);
    if (response.status === 206) {
      const contentRange = header(response, 'content-range');
      const expected = contentRangeOf(range);
      if (contentRange !== `${expected}/${blob.size}` && contentRange !== `${expected}/*`) {
        refuse(`the answer has Content-Range ${JSON.stringify(contentRange?.slice(0, 80) ?? '')}`);
      }
    } else if (range.offset !== 0 || range.length !== blob.size) {
      refuse('the server ignores Range and sends the whole blob');
    }
    const contentLength = header(response, 'content-length');
    if (contentLength !== undefined && contentLength !== String(range.length)) {
      refuse(`the answer has Content-Length ${contentLength.slice(0, 40)}`);
    }
  }

  async getManifest(tagOrDigest: string, signal: AbortSignal): Promise<ManifestBytes> {
    const doing = `reading manifest ${tagOrDigest} from ${this.name}`;
    const response = await this.#send('GET', `manifests/${tagOrDigest}`, 'pull', signal, {
      accept: ACCEPTED_MANIFESTS,
    });
    if (response.status !== 200) throw await this.#exchange.failure(response, doing, signal);
    const bytes = await this.#exchange.bytes(response, MAX_MANIFEST_BYTES, doing, signal);
    const digest = digestOf(bytes);
    const said = header(response, 'docker-content-digest');
    const expected = isDigest(tagOrDigest) ? tagOrDigest : said !== undefined && isDigest(said) ? said : digest;
    if (digest !== expected) {
      throw new DedupError('DIGEST_MISMATCH', `${doing}: expected the digest ${expected}, got ${digest}`);
    }
    return { digest, mediaType: mediaTypeOf(header(response, 'content-type'), bytes), bytes };
  }

  expectReads(): void {
    const expect = async (): Promise<void> => {
      await this.#transport.expect(await this.#url('', AbortSignal.timeout(EXPECT_MS)), 'data');
    };
    expect().catch(() => undefined); // the reads that follow say what is wrong
  }

  async hasBlob(blob: Digest, signal: AbortSignal): Promise<boolean> {
    const response = await this.#send('HEAD', `blobs/${blob}`, 'pull', signal);
    if (response.status === 404) {
      await discard(response);
      return false;
    }
    if (response.status !== 200) {
      throw await this.#exchange.failure(response, `looking for blob ${blob} in ${this.name}`, signal);
    }
    drop(response);
    return true;
  }

  async readBlob(digest: Digest, maxBytes: number, signal: AbortSignal): Promise<Buffer> {
    const doing = `reading blob ${digest} from ${this.name}`;
    const url = await this.#url(`blobs/${digest}`, signal);
    const headers = { 'accept-encoding': 'identity' };
    const response = await this.#exchange.send({
      method: 'GET',
      url,
      headers,
      lane: 'data',
      scope: this.#scope('pull'),
      signal,
    });
    if (response.status !== 200) throw await this.#exchange.failure(response, doing, signal);
    const length = Number(header(response, 'content-length') ?? '0');
    if (length > maxBytes) {
      drop(response);
      throw new DedupError('REGISTRY_PROTOCOL', `${doing}: it has ${length} bytes; at most ${maxBytes} are read`);
    }
    const bytes = await this.#exchange.bytes(response, maxBytes, doing, signal);
    if (bytes.length < length)
      throw new DedupError('REGISTRY_HTTP', `${doing}: the body ended after ${bytes.length} bytes`);
    return verifiedBlob(digest, bytes, this.name);
  }

  async putBlob(digest: Digest, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    const doing = `pushing blob ${digest} to ${this.name}`;
    if (digestOf(bytes) !== digest) throw new DedupError('DIGEST_MISMATCH', `${doing}: the bytes have another digest`);
    if (await this.hasBlob(digest, signal)) return;
    const started = await this.#send('POST', 'blobs/uploads/', 'push', signal, { 'content-length': '0' });
    const location = header(started, 'location');
    if (started.status !== 202 || location === undefined) throw await this.#exchange.failure(started, doing, signal);
    await discard(started);
    const upload = URL.parse(location, started.url.href);
    if (upload === null) throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the upload has no usable Location`);
    // Appended as text: the state in the URL is the registry's and must come back exactly as it was sent.
    upload.search += `${upload.search === '' ? '?' : '&'}digest=${encodeURIComponent(digest)}`;
    const sameServer = upload.origin === started.url.origin;
    const response = await this.#exchange.send({
      method: 'PUT',
      url: upload,
      headers: { 'content-type': 'application/octet-stream' },
      body: bytes,
      lane: 'data',
      ...(sameServer ? { scope: this.#scope('push') } : {}),
      signal,
    });
    if (response.status !== 201 && response.status !== 204) throw await this.#exchange.failure(response, doing, signal);
    await discard(response);
  }

  async putManifest(
    tagOrDigest: string,
    mediaType: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<{ subjectKnown: boolean }> {
    const doing = `pushing manifest ${tagOrDigest} to ${this.name}`;
    const digest = digestOf(bytes);
    if (isDigest(tagOrDigest) && tagOrDigest !== digest) {
      throw new DedupError('DIGEST_MISMATCH', `${doing}: the bytes have the digest ${digest}`);
    }
    const headers = { 'content-type': mediaType };
    const response = await this.#send('PUT', `manifests/${tagOrDigest}`, 'push', signal, headers, bytes);
    if (response.status !== 201 && response.status !== 200) throw await this.#exchange.failure(response, doing, signal);
    await discard(response);
    const said = header(response, 'docker-content-digest');
    if (said !== undefined && isDigest(said) && said !== digest) {
      throw new DedupError('DIGEST_MISMATCH', `${doing}: the registry stored it as ${said} instead of ${digest}`);
    }
    return { subjectKnown: header(response, 'oci-subject') !== undefined };
  }

  async referrers(subject: Digest, artifactType: string, signal: AbortSignal): Promise<ReferrerDescriptor[]> {
    const doing = `listing referrers of ${subject} in ${this.name}`;
    const found: ReferrerDescriptor[] = [];
    const query = `?artifactType=${encodeURIComponent(artifactType)}`;
    let url: URL | undefined = await this.#url(`referrers/${subject}${query}`, signal);
    for (let page = 0; url !== undefined && page < MAX_REFERRER_PAGES; page++) {
      const request = { method: 'GET', url, lane: 'control', scope: this.#scope('pull'), signal } as const;
      const response: HttpResponse = await this.#exchange.send(request);
      if (response.status === 404 && page === 0) {
        await discard(response);
        return await this.#referrersByTag(subject, artifactType, signal);
      }
      if (response.status !== 200) throw await this.#exchange.failure(response, doing, signal);
      const bytes = await this.#exchange.bytes(response, MAX_MANIFEST_BYTES, doing, signal);
      found.push(...referrersIn(bytes, artifactType, doing));
      url = nextPage(response);
    }
    return found;
  }

  /** The tag `sha256-<hex>`, which stands in for the API on registries without it (OCI distribution spec 1.1). */
  async #referrersByTag(subject: Digest, artifactType: string, signal: AbortSignal): Promise<ReferrerDescriptor[]> {
    try {
      const index = await this.getManifest(referrerTag(subject), signal);
      return referrersIn(index.bytes, artifactType, `listing referrers of ${subject} in ${this.name} by tag`);
    } catch (error) {
      if (error instanceof DedupError && error.code === 'REGISTRY_NOT_FOUND') return [];
      throw error;
    }
  }

  #scope(action: 'pull' | 'push'): Scope {
    return { repository: this.path, action };
  }

  async #url(below: string, signal: AbortSignal): Promise<URL> {
    const server = serverOf(this.host);
    const base = this.#endpoint ?? `${await this.#transport.schemeOf(server, signal)}://${server}`;
    const url = new URL(`${base.replace(/\/+$/, '')}/v2/${this.path}/${below}`);
    if (this.#mirrorOf !== undefined) url.searchParams.set('ns', this.#mirrorOf);
    return url;
  }

  async #send(
    method: ExchangeRequest['method'],
    below: string,
    action: 'pull' | 'push',
    signal: AbortSignal,
    headers: Readonly<Record<string, string>> = {},
    body?: Uint8Array,
  ): Promise<HttpResponse> {
    const url = await this.#url(below, signal);
    const scope = this.#scope(action);
    const withBody = body === undefined ? {} : { body };
    return await this.#exchange.send({ method, url, headers, ...withBody, lane: 'control', scope, signal });
  }
}

/** The Content-Range unit and positions for `range` (RFC 9110 §14.4), from the one place that knows inclusive ends. */
function contentRangeOf(range: ByteRange): string {
  return httpRange(range).replace('=', ' ');
}

/** The `rel="next"` link of a paged answer, on the same server only. */
function nextPage(response: HttpResponse): URL | undefined {
  const match = /<([^>]+)>\s*;[^,]*\brel="?next"?/i.exec(header(response, 'link') ?? '');
  const url = match?.[1] === undefined ? null : URL.parse(match[1], response.url.href);
  return url !== null && url.origin === response.url.origin ? url : undefined;
}
