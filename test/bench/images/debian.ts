// Makes the trees behind layers: a slim base with mmdebstrap, and what steps (packages, scripts, files) change on top
// of it. Everything runs in mount, PID, IPC and network namespaces of its own, so that an interrupted build leaves no
// mount and no process, and no service that a package starts is seen outside. Needs root.
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from '../../support/containerd.ts';
import { emptyDirectories } from '../../support/debian-images.ts';
import type { LayerRecipe, Step } from './recipe.ts';

const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';

/** As Debian's own slim images: nothing that only a person at a terminal reads. */
const EXCLUDES = [
  '/usr/share/doc/*',
  '/usr/share/man/*',
  '/usr/share/info/*',
  '/usr/share/groff/*',
  '/usr/share/lintian/*',
  '/usr/share/locale/*',
];
const INCLUDES = ['/usr/share/doc/*/copyright', '/usr/share/locale/locale.alias'];

const STEP_TIMEOUT_MS = 1_800_000;
/** Namespaces that end with us: `setpriv` because unshare must not outlive an interrupted build. */
const ENCLOSED = [
  '-n',
  '10',
  'setpriv',
  '--pdeathsig',
  'KILL',
  'unshare',
  '--mount',
  '--pid',
  '--fork',
  '--kill-child',
  '--mount-proc',
];

/** Package lists of some suites, fetched for one build. */
export interface Suites {
  readonly sources: readonly string[];
  readonly dir: string;
  /** Seconds: when the youngest of the suites was released; no packaged file is younger. */
  readonly epoch: number;
}

/** The host's own mirror of the archive ("debian", "debian-security"), so that a local mirror is used where there is one. */
async function mirror(archive: string): Promise<string> {
  const parts = '/etc/apt/sources.list.d';
  const files = existsSync(parts) ? (await readdir(parts)).map((name) => join(parts, name)) : [];
  for (const file of ['/etc/apt/sources.list', ...files]) {
    if (!existsSync(file)) continue;
    const found = (await readFile(file, 'utf8')).match(
      new RegExp(`^[^#\\n]*\\b(https?://\\S+/${archive})/?(\\s|$)`, 'm'),
    );
    if (found?.[1] !== undefined) return found[1];
  }
  return `http://deb.debian.org/${archive}`;
}

/** Time of files that no suite dates, seconds. */
export const UNDATED_EPOCH = 1_700_000_000;

/** Fetches the package lists of `suites` into `dir`; nothing to be fetched for no suites. */
export async function fetchSuites(suites: readonly string[], dir: string): Promise<Suites> {
  if (suites.length === 0) return { sources: [], dir, epoch: UNDATED_EPOCH };
  const sources: string[] = [];
  for (const suite of suites) {
    const archive = await mirror(suite.endsWith('-security') ? 'debian-security' : 'debian');
    sources.push(`deb [signed-by=${KEYRING}] ${archive} ${suite} main`);
  }
  const lists = join(dir, 'lists');
  await mkdir(join(lists, 'partial'), { recursive: true });
  await mkdir(join(dir, 'cache', 'archives', 'partial'), { recursive: true });
  await writeFile(join(dir, 'sources.list'), `${sources.join('\n')}\n`);
  await writeFile(
    join(dir, 'update.conf'),
    [...aptSources(dir), `Dir::Cache "${dir}/cache";`, 'Dir::State::status "/dev/null";'].join('\n'),
  );
  await run('apt-get', ['-c', join(dir, 'update.conf'), '-q', '--error-on=any', 'update'], { timeoutMs: 300_000 });
  let epoch = 0;
  for (const name of (await readdir(lists)).filter((file) => file.endsWith('Release'))) {
    const date = (await readFile(join(lists, name), 'utf8')).match(/^Date: (.*)$/m)?.[1] ?? '';
    epoch = Math.max(epoch, Date.parse(date) / 1000 || 0);
  }
  if (epoch === 0) throw new Error(`the lists of ${suites.join(' ')} have no release date`);
  return { sources, dir, epoch };
}

function aptSources(dir: string): string[] {
  return [
    `Dir::State::Lists "${dir}/lists/";`,
    `Dir::Etc::SourceList "${dir}/sources.list";`,
    'Dir::Etc::SourceParts "/dev/null";',
    'Dir::Etc::Preferences "/dev/null";',
    'Dir::Etc::PreferencesParts "/dev/null";',
    'Acquire::Languages "none";',
    'APT::Sandbox::User "root";',
    // Hooks of this machine are not the image's.
    '#clear APT::Update::Post-Invoke;',
    '#clear APT::Update::Post-Invoke-Success;',
    '#clear DPkg::Pre-Invoke;',
    '#clear DPkg::Post-Invoke;',
    '#clear DPkg::Pre-Install-Pkgs;',
  ];
}

