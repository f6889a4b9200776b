import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, beforeEach, describe, test } from 'node:test';
import { digestOf } from '../../../src/digest.ts';
import { HttpRepository } from '../../../src/fs/registry/http-blob.ts';
import { HttpTransport } from '../../../src/fs/registry/http-transport.ts';
import { RetryingRepository } from '../../../src/fs/registry/retrying.ts';
import { MiB } from '../../../src/units.ts';
import { blobReaderSuite, collect, soon, withCode } from '../../suites/blob-reader.ts';
import { type Fault, FaultProxy } from '../../support/fault-proxy.ts';
import { RegistryProcess } from '../../support/registry.ts';

const FAST = { baseDelayMs: 5, maxDelayMs: 20 };

blobReaderSuite('a registry with retries', async () => {
  const registry = await RegistryProcess.start();
  const transport = new HttpTransport();
  const inner = new HttpRepository({ host: registry.host, path: 'suite', transport });
  return {
    repository: new RetryingRepository(inner, FAST),
    corrupt: (digest, offset) => registry.corruptBlob(digest, offset),
    close: async () => {
      await transport.close();
      await registry.stop();
    },
  };
});

describe('retries', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let transport: HttpTransport;
  let inner: HttpRepository;
  let repository: RetryingRepository;
  const bytes = randomBytes(MiB);
  const blob = { digest: digestOf(bytes), size: bytes.length };
  const range = { offset: 1000, length: 500_000 };
  const wanted = bytes.subarray(1000, 501_000);
  const get = /\/blobs\/sha256:/;

  before(async () => {
    registry = await RegistryProcess.start();
    proxy = await FaultProxy.start(`http://${registry.host}`);
    transport = new HttpTransport({ headersTimeoutMs: 400, bodyTimeoutMs: 400 });
    inner = new HttpRepository({ host: proxy.host, path: 'r', transport });
    repository = new RetryingRepository(inner, FAST);
    await repository.putBlob(blob.digest, bytes, soon());
  });
  after(async () => {
    await transport?.close();
    await proxy?.stop();
    await registry?.stop();
  });
  beforeEach(() => proxy.reset());

  const passing: readonly (readonly [string, Fault])[] = [
    ['429', { kind: 'status', status: 429 }],
    ['500', { kind: 'status', status: 500 }],
    ['503 with Retry-After: 0', { kind: 'status', status: 503, headers: { 'retry-after': '0' } }],
    ['a reset', { kind: 'reset' }],
    ['a body cut short', { kind: 'short', bytes: 150_000 }],
    ['a reset inside the body', { kind: 'reset', afterBytes: 150_000 }],
    ['a stall', { kind: 'stall', afterBytes: 150_000 }],
  ];
  for (const [what, fault] of passing) {
    test(`${what}, twice, is overcome`, async () => {
      proxy.setRules({ method: 'GET', path: get, times: 2, fault });
      assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
      assert.equal(proxy.count({ method: 'GET' }).requests, 3);
    });
  }

  const lasting: readonly (readonly [string, Fault, Parameters<typeof withCode>[0]])[] = [
    ['404', { kind: 'status', status: 404 }, 'REGISTRY_NOT_FOUND'],
    ['403', { kind: 'status', status: 403 }, 'REGISTRY_AUTH'],
    ['400', { kind: 'status', status: 400 }, 'REGISTRY_PROTOCOL'],
    ['200 for a range', { kind: 'ignoreRange' }, 'REGISTRY_PROTOCOL'],
  ];
  for (const [what, fault, code] of lasting) {
    test(`${what} is not asked for again`, async () => {
      proxy.setRules({ method: 'GET', path: get, fault });
      await assert.rejects(repository.readRange(blob, range, soon()), withCode(code));
      assert.equal(proxy.seen.length, 1);
    });
  }

  test('wrong bytes are never retried into success', async () => {
    proxy.setRules({ method: 'GET', path: get, times: 1, fault: { kind: 'wrongBytes', at: 5 } });
    await assert.rejects(collect(repository.readAll(blob, soon())), withCode('DIGEST_MISMATCH'));
    assert.equal(proxy.seen.length, 1);
  });

  test('a broken stream goes on where it ended, so that hardly a byte is fetched twice', async () => {
    proxy.setRules({ method: 'GET', path: get, times: 2, fault: { kind: 'short', bytes: 250_000 } });
    assert.ok((await collect(repository.readAll(blob, soon()))).equals(bytes));
    // What a broken connection still had in its buffer is lost and comes again.
    assert.ok(proxy.count({ method: 'GET' }).bytes < blob.size + 2 * 128 * 1024);
    const starts = proxy.seen.map((one) => Number(/^bytes=(\d+)-1048575$/.exec(one.range ?? 'bytes=0-1048575')?.[1]));
    assert.equal(starts.length, 3);
    assert.ok(starts[1]! > 100_000 && starts[2]! > starts[1]! + 100_000, String(starts));
  });

  test('a broken answer of several ranges is asked again only for those that were not told', async () => {
    const ranges = Array.from({ length: 10 }, (_, i) => ({ offset: i * 100_000, length: 50_000 }));
    const faults: readonly Fault[] = [
      { kind: 'reset', afterBytes: 220_000 },
      { kind: 'short', bytes: 220_000 },
      { kind: 'stall', afterBytes: 220_000 },
    ];
    for (const fault of faults) {
      proxy.reset();
      proxy.setRules({ method: 'GET', path: get, times: 1, fault });
      const told: number[] = [];
      await repository.readRanges(blob, ranges, soon(), (i, part) => {
        told.push(i);
        assert.ok(part.equals(bytes.subarray(i * 100_000, i * 100_000 + 50_000)), `range ${i}`);
      });
      assert.deepEqual(told, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
      const asked = proxy.seen.map((one) => one.range?.split(',').length);
      assert.equal(asked.length, 2, fault.kind);
      // What a broken connection still had in its buffer is lost and comes again.
      assert.ok(asked[0] === 10 && asked[1]! <= 8 && asked[1]! >= 6, `${fault.kind}: ${String(asked)}`);
    }
  });

  test('attempts without progress are limited, and the last error is the one reported', async () => {
    proxy.setRules({ path: get, fault: { kind: 'status', status: 502, body: 'bad gateway' } });
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_HTTP', /502: bad gateway/));
    assert.equal(proxy.seen.length, 6);
  });

  test('Retry-After is waited for', async () => {
    proxy.setRules({ path: get, times: 1, fault: { kind: 'status', status: 429, headers: { 'retry-after': '1' } } });
    const started = performance.now();
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.ok(performance.now() - started >= 990);
  });

  test('a Retry-After beyond the deadline fails at once with what the registry said', async () => {
    proxy.setRules({ path: get, fault: { kind: 'status', status: 429, headers: { 'retry-after': '3600' } } });
    const started = performance.now();
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_HTTP', /429/));
    assert.ok(performance.now() - started < 500);
  });

  test('the deadline holds although every single attempt is short', async () => {
    const hurried = new RetryingRepository(inner, { ...FAST, attempts: 1000, deadlineMs: 300 });
    proxy.setRules({ path: get, fault: { kind: 'delay', ms: 250 } });
    const started = performance.now();
    const read = async () => {
      for (;;) await hurried.hasBlob(blob.digest, soon());
    };
    proxy.setRules({ path: get, fault: { kind: 'status', status: 500 } });
    await assert.rejects(read(), (error: { code?: string }) =>
      ['DEADLINE', 'REGISTRY_HTTP'].includes(error.code ?? ''),
    );
    assert.ok(performance.now() - started < 1000);
    proxy.setRules({ path: get, fault: { kind: 'stall' } });
    const patient = new HttpTransport({ headersTimeoutMs: 60_000 });
    const stalled = new HttpRepository({ host: proxy.host, path: 'r', transport: patient });
    const bounded = new RetryingRepository(stalled, { ...FAST, deadlineMs: 300 });
    await assert.rejects(bounded.readRange(blob, range, soon()), withCode('DEADLINE', /not done within 300 ms/));
    await patient.close();
  });

  test('an abort ends the pause between two attempts', async () => {
    proxy.setRules({ path: get, fault: { kind: 'status', status: 429, headers: { 'retry-after': '10' } } });
    const controller = new AbortController();
    const read = repository.readRange(blob, range, controller.signal);
    setTimeout(() => controller.abort(), 150);
    const started = performance.now();
    await assert.rejects(read, withCode('CANCELLED'));
    assert.ok(performance.now() - started < 1000);
  });

  test('a push goes through a registry that fails now and then', async () => {
    const more = randomBytes(10_000);
    proxy.setRules(
      { method: 'POST', path: /uploads/, times: 1, fault: { kind: 'status', status: 503 } },
      { method: 'PUT', path: /uploads/, times: 1, fault: { kind: 'reset' } },
    );
    await repository.putBlob(digestOf(more), more, soon());
    assert.equal(await repository.hasBlob(digestOf(more), soon()), true);
  });

  test('a registry that restarts in the middle is waited for', async () => {
    const read = repository.readAll(blob, soon());
    const iterator = read[Symbol.asyncIterator]();
    assert.ok(!(await iterator.next()).done);
    await registry.halt();
    await registry.launch();
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    await iterator.return?.(undefined);
  });
});
