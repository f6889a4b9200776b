// HTTP connections to registries: one bounded pool per origin and lane, TLS trust, proxies, time-outs, and the mapping
// of connection failures to our errors. Used by http-exchange.ts and auth.ts; knows nothing of authorization or blobs.
import { X509Certificate } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import { createSecureContext, getCACertificates, type SecureContext, connect as tlsConnect } from 'node:tls';
import { buildConnector, type Dispatcher, Pool, ProxyAgent } from 'undici';
import { DedupError } from '../../errors.ts';
import { proxyFor } from './proxy-environment.ts';
import { isLoopback } from './reference.ts';
import { redactUrl } from './secrets.ts';
import { SpareConnections } from './spare-connections.ts';

/** Blobs travel on connections of their own, so that a token or a manifest never waits behind them. */
export type Lane = 'data' | 'control';

export interface TransportOptions {
  /** "host" or "host:port": plain HTTP and unverifiable certificates are accepted there. */
  readonly insecureHosts?: readonly string[];
  /** PEM files of private authorities, trusted beside the system's. */
  readonly caFiles?: readonly string[];
  /** Default "dedup-snapshotter". */
  readonly userAgent?: string;
  /** Environment that names proxies; default process.env. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Also send requests for loopback hosts through the proxy. Default false. */
  readonly proxyLoopback?: boolean;
  /** Default 10,000. */
  readonly connectTimeoutMs?: number;
  /** Longest wait for the head of a response. Default 15,000. */
  readonly headersTimeoutMs?: number;
  /** Longest silence inside a body. Default 30,000. */
  readonly bodyTimeoutMs?: number;
  /** Connections per origin for blobs (default 4) and for everything else (default 2). */
  readonly dataConnections?: number;
  readonly controlConnections?: number;
}

export interface HttpRequest {
  readonly method: 'GET' | 'HEAD' | 'POST' | 'PUT';
  readonly url: URL;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: Uint8Array | string;
  readonly lane: Lane;
  readonly signal: AbortSignal;
}

export interface HttpResponse {
  readonly status: number;
  readonly url: URL;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  /** Must be read to its end or destroyed. */
  readonly body: Dispatcher.ResponseData['body'];
}

/** Idle connections are kept this long; below the idle limit of common load balancers. */
const KEEP_ALIVE_MS = 20_000;

/** Opened ahead of reads: a configuration and the indexes of most images are no more. */
const SPARE_CONNECTIONS = 4;

export class HttpTransport {
  readonly #options: TransportOptions;
  readonly #insecure: ReadonlySet<string>;
  readonly #dispatchers = new Map<string, Dispatcher>();
  readonly #spares = new Map<Dispatcher, SpareConnections>();
  #secureContext: Promise<SecureContext> | undefined;
  readonly #schemes = new Map<string, Promise<Probe>>();
  #closed: boolean = false;

  constructor(options: TransportOptions = {}) {
    this.#options = options;
    this.#insecure = new Set((options.insecureHosts ?? []).map((host) => host.toLowerCase()));
  }

  /** True when plain HTTP and unverifiable certificates are configured for `host` ("name" or "name:port"). */
  isInsecure(host: string): boolean {
    const name = host.toLowerCase();
    return this.#insecure.has(name) || this.#insecure.has(name.replace(/:\d+$/, ''));
  }

