// Writes one region of a file from its start to its end through a buffer, hashing what it writes. Used by the writer.
import type { Hash } from 'node:crypto';
import { createHash } from 'node:crypto';
import { writeSync } from 'node:fs';

const BUFFER_BYTES = 1024 * 1024;

/** Not for concurrent use. Synchronous: it runs in a process of its own. */
export class SequentialFile {
  readonly #fd: number;
  readonly #hash: Hash = createHash('sha256');
  #bytes: Buffer = Buffer.alloc(BUFFER_BYTES);
  #view = new DataView(this.#bytes.buffer, this.#bytes.byteOffset, this.#bytes.length);
  /** File offset of the buffer's first byte. */
  #start: number;
  #used = 0;

  constructor(fd: number, start: number) {
    this.#fd = fd;
    this.#start = start;
  }

  /** File offset that the next `take` gives out. */
  get position(): number {
    return this.#start + this.#used;
  }
  /** Valid until the next `take`. */
  get bytes(): Buffer {
    return this.#bytes;
  }
  get view(): DataView {
    return this.#view;
  }

  /** Reserves the next `length` bytes of the file, zero, contiguous in `bytes`; the offset in `bytes`. */
  take(length: number): number {
    if (this.#used + length > this.#bytes.length) {
      this.flush();
      if (length > this.#bytes.length) {
        this.#bytes = Buffer.alloc(length);
        this.#view = new DataView(this.#bytes.buffer, this.#bytes.byteOffset, this.#bytes.length);
      }
    }
    const at = this.#used;
    this.#used += length;
    return at;
  }

  /** Fills with zeros up to file offset `position`. */
  padTo(position: number): void {
    while (this.position < position) this.take(Math.min(position - this.position, BUFFER_BYTES));
  }

  flush(): void {
    const pending = this.#bytes.subarray(0, this.#used);
    this.#hash.update(pending);
    let written = 0;
    while (written < pending.length) {
      written += writeSync(this.#fd, pending, written, pending.length - written, this.#start + written);
    }
    this.#start += this.#used;
    this.#used = 0;
    pending.fill(0);
  }

  /** SHA-256 of everything written; flushes. Call once. */
  digest(): Buffer {
    this.flush();
    return this.#hash.digest();
  }
}
