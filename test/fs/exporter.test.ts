// The exporter's HTTP server: what it answers and refuses, and that a port it cannot have stops nothing.
import assert from 'node:assert/strict';
import { request } from 'node:http';
import { type AddressInfo, connect, createServer, type Server } from 'node:net';
import { afterEach, describe, test } from 'node:test';
import { pino } from 'pino';
import { type Exporter, type ExporterOptions, startExporter } from '../../src/fs/exporter.ts';
import { reportNumbers } from '../../src/fs/numbers-report.ts';
import { Metrics } from '../../src/metrics.ts';
import { parseExposition } from '../support/exposition.ts';

interface LogLine {
  readonly level: number;
  readonly msg: string;
  readonly port?: number;
}

interface Answer {
  readonly status: number;
  readonly headers: NodeJS.Dict<string | string[]>;
  readonly body: string;
}

function ask(port: number, path: string, method = 'GET'): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const asked = request({ host: '127.0.0.1', port, path, method, agent: false }, (response) => {
      let body = '';
      response.setEncoding('utf8');
      response.on('data', (text: string) => {
        body += text;
      });
      response.on('end', () => resolve({ status: response.statusCode ?? 0, headers: response.headers, body }));
    });
    asked.on('error', reject);
    asked.end();
  });
}

/** Somebody else's server on a port of its own. */
async function somebody(): Promise<{ server: Server; port: number }> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { server, port: (server.address() as AddressInfo).port };
}

