// Looks again at what the store has of layers that nobody could send again, after recorded presence could not be believed (an
// older index.db, lost sums): what still has its digest is present again. Called once, at the start of dedupd.
import { createHash } from 'node:crypto';
import { read } from 'node:fs';
import { promisify } from 'node:util';
import { errorCode } from '../errors.ts';
import type { Logger } from '../log.ts';
import { MiB } from '../units.ts';
import type { LayerRecord } from './chunks/index-protocol.ts';
import type { NodeStore, PieceToStore } from './chunks/node-store.ts';
import type { LayerBook } from './layer-book.ts';

const BATCH_BYTES = 4 * MiB;
const readAt = promisify(read);

/** Layers without a source of which something is missing afterwards are forgotten: whoever names one is told. */
export async function verifyAnew(store: NodeStore, book: LayerBook, log: Logger): Promise<void> {
  for (const row of book.all()) {
    if (row.sources.length > 0) continue;
    try {
      await verifyLayer(store, book, row);
      await store.flush();
      if (await store.confirmLayer(row.id)) {
        log.warn({ layer: row.digest }, 'a layer that has no source was verified anew: all of it is here');
        continue;
      }
    } catch (error) {
      if (errorCode(error) === 'CLOSED') throw error;
      log.error({ err: error, layer: row.digest }, 'a layer that has no source could not be verified anew');
    }
    log.error(
      { layer: row.digest },
      'a layer that has no source is not here completely any more: its image must be pulled again',
    );
    book.forget(row.id);
  }
}

async function verifyLayer(store: NodeStore, book: LayerBook, row: LayerRecord): Promise<void> {
  const { chunks, pieceBytes } = await book.readIndex(row.id, 'chunks');
  const addresses = await store.layerAddresses(row.id);
  let batch = Buffer.allocUnsafeSlow(BATCH_BYTES);
  let used = 0;
  let pieces: PieceToStore[] = [];
  const seen = new Set<number>();
  const send = async (): Promise<void> => {
    if (pieces.length > 0) await store.store(batch, pieces);
    batch = Buffer.allocUnsafeSlow(BATCH_BYTES);
    used = 0;
    pieces = [];
  };
  for (let chunk = 0; chunk < chunks.count; chunk++) {
    const chunkAddress = addresses[chunk]!;
    if (chunks.zero[chunk] === 1 || chunkAddress === 0 || seen.has(chunkAddress)) continue;
    seen.add(chunkAddress);
    const first = chunks.pieceStart[chunk]!;
    const pieceCount = chunks.pieceStart[chunk + 1]! - first;
    const chunkBytes = chunks.length[chunk]!;
    for (let piece = 0; piece < pieceCount; piece++) {
      const address = chunkAddress + piece * pieceBytes;
      const length = Math.min(pieceBytes, chunkBytes - piece * pieceBytes);
      if (store.isPresent(address, length)) continue;
      if (used + length > BATCH_BYTES) await send();
      if (length > BATCH_BYTES) batch = Buffer.allocUnsafeSlow(length);
      const { bytesRead } = await readAt(store.fd, batch, used, length, address);
      const digest = chunks.pieceDigest.subarray((first + piece) * 32, (first + piece) * 32 + 32);
      const found = createHash('sha256')
        .update(batch.subarray(used, used + length))
        .digest();
      if (bytesRead !== length || !found.equals(digest)) continue;
      pieces.push({ chunkAddress, piece, pieceCount, chunkBytes, address, offset: used, length, digest });
      used += length;
    }
  }
  await send();
}
