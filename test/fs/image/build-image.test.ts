// The process that builds an image: what it leaves behind, how it fails, and what it costs.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { DedupError, type ErrorCode } from '../../../src/errors.ts';
import { buildImage, type ImageBuildRequest } from '../../../src/fs/image/build-image.ts';
import { encodeLayerIndex } from '../../../src/fs/index/format.ts';
import { BLOCK_BYTES, GiB } from '../../../src/units.ts';
import { mountErofs } from '../../support/erofs-mount.ts';
import { type EntrySpec, FakeStore, layerIndexOf, makeLayer } from '../../support/layer-maker.ts';

let dir: string;
let store: FakeStore;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'build-'));
  store = new FakeStore(join(dir, 'store'), 8 * GiB);
});

after(async () => {
  store?.close();
  await rm(dir, { recursive: true, force: true });
});

function request(name: string, specs: readonly EntrySpec[]): ImageBuildRequest {
  const layer = makeLayer(specs, store);
  const index = join(dir, `${name}.index`);
  writeFileSync(index, encodeLayerIndex(layerIndexOf(layer)));
  return {
    layers: [{ index, addresses: layer.addresses }],
    bottom: true,
    layout: { kind: 'device', deviceBlocks: store.bytes / BLOCK_BYTES },
    output: join(dir, `${name}.erofs`),
  };
}

function failsWith(code: ErrorCode, message: RegExp): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof DedupError, String(error));
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  };
}

const leftovers = (): string[] => readdirSync(dir).filter((name) => name.includes('.tmp'));

test('an image appears complete, readable by its owner only, with its sizes told', async () => {
  const specs: EntrySpec[] = [
    { name: 'd' },
    { name: 'd/f', content: 'five!' },
    { name: 'h', type: 'hardLink', link: 'd/f' },
  ];
  const wanted = request('good', specs);
  const result = await buildImage(wanted);
  const { peakBytes, ...summary } = result;
  assert.deepEqual(summary, { bytes: 4096, inodes: 3, files: 1, contentBytes: 5, entries: 3 });
  assert.ok(peakBytes > 1024 * 1024);
  assert.equal(statSync(wanted.output).size, result.bytes);
  assert.equal(statSync(wanted.output).mode & 0o777, 0o600);
  assert.deepEqual(leftovers(), []);
  const mount = mountErofs(wanted.output, join(dir, 'good.mnt'), { device: store.path });
  try {
    assert.equal(readFileSync(join(mount.path, 'h'), 'latin1'), 'five!');
  } finally {
    mount.close();
  }
});

test('what a file shows after its end, seen through mmap, is zeros', async () => {
  const wanted = request('mapped', [{ name: 'odd', content: Buffer.alloc(BLOCK_BYTES + 3, 0xff) }]);
  await buildImage(wanted);
  const mount = mountErofs(wanted.output, join(dir, 'mapped.mnt'), { device: store.path });
  try {
    const script = [
      'import ctypes, os, sys',
      'libc = ctypes.CDLL(None, use_errno=True)',
      'libc.mmap.restype = ctypes.c_void_p',
      'libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]',
      'fd = os.open(sys.argv[1], os.O_RDONLY)',
      'address = libc.mmap(None, 8192, 1, 2, fd, 0)',
      'print(ctypes.string_at(address, 8192).hex())',
    ].join('\n');
    const hex = execFileSync('python3', ['-c', script, join(mount.path, 'odd')], { encoding: 'utf8' }).trim();
    assert.ok(Buffer.from(hex, 'hex').equals(Buffer.concat([Buffer.alloc(4099, 0xff), Buffer.alloc(4093)])));
  } finally {
    mount.close();
  }
});

test('an image that EROFS cannot express fails with its code and leaves no file', async () => {
  const wanted = request('bad', [{ name: 'x', type: 'hardLink', link: 'nowhere' }]);
  await assert.rejects(buildImage(wanted), failsWith('IMAGE_INVALID', /bad\.erofs: .*hard link to "nowhere"/));
  assert.equal(existsSync(wanted.output), false);
  assert.deepEqual(leftovers(), []);
});

test('a truncated index and a missing one are told apart from a bad image', async () => {
  const wanted = request('cut', [{ name: 'f', content: 'x' }]);
  const path = wanted.layers[0]!.index;
  writeFileSync(path, readFileSync(path).subarray(0, -5));
  await assert.rejects(buildImage(wanted), failsWith('INDEX_INVALID', /layer index/));
  await rm(path);
  await assert.rejects(buildImage(wanted), failsWith('INTERNAL', /ENOENT/));
  assert.equal(existsSync(wanted.output), false);
});

test('addresses of another layer are refused', async () => {
  const wanted = request('short', [{ name: 'f', content: 'x' }]);
  const layers = [{ index: wanted.layers[0]!.index, addresses: new Float64Array(2) }];
  await assert.rejects(buildImage({ ...wanted, layers }), failsWith('INTERNAL', /2 addresses given for the 1 chunks/));
});

test('a failed build keeps the image that was there before', async () => {
  const wanted = request('kept', [{ name: 'f', content: 'x' }]);
  await buildImage(wanted);
  const old = readFileSync(wanted.output);
  const layers = [{ index: wanted.layers[0]!.index, addresses: Float64Array.of(1) }];
  await assert.rejects(buildImage({ ...wanted, layers }), failsWith('IMAGE_INVALID', /cannot be part/));
  assert.ok(readFileSync(wanted.output).equals(old));
});

test('an aborted build ends its process and rejects', async () => {
  const wanted = request('aborted', [{ name: 'f', content: 'x' }]);
  const abort = new AbortController();
  const building = buildImage(wanted, abort.signal);
  abort.abort();
  await assert.rejects(building, failsWith('CANCELLED', /aborted\.erofs/));
  await assert.rejects(buildImage(wanted, abort.signal), failsWith('CANCELLED', /aborted\.erofs/));
});
