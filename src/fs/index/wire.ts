// Growing writer and bounds-checked reader of the numbers a layer index is made of: little-endian fixed numbers and
// LEB128 varints up to 2^53 - 1. Used by the sections of format.ts only; a reader never reads past its section.
import { DedupError } from '../../errors.ts';

/** INDEX_INVALID naming the field that is wrong. */
export function indexError(field: string, what: string): DedupError {
  return new DedupError('INDEX_INVALID', `layer index, ${field}: ${what}`, { details: { field } });
}

export class WireWriter {
  #bytes = Buffer.allocUnsafe(64 * 1024);
  #length = 0;

  get length(): number {
    return this.#length;
  }

  #reserve(count: number): void {
    if (this.#length + count <= this.#bytes.length) return;
    const larger = Buffer.allocUnsafe(Math.max(this.#bytes.length * 2, this.#length + count));
    this.#bytes.copy(larger, 0, 0, this.#length);
    this.#bytes = larger;
  }

  u8(value: number): void {
    this.#reserve(1);
    this.#bytes[this.#length++] = value;
  }

  u32(value: number): void {
    this.#reserve(4);
    this.#length = this.#bytes.writeUInt32LE(value, this.#length);
  }

  u64(value: number): void {
    this.#reserve(8);
    this.#length = this.#bytes.writeBigUInt64LE(BigInt(value), this.#length);
  }

  varint(value: number): void {
    this.#reserve(8);
    let rest = value;
    while (rest >= 0x80) {
      this.#bytes[this.#length++] = (rest % 128) | 0x80;
      rest = rest < 0x8000_0000 ? rest >>> 7 : Math.floor(rest / 128);
    }
    this.#bytes[this.#length++] = rest;
  }

  /** A signed number: 0, -1, 1, -2, … as 0, 1, 2, 3, … `|value|` is below 2^52. */
  signed(value: number): void {
    this.varint(value < 0 ? -value * 2 - 1 : value * 2);
  }

  raw(bytes: Uint8Array): void {
    this.#reserve(bytes.length);
    this.#bytes.set(bytes, this.#length);
    this.#length += bytes.length;
  }

  latin1(text: string): void {
    this.#reserve(text.length);
    this.#length += this.#bytes.write(text, this.#length, 'latin1');
  }

  /** What was written, as a view that later writes may change. */
  bytes(): Buffer {
    return this.#bytes.subarray(0, this.#length);
  }
}

export class WireReader {
  readonly #bytes: Buffer;
  readonly #section: string;
  #at = 0;

  constructor(bytes: Buffer, section: string) {
    this.#bytes = bytes;
    this.#section = section;
  }

  get left(): number {
    return this.#bytes.length - this.#at;
  }

  #need(count: number, field: string): void {
    if (count > this.#bytes.length - this.#at) throw indexError(`${this.#section}.${field}`, 'the section is cut off');
  }

  u8(field: string): number {
    this.#need(1, field);
    return this.#bytes[this.#at++]!;
  }

  u32(field: string): number {
    this.#need(4, field);
    const value = this.#bytes.readUInt32LE(this.#at);
    this.#at += 4;
    return value;
  }

  u64(field: string): number {
    this.#need(8, field);
    const value = Number(this.#bytes.readBigUInt64LE(this.#at));
    if (!Number.isSafeInteger(value)) throw indexError(`${this.#section}.${field}`, 'the number is above 2^53');
    this.#at += 8;
    return value;
  }

  /** A varint of at most `max`, written in its shortest form. */
  varint(field: string, max: number): number {
    let value = 0;
    let scale = 1;
    let byte: number;
    do {
      if (this.#at >= this.#bytes.length) throw indexError(`${this.#section}.${field}`, 'the section is cut off');
      byte = this.#bytes[this.#at++]!;
      value += (byte & 0x7f) * scale;
      if (byte === 0 && scale > 1)
        throw indexError(`${this.#section}.${field}`, 'a number is not in its shortest form');
      scale *= 128;
      if (scale > 2 ** 56) throw indexError(`${this.#section}.${field}`, 'a number is too long');
    } while (byte >= 0x80);
    if (value > max) throw indexError(`${this.#section}.${field}`, `${value} is above the limit ${max}`);
    return value;
  }

  signed(field: string): number {
    const value = this.varint(field, Number.MAX_SAFE_INTEGER);
    return value % 2 === 0 ? value / 2 : -((value + 1) / 2);
  }

  /** A view of the next `count` bytes. */
  raw(field: string, count: number): Buffer {
    this.#need(count, field);
    this.#at += count;
    return this.#bytes.subarray(this.#at - count, this.#at);
  }

  /** Refuses bytes that no field accounts for. */
  end(): void {
    if (this.left > 0) throw indexError(this.#section, `${this.left} bytes too many`);
  }
}
