import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { inspect } from 'node:util';
import fc from 'fast-check';
import { digestOf } from '../../../src/digest.ts';
import { parseChallenges } from '../../../src/fs/registry/auth.ts';
import { RegistryPool } from '../../../src/fs/registry/pool.ts';
import { soon, withCode } from '../../suites/blob-reader.ts';
import { FaultProxy } from '../../support/fault-proxy.ts';
import { RegistryProcess, TEST_LOGIN } from '../../support/registry.ts';
import { makeCertificates } from '../../support/tls.ts';
import { TokenServer } from '../../support/token-server.ts';

const login = { username: TEST_LOGIN.username, password: TEST_LOGIN.password };
const retry = { baseDelayMs: 5, maxDelayMs: 20, attempts: 2 };
const bytes = randomBytes(50_000);
const blob = { digest: digestOf(bytes), size: bytes.length };
const range = { offset: 10, length: 1000 };
/** No credentials of the machine take part. */
const env = { HOME: '/nonexistent' };

/** Fails when any of `secrets`, in the usual spellings, can be seen in `error` or a log line. */
function assertSilent(seen: unknown, secrets: readonly string[]): void {
  const text = inspect(seen, { depth: 20, showHidden: true });
  for (const secret of secrets) {
    for (const form of [
      secret,
      Buffer.from(secret).toString('base64'),
      Buffer.from(`alice:${secret}`).toString('base64'),
    ]) {
      assert.ok(!text.includes(form), `${form} can be read in: ${text.slice(0, 3000)}`);
    }
  }
}

describe('basic authentication', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let pool: RegistryPool;

  before(async () => {
    registry = await RegistryProcess.start({ htpasswd: TEST_LOGIN.htpasswd });
    proxy = await FaultProxy.start(`http://${registry.host}`);
    pool = new RegistryPool({ env, retry });
    await pool.repository({ host: proxy.host, path: 'a/b' }, login).putBlob(blob.digest, bytes, soon());
  });
  after(async () => {
    await pool?.close();
    await proxy?.stop();
    await registry?.stop();
  });
  beforeEach(() => proxy.reset());

  test('credentials given for a call are used, once the registry asks for them', async () => {
    const repository = new RegistryPool({ env, credentials: login }).repository({ host: proxy.host, path: 'a/b' });
    assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
    await repository.readRange(blob, range, soon());
    assert.deepEqual(
      proxy.seen.map(({ status, authorization }) => [status, authorization !== undefined]),
      [
        [401, false],
        [206, true],
        [206, true],
      ],
    );
  });

  test('without credentials the error says which are missing', async () => {
    const repository = pool.repository({ host: proxy.host, path: 'a/b' });
    await assert.rejects(repository.readRange(blob, range, soon()), (error: { hint?: string }) => {
      withCode('REGISTRY_AUTH', /wants a user name and password/)(error);
      assert.match(error.hint ?? '', /credentials file/);
      return true;
    });
  });

  test('wrong credentials are tried once, and are in no message and no log line', async () => {
    const lines: unknown[] = [];
    const log = { debug: (...line: unknown[]) => lines.push(line), warn: (...line: unknown[]) => lines.push(line) };
    const credentials = { username: 'alice', password: 'wrong-and-secret' };
    const repository = new RegistryPool({ env, retry, log }).repository({ host: proxy.host, path: 'a/b' }, credentials);
    await assert.rejects(repository.readRange(blob, range, soon()), (error) => {
      assertSilent(error, ['wrong-and-secret']);
      return withCode('REGISTRY_AUTH')(error);
    });
    assert.equal(proxy.seen.length, 2);
    const echo = proxy.seen.at(-1)?.authorization ?? '';
    proxy.setRules({ path: /./, fault: { kind: 'status', status: 500, body: `got ${echo} wrong-and-secret` } });
    await assert.rejects(repository.readRange(blob, range, soon()), (error) => {
      assertSilent([error, lines], ['wrong-and-secret']);
      return withCode('REGISTRY_HTTP', /500: got/)(error);
    });
    assert.ok(lines.length > 0);
  });

  test('credentials are never sent to where a redirect leads', async () => {
    const repository = pool.repository({ host: proxy.host, path: 'a/b' }, login);
    await repository.hasBlob(blob.digest, soon());
    proxy.setRules({ method: 'GET', path: /blobs/, fault: { kind: 'redirect' } });
    assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
    const store = proxy.seen.filter((one) => one.store);
    assert.equal(store.length, 1);
    assert.equal(store[0]?.authorization, undefined);
  });

  test('a challenge from where a redirect leads is not answered, nor its realm asked', async () => {
    const fresh = new RegistryPool({ env, retry });
    const repository = fresh.repository({ host: proxy.host, path: 'a/b' }, login);
    const challenge = `Bearer realm="http://${proxy.storeHost}/steal"`;
    proxy.setRules(
      { path: /^\/signed/, fault: { kind: 'status', status: 401, headers: { 'www-authenticate': challenge } } },
      { method: 'GET', path: /blobs/, fault: { kind: 'redirect' } },
    );
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_AUTH'));
    for (const one of proxy.seen.filter(({ store }) => store)) assert.equal(one.authorization, undefined);
    assert.equal(proxy.count({ path: /steal/ }).requests, 0);
    await fresh.close();
  });

  test('a password that was changed in the file is taken up without a restart', async (t) => {
    const dir = await mkdtemp(join(tmpdir(), 'password-'));
    t.after(() => rm(dir, { recursive: true, force: true }));
    const file = join(dir, 'config.json');
    const write = (password: string) =>
      writeFile(file, JSON.stringify({ auths: { [proxy.host]: { username: 'alice', password } } }));
    await write('not-the-one');
    const repository = new RegistryPool({ env, retry, credentialsFile: file }).repository({
      host: proxy.host,
      path: 'a/b',
    });
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_AUTH'));
    const before = proxy.seen.length;
    await assert.rejects(
      repository.readRange(blob, range, soon()),
      withCode('REGISTRY_AUTH', /refused the credentials/),
    );
    assert.equal(proxy.seen.length, before + 1);
    await write(TEST_LOGIN.password);
    assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
  });

  test('one object serves one name and its credentials', () => {
    const name = { host: proxy.host, path: 'a/b' };
    assert.equal(pool.repository(name, login), pool.repository(name, { ...login }));
    assert.notEqual(pool.repository(name, login), pool.repository(name));
    assert.notEqual(pool.repository(name, login), pool.repository(name, { ...login, password: 'x' }));
  });
});

