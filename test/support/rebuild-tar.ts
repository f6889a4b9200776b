// Puts a tar together again from the framing of its restart blob and the contents of its chunks: what proves that an
// index accounts for every byte. Used by index tests only.
import { zstdDecompressSync } from 'node:zlib';
import type { LayerIndex } from '../../src/fs/index/layer-index.ts';

/** `content(chunk)` gives the bytes of a chunk; it is not asked for chunks of zeros. */
export function rebuildTar(index: LayerIndex, restartBlob: Buffer, content: (chunk: number) => Buffer): Buffer {
  const packed = restartBlob.subarray(0, index.restart.framingLength);
  const framing = packed.length === 0 ? Buffer.alloc(0) : zstdDecompressSync(packed);
  const tar = Buffer.alloc(index.tarBytes);
  let at = 0;
  let framingAt = 0;
  const place = (tarOffset: number, bytes: Buffer): void => {
    framingAt += framing.copy(tar, at, framingAt, framingAt + (tarOffset - at));
    bytes.copy(tar, tarOffset);
    at = tarOffset + bytes.length;
  };
  const { chunks } = index;
  for (let i = 0; i < chunks.count; i++) {
    if (chunks.tarOffset[i] === 0) continue;
    const bytes = chunks.zero[i] === 1 ? Buffer.alloc(chunks.length[i]!) : content(i);
    const from = chunks.fragmentStart[i]!;
    const to = chunks.fragmentStart[i + 1]!;
    if (from === to) place(chunks.tarOffset[i]!, bytes);
    for (let f = from; f < to; f++) {
      const offset = chunks.fragmentChunkOffset[f]!;
      place(chunks.fragmentTarOffset[f]!, bytes.subarray(offset, offset + chunks.fragmentLength[f]!));
    }
  }
  framingAt += framing.copy(tar, at, framingAt);
  if (framingAt !== framing.length || at + framing.length - framingAt > tar.length)
    throw new Error('framing left over');
  return tar;
}

/** The content of chunk `i` cut out of the uncompressed tar. */
export function chunkFromTar(index: LayerIndex, tar: Buffer, i: number): Buffer {
  const { chunks } = index;
  const length = chunks.length[i]!;
  const from = chunks.fragmentStart[i]!;
  const to = chunks.fragmentStart[i + 1]!;
  if (chunks.tarOffset[i] === 0) return Buffer.alloc(length);
  if (from === to) return tar.subarray(chunks.tarOffset[i]!, chunks.tarOffset[i]! + length);
  const bytes = Buffer.alloc(length);
  for (let f = from; f < to; f++) {
    const at = chunks.fragmentTarOffset[f]!;
    tar.copy(bytes, chunks.fragmentChunkOffset[f]!, at, at + chunks.fragmentLength[f]!);
  }
  return bytes;
}