  /** The same for the server of a URL, whose default port is as good as none. */
  #isInsecureServer(url: URL): boolean {
    const port = url.port || (url.protocol === 'https:' ? '443' : '80');
    return this.isInsecure(`${url.hostname}:${port}`);
  }

  /** Sends one request and returns when the head of the response is here. Does not follow redirects. */
  async send(request: HttpRequest): Promise<HttpResponse> {
    if (this.#closed) throw new DedupError('CLOSED', 'the registry transport is closed');
    throwIfAborted(request.signal, describe(request));
    this.#checkPlain(request.url);
    const dispatcher = await this.#dispatcher(request.url, request.lane);
    try {
      const response = await dispatcher.request({
        origin: request.url.origin,
        path: request.url.pathname + request.url.search,
        method: request.method,
        headers: { 'user-agent': this.#options.userAgent ?? 'dedup-snapshotter', ...request.headers },
        body: request.body ?? null,
        signal: request.signal,
        headersTimeout: this.#options.headersTimeoutMs ?? 15_000,
        bodyTimeout: this.#options.bodyTimeoutMs ?? 30_000,
      });
      return { status: response.statusCode, url: request.url, headers: response.headers, body: response.body };
    } catch (error) {
      throw transportError(error, describe(request), request.signal);
    }
  }

  /**
   * Opens some connections of a lane that has none, without waiting for them: what is asked for in a moment finds them
   * there. Does nothing behind a proxy. Failures are left to the requests that follow.
   */
  async expect(url: URL, lane: Lane): Promise<void> {
    const dispatcher = await this.#dispatcher(url, lane);
    if (dispatcher instanceof Pool && dispatcher.stats.connected === 0) this.#spares.get(dispatcher)?.open(url);
  }

  /**
   * "https" or "http" for a server whose scheme nobody stated. Only loopback and insecure hosts may be plain; there a TLS
   * handshake is tried, and what answers it is https. Errors: REGISTRY_HTTP, DEADLINE, CANCELLED.
   */
  async schemeOf(host: string, signal: AbortSignal): Promise<'http' | 'https'> {
    if (!isLoopback(host) && !this.isInsecure(host)) return 'https';
    if (/:443$/.test(host)) return 'https';
    if (/:80$/.test(host)) return 'http';
    const url = new URL(`https://${host}`);
    // A proxy hides whether the server speaks TLS; the administrator's word "insecure" then means plain HTTP.
    if (this.#proxy(url) !== undefined) return 'http';
    let probe = this.#schemes.get(host);
    if (probe === undefined) {
      const timeoutMs = this.#options.connectTimeoutMs ?? 10_000;
      probe = probeTls(url, timeoutMs);
      this.#schemes.set(host, probe);
      const forget = () => this.#schemes.delete(host);
      // Only a clear answer is remembered; whoever waits gets a failure from the promise itself.
      probe.then(({ certain }) => certain || forget(), forget);
    }
    return (await withSignal(probe, signal, `connecting to ${host}`)).scheme;
  }

  /** Ends all connections; requests in flight fail. */
  async close(): Promise<void> {
    this.#closed = true;
    const dispatchers = [...this.#dispatchers.values()];
    this.#dispatchers.clear();
    for (const spares of this.#spares.values()) spares.close();
    this.#spares.clear();
    await Promise.all(dispatchers.map((dispatcher) => dispatcher.destroy()));
  }

  #checkPlain(url: URL): void {
    if (url.protocol === 'https:') return;
    if (url.protocol === 'http:' && (isLoopback(url.host) || this.#isInsecureServer(url))) return;
    throw new DedupError('REGISTRY_PROTOCOL', `refused to send a request over plain HTTP to ${redactUrl(url)}`, {
      hint: `if ${url.host} is meant to be plain HTTP, configure it as insecure`,
    });
  }

  #proxy(url: URL): string | undefined {
    if (isLoopback(url.host) && this.#options.proxyLoopback !== true) return undefined;
    return proxyFor(url, this.#options.env ?? process.env);
  }

  async #dispatcher(url: URL, lane: Lane): Promise<Dispatcher> {
    const key = `${lane} ${url.origin}`;
    const known = this.#dispatchers.get(key);
    if (known !== undefined) return known;
    const tls = {
      secureContext: await this.#trust(),
      rejectUnauthorized: !this.#isInsecureServer(url),
      timeout: this.#options.connectTimeoutMs ?? 10_000,
    };
    const connections =
      lane === 'data' ? (this.#options.dataConnections ?? 4) : (this.#options.controlConnections ?? 2);
    // HTTP/2 would be one socket with a small window: slow on any link with a round trip worth mentioning.
    const common = { allowH2: false, connections, pipelining: 1, keepAliveTimeout: KEEP_ALIVE_MS };
    const raced = this.#dispatchers.get(key);
    if (raced !== undefined) return raced;
    if (this.#closed) throw new DedupError('CLOSED', 'the registry transport is closed');
    const proxy = this.#proxy(url);
    if (proxy !== undefined) {
      const proxyTls = { secureContext: tls.secureContext };
      const agent = new ProxyAgent({ ...common, uri: proxy, requestTls: tls, proxyTls });
      this.#dispatchers.set(key, agent);
      return agent;
    }
    const spares = new SpareConnections(
      buildConnector({ ...tls, allowH2: false }),
      Math.min(connections, SPARE_CONNECTIONS),
    );
    const pool = new Pool(url.origin, { ...common, connect: spares.connect });
    this.#dispatchers.set(key, pool);
    this.#spares.set(pool, spares);
    return pool;
  }

  /** Bundled, system and configured authorities, parsed once for all connections. */
  #trust(): Promise<SecureContext> {
    this.#secureContext ??= (async () => {
      const files = await Promise.all(
        (this.#options.caFiles ?? []).map(async (file) => {
          try {
            const text = await readFile(file, 'utf8');
            // createSecureContext passes over what it cannot parse; the check says which file is meant.
            new X509Certificate(text);
            return text;
          } catch (cause) {
            throw new DedupError('INVALID_CONFIG', `cannot use the certificate authority file ${file}`, { cause });
          }
        }),
      );
      const system = new Set([...getCACertificates('default'), ...getCACertificates('system')]);
      return createSecureContext({ ca: [...system, ...files], minVersion: 'TLSv1.2' });
    })();
    return this.#secureContext;
  }
}

function describe(request: HttpRequest): string {
  return `${request.method} ${redactUrl(request.url)}`;
}

interface Probe {
  readonly scheme: 'http' | 'https';
  readonly certain: boolean;
}

/** Does `url`'s server answer a TLS handshake? Its certificate is not judged here. */
function probeTls(url: URL, timeoutMs: number): Promise<Probe> {
  return new Promise((resolve, reject) => {
    const host = url.hostname.replace(/^\[(.*)\]$/, '$1');
    const socket = tlsConnect({
      host,
      port: Number(url.port || 443),
      rejectUnauthorized: false,
      ...(isIP(host) === 0 ? { servername: host } : {}),
    });
    const what = `connecting to ${url.host}`;
    const settle = (action: () => void) => {
      socket.removeAllListeners();
      socket.on('error', () => undefined); // the socket is being destroyed; a late error has no reader
      socket.destroy();
      action();
    };
    socket.setTimeout(timeoutMs, () =>
      settle(() => reject(new DedupError('DEADLINE', `${what}: no answer within ${timeoutMs} ms`))),
    );
    socket.once('secureConnect', () => settle(() => resolve({ scheme: 'https', certain: true })));
    socket.once('error', (error: NodeJS.ErrnoException) => {
      const unreachable = ['ECONNREFUSED', 'ETIMEDOUT', 'EHOSTUNREACH', 'ENETUNREACH', 'ENOTFOUND', 'EAI_AGAIN'];
      const code = codeOf(error);
      // Without a port the two schemes have servers of their own.
      if (code === 'ECONNREFUSED' && url.port === '') settle(() => resolve({ scheme: 'http', certain: false }));
      else if (unreachable.includes(code)) settle(() => reject(transportError(error, what)));
      // A server that is just starting or ending resets, whatever it speaks.
      else settle(() => resolve({ scheme: 'http', certain: code !== 'ECONNRESET' }));
    });
  });
}

/** Waits for `promise`, which others may share, no longer than `signal` allows. */
export function withSignal<T>(promise: Promise<T>, signal: AbortSignal, doing: string): Promise<T> {
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(abortError(signal, doing));
    if (signal.aborted) {
      promise.catch(() => undefined); // its other waiters see the failure; this one has already left
      onAbort();
      return;
    }
    signal.addEventListener('abort', onAbort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort));
  });
}

