import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { BenchResult, ColdStartResult } from '../../../src/bench/result.ts';
import { LAN } from '../../support/link/link.ts';
import { tracesReport } from './report.ts';

const MB = 1e6;
const counters = {
  prefetch_bytes: 10 * MB,
  prefetch_useful_bytes: 7 * MB,
  prefetch_late_bytes: 2 * MB,
  prefetch_wasted_bytes: 1 * MB,
  asked_bytes: 20 * MB,
  asked_present_bytes: 19 * MB,
};

function start(snapshotter: string, totalMs: number, more: Partial<ColdStartResult> = {}): ColdStartResult {
  return {
    snapshotter,
    image: 'interpreter',
    link: LAN.name,
    order: 0,
    pair: 0,
    phases: { pullMs: 100, createMs: 0, runMs: totalMs - 100, totalMs },
    requests: 3,
    wireBytes: 11 * MB,
    processes: [],
    diskBytes: 0,
    requestTimes: [
      { startMs: 0, endMs: 10, bytes: 1000, kind: 'manifest' },
      { startMs: 100, endMs: 200, bytes: 10 * MB, kind: 'layer' },
      { startMs: 100, endMs: 200, bytes: 1 * MB, kind: 'window' },
    ],
    ...more,
  };
}

function result(starts: readonly ColdStartResult[]): BenchResult {
  return {
    format: 'dedup-snapshotter-bench/1',
    startedAt: '2026-01-01T00:00:00Z',
    seed: 1,
    machine: { cores: 2, cpuModel: '', memoryBytes: 0, kernel: '', versions: {} },
    images: [
      {
        name: 'interpreter',
        composition: '',
        compressedBytes: 0,
        uncompressedBytes: 0,
        layers: 1,
        command: [],
        ready: { kind: 'exit' },
      },
    ],
    links: [{ name: LAN.name, tls: false }],
    snapshotters: ['overlayfs', 'dedup', 'dedup-trace', 'dedup-stale'],
    starts,
    floors: [
      {
        image: 'interpreter',
        link: LAN.name,
        roundTripMs: 1,
        bytesPerSecond: 110 * MB,
        controlRoundTrips: 3,
        neededBytes: 9.5 * MB,
        touchedBytes: 8 * MB,
        dependentMisses: 1,
        warmRunMs: 1,
        totalMs: 200,
      },
    ],
    resources: [],
  };
}

/** Cells of the rows of one kind of start, tables one after the other. */
function rows(text: string, snapshotter: string): string[][] {
  return text
    .split('\n')
    .filter((line) => line.includes(`| ${snapshotter} |`))
    .map((line) => line.split(' | '));
}

test('a start that reaches every aim is told so, with its figures', () => {
  const text = tracesReport(result([start('overlayfs', 800), start('dedup-trace', 300, { counters })]), {
    command: 'x',
  });
  const [times, costs] = rows(text, 'dedup-trace');
  assert.deepEqual(times!.slice(4), ['**300 ms**', '1.50', '0.38', '2', '1', '50 %, 100 %', '0.00 s |']);
  assert.deepEqual(costs!.slice(3), [
    '10.0 MB',
    '1.05',
    '1.25',
    '95 %',
    '10.0 MB',
    '20 %',
    '10 %',
    '10 %',
    'reached |',
  ]);
});

test('what is missed is named, and what was not measured is not judged', () => {
  const text = tracesReport(result([start('dedup-trace', 500), start('dedup-stale', 500, { requests: 6, counters })]), {
    command: 'x',
  });
  assert.match(rows(text, 'dedup-trace')[1]!.at(-1)!, /^MISSED: ÷ floor 2\.50, ≤ 2\.00; not measured: present, unused/);
  assert.match(rows(text, 'dedup-stale')[1]!.at(-1)!, /^not measured: requests ÷ without/);
});
