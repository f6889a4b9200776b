import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { digestOf } from '../../../src/digest.ts';
import type { DedupError } from '../../../src/errors.ts';
import { HttpRepository } from '../../../src/fs/registry/http-blob.ts';
import { HttpTransport } from '../../../src/fs/registry/http-transport.ts';
import { RegistryPool } from '../../../src/fs/registry/pool.ts';
import { RetryingRepository } from '../../../src/fs/registry/retrying.ts';
import { fewAtOnce } from '../../../src/fs/registry/wanted-parts.ts';
import { type ByteRange, httpRange, MiB, parseContentRange } from '../../../src/units.ts';
import { soon, withCode } from '../../suites/blob-reader.ts';
import { FaultProxy } from '../../support/fault-proxy.ts';
import { RegistryProcess } from '../../support/registry.ts';

test('a Content-Range is understood, and anything else is not one', () => {
  assert.deepEqual(parseContentRange('bytes 5-9/20'), { range: { offset: 5, length: 5 }, size: 20 });
  assert.deepEqual(parseContentRange(' Bytes 0-0/* '), { range: { offset: 0, length: 1 }, size: undefined });
  for (const other of [
    '',
    'bytes */20',
    'bytes 9-5/20',
    'bytes 5-20/20',
    'lines 5-9/20',
    'bytes 5-9',
    'bytes=5-9/20',
  ]) {
    assert.equal(parseContentRange(other), undefined, other);
  }
});

test('after a failure nothing more is begun, and what is under way may end', async () => {
  const [begun, ended]: [number[], number[]] = [[], []];
  const work = fewAtOnce([0, 1, 2, 3, 4, 5, 6, 7], async (item) => {
    begun.push(item);
    await sleep(item === 1 ? 10 : 50);
    if (item === 1) throw new RangeError('one');
    ended.push(item);
  });
  await assert.rejects(work, RangeError);
  assert.deepEqual(begun, [0, 1, 2, 3]);
  assert.deepEqual(ended, [0, 2, 3]);
});

