// Indexes of unpacked layers, made from directories that the tests lay out: what is left alone, what is left out, order,
// the same bytes for the same directory, and how a build is held up, ended and kept out of the way.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import {
  appendFileSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { DedupError, type ErrorCode } from '../../../src/errors.ts';
import { buildDirectoryIndex } from '../../../src/fs/directory/build-index.ts';
import { EntryType } from '../../../src/fs/index/layer-index.ts';
import { MiB } from '../../../src/units.ts';
import { conversionOf, convert } from '../../support/converted-layer.ts';
import { noise } from '../../support/feature-tars.ts';

const BATCH_BYTES = 4 * MiB;
/** sched(7). */
const SCHED_IDLE = 5;

let base: string;
let made = 0;

before(async () => {
  base = await mkdtemp(join(tmpdir(), 'directory-'));
});

after(async () => {
  await rm(base, { recursive: true, force: true });
});

/** A new directory like the root of a fresh snapshot. */
function layer(): string {
  const path = join(base, String(made++));
  mkdirSync(path, { mode: 0o755 });
  return path;
}

function setXattr(path: string, name: string, value: string): void {
  execFileSync('setfattr', ['-h', '-n', name, '-v', value, path]);
}

async function assertFails(building: Promise<unknown>, code: ErrorCode, message: RegExp): Promise<void> {
  await assert.rejects(building, (error) => {
    assert.ok(error instanceof DedupError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return true;
  });
}

async function until(what: string, reached: () => boolean): Promise<void> {
  for (const end = Date.now() + 60_000; !reached(); await sleep(10)) assert.ok(Date.now() < end, `never: ${what}`);
}

/** Threads of this process at idle CPU priority. */
function idleThreads(): string[] {
  return readdirSync('/proc/self/task').filter((tid) => {
    // The fields of proc(5) after the name, which may hold anything: the policy is number 41, the name number 2.
    const stat = readFileSync(`/proc/self/task/${tid}/stat`, 'latin1');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[41 - 3]) === SCHED_IDLE;
  });
}

/** Bytes that a thread has got from reads. */
function bytesRead(tid: string): number {
  return Number(/^rchar: (\d+)$/m.exec(readFileSync(`/proc/self/task/${tid}/io`, 'latin1'))![1]);
}

/** A promise that the test settles. */
function holdUp(): { readonly held: Promise<void>; readonly release: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  return { held: promise, release: resolve };
}

const REFUSED: readonly [what: string, inside: (dir: string) => unknown, message: RegExp][] = [
  [
    'content elsewhere',
    (dir) => setXattr(file(dir, 'a/f'), 'trusted.overlay.metacopy', ''),
    /"a\/f" has trusted.overlay.metacopy/,
  ],
  [
    'a redirected directory',
    (dir) => setXattr(directory(dir, 'a/d'), 'trusted.overlay.redirect', '/x'),
    /"a\/d" has trusted.overlay.redirect/,
  ],
  [
    'whiteouts by attribute',
    (dir) => setXattr(directory(dir, 'd'), 'trusted.overlay.opaque', 'x'),
    /"d" has trusted.overlay.opaque/,
  ],
  [
    'a whiteout by attribute',
    (dir) => setXattr(file(dir, 'f'), 'trusted.overlay.whiteout', ''),
    /"f" has trusted.overlay.whiteout/,
  ],
  [
    'an escaped attribute',
    (dir) => setXattr(file(dir, 'f'), 'trusted.overlay.overlay.opaque', 'y'),
    /"f" has trusted.overlay.overlay.opaque/,
  ],
  ['an attribute that images leave out', (dir) => setXattr(file(dir, 'f'), 'trusted.foo', '1'), /"f" has trusted.foo/],
  [
    'one that would instruct overlayfs',
    (dir) => setXattr(file(dir, 'f'), 'user.overlay.opaque', 'y'),
    /"f" has user.overlay.opaque/,
  ],
  ['a name of whiteouts', (dir) => file(dir, 'a/.wh.f'), /"a\/.wh.f" has a name/],
  ['a directory with such a name', (dir) => directory(dir, '.wh..wh.plnk'), /".wh..wh.plnk" has a name/],
  ['a time before 1970', (dir) => execFileSync('touch', ['-d', '@-5', file(dir, 'f')]), /"f" has a time/],
  ['a root of another mode', (dir) => execFileSync('chmod', ['700', dir]), /root has mode 700/],
  ['a root of another owner', (dir) => execFileSync('chown', ['7:8', dir]), /root has .* owner 7:8/],
  ['a root with an attribute', (dir) => setXattr(dir, 'user.a', '1'), /root has user.a/],
];

