import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, beforeEach, describe, test } from 'node:test';
import { digestOf } from '../../../src/digest.ts';
import { HttpRepository } from '../../../src/fs/registry/http-blob.ts';
import { HttpTransport } from '../../../src/fs/registry/http-transport.ts';
import { addReferrerTag, referrerTag } from '../../../src/fs/registry/referrer-tag.ts';
import { MiB } from '../../../src/units.ts';
import { blobReaderSuite, collect, soon, withCode } from '../../suites/blob-reader.ts';
import { type Fault, FaultProxy } from '../../support/fault-proxy.ts';
import { RegistryProcess } from '../../support/registry.ts';

blobReaderSuite('a registry over HTTP', async () => {
  const registry = await RegistryProcess.start();
  const transport = new HttpTransport();
  return {
    repository: new HttpRepository({ host: registry.host, path: 'suite/name', transport }),
    corrupt: (digest, offset) => registry.corruptBlob(digest, offset),
    close: async () => {
      await transport.close();
      await registry.stop();
    },
  };
});

describe('a registry that misbehaves', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let transport: HttpTransport;
  let repository: HttpRepository;
  const bytes = randomBytes(MiB);
  const blob = { digest: digestOf(bytes), size: bytes.length };
  const range = { offset: 1000, length: 200_000 };
  const wanted = bytes.subarray(1000, 201_000);
  const blobs = /\/blobs\/sha256:/;
  const fault = (one: Fault, times?: number) =>
    proxy.setRules({ method: 'GET', path: blobs, fault: one, ...(times === undefined ? {} : { times }) });

  before(async () => {
    registry = await RegistryProcess.start();
    proxy = await FaultProxy.start(`http://${registry.host}`);
    transport = new HttpTransport({ headersTimeoutMs: 500, bodyTimeoutMs: 500 });
    repository = new HttpRepository({ host: proxy.host, path: 'a/b', transport });
    await repository.putBlob(blob.digest, bytes, soon());
  });
  after(async () => {
    await transport?.close();
    await proxy?.stop();
    await registry?.stop();
  });
  beforeEach(() => {
    proxy.reset();
    repository = new HttpRepository({ host: proxy.host, path: 'a/b', transport });
  });

  test('a push uploads in one piece, and not at all when the blob is there', async () => {
    const more = randomBytes(1000);
    await repository.putBlob(digestOf(more), more, soon());
    assert.deepEqual(
      proxy.seen.map(({ method }) => method),
      ['HEAD', 'POST', 'PUT'],
    );
    await repository.putBlob(digestOf(more), more, soon());
    assert.equal(proxy.seen.length, 4);
  });

  const refused: readonly (readonly [string, Fault, Parameters<typeof withCode>])[] = [
    ['200 for a range', { kind: 'ignoreRange' }, ['REGISTRY_PROTOCOL', /ignores Range/]],
    [
      'another Content-Range',
      { kind: 'headers', headers: { 'content-range': 'bytes 1001-201000/1048576' } },
      ['REGISTRY_PROTOCOL', /Content-Range/],
    ],
    [
      'another total size',
      { kind: 'headers', headers: { 'content-range': 'bytes 1000-200999/1048577' } },
      ['REGISTRY_PROTOCOL', /Content-Range/],
    ],
    [
      'a compressed body',
      { kind: 'headers', headers: { 'content-encoding': 'gzip' } },
      ['REGISTRY_PROTOCOL', /encoded/],
    ],
    ['a longer body', { kind: 'long', bytes: 10 }, ['REGISTRY_PROTOCOL', /longer/]],
    ['a body that breaks off', { kind: 'short', bytes: 5000 }, ['REGISTRY_HTTP']],
    [
      'a body that ends early without saying so',
      { kind: 'short', bytes: 5000, chunked: true },
      ['REGISTRY_HTTP', /ended after 5000/],
    ],
    ['a reset before the answer', { kind: 'reset' }, ['REGISTRY_HTTP']],
    ['a reset inside the body', { kind: 'reset', afterBytes: 5000 }, ['REGISTRY_HTTP']],
    ['no answer', { kind: 'stall' }, ['DEADLINE', /no response/]],
    ['a body that stalls', { kind: 'stall', afterBytes: 5000 }, ['DEADLINE', /stalled/]],
    ['404', { kind: 'status', status: 404 }, ['REGISTRY_NOT_FOUND']],
    ['403', { kind: 'status', status: 403 }, ['REGISTRY_AUTH']],
    ['401 without a challenge', { kind: 'status', status: 401 }, ['REGISTRY_AUTH']],
    ['429', { kind: 'status', status: 429, body: 'slow down' }, ['REGISTRY_HTTP', /429: slow down/]],
    ['500', { kind: 'status', status: 500 }, ['REGISTRY_HTTP']],
    ['204', { kind: 'status', status: 204 }, ['REGISTRY_PROTOCOL']],
    ['a redirect to nowhere', { kind: 'redirect', to: 'ftp://host/x' }, ['REGISTRY_PROTOCOL', /usable Location/]],
    [
      'a redirect to plain HTTP elsewhere',
      { kind: 'redirect', to: 'http://192.0.2.1/x' },
      ['REGISTRY_PROTOCOL', /plain HTTP/],
    ],
  ];
  for (const [what, one, expected] of refused) {
    test(`${what} is an error, never bytes`, async () => {
      fault(one);
      await assert.rejects(repository.readRange(blob, range, soon()), withCode(...expected));
    });
  }

  test('a redirect that leads in a circle ends after five', async () => {
    proxy.setRules({ path: /./, fault: { kind: 'redirect', to: `http://${proxy.host}/v2/a/b/blobs/${blob.digest}` } });
    await assert.rejects(
      repository.readRange(blob, range, soon()),
      withCode('REGISTRY_PROTOCOL', /more than 5 redirects/),
    );
    assert.equal(proxy.seen.length, 6);
  });

  test('wrong bytes end a whole read with DIGEST_MISMATCH', async () => {
    fault({ kind: 'wrongBytes', at: 700_000 });
    await assert.rejects(collect(repository.readAll(blob, soon())), withCode('DIGEST_MISMATCH'));
  });

  test('200 is right for a range that is the whole blob', async () => {
    fault({ kind: 'ignoreRange' });
    const got = await repository.readRange(blob, { offset: 0, length: blob.size }, soon());
    assert.ok(got.equals(bytes));
  });

  test('a 416 that announces a body it never sends does not hold anything up', async () => {
    // docker-registry answers so: the Content-Length is the blob's, a few bytes of text follow.
    const longer = { digest: blob.digest, size: blob.size + 100 };
    const started = performance.now();
    const read = repository.readRange(longer, { offset: blob.size + 10, length: 10 }, soon());
    await assert.rejects(read, withCode('REGISTRY_PROTOCOL', /416/));
    assert.ok(performance.now() - started < 3000);
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
  });

  test('a failure quotes the first words of an endless answer and hangs up', async () => {
    fault({ kind: 'status', status: 503, body: 'x'.repeat(5 * MiB) });
    const before = repository.traffic.bytes;
    await assert.rejects(repository.readRange(blob, range, soon()), (error: Error) => error.message.length < 1000);
    assert.ok(repository.traffic.bytes - before <= 256 * 1024);
  });

  test('Retry-After is part of the error', async () => {
    fault({ kind: 'status', status: 429, headers: { 'retry-after': '7' } });
    await assert.rejects(
      repository.readRange(blob, range, soon()),
      (error: { details?: { retryAfterMs?: number } }) => {
        assert.equal(error.details?.retryAfterMs, 7000);
        return true;
      },
    );
  });

  test('an abort in the middle of a stalled answer ends the call at once and frees the connection', async () => {
    fault({ kind: 'stall', afterBytes: 5000 });
    const slow = new HttpTransport({ bodyTimeoutMs: 60_000 });
    const stalled = new HttpRepository({ host: proxy.host, path: 'a/b', transport: slow });
    const controller = new AbortController();
    const started = performance.now();
    const read = stalled.readRange(blob, range, controller.signal);
    setTimeout(() => controller.abort(), 200);
    await assert.rejects(read, withCode('CANCELLED'));
    assert.ok(performance.now() - started < 1500);
    proxy.reset();
    assert.ok((await stalled.readRange(blob, range, soon())).equals(wanted));
    await slow.close();
  });

  test('a redirect is followed once, then remembered', async () => {
    fault({ kind: 'redirect' });
    for (let i = 0; i < 3; i++) assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(proxy.count({ store: false }).requests, 1);
    assert.equal(proxy.count({ store: true }).requests, 3);
    assert.equal(repository.traffic.requests, 4);
    await Promise.all([1, 2, 3, 4].map(() => repository.readRange(blob, range, soon())));
    assert.equal(proxy.count({ store: false }).requests, 1);
  });

  test('a remembered redirect that expired is asked for anew', async () => {
    fault({ kind: 'redirect', lifetimeMs: 150 });
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    await new Promise((resolve) => setTimeout(resolve, 250));
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(proxy.count({ store: false }).requests, 2);
    assert.deepEqual(
      proxy.seen.filter(({ store }) => store).map(({ status }) => status),
      [206, 403, 206],
    );
  });

  test('a remembered redirect that broke is not used again', async () => {
    fault({ kind: 'redirect' });
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    for (const one of [{ kind: 'reset' }, { kind: 'status', status: 502 }] as const) {
      proxy.setRules(
        { path: /^\/signed/, times: 1, fault: one },
        { method: 'GET', path: blobs, fault: { kind: 'redirect' } },
      );
      await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_HTTP'));
      const before = proxy.count({ store: false }).requests;
      assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
      assert.equal(proxy.count({ store: false }).requests, before + 1);
    }
  });

  test('a message never shows the signature of a redirect', async () => {
    fault({ kind: 'redirect', lifetimeMs: -1 });
    await assert.rejects(repository.readRange(blob, range, soon()), (error: Error) => {
      assert.match(error.message, /403/);
      assert.match(error.message, /\/signed\//);
      const signature = /Signature=(\w+)/.exec(proxy.seen.at(-1)?.path ?? '')?.[1];
      assert.ok(signature !== undefined && !error.message.includes(signature) && !error.message.includes('Amz'));
      return true;
    });
  });

  test('no more than four blobs are fetched at a time, and a manifest does not wait behind them', async () => {
    const manifest = Buffer.from(
      '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}',
    );
    await repository.putManifest('small', 'application/vnd.oci.image.index.v1+json', manifest, soon());
    proxy.reset();
    fault({ kind: 'delay', ms: 300 });
    const ranges = Array.from({ length: 12 }, (_, i) => ({ offset: i * 1000, length: 1000 }));
    const reads = Promise.all(ranges.map((one) => repository.readRange(blob, one, soon())));
    const started = performance.now();
    assert.equal((await repository.getManifest('small', soon())).digest, digestOf(manifest));
    assert.ok(performance.now() - started < 250);
    await reads;
    assert.ok(proxy.maxActive <= 5, `${proxy.maxActive}`);
    assert.ok(proxy.maxActive >= 4, `${proxy.maxActive}`);
  });

  test('a manifest that is not what its digest says is refused', async () => {
    const manifest = Buffer.from(
      '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}',
    );
    const type = 'application/vnd.oci.image.index.v1+json';
    await repository.putManifest('checked', type, manifest, soon());
    for (const name of ['checked', digestOf(manifest)]) {
      proxy.setRules({ path: /manifests/, fault: { kind: 'wrongBytes', at: 20 } });
      await assert.rejects(repository.getManifest(name, soon()), withCode('DIGEST_MISMATCH'));
    }
  });

  test('a manifest of many megabytes is refused before it fills the memory', async () => {
    proxy.setRules({ path: /manifests/, fault: { kind: 'status', status: 200, body: ' '.repeat(9 * MiB) } });
    await assert.rejects(repository.getManifest('big', soon()), withCode('REGISTRY_PROTOCOL', /longer than/));
  });

  test('the referrers API is used where it answers, page by page, and only matching types count', async () => {
    const subject = digestOf('a subject');
    const one = (n: string, artifactType: string) => ({
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      digest: digestOf(n),
      size: 10,
      artifactType,
    });
    const page = (manifests: object[]) => JSON.stringify({ schemaVersion: 2, manifests });
    const type = { 'content-type': 'application/vnd.oci.image.index.v1+json' };
    proxy.setRules(
      {
        path: /referrers\/.*page=2/,
        fault: { kind: 'status', status: 200, body: page([one('3', 'x/y')]), headers: type },
      },
      {
        path: /referrers\/.*artifactType=x%2Fy/,
        fault: {
          kind: 'status',
          status: 200,
          body: page([one('1', 'x/y'), one('2', 'other')]),
          headers: { ...type, link: `</v2/a/b/referrers/${subject}?page=2>; rel="next"` },
        },
      },
    );
    const found = await repository.referrers(subject, 'x/y', soon());
    assert.deepEqual(
      found.map(({ digest }) => digest),
      [digestOf('1'), digestOf('3')],
    );
    assert.equal(proxy.count({ path: /manifests/ }).requests, 0);
  });

  test('a manifest with a subject is taken by a registry without the API, which does not claim to know it', async () => {
    const type = 'application/vnd.oci.image.manifest.v1+json';
    const config = Buffer.from('{}');
    await repository.putBlob(digestOf(config), config, soon());
    const subject = { mediaType: type, digest: digestOf('an image'), size: 8 };
    const empty = { mediaType: 'application/vnd.oci.empty.v1+json', digest: digestOf(config), size: 2 };
    const manifest = Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        mediaType: type,
        artifactType: 'x/y',
        config: empty,
        layers: [empty],
        subject,
      }),
    );
    const pushed = await repository.putManifest(digestOf(manifest), type, manifest, soon());
    assert.deepEqual(pushed, { subjectKnown: false });
    const referrer = { mediaType: type, digest: digestOf(manifest), size: manifest.length, artifactType: 'x/y' };
    await addReferrerTag(repository, subject.digest, referrer, soon());
    await addReferrerTag(
      repository,
      subject.digest,
      { ...referrer, digest: digestOf(config), size: 2 },
      soon(),
      () => true,
    );
    await addReferrerTag(repository, subject.digest, referrer, soon());
    assert.equal((await repository.referrers(subject.digest, 'x/y', soon())).length, 2);
    assert.match((await repository.getManifest(referrerTag(subject.digest), soon())).mediaType, /image\.index/);
  });

  test('after close, every call says so', async () => {
    const closed = new HttpTransport();
    const gone = new HttpRepository({ host: proxy.host, path: 'a/b', transport: closed });
    await gone.hasBlob(blob.digest, soon());
    await closed.close();
    await assert.rejects(gone.hasBlob(blob.digest, soon()), withCode('CLOSED'));
  });
});
