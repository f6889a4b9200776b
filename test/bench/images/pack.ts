// From a directory to a compressed layer blob, and back to a directory that overlayfs can take as a lower one. Streams
// only: a layer may be larger than memory.
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createWriteStream, existsSync } from 'node:fs';
import { lstat, mkdir, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { createGzip } from 'node:zlib';
import { run } from '../../support/containerd.ts';

export interface PackedLayer {
  /** Of the gzip stream. */
  readonly digest: string;
  /** Of the tar. */
  readonly diffId: string;
  readonly compressedBytes: number;
  readonly uncompressedBytes: number;
  /** Regular files in it. */
  readonly files: number;
  readonly largestFile: { readonly path: string; readonly bytes: number };
}

interface Members {
  /** Paths relative to the directory, parents first. */
  readonly paths: string[];
  /** Whiteout markers to be added: "etc/.wh.old", "srv/.wh..wh..opq". */
  readonly markers: string[];
  files: number;
  largest: { path: string; bytes: number };
}

/** Directories that overlayfs marked as hiding everything below them. */
async function opaqueDirectories(dir: string): Promise<Set<string>> {
  const list = await run(
    'getfattr',
    ['--recursive', '--physical', '--no-dereference', '--absolute-names', '--match=^trusted.overlay.opaque$', dir],
    { timeoutMs: 300_000 },
  );
  const found = list.stdout.matchAll(/^# file: (.*)$/gm);
  return new Set(Array.from(found, ([, path]) => (path ?? '').slice(dir.length + 1)));
}

async function membersOf(dir: string, lowers: readonly string[]): Promise<Members> {
  const opaque = await opaqueDirectories(dir);
  const members: Members = { paths: [], markers: [], files: 0, largest: { path: '', bytes: 0 } };
  const visit = async (at: string): Promise<void> => {
    const entries = await readdir(join(dir, at), { withFileTypes: true });
    entries.sort((a, b) => (a.name < b.name ? -1 : 1));
    for (const entry of entries) {
      const path = at === '' ? entry.name : `${at}/${entry.name}`;
      const stat = await lstat(join(dir, path));
      // overlayfs says "deleted" with a character device 0/0; a layer says it with an empty file of a special name.
      if (stat.isCharacterDevice() && stat.rdev === 0) {
        members.markers.push(at === '' ? `.wh.${entry.name}` : `${at}/.wh.${entry.name}`);
        continue;
      }
      members.paths.push(path);
      if (stat.isDirectory()) {
        // The kernel marks every new directory; a layer needs the word only where something lies below.
        if (opaque.has(path) && lowers.some((lower) => existsSync(join(lower, path))))
          members.markers.push(`${path}/.wh..wh..opq`);
        await visit(path);
      } else if (stat.isFile()) {
        members.files++;
        if (stat.size > members.largest.bytes) members.largest = { path, bytes: stat.size };
      }
    }
  };
  await visit('');
  return members;
}

/** A pass-through that counts and hashes. */
class Meter extends Transform {
  readonly #hash = createHash('sha256');
  bytes = 0;

  override _transform(chunk: Buffer, _encoding: string, done: (error: null, chunk: Buffer) => void): void {
    this.bytes += chunk.length;
    this.#hash.update(chunk);
    done(null, chunk);
  }

  digest(): string {
    return `sha256:${this.#hash.digest('hex')}`;
  }
}

/**
 * Packs the tree at `dir` (an upper directory of overlayfs, or a root) into a gzip blob at `out`, compressed as Docker
 * and BuildKit do by default (level 6). Times after `epoch` (seconds) become `epoch`, so that a layer that is made
 * again from the same packages is the same layer. `lowers` are the trees below it, `scratch` is a directory for lists.
 * Throws when tar fails; `out` is then absent.
 */
export async function packLayer(
  dir: string,
  lowers: readonly string[],
  out: string,
  epoch: number,
  scratch: string,
): Promise<PackedLayer> {
  const members = await membersOf(dir, lowers);
  const markers = join(scratch, 'markers');
  for (const marker of members.markers) {
    await mkdir(dirname(join(markers, marker)), { recursive: true });
    await writeFile(join(markers, marker), '');
  }
  await mkdir(markers, { recursive: true });
  await writeFile(join(scratch, 'paths'), members.paths.map((path) => `${path}\0`).join(''));
  await writeFile(join(scratch, 'marker-paths'), members.markers.map((path) => `${path}\0`).join(''));
  const args = ['-n', '10', 'tar', '--format=pax', '--numeric-owner', '--no-recursion'];
  args.push('--pax-option=delete=atime,delete=ctime,delete=mtime', '--clamp-mtime', `--mtime=@${epoch}`);
  args.push('--xattrs', '--xattrs-include=security.*', '--xattrs-include=user.*', '--null');
  args.push('-C', dir, `--files-from=${join(scratch, 'paths')}`);
  args.push('-C', markers, `--files-from=${join(scratch, 'marker-paths')}`, '-cf', '-');
  const tar = spawn('nice', args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let complaints = '';
  tar.stderr.setEncoding('utf8').on('data', (text: string) => {
    complaints += text;
  });
  const ended = new Promise<number | null>((resolve, reject) => tar.once('error', reject).once('close', resolve));
  const plain = new Meter();
  const packed = new Meter();
  const part = `${out}.part`;
  try {
    await pipeline(tar.stdout, plain, createGzip(), packed, createWriteStream(part));
    const code = await ended;
    if (code !== 0) throw new Error(`tar of ${dir}: exit ${code}\n${complaints}`);
    await rename(part, out);
  } finally {
    tar.kill('SIGKILL');
    await rm(part, { force: true });
  }
  return {
    digest: packed.digest(),
    diffId: plain.digest(),
    compressedBytes: packed.bytes,
    uncompressedBytes: plain.bytes,
    files: members.files,
    largestFile: members.largest,
  };
}

/** Unpacks a blob of `packLayer` so that the directory can be a lower one of overlayfs: whiteouts as overlayfs has them. */
export async function unpackLayer(blob: string, dir: string): Promise<void> {
  await mkdir(dir, { recursive: true });
  await run(
    'nice',
    ['-n', '10', 'tar', '-C', dir, '--xattrs', '--xattrs-include=*', '--numeric-owner', '-xpzf', blob],
    { timeoutMs: 900_000 },
  );
  const markers = await run('find', [dir, '-name', '.wh.*', '-print0']);
  for (const marker of markers.stdout.split('\0').filter((path) => path !== '')) {
    const name = marker.slice(marker.lastIndexOf('/') + 1);
    await rm(marker);
    if (name === '.wh..wh..opq') await run('setfattr', ['-n', 'trusted.overlay.opaque', '-v', 'y', dirname(marker)]);
    else await run('mknod', [join(dirname(marker), name.slice('.wh.'.length)), 'c', '0', '0']);
  }
}
