// Warm-up without a registry: what it keeps while it goes on, what it refuses, and how it waits for a registry that is away. What it
// fetches is tested on a whole node, test/integration/warm-up.test.ts.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { pino } from 'pino';
import { type Config, parseConfig } from '../../src/config.ts';
import { DedupError, errorCode } from '../../src/errors.ts';
import type { LayerRecord } from '../../src/fs/chunks/index-protocol.ts';
import type { Repository } from '../../src/fs/registry/blob-reader.ts';
import { WarmList } from '../../src/prefetch/warm-list.ts';
import { isConfigured, WarmUp } from '../../src/prefetch/warm-up.ts';

const REQUEST = {
  reference: 'r.example/app:1',
  platform: '',
  credentials: '',
  all: false,
  bytes_per_second: 0,
  keep_ms: 0,
};
const coded = (code: string) => (error: unknown) => errorCode(error) === code;

describe('warm-up', () => {
  let dir: string;
  let lines: { level: number; msg: string }[];
  let stop: AbortController;
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'warm-up-'));
    lines = [];
    stop = new AbortController();
  });
  afterEach(() => rmSync(dir, { recursive: true }));

  function made(
    settings: Partial<Config['warm_up']> = {},
    more: {
      getManifest?: () => Promise<never>;
      sleep?: (ms: number) => Promise<void>;
    } = {},
  ) {
    const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
    const whole = parseConfig({ warm_up: settings }).warm_up;
    const list = new WarmList({ file: join(dir, 'warm.json'), isConfigured: (name) => isConfigured(whole, name), log });
    const never = (): never => assert.fail('not reached');
    const getManifest = more.getManifest ?? (() => Promise.reject(new DedupError('REGISTRY_NOT_FOUND', 'gone')));
    const warmUp = new WarmUp({
      repository: () => ({ getManifest }) as unknown as Repository,
      remember: never,
      scopeOf: () => '',
      known: never,
      find: ({ digest }) => (digest === 'sha256:known' ? ({ id: 7 } as LayerRecord) : undefined),
      mountable: never,
      prebuild: never,
      prefetch: { plan: never, scheduler: never as never },
      loader: { maps: never, ensure: never, readHere: never },
      isPresent: never,
      list,
      settings: whole,
      registryTraces: true,
      stop: stop.signal,
      log,
      ...(more.sleep === undefined ? {} : { sleep: more.sleep }),
    });
    return { warmUp, list };
  }

  const entry = (reference: string) => ({
    reference,
    platform: 'linux/amd64',
    layers: ['sha256:known', 'sha256:gone'].map((digest) => ({ digest, index: '', scope: '' })),
    untilMs: Date.now() + 60_000,
  });

  it('keeps those layers of its list that are here', () => {
    const { warmUp, list } = made();
    assert.deepEqual([...warmUp.kept()], []);
    list.put(entry('r.example/app:1'));
    assert.deepEqual([...warmUp.kept()], [7]);
  });

  it('says that there is no such image, and does not remember credentials for it', async () => {
    const { warmUp } = made();
    const warming = warmUp.warm({ ...REQUEST, credentials: 'a:b' }, () => {}, stop.signal);
    await assert.rejects(warming, coded('NOT_FOUND'));
    await assert.rejects(
      warmUp.warm({ ...REQUEST, reference: 'A B' }, () => {}, stop.signal),
      coded('INVALID_REFERENCE'),
    );
  });

  it('is cancelled by name', async () => {
    const { warmUp } = made({}, { getManifest: () => Promise.reject(new Error('aborted')) });
    const gone = AbortSignal.abort(new DedupError('CANCELLED', 'the client has gone'));
    await assert.rejects(
      warmUp.warm(REQUEST, () => {}, gone),
      coded('CANCELLED'),
    );
  });

  it('forgets all of the names given, or none', () => {
    const { warmUp, list } = made({ images: ['r.example/own'] });
    list.put(entry('r.example/app:1'));
    assert.throws(() => warmUp.forget(['r.example/app:1', 'r.example/other:1']), coded('NOT_FOUND'));
    assert.throws(() => warmUp.forget(['r.example/app:1', 'r.example/own:latest']), coded('FAILED_PRECONDITION'));
    assert.equal(warmUp.listed().length, 1);
    assert.equal(warmUp.forget(['r.example/app:1']), 1);
    assert.deepEqual(warmUp.listed(), []);
  });

  it('tries images of the configuration again with growing delay, and complains once', async () => {
    const delays: number[] = [];
    const { warmUp } = made(
      { images: ['r.example/app:1', 'not an image'] },
      {
        sleep: async (ms) => {
          delays.push(ms);
          if (delays.length < 12) return;
          stop.abort();
          throw new Error('stopped');
        },
      },
    );
    await warmUp.keepConfigured();
    assert.deepEqual(delays.slice(0, 4), [5_000, 10_000, 20_000, 40_000]);
    assert.equal(delays.at(-1), 1_800_000);
    assert.equal(lines.filter(({ level }) => level >= 40).length, 2, 'one warning an image');
  });
});
