// The directory of traces: what is written is found again, what is damaged or somebody else's is passed over.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { errorCode } from '../../src/errors.ts';
import { type AccessTrace, traceId } from '../../src/prefetch/access-trace.ts';
import { TraceStore } from '../../src/prefetch/trace-store.ts';

function trace(name: string, more: Partial<AccessTrace> = {}): AccessTrace {
  const event = { atMs: 0, chunk: digestOf(name), offset: 0, length: 65536, count: 1, path: 'bin/sh', fileOffset: 0 };
  const events = [{ ...event, outcome: 'miss' as const }];
  const layers = [digestOf(`layer of ${name}`)];
  const rest = { repository: 'registry.example/team/app', tag: name, manifest: '', runs: 1, seesHits: true };
  return { layers, ...rest, updatedMs: 1_000, events, ...more };
}

describe('trace store', () => {
  const root = mkdtempSync(join(tmpdir(), 'dedup-traces-'));
  after(() => rmSync(root, { recursive: true, force: true }));

  it('finds by image what was saved, lists the latest first and removes it', async () => {
    const store = new TraceStore(join(root, 'a'));
    assert.deepEqual(await store.list(), []);
    const [old, fresh] = [trace('1.0'), trace('2.0', { updatedMs: 2_000 })];
    await store.save(old);
    const path = await store.save(fresh);
    assert.match(path, /registry\.example_team_app_2\.0-[0-9a-f]{16}\.trace$/);
    assert.deepEqual(await store.load(traceId(fresh.layers)), fresh);
    assert.deepEqual(
      (await store.list()).map(({ tag }) => tag),
      ['2.0', '1.0'],
    );
    assert.equal(await store.remove(traceId(fresh.layers)), true);
    assert.equal(await store.remove(traceId(fresh.layers)), false);
    assert.equal(await store.load(traceId(fresh.layers)), undefined);
  });

  it('keeps one file an image, under the name it was pulled by last', async () => {
    const store = new TraceStore(join(root, 'b'));
    await store.save(trace('1.0'));
    await store.save({ ...trace('1.0'), tag: 'latest' });
    assert.equal(readdirSync(store.directory).length, 1);
    assert.equal((await store.list())[0]!.tag, 'latest');
  });

  it('passes over files that are no traces, and says so to who names one', async () => {
    const store = new TraceStore(join(root, 'c'));
    const path = await store.save(trace('1.0'));
    writeFileSync(path, 'dedup-trace 1\ngarbage');
    writeFileSync(join(store.directory, 'notes.trace'), 'mine');
    assert.deepEqual(await store.list(), []);
    assert.equal(await store.load(traceId(trace('1.0').layers)), undefined);
    await assert.rejects(store.read(path), (error) => errorCode(error) === 'TRACE_INVALID');
    await assert.rejects(store.read(join(root, 'nowhere')), (error) => errorCode(error) === 'STORE_IO');
  });

  it('waits for nothing that is no file, and finds its trace beside a directory of such a name', {
    timeout: 10_000,
  }, async () => {
    const store = new TraceStore(join(root, 'd'));
    const path = await store.save(trace('1.0'));
    const id = traceId(trace('1.0').layers);
    rmSync(path);
    execFileSync('mkfifo', [path, join(store.directory, 'pipe.trace')]);
    assert.equal(await store.load(id), undefined);
    assert.deepEqual(await store.list(), []);
    rmSync(path);
    mkdirSync(join(store.directory, `before-${id.slice(0, 16)}.trace`));
    await store.save(trace('1.0'));
    assert.notEqual(await store.load(id), undefined);
  });

  it('clears away what a killed writer left, and leaves one that writes alone', async () => {
    const store = new TraceStore(join(root, 'e'));
    const path = await store.save(trace('1.0'));
    const [dead, alive] = [`${path}.tmp-1-0`, `${path}.tmp-2-0`];
    for (const file of [dead, alive]) writeFileSync(file, 'dedup-trace 1');
    utimesSync(dead, 1, 1);
    await store.save(trace('1.0'));
    assert.deepEqual([existsSync(dead), existsSync(alive)], [false, true]);
    assert.equal((await store.list()).length, 1);
  });
});
