// Converts an unpacked layer with the product's own code and keeps its chunks in a test store, checking every piece
// against the index on the way.
import assert from 'node:assert/strict';
import { hash } from 'node:crypto';
import { digestOf } from '../../src/digest.ts';
import { buildDirectoryIndex, type DirectoryBuildOptions } from '../../src/fs/directory/build-index.ts';
import type { BuiltIndex } from '../../src/fs/index/builder.ts';
import type { IndexedPiece } from '../../src/fs/index/chunker.ts';
import { decodeLayerIndex } from '../../src/fs/index/format.ts';
import { MiB } from '../../src/units.ts';
import type { FakeStore, MadeLayer } from './layer-maker.ts';

/** Options of a conversion with the product's usual sizes. */
export function conversionOf(directory: string, more: Partial<DirectoryBuildOptions> = {}): DirectoryBuildOptions {
  return { directory, identity: digestOf(`converted ${directory}`), chunkBytes: 4 * MiB, pieceBytes: MiB, ...more };
}

/** A piece with a copy of its bytes. */
export type TakenPiece = IndexedPiece & { readonly bytes: Buffer };

/** The conversion's index, and all pieces it handed out, in order. */
export async function convert(
  directory: string,
  more: Partial<DirectoryBuildOptions> = {},
): Promise<BuiltIndex & { readonly pieces: readonly TakenPiece[] }> {
  const pieces: TakenPiece[] = [];
  const onPiece = (piece: IndexedPiece): undefined => {
    pieces.push({ ...piece, bytes: Buffer.concat(piece.parts) });
  };
  const built = await buildDirectoryIndex(conversionOf(directory, { ...more, onPiece }));
  assert.deepEqual(decodeLayerIndex(built.indexBlob), built.index);
  const { chunks, pieceBytes } = built.index;
  let next = 0;
  for (let chunk = 0; chunk < chunks.count; chunk++) {
    for (let number = chunks.pieceStart[chunk]!, piece = 0; number < chunks.pieceStart[chunk + 1]!; number++, piece++) {
      const found = pieces[next++];
      assert.deepEqual([found?.chunk, found?.piece], [chunk, piece]);
      assert.equal(found!.bytes.length, Math.min(pieceBytes, chunks.length[chunk]! - piece * pieceBytes));
      const digest = hash('sha256', found!.bytes, 'buffer');
      assert.ok(digest.equals(found!.digest), `piece ${piece} of chunk ${chunk} has another digest than it came with`);
      assert.ok(
        digest.equals(chunks.pieceDigest.subarray(number * 32, number * 32 + 32)),
        'the index has another digest',
      );
    }
  }
  assert.equal(pieces.length, next, 'pieces came that no chunk has');
  return { ...built, pieces };
}

/** Converts `directory` into a layer whose chunks lie in `store`. */
export async function convertedLayer(
  directory: string,
  store: FakeStore,
): Promise<MadeLayer & { readonly indexBlob: Buffer }> {
  const { index, indexBlob, pieces } = await convert(directory);
  const { chunks, entries, chunkBytes, pieceBytes } = index;
  const addresses = Float64Array.from({ length: chunks.count }, (_, chunk) =>
    chunks.zero[chunk] === 1 ? -1 : store.assign(chunks.length[chunk]!),
  );
  for (const { chunk, piece, bytes } of pieces) {
    if (chunks.zero[chunk] === 0) store.write(addresses[chunk]! + piece * pieceBytes, bytes);
  }
  return { entries, chunks, chunkBytes, addresses, indexBlob };
}
