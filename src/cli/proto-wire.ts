// Protocol buffers, as much as the messages of these calls need: varints and length-delimited fields (protobuf.dev, "Encoding").
// For control-call.ts, which cannot wait for a library; everybody else loads proto/ with one.
import { DedupError } from '../errors.ts';

const VARINT = 0;
const FIXED64 = 1;
const DELIMITED = 2;
const FIXED32 = 5;

export class ProtoWriter {
  readonly #parts: Buffer[] = [];

  /** An integer from 0 to 2^53. */
  uint(field: number, value: number): this {
    if (value !== 0) this.#parts.push(varint(field * 8 + VARINT), varint(value));
    return this;
  }

  bool(field: number, value: boolean): this {
    return this.uint(field, value ? 1 : 0);
  }

  string(field: number, value: string): this {
    const bytes = Buffer.from(value, 'utf8');
    if (bytes.length > 0) this.#parts.push(varint(field * 8 + DELIMITED), varint(bytes.length), bytes);
    return this;
  }

  bytes(): Buffer {
    return Buffer.concat(this.#parts);
  }
}

function varint(value: number): Buffer {
  const out: number[] = [];
  let rest = value;
  for (; rest >= 128; rest = Math.floor(rest / 128)) out.push((rest % 128) + 128);
  out.push(rest);
  return Buffer.from(out);
}

/** The fields of one message. Fields that are not asked for are passed over, absent ones have their default. */
export class ProtoReader {
  readonly #numbers = new Map<number, number>();
  readonly #bytes = new Map<number, Buffer[]>();

  /** Errors: INTERNAL for what is no message. */
  constructor(bytes: Buffer) {
    let at = 0;
    const number = (): number => {
      for (let value = 0, unit = 1; ; unit *= 128) {
        const byte = bytes[at++];
        if (byte === undefined) throw new DedupError('INTERNAL', 'a message of dedupd is cut off');
        value += (byte % 128) * unit;
        if (byte < 128) return value;
      }
    };
    while (at < bytes.length) {
      const tag = number();
      const field = Math.floor(tag / 8);
      switch (tag % 8) {
        case VARINT:
          this.#numbers.set(field, number());
          break;
        case DELIMITED: {
          const length = number();
          this.#bytes.set(field, [...(this.#bytes.get(field) ?? []), bytes.subarray(at, at + length)]);
          at += length;
          break;
        }
        case FIXED64:
          at += 8;
          break;
        case FIXED32:
          at += 4;
          break;
        default:
          throw new DedupError('INTERNAL', `a message of dedupd has a field of type ${tag % 8}`);
      }
    }
  }

  uint(field: number): number {
    return this.#numbers.get(field) ?? 0;
  }

  string(field: number): string {
    return this.#bytes.get(field)?.at(-1)?.toString('utf8') ?? '';
  }

  message(field: number): ProtoReader | undefined {
    const bytes = this.#bytes.get(field)?.at(-1);
    return bytes === undefined ? undefined : new ProtoReader(bytes);
  }

  messages(field: number): ProtoReader[] {
    return (this.#bytes.get(field) ?? []).map((bytes) => new ProtoReader(bytes));
  }
}
