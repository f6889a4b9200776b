// Every distinct file content of some images' layers, cut in each of several ways. Reads each layer once, unpacked by tar
// into a temporary directory that is gone when the next one is read; what stays in memory are numbers of chunks.
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BuiltBenchImage } from '../images/bench-images.ts';
import { unpackLayer } from '../images/pack.ts';
import { regularFiles } from '../regular-files.ts';

/** A way to cut a content into chunks: answers the end of each. */
export interface Cutter {
  readonly name: string;
  readonly cut: (bytes: Uint8Array) => number[];
}

/** Chunks of one content in one way: their numbers in `ChunkNames`, in order. */
export type Cuts = Int32Array;

export interface Content {
  readonly bytes: number;
  /** By cutter, as in the catalogue; empty for contents that no cutter is asked to cut: they are one chunk. */
  readonly cuts: readonly Cuts[];
}

export interface LayerFile {
  readonly path: string;
  readonly content: Content;
}

export interface CataloguedLayer {
  readonly files: readonly LayerFile[];
  readonly compressedBytes: number;
  readonly uncompressedBytes: number;
}

/** Numbers of the distinct chunks of one cutter, and their lengths. */
export class ChunkNames {
  readonly #numbers = new Map<string, number>();
  readonly bytes: number[] = [];

  number(chunk: Uint8Array): number {
    const name = createHash('sha256').update(chunk).digest('base64');
    let number = this.#numbers.get(name);
    if (number === undefined) {
      number = this.bytes.length;
      this.#numbers.set(name, number);
      this.bytes.push(chunk.length);
    }
    return number;
  }
}

export class Catalogue {
  readonly cutters: readonly Cutter[];
  /** By cutter. */
  readonly names: readonly ChunkNames[];
  /** Contents of at most this many bytes are never cut. */
  readonly wholeBytes: number;
  readonly contents = new Map<string, Content>();
  readonly #layers = new Map<string, CataloguedLayer>();

  constructor(cutters: readonly Cutter[], wholeBytes: number) {
    this.cutters = cutters;
    this.wholeBytes = wholeBytes;
    this.names = cutters.map(() => new ChunkNames());
  }

  /** Reads the layers of an image that are not known yet; all of them, bottom to top. */
  async add(image: BuiltBenchImage, say: (text: string) => void): Promise<readonly CataloguedLayer[]> {
    const layers: CataloguedLayer[] = [];
    for (const { digest, compressedBytes, uncompressedBytes } of image.layers) {
      let layer = this.#layers.get(digest);
      if (layer === undefined) {
        say(`${image.tag}: reading a layer of ${(uncompressedBytes / 1e6).toFixed(0)} MB`);
        const blob = join(image.dir, 'blobs/sha256', digest.slice('sha256:'.length));
        layer = { files: await this.#read(blob), compressedBytes, uncompressedBytes };
        this.#layers.set(digest, layer);
      }
      layers.push(layer);
    }
    return layers;
  }

  async #read(blob: string): Promise<LayerFile[]> {
    const tree = await mkdtemp(join(tmpdir(), 'bench-layer-'));
    try {
      await unpackLayer(blob, tree);
      const files: LayerFile[] = [];
      for (const { path } of regularFiles(tree))
        files.push({ path, content: this.#content(readFileSync(join(tree, path))) });
      return files;
    } finally {
      await rm(tree, { recursive: true, force: true });
    }
  }

  #content(bytes: Buffer): Content {
    const digest = createHash('sha256').update(bytes).digest('base64');
    let content = this.contents.get(digest);
    if (content === undefined) {
      const cuts =
        bytes.length <= this.wholeBytes
          ? []
          : this.cutters.map(({ cut }, at) => {
              const names = this.names[at]!;
              let start = 0;
              return Int32Array.from(cut(bytes), (end) => {
                const chunk = bytes.subarray(start, end);
                start = end;
                return names.number(chunk);
              });
            });
      content = { bytes: bytes.length, cuts };
      this.contents.set(digest, content);
    }
    return content;
  }
}