/** The error for an aborted signal: DEADLINE for a time-out, the reason itself if it is ours, else CANCELLED. */
export function abortError(signal: AbortSignal, doing: string): DedupError {
  const reason: unknown = signal.reason;
  if (reason instanceof DedupError) return reason;
  const timedOut = reason instanceof Error && reason.name === 'TimeoutError';
  return new DedupError(timedOut ? 'DEADLINE' : 'CANCELLED', `${doing}: ${timedOut ? 'out of time' : 'cancelled'}`, {
    details: { byCaller: true },
  });
}

export function throwIfAborted(signal: AbortSignal, doing: string): void {
  if (signal.aborted) throw abortError(signal, doing);
}

const TIMEOUTS: Readonly<Record<string, string>> = {
  UND_ERR_CONNECT_TIMEOUT: 'no connection in time',
  UND_ERR_HEADERS_TIMEOUT: 'no response in time',
  UND_ERR_BODY_TIMEOUT: 'the body stalled',
  ETIMEDOUT: 'no connection in time',
};

/** Failures of a handshake that trying again does not mend. */
const CERTIFICATE =
  /^(CERT_|UNABLE_TO_|SELF_SIGNED|DEPTH_ZERO|ERR_TLS_CERT|ERR_SSL_|INVALID_CA|HOSTNAME_MISMATCH|EPROTO)/;

/** Maps what undici and sockets throw: DEADLINE for time-outs, CANCELLED for our signal, else REGISTRY_HTTP. */
export function transportError(error: unknown, doing: string, signal?: AbortSignal): DedupError {
  if (signal?.aborted === true) return abortError(signal, doing);
  if (error instanceof DedupError) return error;
  const code = codeOf(error);
  const timeout = TIMEOUTS[code];
  if (timeout !== undefined) return new DedupError('DEADLINE', `${doing}: ${timeout}`, { cause: error });
  const message = error instanceof Error ? error.message : String(error);
  if (CERTIFICATE.test(code)) {
    return new DedupError('REGISTRY_HTTP', `${doing}: TLS failed: ${message.split(';')[0]}`, {
      cause: error,
      hint: 'trust the authority of that certificate, or configure the host as insecure',
      details: { permanent: true },
    });
  }
  return new DedupError('REGISTRY_HTTP', `${doing}: ${message}`, { cause: error });
}

function codeOf(error: unknown): string {
  if (error instanceof AggregateError) return codeOf(error.errors[0]);
  const own = (error as { code?: unknown }).code;
  if (typeof own === 'string' && own !== 'UND_ERR_SOCKET') return own;
  const cause = (error as { cause?: unknown }).cause;
  return cause === undefined || cause === null ? '' : codeOf(cause);
}
