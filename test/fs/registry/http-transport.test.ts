import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { type AddressInfo, connect, createServer as createTcpServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { digestOf } from '../../../src/digest.ts';
import { HttpTransport } from '../../../src/fs/registry/http-transport.ts';
import { openRepository, RegistryPool } from '../../../src/fs/registry/pool.ts';
import { proxyFor } from '../../../src/fs/registry/proxy-environment.ts';
import { blobReaderSuite, soon, withCode } from '../../suites/blob-reader.ts';
import { waitFor } from '../../support/containerd.ts';
import { FaultProxy } from '../../support/fault-proxy.ts';
import { freePort, RegistryProcess } from '../../support/registry.ts';
import { makeCertificates, type TestCertificates } from '../../support/tls.ts';

const env = { HOME: '/nonexistent' };
const retry = { attempts: 2, baseDelayMs: 5 };
const bytes = randomBytes(10_000);
const digest = digestOf(bytes);
const blob = { digest, size: bytes.length };

blobReaderSuite('a registry over TLS with a private authority', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'tls-'));
  const certificates = await makeCertificates(dir);
  const registry = await RegistryProcess.start({ tls: certificates });
  const pool = new RegistryPool({ env, retry, caFiles: [certificates.caFile] });
  return {
    repository: pool.repository({ host: registry.host, path: 'suite' }),
    corrupt: (one, offset) => registry.corruptBlob(one, offset),
    close: async () => {
      await pool.close();
      await registry.stop();
      await rm(dir, { recursive: true, force: true });
    },
  };
});

describe('trust', () => {
  let dir: string;
  let certificates: TestCertificates;
  let registry: RegistryProcess;

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'tls-'));
    certificates = await makeCertificates(dir);
    registry = await RegistryProcess.start({ tls: certificates });
  });
  after(async () => {
    await registry?.stop();
    await rm(dir, { recursive: true, force: true });
  });

  test('an unknown authority is refused at once, with advice', async () => {
    const repository = openRepository({ host: registry.host, path: 'x' }, { env });
    const started = performance.now();
    await assert.rejects(repository.hasBlob(digest, soon()), (error: { hint?: string }) => {
      assert.match(error.hint ?? '', /insecure/);
      return withCode('REGISTRY_HTTP', /TLS failed/)(error);
    });
    assert.ok(performance.now() - started < 2000);
  });

  test('a host configured as insecure may have any certificate, and only that host', async () => {
    const insecure = new RegistryPool({ env, retry, insecureHosts: [registry.host] });
    await insecure.repository({ host: registry.host, path: 'x' }).putBlob(digest, bytes, soon());
    const other = await RegistryProcess.start({ tls: certificates });
    const strange = insecure.repository({ host: other.host, path: 'x' });
    await assert.rejects(strange.hasBlob(digest, soon()), withCode('REGISTRY_HTTP', /TLS failed/));
    await insecure.close();
    await other.stop();
  });

  test('a certificate for another name is refused', async () => {
    const elsewhere = await mkdtemp(join(tmpdir(), 'tls-'));
    const wrong = await makeCertificates(elsewhere, ['DNS:example.org']);
    const other = await RegistryProcess.start({ tls: wrong });
    const repository = openRepository({ host: other.host, path: 'x' }, { env, caFiles: [wrong.caFile] });
    await assert.rejects(repository.hasBlob(digest, soon()), withCode('REGISTRY_HTTP', /TLS failed/));
    await other.stop();
    await rm(elsewhere, { recursive: true, force: true });
  });

  test('an authority file that is missing or no PEM is named', async () => {
    const broken = join(dir, 'broken.pem');
    await writeFile(broken, '-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n');
    for (const file of [join(dir, 'missing.pem'), broken]) {
      const repository = openRepository({ host: registry.host, path: 'x' }, { env, caFiles: [file] });
      await assert.rejects(repository.hasBlob(digest, soon()), withCode('INVALID_CONFIG', /authority file/));
    }
  });

  test('a redirect from https to plain HTTP is refused', async () => {
    const [cert, key] = await Promise.all([
      readFile(certificates.certFile, 'utf8'),
      readFile(certificates.keyFile, 'utf8'),
    ]);
    await using plain = await RegistryProcess.start();
    await using secure = await FaultProxy.start(`http://${plain.host}`, { cert, key });
    const pool = new RegistryPool({ env, retry, caFiles: [certificates.caFile] });
    const repository = pool.repository({ host: secure.host, path: 'x' });
    await repository.putBlob(digest, bytes, soon());
    secure.setRules({ method: 'GET', path: /blobs/, fault: { kind: 'redirect' } });
    const read = repository.readRange(blob, { offset: 0, length: 5 }, soon());
    await assert.rejects(read, withCode('REGISTRY_PROTOCOL', /redirect from https/));
    assert.equal(secure.count({ store: true }).requests, 0);
    await pool.close();
  });

  test('plain HTTP is used for no host that is neither loopback nor configured', async () => {
    const options = { env, retry, endpoints: { 'reg.example': 'http://192.0.2.1:5000' } };
    const refused = openRepository({ host: 'reg.example', path: 'x' }, options);
    await assert.rejects(refused.hasBlob(digest, soon()), withCode('REGISTRY_PROTOCOL', /plain HTTP/));
  });
});

