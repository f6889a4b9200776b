import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { DedupError } from '../../../src/errors.ts';
import {
  formatReference,
  hostAliases,
  isLoopback,
  parseReference,
  serverOf,
  tagOrDigest,
} from '../../../src/fs/registry/reference.ts';

const hex = 'a'.repeat(64);

const full: readonly (readonly [given: string, full: string])[] = [
  ['nginx', 'docker.io/library/nginx:latest'],
  ['nginx:1.27', 'docker.io/library/nginx:1.27'],
  ['library/nginx', 'docker.io/library/nginx:latest'],
  ['owner/name', 'docker.io/owner/name:latest'],
  ['docker.io/nginx', 'docker.io/library/nginx:latest'],
  ['index.docker.io/owner/name', 'docker.io/owner/name:latest'],
  ['localhost/name', 'localhost/name:latest'],
  ['localhost:5000/name:v1', 'localhost:5000/name:v1'],
  ['127.0.0.1:5000/tst-lazy-pull:latest', '127.0.0.1:5000/tst-lazy-pull:latest'],
  ['[::1]:5000/name', '[::1]:5000/name:latest'],
  ['ghcr.io/owner/a.b_c__d-e--f:T_.-x', 'ghcr.io/owner/a.b_c__d-e--f:T_.-x'],
  ['Registry/name', 'Registry/name:latest'],
  [`nginx@sha256:${hex}`, `docker.io/library/nginx@sha256:${hex}`],
  [`host:1/n:t@sha256:${hex}`, `host:1/n:t@sha256:${hex}`],
];

for (const [given, expected] of full) {
  test(`${given} is short for ${expected}`, () => {
    assert.equal(formatReference(parseReference(given)), expected);
  });
}

const bad: readonly (readonly [given: string, hint: RegExp])[] = [
  ['', /write it like/],
  [' nginx', /write it like/],
  ['https://ghcr.io/a/b', /leave out/],
  ['Nginx', /lower case: library\/nginx|lower case/],
  ['ghcr.io/Owner/name', /lower case: owner\/name/],
  ['nginx:', /a tag has/],
  ['nginx:-x', /a tag has/],
  [`nginx:${'t'.repeat(129)}`, /a tag has/],
  ['nginx@sha256:abc', /64 lowercase hex/],
  [`nginx@sha256:${'A'.repeat(64)}`, /64 lowercase hex/],
  ['nginx@', /64 lowercase hex/],
  ['a//b', /parts of a repository name/],
  ['/a', /parts of a repository name/],
  ['a/', /parts of a repository name/],
  ['ghcr.io/../../etc/passwd', /parts of a repository name/],
  ['a/b_-c', /parts of a repository name/],
  ['host:99999/a', /1 to 65535/],
  ['host:/a', /1 to 65535/],
  ['-host.io/a', /a host is/],
  [hex, /NAME@sha256/],
  [`ghcr.io/${'a'.repeat(250)}`, /write it like/],
];

for (const [given, hint] of bad) {
  test(`${JSON.stringify(given.slice(0, 60))} is refused with advice`, () => {
    assert.throws(
      () => parseReference(given),
      (error) => error instanceof DedupError && error.code === 'INVALID_REFERENCE' && hint.test(error.hint ?? ''),
    );
  });
}

test('a digest is asked for before a tag', () => {
  assert.equal(tagOrDigest(parseReference(`a:t@sha256:${hex}`)), `sha256:${hex}`);
  assert.equal(tagOrDigest(parseReference('a:t')), 't');
});

test('docker.io is served elsewhere, and known by three names', () => {
  assert.equal(serverOf('docker.io'), 'registry-1.docker.io');
  assert.equal(serverOf('ghcr.io'), 'ghcr.io');
  assert.ok(hostAliases('registry-1.docker.io').includes('docker.io'));
  assert.deepEqual(hostAliases('ghcr.io'), ['ghcr.io']);
});

test('loopback hosts are recognised, and names that only look like them are not', () => {
  for (const host of ['localhost', 'localhost:5000', '127.0.0.1', '127.9.9.9:80', '[::1]:5000', '[::1]']) {
    assert.equal(isLoopback(host), true, host);
  }
  for (const host of [
    '127.0.0.1.evil.com',
    'localhost.evil.com',
    'mylocalhost',
    '128.0.0.1',
    'evil.com:127',
    '[::2]:1',
  ]) {
    assert.equal(isLoopback(host), false, host);
  }
});

const word = fc.stringMatching(/^[a-z0-9]{1,8}$/);
const path = fc
  .array(
    fc.tuple(word, fc.constantFrom('', '.', '_', '__', '-', '---'), word).map(([a, s, b]) => a + s + b),
    {
      minLength: 1,
      maxLength: 4,
    },
  )
  .map((parts) => parts.join('/'));
const host = fc.constantFrom(
  'docker.io',
  'localhost',
  'ghcr.io',
  'a-b.example.org:5000',
  '10.0.0.1:1',
  '[fe80::1]:443',
);
const tag = fc.option(fc.stringMatching(/^[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}$/), { nil: undefined });
const digest = fc.option(fc.stringMatching(/^[0-9a-f]{64}$/), { nil: undefined });

test('what is written out parses to the same reference again', () => {
  fc.assert(
    fc.property(host, path, tag, digest, (h, p, t, d) => {
      const text = `${h}/${p}${t === undefined ? '' : `:${t}`}${d === undefined ? '' : `@sha256:${d}`}`;
      const parsed = parseReference(text);
      assert.equal(parsed.host, h);
      assert.equal(parsed.path, h === 'docker.io' && !p.includes('/') ? `library/${p}` : p);
      assert.equal(parsed.tag, t ?? (d === undefined ? 'latest' : undefined));
      assert.equal(parsed.digest, d === undefined ? undefined : `sha256:${d}`);
      assert.deepEqual({ ...parseReference(formatReference(parsed)) }, { ...parsed });
    }),
  );
});

test('any text is either parsed into parts that are safe in a URL, or refused as INVALID_REFERENCE', () => {
  const near = fc.array(
    fc.constantFrom(
      'a',
      'B',
      '0',
      '/',
      ':',
      '@',
      '.',
      '..',
      '-',
      '_',
      '%2f',
      '?',
      '#',
      '[',
      ']',
      ' ',
      '\n',
      'sha256:',
      hex,
    ),
    {
      maxLength: 12,
    },
  );
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        fc.string({ unit: 'binary' }),
        near.map((parts) => parts.join('')),
      ),
      (text) => {
        try {
          const parsed = parseReference(text);
          assert.match(parsed.path, /^[a-z0-9]+([._/-]+[a-z0-9]+)*$/);
          assert.ok(!parsed.path.includes('//') && !parsed.path.includes('..'));
          assert.match(parsed.host, /^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:\d+)?$/);
          assert.equal(formatReference(parseReference(formatReference(parsed))), formatReference(parsed));
        } catch (error) {
          assert.ok(error instanceof DedupError && error.code === 'INVALID_REFERENCE', String(error));
        }
      },
    ),
    { numRuns: 2000 },
  );
});
