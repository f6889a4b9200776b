// Which blocks of the store were read while they were here. Hits are answered natively, so this bitmap, which the session
// marks, is all that is known of them. Asked by FetchAhead: was what it guessed worth fetching?
import { BLOCK_BYTES } from '../units.ts';

export class Touched {
  /** One bit per block; one byte is eight blocks, which is as exactly as anybody wants to know. */
  readonly bitmap: Uint8Array;

  /** `bitmap`: from `presenceCreate`, given to the session too. */
  constructor(bitmap: Uint8Array) {
    this.bitmap = bitmap;
  }

  /** True when a block of the range, or one close to it, was read since it was last cleared. */
  any(address: number, length: number): boolean {
    const [first, end] = bytesOf(address, length);
    for (let at = first; at < end; at++) if (this.bitmap[at] !== 0) return true;
    return false;
  }

  clear(address: number, length: number): void {
    this.bitmap.fill(0, ...bytesOf(address, length));
  }
}

function bytesOf(address: number, length: number): [number, number] {
  const bytes = BLOCK_BYTES * 8;
  return [Math.floor(address / bytes), Math.ceil((address + length) / bytes)];
}