test('a server that is not there is REGISTRY_HTTP, and an abort while connecting ends the wait', async () => {
  const host = `127.0.0.1:${await freePort()}`;
  const gone = openRepository({ host, path: 'x' }, { env, retry });
  await assert.rejects(gone.hasBlob(digest, soon()), withCode('REGISTRY_HTTP', /ECONNREFUSED/));
  // A server that accepts and never speaks.
  const silent = createTcpServer(() => undefined);
  await new Promise<void>((resolve) => silent.listen(0, '127.0.0.1', resolve));
  const mute = `127.0.0.1:${(silent.address() as AddressInfo).port}`;
  const stuck = openRepository({ host: mute, path: 'x' }, { env, connectTimeoutMs: 3000 });
  const started = performance.now();
  await assert.rejects(stuck.hasBlob(digest, AbortSignal.timeout(200)), withCode('DEADLINE'));
  assert.ok(performance.now() - started < 1000);
  silent.close();
});

test('the endpoint configured for a host is where its requests go', async () => {
  await using registry = await RegistryProcess.start();
  const pool = new RegistryPool({ env, retry, endpoints: { 'docker.io': `http://${registry.host}/` } });
  const repository = pool.repository({ host: 'docker.io', path: 'library/nginx' });
  await repository.putBlob(digest, bytes, soon());
  assert.equal(repository.name, 'docker.io/library/nginx');
  assert.ok(registry.requests('PUT', /library\/nginx/) >= 1);
  await pool.close();
});

