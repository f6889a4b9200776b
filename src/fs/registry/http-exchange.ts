// One request to one registry, done properly: authorization, redirects, and failures turned into our errors. Used by
// http-blob.ts and auth.ts for everything they send; knows nothing of what the bodies mean.
import { DedupError, type ErrorCode } from '../../errors.ts';
import type { Authorizer, Scope } from './auth.ts';
import {
  abortError,
  type HttpRequest,
  type HttpResponse,
  type HttpTransport,
  type Lane,
  transportError,
} from './http-transport.ts';
import { redact, redactUrl } from './secrets.ts';

const MAX_REDIRECTS = 5;
const FAILURE_BODY_BYTES = 64 * 1024;
/** A failure's body is read for its text only; some registries announce a length they never send. */
const FAILURE_BODY_MS = 2_000;

/** Requests sent and body bytes received, counted where they happen. */
export class Traffic {
  requests = 0;
  bytes = 0;
}

export interface ExchangeRequest {
  readonly method: HttpRequest['method'];
  readonly url: URL;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: Uint8Array;
  readonly lane: Lane;
  /** What the token must allow; absent where the server is not the registry itself. */
  readonly scope?: Scope;
  readonly signal: AbortSignal;
}

export class HttpExchange {
  readonly traffic = new Traffic();
  readonly #transport: HttpTransport;
  readonly #authorizer: Authorizer | undefined;

  constructor(transport: HttpTransport, authorizer?: Authorizer) {
    this.#transport = transport;
    this.#authorizer = authorizer;
  }

  /**
   * Sends `request`, with authorization where a scope is given and following redirects of GET and HEAD. Returns whatever
   * status the last server gave; a 401, or a 403 for a token from the cache, is tried again once with a new token.
   * Errors: REGISTRY_HTTP, REGISTRY_AUTH, REGISTRY_PROTOCOL, DEADLINE, CANCELLED.
   */
  async send(request: ExchangeRequest): Promise<HttpResponse> {
    const { scope, url, signal } = request;
    const authorizer = scope === undefined ? undefined : this.#authorizer;
    if (authorizer === undefined || scope === undefined) return await this.#follow(request, undefined);
    const used = await authorizer.current(url.origin, scope, signal);
    const response = await this.#follow(request, used);
    const ours = response.url.origin === url.origin;
    const stale = response.status === 401 || (response.status === 403 && used !== undefined);
    if (!ours || !stale || !authorizer.canRenew(response, used)) return response;
    await discard(response);
    const renewed = await authorizer.renew(url.origin, scope, response, used, signal);
    return await this.#follow(request, renewed);
  }

  async #follow(request: ExchangeRequest, authorization: string | undefined): Promise<HttpResponse> {
    let url = request.url;
    for (let hop = 0; hop <= MAX_REDIRECTS; hop++) {
      const own = url.origin === request.url.origin;
      this.traffic.requests++;
      const response = await this.#transport.send({
        method: request.method,
        url,
        headers: { ...request.headers, ...(own && authorization !== undefined ? { authorization } : {}) },
        ...(request.body === undefined ? {} : { body: request.body }),
        lane: request.lane,
        signal: request.signal,
      });
      const target = redirectTarget(request, response);
      if (target === undefined) return response;
      await discard(response);
      url = target;
    }
    throw new DedupError(
      'REGISTRY_PROTOCOL',
      `${request.method} ${redactUrl(request.url)}: more than ${MAX_REDIRECTS} redirects`,
    );
  }

  /** The error for a response that is not what was hoped for; reads some of its body for the message. */
  async failure(response: HttpResponse, doing: string, signal: AbortSignal): Promise<DedupError> {
    const text = await readSome(response, this.traffic);
    if (signal.aborted) return abortError(signal, doing);
    const secrets = [...(this.#authorizer?.secrets() ?? [])];
    // Shortened after the removal: half a secret is not recognised any more.
    const said = redact(registryMessage(text), secrets).slice(0, 400);
    const message = `${doing}: ${redactUrl(response.url)} answered ${response.status}${said === '' ? '' : `: ${said}`}`;
    const { code, permanent } = meaningOf(response.status);
    const retryAfterMs = retryAfter(header(response, 'retry-after'));
    return new DedupError(code, message, {
      details: {
        status: response.status,
        ...(permanent ? { permanent } : {}),
        ...(retryAfterMs === undefined ? {} : { retryAfterMs }),
      },
      ...(code === 'REGISTRY_AUTH'
        ? { hint: 'check the credentials for this registry and that they may access this repository' }
        : {}),
    });
  }

  /** The chunks of a body; failures are mapped, bytes counted. Leaving early closes the connection. */
  async *body(response: HttpResponse, doing: string, signal: AbortSignal): AsyncGenerator<Buffer, void, undefined> {
    try {
      for await (const chunk of response.body as AsyncIterable<Buffer>) {
        this.traffic.bytes += chunk.length;
        yield chunk;
      }
    } catch (error) {
      throw transportError(error, doing, signal);
    } finally {
      drop(response);
    }
  }

  /** The chunks of a body of exactly `length` bytes. Errors: those of body; REGISTRY_PROTOCOL for more, REGISTRY_HTTP for fewer. */
  async *bodyOf(
    length: number,
    response: HttpResponse,
    doing: string,
    signal: AbortSignal,
  ): AsyncGenerator<Buffer, void, undefined> {
    let received = 0;
    for await (const chunk of this.body(response, doing, signal)) {
      received += chunk.length;
      if (received > length) throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the body is longer than that`);
      yield chunk;
    }
    if (received < length) {
      throw new DedupError('REGISTRY_HTTP', `${doing}: the body ended after ${received} bytes`);
    }
  }

  /** A whole body of at most `maxBytes`. Errors: REGISTRY_PROTOCOL when it is longer. */
  async bytes(response: HttpResponse, maxBytes: number, doing: string, signal: AbortSignal): Promise<Buffer> {
    const chunks: Buffer[] = [];
    let length = 0;
    for await (const chunk of this.body(response, doing, signal)) {
      length += chunk.length;
      if (length > maxBytes) {
        throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the answer is longer than ${maxBytes} bytes`);
      }
      chunks.push(chunk);
    }
    return Buffer.concat(chunks, length);
  }
}

