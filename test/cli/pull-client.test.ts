// The light client of PullImage against dedupd's own control server, which reads and writes messages with the library.
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { pino } from 'pino';
import { type PullEvent, type PullRequest, pullImage } from '../../src/cli/pull-client.ts';
import { DedupError, type ErrorCode } from '../../src/errors.ts';
import { type ControlledPlane, type ImagePuller, startControlServer } from '../../src/fs/control-server.ts';

const REQUEST: PullRequest = {
  reference: 'host/pfad/ü:1',
  platform: '',
  credentials: 'alice:secret',
  containerdAddress: '/run/c.sock',
  namespace: 'ns',
  snapshotter: 'dedup',
  leaseMs: 86_400_000,
};

describe('the light client of PullImage', () => {
  let dir: string;
  let address: string;
  let server: { close(): Promise<void> } | undefined;
  before(async () => {
    dir = await mkdtemp(join(tmpdir(), 'pull-client-'));
    address = join(dir, 'dedupd.sock');
  });
  after(() => rm(dir, { recursive: true }));
  afterEach(async () => {
    await server?.close();
    server = undefined;
  });

  async function serve(pullImage?: ImagePuller): Promise<void> {
    const plane = { root: '/r', transportName: 'fake' } as ControlledPlane;
    const log = pino({ level: 'silent' });
    const offered = pullImage === undefined ? {} : { pullImage };
    server = await startControlServer({
      address,
      plane,
      version: '0',
      log,
      servesRoot: () => true,
      onShutdown: () => {},
      ...offered,
    });
  }

  async function events(signal = AbortSignal.timeout(10_000)): Promise<PullEvent[]> {
    const seen: PullEvent[] = [];
    for await (const event of pullImage(address, REQUEST, signal)) seen.push(event);
    return seen;
  }

  function failure(code: ErrorCode, message: RegExp, hint: RegExp) {
    return (error: unknown) =>
      error instanceof DedupError && error.code === code && message.test(error.message) && hint.test(error.hint ?? '');
  }

  test('the request arrives with its values, and events come back with theirs', async () => {
    const layers = Array.from({ length: 200 }, (_, number) => ({
      digest: `sha256:${String(number).padStart(64, '0')}`,
      size: number * 2 ** 40,
    }));
    let asked: unknown;
    await serve(async (request, show) => {
      asked = request;
      show({ resolved: { name: 'n', manifest: 'm', layers } });
      show({ step: { layer: 0, state: 'fetching', bytes: 2 ** 45 + 1 } });
      show({ step: { layer: 199, state: 'lazy', bytes: 0 } });
    });
    assert.deepEqual(await events(), [
      { kind: 'resolved', name: 'n', manifest: 'm', layers },
      { kind: 'step', layer: 0, state: 'fetching', bytes: 2 ** 45 + 1 },
      { kind: 'step', layer: 199, state: 'lazy', bytes: 0 },
    ]);
    assert.deepEqual(asked, {
      protocol: 2,
      reference: REQUEST.reference,
      platform: '',
      credentials: 'alice:secret',
      containerd_address: '/run/c.sock',
      namespace: 'ns',
      snapshotter: 'dedup',
      lease_ms: 86_400_000,
      stop: false,
    });
  });

  test('an error keeps its code, its words in any script, and what to do about it', async () => {
    await serve(async (_request, show) => {
      show({ step: { layer: 1, state: 'unpacked', bytes: 0 } });
      throw new DedupError('REGISTRY_AUTH', 'nö: 100 %\n[x]', { hint: 'geh weg – 走' });
    });
    await assert.rejects(events(), failure('REGISTRY_AUTH', /^nö: 100 %\n\[x\]$/, /^geh weg – 走$/));
    await server?.close();
    await serve(async () => {
      throw new DedupError('NOT_FOUND', 'at once');
    });
    await assert.rejects(events(), failure('NOT_FOUND', /^at once$/, /^$/));
  });

  test('an abort reaches the pull, and the call ends only when the pull has', async () => {
    let over = false;
    let begun = (): void => {};
    const beginning = new Promise<void>((resolve) => (begun = resolve));
    await serve(async (_request, _show, signal) => {
      begun();
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      await new Promise((resolve) => setTimeout(resolve, 50));
      over = true;
      throw signal.reason;
    });
    const abort = new AbortController();
    const pull = events(abort.signal);
    void beginning.then(() => abort.abort());
    await assert.rejects(pull, failure('CANCELLED', /interrupted/, /^$/));
    assert.equal(over, true);
  });

  test('one who leaves without a word ends the pull, too', async () => {
    const ended = Promise.withResolvers<unknown>();
    await serve(async (_request, show, signal) => {
      show({ step: { layer: 0, state: 'unpacking', bytes: 0 } });
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      ended.resolve(signal.reason);
      throw signal.reason;
    });
    for await (const _event of pullImage(address, REQUEST, AbortSignal.timeout(10_000))) break;
    assert.ok(failure('CANCELLED', /client has gone/, /^$/)(await ended.promise));
  });

  test('a daemon that is not there, one that stops, and one that cannot pull are told apart', async () => {
    await assert.rejects(
      events(),
      (error: unknown) => failure('UNAVAILABLE', /does not answer/, /./)(error) && isUnreached(error),
    );
    await serve();
    await assert.rejects(events(), failure('UNIMPLEMENTED', /older version/, /restart/));
    await server?.close();
    await serve(async (_request, show, signal) => {
      show({ step: { layer: 0, state: 'unpacking', bytes: 0 } });
      setImmediate(() => void server?.close());
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      throw signal.reason;
    });
    await assert.rejects(events(), failure('CANCELLED', /dedupd is stopping/, /^$/));
  });
});

function isUnreached(error: unknown): boolean {
  return error instanceof DedupError && error.details.reached === false;
}
