import assert from 'node:assert/strict';
import { posix } from 'node:path';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import { DedupError } from '../../../src/errors.ts';
import { EntryType } from '../../../src/fs/index/layer-index.ts';
import { type TarMember, TarReader } from '../../../src/fs/index/tar-reader.ts';
import { type TarEntry, tarOf } from '../../support/tar.ts';

interface Read {
  readonly members: TarMember[];
  readonly contents: Buffer[];
  /** Content and framing in the order they came: must be the tar. */
  readonly all: Buffer;
}

/** Reads a tar in steps of `step` bytes. */
function read(tar: Buffer, step = 65_536): Read {
  const members: TarMember[] = [];
  const contents: Buffer[][] = [];
  const all: Buffer[] = [];
  const reader = new TarReader({
    member: (member) => {
      members.push(member);
      contents.push([]);
    },
    content: (bytes) => {
      contents.at(-1)!.push(bytes);
      all.push(bytes);
    },
    endContent: () => undefined,
    framing: (bytes) => all.push(Buffer.from(bytes)),
  });
  for (let at = 0; at < tar.length; at += step) reader.push(Buffer.from(tar.subarray(at, at + step)));
  reader.finish();
  assert.equal(reader.offset, tar.length);
  return { members, contents: contents.map((parts) => Buffer.concat(parts)), all: Buffer.concat(all) };
}

function refused(tar: Buffer, what: RegExp): void {
  assert.throws(
    () => read(tar),
    (error: unknown) => error instanceof DedupError && error.code === 'LAYER_INVALID' && what.test(error.message),
  );
}

interface RawFields {
  name?: string;
  mode?: string;
  uid?: string | Buffer;
  gid?: string;
  size?: string | Buffer;
  mtime?: string | Buffer;
  type?: string;
  link?: string;
  magic?: string;
  prefix?: string;
  devMajor?: string;
  devMinor?: string;
  checksum?: string;
  /** Written at byte offsets of the block, before the checksum. */
  at?: Record<number, string | Buffer>;
}

/** One header block, field by field, as no sane archiver would write it. */
function raw(fields: RawFields): Buffer {
  const block = Buffer.alloc(512);
  const put = (value: string | Buffer | undefined, at: number): void => {
    if (value !== undefined) Buffer.from(value as string, 'latin1').copy(block, at);
  };
  put(fields.name ?? 'file', 0);
  put(fields.mode ?? '0000644\0', 100);
  put(fields.uid ?? '0000000\0', 108);
  put(fields.gid ?? '0000000\0', 116);
  put(fields.size ?? '00000000000\0', 124);
  put(fields.mtime ?? '00000000000\0', 136);
  put(fields.type ?? '0', 156);
  put(fields.link, 157);
  put(fields.magic ?? 'ustar\x0000', 257);
  put(fields.devMajor, 329);
  put(fields.devMinor, 337);
  put(fields.prefix, 345);
  for (const [at, value] of Object.entries(fields.at ?? {})) put(value, Number(at));
  block.fill(0x20, 148, 156);
  let sum = 0;
  for (const byte of block) sum += byte;
  put(fields.checksum ?? `${sum.toString(8).padStart(6, '0')}\0 `, 148);
  return block;
}

const END = Buffer.alloc(1024);
const octal = (value: number): string => `${value.toString(8).padStart(11, '0')}\0`;

function padded(bytes: Buffer | string): Buffer {
  const content = Buffer.from(bytes as string, 'latin1');
  return Buffer.concat([content, Buffer.alloc((512 - (content.length % 512)) % 512)]);
}

/** A member with a body. */
function rawMember(fields: RawFields, body: Buffer | string): Buffer {
  const content = Buffer.from(body as string, 'latin1');
  return Buffer.concat([raw({ size: octal(content.length), ...fields }), padded(content)]);
}

function record(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  let length = rest.length + 1;
  while (String(length).length + rest.length !== length) length = String(length).length + rest.length;
  return `${length}${rest}`;
}

const pax = (...records: [string, string][]): Buffer =>
  rawMember({ type: 'x' }, records.map(([k, v]) => record(k, v)).join(''));

