// Look-ups in the presence bitmap that cover many blocks: one bit per 4 KiB block. Reads only; pieces are taken into it
// and out of it by the native side.
import { BLOCK_BYTES } from '../../units.ts';

/** Number of bits that are set in a 32-bit word. */
function bitsIn(word: number): number {
  let pairs = word - ((word >>> 1) & 0x55555555);
  pairs = (pairs & 0x33333333) + ((pairs >>> 2) & 0x33333333);
  return Math.imul((pairs + (pairs >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

/** Bytes of present blocks from address `from` to `to`, both multiples of 128 KiB or the end of what is given. */
export function countPresent(presence: Uint8Array, from: number, to: number): number {
  const words = new Uint32Array(presence.buffer, presence.byteOffset, Math.floor(presence.length / 4));
  const last = Math.min(words.length, Math.ceil(to / BLOCK_BYTES / 32));
  let blocks = 0;
  for (let at = Math.floor(from / BLOCK_BYTES / 32); at < last; at++) {
    const word = words[at]!;
    if (word !== 0) blocks += bitsIn(word);
  }
  return blocks * BLOCK_BYTES;
}

/** How many of the blocks are present. */
export function countPresentBlocks(presence: Uint8Array, firstBlock: number, blocks: number): number {
  let present = 0;
  for (let block = firstBlock; block < firstBlock + blocks; block++)
    present += (presence[Math.floor(block / 8)]! >> (block % 8)) & 1;
  return present;
}

/** True when at least one of the blocks is present. */
export function isAnyPresent(presence: Uint8Array, firstBlock: number, blocks: number): boolean {
  const end = firstBlock + blocks;
  for (let block = firstBlock; block < end; ) {
    const byte = presence[Math.floor(block / 8)]!;
    if (byte === 0) {
      block = Math.floor(block / 8) * 8 + 8;
      continue;
    }
    if (byte & (1 << (block % 8))) return true;
    block++;
  }
  return false;
}
