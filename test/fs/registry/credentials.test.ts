import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { inspect } from 'node:util';
import { CredentialFiles, parseCredentials, parseUserPassword } from '../../../src/fs/registry/credentials.ts';
import { redact, redactUrl } from '../../../src/fs/registry/secrets.ts';
import { withCode } from '../../suites/blob-reader.ts';

let dir: string;
before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'credentials-'));
});
after(async () => await rm(dir, { recursive: true, force: true }));

const auth = (text: string) => Buffer.from(text).toString('base64');

async function filesWith(name: string, auths: object): Promise<CredentialFiles> {
  const file = join(dir, name);
  await writeFile(file, JSON.stringify({ auths }));
  return new CredentialFiles(file, { HOME: join(dir, 'nobody') });
}

test('the longest matching host/repository wins over the host', async () => {
  const files = await filesWith('longest.json', {
    'ghcr.io': { username: 'host', password: '1' },
    'ghcr.io/team': { username: 'team', password: '2' },
    'https://ghcr.io/team/app/': { auth: auth('app:3:with:colons') },
  });
  assert.deepEqual(await files.find('ghcr.io', 'other'), { username: 'host', password: '1' });
  assert.deepEqual(await files.find('ghcr.io', 'team/x'), { username: 'team', password: '2' });
  assert.deepEqual(await files.find('ghcr.io', 'team/app'), { username: 'app', password: '3:with:colons' });
  assert.deepEqual(await files.find('ghcr.io', 'team/app2'), { username: 'team', password: '2' });
  assert.equal(await files.find('ghcr.io.evil.com', 'team/app'), undefined);
  assert.equal(await files.find('ghcr.io:5000', 'team/app'), undefined);
});

test('all names of the Docker registry count, also the key that docker login writes', async () => {
  for (const key of ['https://index.docker.io/v1/', 'docker.io', 'registry-1.docker.io']) {
    const files = await filesWith('docker.json', { [key]: { auth: auth('me:pw') } });
    assert.deepEqual(await files.find('docker.io', 'library/nginx'), { username: 'me', password: 'pw' }, key);
  }
});

test("Docker's own file is read after the configured one, by DOCKER_CONFIG or in the home directory", async () => {
  const own = join(dir, 'own');
  await mkdir(join(own, '.docker'), { recursive: true });
  const home = { auths: { 'a.io': { auth: auth('home:1') }, 'b.io': { auth: auth('home:2') } } };
  await writeFile(join(own, '.docker/config.json'), JSON.stringify(home));
  await writeFile(join(dir, 'first.json'), JSON.stringify({ auths: { 'a.io': { auth: auth('first:1') } } }));
  const files = new CredentialFiles(join(dir, 'first.json'), { HOME: own });
  assert.equal((await files.find('a.io', 'x'))?.username, 'first');
  assert.equal((await files.find('b.io', 'x'))?.username, 'home');
  const moved = new CredentialFiles(undefined, { HOME: '/nonexistent', DOCKER_CONFIG: join(own, '.docker') });
  assert.equal((await moved.find('a.io', 'x'))?.username, 'home');
  assert.equal(await new CredentialFiles(undefined, { HOME: '/nonexistent' }).find('a.io', 'x'), undefined);
});

test('a changed file counts at once', async () => {
  const files = await filesWith('changing.json', { 'a.io': { auth: auth('old:pw') } });
  assert.equal((await files.find('a.io', 'x'))?.username, 'old');
  await filesWith('changing.json', { 'a.io': { auth: auth('newer:pw') } });
  assert.equal((await files.find('a.io', 'x'))?.username, 'newer');
});

test('a configured file that is missing or broken is an error that quotes nothing of it', async () => {
  const missing = new CredentialFiles(join(dir, 'missing.json'), {});
  await assert.rejects(missing.find('a.io', 'x'), withCode('INVALID_CONFIG', /missing\.json/));
  for (const text of [
    '{"auths": {"a.io": {"password": "hunter2-secret"',
    '{"auths": {"a.io": {"password": ["hunter2-secret"]}}}',
    `{"auths": {"a.io": {"auth": "${auth('hunter2-secret')}"}}}`,
    '"hunter2-secret"',
  ]) {
    assert.throws(
      () => parseCredentials(text, '/f'),
      (error) => {
        const shown = inspect(error, { depth: 20 });
        assert.ok(!shown.includes('hunter2') && !shown.includes(auth('hunter2-secret')), shown);
        return withCode('INVALID_CONFIG')(error);
      },
    );
  }
});

test('files of docker with nothing in them, or with helpers only, are no error', () => {
  for (const text of ['{}', '{"auths":{}}', '{"auths":null,"credsStore":"desktop"}', '{"auths":{"a.io":{}}}']) {
    assert.deepEqual(parseCredentials(text, '/f'), []);
  }
});

test('user:password may hold colons, and needs one', () => {
  assert.deepEqual(parseUserPassword('me:a:b'), { username: 'me', password: 'a:b' });
  for (const text of ['me', ':pw', '']) assert.throws(() => parseUserPassword(text), withCode('INVALID_ARGUMENT'));
});

test('a URL in a message has neither user information nor query', () => {
  assert.equal(redactUrl(new URL('https://u:p@h.io:8443/a/b?sig=1#x')), 'https://h.io:8443/a/b?…');
});

test('text from a server loses what looks like a secret or is one', () => {
  const jwt = `eyJ${'a'.repeat(30)}.eyJ${'b'.repeat(30)}.sig-nature_1`;
  const given: readonly (readonly [string, string])[] = [
    ['Authorization: Bearer abcdef123456 end', 'abcdef123456'],
    ['{"token":"abcdef123456"}', 'abcdef123456'],
    ["{'refresh_token': 'abcdef123456'}", 'abcdef123456'],
    ['https://s3/x?X-Amz-Signature=abcdef123456&y=1', 'abcdef123456'],
    ['https://user:abcdef123456@host/x', 'abcdef123456'],
    [`token ${jwt} refused`, 'sig-nature_1'],
    ['my password is abcdef123456', 'abcdef123456'],
  ];
  for (const [text, secret] of given) {
    const known = text.startsWith('my') ? [secret] : [];
    assert.ok(!redact(text, known).includes(secret), redact(text, known));
  }
  const harmless = 'manifest unknown: tag "v1" of library/nginx';
  assert.equal(redact(harmless, ['pw-not-there']), harmless);
});
