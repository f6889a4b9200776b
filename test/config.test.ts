// The configuration schema: what users rely on as defaults, what is refused and how it says so, and that the generated
// pages of docs/ are those of the code.
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { expected, GENERATED } from '../scripts/generate-docs.ts';
import {
  configurationTable,
  conversionDisabledReason,
  lazyDisabledReason,
  loadConfig,
  notYetInEffect,
  parseConfig,
} from '../src/config.ts';
import { DedupError, ERROR_CODES, type ErrorCode } from '../src/errors.ts';
import { registryOptions } from '../src/registry-settings.ts';

/** The file that the published guide shows, word for word. */
const PUBLISHED = JSON.parse(`{
  "root": "/var/lib/containerd/io.containerd.snapshotter.v1.dedup",
  "enable_erofs": true, "enable_fscache": true, "enable_lazy": true, "enable_mem_dedup": true,
  "registry": "", "chunk_size": 4194304, "log_level": "info",
  "prefetch": { "enabled": true, "workers": 4, "queue_size": 1000,
                "trace_dir": "/var/lib/containerd/io.containerd.snapshotter.v1.dedup/traces" },
  "ksm": { "enabled": true, "scan_interval": 100, "pages_to_scan": 100, "merge_across_nodes": false },
  "dedupd": { "enabled": true, "workers": 4, "registry": "https://registry-1.docker.io", "fscache_domain": "dedup-snapshotter" }
}`) as Record<string, unknown>;

function refused(code: ErrorCode, ...texts: (string | RegExp)[]) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof DedupError);
    assert.equal(error.code, code);
    for (const text of texts) assert.match(error.message, typeof text === 'string' ? new RegExp(text) : text);
    return true;
  };
}

