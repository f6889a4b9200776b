// Extended attributes read through the addon, against setfattr.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, symlinkSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { native } from '../../src/fs/native.ts';

let dir: string;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'xattr-'));
});

after(async () => {
  await rm(dir, { recursive: true, force: true });
});

function set(name: string, hex: string, path: string): void {
  execFileSync('setfattr', ['-h', '-n', name, '-v', hex === '' ? '""' : `0x${hex}`, path]);
}

test('names and values come as they were set, empty and large ones too', () => {
  const path = join(dir, 'directory');
  mkdirSync(path);
  assert.deepEqual(native().readXattrs(Buffer.from(path)), []);
  set('user.binary', '00ff0a', path);
  set('user.empty', '', path);
  set('trusted.large', 'ab'.repeat(2000), path);
  const found = native().readXattrs(Buffer.from(path));
  assert.deepEqual(found.map(({ name, value }) => [name, value.toString('hex')]).sort(), [
    ['trusted.large', 'ab'.repeat(2000)],
    ['user.binary', '00ff0a'],
    ['user.empty', ''],
  ]);
});

test('a symlink answers for itself, a name that is not text is found', () => {
  const target = Buffer.concat([Buffer.from(`${dir}/`), Buffer.from([0xff, 0x80])]);
  mkdirSync(target);
  execFileSync('sh', ['-c', `setfattr -n user.a -v 1 "${dir}"/$(printf '\\377\\200')`]);
  assert.deepEqual(native().readXattrs(target), [{ name: 'user.a', value: Buffer.from('1') }]);
  const link = join(dir, 'link');
  symlinkSync(target, link);
  assert.deepEqual(native().readXattrs(Buffer.from(link)), []);
});

test('a name is bytes, one character each', () => {
  const path = join(dir, 'bytes');
  mkdirSync(path);
  execFileSync('sh', ['-c', `setfattr -n "$(printf 'user.\\303\\251\\377')" -v 1 "${path}"`]);
  assert.deepEqual(native().readXattrs(Buffer.from(path)), [{ name: 'user.\xc3\xa9\xff', value: Buffer.from('1') }]);
});

test('what is not there is an error with errno and path; a path with NUL is refused', () => {
  const missing = join(dir, 'missing');
  assert.throws(() => native().readXattrs(Buffer.from(missing)), /llistxattr\(2\).*missing/);
  assert.throws(() => native().readXattrs(Buffer.from('a\0b')), /NUL/);
});

test('a file system without attributes has none', () => {
  assert.deepEqual(native().readXattrs(Buffer.from('/proc/self/status')), []);
});
