// An HTTP server in front of a real registry that misbehaves where a rule says so, and counts what passes. Used by tests
// and benchmarks; it forwards everything else untouched.

import { randomUUID } from 'node:crypto';
import {
  createServer,
  request as httpRequest,
  type IncomingMessage,
  type RequestListener,
  type Server,
  type ServerResponse,
} from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import type { AddressInfo, Socket } from 'node:net';

export type Fault =
  | {
      readonly kind: 'status';
      readonly status: number;
      readonly body?: string;
      readonly headers?: Readonly<Record<string, string>>;
    }
  /** The connection is reset, before any answer or after some bytes of the body. */
  | { readonly kind: 'reset'; readonly afterBytes?: number }
  /** Nothing is sent for `ms` (default: for ever), before any answer or after some bytes of the body. */
  | { readonly kind: 'stall'; readonly ms?: number; readonly afterBytes?: number }
  /** Nothing is sent before `until` is settled. */
  | { readonly kind: 'hold'; readonly until: Promise<unknown> }
  /** The body ends after `bytes`; the head promises all of it, or nothing when `chunked`. */
  | { readonly kind: 'short'; readonly bytes: number; readonly chunked?: boolean }
  /** `bytes` more than asked for follow, in a chunked body. */
  | { readonly kind: 'long'; readonly bytes: number }
  /** The byte at `at` of the body is inverted. */
  | { readonly kind: 'wrongBytes'; readonly at: number }
  | { readonly kind: 'ignoreRange' }
  /** The answer's head gets these headers. */
  | { readonly kind: 'headers'; readonly headers: Readonly<Record<string, string>> }
  /** 307 to a signed URL on the proxy's second port, refused with 403 when older than `lifetimeMs`; or to `to`. */
  | { readonly kind: 'redirect'; readonly lifetimeMs?: number; readonly to?: string; readonly status?: number }
  | { readonly kind: 'delay'; readonly ms: number };

export interface FaultRule {
  readonly method?: string;
  /** Tested against path and query. */
  readonly path?: RegExp;
  /** First matching request that is affected, from 1. Default 1. */
  readonly from?: number;
  /** How many are affected. Default: all. */
  readonly times?: number;
  readonly fault: Fault;
}

export interface SeenRequest {
  readonly method: string;
  /** With query. */
  readonly path: string;
  readonly range: string | undefined;
  readonly authorization: string | undefined;
  /** True when it came in on the second port, where redirects lead. */
  readonly store: boolean;
  /** Status answered; 0 while there is none, or when the connection was reset. */
  status: number;
  /** Body bytes sent. */
  bytes: number;
}

interface Signed {
  readonly path: string;
  readonly authorization: string | undefined;
  readonly expiresAt: number;
}

export class FaultProxy {
  /** Everything that came in, in order. */
  readonly seen: SeenRequest[] = [];
  readonly #upstream: URL;
  readonly #front: Server;
  readonly #store: Server;
  readonly #sockets = new Set<Socket>();
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #signed = new Map<string, Signed>();
  readonly #tls: boolean;
  #rules: { readonly rule: FaultRule; matched: number }[] = [];
  #active = 0;
  /** Most requests that were being answered at one time. */
  maxActive = 0;

