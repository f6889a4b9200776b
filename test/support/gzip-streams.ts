// Gzip streams of every kind a registry may hold, with the bytes they stand for. Used by the tests of native/inflate.
import { constants, createGzip, deflateRawSync, gzipSync, type ZlibOptions } from 'node:zlib';

export interface Stream {
  readonly name: string;
  readonly plain: Buffer;
  readonly gzip: Buffer;
}

let state = 0x2545f491;

/** Integers below `limit` from a fixed seed: a failure happens again in the next run (xorshift32). */
export function pseudoRandom(limit: number): number {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % limit;
}

/** Bytes that do not compress, the same in every run. */
export function noise(bytes: number): Buffer {
  const words = new Uint32Array(Math.ceil(bytes / 4));
  for (let i = 0; i < words.length; i++) words[i] = pseudoRandom(2 ** 32);
  return Buffer.from(words.buffer, 0, bytes);
}

/** Words with a long tail of repetitions, so that matches reach back across blocks and spans. */
export function text(bytes: number): Buffer {
  const words = Array.from({ length: 500 }, () => noise(2 + pseudoRandom(9)).toString('base64url'));
  const parts: string[] = [];
  for (let length = 0; length < bytes; ) {
    const word = `${words[pseudoRandom(1 + pseudoRandom(words.length))]} `;
    parts.push(word);
    length += word.length;
  }
  return Buffer.from(parts.join('')).subarray(0, bytes);
}

/** Text, noise and zeros in turns. */
export function mixed(bytes: number): Buffer {
  const parts: Buffer[] = [];
  for (let length = 0; length < bytes; length += 30_000) {
    parts.push(text(12_000), noise(6_000), Buffer.alloc(12_000));
  }
  return Buffer.concat(parts).subarray(0, bytes);
}

/** Many flushes: empty stored blocks and byte-aligned boundaries between the ordinary ones. */
async function flushed(plain: Buffer, flush: number): Promise<Buffer> {
  const gzip = createGzip({ level: 6 });
  const chunks: Buffer[] = [];
  gzip.on('data', (chunk: Buffer) => chunks.push(chunk));
  for (let at = 0; at < plain.length; at += 7_001) {
    gzip.write(plain.subarray(at, at + 7_001));
    await new Promise<void>((resolve) => gzip.flush(flush, resolve));
  }
  await new Promise<void>((resolve) => gzip.on('end', resolve).end());
  return Buffer.concat(chunks);
}

/** One stream of each kind over about `bytes` of content. */
export async function streams(bytes: number): Promise<Stream[]> {
  const one = (name: string, plain: Buffer, options: ZlibOptions): Stream => {
    return { name, plain, gzip: gzipSync(plain, options) };
  };
  const plain = mixed(bytes);
  const members: Buffer[] = [];
  for (let at = 0; at < plain.length; at += 3_333) members.push(gzipSync(plain.subarray(at, at + 3_333)));
  const emptyMember = gzipSync(Buffer.alloc(0));
  const large = [plain.subarray(0, bytes / 3), plain.subarray(bytes / 3)];
  return [
    ...[0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((level) => one(`mixed data, level ${level}`, plain, { level })),
    one('text, blocks of a few symbols', text(bytes), { level: 9, memLevel: 1 }),
    one('noise', noise(bytes), {}),
    one('zeros', Buffer.alloc(bytes), { memLevel: 1 }),
    one('fixed codes', plain, { strategy: constants.Z_FIXED, memLevel: 2 }),
    one('no matches', plain, { strategy: constants.Z_HUFFMAN_ONLY, memLevel: 2 }),
    one('run lengths', plain, { strategy: constants.Z_RLE, memLevel: 2 }),
    { name: 'sync flushes', plain, gzip: await flushed(plain, constants.Z_SYNC_FLUSH) },
    { name: 'full flushes', plain, gzip: await flushed(plain, constants.Z_FULL_FLUSH) },
    { name: 'many small members', plain, gzip: Buffer.concat(members) },
    { name: 'two large members', plain, gzip: Buffer.concat(large.map((part) => gzipSync(part, { memLevel: 2 }))) },
    {
      name: 'empty members around and between',
      plain,
      gzip: Buffer.concat([emptyMember, ...members.flatMap((member) => [member, emptyMember])]),
    },
    { name: 'a header with name, comment, extra field and CRC', plain, gzip: withFullHeader(plain) },
  ];
}

/** RFC 1952 with FEXTRA, FNAME, FCOMMENT and FHCRC set. */
function withFullHeader(plain: Buffer): Buffer {
  const head = Buffer.concat([
    Buffer.from([0x1f, 0x8b, 8, 0x1e, 1, 2, 3, 4, 0, 3]),
    Buffer.from([5, 0]),
    Buffer.from('extra'),
    Buffer.from('layer.tar\0a comment\0', 'latin1'),
  ]);
  const usual = gzipSync(plain);
  const headerCrc = Buffer.alloc(2);
  headerCrc.writeUInt16LE(crc32(head) & 0xffff);
  return Buffer.concat([head, headerCrc, deflateRawSync(plain, { memLevel: 3 }), usual.subarray(-8)]);
}

function crc32(bytes: Buffer): number {
  // The CRC of a gzip trailer is that of its content.
  return gzipSync(bytes).readUInt32LE(gzipSync(bytes).length - 8);
}
