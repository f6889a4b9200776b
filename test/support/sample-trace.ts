// Access traces for tests of drawings and verbs: one like the start of a Python program, the same at every call.
import { digestOf } from '../../src/digest.ts';
import type { AccessTrace, Outcome, TraceEvent } from '../../src/prefetch/access-trace.ts';
import { KiB } from '../../src/units.ts';

const OUTCOME_AT: readonly Outcome[] = [
  'ahead',
  'ahead',
  'ahead',
  'late',
  'miss',
  'hit',
  'ahead',
  'miss',
  'ahead',
  'hit',
];

/** A trace of `name`, with events of the caller's or none. */
export function traceOf(name: string, events: readonly Partial<TraceEvent>[] = [], more: Partial<AccessTrace> = {}) {
  const trace: AccessTrace = {
    layers: [digestOf(`layer of ${name}`)],
    repository: 'registry.example/team/app',
    tag: name,
    manifest: '',
    runs: 1,
    updatedMs: Date.UTC(2025, 0, 2, 3, 4, 5),
    seesHits: true,
    events: events.map((event, at) => ({
      atMs: at,
      chunk: digestOf(event.path ?? 'chunk'),
      offset: 0,
      length: 64 * KiB,
      outcome: 'miss',
      count: 1,
      path: '',
      fileOffset: event.offset ?? 0,
      ...event,
    })),
    ...more,
  };
  return trace;
}

/** About 500 reads over two seconds: a large binary, libraries, many small modules, and a database read at the end. */
export function pythonStart(): AccessTrace {
  const events: Partial<TraceEvent>[] = [];
  let number = 0;
  const read = (path: string, atMs: number, offset: number, length: number, outcome?: Outcome): void => {
    number++;
    const usual = OUTCOME_AT[(number * 7 + (number >> 3)) % OUTCOME_AT.length]!;
    events.push({ path, atMs: Math.round(atMs), offset, fileOffset: offset, length, outcome: outcome ?? usual });
  };
  for (let i = 0; i < 40; i++) read('usr/local/bin/python3.12', 2 + i * 6, ((i * 17) % 64) * 128 * KiB, 64 * KiB);
  for (let i = 0; i < 24; i++) read('usr/lib/x86_64-linux-gnu/libc.so.6', 12 + i * 4, i * 64 * KiB, 64 * KiB, 'ahead');
  for (let i = 0; i < 8; i++) read('usr/lib/x86_64-linux-gnu/libm.so.6', 20 + i * 5, i * 64 * KiB, 64 * KiB);
  for (let i = 0; i < 180; i++) {
    const name = i % 9 === 0 ? `encodings/codec${i}.pyc` : `asyncio/part${i}.pyc`;
    read(`usr/local/lib/python3.12/${name}`, 120 + i * 5 + (i % 7), 0, (4 + ((i * 13) % 28)) * KiB);
  }
  for (let i = 0; i < 60; i++) read('usr/lib/x86_64-linux-gnu/libcrypto.so.3', 700 + i * 7, i * 64 * KiB, 64 * KiB);
  for (let i = 0; i < 120; i++)
    read(`app/venv/lib/site-packages/django/core/module_${i}.py`, 900 + i * 7, 0, (8 + ((i * 5) % 40)) * KiB);
  for (let i = 0; i < 90; i++)
    read('app/data/köln <&> "catalogue".db', 1500 + i * 5, i * 96 * KiB, 64 * KiB, i % 3 ? 'miss' : 'late');
  for (let i = 0; i < 6; i++) read('', 1800 + i * 30, i * 64 * KiB, 64 * KiB, 'hit');
  const latin1 = events.map((event) => ({ ...event, path: Buffer.from(event.path ?? '', 'utf8').toString('latin1') }));
  return traceOf(
    '3.12',
    latin1.toSorted((a, b) => a.atMs! - b.atMs!),
    { runs: 4 },
  );
}
