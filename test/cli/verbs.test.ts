// The command line as a person meets it: help, configuration, doctor, entry points under an old Node.js, and the errors
// that say what to do. Verbs that pull, index or mount have test files of their own.
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { parseConfig } from '../../src/config.ts';
import { SqliteMetastore } from '../../src/snapshotter/metastore.ts';
import { Product } from '../support/product.ts';

const REPOSITORY = join(import.meta.dirname, '..', '..');
const SOURCE = join(REPOSITORY, 'src', 'dedup-snapshotter.ts');
const DAEMON_SOURCE = join(REPOSITORY, 'src', 'dedupd.ts');
const NOBODY = ['--reuid=65534', '--regid=65534', '--clear-groups'];
const VERBS = [
  ...[
    'bench',
    'index',
    'rpull',
    'mount',
    'umount',
    'images',
    'gc',
    'stats',
    'dedup',
    'trace',
    'repair',
    'config',
    'doctor',
  ],
];

interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

function outcome(file: string, args: readonly string[], env: NodeJS.ProcessEnv = process.env): Outcome {
  const { status, stdout, stderr } = spawnSync(file, args, { encoding: 'utf8', env, timeout: 60_000 });
  return { code: status, stdout, stderr };
}

const cli = (args: readonly string[], env?: NodeJS.ProcessEnv) => outcome(process.execPath, [SOURCE, ...args], env);
const asNobody = (args: readonly string[]) => outcome('setpriv', [...NOBODY, process.execPath, SOURCE, ...args]);

interface Finding {
  readonly verdict: 'ok' | 'note' | 'problem';
  readonly subject: string;
  readonly text: string;
  readonly advice?: string;
}

