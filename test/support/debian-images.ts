// Real images from named Debian packages: a configured base, and layers that apt installs on top of it, as a Dockerfile's
// RUN would. Used by the demo, the benchmarks and end-to-end tests; results are cached by what they are made of.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { lstat, mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from './containerd.ts';
import { makeImage, type TestImage, testCacheDir } from './images.ts';

export interface DebianImageSpec {
  /** Tag in the layout. */
  readonly tag: string;
  /** Packages of each layer above the base, bottom to top. */
  readonly layers: readonly (readonly string[])[];
  readonly config: Readonly<Record<string, unknown>>;
}

/** Bumped when the way layers are made changes. */
const RECIPE = 3;
const SUITE = 'bookworm';

export const PYTHON_IMAGE: DebianImageSpec = {
  tag: 'python',
  layers: [['python3']],
  config: {
    Cmd: ['python3', '-c', 'import json; print("ready", json.dumps([1]))'],
    Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
  },
};

export const NGINX_IMAGE: DebianImageSpec = {
  tag: 'nginx',
  layers: [['nginx']],
  config: { Cmd: ['nginx', '-V'], Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'] },
};

/** Files that only matter to the package manager of the build, removed from every layer. */
const LEFTOVERS = [
  'var/cache/apt',
  'var/lib/apt/lists',
  'var/log/apt',
  'var/log/dpkg.log',
  'var/log/alternatives.log',
  'var/cache/ldconfig',
  'var/cache/debconf',
];

async function aptSources(): Promise<string[]> {
  for (const path of ['/etc/apt/sources.list.d/debian.sources', '/etc/apt/sources.list'])
    if (existsSync(path)) return [path];
  return [];
}

/** Removes them below `root`. */
export async function emptyDirectories(root: string): Promise<void> {
  for (const path of LEFTOVERS) {
    const full = join(root, path);
    if (!existsSync(full)) continue;
    if (!(await lstat(full)).isDirectory()) await rm(full);
    else for (const name of await readdir(full)) await rm(join(full, name), { recursive: true });
  }
}

async function packTar(dir: string, out: string): Promise<void> {
  const whiteouts: string[] = [];
  const visit = async (at: string): Promise<void> => {
    for (const entry of await readdir(join(dir, at), { withFileTypes: true })) {
      const path = join(at, entry.name);
      if (entry.isDirectory()) await visit(path);
      else if (entry.isCharacterDevice() && (await lstat(join(dir, path))).rdev === 0) whiteouts.push(path);
    }
  };
  await visit('.');
  for (const path of whiteouts) {
    // Only now: while overlayfs was mounted, the device was the whiteout.
    await rm(join(dir, path));
    await writeFile(join(dir, path.replace(/([^/]+)$/, '.wh.$1')), '');
  }
  await run(
    'tar',
    [
      '--format=pax',
      '--sort=name',
      '--numeric-owner',
      '--xattrs',
      '--xattrs-exclude=trusted.*',
      '-C',
      dir,
      '-cf',
      `${out}.part`,
      '.',
    ],
    {
      timeoutMs: 300_000,
    },
  );
  await rename(`${out}.part`, out);
}

/** A root file system of the base suite, as a tar in the cache. */
async function baseTar(cache: string, say: (text: string) => void): Promise<string> {
  const out = join(cache, `base-${SUITE}-${RECIPE}.tar`);
  if (existsSync(out)) return out;
  say(`building the base file system from Debian ${SUITE}`);
  const dir = join(cache, `base.${process.pid}`);
  try {
    await run('mmdebstrap', ['--quiet', '--variant=minbase', SUITE, dir, ...(await aptSources())], {
      timeoutMs: 600_000,
    });
    await emptyDirectories(dir);
    // Device nodes are the runtime's business.
    for (const name of await readdir(join(dir, 'dev')))
      await rm(join(dir, 'dev', name), { recursive: true, force: true });
    await packTar(dir, out);
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
  return out;
}

/** The tar of what installing `packages` changes on top of `below` (tars, bottom to top). */
async function packageTar(
  cache: string,
  below: readonly string[],
  packages: readonly string[],
  say: (text: string) => void,
): Promise<string> {
  const name = createHash('sha256')
    .update(JSON.stringify([RECIPE, SUITE, below, packages]))
    .digest('hex')
    .slice(0, 12);
  const out = join(cache, `${packages[0]}-${name}.tar`);
  if (existsSync(out)) return out;
  say(`installing ${packages.join(' ')} into a layer`);
  const work = join(cache, `layer.${process.pid}`);
  const dirs = {
    base: join(work, 'base'),
    upper: join(work, 'upper'),
    work: join(work, 'work'),
    root: join(work, 'root'),
  };
  for (const dir of Object.values(dirs)) await mkdir(dir, { recursive: true });
  await mkdir(join(work, 'archives', 'partial'), { recursive: true });
  let mounted = false;
  try {
    for (const tar of below)
      await run('tar', ['-C', dirs.base, '--xattrs', '--numeric-owner', '-xpf', tar], { timeoutMs: 300_000 });
    await run('mount', [
      '-t',
      'overlay',
      'overlay',
      '-o',
      `lowerdir=${dirs.base},upperdir=${dirs.upper},workdir=${dirs.work}`,
      dirs.root,
    ]);
    mounted = true;
    const config = [
      `Dir::State::status "${dirs.root}/var/lib/dpkg/status";`,
      `DPkg::Options { "--root=${dirs.root}"; "--log=/dev/null"; };`,
      `Dir::Cache::archives "${work}/archives/";`,
      `Dir::Log "${work}/";`,
      'APT::Install-Recommends "false";',
      'APT::Sandbox::User "root";',
      'DPkg::Use-Pty "false";',
      '#clear DPkg::Post-Invoke;',
    ];
    await writeFile(join(work, 'apt.conf'), config.join('\n'));
    await run('apt-get', ['-c', join(work, 'apt.conf'), '-y', '-qq', 'install', ...packages], {
      timeoutMs: 600_000,
      env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive', PYTHONDONTWRITEBYTECODE: '1' },
    });
    await emptyDirectories(dirs.root);
    await run('umount', [dirs.root]);
    mounted = false;
    await packTar(dirs.upper, out);
  } finally {
    if (mounted) await run('umount', ['-l', dirs.root]);
    await rm(work, { recursive: true, force: true });
  }
  return out;
}

/** Builds the images into one OCI layout directory (gzip layers, one shared base) in the cache; made once per machine. */
export async function debianImages(
  specs: readonly DebianImageSpec[],
  say: (text: string) => void = () => {},
): Promise<{ dir: string; images: Map<string, TestImage> }> {
  const cache = join(await testCacheDir(), 'debian');
  await mkdir(cache, { recursive: true });
  const dir = join(cache, 'layout');
  const images = new Map<string, TestImage>();
  const base = await baseTar(cache, say);
  for (const spec of specs) {
    const record = join(
      cache,
      `image-${createHash('sha256')
        .update(JSON.stringify([RECIPE, spec]))
        .digest('hex')
        .slice(0, 16)}.json`,
    );
    if (existsSync(record)) {
      images.set(spec.tag, JSON.parse(await readFile(record, 'utf8')) as TestImage);
      continue;
    }
    const tars = [base];
    for (const packages of spec.layers) tars.push(await packageTar(cache, tars, packages, say));
    say(`packing image ${spec.tag}`);
    const layers = [];
    for (const tar of tars) layers.push({ tar: await readFile(tar) });
    const image = await makeImage({ layers, config: spec.config, tag: spec.tag, into: dir });
    await writeFile(record, JSON.stringify(image));
    images.set(spec.tag, image);
  }
  return { dir, images };
}
