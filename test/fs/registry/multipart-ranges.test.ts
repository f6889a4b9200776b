import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { describe, test } from 'node:test';
import { boundaryOf, MultipartRanges } from '../../../src/fs/registry/multipart-ranges.ts';
import { withCode } from '../../suites/blob-reader.ts';

test('the boundary comes from a Content-Type of multipart/byteranges only', () => {
  assert.equal(boundaryOf('multipart/byteranges; boundary=abc'), 'abc');
  assert.equal(boundaryOf('Multipart/ByteRanges;charset=x; Boundary="a b=c"'), 'a b=c');
  for (const other of [
    undefined,
    '',
    'multipart/byteranges',
    'multipart/mixed; boundary=abc',
    'multipart/byteranges; boundary=',
    'multipart/byteranges; boundary="a',
    `multipart/byteranges; boundary=${'x'.repeat(71)}`,
  ]) {
    assert.equal(boundaryOf(other), undefined, String(other));
  }
});

describe('a multipart body', () => {
  interface Part {
    readonly contentRange: string;
    readonly bytes: Buffer;
  }

  /** Pushes the pieces of a body; a body part's length is that of its Content-Range `bytes 0-<last>/*`. */
  function take(pieces: Iterable<Buffer>): { parts: Part[]; ended: boolean } {
    const parts: { contentRange: string; chunks: Buffer[] }[] = [];
    const reader = new MultipartRanges(
      'X',
      (contentRange) => {
        const part = { contentRange, chunks: [] as Buffer[] };
        parts.push(part);
        const last = Number(/-(\d+)\//.exec(contentRange)?.[1]);
        return { length: last + 1, sink: (bytes) => part.chunks.push(Buffer.from(bytes)) };
      },
      'reading',
    );
    for (const piece of pieces) reader.push(piece);
    return {
      parts: parts.map(({ contentRange, chunks }) => ({ contentRange, bytes: Buffer.concat(chunks) })),
      ended: reader.ended,
    };
  }

  function* cut(body: Buffer, length: number): Generator<Buffer> {
    for (let at = 0; at < body.length; at += length) yield body.subarray(at, at + length);
  }

  // Data that looks like a boundary is data.
  const data = [Buffer.from('\r\n--X\r\n\r\n--X--'), randomBytes(300), Buffer.from('-')];
  const head = (i: number) => `Content-Type: a/b\r\nContent-Range: bytes 0-${data[i]!.length - 1}/*\r\n\r\n`;
  const bodyWith = (preamble: string, lineEnd = '\r\n'): Buffer =>
    Buffer.concat([
      Buffer.from(`${preamble}--X${lineEnd}${head(0)}`),
      data[0]!,
      Buffer.from(`\r\n--X${lineEnd}${head(1)}`),
      data[1]!,
      Buffer.from(`\r\n--X${lineEnd}${head(2)}`),
      data[2]!,
      Buffer.from('\r\n--X--\r\nepilogue'),
    ]);

  for (const [what, body] of [
    ['that begins with its boundary', bodyWith('')],
    ['that begins with an empty line', bodyWith('\r\n')],
    ['with a preamble and spaces behind its boundaries', bodyWith('some --X words\r\nmore\r\n', ' \t\r\n')],
  ] as const) {
    test(`${what} gives its parts, wherever it is cut`, () => {
      const check = (pieces: Iterable<Buffer>) => {
        const { parts, ended } = take(pieces);
        assert.deepEqual(
          parts.map(({ bytes }) => bytes),
          data,
        );
        assert.ok(ended);
      };
      for (let length = 1; length <= body.length; length++) check(cut(body, length));
      for (let at = 0; at <= body.length; at++) check([body.subarray(0, at), body.subarray(at)]);
    });
  }

  const range = 'Content-Range: bytes 0-3/*';
  const malformed: readonly (readonly [string, string, RegExp])[] = [
    ['no boundary at all', 'x'.repeat(10_000), /no body part begins/],
    ['header fields without end', `--X\r\n${range}\r\nx: ${'x'.repeat(10_000)}`, /no body part begins/],
    ['another boundary that begins the same', `--XY\r\n${range}\r\n\r\nabcd`, /more behind it/],
    ['a part without Content-Range', '--X\r\nContent-Type: a/b\r\n\r\nabcd', /without Content-Range/],
    ['a part without any header field', '--X\r\n\r\n\r\nabcd', /without Content-Range/],
    ['a part with two Content-Range fields', `--X\r\n${range}\r\n${range}\r\n\r\nabcd`, /two Content-Range/],
    ['an encoded part', `--X\r\nContent-Encoding: gzip\r\n${range}\r\n\r\nabcd`, /encoded with gzip/],
    ['a part that is longer than it says', `--X\r\n${range}\r\n\r\nabcde\r\n--X--`, /does not end where/],
    ['a part that is shorter than it says', `--X\r\n${range}\r\n\r\nabc\r\n--X--`, /does not end where/],
  ];
  for (const [what, body, message] of malformed) {
    test(`${what} is refused, wherever it is cut`, () => {
      for (const length of [1, 2, 3, 7, 100, 8191, 8192, 8193, body.length]) {
        assert.throws(() => take(cut(Buffer.from(body), length)), withCode('REGISTRY_PROTOCOL', message));
      }
    });
  }

  test('a body that ends early is not ended', () => {
    const body = bodyWith('');
    for (let length = 0; length < body.length - 12; length += 5) {
      assert.equal(take([body.subarray(0, length)]).ended, false);
    }
  });
});