describe('token authentication', () => {
  let dir: string;
  let tokens: TokenServer;
  let registry: RegistryProcess;
  let proxy: FaultProxy;

  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'tokens-'));
    const certificates = await makeCertificates(dir);
    tokens = await TokenServer.start(certificates, { alice: 'secret-word' });
    const { realm, service, issuer } = tokens;
    registry = await RegistryProcess.start({ token: { realm, service, issuer, rootCertFile: certificates.caFile } });
    proxy = await FaultProxy.start(`http://${registry.host}`);
    await open().putBlob(blob.digest, bytes, soon());
  });
  after(async () => {
    await proxy?.stop();
    await registry?.stop();
    await tokens?.stop();
    await rm(dir, { recursive: true, force: true });
  });
  beforeEach(() => {
    proxy.reset();
    tokens.requests.length = 0;
    tokens.lifetimeS = 300;
    tokens.issueBroken = false;
  });
  const open = (credentials: object | undefined = login) =>
    new RegistryPool({ env, retry, ...(credentials === undefined ? {} : { credentials }) }).repository({
      host: proxy.host,
      path: 'team/app',
    });

  test('one token serves all reads, however many start at once', async () => {
    const repository = open();
    const ranges = Array.from({ length: 8 }, (_, i) => ({ offset: i * 100, length: 100 }));
    await Promise.all(ranges.map((one) => repository.readRange(blob, one, soon())));
    await repository.readRange(blob, range, soon());
    assert.deepEqual(tokens.requests, [{ method: 'GET', scopes: ['repository:team/app:pull'], user: 'alice' }]);
  });

  test('a push asks for a token that may push', async () => {
    const more = randomBytes(100);
    await open().putBlob(digestOf(more), more, soon());
    assert.deepEqual(
      tokens.requests.map(({ scopes }) => scopes[0]),
      ['repository:team/app:pull', 'repository:team/app:pull,push'],
    );
  });

  test('without credentials an anonymous token is used: it may pull, not push', async () => {
    const repository = new RegistryPool({ env, retry }).repository({ host: proxy.host, path: 'team/app' });
    assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
    assert.equal(tokens.requests[0]?.user, undefined);
    const more = randomBytes(100);
    await assert.rejects(repository.putBlob(digestOf(more), more, soon()), withCode('REGISTRY_AUTH'));
  });

  test('an expired token is renewed before it is used', async () => {
    tokens.lifetimeS = 1;
    const repository = open();
    await repository.readRange(blob, range, soon());
    await new Promise((resolve) => setTimeout(resolve, 600));
    await repository.readRange(blob, range, soon());
    assert.equal(tokens.requests.length, 2);
    assert.equal(proxy.seen.filter(({ status }) => status === 401).length, 1);
  });

  test('a token that is refused with 401 or 403 is renewed once, then the refusal stands', async () => {
    const repository = open();
    await repository.readRange(blob, range, soon());
    for (const status of [401, 403]) {
      tokens.requests.length = 0;
      proxy.setRules({ path: /blobs/, times: 1, fault: { kind: 'status', status } });
      assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
      assert.equal(tokens.requests.length, 1);
    }
    tokens.requests.length = 0;
    tokens.issueBroken = true;
    proxy.reset();
    proxy.setRules({ path: /blobs/, times: 1, fault: { kind: 'status', status: 401 } });
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_AUTH'));
    assert.equal(tokens.requests.length, 1);
    assert.equal(proxy.seen.length, 2);
  });

  test('a token server that refuses is quoted, but not what was sent to it', async () => {
    const repository = open({ username: 'alice', password: 'wrong-and-secret' });
    await assert.rejects(repository.readRange(blob, range, soon()), (error) => {
      assertSilent(error, ['wrong-and-secret']);
      return withCode('REGISTRY_AUTH', /no entry for/)(error);
    });
  });

  test('no token is part of a message, even when a server repeats it', async () => {
    const repository = open();
    await repository.readRange(blob, range, soon());
    const token = tokens.issued.at(-1) ?? '';
    assert.ok(token.length > 100);
    const body = JSON.stringify({ errors: [{ code: 'OOPS', message: `your token is ${token}` }] });
    proxy.setRules({ path: /./, fault: { kind: 'status', status: 500, body } });
    await assert.rejects(repository.readRange(blob, range, soon()), (error) => {
      assertSilent(error, [token, token.slice(0, 40), token.slice(-40)]);
      return withCode('REGISTRY_HTTP', /OOPS/)(error);
    });
  });

  test('an identity token from docker login is exchanged', async () => {
    const file = join(dir, 'identity.json');
    await writeFile(file, JSON.stringify({ auths: { [proxy.host]: { identitytoken: 'refresh-alice' } } }));
    const repository = new RegistryPool({ env, retry, credentialsFile: file }).repository({
      host: proxy.host,
      path: 'team/app',
    });
    assert.ok((await repository.readRange(blob, range, soon())).equals(bytes.subarray(10, 1010)));
    assert.deepEqual(tokens.requests, [{ method: 'POST', scopes: ['repository:team/app:pull'], user: 'alice' }]);
  });

  test('a realm that cannot be used is refused', async () => {
    for (const realm of ['', 'ftp://127.0.0.1/token', 'http://192.0.2.1/token']) {
      const headers = { 'www-authenticate': `Bearer realm="${realm}",service="s"` };
      proxy.setRules({ path: /./, fault: { kind: 'status', status: 401, headers } });
      await assert.rejects(open().hasBlob(blob.digest, soon()), withCode('REGISTRY_PROTOCOL'));
    }
  });

  test('an https registry cannot have credentials sent to a plain HTTP realm', async () => {
    const certificates = await makeCertificates(dir);
    const [cert, key] = await Promise.all([
      readFile(certificates.certFile, 'utf8'),
      readFile(certificates.keyFile, 'utf8'),
    ]);
    await using secure = await FaultProxy.start(`http://${registry.host}`, { cert, key });
    const pool = new RegistryPool({ env, retry, credentials: login, caFiles: [certificates.caFile] });
    const repository = pool.repository({ host: secure.host, path: 'team/app' });
    await assert.rejects(repository.hasBlob(blob.digest, soon()), withCode('REGISTRY_PROTOCOL', /token server/));
    assert.equal(tokens.requests.length, 0);
    await pool.close();
  });
});

