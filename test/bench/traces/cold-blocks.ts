// Blocks of an image each of which is in a span of its own that nothing near it has been read from: for reads that must ask
// the registry. Found in the layers' indexes; nothing is read here.
import { createHash } from 'node:crypto';
import { EntryType, type LayerIndex } from '../../../src/fs/index/layer-index.ts';

/** Spans that far from a read one may be fetched along with it (neighbours.ts reaches three). */
const APART_SPANS = 4;
const BLOCK_BYTES = 4096;

/** The first block of a file. */
export interface ColdBlock {
  /** From the image's root, bytes as latin1. */
  readonly path: string;
  readonly length: number;
}

/** Such blocks in random order that depends on the seed only. `layers`: bottom to top. */
export function coldBlocks(layers: readonly LayerIndex[], seed: string): ColdBlock[] {
  const seen = new Set<string>();
  const candidates: (ColdBlock & { readonly layer: number; readonly span: number })[] = [];
  // What an upper layer has hides what is below it.
  for (let layer = layers.length - 1; layer >= 0; layer--) {
    const { entries, chunks, spans } = layers[layer]!;
    const names = new Set<string>();
    for (let i = 0; i < entries.count; i++) {
      const path = entries.name[i]!;
      names.add(path);
      if (entries.type[i] !== EntryType.file || entries.chunkCount[i] !== 1 || seen.has(path)) continue;
      const chunk = entries.firstChunk[i]!;
      const sparse = chunks.fragmentStart[chunk] !== chunks.fragmentStart[chunk + 1];
      if (sparse || chunks.zero[chunk] === 1 || chunks.length[chunk]! < BLOCK_BYTES) continue;
      const span = spanWith(layers[layer]!, chunks.tarOffset[chunk]!, chunks.length[chunk]!);
      if (span !== undefined && spans.count > 0) candidates.push({ path, length: BLOCK_BYTES, layer, span });
    }
    for (const name of names) seen.add(name);
  }
  const order = (path: string): string => createHash('sha256').update(`${seed}\n${path}`).digest('hex');
  const taken = layers.map(() => new Set<number>());
  return candidates
    .map((block) => ({ block, key: order(block.path) }))
    .sort((a, b) => (a.key < b.key ? -1 : 1))
    .flatMap(({ block: { path, length, layer, span } }) => {
      for (let near = span - APART_SPANS + 1; near < span + APART_SPANS; near++) if (taken[layer]!.has(near)) return [];
      taken[layer]!.add(span);
      return [{ path, length }];
    });
}

/** The span that holds all of a range of the tar; undefined where two do. */
function spanWith({ spans, tarBytes }: LayerIndex, offset: number, length: number): number | undefined {
  let [low, high] = [0, spans.count - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (spans.outOffset[middle]! <= offset) low = middle;
    else high = middle - 1;
  }
  const end = low + 1 < spans.count ? spans.outOffset[low + 1]! : tarBytes;
  return offset + length <= end ? low : undefined;
}