function file(dir: string, name: string, content: string | Buffer = 'x'): string {
  const path = join(dir, name);
  mkdirSync(join(path, '..'), { recursive: true });
  writeFileSync(path, content);
  return path;
}

function directory(dir: string, name: string): string {
  const path = join(dir, name);
  mkdirSync(path, { recursive: true });
  return path;
}

for (const [what, inside, message] of REFUSED) {
  test(`a layer with ${what} is left alone, and its path is named`, async () => {
    const dir = layer();
    file(dir, 'before', 'content');
    inside(dir);
    await assertFails(convert(dir), 'LAYER_NOT_LAZY', message);
  });
}

test('a layer with a socket is left alone', async () => {
  const dir = layer();
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(join(dir, 'socket'), resolve));
  try {
    await assertFails(convert(dir), 'LAYER_NOT_LAZY', /"socket" is a socket/);
  } finally {
    server.close();
  }
});

test('another file system mounted in the directory is not entered', async () => {
  const dir = layer();
  const mountPoint = directory(dir, 'other');
  execFileSync('mount', ['-t', 'tmpfs', 'none', mountPoint]);
  try {
    await assertFails(convert(dir), 'LAYER_NOT_LAZY', /"other" lies in another file system/);
  } finally {
    execFileSync('umount', [mountPoint]);
  }
});

test('what a layer says to overlayfs becomes what layers say; the rest of it is left out', async () => {
  const dir = layer();
  setXattr(dir, 'trusted.overlay.opaque', 'y');
  setXattr(dir, 'trusted.overlay.impure', 'y');
  setXattr(dir, 'security.selinux', 'label');
  setXattr(directory(dir, 'opaque'), 'trusted.overlay.opaque', 'y');
  setXattr(file(dir, 'opaque/file'), 'trusted.overlay.origin', 'o');
  setXattr(join(dir, 'opaque/file'), 'user.kept', 'k');
  execFileSync('mknod', [join(dir, 'gone'), 'c', '0', '0']);
  // overlayfs makes its whiteouts links of one.
  linkSync(join(dir, 'gone'), join(dir, 'opaque/gone'));
  const { entries } = (await convert(dir)).index;
  assert.deepEqual(entries.name, ['gone', 'opaque', 'opaque/.wh..wh..opq', 'opaque/file', 'opaque/gone']);
  const { charDevice, directory: dirType, file: fileType } = EntryType;
  assert.deepEqual([...entries.type], [charDevice, dirType, fileType, fileType, charDevice]);
  assert.deepEqual(entries.xattrSets, [[{ name: 'user.kept', value: Buffer.from('k') }]]);
  assert.deepEqual(
    [...entries.xattrSet].map((set) => set === 0),
    [false, false, false, true, false],
  );
});

test('entries come parents first, names as bytes in order; links are not followed', async () => {
  const dir = layer();
  file(dir, 'a/x');
  file(dir, 'a-b');
  file(dir, 'B');
  file(dir, '\u00e9/z');
  const invalid = Buffer.concat([Buffer.from(`${dir}/`), Buffer.from([0xff])]);
  writeFileSync(invalid, 'not text');
  symlinkSync('/', join(dir, 'a/root'));
  linkSync(join(dir, 'a/x'), join(dir, 'Z-first'));
  const { entries } = (await convert(dir)).index;
  assert.deepEqual(entries.name, ['B', 'Z-first', 'a', 'a/root', 'a/x', 'a-b', '\xc3\xa9', '\xc3\xa9/z', '\xff']);
  assert.equal(entries.link[entries.name.indexOf('a/root')], '/');
  assert.equal(entries.type[entries.name.indexOf('a/x')], EntryType.hardLink);
  assert.equal(entries.link[entries.name.indexOf('a/x')], 'Z-first');
});

test('an empty directory has an index of nothing', async () => {
  const { index, pieces } = await convert(layer());
  assert.deepEqual([index.entries.count, index.chunks.count, index.spans.count, pieces.length], [0, 0, 0, 0]);
});