describe('several ranges of one blob', () => {
  const bytes = randomBytes(MiB);
  const blob = { digest: digestOf(bytes), size: bytes.length };
  // The third and fourth touch.
  const ranges = [
    { offset: 10, length: 1000 },
    { offset: 200_000, length: 60_000 },
    { offset: 400_000, length: 100 },
    { offset: 400_100, length: 70_000 },
    { offset: 1_000_000, length: 5 },
  ];
  const stretches = [ranges[0]!, ranges[1]!, { offset: 400_000, length: 70_100 }, ranges[4]!];
  const BOUNDARY = 'THIS_SEPARATES';

  type Answer = (response: ServerResponse, asked: ByteRange[], number: number) => void | Promise<void>;
  let server: Server;
  let host: string;
  let transport: HttpTransport;
  let repository: HttpRepository;
  let retrying: RetryingRepository;
  /** Range headers received. */
  const seen: (string | undefined)[] = [];
  /** How the server answers a request for several ranges. */
  let answer: Answer;

  const slice = ({ offset, length }: ByteRange): Buffer => bytes.subarray(offset, offset + length);
  const contentRange = ({ offset, length }: ByteRange): string => `bytes ${offset}-${offset + length - 1}/${blob.size}`;
  const multipart = (parts: readonly ByteRange[], describe = contentRange): Buffer =>
    Buffer.concat([
      ...parts.flatMap((one) => [
        Buffer.from(
          `\r\n--${BOUNDARY}\r\nContent-Type: application/octet-stream\r\nContent-Range: ${describe(one)}\r\n\r\n`,
        ),
        slice(one),
      ]),
      Buffer.from(`\r\n--${BOUNDARY}--\r\n`),
    ]);
  const TYPE = { 'content-type': `multipart/byteranges; boundary=${BOUNDARY}` };
  const send = (response: ServerResponse, body: Buffer): void => {
    response.writeHead(206, { ...TYPE, 'content-length': body.length }).end(body);
  };
  const single = (response: ServerResponse, one: ByteRange): void => {
    response.writeHead(206, { 'content-range': contentRange(one), 'content-length': one.length }).end(slice(one));
  };
  const right: Answer = (response, asked) => send(response, multipart(asked));

  const rangesIn = (text: string | undefined): ByteRange[] =>
    [...(text ?? '').matchAll(/(\d+)-(\d+)/g)].map(([, first, last]) => ({
      offset: Number(first),
      length: Number(last) + 1 - Number(first),
    }));

  before(async () => {
    let several = 0;
    server = createServer((request: IncomingMessage, response) => {
      const { range } = request.headers;
      seen.push(range);
      const asked = rangesIn(range);
      if (asked.length === 1) single(response, asked[0]!);
      else Promise.resolve(answer(response, asked, ++several)).catch(() => response.destroy());
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    transport = new HttpTransport({ headersTimeoutMs: 500, bodyTimeoutMs: 500 });
  });
  after(async () => {
    await transport?.close();
    server?.closeAllConnections();
    await new Promise((resolve) => server?.close(resolve));
  });
  beforeEach(() => {
    answer = right;
    repository = new HttpRepository({ host, path: 'a/b', transport });
    retrying = new RetryingRepository(repository, { baseDelayMs: 5, maxDelayMs: 20 });
    seen.length = 0;
  });

  /** Reads `wanted` and returns the numbers in the order they were told, every part checked. */
  async function read(wanted: readonly ByteRange[] = ranges, from: Pick<HttpRepository, 'readRanges'> = repository) {
    const told: number[] = [];
    await from.readRanges(blob, wanted, soon(), (i, part) => {
      assert.ok(part.equals(slice(wanted[i]!)), `range ${i}`);
      told.push(i);
    });
    assert.deepEqual(
      told.toSorted((a, b) => a - b),
      wanted.map((_, i) => i),
    );
    return told;
  }

  test('they take one request, in which those that touch are one range', async () => {
    assert.deepEqual(await read(), [0, 1, 2, 3, 4]);
    assert.deepEqual(seen, [httpRange(...stretches)]);
    assert.equal(repository.traffic.requests, 1);
    assert.equal(repository.traffic.bytes, multipart(stretches).length);
  });

  test('the connection is used again for the next request', async () => {
    let connections = 0;
    const count = () => connections++;
    server.on('connection', count);
    const own = new HttpTransport({ dataConnections: 1 });
    const other = new HttpRepository({ host, path: 'a/b', transport: own });
    for (let i = 0; i < 4; i++) await read(ranges, other);
    await own.close();
    server.off('connection', count);
    // One more asks whether the server speaks TLS, and one may have been prepared.
    assert.ok(connections <= 3, `${connections}`);
  });

  test('ranges that all touch are an ordinary range, told while it streams', async () => {
    const wanted = [
      { offset: 100, length: 50_000 },
      { offset: 50_100, length: 50_000 },
      { offset: 100_100, length: 1 },
    ];
    assert.deepEqual(await read(wanted), [0, 1, 2]);
    assert.deepEqual(seen, [httpRange({ offset: 100, length: 100_001 })]);
  });

  test('each part is told as soon as its bytes are here', async () => {
    const { promise: firstTold, resolve: tell } = Promise.withResolvers<void>();
    answer = async (response, asked) => {
      const body = multipart(asked);
      response.writeHead(206, TYPE);
      response.write(body.subarray(0, 1200));
      await firstTold;
      response.end(body.subarray(1200));
    };
    await repository.readRanges(blob, ranges, soon(), (i) => {
      if (i === 0) tell();
    });
  });

  test('parts in another order are told in that order', async () => {
    answer = (response, asked) => send(response, multipart(asked.toReversed()));
    assert.deepEqual(await read(), [4, 2, 3, 1, 0]);
    assert.equal(seen.length, 1);
  });

  const near = [
    { offset: 0, length: 100 },
    { offset: 150, length: 100 },
    { offset: 300_000, length: 100 },
    { offset: 300_200, length: 100 },
  ];

  test('ranges that the server joined are cut apart again', async () => {
    const joined = [
      { offset: 0, length: 250 },
      { offset: 300_000, length: 300 },
    ];
    answer = (response) => send(response, multipart(joined));
    assert.deepEqual(await read(near), [0, 1, 2, 3]);
    assert.equal(seen.length, 1);
  });

  test('one range that joins all of them is as good as a multipart body', async () => {
    answer = (response) => single(response, { offset: 0, length: 250 });
    assert.deepEqual(await read(near.slice(0, 2)), [0, 1]);
    assert.deepEqual(await read(near.slice(0, 2)), [0, 1]);
    assert.equal(seen.length, 2);
  });

  /** Reads twice: the first time the server is found unable, the second time it is not asked for several any more. */
  async function unable(requests: number): Promise<void> {
    await read();
    assert.equal(seen.length, requests);
    assert.ok(repository.traffic.bytes < 400_000, `${repository.traffic.bytes}`);
    seen.length = 0;
    await read();
    assert.deepEqual(seen.toSorted(), stretches.map((one) => httpRange(one)).toSorted());
  }

  const refusals: readonly (readonly [string, Answer, number])[] = [
    ['the whole blob', (response) => void response.writeHead(200, { 'content-length': blob.size }).end(bytes), 5],
    ['400', (response) => void response.writeHead(400).end('no'), 5],
    ['416', (response) => void response.writeHead(416).end('no'), 5],
    ['501', (response) => void response.writeHead(501).end('no'), 5],
    ['the first range only', (response, asked) => single(response, asked[0]!), 4],
    ['a range nobody asked for', (response) => single(response, { offset: 11, length: 1000 }), 5],
    [
      'the first range with another size of the blob',
      (response, asked) => {
        const said = contentRange(asked[0]!).replace(/\d+$/, '99999999');
        response.writeHead(206, { 'content-range': said }).end(slice(asked[0]!));
      },
      5,
    ],
    [
      'the first range with another Content-Length',
      (response, asked) =>
        void response
          .writeHead(206, { 'content-range': contentRange(asked[0]!), 'content-length': 10 })
          .end('x'.repeat(10)),
      5,
    ],
    ['everything between the first and the last', (response) => single(response, { offset: 10, length: 999_995 }), 5],
    [
      'the same as a part',
      (response, asked) => send(response, multipart([asked[0]!, { offset: 200_000, length: 800_005 }])),
      4,
    ],
    ['a part of the parts', (response, asked) => send(response, multipart(asked.slice(1, 3))), 3],
    ['206 without Content-Range', (response) => void response.writeHead(206).end('x'), 5],
    [
      'an encoded multipart body',
      (response, asked) => void response.writeHead(206, { ...TYPE, 'content-encoding': 'gzip' }).end(multipart(asked)),
      5,
    ],
  ];
  for (const [what, how, requests] of refusals) {
    test(`a server that answers ${what} is asked for one range a request from then on`, async () => {
      answer = how;
      await unable(requests);
    });
  }

  test('an endless answer of the whole blob is hung up on at once', async () => {
    const { promise: hungUp, resolve } = Promise.withResolvers<void>();
    answer = (response) => {
      response.writeHead(200).on('close', resolve).write(bytes);
    };
    await read();
    await hungUp;
    assert.equal(
      repository.traffic.bytes,
      stretches.reduce((sum, { length }) => sum + length, 0),
    );
  });

  test('a server known for single ranges is not asked for several by another repository of the process', async () => {
    answer = (response) => void response.writeHead(416).end();
    await using pool = new RegistryPool();
    await read(ranges, pool.repository({ host, path: 'one' }));
    assert.equal(seen.length, 5);
    await read(ranges, pool.repository({ host, path: 'two' }));
    assert.equal(seen.length, 9);
  });

  const malformed: readonly (readonly [string, (asked: ByteRange[]) => Buffer])[] = [
    ['a part that was not asked for', (asked) => multipart([asked[0]!, { offset: 199_999, length: 60_000 }])],
    [
      'the right bytes under another size of the blob',
      (asked) => multipart(asked, (one) => contentRange(one).replace(/\d+$/, String(blob.size + 1))),
    ],
    ['a part twice', (asked) => multipart([asked[0]!, asked[0]!])],
    ['a Content-Range that is none', (asked) => multipart(asked, () => 'bytes */5')],
    [
      'a part longer than its Content-Range',
      (asked) =>
        multipart([{ offset: 10, length: 1001 }, ...asked.slice(1)], (one) =>
          contentRange(one.length === 1001 ? asked[0]! : one),
        ),
    ],
    ['no multipart at all', () => randomBytes(20_000)],
  ];
  for (const [what, body] of malformed) {
    test(`${what} gives no byte, and from then on there is one range a request`, async () => {
      answer = (response, asked) => send(response, body(asked));
      // What had come right before it is not asked for again.
      await read();
      assert.ok(seen.length > 1 && seen.length <= 5);
      seen.length = 0;
      await read();
      assert.equal(seen.length, 4);
    });
  }

  test('a first range that is longer than its head says gives no byte beyond it', async () => {
    answer = (response, asked) => {
      response.writeHead(206, { 'content-range': contentRange(asked[0]!) });
      response.end(bytes.subarray(10, 2000));
    };
    await read();
    assert.equal(seen.length, 5);
  });

  /** A multipart body of which only the first `share` is sent before `end` decides what happens. */
  const broken =
    (share: number, end: (response: ServerResponse) => void): Answer =>
    async (response, asked, _number) => {
      const body = multipart(asked);
      response.writeHead(206, TYPE).write(body.subarray(0, Math.floor(body.length * share)));
      await sleep(50);
      end(response);
    };
  const breaks: readonly (readonly [string, (response: ServerResponse) => void, Parameters<typeof withCode>])[] = [
    ['ends without saying so', (response) => void response.end(), ['REGISTRY_HTTP', /the body ended after \d+ bytes/]],
    ['is reset', (response) => void response.socket?.resetAndDestroy(), ['REGISTRY_HTTP']],
    ['stalls', () => undefined, ['DEADLINE', /stalled/]],
  ];
  for (const [what, end, expected] of breaks) {
    test(`a body that ${what} is an error after the parts that were told, and a retry asks only for the rest`, async () => {
      answer = broken(0.7, end);
      const told: number[] = [];
      const first = repository.readRanges(blob, ranges, soon(), (i) => told.push(i));
      await assert.rejects(first, withCode(...expected));
      assert.deepEqual(told, [0, 1, 2]);
      seen.length = 0;
      answer = async (response, asked, number) => {
        await (seen.length === 1 ? broken(0.7, end) : right)(response, asked, number);
      };
      assert.deepEqual(await read(ranges, retrying), [0, 1, 2, 3, 4]);
      assert.deepEqual(seen, [httpRange(...stretches), httpRange(ranges[3]!, ranges[4]!)]);
    });
  }

  test('a single range that breaks is asked for again without the parts that were told', async () => {
    const proxied = await FaultProxy.start(`http://${host}`);
    const through = new HttpRepository({ host: proxied.host, path: 'a/b', transport });
    proxied.setRules({ times: 1, fault: { kind: 'short', bytes: 120_000 } });
    const wanted = Array.from({ length: 4 }, (_, i) => ({ offset: 1000 + i * 50_000, length: 50_000 }));
    await read(wanted, new RetryingRepository(through, { baseDelayMs: 5 }));
    assert.equal(proxied.seen.length, 2);
    const second = rangesIn(proxied.seen[1]?.range)[0]!;
    assert.ok(
      [51_000, 101_000].includes(second.offset) && second.offset + second.length === 201_000,
      String(second.offset),
    );
    await proxied.stop();
  });

  test('what follows the last part is not waited for', async () => {
    for (const end of [broken(1, () => undefined), broken(1 - 10 / multipart(stretches).length, () => undefined)]) {
      answer = end;
      const started = performance.now();
      await read();
      assert.ok(performance.now() - started < 2000);
    }
    assert.equal(seen.length, 2);
  });

  test('a body that comes in pieces of any length is the same', async () => {
    const few = [ranges[0]!, { offset: 2000, length: 30 }, ranges[4]!];
    for (const length of [1, 2, 3, 5, 17, 64, 1001]) {
      answer = async (response, asked) => {
        response.writeHead(206, TYPE);
        const body = multipart(asked);
        for (let at = 0; at < body.length; at += length) {
          response.write(body.subarray(at, at + length));
          if (at % (length * 8) === 0) await sleep(0);
        }
        response.end();
      };
      assert.deepEqual(await read(few), [0, 1, 2]);
    }
  });

  test('more than 64 ranges are asked for in several requests, one after the other', async () => {
    const many = Array.from({ length: 150 }, (_, i) => ({ offset: i * 5000, length: 1000 }));
    assert.deepEqual(
      await read(many),
      many.map((_, i) => i),
    );
    assert.deepEqual(
      seen.map((one) => rangesIn(one).length),
      [64, 64, 22],
    );
    assert.ok(seen.every((one) => one!.length < 2300));
  });

  test('no more than four single ranges are asked for at one time, in their order', async () => {
    const registry = await RegistryProcess.start();
    const proxied = await FaultProxy.start(`http://${registry.host}`);
    const through = new HttpRepository({ host: proxied.host, path: 'a/b', transport });
    await through.putBlob(blob.digest, bytes, soon());
    proxied.reset();
    proxied.setRules({ times: 1, fault: { kind: 'status', status: 416 } }, { fault: { kind: 'delay', ms: 50 } });
    const many = Array.from({ length: 12 }, (_, i) => ({ offset: i * 5000, length: 1000 }));
    await read(many, through);
    assert.equal(proxied.maxActive, 4);
    // Those that are under way together arrive in any order.
    for (const [place, one] of proxied.seen.slice(1).entries()) {
      const number = rangesIn(one.range)[0]!.offset / 5000;
      assert.ok(Math.abs(number - place) < 4, `range ${number} was asked for at place ${place}`);
    }
    assert.equal(proxied.seen.length, 13);
    await proxied.stop();
    await registry.stop();
  });

  const failures: readonly (readonly [number, Parameters<typeof withCode>])[] = [
    [401, ['REGISTRY_AUTH']],
    [403, ['REGISTRY_AUTH']],
    [404, ['REGISTRY_NOT_FOUND']],
    [429, ['REGISTRY_HTTP', /429: slow down/]],
    [503, ['REGISTRY_HTTP', /503/]],
  ];
  for (const [status, expected] of failures) {
    test(`${status} is the error that a single range would get, and says nothing about several ranges`, async () => {
      answer = (response) => void response.writeHead(status, { 'retry-after': '7' }).end('slow down');
      await assert.rejects(read(), (error: DedupError) => {
        withCode(...expected)(error);
        assert.equal(error.details.retryAfterMs, 7000);
        return true;
      });
      answer = right;
      seen.length = 0;
      await read();
      assert.equal(seen.length, 1);
    });
  }

  test('no answer is DEADLINE, and an abort in the middle is CANCELLED', async () => {
    answer = () => undefined;
    await assert.rejects(read(), withCode('DEADLINE', /no response/));
    answer = broken(0.5, () => undefined);
    const controller = new AbortController();
    const aborted = repository.readRanges(blob, ranges, controller.signal, () => controller.abort());
    await assert.rejects(aborted, withCode('CANCELLED'));
  });
});

describe('several ranges from docker-registry', () => {
  let registry: RegistryProcess;
  let proxy: FaultProxy;
  let pool: RegistryPool;
  const bytes = randomBytes(4 * MiB);
  const blob = { digest: digestOf(bytes), size: bytes.length };
  const ranges = Array.from({ length: 40 }, (_, i) => ({ offset: i * 100_000, length: 20_000 + i }));

  before(async () => {
    registry = await RegistryProcess.start();
    proxy = await FaultProxy.start(`http://${registry.host}`);
    pool = new RegistryPool();
    await pool.repository({ host: registry.host, path: 'r' }).putBlob(blob.digest, bytes, soon());
  });
  after(async () => {
    await pool?.close();
    await proxy?.stop();
    await registry?.stop();
  });
  beforeEach(() => proxy.reset());

  async function read(): Promise<void> {
    let told = 0;
    await pool.repository({ host: proxy.host, path: 'r' }).readRanges(blob, ranges, soon(), (i, part) => {
      assert.equal(i, told++);
      const { offset, length } = ranges[i]!;
      assert.ok(part.equals(bytes.subarray(offset, offset + length)), `range ${i}`);
    });
    assert.equal(told, ranges.length);
  }

  test('they take one request and hardly more bytes than are wanted', async () => {
    await read();
    assert.equal(proxy.seen.length, 1);
    const wanted = ranges.reduce((sum, { length }) => sum + length, 0);
    assert.ok(proxy.count().bytes - wanted < ranges.length * 250, `${proxy.count().bytes - wanted}`);
  });

  test('a redirect is followed and remembered, and an expired one is asked for anew', async () => {
    proxy.setRules({ path: /\/blobs\//, fault: { kind: 'redirect', lifetimeMs: 300 } });
    await read();
    await read();
    await sleep(400);
    await read();
    assert.deepEqual(
      proxy.seen.map(({ store, status }) => `${store ? 'store' : 'registry'} ${status}`),
      ['registry 307', 'store 206', 'store 206', 'store 403', 'registry 307', 'store 206'],
    );
  });
});
