// What `chunks/sums` must hold for blocks of the store: written from RFC 3720 (appendix B.4), apart from the product.
import { BLOCK_BYTES } from '../../src/units.ts';

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let sum = byte;
  for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0x82f63b78 : 0);
  return sum;
});

/** CRC-32C of any bytes. */
export function crc32c(bytes: Uint8Array): number {
  let state = 0xffffffff;
  for (const byte of bytes) state = (state >>> 8) ^ TABLE[(state ^ byte) & 0xff]!;
  return ~state >>> 0;
}

/** The sums of whole blocks, as they lie in the file. */
export function blockSums(blocks: Uint8Array): Buffer {
  const sums = Buffer.alloc((blocks.length / BLOCK_BYTES) * 4);
  for (let at = 0; at < blocks.length; at += BLOCK_BYTES) {
    sums.writeUInt32LE(crc32c(blocks.subarray(at, at + BLOCK_BYTES)) || 1, (at / BLOCK_BYTES) * 4);
  }
  return sums;
}