test('the same directory, or a copy of it, gives the same bytes, however it is held up', async () => {
  const dir = layer();
  for (let i = 0; i < 40; i++) file(dir, `d${i % 7}/f${i}`, noise(i, i * 40_001));
  file(dir, 'zeros', Buffer.alloc(5 * MiB));
  linkSync(join(dir, 'zeros'), join(dir, 'link'));
  const first = await convert(dir);
  const copy = join(base, String(made++));
  execFileSync('cp', ['-a', dir, copy]);
  const { identity } = conversionOf(dir);
  const slow = await buildDirectoryIndex(
    conversionOf(copy, { identity, onPiece: () => sleep(1), gate: () => sleep(1) }),
  );
  assert.ok(slow.indexBlob.equals(first.indexBlob));
  assert.equal(first.index.layerDigest, identity);
  assert.equal(first.restartBlob.length, 0);
});

test('a directory of 20,000 small files gives the right index', async () => {
  const dir = layer();
  for (let i = 0; i < 200; i++) mkdirSync(join(dir, `d${i}`));
  const contents = new Map<string, string>();
  for (let i = 0; i < 20_000; i++) {
    const name = `d${i % 200}/file-${i}`;
    contents.set(name, `${name}\n`.repeat(i % 97));
    writeFileSync(join(dir, name), contents.get(name)!);
  }
  const { index, pieces } = await convert(dir);
  const { entries } = index;
  assert.equal(entries.count, 20_200);
  let compared = 0;
  for (let i = 0; i < entries.count; i++) {
    if (entries.type[i] !== EntryType.file) continue;
    const content = contents.get(entries.name[i]!)!;
    assert.equal(entries.size[i], content.length);
    // Every chunk here is one piece.
    if (content.length > 0) assert.equal(pieces[entries.firstChunk[i]!]!.bytes.toString(), content);
    compared++;
  }
  assert.equal(compared, 20_000);
});

test('a slow receiver holds up the reading: two batches are on their way at most', async () => {
  const dir = layer();
  for (let i = 0; i < 8; i++) file(dir, `f${i}`, noise(i + 1, 8 * MiB));
  const { held, release } = holdUp();
  let given = 0;
  const onPiece = (): Promise<void> => {
    given++;
    return held;
  };
  const building = buildDirectoryIndex(conversionOf(dir, { onPiece }));
  await until('a piece came', () => given > 0);
  const [tid] = idleThreads();
  await until('two batches were read', () => bytesRead(tid!) >= 2 * BATCH_BYTES);
  await sleep(300);
  // The thread read its own sources, too.
  assert.ok(bytesRead(tid!) < 3 * BATCH_BYTES, `${bytesRead(tid!)} bytes were read`);
  assert.equal(given, BATCH_BYTES / MiB);
  release();
  const { index } = await building;
  assert.equal(given, index.chunks.pieceStart.at(-1));
});

test('only the thread of the build has idle priority, for the processor and the disk', async () => {
  const dir = layer();
  for (let i = 0; i < 3; i++) file(dir, `f${i}`, noise(i + 1, BATCH_BYTES));
  const { held, release } = holdUp();
  const building = buildDirectoryIndex(conversionOf(dir, { onPiece: () => held }));
  await until('a thread is idle', () => idleThreads().length > 0);
  const threads = idleThreads();
  assert.equal(threads.length, 1);
  assert.notEqual(threads[0], String(process.pid));
  assert.equal(execFileSync('ionice', ['-p', threads[0]!], { encoding: 'utf8' }).trim(), 'idle');
  assert.notEqual(execFileSync('ionice', ['-p', String(process.pid)], { encoding: 'utf8' }).trim(), 'idle');
  release();
  await building;
  assert.deepEqual(idleThreads(), []);
});

test('a closed gate lets nothing go on, also where there is no content; progress is told', async () => {
  const dir = layer();
  for (let i = 0; i < 3000; i++) writeFileSync(join(dir, `empty-${i}`), '');
  const first = holdUp();
  let gates = [first];
  const progress: [number, number][] = [];
  const building = buildDirectoryIndex(
    conversionOf(dir, {
      gate: () => gates.at(-1)?.held,
      onProgress: (...done) => progress.push(done),
    }),
  );
  await sleep(200);
  assert.deepEqual([progress.length, idleThreads().length], [0, 0]);
  const second = holdUp();
  gates = [second];
  first.release();
  await until('the first entries were told', () => progress.length > 0);
  await sleep(200);
  assert.deepEqual(progress, [[0, 2048]]);
  gates = [];
  second.release();
  assert.equal((await building).index.entries.count, 3000);
  assert.deepEqual(progress.at(-1), [0, 3000]);
});