test('challenges are parsed as RFC 9110 writes them', () => {
  const bearer = { realm: 'https://auth.example/token', service: 'reg', scope: 'repository:a/b:pull,push' };
  const text = Object.entries(bearer).map(([name, value]) => `${name}="${value}"`);
  const plain = (value: string) => parseChallenges(value).map((one) => [one.scheme, { ...one.parameters }]);
  assert.deepEqual(plain(`Bearer ${text.join(',')}`), [['bearer', bearer]]);
  assert.deepEqual(plain(`BEARER ${text.join(' , ')} , basic realm="a \\"b\\" , c"`), [
    ['bearer', bearer],
    ['basic', { realm: 'a "b" , c' }],
  ]);
  assert.deepEqual(plain('Negotiate, Basic realm=plain'), [
    ['negotiate', {}],
    ['basic', { realm: 'plain' }],
  ]);
  assert.deepEqual(plain('Negotiate YWJjZA==, Basic realm="x"'), [
    ['negotiate', {}],
    ['basic', { realm: 'x' }],
  ]);
  assert.deepEqual(plain(''), []);
});

test('no header value makes the parser of challenges hang or throw', () => {
  const near = fc
    .array(fc.constantFrom('Bearer', 'Basic', ' ', ',', '=', '"', '\\', 'realm', 'a', '==', '\t'), { maxLength: 40 })
    .map((parts) => parts.join(''));
  fc.assert(
    fc.property(fc.oneof(fc.string(), near), (value) => {
      for (const { scheme } of parseChallenges(value)) assert.equal(scheme, scheme.toLowerCase());
    }),
    { numRuns: 1000 },
  );
  const started = performance.now();
  parseChallenges(`Bearer ${'a="\\'.repeat(20_000)}`);
  parseChallenges(`${'a'.repeat(50_000)} ${', '.repeat(20_000)}`);
  assert.ok(performance.now() - started < 1000);
});
