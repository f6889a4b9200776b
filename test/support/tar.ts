// Writes tar archives for tests, member by member, exactly as asked: also what no sane archiver would write.
// Shared by every test that needs a layer; must not depend on the code under test.

/** One tar member. Names are bytes when they are a Buffer. */
export interface TarEntry {
  readonly name: string | Buffer;
  /** Default: 'file'. */
  readonly type?: 'file' | 'dir' | 'symlink' | 'hardlink' | 'char' | 'block' | 'fifo';
  /** Permission bits. Default 0o644, directories 0o755. */
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  /** Seconds, with a fraction as text ("1700000000.123456789") where nanoseconds matter. Default 1700000000. */
  readonly mtime?: number | string;
  readonly content?: string | Uint8Array;
  readonly linkname?: string | Buffer;
  readonly xattrs?: Readonly<Record<string, string | Uint8Array>>;
  readonly devmajor?: number;
  readonly devminor?: number;
  /** Further PAX records of this member. */
  readonly pax?: Readonly<Record<string, string | Uint8Array>>;
}

const TYPE_FLAGS = { file: '0', hardlink: '1', symlink: '2', char: '3', block: '4', dir: '5', fifo: '6' } as const;
const BLOCK = 512;

/** A whole archive, ended by two zero blocks. Source of the format: POSIX.1-2001 pax interchange format. */
export function tarOf(entries: readonly TarEntry[]): Buffer {
  const parts = entries.flatMap(member);
  parts.push(Buffer.alloc(2 * BLOCK));
  return Buffer.concat(parts);
}

function member(entry: TarEntry): Buffer[] {
  const name = Buffer.from(entry.name as string);
  const linkname = Buffer.from((entry.linkname ?? '') as string);
  const content = Buffer.from((entry.content ?? '') as string);
  const type = entry.type ?? 'file';
  const pax: [string, Uint8Array][] = Object.entries(entry.pax ?? {}).map(([key, value]) => [
    key,
    Buffer.from(value as string),
  ]);
  for (const [key, value] of Object.entries(entry.xattrs ?? {})) {
    pax.push([`SCHILY.xattr.${key}`, Buffer.from(value as string)]);
  }
  const seconds = Math.floor(Number(entry.mtime ?? 1_700_000_000));
  if (typeof entry.mtime === 'string' || seconds < 0 || seconds > 0o77777777777)
    pax.push(['mtime', Buffer.from(String(entry.mtime))]);
  if (name.length > 100) pax.push(['path', name]);
  if (linkname.length > 100) pax.push(['linkpath', linkname]);
  if ((entry.uid ?? 0) > 0o7777777) pax.push(['uid', Buffer.from(String(entry.uid))]);
  if ((entry.gid ?? 0) > 0o7777777) pax.push(['gid', Buffer.from(String(entry.gid))]);
  const parts: Buffer[] = [];
  if (pax.length > 0) {
    const records = Buffer.concat(pax.map(([key, value]) => paxRecord(key, value)));
    parts.push(header({ name: Buffer.from('pax'), flag: 'x', size: records.length }), padded(records));
  }
  parts.push(
    header({
      name: name.subarray(0, 100),
      linkname: linkname.subarray(0, 100),
      flag: TYPE_FLAGS[type],
      size: type === 'file' ? content.length : 0,
      mode: entry.mode ?? (type === 'dir' ? 0o755 : 0o644),
      uid: Math.min(entry.uid ?? 0, 0o7777777),
      gid: Math.min(entry.gid ?? 0, 0o7777777),
      mtime: Math.min(Math.max(seconds, 0), 0o77777777777),
      devmajor: entry.devmajor ?? 0,
      devminor: entry.devminor ?? 0,
    }),
  );
  if (type === 'file') parts.push(padded(content));
  return parts;
}

/** "LENGTH KEY=VALUE\n" where LENGTH counts itself. */
function paxRecord(key: string, value: Uint8Array): Buffer {
  const rest = Buffer.concat([Buffer.from(` ${key}=`), value, Buffer.from('\n')]);
  let length = rest.length + 1;
  while (String(length).length + rest.length !== length) length = String(length).length + rest.length;
  return Buffer.concat([Buffer.from(String(length)), rest]);
}

function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((BLOCK - (bytes.length % BLOCK)) % BLOCK)]);
}

interface Header {
  readonly name: Buffer;
  readonly flag: string;
  readonly size: number;
  readonly linkname?: Buffer;
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  readonly mtime?: number;
  readonly devmajor?: number;
  readonly devminor?: number;
}

function header(fields: Header): Buffer {
  const block = Buffer.alloc(BLOCK);
  const octal = (value: number, offset: number, width: number) => {
    block.write(`${value.toString(8).padStart(width - 1, '0')}\0`, offset, 'latin1');
  };
  fields.name.copy(block, 0);
  octal(fields.mode ?? 0o644, 100, 8);
  octal(fields.uid ?? 0, 108, 8);
  octal(fields.gid ?? 0, 116, 8);
  octal(fields.size, 124, 12);
  octal(fields.mtime ?? 0, 136, 12);
  block.write('        ', 148, 'latin1');
  block.write(fields.flag, 156, 'latin1');
  fields.linkname?.copy(block, 157);
  block.write('ustar\x0000', 257, 'latin1');
  octal(fields.devmajor ?? 0, 329, 8);
  octal(fields.devminor ?? 0, 337, 8);
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return block;
}
