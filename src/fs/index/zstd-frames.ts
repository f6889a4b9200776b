// Splits a zstd layer into frames (RFC 8878 §3) and decompresses them one by one, because node:zlib's streaming decoder
// does not say where frames start, and only there can decompression be restarted. Called by layer-decoder.ts.
import { zstdDecompressSync } from 'node:zlib';
import { DedupError, wrapError } from '../../errors.ts';
import { MAX_ZSTD_FRAME_BYTES } from './format-limits.ts';

const FRAME_MAGIC = 0xfd2fb528;
const SKIPPABLE_MAGIC = 0x184d2a50;
const MAX_FRAME_HEADER_BYTES = 18;
const MAX_BLOCK_BYTES = 128 * 1024;
/** A frame of incompressible bytes is a little larger than its output. */
const MAX_COMPRESSED_FRAME_BYTES = MAX_ZSTD_FRAME_BYTES + 64 * 1024;

/** A data frame: where it starts in the layer, and what it holds. */
export interface ZstdFrame {
  readonly inOffset: number;
  readonly output: Buffer;
}

function invalid(at: number, what: string): DedupError {
  return new DedupError('LAYER_INVALID', `zstd frame at byte ${at} of the layer: ${what}`);
}

function notLazy(at: number, what: string): DedupError {
  return new DedupError(
    'LAYER_NOT_LAZY',
    `zstd without frames to start at: ${what} (frame at byte ${at} of the layer)`,
  );
}

interface FrameHeader {
  readonly bytes: number;
  readonly checksum: boolean;
}

/** Decodes a frame header; undefined when more bytes are needed. Source: RFC 8878 §3.1.1.1. */
function parseFrameHeader(bytes: Buffer, at: number): FrameHeader | undefined {
  if (bytes.length < 5) return undefined;
  const descriptor = bytes[4]!;
  if ((descriptor & 0x08) !== 0) throw invalid(at, 'a reserved bit is set');
  const singleSegment = (descriptor & 0x20) !== 0;
  const dictionaryBytes = [0, 1, 2, 4][descriptor & 3]!;
  const sizeCode = descriptor >> 6;
  const sizeBytes = sizeCode === 0 ? (singleSegment ? 1 : 0) : 1 << sizeCode;
  const headerBytes = 5 + (singleSegment ? 0 : 1) + dictionaryBytes + sizeBytes;
  if (bytes.length < headerBytes) return undefined;
  const dictionaryAt = headerBytes - sizeBytes - dictionaryBytes;
  if (bytes.subarray(dictionaryAt, dictionaryAt + dictionaryBytes).some((byte) => byte !== 0)) {
    throw notLazy(at, 'it needs a dictionary');
  }
  if (sizeBytes > 0) {
    const low =
      sizeBytes === 8
        ? Number(bytes.readBigUInt64LE(headerBytes - 8))
        : bytes.readUIntLE(headerBytes - sizeBytes, sizeBytes);
    const size = sizeBytes === 2 ? low + 256 : low;
    if (size > MAX_ZSTD_FRAME_BYTES) throw notLazy(at, `a frame holds ${size} bytes`);
  }
  return { bytes: headerBytes, checksum: (descriptor & 4) !== 0 };
}

/** Takes a layer in parts of any size and gives its data frames as they become whole. */
export class ZstdFrames {
  #buffer: Buffer = Buffer.alloc(0);
  /** Place in the layer of the first byte of #buffer. */
  #offset = 0;
  /** Bytes of a skippable frame still to be passed over. */
  #skip = 0;
  /** How far the blocks of the frame at the start of #buffer have been followed; 0 before its header is read. */
  #scanned = 0;
  #checksum = false;
  #lastBlock = false;
  #any = false;

  /** Errors: LAYER_INVALID for what is no zstd, LAYER_NOT_LAZY for a frame too large to start in. */
  *push(bytes: Buffer): Generator<ZstdFrame> {
    let part = bytes;
    if (this.#skip > 0) {
      const length = Math.min(this.#skip, part.length);
      this.#skip -= length;
      this.#offset += length;
      part = part.subarray(length);
    }
    this.#buffer = this.#buffer.length === 0 ? part : Buffer.concat([this.#buffer, part]);
    while (this.#buffer.length > 0) {
      const length = this.#frameLength();
      if (length === undefined) return;
      if (length < 0) continue;
      const frame = this.#buffer.subarray(0, length);
      yield { inOffset: this.#offset, output: this.#decompress(frame) };
      this.#any = true;
      this.#drop(length);
    }
  }

  /** Declares the end. Errors: LAYER_INVALID when a frame is cut off. */
  finish(): void {
    if (this.#buffer.length > 0 || this.#skip > 0 || !this.#any) {
      throw new DedupError('LAYER_INVALID', `the zstd stream is cut off at byte ${this.#offset + this.#buffer.length}`);
    }
  }

  #drop(length: number): void {
    this.#buffer = this.#buffer.subarray(length);
    this.#offset += length;
    this.#scanned = 0;
    this.#lastBlock = false;
  }

  /** Length of the data frame at the start of the buffer; undefined = needs more bytes; -1 = passed a skippable one. */
  #frameLength(): number | undefined {
    const buffer = this.#buffer;
    if (this.#scanned === 0) {
      if (buffer.length < 8) return undefined;
      const magic = buffer.readUInt32LE(0);
      if ((magic & 0xfffffff0) >>> 0 === SKIPPABLE_MAGIC) {
        const total = 8 + buffer.readUInt32LE(4);
        const here = Math.min(total, buffer.length);
        this.#skip = total - here;
        this.#drop(here);
        return -1;
      }
      if (magic !== FRAME_MAGIC) throw invalid(this.#offset, 'no frame starts here');
      const header = parseFrameHeader(buffer.subarray(0, MAX_FRAME_HEADER_BYTES), this.#offset);
      if (header === undefined) return undefined;
      this.#scanned = header.bytes;
      this.#checksum = header.checksum;
    }
    while (!this.#lastBlock) {
      if (buffer.length < this.#scanned + 3) return undefined;
      const block = buffer.readUIntLE(this.#scanned, 3);
      const type = (block >> 1) & 3;
      const size = block >> 3;
      if (type === 3) throw invalid(this.#offset, 'a block has the reserved type');
      if (type === 2 && size > MAX_BLOCK_BYTES) throw invalid(this.#offset, 'a block is too large');
      this.#scanned += 3 + (type === 1 ? 1 : size);
      this.#lastBlock = (block & 1) === 1;
      if (this.#scanned > MAX_COMPRESSED_FRAME_BYTES) {
        throw notLazy(this.#offset, `a frame has more than ${MAX_COMPRESSED_FRAME_BYTES} compressed bytes`);
      }
    }
    const length = this.#scanned + (this.#checksum ? 4 : 0);
    return buffer.length < length ? undefined : length;
  }

  #decompress(frame: Buffer): Buffer {
    try {
      return zstdDecompressSync(frame, { maxOutputLength: MAX_ZSTD_FRAME_BYTES });
    } catch (cause) {
      if ((cause as { code?: string }).code === 'ERR_BUFFER_TOO_LARGE') {
        throw notLazy(this.#offset, `a frame holds more than ${MAX_ZSTD_FRAME_BYTES} bytes`);
      }
      throw wrapError(cause, `decompressing the zstd frame at byte ${this.#offset} of the layer`, 'LAYER_INVALID');
    }
  }
}
