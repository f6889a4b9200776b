// A reverse proxy on loopback in front of one registry, which counts what passes: every snapshotter of a node is measured
// by the same meter, without anything from the registry or the snapshotter. Adds no latency but its own copy.
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pipeline } from 'node:stream/promises';
import { Agent, type Dispatcher, request } from 'undici';
import type { Meter, MeteredRequest } from './meter.ts';
import { epochMs } from './meter.ts';

export interface CountingProxyOptions {
  /** Origin of the registry: "https://registry.example.com". */
  readonly upstream: string;
  /** Additional certificate authorities, PEM. */
  readonly ca?: readonly string[];
  /** Accepts any certificate. */
  readonly insecure?: boolean;
}

const MAX_REDIRECTS = 5;
/** Hop-by-hop (RFC 9110 §7.6.1), and what the client of this hop sets itself. */
const NOT_FORWARDED = new Set([
  ...['connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'proxy-connection', 'te', 'trailer'],
  ...['transfer-encoding', 'upgrade', 'host', 'expect'],
]);

export class CountingProxy implements Meter {
  readonly #server: Server;
  readonly #agent: Agent;
  readonly #upstream: string;
  readonly #answered: MeteredRequest[] = [];
  #bytes = 0;
  /** Requests being answered, by when they began. */
  readonly #open = new Set<{ readonly startedAt: number; readonly ended: Promise<void> }>();

  private constructor(server: Server, agent: Agent, upstream: string) {
    this.#server = server;
    this.#agent = agent;
    this.#upstream = upstream;
  }

  static async start(options: CountingProxyOptions): Promise<CountingProxy> {
    const agent = new Agent({
      connect: {
        ...(options.ca === undefined || options.ca.length === 0 ? {} : { ca: [...options.ca] }),
        rejectUnauthorized: options.insecure !== true,
      },
      // Downloads are as long as they are; the commands that wait for them have a deadline.
      bodyTimeout: 0,
      headersTimeout: 60_000,
    });
    const server = createServer();
    const proxy = new CountingProxy(server, agent, options.upstream);
    server.on('request', (incoming, outgoing) => proxy.#meter(incoming, outgoing));
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(0, '127.0.0.1', resolve);
    });
    return proxy;
  }

  /** "127.0.0.1:PORT", as the host of image references. */
  get host(): string {
    return `127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Bytes of bodies passed on so far. */
  get bytes(): number {
    return this.#bytes;
  }

  async requests(fromAt: number, toAt: number): Promise<readonly MeteredRequest[]> {
    const within = (startedAt: number): boolean => startedAt >= fromAt && startedAt <= toAt;
    await Promise.all([...this.#open].filter(({ startedAt }) => within(startedAt)).map(({ ended }) => ended));
    return this.#answered.filter(({ startedAt }) => within(startedAt)).sort((a, b) => a.startedAt - b.startedAt);
  }

  async close(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve));
    this.#server.closeAllConnections();
    await Promise.all([closed, this.#agent.destroy()]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #meter(incoming: IncomingMessage, outgoing: ServerResponse): void {
    const startedAt = epochMs(performance.now());
    const count = { bytes: 0 };
    const ended = this.#forward(incoming, outgoing, count)
      .catch((error: unknown) => {
        // The client sees a broken answer, as it would without us.
        if (outgoing.headersSent) outgoing.destroy();
        else outgoing.writeHead(502, { 'content-type': 'text/plain' }).end(String(error));
      })
      .then(() => {
        this.#open.delete(entry);
        const path = incoming.url ?? '/';
        this.#answered.push({ startedAt, endedAt: epochMs(performance.now()), bytes: count.bytes, path });
      });
    const entry = { startedAt, ended };
    this.#open.add(entry);
  }

  async #forward(incoming: IncomingMessage, outgoing: ServerResponse, count: { bytes: number }): Promise<void> {
    const abort = new AbortController();
    outgoing.once('close', () => abort.abort());
    const answer = await this.#ask(incoming, abort.signal);
    outgoing.writeHead(answer.statusCode, this.#answerHeaders(answer.headers));
    await pipeline(
      answer.body,
      async function* (this: CountingProxy, source: AsyncIterable<Buffer>) {
        for await (const part of source) {
          count.bytes += part.length;
          this.#bytes += part.length;
          yield part;
        }
      }.bind(this),
      outgoing,
    );
  }

  /** Follows redirects itself: bytes from a registry's object storage are counted too. */
  async #ask(incoming: IncomingMessage, signal: AbortSignal): Promise<Dispatcher.ResponseData> {
    let url = new URL(incoming.url ?? '/', this.#upstream);
    const method = (incoming.method ?? 'GET') as Dispatcher.HttpMethod;
    const headers: Record<string, string | string[]> = {};
    for (const [name, value] of Object.entries(incoming.headers)) {
      if (value !== undefined && !NOT_FORWARDED.has(name)) headers[name] = value;
    }
    const body = method === 'GET' || method === 'HEAD' ? null : incoming;
    for (let redirects = 0; ; redirects++) {
      const answer = await request(url, { method, headers, body, signal, dispatcher: this.#agent });
      const location = answer.headers.location;
      const redirected = [301, 302, 303, 307, 308].includes(answer.statusCode) && typeof location === 'string';
      if (!redirected || body !== null || redirects === MAX_REDIRECTS) return answer;
      await answer.body.dump();
      const next = new URL(location, url);
      // Credentials are for the registry alone.
      if (next.origin !== url.origin) delete headers.authorization;
      url = next;
    }
  }

  #answerHeaders(headers: Dispatcher.ResponseData['headers']): Record<string, string | string[]> {
    const kept: Record<string, string | string[]> = {};
    for (const [name, value] of Object.entries(headers)) {
      if (value !== undefined && !NOT_FORWARDED.has(name)) kept[name] = value;
    }
    // Uploads and paging name the registry absolutely; here they must come back through us.
    if (typeof kept.location === 'string') kept.location = kept.location.replace(this.#upstream, `http://${this.host}`);
    return kept;
  }
}
