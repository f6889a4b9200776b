// Programs of other containerds, in the cache: from the package of another Debian release, unpacked and never installed,
// or built from containerd's Go module. They run with this system's C library and runc. Called by compat.ts.
import { existsSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { delimiter, join } from 'node:path';
import { fetchSuites } from '../bench/images/debian.ts';
import { run } from '../support/containerd.ts';

/** What of a containerd runs; runc is the system's. */
const PROGRAMS = ['containerd', 'ctr', 'containerd-shim-runc-v2'];
const MODULE = 'github.com/containerd/containerd/v2';
/** Go where it is installed by hand; the one in PATH may be Debian's, which is too old for containerd 2. */
const GO_FOLDERS = [...(process.env.PATH ?? '').split(delimiter), '/usr/local/go/bin'];
/** containerd 2.1 asks for it. */
const GO_NEEDED = [1, 24] as const;
const DOWNLOAD_MS = 300_000;
const BUILD_MS = 900_000;

export type Say = (text: string) => void;

export interface Programs {
  /** Folder for the front of PATH. */
  readonly dir: string;
  /** As the suite or the module calls it. */
  readonly version: string;
}

/** Folder of a Go that can build containerd 2; undefined when there is none. */
export async function goFolder(): Promise<string | undefined> {
  for (const folder of GO_FOLDERS) {
    const go = join(folder, 'go');
    if (!existsSync(go)) continue;
    const [, major, minor] = /go(\d+)\.(\d+)/.exec((await run(go, ['version'])).stdout) ?? [];
    if (Number(major) > GO_NEEDED[0] || (Number(major) === GO_NEEDED[0] && Number(minor) >= GO_NEEDED[1]))
      return folder;
  }
  return undefined;
}

/** Variables of a Go that uses modules, not Debian's sources, and only the Go that is there. */
export function goEnvironment(folder: string): NodeJS.ProcessEnv {
  const path = [folder, process.env.PATH].join(delimiter);
  return { ...process.env, PATH: path, GO111MODULE: 'on', GOFLAGS: '-buildvcs=false -mod=mod', GOTOOLCHAIN: 'local' };
}

/** Runs `make` on a folder that becomes `final`, unless that exists. */
async function once(final: string, make: (work: string) => Promise<void>): Promise<void> {
  if (existsSync(final)) return;
  await mkdir(join(final, '..'), { recursive: true });
  const work = await mkdtemp(`${final}.part-`);
  try {
    await mkdir(join(work, 'made'));
    await make(work);
    await rename(join(work, 'made'), final);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** containerd as the Debian suite offers it now. */
export async function debianPrograms(suite: string, cache: string, say: Say): Promise<Programs> {
  const work = await mkdtemp(join(cache, 'lists-'));
  try {
    say(`fetching the package lists of ${suite}`);
    await fetchSuites([suite], work);
    const config = ['-c', join(work, 'update.conf')];
    const { stdout } = await run('apt-cache', [...config, 'show', '--no-all-versions', 'containerd']);
    const version = /^Version: (.*)$/m.exec(stdout)?.[1];
    if (version === undefined) throw new Error(`${suite} has no package containerd`);
    const dir = join(cache, `debian-${version}`);
    await once(dir, async (part) => {
      say(`fetching containerd ${version} of ${suite}`);
      await run('apt-get', [...config, '-q', 'download', 'containerd'], { cwd: part, timeoutMs: DOWNLOAD_MS });
      const name = (await readdir(part)).find((file) => file.endsWith('.deb')) ?? '';
      await run('dpkg-deb', ['-x', join(part, name), join(part, 'root')]);
      for (const program of PROGRAMS) await rename(join(part, 'root/usr/bin', program), join(part, 'made', program));
    });
    return { dir, version };
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** containerd built from the newest version of its module that `query` (as for `go get`) allows. */
export async function modulePrograms(query: string, folder: string, cache: string, say: Say): Promise<Programs> {
  const env = { ...goEnvironment(folder), CGO_ENABLED: '0' };
  const go = join(folder, 'go');
  const work = await mkdtemp(join(cache, 'module-'));
  try {
    await writeFile(join(work, 'go.mod'), 'module compat\n');
    say(`fetching containerd's Go module, ${query}`);
    const words = ['mod', 'download', '-json', `${MODULE}@${query}`];
    const { stdout } = await run(go, words, { cwd: work, env, timeoutMs: DOWNLOAD_MS });
    const { Version: version, Dir: sources } = JSON.parse(stdout) as { Version: string; Dir: string };
    const dir = join(cache, `module-${version}`);
    await once(dir, async (part) => {
      say(`building containerd ${version}`);
      const tree = join(part, 'tree');
      await cp(sources, tree, { recursive: true });
      await run('chmod', ['-R', 'u+w', tree]);
      // The list of what is vendored comes without what is vendored.
      await rm(join(tree, 'vendor'), { recursive: true, force: true });
      const flags = ['-tags', 'no_btrfs no_devmapper no_zfs', '-ldflags', `-X ${MODULE}/version.Version=${version}`];
      const packages = PROGRAMS.map((program) => `./cmd/${program}`);
      const out = `${join(part, 'made')}/`;
      await run(go, ['build', ...flags, '-o', out, ...packages], { cwd: tree, env, timeoutMs: BUILD_MS });
    });
    return { dir, version };
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}
