// Access traces on a whole node: what a start has read is there before the next one reads it; and no trace, however it came
// about, changes a byte or stops a container.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Digest, digestOf } from '../../src/digest.ts';
import { type AccessTrace, formatTrace, MAX_EVENTS, parseTrace, traceId } from '../../src/prefetch/access-trace.ts';
import { waitFor } from '../support/containerd.ts';
import { busyboxEntries, type LayerSource, type TestImage } from '../support/images.ts';
import { LazyNode, noise, type PublishedImage } from '../support/lazy-node.ts';

const FILE_BYTES = 256 * 1024;
const FILES = 60;
/** Every fifth file: each in spans of its own. */
const READ = [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55];

const content = (seed: string, i: number): Buffer => noise(FILE_BYTES, `${seed} ${i}`);

/** A layer with many files below /`directory`. */
function data(directory: string, seed: string): LayerSource {
  const files = Array.from({ length: FILES }, (_, i) => ({ name: `${directory}/f${i}`, content: content(seed, i) }));
  return { entries: [{ name: `${directory}/`, type: 'dir' as const }, ...files] };
}

const layersOf = async (...more: LayerSource[]): Promise<LayerSource[]> => [
  { entries: await busyboxEntries(['sh', 'sha256sum', 'cat', 'sleep']) },
  ...more,
];

/** A start: reads some files, in this order. */
const script = (directory: string): string => `sha256sum ${READ.map((i) => `/${directory}/f${i}`).join(' ')}`;

/** What it prints. */
const printed = (directory: string, seed: string): string =>
  READ.map((i) => `${createHash('sha256').update(content(seed, i)).digest('hex')}  /${directory}/f${i}\n`).join('');

const idOf = (image: TestImage): string => traceId(image.layers.map(({ digest }) => digest as Digest));