describe('proxies', () => {
  let forward: Server;
  let address: string;
  const asked: string[] = [];

  before(async () => {
    forward = createServer((request, response) => {
      asked.push(`${request.method} ${request.url}`);
      response.writeHead(200, { 'content-length': '7' }).end();
    });
    forward.on('connect', (request, client) => {
      asked.push(`CONNECT ${request.url}`);
      const port = Number(request.url?.split(':')[1]);
      const upstream = connect(port, '127.0.0.1', () => {
        client.write('HTTP/1.1 200 OK\r\n\r\n');
        upstream.pipe(client);
        client.pipe(upstream);
      });
      upstream.on('error', () => client.destroy());
      client.on('error', () => upstream.destroy());
    });
    await new Promise<void>((resolve) => forward.listen(0, '127.0.0.1', resolve));
    address = `http://127.0.0.1:${(forward.address() as AddressInfo).port}`;
  });
  after(() => {
    forward?.closeAllConnections();
    forward?.close();
  });

  test('requests go through the proxy of the environment, plain or tunnelled', async () => {
    const dir = await mkdtemp(join(tmpdir(), 'tls-'));
    const certificates = await makeCertificates(dir, ['DNS:reg.example']);
    await using registry = await RegistryProcess.start({ tls: certificates });
    const environment = { ...env, HTTP_PROXY: address, HTTPS_PROXY: address };
    const endpoints = { 'plain.example': 'http://plain.example' };
    const options = {
      env: environment,
      retry,
      insecureHosts: ['plain.example'],
      caFiles: [certificates.caFile],
      endpoints,
    };
    const pool = new RegistryPool(options);
    assert.equal(await pool.repository({ host: 'plain.example', path: 'x' }).hasBlob(digest, soon()), true);
    assert.match(asked.at(-1) ?? '', /^HEAD http:\/\/plain\.example\/v2\/x\/blobs\//);
    const secure = pool.repository({ host: `reg.example:${registry.port}`, path: 'x' });
    assert.equal(await secure.hasBlob(digest, soon()), false);
    assert.equal(asked.at(-1), `CONNECT reg.example:${registry.port}`);
    await pool.close();
    await rm(dir, { recursive: true, force: true });
  });

  test('loopback is reached directly unless the proxy is asked for', async () => {
    await using registry = await RegistryProcess.start();
    const environment = { ...env, HTTP_PROXY: address };
    const before = asked.length;
    const direct = new RegistryPool({ env: environment, retry });
    assert.equal(await direct.repository({ host: registry.host, path: 'x' }).hasBlob(digest, soon()), false);
    assert.equal(asked.length, before);
    const through = new RegistryPool({ env: environment, retry, proxyLoopback: true, insecureHosts: [registry.host] });
    await through.repository({ host: registry.host, path: 'x' }).hasBlob(digest, soon());
    assert.equal(asked.length, before + 1);
    await direct.close();
    await through.close();
  });

  test('NO_PROXY names hosts, domains, addresses, blocks and ports', () => {
    const proxied = (url: string, noProxy: string) =>
      proxyFor(new URL(url), { HTTP_PROXY: 'p:1', https_proxy: 'http://q:2', NO_PROXY: noProxy });
    assert.equal(proxied('http://a.io/', ''), 'http://p:1');
    assert.equal(proxied('https://a.io/', ''), 'http://q:2');
    const exceptions: readonly (readonly [url: string, noProxy: string, direct: boolean])[] = [
      ['https://a.io/', '*', true],
      ['https://a.io/', 'a.io', true],
      ['https://x.a.io/', 'a.io', true],
      ['https://x.a.io/', '.a.io', true],
      ['https://a.io/', '.a.io', false],
      ['https://xa.io/', 'a.io', false],
      ['https://x.a.io/', '*.a.io', true],
      ['https://a.io:5000/', 'a.io:5000', true],
      ['https://a.io/', 'a.io:5000', false],
      ['https://a.io/', 'b.io, A.IO', true],
      ['https://10.1.2.3/', '10.0.0.0/8', true],
      ['https://11.1.2.3/', '10.0.0.0/8', false],
      ['https://10.1.2.3/', '10.1.2.3', true],
      ['https://10.1.2.3/', '10.0.0.0/99', false],
      ['https://[fd00::1]/', 'fd00::/8', true],
      ['https://[fd00::1]:5000/', '[fd00::1]:5000', true],
    ];
    for (const [url, noProxy, direct] of exceptions) {
      assert.equal(proxied(url, noProxy) === undefined, direct, `${url} with NO_PROXY=${noProxy}`);
    }
    assert.equal(
      proxyFor(new URL('http://a.io'), { HTTP_PROXY: 'http://upper', http_proxy: 'http://lower' }),
      'http://lower',
    );
    assert.equal(proxyFor(new URL('https://a.io'), { HTTP_PROXY: 'http://upper' }), undefined);
  });
});

test('a host that may be plain, named without a port, is asked on port 80 when nothing listens on 443', async () => {
  const transport = new HttpTransport({ env });
  assert.equal(await transport.schemeOf('127.0.7.43', soon()), 'http');
  await transport.close();
});

test('connections opened ahead carry the reads that follow, whether they are there yet or broken meanwhile', async () => {
  const sockets = new Set<Socket>();
  let opened = 0;
  // As long as one read is not answered, the next one needs another connection.
  const waiting: (() => void)[] = [];
  const server = createServer((request, response) => {
    waiting.push(() => response.end(bytes));
    if (request.url !== `/v2/x/blobs/${digest}`) response.statusCode = 404;
    if (waiting.length === 4) for (const answer of waiting.splice(0)) answer();
  });
  server.on('connection', (socket) => {
    opened++;
    sockets.add(socket);
  });
  after(() => {
    server.closeAllConnections();
    server.close();
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const endpoints = { 'ahead.example': `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
  const readAll = (pool: RegistryPool) => {
    const repository = pool.repository({ host: 'ahead.example', path: 'x' });
    const one = async () => assert.ok((await repository.readBlob(digest, bytes.length, soon())).equals(bytes));
    return Promise.all([one(), one(), one(), one()]);
  };
  for (const moment of ['at once', 'when they are there', 'when they are gone'] as const) {
    const pool = new RegistryPool({ env, retry, endpoints });
    pool.repository({ host: 'ahead.example', path: 'x' }).expectReads();
    const before = opened;
    if (moment !== 'at once') await waitFor('four connections', () => opened === before + 4);
    if (moment === 'when they are gone') for (const socket of sockets) socket.resetAndDestroy();
    await readAll(pool);
    if (moment === 'when they are there') assert.equal(opened, before + 4);
    await pool.close();
  }
  // What nobody takes is closed with the pool.
  const pool = new RegistryPool({ env, retry, endpoints });
  sockets.clear();
  pool.repository({ host: 'ahead.example', path: 'x' }).expectReads();
  await waitFor('four connections', () => sockets.size === 4);
  await pool.close();
  await waitFor('their end', () => [...sockets].every((socket) => socket.destroyed || socket.readableEnded));
});