/** Every path of the schema, as docs/configuration.md lists them. */
function documentedKeys(): { key: string; meaning: string }[] {
  return configurationTable()
    .split('\n')
    .flatMap((line) => {
      const [, key, meaning] = /^\| `([^`]+)` \| .* \| (.*) \|$/.exec(line) ?? [];
      return key === undefined ? [] : [{ key, meaning: meaning ?? '' }];
    });
}

describe('the configuration', () => {
  const dir = mkdtempSync(join(tmpdir(), 'config-'));
  after(() => rmSync(dir, { recursive: true }));

  test('has the published defaults', () => {
    const defaults = parseConfig({}) as unknown as Record<string, unknown>;
    for (const [key, value] of Object.entries(PUBLISHED)) assert.deepEqual(defaults[key], value, key);
  });

  test('takes the published file as it is, and means the same by it as by no file', () => {
    assert.deepEqual(parseConfig(PUBLISHED), parseConfig({}));
  });

  test('merges a partial file over the defaults, inside groups too', () => {
    const config = parseConfig({ log_level: 'debug', ksm: { scan_interval: 200 }, dedupd: { workers: 8 } });
    const defaults = parseConfig({});
    assert.deepEqual(config, {
      ...defaults,
      log_level: 'debug',
      ksm: { ...defaults.ksm, scan_interval: 200 },
      dedupd: { ...defaults.dedupd, workers: 8 },
    });
  });

  test('keeps traces below the root that is configured', () => {
    assert.equal(parseConfig({ root: '/data' }).prefetch.trace_dir, '/data/traces');
    assert.equal(
      parseConfig({ root: '/data', prefetch: { trace_dir: '/elsewhere' } }).prefetch.trace_dir,
      '/elsewhere',
    );
  });

  test('refuses unknown keys by name, at every depth', () => {
    for (const [value, name] of [
      [{ chunksize: 1 }, 'unknown key "chunksize"'],
      [{ dedupd: { worker: 1 } }, 'unknown key "worker" in "dedupd"'],
      [{ mirrorRegistry: [{ host: 'a', secure: true }] }, 'unknown key "secure" in "mirrorRegistry.0"'],
      [{ a: 1, b: 2 }, 'unknown key "a", "b"'],
    ] as const) {
      assert.throws(() => parseConfig(value, 'the.json'), refused('INVALID_CONFIG', name, /^the\.json: /));
    }
  });

  test('refuses bad values with the name of the key', () => {
    const bad: [string, unknown][] = [
      ['root', 'relative'],
      ['root', 7],
      ['address', 'tcp://1'],
      ['chunk_size', 5_000_000],
      ['chunk_size', '4MiB'],
      ['chunk_size', 1024],
      ['log_level', 'loud'],
      ['enable_lazy', 'yes'],
      ['enable_erofs', null],
      ['transport', 'ublk'],
      ['dedup_scope', 'tenant'],
      ['index_trust', ['everyone']],
      ['span_cache_bytes', 1],
      ['insecure_registries', ['http://a']],
      ['ca_files', 'a.pem'],
      ['credentials_file', 'a.json'],
      ['dedupd.workers', 0],
      ['dedupd.fscache_domain', ''],
      ['prefetch.queue_size', 1.5],
      ['ksm.scan_interval', -1],
      ['exporterConfig.port', 70_000],
      ['exporterConfig.address', 'localhost'],
      ['mirrorRegistry', [{ host: '' }]],
      ['mirrorRegistry', [{ host: 'https://m' }]],
      ['registry', 'http://'],
      ['registry', 'https://a.example/prefix'],
      ['registry', 'user:secret@a.example'],
      ['dedupd.registry', ''],
    ];
    for (const [path, value] of bad) {
      const [first = '', second] = path.split('.');
      const file = second === undefined ? { [first]: value } : { [first]: { [second]: value } };
      assert.throws(
        () => parseConfig(file),
        refused('INVALID_CONFIG', new RegExp(`"${path.replace('.', '\\.')}`)),
        path,
      );
    }
    assert.throws(() => parseConfig({ root: 1, log_level: 2 }), refused('INVALID_CONFIG', '"root"', '"log_level"'));
    for (const value of [[], 'text', 1, null]) assert.throws(() => parseConfig(value), refused('INVALID_CONFIG'));
  });

  test('refuses other writable layers with the reason', () => {
    for (const rwMode of ['dev', 'dir', '']) {
      assert.throws(
        () => parseConfig({ rwMode }),
        refused('INVALID_CONFIG', '"rwMode": only "overlayfs" is offered: .*block device'),
      );
    }
    assert.equal(parseConfig({ rwMode: 'overlayfs' }).rwMode, 'overlayfs');
  });

  test('cannot be changed after it was parsed', () => {
    const config = parseConfig({ mirrorRegistry: [{ host: 'm' }] });
    for (const part of [config, config.ksm, config.mirrorRegistry, config.mirrorRegistry[0]])
      assert.ok(Object.isFrozen(part));
  });

  test('comes from a file, or from the defaults when the default file is missing', () => {
    const file = join(dir, 'a.json');
    assert.deepEqual(loadConfig(file, false), parseConfig({}));
    assert.throws(() => loadConfig(file, true), refused('NOT_FOUND', file));
    writeFileSync(file, '{"log_level": "debug"}');
    assert.equal(loadConfig(file, true).log_level, 'debug');
    writeFileSync(file, '{"log_level": ');
    assert.throws(() => loadConfig(file, false), refused('INVALID_CONFIG', `${file} is not JSON`));
    assert.throws(() => loadConfig(dir, false), refused('NOT_FOUND', dir));
  });

  test('says which keys of a file nothing uses yet, by name', () => {
    assert.deepEqual(notYetInEffect({}), []);
    assert.deepEqual(notYetInEffect({ root: '/a', dedupd: { workers: 2 }, registry: 'r' }), []);
    const found = notYetInEffect({ ksm: {}, dedupd: { fscache_domain: 'd' }, logReportCaller: false });
    assert.deepEqual(
      found
        .map((sentence) => /^"([^"]+)" is accepted but not yet in effect: it belongs to ./.exec(sentence)?.[1])
        .sort(),
      ['dedupd.fscache_domain', 'ksm', 'logReportCaller'],
    );
  });

  test('switches lazy loading off with the reason', () => {
    assert.equal(lazyDisabledReason(parseConfig({})), undefined);
    assert.equal(lazyDisabledReason(parseConfig({ dedupd: { enabled: false } })), undefined);
    assert.equal(lazyDisabledReason(parseConfig({ enable_lazy: false })), '"enable_lazy" is false');
    assert.equal(lazyDisabledReason(parseConfig({ enable_erofs: false })), '"enable_erofs" is false');
    assert.equal(conversionDisabledReason(parseConfig({})), undefined);
    for (const key of ['convert_ordinary', 'enable_lazy', 'enable_erofs']) {
      assert.equal(conversionDisabledReason(parseConfig({ [key]: false })), `"${key}" is false`);
    }
    assert.equal(conversionDisabledReason(parseConfig({ remap_ids: true })), '"remap_ids" is true');
  });

  test('names the server of docker.io: "registry" before "dedupd.registry"', () => {
    const server = (value: unknown) => registryOptions(parseConfig(value)).endpoints?.['docker.io'];
    assert.equal(server({}), 'https://registry-1.docker.io');
    assert.equal(server({ dedupd: { registry: 'http://127.0.0.1:5000' } }), 'http://127.0.0.1:5000');
    assert.equal(server({ dedupd: { registry: 'a.example' } }), 'https://a.example');
    assert.equal(server({ registry: 'b.example:5000', dedupd: { registry: 'a.example' } }), 'https://b.example:5000');
    assert.equal(server({ registry: 'https://b.example/' }), 'https://b.example');
  });

  test('is described key by key', () => {
    const keys = documentedKeys();
    assert.ok(keys.length > 30);
    for (const { key, meaning } of keys) assert.ok(meaning.length > 5, key);
    const flat = (value: Record<string, unknown>, prefix = ''): string[] =>
      Object.entries(value).flatMap(([key, inner]) =>
        inner !== null && typeof inner === 'object' && !Array.isArray(inner)
          ? flat(inner as Record<string, unknown>, `${prefix}${key}.`)
          : [`${prefix}${key}`],
      );
    const named = keys.map(({ key }) => key);
    for (const key of flat(parseConfig({}) as unknown as Record<string, unknown>)) assert.ok(named.includes(key), key);
  });
});

describe('generated documentation', () => {
  for (const [file, text] of GENERATED) {
    test(`${file.replace(/^.*\/docs\//, 'docs/')} is what "make docs" would write`, () => {
      assert.equal(readFileSync(file, 'utf8'), expected(file, text));
    });
  }

  test('every error code is described in a sentence', () => {
    for (const [code, { doc }] of Object.entries(ERROR_CODES)) assert.match(doc, /^[A-Z].{10,}\.$/, code);
  });
});