describe('the command line', () => {
  let dir: string;

  before(() => {
    dir = mkdtempSync(join(tmpdir(), 'verbs-'));
    chmodSync(dir, 0o755); // others than root read configurations here
  });
  after(() => rmSync(dir, { recursive: true }));

  function configFile(value: unknown): string {
    const file = join(dir, `${readdirSync(dir).length}.json`);
    writeFileSync(file, typeof value === 'string' ? value : JSON.stringify(value));
    return file;
  }

  const ownPaths = () => ({ root: join(dir, 'root'), run_dir: join(dir, 'run'), address: join(dir, 's.sock') });

  test('every verb is in the help, and has a help with an example of its own', () => {
    const { code, stdout } = cli(['--help']);
    assert.equal(code, 0);
    for (const verb of VERBS) {
      assert.match(stdout, new RegExp(`^  ${verb} `, 'm'));
      const help = cli([verb, '--help']);
      assert.equal(help.code, 0);
      assert.match(help.stdout, new RegExp(`Examples?:\\n(.*\\n)*?.*dedup-snapshotter .*${verb}`), verb);
    }
    assert.match(outcome(process.execPath, [DAEMON_SOURCE, '--help']).stdout, /Examples:\n {2}dedupd --config/);
  });

  test('verbs of dedupd have a help, refuse what they do not know, and say when no dedupd runs or lazy loading is off', () => {
    const daemon = (...args: string[]) => outcome(process.execPath, [DAEMON_SOURCE, ...args]);
    assert.match(daemon('warm', '--help').stdout, /Examples:\n {2}dedupd warm /);
    assert.match(daemon('worm').stderr, /unknown command 'worm'/);
    const file = configFile(ownPaths());
    assert.match(daemon('--config', file, 'warm').stderr, /no image is named \[INVALID_ARGUMENT\]/);
    assert.match(daemon('--config', file, 'warm', '--rate', 'fast', 'app').stderr, /"fast" is not a rate.*\n.*20MB\/s/);
    const absent = daemon('--config', file, 'warm', '--list');
    assert.equal(absent.code, 1);
    assert.match(absent.stderr, /dedupd does not answer on .* \[UNAVAILABLE\]\n.*start the service/);
    const off = configFile({ ...ownPaths(), enable_lazy: false });
    assert.match(
      daemon('--config', off, 'warm', 'app').stderr,
      /lazy loading is off: .*\[FAILED_PRECONDITION\]\n.*change /,
    );
  });

  test('an unknown verb and a missing argument are refused with a word on where to look', () => {
    for (const args of [['rpul', 'x'], ['toString'], ['rpull'], ['mount', 'x'], ['images', '--colour']]) {
      const { code, stderr } = cli(args);
      assert.equal(code, 1, args.join(' '));
      assert.match(stderr, /error: .*\n[\s\S]*--help/);
    }
    assert.match(cli(['rpul', 'x']).stderr, /unknown command "rpul"/);
    assert.equal(cli(['help', 'rpull']).stdout, cli(['rpull', '--help']).stdout);
  });

  test('"config" prints the configuration in effect', () => {
    const { code, stdout } = cli(['--config', configFile({ log_level: 'error' }), 'config']);
    assert.equal(code, 0);
    assert.deepEqual(JSON.parse(stdout), parseConfig({ log_level: 'error' }));
  });

  test('a configuration that is wrong or missing ends everything with its name and every bad key', () => {
    const file = configFile({ log_level: 'loud', chunk_sise: 1 });
    const missing = join(dir, 'missing.json');
    for (const program of [SOURCE, DAEMON_SOURCE]) {
      const wrong = outcome(process.execPath, [program, '--config', file]);
      assert.equal(wrong.code, 1);
      assert.ok(wrong.stderr.includes(file));
      assert.match(wrong.stderr, /unknown key "chunk_sise"/);
      assert.match(wrong.stderr, /"log_level"/);
      const absent = outcome(process.execPath, [program, '--config', missing]);
      assert.equal(absent.code, 1);
      assert.match(absent.stderr, /cannot read configuration .*missing\.json/);
    }
    assert.match(cli(['--config', file, 'doctor']).stderr, /INVALID_CONFIG\]\n {2}docs\/configuration\.md/);
  });

  describe('doctor', () => {
    const findings = ({ stdout }: Outcome) => JSON.parse(stdout) as Finding[];
    const find = (all: readonly Finding[], subject: string) => all.find((finding) => finding.subject === subject);

    test('as root says what the machine can do and which transport follows, and ends well', () => {
      const file = configFile({ ...ownPaths(), transport: 'fuse' });
      const human = cli(['--config', file, 'doctor']);
      const all = findings(cli(['--config', file, 'doctor', '--json']));
      assert.deepEqual(
        all.filter(({ verdict }) => verdict === 'problem'),
        [],
        'this machine has everything the tests need',
      );
      assert.equal(human.code, 0);
      assert.match(human.stdout, /^\[ ok \] transport +fuse/m);
      for (const subject of ['kernel', 'EROFS', 'overlayfs', '/dev/fuse', '/dev/loop-control', 'containerd', 'disk'])
        assert.equal(find(all, subject)?.verdict, 'ok', subject);
      assert.equal(find(all, 'user')?.text, 'root');
      assert.match(find(all, 'dedup_scope')?.text ?? '', /every image of this node/);
      assert.match(find(all, 'dedupd')?.text ?? '', /does not run/);
    });

    test('as somebody else says what it could not see', () => {
      const all = findings(asNobody(['--config', configFile(ownPaths()), 'doctor', '--json']));
      assert.match(find(all, 'user')?.text ?? '', /not root: mounts and devices could not be tried/);
      assert.equal(find(all, 'user')?.verdict, 'note');
      assert.ok(find(all, 'kernel'));
    });

    test('fails with advice when something is missing', () => {
      const file = configFile({ ...ownPaths(), ksm: { enabled: true } });
      const result = cli(['--config', file, 'doctor', '--json'], { PATH: dir });
      assert.equal(result.code, 1);
      const containerd = find(findings(result), 'containerd');
      assert.equal(containerd?.verdict, 'problem');
      assert.match(containerd?.advice ?? '', /install containerd/);
      assert.match(find(findings(result), 'configuration')?.text ?? '', /"ksm" is accepted but not yet in effect/);
      assert.match(cli(['--config', file, 'doctor'], { PATH: dir }).stdout, /^\[FAIL\] containerd +not found/m);
    });

    test('says that no layer is lazy where the configuration forbids it', () => {
      const all = findings(cli(['--config', configFile({ ...ownPaths(), enable_lazy: false }), 'doctor', '--json']));
      assert.equal(find(all, 'transport')?.text, 'none: "enable_lazy" is false');
    });
  });

  test('what needs root says so', () => {
    const file = configFile(ownPaths());
    for (const args of [[], ['mount', 'x', dir], ['umount', dir]]) {
      const { code, stderr, stdout } = asNobody(['--config', file, ...args]);
      assert.equal(code, 1, args.join(' '));
      assert.match(stderr + stdout, /only root may do.*\[NOT_ROOT\]\n.*sudo/);
    }
    const daemon = outcome('setpriv', [...NOBODY, process.execPath, DAEMON_SOURCE, '--config', file]);
    assert.equal(daemon.code, 1);
    assert.match(daemon.stderr + daemon.stdout, /only root may do/);
  });

  test('verbs that need dedupd say that none runs', () => {
    const file = configFile(ownPaths());
    for (const args of [['images'], ['umount', dir], ['gc'], ['stats']]) {
      const { code, stderr } = cli(['--config', file, ...args]);
      assert.equal(code, 1);
      assert.match(stderr, /dedupd does not answer on .*\[UNAVAILABLE\]\n {2}start dedupd/);
    }
  });

  test('under a Node.js that is too old every entry point ends with one clear line', (t) => {
    const old = ['/usr/bin/node', '/usr/bin/nodejs', '/usr/local/bin/node'].find((path) => {
      if (!existsSync(path)) return false;
      return Number(execFileSync(path, ['-p', 'process.versions.node'], { encoding: 'utf8' }).split('.')[0]) < 22;
    });
    if (old === undefined) {
      t.skip('no Node.js older than 22 is installed');
      return;
    }
    for (const name of ['dedup-snapshotter', 'dedupd']) {
      const { code, stdout, stderr } = outcome(old, [join(REPOSITORY, 'dist', `${name}.js`)]);
      assert.equal(code, 1);
      assert.equal(stdout, '');
      assert.match(stderr, new RegExp(`^${name}: needs Node\\.js 22\\.19 or later, this is [0-9.]+; .*\\n$`));
    }
  });

  test('a second service on the same address is refused before it touches anything', async () => {
    const product = await Product.create({ enable_lazy: false });
    try {
      await product.start();
      // As a Prepare under way looks from outside: a directory that the database does not know yet.
      const underWay = join(product.root, 'snapshots', '1');
      mkdirSync(underWay);
      const { code, stderr } = cli(['--config', product.configFile]);
      assert.equal(code, 1);
      assert.match(stderr, /another server answers on .*\[LOCKED\]\n.*stop it/);
      await product.stopService();
      const metastore = new SqliteMetastore(join(product.root, 'metadata.db'));
      assert.deepEqual(metastore.removedIds(), []);
      metastore.close();
    } finally {
      await product.stop();
    }
  });

  test('the service reports at start every key of its file that nothing uses yet', async () => {
    const product = await Product.create({ enable_lazy: false, ksm: { scan_interval: 200 }, logReportCaller: true });
    try {
      await product.start();
      assert.match(product.log(), /"level":"warn".*\\"ksm\\" is accepted but not yet in effect: .*memory dedup/);
      assert.match(product.log(), /\\"logReportCaller\\" is accepted but not yet in effect/);
      assert.doesNotMatch(product.log(), /\\"prefetch\\" is accepted/);
    } finally {
      await product.stop();
    }
  });
});
