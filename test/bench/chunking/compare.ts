// What each way of cutting shares between two versions of an image, and what it makes of all images together. Figures
// only; chunking.ts reads the images and writes the tables.
import { BLOCK_BYTES, roundUp } from '../../../src/units.ts';
import type { Catalogue, CataloguedLayer, Content } from './catalogue.ts';

/** Bytes of the contents that only the newer version has, and how many of them the older one's chunks give. */
export interface Shared {
  readonly newBytes: number;
  /** Files of them. */
  readonly files: number;
  /** By cutter: the bytes of chunks that the older version has anywhere. */
  readonly anywhere: readonly number[];
  /** By cutter: the bytes of chunks that the older version has at the same place of the same file. */
  readonly inPlace: readonly number[];
  /** Both again in compressed bytes, each by the ratio of its layer. */
  readonly newCompressedBytes: number;
  readonly anywhereCompressed: readonly number[];
}

export interface PairShares {
  /** All contents, and those of files above each of the thresholds. */
  readonly all: Shared;
  readonly above: readonly Shared[];
}

/** The same file in another version, although a part of its name counts versions. */
function place(path: string): string {
  return path.replace(/\d+/g, '#');
}

export function comparePair(
  catalogue: Catalogue,
  older: readonly CataloguedLayer[],
  newer: readonly CataloguedLayer[],
  thresholds: readonly number[],
): PairShares {
  const had = new Set<Content>();
  const places = new Map<string, Content>();
  for (const { files } of older) {
    for (const { path, content } of files) {
      had.add(content);
      places.set(place(path), content);
    }
  }
  // What has the very same name is the earlier version of it, whatever else is named like it.
  const paths = new Map(older.flatMap(({ files }) => files.map(({ path, content }) => [path, content] as const)));
  const oldChunks = catalogue.cutters.map((_, cutter) => {
    const chunks = new Set<number>();
    for (const content of had) for (const chunk of content.cuts[cutter] ?? []) chunks.add(chunk);
    return chunks;
  });

  const changed = new Map<Content, { path: string; compression: number }>();
  for (const layer of newer) {
    if (older.includes(layer)) continue;
    const compression = layer.compressedBytes / layer.uncompressedBytes;
    for (const { path, content } of layer.files) {
      if (!had.has(content) && !changed.has(content)) changed.set(content, { path, compression });
    }
  }

  const sharesAbove = (threshold: number): Shared => {
    const zeros = (): number[] => catalogue.cutters.map(() => 0);
    const [anywhere, inPlace, anywhereCompressed] = [zeros(), zeros(), zeros()];
    let [newBytes, newCompressedBytes, files] = [0, 0, 0];
    for (const [content, { path, compression }] of changed) {
      if (content.bytes <= threshold) continue;
      newBytes += content.bytes;
      newCompressedBytes += content.bytes * compression;
      files++;
      const before = paths.get(path) ?? places.get(place(path));
      for (const [cutter, cuts] of content.cuts.entries()) {
        const { bytes } = catalogue.names[cutter]!;
        for (const [at, chunk] of cuts.entries()) {
          const length = bytes[chunk]!;
          if (oldChunks[cutter]!.has(chunk)) {
            anywhere[cutter]! += length;
            anywhereCompressed[cutter]! += length * compression;
          }
          if (before?.cuts[cutter]?.[at] === chunk) inPlace[cutter]! += length;
        }
      }
    }
    return { newBytes, newCompressedBytes, files, anywhere, inPlace, anywhereCompressed };
  };
  return { all: sharesAbove(0), above: thresholds.map(sharesAbove) };
}

/** All contents of the catalogue as one store keeps them when it is cut in one way. */
export interface StoreSize {
  readonly chunks: number;
  /** Of the distinct chunks. */
  readonly bytes: number;
  /** The same, each rounded up to whole blocks. */
  readonly diskBytes: number;
}

/** By cutter. */
export function storeSizes(catalogue: Catalogue): StoreSize[] {
  let whole: StoreSize = { chunks: 0, bytes: 0, diskBytes: 0 };
  const add = (size: StoreSize, bytes: number): StoreSize => ({
    chunks: size.chunks + 1,
    bytes: size.bytes + bytes,
    diskBytes: size.diskBytes + roundUp(bytes, BLOCK_BYTES),
  });
  for (const { bytes, cuts } of catalogue.contents.values())
    if (cuts.length === 0 && bytes > 0) whole = add(whole, bytes);
  return catalogue.names.map(({ bytes }) => bytes.reduce(add, whole));
}
