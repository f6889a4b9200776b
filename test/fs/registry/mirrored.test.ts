import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, beforeEach, describe, test } from 'node:test';
import { digestOf } from '../../../src/digest.ts';
import { RegistryPool } from '../../../src/fs/registry/pool.ts';
import type { StreamingRepository } from '../../../src/fs/registry/verified-stream.ts';
import { MiB } from '../../../src/units.ts';
import { blobReaderSuite, collect, soon, withCode } from '../../suites/blob-reader.ts';
import { FaultProxy } from '../../support/fault-proxy.ts';
import { freePort, RegistryProcess } from '../../support/registry.ts';

const retry = { baseDelayMs: 5, maxDelayMs: 20 };

blobReaderSuite('a registry behind an empty mirror', async () => {
  const origin = await RegistryProcess.start();
  const mirror = await RegistryProcess.start();
  const pool = new RegistryPool({ mirrors: [{ host: mirror.host }], retry });
  return {
    repository: pool.repository({ host: origin.host, path: 'suite' }),
    corrupt: (digest, offset) => origin.corruptBlob(digest, offset),
    close: async () => {
      await pool.close();
      await mirror.stop();
      await origin.stop();
    },
  };
});

describe('mirrors', () => {
  let registry: RegistryProcess;
  let origin: FaultProxy;
  let mirror: FaultProxy;
  let pool: RegistryPool;
  let repository: StreamingRepository;
  const bytes = randomBytes(MiB);
  const blob = { digest: digestOf(bytes), size: bytes.length };
  const range = { offset: 77, length: 300_000 };
  const wanted = bytes.subarray(77, 300_077);

  before(async () => {
    registry = await RegistryProcess.start();
    origin = await FaultProxy.start(`http://${registry.host}`);
    mirror = await FaultProxy.start(`http://${registry.host}`);
  });
  after(async () => {
    await pool?.close();
    await origin?.stop();
    await mirror?.stop();
    await registry?.stop();
  });
  beforeEach(async () => {
    await pool?.close();
    pool = new RegistryPool({ mirrors: [{ host: mirror.host }], retry });
    repository = pool.repository({ host: origin.host, path: 'm/n' });
    origin.reset();
    mirror.reset();
    await repository.putBlob(blob.digest, bytes, soon());
    origin.reset();
  });

  test('reads go to the mirror, which is told whose mirror it is', async () => {
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(origin.seen.length, 0);
    assert.match(mirror.seen[0]?.path ?? '', new RegExp(`\\?ns=${encodeURIComponent(origin.host)}$`));
  });

  test('pushes go to the registry itself', async () => {
    const more = randomBytes(100);
    await repository.putBlob(digestOf(more), more, soon());
    assert.equal(mirror.seen.length, 0);
    assert.equal(origin.seen.length, 3);
  });

  test('a mirror without the blob is asked once', async () => {
    mirror.setRules({ path: /blobs/, fault: { kind: 'status', status: 404 } });
    for (let i = 0; i < 3; i++) assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(mirror.seen.length, 1);
    assert.equal(origin.seen.length, 3);
  });

  test('a failing mirror is passed over for a while', async () => {
    mirror.setRules({ path: /./, fault: { kind: 'status', status: 500 } });
    for (let i = 0; i < 3; i++) assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(mirror.seen.length, 2);
    assert.equal(origin.seen.length, 3);
  });

  test('a mirror that answers nonsense is passed over, too', async () => {
    mirror.setRules({ path: /./, fault: { kind: 'ignoreRange' } });
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(origin.seen.length, 1);
  });

  test('a stream that a mirror broke is continued from the registry', async () => {
    mirror.setRules(
      { path: /blobs/, times: 1, fault: { kind: 'short', bytes: 400_000 } },
      { path: /blobs/, fault: { kind: 'status', status: 500 } },
    );
    assert.ok((await collect(repository.readAll(blob, soon()))).equals(bytes));
    const start = Number(/^bytes=(\d+)-1048575$/.exec(origin.seen[0]?.range ?? '')?.[1]);
    assert.ok(start > 200_000 && start <= 400_000, String(start));
  });

  test('of several ranges, only those that a mirror did not tell are asked for at the registry', async () => {
    mirror.setRules(
      { path: /blobs/, times: 1, fault: { kind: 'short', bytes: 400_000 } },
      { path: /blobs/, fault: { kind: 'status', status: 500 } },
    );
    const ranges = Array.from({ length: 10 }, (_, i) => ({ offset: i * 100_000, length: 90_000 }));
    const told: number[] = [];
    await repository.readRanges(blob, ranges, soon(), (i, part) => {
      told.push(i);
      assert.ok(part.equals(bytes.subarray(i * 100_000, i * 100_000 + 90_000)), `range ${i}`);
    });
    assert.deepEqual(told, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert.equal(origin.seen.length, 1);
    const asked = origin.seen[0]?.range?.split(',').length ?? 0;
    assert.ok(asked >= 6 && asked < 10, String(asked));
  });

  test('the error of the registry itself is the one reported', async () => {
    mirror.setRules({ path: /./, fault: { kind: 'status', status: 500 } });
    origin.setRules({ path: /./, fault: { kind: 'status', status: 403 } });
    await assert.rejects(repository.readRange(blob, range, soon()), withCode('REGISTRY_AUTH', new RegExp(origin.host)));
  });

  test('a mirror that is down costs nothing but a moment', async () => {
    const down = `127.0.0.1:${await freePort()}`;
    const other = new RegistryPool({ mirrors: [{ host: down }, { host: mirror.host }], retry });
    const reader = other.repository({ host: origin.host, path: 'm/n' });
    assert.ok((await reader.readRange(blob, range, soon())).equals(wanted));
    assert.equal(mirror.seen.length, 1);
    await other.close();
  });

  test('an abort is not taken for a failure of the mirror', async () => {
    const controller = new AbortController();
    mirror.setRules({ path: /./, times: 1, fault: { kind: 'stall' } });
    const read = repository.readRange(blob, range, controller.signal);
    setTimeout(() => controller.abort(), 100);
    await assert.rejects(read, withCode('CANCELLED'));
    assert.equal(origin.seen.length, 0);
    assert.ok((await repository.readRange(blob, range, soon())).equals(wanted));
    assert.equal(origin.seen.length, 0);
  });
});
