// The `trace` verbs as a person uses them, through the program: on files alone, and against a real registry.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import { selectTrace } from '../../src/cli/trace-selection.ts';
import { digestOf, parseDigest } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { RegistryPool } from '../../src/fs/registry/pool.ts';
import { parseReference } from '../../src/fs/registry/reference.ts';
import { type AccessTrace, formatTrace, traceId } from '../../src/prefetch/access-trace.ts';
import { findTrace } from '../../src/prefetch/trace-artifact.ts';
import { type TraceInfo, TraceStore } from '../../src/prefetch/trace-store.ts';
import { makeImage, makeImageIndex, pushLayout, type TestImage } from '../support/images.ts';
import { RegistryProcess, TEST_LOGIN } from '../support/registry.ts';
import { pythonStart } from '../support/sample-trace.ts';

const PROGRAM = join(import.meta.dirname, '..', '..', 'src', 'dedup-snapshotter.ts');
const signal = AbortSignal.timeout(90_000);

function info(id: string, more: Partial<TraceInfo> = {}): TraceInfo {
  const names = { repository: 'docker.io/library/nginx', tag: 'latest', manifest: '' };
  return { id: id.padEnd(64, '0'), file: `/${id}.trace`, bytes: 1, runs: 1, updatedMs: 0, ...names, ...more };
}

const fails = (word: string, list: readonly TraceInfo[], code: string, hint: RegExp) =>
  assert.throws(
    () => selectTrace(list, word),
    (error) => error instanceof DedupError && error.code === code && hint.test(error.hint ?? ''),
  );

describe('a trace by name', () => {
  const digest = digestOf('manifest');
  const list = [
    info('abcd1'),
    info('abcd2', { repository: 'ghcr.io/cafe/app', tag: '1' }),
    info('0123', { repository: 'docker.io/library/beef', manifest: digest }),
    info('beef', { repository: '', tag: '' }),
  ];

  test('is its ID, the beginning of it, its image by short or full name, or the digest of its manifest', () => {
    for (const [word, at] of [
      ...([
        ['abcd1', 0],
        [list[1]!.id, 1],
        ['0123', 2],
        ['nginx', 0],
        ['docker.io/library/nginx:latest', 0],
      ] as const),
      ...([
        ['ghcr.io/cafe/app:1', 1],
        [`beef@${digest}`, 2],
        [`@${digest}`, 2],
        [digest, 2],
        ['beef', 3],
      ] as const),
    ])
      assert.equal(selectTrace(list, word), list[at], word);
  });

  test('that fits several or none is refused with what to write instead', () => {
    fails('abcd', list, 'INVALID_ARGUMENT', /by its ID: abcd10000000 \(docker\.io.*\), abcd20000000/);
    fails('nginx', [info('1111'), info('2222')], 'INVALID_ARGUMENT', /111100000000 \(.*nginx:latest\), 2222/);
    fails('abc', list, 'NOT_FOUND', /trace ls.*4 of its digits/);
    fails('ghcr.io/cafe/app', list, 'NOT_FOUND', /trace ls/);
    fails('f'.repeat(64), list, 'NOT_FOUND', /trace ls/);
    fails('nginx:', list, 'INVALID_REFERENCE', /tag/);
    fails(`@${digestOf('another')}`, list, 'NOT_FOUND', /trace ls/);
  });
});