  private constructor(upstream: string, tls: { cert: string; key: string } | undefined) {
    this.#upstream = new URL(upstream);
    this.#tls = tls !== undefined;
    const listener =
      (store: boolean): RequestListener =>
      (request, response) => {
        this.#handle(request, response, store).catch((error: unknown) => {
          response.destroy(error instanceof Error ? error : undefined);
        });
      };
    this.#front = tls === undefined ? createServer(listener(false)) : createTlsServer(tls, listener(false));
    this.#store = createServer(listener(true));
    for (const server of [this.#front, this.#store]) {
      server.on('connection', (socket: Socket) => {
        this.#sockets.add(socket);
        socket.on('close', () => this.#sockets.delete(socket));
        socket.on('error', () => undefined); // resets are this proxy's trade
      });
    }
  }

  /** A proxy before `upstream` ("http://127.0.0.1:5000"), itself speaking TLS when `tls` (PEM texts) is given. */
  static async start(upstream: string, tls?: { cert: string; key: string }): Promise<FaultProxy> {
    const proxy = new FaultProxy(upstream, tls);
    await Promise.all(
      [proxy.#front, proxy.#store].map(
        (server) => new Promise<void>((resolve) => server.listen(0, '127.0.0.1', () => resolve())),
      ),
    );
    return proxy;
  }

  get host(): string {
    return `127.0.0.1:${(this.#front.address() as AddressInfo).port}`;
  }

  /** Where redirects lead. */
  get storeHost(): string {
    return `127.0.0.1:${(this.#store.address() as AddressInfo).port}`;
  }

  /** Replaces all rules; the first that matches a request decides. */
  setRules(...rules: FaultRule[]): void {
    this.#rules = rules.map((rule) => ({ rule, matched: 0 }));
  }

  /** Requests that are being answered now: their clients are still there. */
  get active(): number {
    return this.#active;
  }

  /** Forgets counts and rules. */
  reset(): void {
    this.setRules();
    this.seen.length = 0;
    this.maxActive = this.#active;
  }

  /** Requests and body bytes sent, of a method and paths that match; both ports. */
  count(filter: { readonly method?: string; readonly path?: RegExp; readonly store?: boolean } = {}): {
    requests: number;
    bytes: number;
  } {
    const hits = this.seen.filter(
      (one) =>
        (filter.method === undefined || one.method === filter.method) &&
        (filter.path === undefined || filter.path.test(one.path)) &&
        (filter.store === undefined || one.store === filter.store),
    );
    return { requests: hits.length, bytes: hits.reduce((sum, { bytes }) => sum + bytes, 0) };
  }

  async stop(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    const closed = [this.#front, this.#store].map((server) => new Promise((resolve) => server.close(resolve)));
    for (const socket of this.#sockets) socket.destroy();
    await Promise.all(closed);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }

  async #handle(request: IncomingMessage, response: ServerResponse, store: boolean): Promise<void> {
    const path = request.url ?? '/';
    const { range, authorization } = request.headers;
    const seen: SeenRequest = { method: request.method ?? '', path, range, authorization, store, status: 0, bytes: 0 };
    this.seen.push(seen);
    this.#active++;
    this.maxActive = Math.max(this.maxActive, this.#active);
    response.once('close', () => this.#active--);

    const fault = this.#faultFor(seen);
    if (fault?.kind === 'delay') await this.#wait(fault.ms);
    if (fault?.kind === 'hold') await fault.until;
    if (fault?.kind === 'stall' && fault.afterBytes === undefined) {
      if (fault.ms === undefined) return;
      await this.#wait(fault.ms);
    }
    if (fault?.kind === 'reset' && fault.afterBytes === undefined) {
      request.socket.resetAndDestroy();
      return;
    }
    if (fault?.kind === 'status') {
      seen.status = fault.status;
      request.resume();
      response.writeHead(fault.status, { 'content-type': 'text/plain', ...fault.headers }).end(fault.body ?? '');
      return;
    }
    if (fault?.kind === 'redirect') {
      seen.status = fault.status ?? 307;
      response.writeHead(seen.status, { location: fault.to ?? this.#sign(seen, fault.lifetimeMs) }).end();
      return;
    }
    if (store && path.startsWith('/signed/')) {
      const signed = this.#signed.get(path);
      if (signed === undefined || signed.expiresAt < Date.now()) {
        seen.status = 403;
        response.writeHead(403, { 'content-type': 'application/xml' }).end('<Error><Code>AccessDenied</Code></Error>');
        return;
      }
      await this.#forward(request, response, seen, fault, signed.path, signed.authorization);
      return;
    }
    await this.#forward(request, response, seen, fault, path, authorization);
  }

  #sign(seen: SeenRequest, lifetimeMs = Number.POSITIVE_INFINITY): string {
    const path = `/signed/${randomUUID()}?X-Amz-Signature=${randomUUID().replaceAll('-', '')}`;
    this.#signed.set(path, {
      path: seen.path,
      authorization: seen.authorization,
      expiresAt: Date.now() + lifetimeMs,
    });
    return `http://${this.storeHost}${path}`;
  }

  #faultFor(seen: SeenRequest): Fault | undefined {
    for (const entry of this.#rules) {
      const { method, path, from = 1, times = Number.POSITIVE_INFINITY, fault } = entry.rule;
      if ((method !== undefined && method !== seen.method) || (path !== undefined && !path.test(seen.path))) continue;
      entry.matched++;
      if (entry.matched >= from && entry.matched < from + times) return fault;
    }
    return undefined;
  }

  #wait(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        resolve();
      }, ms);
      this.#timers.add(timer);
    });
  }

  async #forward(
    request: IncomingMessage,
    response: ServerResponse,
    seen: SeenRequest,
    fault: Fault | undefined,
    path: string,
    authorization: string | undefined,
  ): Promise<void> {
    const headers = { ...request.headers, 'x-forwarded-proto': this.#tls && !seen.store ? 'https' : 'http' };
    delete headers.authorization;
    delete headers.connection;
    if (authorization !== undefined) Object.assign(headers, { authorization });
    if (fault?.kind === 'ignoreRange') delete headers.range;
    const { hostname, port } = this.#upstream;
    const upstream = httpRequest({ hostname, port, method: request.method, path, headers, agent: false });
    request.pipe(upstream);
    const answer = await new Promise<IncomingMessage>((resolve, reject) => {
      upstream.once('response', resolve);
      upstream.once('error', reject);
    });
    // A client that leaves must not keep the upstream connection.
    const closed = once(response, 'close').then(() => upstream.destroy());
    seen.status = answer.statusCode ?? 0;
    const head = { ...answer.headers, ...(fault?.kind === 'headers' ? fault.headers : {}) };
    delete head.connection;
    if (fault?.kind === 'long' || (fault?.kind === 'short' && fault.chunked === true)) delete head['content-length'];
    response.writeHead(seen.status, head);
    if (request.method === 'HEAD') {
      response.end();
      answer.resume();
      return;
    }
    const body = this.#body(answer, fault, seen);
    for await (const chunk of body) {
      if (chunk === 'reset') {
        request.socket.resetAndDestroy();
        return;
      }
      seen.bytes += chunk.length;
      if (!response.write(chunk)) await Promise.race([once(response, 'drain'), closed]);
      if (response.destroyed) return;
    }
    if (fault?.kind === 'short' && fault.chunked !== true) request.socket.destroy();
    else response.end();
  }

  /** The answer's chunks with the fault applied; "reset" asks for the connection to be reset. */
  async *#body(answer: IncomingMessage, fault: Fault | undefined, seen: SeenRequest): AsyncGenerator<Buffer | 'reset'> {
    const limit =
      fault?.kind === 'short'
        ? fault.bytes
        : fault?.kind === 'reset' || fault?.kind === 'stall'
          ? fault.afterBytes
          : undefined;
    let offset = 0;
    for await (const chunk of answer as AsyncIterable<Buffer>) {
      let part = chunk;
      if (fault?.kind === 'wrongBytes' && fault.at >= offset && fault.at < offset + chunk.length) {
        part = Buffer.from(chunk);
        part[fault.at - offset] = (part[fault.at - offset] ?? 0) ^ 0xff;
      }
      if (limit !== undefined && offset <= limit && offset + chunk.length > limit) {
        yield part.subarray(0, limit - offset);
        if (fault?.kind === 'short') return;
        // What was written must leave before the reset, which throws away what is still queued.
        await this.#wait(50);
        if (fault?.kind === 'reset') {
          yield 'reset';
          return;
        }
        if (fault?.kind === 'stall')
          await (fault.ms === undefined ? new Promise(() => undefined) : this.#wait(fault.ms));
        part = part.subarray(limit - offset);
      }
      offset += chunk.length;
      yield part;
    }
    if (fault?.kind === 'long' && seen.status < 300) yield Buffer.alloc(fault.bytes, 0x5a);
  }
}

function once(emitter: NodeJS.EventEmitter, event: string): Promise<void> {
  return new Promise((resolve) => emitter.once(event, () => resolve()));
}