describe('access traces', () => {
  let node: LazyNode;
  let app: PublishedImage;

  before(async () => {
    node = await LazyNode.start();
    app = await node.publish('team/app', await layersOf(data('data', 'one')));
  });
  after(() => node?.stop());

  const directory = (of = node): string => join(of.product.root, 'traces');

  function traceOf(image: TestImage, of = node): AccessTrace | undefined {
    const end = `-${idOf(image).slice(0, 16)}.trace`;
    const names = (() => {
      try {
        return readdirSync(directory(of));
      } catch {
        return []; // Not made yet.
      }
    })();
    for (const name of names.filter((file) => file.endsWith(end))) {
      try {
        return parseTrace(readFileSync(join(directory(of), name), 'latin1'), name);
      } catch {
        // What a test has put there.
      }
    }
    return undefined;
  }

  /** Waits for the trace of an image with so many runs. */
  async function recorded(image: TestImage, runs: number, of = node): Promise<AccessTrace> {
    await waitFor(`${runs} runs in the trace`, () => (traceOf(image, of)?.runs ?? 0) >= runs, 40_000);
    return traceOf(image, of)!;
  }

  /** Waits until nothing more is asked of the registry. */
  async function quiet(image: TestImage): Promise<number> {
    for (let last = -1; ; ) {
      const requests = node.layerRequests(image);
      if (requests === last) return requests;
      last = requests;
      await sleep(700);
    }
  }

  async function remove(reference: string, of = node): Promise<void> {
    await of.containerd.ctr(['image', 'rm', '--sync', reference]);
    await of.collect();
  }

  const readOf = (trace: AccessTrace, path: string) => trace.events.filter((event) => event.path === path);

  let firstRequests = 0;

  test('a start leaves a trace of the files that it read, in order, and how they were met', async () => {
    const { image, lazy } = app;
    await node.rpull(lazy);
    node.proxy.reset();
    const { stdout } = await node.runScript(lazy, script('data'));
    assert.equal(stdout, printed('data', 'one'));
    firstRequests = node.layerRequests(image);
    assert.ok(firstRequests > 0);
    const trace = await recorded(image, 1);
    assert.equal(trace.repository, `${node.proxy.host}/team/app`);
    assert.equal(trace.tag, 'lazy');
    assert.equal(trace.seesHits, true);
    const times = READ.map((i) => {
      const events = readOf(trace, `data/f${i}`);
      assert.ok(events.length > 0, `f${i}`);
      assert.equal(
        events.reduce((sum, { length }) => sum + length, 0),
        FILE_BYTES,
      );
      assert.ok(
        events.some(({ outcome }) => outcome !== 'hit'),
        `f${i} was here before it was read`,
      );
      return events[0]!.atMs;
    });
    assert.deepEqual(
      times,
      times.toSorted((a, b) => a - b),
    );
    assert.deepEqual(readOf(trace, 'data/f3'), []);
    assert.ok(readOf(trace, 'bin/busybox').length > 0);
  });

  test('its reads are here when the image is pulled again, and the start asks for nothing', async () => {
    const { image, lazy } = app;
    await remove(lazy);
    assert.equal(node.indexCount('SELECT COUNT(*) FROM layers'), 0);
    node.proxy.reset();
    await node.rpull(lazy);
    const ahead = await quiet(image);
    assert.ok(node.product.log().includes('a trace is replayed'));
    const { stdout } = await node.runScript(lazy, script('data'));
    assert.equal(stdout, printed('data', 'one'));
    assert.equal(node.layerRequests(image), ahead, 'the start waits for nothing');
    assert.ok(ahead < firstRequests, `${ahead} requests instead of ${firstRequests}`);
    const trace = await recorded(image, 2);
    for (const i of READ) {
      const events = readOf(trace, `data/f${i}`);
      assert.ok(
        events.every(({ outcome, count }) => outcome === 'ahead' && count === 2),
        `f${i}`,
      );
    }
  });

  test('another version of the image starts by the trace of this one: same chunks, and changed files by their names', async () => {
    const before = await node.publish('team/two', await layersOf(data('data', 'base'), data('top', 'old')));
    const both = `${script('data')}; ${script('top')}`;
    await node.rpull(before.lazy);
    await node.runScript(before.lazy, both);
    await recorded(before.image, 1);
    await remove(before.lazy);
    const later = await node.publish('team/two', await layersOf(data('data', 'base'), data('top', 'new')));
    node.proxy.reset();
    await node.rpull(later.lazy);
    const ahead = await quiet(later.image);
    assert.ok(node.product.log().includes('the trace of another version is replayed'));
    const { stdout } = await node.runScript(later.lazy, both);
    assert.equal(stdout, printed('data', 'base') + printed('top', 'new'));
    const asked = node.layerRequests(later.image) - ahead;
    assert.ok(asked <= 2, `${asked} requests by the start`);
    await recorded(later.image, 1);
  });

  test('garbage and hostile traces in the directory do no harm', async () => {
    const victim = await node.publish('team/victim', await layersOf(data('data', 'victim')));
    const layers = victim.image.layers.map(({ digest }) => digest as Digest);
    const short = idOf(victim.image).slice(0, 16);
    const garbage = [
      '',
      '\0'.repeat(5000),
      'dedup-trace 1\nread',
      `dedup-trace 1\nlayer ${layers[0]}\nread 0 zz 0 0 x 1 0\n`,
    ];
    for (const [i, text] of garbage.entries()) writeFileSync(join(directory(), `garbage${i}-${short}.trace`), text);
    mkdirSync(join(directory(), `directory-${short}.trace`));
    const known = traceOf(app.image)!;
    const hostile: AccessTrace = {
      ...known,
      layers,
      repository: `${node.proxy.host}/team/victim`,
      runs: 1,
      updatedMs: Date.now(),
      events: Array.from({ length: MAX_EVENTS }, (_, i) => ({
        atMs: i,
        chunk: i % 2 === 0 ? digestOf(`nobody's ${i}`) : known.events[i % known.events.length]!.chunk,
        offset: i % 3 === 0 ? 32 * 2 ** 20 : 0,
        length: 32 * 2 ** 20,
        outcome: 'miss' as const,
        count: 1,
        path: ['../../../etc/shadow', 'data/f1', '', '/proc/self/mem'][i % 4]!,
        fileOffset: i % 5 === 0 ? Number.MAX_SAFE_INTEGER - 2 ** 30 : 0,
      })),
    };
    writeFileSync(join(directory(), `hostile-${short}.trace`), formatTrace(hostile));
    assert.equal(traceOf(victim.image)?.runs, 1, 'one that is believed');
    const pid = await node.product.daemonPid();
    await node.rpull(victim.lazy);
    const { stdout } = await node.runScript(victim.lazy, script('data'));
    assert.equal(stdout, printed('data', 'victim'));
    assert.equal(await node.product.daemonPid(), pid, 'dedupd lives');
    const trace = await recorded(victim.image, 2);
    assert.ok(trace.events.length <= MAX_EVENTS);
    assert.ok(readOf(trace, 'data/f5').length > 0, 'the run is in it');
  });

  test('dedupd may be killed while it records: no trace is damaged, and the next start is right and recorded', async () => {
    const killed = await node.publish('team/killed', await layersOf(data('data', 'killed')));
    for (let round = 0; round < 3; round++) {
      await node.rpull(killed.lazy);
      const running = node.runScript(killed.lazy, `${script('data')}; sleep 1`, { allowFailure: true });
      await sleep(700 + round * 300);
      process.kill(await node.product.daemonPid(), 'SIGKILL');
      await running;
      await waitFor('the next dedupd', async () => {
        try {
          return (await node.product.daemonPid()) > 0;
        } catch {
          return false;
        }
      });
    }
    for (const name of readdirSync(directory())) {
      if (/^(garbage|directory|hostile)/.test(name) || !name.endsWith('.trace')) continue;
      assert.ok(parseTrace(readFileSync(join(directory(), name), 'latin1'), name).events.length > 0);
    }
    const runs = traceOf(killed.image)?.runs ?? 0;
    await remove(killed.lazy);
    await node.rpull(killed.lazy);
    const { stdout } = await node.runScript(killed.lazy, script('data'));
    assert.equal(stdout, printed('data', 'killed'));
    await recorded(killed.image, runs + 1);
  });

  const others: [string, Record<string, unknown>][] = [
    ['that is not to fetch ahead', { prefetch: { enabled: false } }],
    ['with transport fuse-native', { transport: 'fuse-native', direct_mounts: false }],
  ];
  for (const [what, config] of others) {
    test(`a node ${what} records starts`, async () => {
      await using other = Object.assign(await LazyNode.start({ config }), {
        async [Symbol.asyncDispose]() {
          await (this as unknown as LazyNode).stop();
        },
      });
      const published = await other.publish('team/app', await layersOf(data('data', 'other')));
      for (let run = 1; run <= 2; run++) {
        await other.rpull(published.lazy);
        await sleep(500);
        other.proxy.reset();
        const { stdout } = await other.runScript(published.lazy, script('data'));
        assert.equal(stdout, printed('data', 'other'));
        const requests = other.layerRequests(published.image);
        const trace = await recorded(published.image, run, other);
        assert.equal(trace.seesHits, true);
        const outcomes = new Set(READ.flatMap((i) => readOf(trace, `data/f${i}`).map(({ outcome }) => outcome)));
        if (config.prefetch !== undefined) {
          assert.ok(requests >= READ.length / 2, `${requests} requests by run ${run}`);
          assert.ok(outcomes.has('miss'), [...outcomes].join(' '));
        } else if (run === 2) assert.ok(outcomes.has('ahead') && !outcomes.has('miss'), [...outcomes].join(' '));
        await remove(published.lazy, other);
      }
      assert.equal(other.product.log().includes('a trace is replayed'), config.prefetch === undefined);
    });
  }
});
