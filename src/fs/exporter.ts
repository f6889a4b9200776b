// The HTTP server that Prometheus scrapes dedupd through. The daemon starts it when exporterConfig.enable is true; it
// must never keep dedupd from serving, whatever becomes of its port.
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Logger } from '../log.ts';
import type { Metrics } from '../metrics.ts';

export interface ExporterOptions {
  /** TCP port; 0: any free one. */
  readonly port: number;
  /** What is answered there; begins with "/". */
  readonly path: string;
  /** IP address listened on; "": all of this machine. */
  readonly address: string;
  readonly metrics: Pick<Metrics, 'text' | 'contentType'>;
  readonly log: Logger;
  /** How long to wait before a port that could not be had is tried again, milliseconds. */
  readonly retryMs?: number;
}

export interface Exporter {
  /** The port listened on, or undefined as long as it cannot be had. */
  readonly port: number | undefined;
  /** Stops listening and ends what is being answered. Idempotent. */
  close(): Promise<void>;
}

/** Whoever takes longer to say what is wanted holds a descriptor that readers may need. */
const HEADERS_TIMEOUT_MS = 5_000;
const REQUEST_TIMEOUT_MS = 10_000;
/** Of a client that says nothing and takes nothing. */
const IDLE_TIMEOUT_MS = 30_000;
const MAX_CONNECTIONS = 32;
/** A dedupd that was killed may hold the port for a moment after its successor took the root. */
const RETRY_MS = 5_000;

/**
 * Serves until closed. Resolves when it listens, or when it is known that it cannot: that is said once, and tried again
 * as long as this is not closed. Never rejects.
 */
export async function startExporter(options: ExporterOptions): Promise<Exporter> {
  const { path, address, log } = options;
  const server = createServer(
    { headersTimeout: HEADERS_TIMEOUT_MS, requestTimeout: REQUEST_TIMEOUT_MS },
    (request, response) => void answer(request, response, options), // Never rejects.
  );
  server.setTimeout(IDLE_TIMEOUT_MS);
  server.maxConnections = MAX_CONNECTIONS;
  let retry: NodeJS.Timeout | undefined;
  let warned = false;
  let closed = false;
  const known = Promise.withResolvers<void>();
  const listen = (): void => {
    server.listen({ port: options.port, ...(address === '' ? {} : { host: address }) });
  };
  server.on('listening', () => {
    // An address is looked up before it is listened on: close() may come in between and find nothing to end.
    if (closed) return void server.close();
    const port = portOf(server.address());
    log.info({ port, address, path }, 'metrics are served');
    known.resolve();
  });
  server.on('error', (error: NodeJS.ErrnoException) => {
    if (!warned) log.warn({ err: error, port: options.port, address }, whyNot(error, options));
    warned = true;
    if (!closed && !server.listening) retry = setTimeout(listen, options.retryMs ?? RETRY_MS).unref();
    known.resolve();
  });
  listen();
  await known.promise;
  return {
    get port() {
      return portOf(server.address());
    },
    close: () => {
      closed = true;
      clearTimeout(retry);
      return new Promise((resolve) => {
        // An error says that it does not listen, which is what was wanted.
        server.close(() => resolve());
        server.closeAllConnections();
      });
    },
  };
}

function portOf(address: AddressInfo | string | null): number | undefined {
  return typeof address === 'object' && address !== null ? address.port : undefined;
}

/** What the operator is told: what is the matter, which key to change, and that nothing else suffers. */
function whyNot(error: NodeJS.ErrnoException, { port, address }: ExporterOptions): string {
  const anyway = 'everything else works, and it is tried again';
  if (error.code === 'EADDRINUSE')
    return `no metrics: port ${port} is taken by another process; choose another "exporterConfig.port" (${anyway})`;
  if (error.code === 'EADDRNOTAVAIL')
    return `no metrics: this machine does not have the address ${address}; change "exporterConfig.address" (${anyway})`;
  return `no metrics: port ${port} cannot be listened on: ${error.message}; see "exporterConfig.port" (${anyway})`;
}

/** Never rejects. */
async function answer(request: IncomingMessage, response: ServerResponse, options: ExporterOptions): Promise<void> {
  const { path, metrics, log } = options;
  const [asked] = (request.url ?? '').split('?');
  if (asked !== path) return say(response, 404, `Nothing is here: metrics are at ${path}\n`);
  if (request.method !== 'GET' && request.method !== 'HEAD') {
    response.setHeader('allow', 'GET, HEAD');
    return say(response, 405, 'Metrics can only be read: GET or HEAD\n');
  }
  try {
    const text = await metrics.text();
    response.setHeader('content-type', metrics.contentType);
    // Node sends no body in answer to HEAD.
    response.writeHead(200, { 'content-length': Buffer.byteLength(text) }).end(text);
  } catch (error) {
    log.warn({ err: error }, 'metrics cannot be read');
    say(response, 500, 'Metrics cannot be read now: the log of dedupd says why\n');
  }
}

function say(response: ServerResponse, status: number, text: string): void {
  response.writeHead(status, {
    'content-type': 'text/plain; charset=utf-8',
    'content-length': Buffer.byteLength(text),
  });
  response.end(text);
}