/** Where a redirect leads, or undefined when `response` is not one that is followed. */
function redirectTarget(request: ExchangeRequest, response: HttpResponse): URL | undefined {
  if (![301, 302, 303, 307, 308].includes(response.status)) return undefined;
  if (request.method !== 'GET' && request.method !== 'HEAD') return undefined;
  const location = header(response, 'location');
  const doing = `${request.method} ${redactUrl(response.url)}`;
  const target = location === undefined ? null : URL.parse(location, response.url.href);
  if (target === null || !/^https?:$/.test(target.protocol)) {
    drop(response);
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: a redirect without a usable Location`);
  }
  if (response.url.protocol === 'https:' && target.protocol === 'http:') {
    drop(response);
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: refused a redirect from https to ${redactUrl(target)}`);
  }
  // Credentials in a URL would be sent by some clients and end up in messages; no registry needs them.
  target.username = '';
  target.password = '';
  target.hash = '';
  return target;
}

function meaningOf(status: number): { code: ErrorCode; permanent: boolean } {
  if (status === 401 || status === 403) return { code: 'REGISTRY_AUTH', permanent: true };
  if (status === 404 || status === 410) return { code: 'REGISTRY_NOT_FOUND', permanent: true };
  if (status === 408 || status === 425 || status === 429 || status >= 500) {
    return { code: 'REGISTRY_HTTP', permanent: false };
  }
  return { code: 'REGISTRY_PROTOCOL', permanent: true };
}

/** Milliseconds from a Retry-After header: seconds or a date (RFC 9110 §10.2.3). */
function retryAfter(value: string | undefined): number | undefined {
  if (value === undefined) return undefined;
  if (/^\d{1,9}$/.test(value.trim())) return Number(value) * 1000;
  const at = Date.parse(value);
  return Number.isNaN(at) ? undefined : Math.max(0, at - Date.now());
}

export function header(response: HttpResponse, name: string): string | undefined {
  const value = response.headers[name];
  return Array.isArray(value) ? value[0] : value;
}

/** Closes the connection of a response nobody wants to read. */
export function drop(response: HttpResponse): void {
  response.body.on('error', () => undefined); // destroying an unread body reports an abort that is meant
  response.body.destroy();
}

/** Throws a short body away so that its connection can be used again; drops it when it is long or slow. */
export async function discard(response: HttpResponse): Promise<void> {
  const length = Number(header(response, 'content-length') ?? Number.NaN);
  if (!(length <= FAILURE_BODY_BYTES)) {
    drop(response);
    return;
  }
  await readSome(response, undefined);
}

/** Up to 64 KiB of a body as text, waiting no longer than two seconds; what cannot be read is left out. */
async function readSome(response: HttpResponse, traffic: Traffic | undefined): Promise<string> {
  const chunks: Buffer[] = [];
  let length = 0;
  const timer = setTimeout(() => drop(response), FAILURE_BODY_MS);
  try {
    for await (const chunk of response.body as AsyncIterable<Buffer>) {
      if (traffic !== undefined) traffic.bytes += chunk.length;
      chunks.push(chunk);
      length += chunk.length;
      if (length >= FAILURE_BODY_BYTES) break;
    }
  } catch {
    // The status is the error that is reported; its text is a bonus.
  } finally {
    clearTimeout(timer);
    drop(response);
  }
  return Buffer.concat(chunks).subarray(0, FAILURE_BODY_BYTES).toString('utf8');
}

/** The `errors` of a registry's JSON answer in one line, or any other text without markup. */
function registryMessage(text: string): string {
  try {
    const parsed = JSON.parse(text) as { errors?: { code?: unknown; message?: unknown }[]; details?: unknown };
    if (Array.isArray(parsed.errors)) {
      const lines = parsed.errors
        .slice(0, 5)
        .map((one) => `${String(one.code ?? '')}${one.message ? ` (${String(one.message)})` : ''}`);
      return lines.join(', ');
    }
  } catch {
    // Not JSON: proxies and object stores answer HTML, XML or plain text.
  }
  return text
    .replace(/<[^>]*>/g, ' ')
    .replace(/[\s\p{Cc}]+/gu, ' ')
    .trim();
}