test('a cancelled build ends with its thread and leaves no descriptor open', async () => {
  const dir = layer();
  for (let i = 0; i < 4; i++) file(dir, `f${i}`, noise(i + 1, 8 * MiB));
  const descriptors = (): number => readdirSync('/proc/self/fd').length;
  await convert(dir);
  const before = descriptors();
  const started = new AbortController();
  const onPiece = (): undefined => {
    started.abort();
  };
  await assertFails(
    buildDirectoryIndex(conversionOf(dir, { onPiece, signal: started.signal })),
    'CANCELLED',
    /cancelled/,
  );
  const waiting = new AbortController();
  const gate = (): Promise<void> => new Promise(() => setImmediate(() => waiting.abort()));
  await assertFails(buildDirectoryIndex(conversionOf(dir, { gate, signal: waiting.signal })), 'CANCELLED', /cancelled/);
  await assertFails(buildDirectoryIndex(conversionOf(dir, { signal: AbortSignal.abort() })), 'CANCELLED', /cancelled/);
  assert.deepEqual(idleThreads(), []);
  assert.equal(descriptors(), before);
});

test('what the receiver throws ends the build with that error, once all others it was given are done with', async () => {
  const dir = layer();
  for (let i = 0; i < 4; i++) file(dir, `f${i}`, noise(i + 1, 8 * MiB));
  let open = 0;
  const onPiece = async ({ piece }: { readonly piece: number }): Promise<void> => {
    open++;
    await sleep(piece * 20);
    open--;
    if (piece === 1) throw new DedupError('STORE_FULL', 'no room');
  };
  await assertFails(buildDirectoryIndex(conversionOf(dir, { onPiece })), 'STORE_FULL', /no room/);
  assert.deepEqual([open, idleThreads().length], [0, 0]);
});

test('a directory that is not there is not found, one that goes meanwhile neither', async () => {
  await assertFails(convert(join(base, 'missing')), 'NOT_FOUND', /missing/);
  const dir = layer();
  for (let i = 0; i < 5; i++) file(dir, `d${i}/f`, noise(i + 1, BATCH_BYTES));
  const onPiece = (): undefined => {
    if (existsSync(dir)) renameSync(dir, `${dir}-gone`);
  };
  await assertFails(buildDirectoryIndex(conversionOf(dir, { onPiece })), 'NOT_FOUND', /unpacked layer/);
  await assertFails(convert(file(layer(), 'f')), 'INVALID_ARGUMENT', /not a directory/);
  const link = join(base, 'link');
  symlinkSync(layer(), link);
  await assertFails(convert(link), 'INVALID_ARGUMENT', /not a directory/);
});

test('a directory that loses a file, or gets one, while it is read is an error', async () => {
  for (const change of [
    (dir: string): void => rmSync(join(dir, 'd/z')),
    (dir: string): void => void file(dir, 'd/sub/new'),
  ]) {
    const dir = layer();
    for (const name of ['d/a', 'd/b']) file(dir, name, noise(1, 2 * BATCH_BYTES));
    file(dir, 'd/sub/c', noise(1, 6 * BATCH_BYTES));
    file(dir, 'd/z', '');
    let changed = false;
    const onPiece = ({ chunk }: { readonly chunk: number }): undefined => {
      // The first chunk of "c": its directory was read, and its end is further away than what is read ahead.
      if (changed || chunk < 4) return;
      changed = true;
      change(dir);
    };
    await assertFails(
      buildDirectoryIndex(conversionOf(dir, { onPiece })),
      'FAILED_PRECONDITION',
      /"d\/(z" .*went|sub" changed)/,
    );
  }
});

const CHANGES: readonly [what: string, change: (path: string) => void][] = [
  ['grows', (path) => appendFileSync(path, 'more')],
  ['shrinks', (path) => truncateSync(path, 30 * MiB)],
  ['gets other bytes', (path) => utimesSync(path, 1, 1)],
];

for (const [what, change] of CHANGES) {
  test(`a file that ${what} while it is read is an error`, async () => {
    const dir = layer();
    const path = file(dir, 'big', noise(5, 32 * MiB));
    let changed = false;
    const onPiece = (): undefined => {
      if (!changed) change(path);
      changed = true;
    };
    await assertFails(buildDirectoryIndex(conversionOf(dir, { onPiece })), 'FAILED_PRECONDITION', /"big" changed/);
  });
}
