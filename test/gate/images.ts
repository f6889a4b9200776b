// Images whose every byte follows from a seed, on every machine: what the gate counts must not change with a package
// mirror, a processor or a compression library. Layers are compressed by gzip(1): Node's zlib picks its code, and with it
// its output, by the processor.
import { createCipheriv, createHash } from 'node:crypto';
import { KiB, MiB } from '../../src/units.ts';
import type { LayerSource } from '../support/images.ts';
import type { TarEntry } from '../support/tar.ts';

/** A file of an image, as a container sees it. */
export interface GateFile {
  readonly path: string;
  readonly content: Buffer;
}

export interface GateImage {
  readonly layers: readonly LayerSource[];
  /** What is visible, in the order of the layers and their members. */
  readonly files: readonly GateFile[];
}

/** Bytes that do not compress: AES in counter mode, keyed by the seed. */
export function noise(seed: string, bytes: number): Buffer {
  const key = createHash('sha256').update(seed).digest();
  return createCipheriv('aes-256-ctr', key, Buffer.alloc(16)).update(Buffer.alloc(bytes));
}

/** A number from 0 to below `end`, the same for the same seed. */
export function pick(seed: string, end: number): number {
  return createHash('sha256').update(seed).digest().readUInt32LE(0) % end;
}

const WORDS = Array.from({ length: 256 }, (_, i) => {
  const hex = createHash('sha256').update(`word ${i}`).digest('hex');
  return Buffer.from(`${hex.slice(0, 2 + (i % 9))}${i % 11 === 0 ? '\n' : ' '}`);
});

/** Bytes that compress about threefold, different everywhere. */
export function text(seed: string, bytes: number): Buffer {
  const out = Buffer.alloc(bytes);
  const choices = noise(seed, bytes);
  for (let at = 0, next = 0; at < bytes; next++) at += WORDS[choices[next]!]!.copy(out, at);
  return out;
}

/** Many small files of text, as scripts, headers and message catalogues are. */
function smallFiles(directory: string, count: number, maxBytes: number): GateFile[] {
  return Array.from({ length: count }, (_, i) => {
    const path = `${directory}/${i % 20}/${i}`;
    return { path, content: text(path, 1 + pick(path, maxBytes)) };
  });
}

/** The files as members of a tar, with the directories they lie in before them. */
function membersOf(files: readonly GateFile[]): TarEntry[] {
  const directories = new Set<string>();
  for (const { path } of files) {
    const parts = path.split('/');
    for (let depth = 1; depth < parts.length; depth++) directories.add(parts.slice(0, depth).join('/'));
  }
  return [
    ...[...directories].sort().map((name): TarEntry => ({ name: `${name}/`, type: 'dir' })),
    ...files.map(({ path, content }): TarEntry => ({ name: path, content })),
  ];
}

function layerOf(files: readonly GateFile[], more: readonly TarEntry[] = []): LayerSource {
  return { entries: [...membersOf(files), ...more], compression: 'gnu-gzip' };
}

/** In two images and, within the first, in two layers. */
const LIBRARY: GateFile = { path: 'usr/lib/large', content: text('library', 5 * MiB + 321) };

function baseFiles(): GateFile[] {
  const program = Buffer.concat([text('program', 1900 * KiB), noise('program', 1700 * KiB)]);
  return [...smallFiles('usr/share', 300, 32 * KiB), { path: 'bin/program', content: program }];
}

/** Three layers: many small files; large ones; an application that hides a file and has one of the second layer's too. */
export function firstImage(): GateImage {
  const base = baseFiles();
  const large = [LIBRARY, { path: 'usr/lib/packed', content: noise('packed', 7 * MiB + 17) }];
  const app = [...smallFiles('app', 60, 16 * KiB), { path: 'app/copy', content: LIBRARY.content }];
  const hidden = base[7]!.path;
  const whiteout = { name: hidden.replace(/([^/]+)$/, '.wh.$1'), content: '' };
  return {
    layers: [layerOf(base), layerOf(large), layerOf(app, [whiteout])],
    files: [...base.filter(({ path }) => path !== hidden), ...large, ...app],
  };
}

/** The first image's lowest layer, its large file under another name, and a little of its own. */
export function secondImage(): GateImage {
  const base = baseFiles();
  const own = [
    { path: 'opt/moved', content: LIBRARY.content },
    { path: 'opt/own', content: text('own', 2 * MiB + 5) },
  ];
  return { layers: [layerOf(base), layerOf(own)], files: [...base, ...own] };
}

/** Large enough for processor time to be measured: one third small files, two thirds large ones. */
export function largeImage(): GateImage {
  const small = smallFiles('usr/share', 1000, 32 * KiB);
  const large = Array.from({ length: 4 }, (_, i) => ({
    path: `usr/lib/${i}`,
    content: i % 2 === 0 ? text(`large ${i}`, 8 * MiB) : noise(`large ${i}`, 6 * MiB),
  }));
  return { layers: [layerOf(small), layerOf(large)], files: [...small, ...large] };
}