describe('the exporter', () => {
  const open: { close(): unknown }[] = [];
  let lines: LogLine[] = [];

  async function start(options: Partial<ExporterOptions> = {}): Promise<Exporter> {
    lines = [];
    const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(JSON.parse(line) as LogLine) });
    const metrics = new Metrics();
    const exporter = await startExporter({ port: 0, path: '/metrics', address: '127.0.0.1', metrics, log, ...options });
    open.push(exporter);
    return exporter;
  }

  const warnings = (): LogLine[] => lines.filter(({ level }) => level >= 40);

  afterEach(async () => {
    for (const each of open.splice(0)) await each.close();
  });

  test('answers GET with every metric in the text format, and says so', async () => {
    const { port } = await start();
    const { status, headers, body } = await ask(port!, '/metrics');
    assert.equal(status, 200);
    assert.equal(headers['content-type'], 'text/plain; version=0.0.4; charset=utf-8');
    assert.ok(parseExposition(body).has('dedup_reads_total'));
    assert.deepEqual(
      lines.map(({ msg, port: said }) => [msg, said]),
      [['metrics are served', port]],
    );
  });

  test('takes what comes after a question mark for no part of the path', async () => {
    const { port } = await start();
    assert.equal((await ask(port!, '/metrics?format=text')).status, 200);
  });

  test('answers HEAD with the same headers and no body', async () => {
    const { port } = await start();
    const { status, headers, body } = await ask(port!, '/metrics', 'HEAD');
    assert.equal(status, 200);
    assert.equal(body, '');
    assert.ok(Number(headers['content-length']) > 1000);
  });

  test('answers every other path with 404 and the right one, also below it', async () => {
    const { port } = await start({ path: '/own/metrics' });
    for (const path of ['/', '/metrics', '/own/metrics/', '/own/metrics/x', '/own']) {
      const { status, body } = await ask(port!, path);
      assert.equal(status, 404, path);
      assert.match(body, /metrics are at \/own\/metrics\n$/, path);
    }
    assert.equal((await ask(port!, '/own/metrics')).status, 200);
  });

  test('refuses what would change something with 405', async () => {
    const { port } = await start();
    for (const method of ['POST', 'PUT', 'DELETE', 'OPTIONS']) {
      const { status, headers } = await ask(port!, '/metrics', method);
      assert.equal(status, 405, method);
      assert.equal(headers.allow, 'GET, HEAD');
    }
  });

  test('never goes back on what a counter said, from scrape to scrape', async () => {
    const metrics = new Metrics();
    const traffic = { requests: 4, bytes: 5000 };
    const loader = {
      requests: 1,
      wireBytes: 1000,
      spanBytes: 0,
      aheadBytes: 0,
      spans: 0,
      storedPieces: 0,
      badPieces: 0,
      prefetchBytes: 0,
      usefulBytes: 0,
      lateBytes: 0,
      wastedBytes: 0,
    };
    const reads = { waiting: 0, reads: 12, misses: 2, failedReads: 0, waitMs: 0, maxWaitMs: 0, edgeBytes: 0 };
    const stats = { ...loader, ...reads };
    metrics.collect(() =>
      reportNumbers({
        store: { stats: async () => ({ presentBytes: 4096, chunks: 1 }) as never },
        loader: { stats: () => stats },
        transport: { stats: () => ({ requests: 0, hits: 3, misses: 0, hitBytes: 0, errors: 0 }) },
        registry: { traffic },
        mounts: { list: () => [{}, {}] },
        traces: { queuedSpans: 0, recorded: 0, replayed: 0 },
      }),
    );
    const { port } = await start({ metrics });
    const sample = async (family: string, labels: string): Promise<number | undefined> =>
      parseExposition((await ask(port!, '/metrics')).body)
        .get(family)
        ?.samples.get(`${family}${labels}`);
    const control = (): Promise<number | undefined> => sample('dedup_wire_bytes_total', '{kind="control"}');
    assert.equal(await control(), 4000);
    assert.equal(await sample('dedup_reads_total', '{result="hit"}'), 13);
    assert.equal(await sample('dedup_images_mounted', ''), 2);
    // Half of a range is here: the registry has counted it, the loader has not.
    stats.waiting = 1;
    traffic.bytes += 3000;
    assert.equal(await control(), 4000);
    stats.waiting = 0;
    stats.wireBytes += 6000;
    traffic.bytes += 3000 + 200;
    assert.equal(await control(), 4200);
    // The loader counts a request when it decides on it, the registry when it is sent.
    stats.requests += 1;
    assert.equal(await sample('dedup_registry_requests_total', '{kind="control"}'), 3);
  });

  test('answers 500 and says why in the log when the numbers cannot be had, and goes on', async () => {
    const metrics = new Metrics();
    metrics.collect(() => Promise.reject(new Error('index.db is locked')));
    const { port } = await start({ metrics });
    const { status, body } = await ask(port!, '/metrics');
    assert.equal(status, 500);
    assert.doesNotMatch(body, /index\.db/);
    assert.equal(warnings().length, 1);
    assert.equal((await ask(port!, '/')).status, 404);
  });

  test('starts without its port when somebody else has it, and names the key to change, once', async () => {
    const other = await somebody();
    open.push(other.server);
    const exporter = await start({ port: other.port, retryMs: 5 });
    assert.equal(exporter.port, undefined);
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.equal(warnings().length, 1);
    assert.match(warnings()[0]!.msg, new RegExp(`port ${other.port} is taken .*"exporterConfig\\.port"`));
    await exporter.close();
  });

  test('takes its port as soon as the other one has given it back', async () => {
    const other = await somebody();
    const exporter = await start({ port: other.port, retryMs: 5 });
    await new Promise((resolve) => other.server.close(resolve));
    for (let i = 0; i < 400 && exporter.port === undefined; i++) await new Promise((resolve) => setTimeout(resolve, 5));
    assert.equal(exporter.port, other.port);
    assert.equal((await ask(other.port, '/metrics')).status, 200);
  });

  test('starts without an address that this machine does not have, and names that key', async () => {
    // TEST-NET-1 (RFC 5737): no machine has it.
    const exporter = await start({ address: '192.0.2.1' });
    assert.equal(exporter.port, undefined);
    assert.match(warnings()[0]!.msg, /address 192\.0\.2\.1; change "exporterConfig\.address"/);
  });

  test('closes at once, whoever is connected, as often as it is asked to, and gives the port back', async () => {
    const exporter = await start();
    const port = exporter.port!;
    const silent = connect(port, '127.0.0.1');
    silent.on('error', () => undefined);
    await new Promise((resolve) => silent.once('connect', resolve));
    const ended = new Promise((resolve) => silent.once('close', resolve));
    await Promise.all([exporter.close(), exporter.close()]);
    await ended;
    await exporter.close();
    assert.equal(exporter.port, undefined);
    assert.equal((await start({ port })).port, port);
  });

  test('listens on all of the machine when no address is given', async () => {
    const { port } = await start({ address: '' });
    assert.equal((await ask(port!, '/metrics')).status, 200);
  });
});
