// The list of warmed images: what is kept, for how long, and that the next dedupd knows it.
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { pino } from 'pino';
import { WarmList } from '../../src/prefetch/warm-list.ts';

const log = pino({ level: 'silent' });

describe('the list of warmed images', () => {
  let dir: string;
  let file: string;
  let nowMs: number;
  let configured: string[];
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'warm-list-'));
    file = join(dir, 'warm.json');
    nowMs = 1_000_000;
    configured = [];
  });
  afterEach(() => rmSync(dir, { recursive: true }));

  const open = () =>
    new WarmList({ file, isConfigured: (reference) => configured.includes(reference), log, now: () => nowMs });
  const entry = (reference: string, untilMs: number, digest = 'sha256:1') => ({
    reference,
    platform: 'linux/amd64',
    layers: [{ digest, index: 'sha256:2', scope: '' }],
    untilMs,
  });
  const names = (list: WarmList) => list.entries().map(({ reference }) => reference);

  it('is empty without a file, and makes none before something is kept', () => {
    assert.deepEqual(open().entries(), []);
    assert.equal(existsSync(file), false);
  });

  it('is the same after a restart', () => {
    open().put(entry('a', nowMs + 1));
    assert.deepEqual(open().entries(), [entry('a', nowMs + 1)]);
  });

  it('forgets what is older than it was to be kept, also on the disk', () => {
    const list = open();
    list.put(entry('a', nowMs + 10));
    list.put(entry('b', nowMs + 20));
    nowMs += 10;
    assert.deepEqual(names(list), ['b']);
    assert.doesNotMatch(readFileSync(file, 'utf8'), /"a"/);
  });

  it('keeps what the configuration names as long as it does, however old', () => {
    configured = ['a'];
    open().put(entry('a', 0));
    nowMs += 1e9;
    assert.deepEqual(names(open()), ['a']);
    configured = [];
    assert.deepEqual(names(open()), []);
  });

  it('takes the layers that came last and the longer of two times', () => {
    const list = open();
    list.put(entry('a', nowMs + 100, 'sha256:old'));
    const kept = list.put(entry('a', nowMs + 50, 'sha256:new'));
    assert.deepEqual(kept, entry('a', nowMs + 100, 'sha256:new'));
    assert.deepEqual(open().entries(), [kept]);
  });

  it('forgets names for every platform, and says how many there were', () => {
    const list = open();
    list.put(entry('a', nowMs + 1));
    list.put({ ...entry('a', nowMs + 1), platform: 'linux/arm64' });
    list.put(entry('b', nowMs + 1));
    assert.equal(list.forget(new Set(['a', 'c'])), 2);
    assert.deepEqual(names(open()), ['b']);
  });

  it('begins anew when the file is damaged', () => {
    writeFileSync(file, '{"images": [{]');
    const list = open();
    assert.deepEqual(list.entries(), []);
    list.put(entry('a', nowMs + 1));
    assert.deepEqual(names(open()), ['a']);
  });
});
