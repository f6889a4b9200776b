// What dedupd exports: that a scraper can read it, that counters only rise, and that docs/metrics.md tells of all of it.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { Metrics, type NumbersNow } from '../src/metrics.ts';
import { parseExposition } from './support/exposition.ts';

/** A different number for each, so that none can stand in another's place. */
const NOW: NumbersNow = {
  hits: 1001,
  misses: 1002,
  failedReads: 1003,
  prefetchUsefulBytes: 1004,
  prefetchLateBytes: 1005,
  prefetchWastedBytes: 1006,
  prefetchUnreadBytes: 1007,
  prefetchQueueSpans: 1008,
  waitingSpans: 1009,
  dataBytes: 1010,
  dataRequests: 1011,
  controlBytes: 1012,
  controlRequests: 1013,
  presentBytes: 1014,
  chunks: 1015,
  imagesMounted: 1016,
  tracesRecorded: 1017,
  tracesReplayed: 1018,
};

/** Every sample by name and labels. */
async function samplesOf(metrics: Metrics): Promise<Map<string, number>> {
  const families = parseExposition(await metrics.text());
  return new Map([...families.values()].flatMap(({ samples }) => [...samples]));
}

describe('the metrics of dedupd', () => {
  test('give every number its own series', async () => {
    const metrics = new Metrics();
    metrics.collect(() => NOW);
    const samples = await samplesOf(metrics);
    const shown = [...samples].filter(([name]) => name.startsWith('dedup_') && !name.startsWith('dedup_read_wait'));
    assert.deepEqual(Object.fromEntries(shown), {
      'dedup_reads_total{result="hit"}': NOW.hits,
      'dedup_reads_total{result="miss"}': NOW.misses,
      'dedup_reads_total{result="failed"}': NOW.failedReads,
      'dedup_prefetch_bytes_total{outcome="useful"}': NOW.prefetchUsefulBytes,
      'dedup_prefetch_bytes_total{outcome="late"}': NOW.prefetchLateBytes,
      'dedup_prefetch_bytes_total{outcome="wasted"}': NOW.prefetchWastedBytes,
      dedup_prefetch_unread_bytes: NOW.prefetchUnreadBytes,
      dedup_prefetch_queue_spans: NOW.prefetchQueueSpans,
      dedup_fetch_waiting_spans: NOW.waitingSpans,
      'dedup_wire_bytes_total{kind="data"}': NOW.dataBytes,
      'dedup_wire_bytes_total{kind="control"}': NOW.controlBytes,
      'dedup_registry_requests_total{kind="data"}': NOW.dataRequests,
      'dedup_registry_requests_total{kind="control"}': NOW.controlRequests,
      dedup_store_present_bytes: NOW.presentBytes,
      dedup_store_chunks: NOW.chunks,
      dedup_images_mounted: NOW.imagesMounted,
      dedup_traces_recorded_total: NOW.tracesRecorded,
      dedup_traces_replayed_total: NOW.tracesReplayed,
    });
  });

  test('have a sentence each, and names as Prometheus asks for', async () => {
    for (const [name, { type, help, samples }] of parseExposition(await new Metrics().text())) {
      assert.match(help, /^[A-Z].{10,}\.$/, name);
      assert.match(name, /^(dedup|process)_/);
      assert.equal(name.endsWith('_total'), type === 'counter', name);
      assert.ok(samples.size > 0, `${name} is there from the first scrape on`);
    }
  });

  test('are 0 as long as nobody gives numbers, so that the first rise is seen', async () => {
    for (const [name, value] of await samplesOf(new Metrics()))
      if (name.startsWith('dedup_')) assert.equal(value, 0, name);
  });

  test('never let a counter fall, and let gauges go both ways', async () => {
    const metrics = new Metrics();
    let now = NOW;
    metrics.collect(() => now);
    await metrics.text();
    now = Object.fromEntries(Object.entries(NOW).map(([key, value]) => [key, value - 500])) as unknown as NumbersNow;
    const lower = await samplesOf(metrics);
    assert.equal(lower.get('dedup_wire_bytes_total{kind="control"}'), NOW.controlBytes);
    assert.equal(lower.get('dedup_traces_recorded_total'), NOW.tracesRecorded);
    assert.equal(lower.get('dedup_store_present_bytes'), NOW.presentBytes - 500);
    now = { ...NOW, hits: NOW.hits + 7, controlBytes: undefined };
    const later = await samplesOf(metrics);
    assert.equal(later.get('dedup_reads_total{result="hit"}'), NOW.hits + 7);
    assert.equal(later.get('dedup_wire_bytes_total{kind="control"}'), NOW.controlBytes);
  });

  test('show each wait in the buckets above it, in seconds', async () => {
    const metrics = new Metrics();
    for (const ms of [0.4, 30, 30, 70_000]) metrics.waited(ms);
    const samples = await samplesOf(metrics);
    const upTo = (le: string): number | undefined => samples.get(`dedup_read_wait_seconds_bucket{le="${le}"}`);
    assert.deepEqual([upTo('0.001'), upTo('0.025'), upTo('0.05'), upTo('60'), upTo('+Inf')], [1, 1, 3, 3, 4]);
    assert.equal(samples.get('dedup_read_wait_seconds_count'), 4);
    assert.ok(Math.abs(samples.get('dedup_read_wait_seconds_sum')! - 70.0604) < 1e-9);
  });

  test('tell what the process itself uses', async () => {
    const metrics = new Metrics();
    const samples = await samplesOf(metrics);
    assert.ok(samples.get('process_resident_memory_bytes')! > 1e7);
    assert.ok(samples.get('process_open_fds')! > 2);
    assert.ok(Math.abs(samples.get('process_start_time_seconds')! + performance.now() / 1000 - Date.now() / 1000) < 5);
    const cpu = samples.get('process_cpu_seconds_total')!;
    assert.ok(cpu > 0 && (await samplesOf(metrics)).get('process_cpu_seconds_total')! >= cpu);
  });

  test('are asked for once by scrapes that come together, and anew by the next', async () => {
    const metrics = new Metrics();
    let asked = 0;
    metrics.collect(async () => ({ ...NOW, hits: ++asked }));
    const [one, two] = await Promise.all([metrics.text(), metrics.text()]);
    assert.equal(one, two);
    assert.equal(asked, 1);
    assert.equal((await samplesOf(metrics)).get('dedup_reads_total{result="hit"}'), 2);
  });

  test('fail with the error of whoever gives the numbers, once', async () => {
    const metrics = new Metrics();
    metrics.collect(() => Promise.reject(new Error('closed')));
    await assert.rejects(metrics.text(), /closed/);
    metrics.collect(() => NOW);
    assert.equal((await samplesOf(metrics)).get('dedup_store_chunks'), NOW.chunks);
  });

  test('are described in docs/metrics.md, all of them with their type and labels, and no other', async () => {
    const page = readFileSync(join(import.meta.dirname, '..', 'docs', 'metrics.md'), 'utf8');
    const rows = new Map(
      [...page.matchAll(/^\| `(\w+)(?:\{(\w+)="([\w\\|]+)"\})?` \| (\w+) \| (.+) \|$/gm)].map(
        ([, name, label, values, type]) => [name!, { label, values: values?.split('\\|') ?? [], type }],
      ),
    );
    const families = parseExposition(await new Metrics().text());
    assert.deepEqual([...rows.keys()].sort(), [...families.keys()].sort());
    for (const [name, { type, samples }] of families) {
      const row = rows.get(name)!;
      assert.equal(row.type, type, name);
      if (type === 'histogram') continue;
      const series = row.label === undefined ? [name] : row.values.map((value) => `${name}{${row.label}="${value}"}`);
      assert.deepEqual([...samples.keys()].sort(), series.sort(), name);
    }
  });
});