describe('trace', () => {
  let dir: string;
  let store: TraceStore;
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'trace-verb-'));
    store = new TraceStore(join(dir, 'traces'));
    const config = { root: join(dir, 'root'), prefetch: { trace_dir: store.directory } };
    writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
  });
  afterEach(() => rmSync(dir, { recursive: true }));

  const verb = (args: readonly string[], input = '') => {
    const words = [PROGRAM, '--config', join(dir, 'config.json'), 'trace', ...args];
    const env = { ...process.env, NO_COLOR: '' };
    const { status, stdout, stderr } = spawnSync(process.execPath, words, { encoding: 'latin1', input, env });
    return { status, stdout, stderr };
  };
  const works = (args: readonly string[], input?: string): string => {
    const { status, stdout, stderr } = verb(args, input);
    assert.equal(status, 0, stderr);
    return stdout;
  };

  test('ls lists the latest first, for people and programs; a damaged file is named as one', async () => {
    assert.equal(works(['ls']), 'ID  REPOSITORY  TAG  RUNS  READS  BYTES  UPDATED\n');
    const python = pythonStart();
    const old = { ...python, layers: [digestOf('old')], updatedMs: 0, repository: '', tag: '\x1b[2J' };
    await store.save(python);
    // Behind the part of the file that a list reads.
    writeFileSync(await store.save(old), `${formatTrace(old)}read x\n`);
    const lines = works(['ls']).split('\n');
    assert.match(
      lines[1]!,
      new RegExp(
        `^${traceId(python.layers).slice(0, 12)}  registry.example/team/app  3.12 +4 +528 +20.3 MiB +2025-01-02T03:04:05Z$`,
      ),
    );
    assert.match(lines[2]!, /^[0-9a-f]{12} {2}- +\S+\[2J +4 +damaged +- +1970/);
    assert.ok(!lines[2]!.includes('\x1b'));
    const json = JSON.parse(works(['ls', '--json'])) as Record<string, unknown>[];
    assert.deepEqual(
      json.map(({ id, reads }) => [id, reads]),
      [
        [traceId(python.layers), 528],
        [traceId(old.layers), null],
      ],
    );
  });

  test('what export writes, import takes, on this node or another, and rm removes', async () => {
    const python = pythonStart();
    await store.save(python);
    const file = join(dir, 'python.trace');
    assert.match(works(['export', 'registry.example/team/app:3.12', file]), /wrote the trace of registry.*3\.12 to /);
    const text = readFileSync(file, 'latin1');
    assert.equal(text, formatTrace(python));
    assert.equal(works(['export', traceId(python.layers).slice(0, 4)]), text);
    assert.match(works(['rm', traceId(python.layers).slice(0, 12)]), /^removed [0-9a-f]{12}, the trace of registry/);
    assert.deepEqual(readdirSync(store.directory), []);
    const first = works(['import', file]);
    assert.match(
      first,
      /^imported [0-9a-f]{12}, the trace of registry\.example\/team\/app:3\.12: 528 reads, 20\.3 MiB\n/,
    );
    assert.match(first, new RegExp(`its 1 layer: ${python.layers[0]!.slice(7, 19)}\n`));
    assert.match(works(['import', '-'], text), /, in place of one of 4 runs\n/);
    assert.deepEqual(await store.load(traceId(python.layers)), python);
  });

  test('import refuses what is no trace and leaves what is there', async () => {
    for (const input of ['', 'hello', 'dedup-trace 1\nruns 1\n', `dedup-trace 1\n${'#'.repeat(5 << 20)}`]) {
      const { status, stderr } = verb(['import', '-'], input);
      assert.equal(status, 1);
      assert.match(stderr, /standard input, line \d+: .*\[TRACE_INVALID\]\n {2}give what .*trace export/);
    }
    assert.match(verb(['import', join(dir, 'nowhere')]).stderr, /ENOENT.*\[STORE_IO\]/);
    assert.deepEqual(await store.list(), []);
  });

  test('rm of several removes none when one of them is not there', async () => {
    await store.save(pythonStart());
    const { status, stderr } = verb(['rm', 'registry.example/team/app:3.12', 'nginx']);
    assert.equal(status, 1);
    assert.match(stderr, /there is no trace of "nginx" \[NOT_FOUND\]\n.*trace ls/);
    assert.equal((await store.list()).length, 1);
  });

  test('show draws for people, writes an SVG file, and gives figures to programs', async () => {
    const python = pythonStart();
    await store.save(python);
    const name = 'registry.example/team/app:3.12';
    const picture = Buffer.from(works(['show', name, '--width', '90']), 'latin1').toString('utf8');
    assert.match(picture, /^registry\.example\/team\/app:3\.12\n/);
    assert.ok(!picture.includes('\x1b'), 'no colours into a pipe');
    assert.match(works(['show', name, '--svg', join(dir, 'start.svg')]), /^wrote .*start\.svg\n$/);
    const svg = readFileSync(join(dir, 'start.svg'), 'utf8');
    assert.match(svg, /^<svg /);
    assert.equal(Buffer.from(works(['show', name, '--svg', '-']), 'latin1').toString('utf8'), svg);
    const figures = JSON.parse(works(['show', name, '--json']));
    assert.equal(figures.id, traceId(python.layers));
    assert.equal(figures.reads, 528);
    assert.equal(figures.duration_ms, 1950);
    assert.deepEqual(Object.keys(figures.outcomes), ['hit', 'miss', 'ahead', 'late']);
    assert.equal(figures.files.length, 10);
    assert.match(verb(['show', name, '--width', '20']).stderr, /\[INVALID_ARGUMENT\]\n {2}give a number from 60/);
    assert.match(verb(['show', 'nginx']).stderr, /\[NOT_FOUND\]/);
  });

  describe('push', () => {
    let registry: RegistryProcess;
    let image: TestImage;
    let layout: string;
    let pool: RegistryPool;
    before(async () => {
      registry = await RegistryProcess.start({ htpasswd: TEST_LOGIN.htpasswd });
      layout = mkdtempSync(join(tmpdir(), 'trace-push-'));
      const layer = (content: string) => ({ layers: [{ entries: [{ name: 'a', content }] }], into: layout });
      image = await makeImage({ ...layer('amd64'), tag: 'amd64' });
      const arm = await makeImage({
        ...layer('arm64'),
        tag: 'arm64',
        platform: { os: 'linux', architecture: 'arm64' },
      });
      await makeImageIndex(layout, 'both', [
        { image: arm, platform: { os: 'linux', architecture: 'arm64' } },
        { image, platform: { os: 'linux', architecture: 'amd64' } },
      ]);
      for (const tag of ['both', 'arm64']) await pushLayout(layout, tag, registry.host, 'app', tag, login);
      const { username, password } = TEST_LOGIN;
      pool = new RegistryPool({ credentials: { username, password } });
    });
    after(async () => {
      await pool.close();
      await registry.stop();
      rmSync(layout, { recursive: true });
    });

    const login = `${TEST_LOGIN.username}:${TEST_LOGIN.password}`;
    const recorded = (): AccessTrace => {
      const layers = image.layers.map(({ digest }) => parseDigest(digest));
      return { ...pythonStart(), layers, repository: `${registry.host}/app`, tag: 'both' };
    };

    test('puts a trace beside the member of a multi-platform image that has its layers', async () => {
      const trace = recorded();
      await store.save(trace);
      const said = works(['push', `${registry.host}/app:both`, '-u', login]);
      assert.match(
        said,
        new RegExp(`^pushed the trace [0-9a-f]{12} as sha256:.*, a referrer of .*/app@${image.manifest.digest}\n`),
      );
      const repository = pool.repository(parseReference(`${registry.host}/app`));
      const digest = parseDigest(image.manifest.digest);
      assert.deepEqual(await findTrace(repository, digest, trace.layers, signal), { ...trace, manifest: digest });
      const { status, stderr } = verb(['push', `${registry.host}/app:both`]);
      assert.equal(status, 1);
      assert.match(stderr, /\[REGISTRY_AUTH\]/);
    });

    test('refuses an image with other layers, and asks for a name where the trace has none', async () => {
      await store.save({ ...recorded(), repository: '', tag: '' });
      const id = traceId(recorded().layers);
      const to = (...more: string[]) => verb(['push', id, '-u', login, ...more]);
      assert.match(to().stderr, /which image it is of \[INVALID_ARGUMENT\]\n.*--to/);
      const other = to('--to', `${registry.host}/app:arm64`);
      assert.equal(other.status, 1);
      assert.match(
        other.stderr,
        /app:arm64 does not have the layers of the trace \[FAILED_PRECONDITION\]\n.*one build/,
      );
      assert.match(to('--to', `${registry.host}/app:none`).stderr, /\[REGISTRY_NOT_FOUND\]/);
      assert.equal(to('--to', `${registry.host}/app@${image.manifest.digest}`).status, 0);
    });
  });
});
