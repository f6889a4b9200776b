// The counting proxy in front of a server of its own and of a real registry.
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { createServer, type RequestListener } from 'node:http';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import { CountingProxy } from '../../../src/bench/counting-proxy.ts';
import { epochMs, requestTimes } from '../../../src/bench/meter.ts';
import { RegistryProcess, TEST_LOGIN } from '../../support/registry.ts';

async function serve(listener: RequestListener): Promise<{ origin: string; [Symbol.asyncDispose](): Promise<void> }> {
  const server = createServer(listener);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    origin: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

const now = () => epochMs(performance.now());

test('bodies, ranges and statuses pass as they are, and are counted with their times', async () => {
  const content = randomBytes(3_000_000);
  await using server = await serve((request, response) => {
    const [, from = '0', to = ''] = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? '') ?? [];
    if (to === '') response.end(content);
    else response.writeHead(206).end(content.subarray(Number(from), Number(to) + 1));
  });
  await using proxy = await CountingProxy.start({ upstream: server.origin });
  const fromAt = now();
  const whole = await fetch(`http://${proxy.host}/v2/a/blobs/sha256:${'a'.repeat(64)}`);
  assert.deepEqual(Buffer.from(await whole.arrayBuffer()), content);
  const part = await fetch(`http://${proxy.host}/v2/a/manifests/latest`, { headers: { range: 'bytes=10-19' } });
  assert.equal(part.status, 206);
  assert.deepEqual(Buffer.from(await part.arrayBuffer()), content.subarray(10, 20));
  const toAt = now();
  const requests = await proxy.requests(fromAt, toAt);
  assert.deepEqual(
    requests.map(({ bytes, path }) => [bytes, path.split('/')[3]]),
    [
      [content.length, 'blobs'],
      [10, 'manifests'],
    ],
  );
  for (const { startedAt, endedAt } of requests) assert.ok(startedAt >= fromAt && endedAt >= startedAt);
  assert.equal(proxy.bytes, content.length + 10);
  assert.deepEqual(await proxy.requests(toAt + 1, toAt + 1000), []);
  const blobs = { layers: new Set([`sha256:${'a'.repeat(64)}`]), configs: new Set<string>() };
  assert.deepEqual(
    requestTimes(requests, fromAt, blobs).map(({ kind }) => kind),
    ['layer', 'manifest'],
  );
});

test('credentials reach the registry, and never the place it redirects to; bytes from there are counted', async () => {
  const seen: (string | undefined)[] = [];
  await using storage = await serve((request, response) => {
    seen.push(request.headers.authorization);
    response.end('from the storage');
  });
  await using registry = await serve((request, response) => {
    seen.push(request.headers.authorization);
    response.writeHead(307, { location: `${storage.origin}/object?signature=1` }).end();
  });
  await using proxy = await CountingProxy.start({ upstream: registry.origin });
  const fromAt = now();
  const answer = await fetch(`http://${proxy.host}/v2/a/blobs/x`, { headers: { authorization: 'Bearer secret' } });
  assert.equal(await answer.text(), 'from the storage');
  assert.deepEqual(seen, ['Bearer secret', undefined]);
  const [request, ...more] = await proxy.requests(fromAt, now());
  assert.deepEqual([request?.bytes, more.length], [16, 0]);
});

test('a challenge passes, and so does the login that answers it', async () => {
  await using registry = await RegistryProcess.start({ htpasswd: TEST_LOGIN.htpasswd });
  await using proxy = await CountingProxy.start({ upstream: `http://${registry.host}` });
  const refused = await fetch(`http://${proxy.host}/v2/`);
  assert.equal(refused.status, 401);
  assert.match(refused.headers.get('www-authenticate') ?? '', /^Basic realm=/);
  const basic = Buffer.from(`${TEST_LOGIN.username}:${TEST_LOGIN.password}`).toString('base64');
  const login = { authorization: `Basic ${basic}` };
  assert.equal((await fetch(`http://${proxy.host}/v2/`, { headers: login })).status, 200);
  // An upload is several requests, with places that the registry names absolutely.
  const begun = await fetch(`http://${proxy.host}/v2/a/blobs/uploads/`, { method: 'POST', headers: login });
  const location = begun.headers.get('location') ?? '';
  assert.ok(location.startsWith(`http://${proxy.host}/`), location);
  const digest = `sha256:${createHash('sha256').update('content').digest('hex')}`;
  const headers = { ...login, 'content-type': 'application/octet-stream' };
  const put = await fetch(`${location}&digest=${digest}`, { method: 'PUT', headers, body: 'content' });
  assert.equal(put.status, 201);
});

test('a registry that does not answer is 502, a broken answer is broken here too', async () => {
  await using server = await serve((request, response) => {
    if (request.url === '/broken') {
      response.writeHead(200, { 'content-length': 100 });
      response.write('half');
      setImmediate(() => response.destroy());
    } else response.destroy();
  });
  await using proxy = await CountingProxy.start({ upstream: server.origin });
  assert.equal((await fetch(`http://${proxy.host}/gone`)).status, 502);
  await assert.rejects(async () => await (await fetch(`http://${proxy.host}/broken`)).text());
});