/** A slim root file system in `dir` (must not exist). */
export async function makeBase(suites: Suites, dir: string): Promise<void> {
  await run(
    'nice',
    [
      ...ENCLOSED,
      'mmdebstrap',
      '--quiet',
      '--mode=root',
      '--variant=minbase',
      '--include=usr-is-merged',
      '--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr',
      ...EXCLUDES.map((path) => `--dpkgopt=path-exclude=${path}`),
      ...INCLUDES.map((path) => `--dpkgopt=path-include=${path}`),
      '', // the suite comes with the lines
      dir,
      ...suites.sources,
    ],
    { timeoutMs: STEP_TIMEOUT_MS },
  );
  await emptyDirectories(dir);
  // Device nodes are the runtime's business, and these two are the building machine's.
  for (const name of await readdir(join(dir, 'dev')))
    await rm(join(dir, 'dev', name), { recursive: true, force: true });
  for (const name of ['resolv.conf', 'hostname']) await rm(join(dir, 'etc', name), { force: true });
  // No package may start its service while an image is built.
  await writeFile(join(dir, 'usr/sbin/policy-rc.d'), '#!/bin/sh\nexit 101\n', { mode: 0o755 });
}

/**
 * Runs the steps of a layer on `lowers` (directories, bottom to top); what they changed is then in `work`/upper.
 * Throws with the output of the step that failed.
 */
export async function makeLayer(
  recipe: LayerRecipe,
  suites: Suites,
  lowers: readonly string[],
  work: string,
): Promise<string> {
  const [upper, root] = [join(work, 'upper'), join(work, 'root')];
  for (const dir of [upper, root, join(work, 'work'), join(work, 'files'), join(work, 'cache', 'archives', 'partial')])
    await mkdir(dir, { recursive: true });
  await writeFile(
    join(work, 'apt.conf'),
    [
      ...aptSources(suites.dir),
      `Dir::State "${root}/var/lib/apt";`,
      `Dir::State::status "${root}/var/lib/dpkg/status";`,
      `Dir::Cache "${work}/cache";`,
      `Dir::Log "${work}";`,
      'APT::Install-Recommends "false";',
      'DPkg::Use-Pty "false";',
      `DPkg::Options { "--root=${root}"; "--log=/dev/null"; "--force-confold"; "--force-unsafe-io"; };`,
      `DPkg::Options { ${EXCLUDES.map((path) => `"--path-exclude=${path}";`).join(' ')} };`,
      `DPkg::Options { ${INCLUDES.map((path) => `"--path-include=${path}";`).join(' ')} };`,
    ].join('\n'),
  );
  const script = [
    'set -eu',
    // Only whole copies in the upper directory: a layer has no words for redirects and metadata-only copies.
    `mount -t overlay overlay -o lowerdir=${[...lowers].reverse().join(':')},upperdir=${upper},workdir=${work}/work,redirect_dir=off,metacopy=off,index=off ${root}`,
    `mount -t tmpfs -o mode=755 dev ${root}/dev`,
    ...['null 3', 'zero 5', 'full 7', 'random 8', 'urandom 9'].map((node) => {
      const [name, minor] = node.split(' ');
      return `mknod -m 666 ${root}/dev/${name} c 1 ${minor}`;
    }),
    `mkdir -m 1777 ${root}/dev/shm && ln -s /proc/self/fd ${root}/dev/fd`,
    `mount -t tmpfs -o mode=1777 tmp ${root}/tmp`,
  ];
  for (const [at, step] of recipe.steps.entries()) script.push(...(await stepScript(step, root, work, at)));
  await writeFile(join(work, 'build.sh'), `${script.join('\n')}\n`);
  const result = await run('nice', [...ENCLOSED, 'sh', join(work, 'build.sh')], {
    timeoutMs: STEP_TIMEOUT_MS,
    allowFailure: true,
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive', LC_ALL: 'C.UTF-8', HOME: '/root' },
  });
  if (result.code !== 0) {
    const tail = `${result.stdout}${result.stderr}`.split('\n').slice(-40).join('\n');
    throw new Error(`building a layer: exit ${result.code}\n${tail}`);
  }
  await emptyDirectories(upper);
  return upper;
}

async function stepScript(step: Step, root: string, work: string, at: number): Promise<string[]> {
  const inside = `unshare --net --pid --ipc --fork --kill-child --mount-proc=${root}/proc`;
  const file = join(work, 'files', String(at));
  if ('install' in step) {
    const apt = `apt-get -c ${work}/apt.conf -y -q`;
    const packages = step.install.join(' ');
    // Two calls, because only the first may see a network.
    return [
      `${apt} --download-only install ${packages}`,
      `${inside} ${apt} --no-download install ${packages}`,
      `rm -f ${work}/cache/archives/*.deb`,
    ];
  }
  if ('run' in step) {
    await writeFile(file, `set -eu\n${step.run}\n`);
    return [`cp ${file} ${root}/tmp/step && ${inside} chroot ${root} /bin/sh /tmp/step && rm ${root}/tmp/step`];
  }
  await writeFile(file, step.content);
  return [`install -D -m ${(step.mode ?? 0o644).toString(8)} ${file} ${root}${step.file}`];
}

/** Package → version in the dpkg database below a directory; empty where it has none. */
export async function installedPackages(dir: string): Promise<Map<string, string>> {
  const path = join(dir, 'var/lib/dpkg/status');
  const installed = new Map<string, string>();
  if (!existsSync(path)) return installed;
  for (const paragraph of (await readFile(path, 'utf8')).split('\n\n')) {
    const name = paragraph.match(/^Package: (.*)$/m)?.[1];
    const version = paragraph.match(/^Version: (.*)$/m)?.[1];
    if (name !== undefined && version !== undefined) installed.set(name, version);
  }
  return installed;
}
