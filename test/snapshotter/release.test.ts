// What removed images used is released in the end: after a dedupd that was away, a node that was never quiet, layers that
// somebody was expected to use, and a service that ended in between. And on a quiet node nothing is asked.
import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Logger, pino } from 'pino';
import { digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { requestCleanup } from '../../src/snapshotter/cleanup-client.ts';
import { Gate } from '../../src/snapshotter/gate.ts';
import { Release } from '../../src/snapshotter/release.ts';
import { refused } from '../suites/snapshotter.ts';
import { waitFor } from '../support/containerd.ts';
import { FakeImages } from '../support/fake-images.ts';
import { TestService } from '../support/snapshots-service.ts';

const REF = 'containerd.io/snapshot.ref';
const NOT_YET = /not released yet/;

let dir: string;
let images: FakeImages;
let lines: { msg: string; level: number }[];
let log: Logger;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'release-'));
  images = new FakeImages(dir);
  await images.addLayer(digestOf('a'), 'a');
  lines = [];
  log = pino({ level: 'info' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
});
afterEach(() => rm(dir, { recursive: true }));

const told = (text: RegExp) => lines.filter(({ msg }) => text.test(msg)).length;

describe('what a removed image used', () => {
  let service: TestService;

  beforeEach(async () => {
    service = await TestService.start({ images, log, cleanupDelayMs: 50 });
    await waitFor('the pass of the start', () => images.retained.length === 1);
  });
  afterEach(() => service.stop());

  /** A remote snapshot as containerd's pull makes one; answers its name. */
  async function pull(): Promise<string> {
    const labels = {
      [REF]: digestOf('chain a'),
      'containerd.io/snapshot/cri.layer-digest': digestOf('a'),
      'containerd.io/snapshot/cri.image-ref': 'registry.test/app:1',
    };
    await refused(service.client.prepare('ns/1/extract-a', '', labels), 'alreadyExists');
    return (await service.client.names())[0] ?? '';
  }
  const isReleased = () => images.retained.length > 0 && images.retained.at(-1)?.length === 0;

  test('is released when dedupd is back, without a further call', async () => {
    await service.client.remove(await pull());
    images.retained.length = 0;
    images.down = true;
    await service.client.cleanup();
    await sleep(100); // The timer of Remove has come and gone as well.
    images.down = false;
    await waitFor('the repeat', isReleased, 4_000);
    assert.equal(told(NOT_YET), 1);
    assert.equal(told(/is released now/), 1);
    // And that was that.
    const { length } = images.retained;
    await sleep(1_500);
    assert.equal(images.retained.length, length);
  });

  test('is released by the next service when dedupd was away until this one ended', async () => {
    await service.client.remove(await pull());
    images.retained.length = 0;
    images.down = true;
    await service.client.cleanup();
    await service.restart();
    await sleep(50);
    images.down = false;
    await waitFor('the pass of the start', isReleased, 4_000);
  });

  test('is released once dedupd expects nobody any more, whatever containerd asks for until then', async () => {
    await service.client.remove(await pull());
    images.retained.length = 0;
    images.waiting.push({ waiting: 1, againMs: 300 }, { waiting: 1, againMs: 200 });
    await service.client.cleanup();
    await service.client.cleanup();
    assert.equal(images.retained.length, 2);
    const askedMs = performance.now();
    await waitFor('the end of the moment', () => images.retained.length === 3, 2_000);
    const pauseMs = performance.now() - askedMs;
    assert.ok(pauseMs > 150, `asked again after ${pauseMs} ms`);
    await sleep(500);
    assert.equal(images.retained.length, 3, 'nothing waits any more');
    assert.equal(told(NOT_YET), 0);
  });

  test('is said not to be released to whoever asks for it, and containerd is answered all the same', async () => {
    assert.equal(await requestCleanup(service.address), undefined);
    images.down = true;
    assert.equal(await requestCleanup(service.address), 'the fake is down');
    await service.client.cleanup();
    images.down = false;
    assert.equal(await requestCleanup(service.address), undefined);
  });

  test('is not even asked for while a lost metadata.db is not whole again', async () => {
    await service.client.prepare('key');
    await service.down();
    await writeFile(join(service.paths.snapshot(1), 'info.json'), '{}');
    for (const end of ['', '-wal', '-shm']) await rm(service.paths.metadataDb + end, { force: true });
    images.retained.length = 0;
    await service.up();
    assert.match((await requestCleanup(service.address)) ?? '', /lost metadata\.db/);
    await sleep(1_200);
    assert.equal(images.retained.length, 0);
  });
});

describe('a release', () => {
  let gate: Gate;
  let release: Release;
  let attempts: number[];

  beforeEach(() => {
    gate = new Gate();
    attempts = [];
    const metastore = {
      protectedUpTo: async () => 0,
      inUse: async () => ({ mountIds: [], layers: [] }),
      untoldSources: async () => [],
      addSource: async () => {},
    };
    const answers = images.answers.bind(images);
    images.answers = async () => {
      attempts.push(performance.now());
      await answers();
    };
    release = new Release({ metastore, images, gate, log, firstPauseMs: 40, gatePatienceMs: 30 });
  });
  afterEach(() => release.close());

  test('is tried again with growing pauses, its failure told once for each cause', async () => {
    images.down = true;
    assert.equal(await release.now(), 'the fake is down');
    await waitFor('some attempts', () => attempts.length === 4);
    const pauses = attempts.slice(1).map((atMs, i) => atMs - attempts[i]!);
    for (const [i, pause] of pauses.entries()) assert.ok(pause >= 40 * 2 ** i - 2, `pauses of ${pauses} ms`);
    assert.equal(told(NOT_YET), 1);
    let late = 0;
    images.answers = async () => {
      throw new DedupError('DEADLINE', `no answer for ${++late} ms`);
    };
    await waitFor('the second cause', () => told(NOT_YET) === 2);
    await release.now();
    assert.equal(told(NOT_YET), 2);
    images.answers = async () => void attempts.push(performance.now());
    images.down = false;
    assert.equal(await release.now(), undefined);
    // The next one begins with short pauses again.
    images.down = true;
    const { length } = attempts;
    images.releaseImages = async () => {
      throw new DedupError('UNAVAILABLE', 'gone again');
    };
    await release.now();
    await waitFor('the repeat', () => attempts.length > length + 1, 500);
  });

  test('that finds no quiet moment is tried again, and says so', async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const preparing = gate.shared(() => promise);
    assert.match((await release.now()) ?? '', /snapshots were being prepared/);
    assert.equal(told(NOT_YET), 1);
    assert.equal(images.retained.length, 0);
    resolve();
    await preparing;
    await waitFor('the repeat', () => images.retained.length === 1);
  });

  test('asks with growing pauses for layers of which nobody knows how long they stay, and never after its end', async () => {
    images.waiting.push(...Array.from({ length: 100 }, () => ({ waiting: 2, againMs: 0 })));
    assert.equal(await release.now(), undefined);
    await waitFor('some attempts', () => attempts.length === 3);
    assert.ok(attempts[2]! - attempts[1]! >= 78, `${attempts}`);
    await release.close();
    const { length } = attempts;
    await sleep(400);
    assert.match((await release.now()) ?? '', /stopping/);
    assert.equal(attempts.length, length);
  });
});
