// Small real OCI images made by the tests themselves, as OCI layout directories, and their way into a registry.
// Used by end-to-end tests; must not depend on the code under test.
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { chmod, copyFile, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { gzip, zstdCompress } from 'node:zlib';
import { run, type TestContainerd } from './containerd.ts';
import { type TarEntry, tarOf } from './tar.ts';

/**
 * gnu-gzip: by gzip(1), whose output does not depend on the processor as zlib's in Node does. zstd-frames: one frame for
 * each MiB of the tar, so that decompression can start at any of them.
 */
export type LayerCompression = 'gzip' | 'gnu-gzip' | 'zstd' | 'zstd-frames' | 'none';

/** What one layer holds: members, a directory on disk, or a ready tar (compressed by us). */
export type LayerSource = (
  | { readonly entries: readonly TarEntry[] }
  | { readonly dir: string }
  | { readonly tar: Uint8Array }
) & { readonly compression?: LayerCompression; readonly annotations?: Readonly<Record<string, string>> };

export interface ImageOptions {
  /** Bottom to top. */
  readonly layers: readonly LayerSource[];
  /** The `config` object of the image configuration (Cmd, Entrypoint, Env, WorkingDir, …). */
  readonly config?: Readonly<Record<string, unknown>>;
  /** Default: linux/amd64. */
  readonly platform?: { readonly os: string; readonly architecture: string; readonly variant?: string };
  /** Layout directory to add to; a new temporary one by default (the caller removes it). */
  readonly into?: string;
  /** Tag in the layout. Default "latest". */
  readonly tag?: string;
  /** What the configuration says the layers unpack to; default: the truth. */
  readonly diffIds?: readonly string[];
  /** Docker schema2 media types instead of OCI ones. */
  readonly docker?: boolean;
}

export interface TestDescriptor {
  readonly mediaType: string;
  readonly digest: string;
  readonly size: number;
  readonly annotations?: Readonly<Record<string, string>>;
}

export interface TestImage {
  /** The OCI layout directory. */
  readonly dir: string;
  readonly tag: string;
  readonly manifest: TestDescriptor;
  readonly config: TestDescriptor;
  /** Bottom to top, with the digest of each uncompressed tar and the chain ID up to it. */
  readonly layers: readonly (TestDescriptor & { readonly diffId: string; readonly chainId: string })[];
}

const TYPES = {
  oci: {
    index: 'application/vnd.oci.image.index.v1+json',
    manifest: 'application/vnd.oci.image.manifest.v1+json',
    config: 'application/vnd.oci.image.config.v1+json',
    gzip: 'application/vnd.oci.image.layer.v1.tar+gzip',
    'gnu-gzip': 'application/vnd.oci.image.layer.v1.tar+gzip',
    zstd: 'application/vnd.oci.image.layer.v1.tar+zstd',
    'zstd-frames': 'application/vnd.oci.image.layer.v1.tar+zstd',
    none: 'application/vnd.oci.image.layer.v1.tar',
  },
  docker: {
    manifest: 'application/vnd.docker.distribution.manifest.v2+json',
    config: 'application/vnd.docker.container.image.v1+json',
    gzip: 'application/vnd.docker.image.rootfs.diff.tar.gzip',
    'gnu-gzip': 'application/vnd.docker.image.rootfs.diff.tar.gzip',
    zstd: 'application/vnd.docker.image.rootfs.diff.tar.zstd',
    'zstd-frames': 'application/vnd.docker.image.rootfs.diff.tar.zstd',
    none: 'application/vnd.docker.image.rootfs.diff.tar',
  },
} as const;

const FRAME_BYTES = 1024 * 1024;

const sha256 = (bytes: Uint8Array | string) => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** Where downloads of tests are kept between runs: $DEDUP_TEST_CACHE, else .cache at the top of the repository. */
export async function testCacheDir(): Promise<string> {
  const dir = process.env.DEDUP_TEST_CACHE ?? join(import.meta.dirname, '..', '..', '.cache');
  await mkdir(dir, { recursive: true });
  return dir;
}

/**
 * Path of a static busybox from the Debian package busybox-static, downloaded once per machine with `apt-get download`.
 * Errors: apt-get's own message when the package cannot be had.
 */
export async function busyboxBinary(): Promise<string> {
  const cache = await testCacheDir();
  const path = join(cache, 'busybox-static');
  if (existsSync(path)) return path;
  const dir = await mkdtemp(join(tmpdir(), 'busybox-'));
  try {
    await chmod(dir, 0o755); // apt downloads as a user of its own
    await run('apt-get', ['download', '-q', 'busybox-static'], { cwd: dir, timeoutMs: 120_000 });
    const deb = (await readdir(dir)).find((name) => name.endsWith('.deb'));
    if (deb === undefined) throw new Error('apt-get download busybox-static left no .deb');
    await run('dpkg-deb', ['-x', deb, 'out'], { cwd: dir });
    // Copied beside and renamed: two test files may do this at once.
    const fresh = join(cache, `busybox-static.${process.pid}`);
    await copyFile(join(dir, 'out', 'bin', 'busybox'), fresh);
    await chmod(fresh, 0o755);
    await rename(fresh, path);
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
  return path;
}

/** Members of a root file system that can run `/bin/sh`: busybox with links for the applets named. */
export async function busyboxEntries(
  applets: readonly string[] = ['sh', 'cat', 'ls', 'sleep', 'echo', 'sha256sum', 'find', 'stat', 'true', 'id', 'touch'],
): Promise<TarEntry[]> {
  const content = await readFile(await busyboxBinary());
  const dirs = ['bin/', 'dev/', 'etc/', 'proc/', 'root/', 'sys/', 'tmp/', 'usr/', 'usr/bin/', 'var/'];
  return [
    ...dirs.map((name): TarEntry => ({ name, type: 'dir', mode: name === 'tmp/' ? 0o1777 : 0o755 })),
    { name: 'bin/busybox', mode: 0o755, content },
    ...applets.map((name): TarEntry => ({ name: `bin/${name}`, type: 'symlink', linkname: 'busybox' })),
    { name: 'etc/passwd', content: 'root:x:0:0:root:/root:/bin/sh\n' },
    { name: 'etc/group', content: 'root:x:0:\n' },
  ];
}

/** Builds an image into an OCI layout directory under a tag. Deterministic for `entries` and `tar`. */
export async function makeImage(options: ImageOptions): Promise<TestImage> {
  const dir = options.into ?? (await mkdtemp(join(tmpdir(), 'image-')));
  const types = options.docker === true ? TYPES.docker : TYPES.oci;
  const platform = options.platform ?? { os: 'linux', architecture: 'amd64' };
  const layers: (TestDescriptor & { diffId: string; chainId: string })[] = [];
  for (const source of options.layers) {
    const tar = await tarBytes(source);
    const compression = source.compression ?? 'gzip';
    const blob = await compress(tar, compression);
    const diffId = sha256(tar);
    const below = layers.at(-1);
    layers.push({
      ...(await addBlob(dir, types[compression], blob)),
      ...(source.annotations === undefined ? {} : { annotations: source.annotations }),
      diffId,
      chainId: below === undefined ? diffId : sha256(`${below.chainId} ${diffId}`),
    });
  }
  const config = await addBlob(
    dir,
    types.config,
    json({
      created: '2024-01-01T00:00:00Z',
      ...platform,
      config: options.config ?? { Cmd: ['/bin/sh'], Env: ['PATH=/bin:/usr/bin'] },
      rootfs: { type: 'layers', diff_ids: options.diffIds ?? layers.map((layer) => layer.diffId) },
      history: layers.map(() => ({ created: '2024-01-01T00:00:00Z', created_by: 'test' })),
    }),
  );
  const manifest = await addBlob(
    dir,
    types.manifest,
    json({
      schemaVersion: 2,
      mediaType: types.manifest,
      config,
      layers: layers.map(({ diffId: _diffId, chainId: _chainId, ...descriptor }) => descriptor),
    }),
  );
  const tag = options.tag ?? 'latest';
  await addToLayout(dir, tag, manifest);
  return { dir, tag, manifest, config, layers };
}

/** Adds an image index over images of the same layout under a tag. */
export async function makeImageIndex(
  dir: string,
  tag: string,
  images: readonly {
    readonly image: TestImage;
    readonly platform: { readonly os: string; readonly architecture: string; readonly variant?: string };
  }[],
): Promise<TestDescriptor> {
  const index = await addBlob(
    dir,
    TYPES.oci.index,
    json({
      schemaVersion: 2,
      mediaType: TYPES.oci.index,
      manifests: images.map(({ image, platform }) => ({ ...image.manifest, platform })),
    }),
  );
  await addToLayout(dir, tag, index);
  return index;
}

/** Pushes a tag of a layout to a plain-HTTP registry ("127.0.0.1:PORT"), as `login` (user:password); its reference. */
export async function pushLayout(
  dir: string,
  tag: string,
  registry: string,
  repository: string,
  newTag = tag,
  login?: string,
): Promise<string> {
  const reference = `${registry}/${repository}:${newTag}`;
  await run(
    'skopeo',
    [
      '--insecure-policy',
      'copy',
      '--all',
      '--quiet',
      '--preserve-digests',
      '--dest-tls-verify=false',
      ...(login === undefined ? [] : ['--dest-creds', login]),
      `oci:${dir}:${tag}`,
      `docker://${reference}`,
    ],
    { timeoutMs: 120_000 },
  );
  return reference;
}

/** Pushes an image as it is, with media types that skopeo does not take from an OCI layout. Answers its reference. */
export async function pushImage(image: TestImage, registry: string, repository: string): Promise<string> {
  const base = `http://${registry}/v2/${repository}`;
  const send = async (method: string, url: string, mediaType: string, body?: Buffer<ArrayBuffer>) => {
    const response = await fetch(url, { method, headers: { 'content-type': mediaType }, ...(body ? { body } : {}) });
    if (!response.ok) throw new Error(`${method} ${url}: ${response.status} ${await response.text()}`);
    return response;
  };
  const blob = (digest: string) => readFile(join(image.dir, 'blobs', 'sha256', digest.slice(7)));
  for (const { digest } of [image.config, ...image.layers]) {
    const upload = new URL(
      (await send('POST', `${base}/blobs/uploads/`, 'text/plain')).headers.get('location') ?? '',
      base,
    );
    upload.searchParams.set('digest', digest);
    await send('PUT', upload.href, 'application/octet-stream', await blob(digest));
  }
  const { digest, mediaType } = image.manifest;
  await send('PUT', `${base}/manifests/${image.tag}`, mediaType, await blob(digest));
  return `${registry}/${repository}:${image.tag}`;
}

async function tarBytes(source: LayerSource): Promise<Buffer> {
  if ('tar' in source) return Buffer.from(source.tar);
  if ('entries' in source) return tarOf(source.entries);
  const out = await mkdtemp(join(tmpdir(), 'layer-'));
  try {
    const file = join(out, 'layer.tar');
    const args = [
      '--format=pax',
      '--sort=name',
      '--numeric-owner',
      '--xattrs',
      '--xattrs-include=*',
      '-C',
      source.dir,
      '-cf',
      file,
      '.',
    ];
    await run('tar', args, { timeoutMs: 300_000 });
    return await readFile(file);
  } finally {
    await rm(out, { recursive: true, force: true });
  }
}

async function compress(tar: Buffer, compression: LayerCompression): Promise<Buffer> {
  switch (compression) {
    case 'gzip':
      return await promisify(gzip)(tar);
    case 'gnu-gzip':
      return execFileSync('gzip', ['-n', '-6'], { input: tar, maxBuffer: 2 * tar.length + 4096 });
    case 'zstd':
      return await promisify(zstdCompress)(tar);
    case 'zstd-frames': {
      const frames: Buffer[] = [];
      for (let at = 0; at < tar.length; at += FRAME_BYTES) {
        frames.push(await promisify(zstdCompress)(tar.subarray(at, at + FRAME_BYTES)));
      }
      return Buffer.concat(frames);
    }
    case 'none':
      return tar;
  }
}

function json(value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value));
}