describe('the tar reader', () => {
  const everything: TarEntry[] = [
    { name: './', type: 'dir' },
    { name: 'dir/', type: 'dir', mode: 0o1777 },
    {
      name: 'dir/file',
      content: 'content',
      mode: 0o4755,
      uid: 70_000,
      gid: 3_000_000_000,
      mtime: '1700000000.123456789',
    },
    { name: 'dir/empty' },
    { name: 'dir/block', content: Buffer.alloc(512, 1) },
    { name: 'hard', type: 'hardlink', linkname: './dir/file' },
    { name: 'soft', type: 'symlink', linkname: '../outside//x' },
    { name: 'char', type: 'char', devmajor: 5, devminor: 1 },
    { name: 'blk', type: 'block', devmajor: 259, devminor: 70_000 },
    { name: 'fifo', type: 'fifo' },
    { name: Buffer.from('latin\xe9\xff', 'latin1'), content: 'x' },
    {
      name: `${'long/'.repeat(60)}name`,
      content: 'y',
      xattrs: { 'security.capability': Buffer.from([1, 0, 255]), 'user.a': '' },
    },
    { name: 'dir/file', content: 'again' },
    { name: '.wh.gone' },
  ];

  test('reports every kind of member with all it says, whatever the sizes of the buffers', () => {
    const tar = tarOf(everything);
    const whole = read(tar);
    assert.deepEqual(whole.all, tar);
    const byName = (name: string) => whole.members.filter((member) => member.name === name);
    assert.deepEqual(
      whole.members.map(({ type }) => type),
      [5, 5, 0, 0, 0, 1, 2, 3, 4, 6, 0, 0, 0, 0],
    );
    const [file] = byName('dir/file');
    assert.deepEqual(
      [file!.mode, file!.uid, file!.gid, file!.mtimeSec, file!.mtimeNsec, file!.size],
      [0o4755, 70_000, 3_000_000_000, 1_700_000_000, 123_456_789, 7],
    );
    assert.equal(byName('')[0]!.type, EntryType.directory);
    assert.equal(byName('hard')[0]!.link, 'dir/file');
    assert.equal(byName('soft')[0]!.link, '../outside//x');
    assert.deepEqual([byName('blk')[0]!.devMajor, byName('blk')[0]!.devMinor], [259, 70_000]);
    assert.equal(byName('latin\xe9\xff').length, 1);
    const long = byName(`${'long/'.repeat(60)}name`)[0]!;
    assert.deepEqual(
      long.xattrs?.map(({ name, value }) => [name, value.toString('hex')]),
      [
        ['security.capability', '0100ff'],
        ['user.a', ''],
      ],
    );
    assert.equal(whole.contents[2]!.toString(), 'content');
    for (const step of [1, 7, 511, 512, 513, 1000]) assert.deepEqual(read(tar, step), whole, `steps of ${step}`);
  });

  test('cleans names lexically below the root, so that ".." cannot leave it', () => {
    const names = ['/abs', './a//b/./c', '../../up', 'x/../../../y', 'a/b/..', '///'];
    const tar = Buffer.concat([...names.map((name) => raw({ name, type: '5' })), END]);
    assert.deepEqual(
      read(tar).members.map(({ name }) => name),
      ['abs', 'a/b/c', 'up', 'y', 'a', ''],
    );
    const link = Buffer.concat([raw({ name: 'l', type: '1', link: '../../etc/./shadow' }), END]);
    assert.equal(read(link).members[0]!.link, 'etc/shadow');
  });

  test('passes over what resolves to the root and is no directory, as containerd does', () => {
    const tar = Buffer.concat([rawMember({ name: 'a/..' }, 'lost'), rawMember({ name: 'kept' }, 'k'), END]);
    const result = read(tar);
    assert.deepEqual(
      result.members.map(({ name }) => name),
      ['kept'],
    );
    assert.deepEqual(result.all, tar);
  });

  test('joins prefix and name of ustar headers, and not those of GNU or old ones', () => {
    const ustar = raw({ name: 'tail', prefix: 'some/dir' });
    const gnu = raw({ name: 'gnu', magic: 'ustar  \0', prefix: '12345670123' });
    const old = raw({ name: 'old', magic: '\0\0\0\0\0\0\0\0', prefix: 'junk' });
    const oldDirectory = raw({ name: 'olddir/', magic: '\0\0\0\0\0\0\0\0', type: '\0' });
    const { members } = read(Buffer.concat([ustar, gnu, old, oldDirectory, END]));
    assert.deepEqual(
      members.map(({ name }) => name),
      ['some/dir/tail', 'gnu', 'old', 'olddir'],
    );
    assert.equal(members[3]!.type, EntryType.directory);
  });

  test('reads base-256 numbers, negative times included', () => {
    const big = Buffer.alloc(12);
    big.writeUIntBE(8 * 1024 ** 3 + 5, 6, 6);
    big[0] = 0x80;
    const negative = Buffer.alloc(12, 0xff);
    negative.writeInt32BE(-2, 8);
    const uid = Buffer.from([0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    const { members } = read(Buffer.concat([raw({ type: '5', uid, mtime: negative, size: big }), END]));
    assert.deepEqual([members[0]!.uid, members[0]!.mtimeSec, members[0]!.size], [0xffff_ffff, -2, 0]);
  });

  test('takes times exactly: fractions, negative ones, and digits below a nanosecond', () => {
    const times: [string, number, number][] = [
      ['12.000000001', 12, 1],
      ['-1.5', -2, 500_000_000],
      ['-3', -3, 0],
      ['0.1234567899', 0, 123_456_789],
      ['1700000000.', 1_700_000_000, 0],
      ['-0.000000001', -1, 999_999_999],
    ];
    for (const [text, sec, nsec] of times) {
      const { members } = read(Buffer.concat([pax(['mtime', text]), raw({}), END]));
      assert.deepEqual([members[0]!.mtimeSec, members[0]!.mtimeNsec], [sec, nsec], text);
    }
  });

  test('applies PAX records to one member, GNU long names over them, and ignores global records as containerd does', () => {
    const tar = Buffer.concat([
      rawMember({ type: 'g' }, record('uid', '77') + record('path', 'global')),
      pax(['path', 'from-pax'], ['uid', '123'], ['size', '3'], ['linkpath', ''], ['comment', 'ignored']),
      Buffer.concat([raw({ name: 'short', size: octal(9) }), padded('abc')]),
      rawMember({ type: 'L' }, `${'n'.repeat(200)}\0`),
      rawMember({ type: 'K' }, 'target\0junk'),
      raw({ name: 'cut', type: '2', link: 'cut' }),
      raw({ name: 'plain' }),
      END,
    ]);
    const { members, contents } = read(tar);
    assert.deepEqual(
      members.map(({ name, uid, link, size }) => [name, uid, link, size]),
      [
        ['from-pax', 123, '', 3],
        ['n'.repeat(200), 0, 'target', 0],
        ['plain', 0, '', 0],
      ],
    );
    assert.equal(contents[0]!.toString(), 'abc');
  });

  test('reads attributes of bsdtar where tar has not written the same', () => {
    const tar = Buffer.concat([
      pax(
        ['LIBARCHIVE.xattr.user.only%20here', Buffer.from('v\0w').toString('base64')],
        ['LIBARCHIVE.xattr.user.both', Buffer.from('b').toString('base64')],
        ['SCHILY.xattr.user.both', 'a=b\n'],
      ),
      raw({}),
      END,
    ]);
    assert.deepEqual(
      read(tar).members[0]!.xattrs?.map(({ name, value }) => [name, value.toString()]),
      [
        ['user.both', 'a=b\n'],
        ['user.only here', 'v\0w'],
      ],
    );
  });

  test('reads all four sparse formats to the same file', () => {
    const fragments = [
      { offset: 512, length: 512 },
      { offset: 4096, length: 100 },
    ];
    const data = Buffer.concat([Buffer.alloc(512, 1), Buffer.alloc(100, 2)]);
    const gnu = Buffer.concat([
      raw({
        type: 'S',
        magic: 'ustar  \0',
        size: octal(612),
        at: {
          386: octal(512) + octal(512) + octal(4096) + octal(100) + octal(5000) + octal(0),
          483: octal(5000),
        },
      }),
      padded(data),
    ]);
    const map = '512,512,4096,100,5000,0';
    const paxes = {
      '0.0': pax(
        ['GNU.sparse.major', '0'],
        ['GNU.sparse.minor', '0'],
        ['GNU.sparse.size', '5000'],
        ['GNU.sparse.numblocks', '3'],
        ['GNU.sparse.offset', '512'],
        ['GNU.sparse.numbytes', '512'],
        ['GNU.sparse.offset', '4096'],
        ['GNU.sparse.numbytes', '100'],
        ['GNU.sparse.offset', '5000'],
        ['GNU.sparse.numbytes', '0'],
      ),
      '0.1': pax(['GNU.sparse.size', '5000'], ['GNU.sparse.map', map], ['GNU.sparse.name', 'file']),
    };
    const zero = Object.values(paxes).map((header) =>
      Buffer.concat([header, raw({ name: 'x', size: octal(612) }), padded(data)]),
    );
    const text = padded(`3\n${map.replaceAll(',', '\n')}\n`);
    const one = Buffer.concat([
      pax(
        ['GNU.sparse.major', '1'],
        ['GNU.sparse.minor', '0'],
        ['GNU.sparse.name', 'file'],
        ['GNU.sparse.realsize', '5000'],
      ),
      raw({ name: 'GNUSparseFile.0/file', size: octal(612 + text.length) }),
      text,
      padded(data),
    ]);
    for (const [position, member] of [gnu, ...zero, one].entries()) {
      for (const step of [65_536, 100]) {
        const tar = Buffer.concat([member, END]);
        const { members, contents, all } = read(tar, step);
        assert.deepEqual(members[0]!.fragments, fragments, `format ${position}`);
        assert.deepEqual([members[0]!.size, members[0]!.contentBytes], [5000, 612]);
        assert.deepEqual(contents[0], data);
        assert.deepEqual(all, tar);
      }
    }
  });

  test('reads extension headers of old sparse members', () => {
    const pairs = Array.from({ length: 30 }, (_, i) => octal(i * 1024) + octal(512));
    const first = raw({
      type: 'S',
      magic: 'ustar  \0',
      size: octal(30 * 512),
      at: { 386: pairs.slice(0, 4).join(''), 482: '\x01', 483: octal(40_000) },
    });
    const extension = (part: string[], more: boolean): Buffer => {
      const block = Buffer.alloc(512);
      block.write(part.join(''), 'latin1');
      if (more) block[504] = 1;
      return block;
    };
    const tar = Buffer.concat([
      first,
      extension(pairs.slice(4, 25), true),
      extension(pairs.slice(25), false),
      Buffer.alloc(30 * 512, 7),
      END,
    ]);
    assert.equal(read(tar).members[0]!.fragments!.length, 30);
  });

  test('keeps what follows the end of the archive as framing, and accepts a tar without an end', () => {
    const tar = Buffer.concat([rawMember({}, 'abc'), END, Buffer.from('trailing bytes')]);
    assert.deepEqual(read(tar).all, tar);
    assert.equal(read(rawMember({}, 'abc')).members.length, 1);
    assert.equal(read(Buffer.alloc(0)).members.length, 0);
  });

  describe('refuses with LAYER_INVALID', () => {
    const cases: Record<string, [Buffer, RegExp]> = {
      'a wrong checksum': [raw({ checksum: '0000001\0' }), /checksum/],
      'a member cut off in its content': [rawMember({}, Buffer.alloc(600)).subarray(0, 900), /cut off/],
      'a member cut off in its padding': [rawMember({}, 'abc').subarray(0, 700), /cut off/],
      'a header cut off': [raw({}).subarray(0, 100), /cut off/],
      'PAX records without a member': [pax(['path', 'x']), /cut off/],
      'a member after one block of zeros': [Buffer.concat([Buffer.alloc(512), raw({})]), /zeros/],
      'a negative size': [raw({ size: Buffer.alloc(12, 0xff) }), /negative/],
      'a size above 2^53': [raw({ size: Buffer.from([0x80, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]) }), /53 bits/],
      'a size that is no number': [raw({ size: '0000000zz00\0' }), /octal/],
      'a negative uid': [raw({ uid: Buffer.alloc(8, 0xff) }), /uid/],
      'a uid above 32 bits': [Buffer.concat([pax(['uid', '4294967296']), raw({})]), /uid/],
      'an unknown member type': [raw({ type: 'V' }), /type "V"/],
      'a device number that Linux does not have': [raw({ type: '3', devMajor: '0010000\0' }), /device number/],
      'a hard link without a target': [raw({ type: '1', link: '.' }), /hard link/],
      'a symlink without a target': [raw({ type: '2' }), /symlink/],
      'a name component above 255 bytes': [Buffer.concat([pax(['path', 'c'.repeat(256)]), raw({})]), /component/],
      'a name above 4096 bytes': [Buffer.concat([pax(['path', 'ab/'.repeat(1500)]), raw({})]), /name of/],
      'a NUL in a PAX name': [Buffer.concat([pax(['path', 'a\0b']), raw({})]), /NUL/],
      'metadata above 1 MiB': [raw({ type: 'x', size: octal(1024 * 1024 + 1) }), /metadata of/],
      'a PAX record with a wrong length': [rawMember({ type: 'x' }, '99 path=x\n'), /PAX/],
      'a PAX record without a key': [rawMember({ type: 'x' }, '5 =x\n'), /PAX/],
      'a PAX record of absurd length': [rawMember({ type: 'x' }, '99999999999999999999 a=b\n'), /PAX/],
      'a PAX size that is no number': [Buffer.concat([pax(['size', '-1'])]), /size/],
      'a PAX time that is none': [pax(['mtime', '1e9']), /mtime/],
      'an attribute above 65,535 bytes': [pax(['SCHILY.xattr.user.x', 'v'.repeat(65_536)]), /65535/],
      'an attribute without a name': [pax(['SCHILY.xattr.', 'v']), /attribute/],
      'more than 1,024 attributes of one file': [
        pax(...Array.from({ length: 1025 }, (_, i): [string, string] => [`SCHILY.xattr.user.${i}`, 'v'])),
        /1024/,
      ],
      'a sparse map that runs backwards': [
        Buffer.concat([pax(['GNU.sparse.map', '512,10,0,10'], ['GNU.sparse.size', '1000']), raw({ size: octal(20) })]),
        /backwards/,
      ],
      'a sparse map that ends after its file': [
        Buffer.concat([pax(['GNU.sparse.map', '990,20'], ['GNU.sparse.size', '1000']), raw({ size: octal(20) })]),
        /ends after/,
      ],
      'a sparse map that covers other bytes than there are': [
        Buffer.concat([pax(['GNU.sparse.map', '0,10'], ['GNU.sparse.size', '1000']), raw({ size: octal(20) })]),
        /covers/,
      ],
      'a sparse map on a directory': [
        Buffer.concat([pax(['GNU.sparse.map', '0,10'], ['GNU.sparse.size', '10']), raw({ type: '5' })]),
        /no file/,
      ],
      'a sparse text map without end': [
        Buffer.concat([
          pax(['GNU.sparse.major', '1'], ['GNU.sparse.minor', '0'], ['GNU.sparse.realsize', '10']),
          raw({ size: octal(1024) }),
          Buffer.alloc(1024, 0x31),
        ]),
        /sparse map/,
      ],
      'a sparse text map longer than its member': [
        Buffer.concat([
          pax(['GNU.sparse.major', '1'], ['GNU.sparse.minor', '0'], ['GNU.sparse.realsize', '10']),
          raw({ size: octal(512) }),
          Buffer.from(`9999\n${'1\n'.repeat(1000)}`),
        ]),
        /cut off/,
      ],
    };
    for (const [title, [tar, what]] of Object.entries(cases)) test(title, () => refused(tar, what));
  });

  test('accounts for every byte of any sane tar, in any steps', () => {
    const name = fc.string({ minLength: 1, maxLength: 40, unit: fc.constantFrom('a', 'b', '.', '/', '\xe9', ' ') });
    const entry = fc.record({
      name: name.map((text) => Buffer.from(`n${text}`, 'latin1')),
      type: fc.constantFrom<TarEntry['type']>('file', 'dir', 'symlink', 'fifo'),
      content: fc.uint8Array({ maxLength: 1500 }),
      linkname: fc.constant('target'),
      uid: fc.nat(),
      mtime: fc.nat(),
    });
    fc.assert(
      fc.property(fc.array(entry, { maxLength: 8 }), fc.integer({ min: 1, max: 3000 }), (entries, step) => {
        const files = entries.map((one) => (one.type === 'file' ? one : { ...one, content: '' }));
        const tar = tarOf(files);
        const result = read(tar, step);
        assert.deepEqual(result.all, tar);
        const kept = entries.filter(
          ({ name, type }) => type === 'dir' || posix.resolve('/', name.toString('latin1')) !== '/',
        );
        assert.equal(result.members.length, kept.length);
      }),
      { numRuns: 200 },
    );
  });

  test('gives members or LAYER_INVALID for any damage, and nothing else', () => {
    const tar = tarOf(everything);
    const fixSum = (bytes: Buffer, block: number): void => {
      bytes.fill(0x20, block + 148, block + 156);
      let sum = 0;
      for (let i = block; i < block + 512; i++) sum += bytes[i] ?? 0;
      bytes.write(`${sum.toString(8).padStart(6, '0')}\0 `, block + 148, 'latin1');
    };
    const change = fc.record({
      at: fc.nat(tar.length - 1),
      value: fc.integer({ min: 0, max: 255 }),
      fix: fc.boolean(),
    });
    let good = 0;
    let bad = 0;
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 6 }), fc.nat(tar.length), (changes, cut) => {
        const damaged = Buffer.from(tar);
        for (const { at, value, fix } of changes) {
          damaged[at] = value;
          if (fix) fixSum(damaged, at - (at % 512));
        }
        try {
          const part = cut % 3 === 0 ? damaged.subarray(0, cut) : damaged;
          assert.deepEqual(read(part).all, part);
          good++;
        } catch (error) {
          if (!(error instanceof DedupError) || error.code !== 'LAYER_INVALID') throw error;
          bad++;
        }
      }),
      { numRuns: 3000 },
    );
    assert.ok(good > 100 && bad > 100, `both outcomes were seen (${good}, ${bad})`);
  });
});
