// Which pages of a file are in the page cache, asked through the addon.
import assert from 'node:assert/strict';
import { closeSync, fdatasyncSync, mkdtempSync, openSync, readSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { native } from '../../src/fs/native.ts';

const PAGE = 4096;
let dir: string;
let fd: number;

before(() => {
  // Beside this file: /tmp may be a tmpfs, whose pages are always there.
  dir = mkdtempSync(join(import.meta.dirname, '.resident-'));
  writeFileSync(join(dir, 'file'), Buffer.alloc(64 * PAGE + 100, 7));
  fd = openSync(join(dir, 'file'), 'r+');
});

after(() => {
  closeSync(fd);
  rmSync(dir, { recursive: true, force: true });
});

test('there is one byte for each page, the last one begun counts, and written pages are there', async () => {
  writeSync(fd, Buffer.alloc(10), 0, 10, 0);
  const pages = await native().residentPages(fd, 64 * PAGE + 100);
  assert.equal(pages.length, 65);
  assert.equal(pages[0], 1);
  assert.ok(pages.every((value) => value === 0 || value === 1));
});

test('asking brings nothing into the cache, reading does', async () => {
  fdatasyncSync(fd);
  writeFileSync('/proc/sys/vm/drop_caches', '1');
  const cold = await native().residentPages(fd, 64 * PAGE + 100);
  assert.equal(cold[32], 0);
  assert.equal((await native().residentPages(fd, 64 * PAGE + 100))[32], 0);
  readSync(fd, Buffer.alloc(10), 0, 10, 32 * PAGE);
  assert.equal((await native().residentPages(fd, 64 * PAGE + 100))[32], 1);
});

test('an empty file has no pages, a bad descriptor is an error by name', async () => {
  assert.equal((await native().residentPages(fd, 0)).length, 0);
  await assert.rejects(native().residentPages(1_000_000, 10), /mmap\(2\) of descriptor 1000000/);
});