async function addBlob(dir: string, mediaType: string, bytes: Buffer): Promise<TestDescriptor> {
  const digest = sha256(bytes);
  await mkdir(join(dir, 'blobs', 'sha256'), { recursive: true });
  await writeFile(join(dir, 'blobs', 'sha256', digest.slice(7)), bytes);
  return { mediaType, digest, size: bytes.length };
}

async function addToLayout(dir: string, tag: string, descriptor: TestDescriptor): Promise<void> {
  const path = join(dir, 'index.json');
  const index: { schemaVersion: number; manifests: (TestDescriptor & { annotations: Record<string, string> })[] } =
    existsSync(path) ? JSON.parse(await readFile(path, 'utf8')) : { schemaVersion: 2, manifests: [] };
  const name = 'org.opencontainers.image.ref.name';
  index.manifests = index.manifests.filter((entry) => entry.annotations[name] !== tag);
  index.manifests.push({ ...descriptor, annotations: { [name]: tag } });
  await writeFile(path, json(index));
  await writeFile(join(dir, 'oci-layout'), json({ imageLayoutVersion: '1.0.0' }));
}

/** Imports an image by ctr(1), unpacked by the snapshotter "dedup", as BASE:TAG. */
export async function importImage(containerd: TestContainerd, image: TestImage, base: string): Promise<void> {
  const archive = join(image.dir, '..', `${containerd.namespace}.tar`);
  await run('tar', ['-C', image.dir, '-cf', archive, '.']);
  try {
    await containerd.ctr(['image', 'import', '--snapshotter', 'dedup', '--base-name', base, archive]);
  } finally {
    await rm(archive);
  }
}
