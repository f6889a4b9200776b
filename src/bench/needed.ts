// Which bytes of an image a start really needs: the pages it touches are found with mincore(2) on a mount whose data is
// all present, and mapped through the layers' indexes to the compressed spans that hold them. Independent of what the
// snapshotter fetched.
import { closeSync, constants, openSync } from 'node:fs';
import { lstat, open, readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { majorOf, minorOf } from '../device-number.ts';
import { decodeLayerIndex } from '../fs/index/format.ts';
import { EntryType, type LayerIndex } from '../fs/index/layer-index.ts';
import { native } from '../fs/native.ts';
import type { ByteRange } from '../units.ts';

const PAGE_BYTES = 4096;

/** A file with pages in the cache. */
export interface TouchedFile {
  /** From the root, without a leading "/", bytes as latin1. */
  readonly path: string;
  readonly size: number;
  /** One byte per page, 1: touched. */
  readonly pages: Uint8Array;
}

export interface Needed {
  /** Bytes of the touched pages; the last page of a file counts as far as the file goes. */
  readonly touchedBytes: number;
  /** Compressed bytes of the distinct spans that hold them. */
  readonly neededBytes: number;
  readonly spans: number;
  /** Touched bytes of files that no layer has under that name; should be none. */
  readonly unknownBytes: number;
}

/** Every regular file below `root` (on the same file system) that has pages in the cache. Reads none of them. */
export async function touchedFiles(root: string): Promise<TouchedFile[]> {
  const found: TouchedFile[] = [];
  const seen = new Set<number>();
  const device = (await lstat(root)).dev;
  const visit = async (path: Buffer, name: string): Promise<void> => {
    for (const entry of await readdir(path, { withFileTypes: true, encoding: 'buffer' })) {
      const below = Buffer.concat([path, Buffer.from('/'), entry.name]);
      const title = name === '' ? entry.name.toString('latin1') : `${name}/${entry.name.toString('latin1')}`;
      if (entry.isDirectory()) await visit(below, title);
      if (!entry.isFile()) continue;
      const { size, ino, dev } = await lstat(below);
      // Hard links share their pages.
      if (size === 0 || dev !== device || seen.has(ino)) continue;
      seen.add(ino);
      const fd = openSync(below, constants.O_RDONLY | constants.O_NOATIME);
      try {
        const pages = await native().residentPages(fd, size);
        if (pages.includes(1)) found.push({ path: title, size, pages });
      } finally {
        closeSync(fd);
      }
    }
  };
  await visit(Buffer.from(root), '');
  return found;
}

/** The indexes in a directory of dedupd's, by the digest of their layer. */
export async function readIndexes(directory: string): Promise<Map<string, LayerIndex>> {
  const found = new Map<string, LayerIndex>();
  for (const name of await readdir(directory)) {
    if (!name.endsWith('.index')) continue;
    const index = decodeLayerIndex(await readFile(join(directory, name)));
    found.set(index.layerDigest, index);
  }
  return found;
}

/** Maps touched pages to spans. `layers`: bottom to top. */
export function neededBytes(layers: readonly LayerIndex[], files: readonly TouchedFile[]): Needed {
  const books = layers.map((index) => new LayerNames(index)).reverse();
  const spans = books.map(() => new Set<number>());
  let [touchedBytes, unknownBytes, looseBytes] = [0, 0, 0];
  for (const file of files) {
    const at = books.findIndex((book) => book.entryOf(file.path) !== undefined);
    const entry = books[at]?.entryOf(file.path);
    for (const range of touchedRanges(file)) {
      touchedBytes += range.length;
      if (entry === undefined) {
        unknownBytes += range.length;
        continue;
      }
      for (const part of tarRanges(books[at]!.index, entry, range)) {
        if (books[at]!.index.spans.count === 0) looseBytes += part.length;
        else for (const span of spansOf(books[at]!.index, part)) spans[at]!.add(span);
      }
    }
  }
  let bytes = looseBytes;
  books.forEach(({ index }, at) => {
    for (const span of spans[at]!) bytes += spanBytes(index, span);
  });
  return { touchedBytes, neededBytes: bytes, spans: spans.reduce((sum, set) => sum + set.size, 0), unknownBytes };
}

/** Runs of touched pages as byte ranges of the file. */
function* touchedRanges({ pages, size }: TouchedFile): Generator<ByteRange> {
  for (let at = pages.indexOf(1); at >= 0; ) {
    let end = pages.indexOf(0, at);
    if (end < 0) end = pages.length;
    const offset = at * PAGE_BYTES;
    yield { offset, length: Math.min(size, end * PAGE_BYTES) - offset };
    at = pages.indexOf(1, end);
  }
}

/** Where the bytes of a file's range lie in the layer's tar; holes and chunks of zeros lie nowhere. */
function* tarRanges(
  { entries, chunks, chunkBytes }: LayerIndex,
  entry: number,
  range: ByteRange,
): Generator<ByteRange> {
  const end = range.offset + range.length;
  for (let place = Math.floor(range.offset / chunkBytes); place * chunkBytes < end; place++) {
    if (place >= entries.chunkCount[entry]!) return;
    const chunk = entries.firstChunk[entry]! + place;
    if (chunks.zero[chunk] === 1) continue;
    const from = Math.max(0, range.offset - place * chunkBytes);
    const to = Math.min(chunks.length[chunk]!, end - place * chunkBytes);
    if (to <= from) continue;
    const first = chunks.fragmentStart[chunk]!;
    const last = chunks.fragmentStart[chunk + 1]!;
    if (first === last) yield { offset: chunks.tarOffset[chunk]! + from, length: to - from };
    for (let i = first; i < last; i++) {
      const start = chunks.fragmentChunkOffset[i]!;
      const low = Math.max(from, start);
      const high = Math.min(to, start + chunks.fragmentLength[i]!);
      if (low < high) yield { offset: chunks.fragmentTarOffset[i]! + (low - start), length: high - low };
    }
  }
}

/** Numbers of the spans that hold a range of the tar. */
function* spansOf({ spans }: LayerIndex, range: ByteRange): Generator<number> {
  let [low, high] = [0, spans.count - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (spans.outOffset[middle]! <= range.offset) low = middle;
    else high = middle - 1;
  }
  for (let span = low; span < spans.count && spans.outOffset[span]! < range.offset + range.length; span++) yield span;
}

function spanBytes({ spans, layerBytes }: LayerIndex, span: number): number {
  return (span + 1 < spans.count ? spans.inOffset[span + 1]! : layerBytes) - spans.inOffset[span]!;
}

/** Names of a layer's regular files; hard links stand for their targets. */
class LayerNames {
  readonly index: LayerIndex;
  readonly #byName = new Map<string, number>();

  constructor(index: LayerIndex) {
    this.index = index;
    const { entries } = index;
    for (let i = 0; i < entries.count; i++) {
      const type = entries.type[i];
      if (type === EntryType.file) this.#byName.set(entries.name[i]!, i);
      else if (type === EntryType.hardLink) {
        const target = this.#byName.get(entries.link[i]!);
        if (target !== undefined) this.#byName.set(entries.name[i]!, target);
      }
    }
  }

  entryOf(path: string): number | undefined {
    return this.#byName.get(path);
  }
}

/** Sets the readahead of the file systems that `paths` are on to 0; the returned function sets it back. */
export async function withoutReadahead(paths: readonly string[]): Promise<() => Promise<void>> {
  const before = new Map<string, string>();
  for (const path of paths) {
    const { dev } = await lstat(path, { bigint: true });
    const file = `/sys/class/bdi/${majorOf(dev)}:${minorOf(dev)}/read_ahead_kb`;
    if (before.has(file)) continue;
    before.set(file, (await readFile(file, 'utf8')).trim());
    await writeText(file, '0');
  }
  return async () => {
    for (const [file, value] of before) await writeText(file, value);
  };
}

async function writeText(path: string, text: string): Promise<void> {
  await using handle = await open(path, 'w');
  await handle.write(text);
}
