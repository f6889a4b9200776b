// Layers that use everything a tar layer can hold, described once: as tar members for containerd and as index tables for
// the image builder. Names are latin1, one character per byte.
import type { EntrySpec } from './layer-maker.ts';
import type { TarEntry } from './tar.ts';

/** struct vfs_cap_data, revision 2, effective: cap_net_bind_service. */
export const CAPABILITY = Buffer.from('0100000200040000000000000000000000000000', 'hex');
const LONG_NAME = 'n'.repeat(255);
/** A path of 1,004 bytes. */
export const DEEP = Array.from({ length: 5 }, (_, i) => String(i).repeat(200)).join('/');

export function bottomLayer(): EntrySpec[] {
  return [
    { name: '', mode: 0o700, uid: 5, mtime: [5, 5] },
    { name: 'etc', mtime: [1_500_000_000, 123_456_789] },
    { name: 'etc/passwd', content: 'root:x:0:0\n', mtime: [1_700_000_000, 999_999_999] },
    { name: 'etc/old-time', content: 'x', mtime: [-86_400, 0] },
    { name: 'owned', mode: 0o2750, uid: 70_000, gid: 3_000_000_000 },
    { name: 'owned/file', mode: 0o600, uid: 70_001, gid: 80_000, content: 'mine' },
    { name: 'tmp', mode: 0o1777 },
    { name: 'bin', mode: 0o755 },
    { name: 'bin/su', mode: 0o4755, content: 'setuid' },
    { name: 'bin/su-link', type: 'hardLink', link: 'bin/su', mode: 0o4755 },
    { name: 'bin/ping', mode: 0o755, content: 'ping', xattrs: { 'security.capability': CAPABILITY } },
    {
      name: 'bin/ping-link',
      type: 'hardLink',
      link: 'bin/ping',
      mode: 0o755,
      xattrs: { 'security.capability': CAPABILITY },
    },
    { name: 'bin/a-link', link: 'su' },
    { name: 'bin/link-of-link', type: 'hardLink', link: 'bin/a-link', mode: 0o777 },
    { name: 'bin/chown-link', type: 'hardLink', link: 'owned/file', mode: 0o640, uid: 9, gid: 9, mtime: [1_000, 1] },
    { name: 'dev' },
    { name: 'dev/null', type: 'charDevice', dev: [1, 3], mode: 0o666 },
    { name: 'dev/big', type: 'blockDevice', dev: [259, 1_000_000], mode: 0o660, gid: 6 },
    { name: 'dev/pipe', type: 'fifo', mode: 0o600 },
    { name: 'dev/pipe-link', type: 'hardLink', link: 'dev/pipe', mode: 0o600 },
    { name: 'empty', content: '' },
    { name: 'attrs', xattrs: { 'user.directory': 'yes' } },
    {
      name: 'attrs/file',
      content: 'with attributes',
      xattrs: { 'user.binary': Buffer.from([0, 255, 10, 13]), 'user.empty': '', 'trusted.ignored': 'x' },
    },
    { name: 'attrs/large', content: '.', xattrs: { 'user.large': Buffer.alloc(3000, 'v'), 'user.more': 'm' } },
    { name: LONG_NAME, content: 'long name' },
    { name: `${DEEP}/file`, content: 'deep' },
    { name: 'long-target', link: `${'t/'.repeat(2047)}t` },
    { name: 'caf\xe9-\xff\xfe', content: 'latin1 name' },
    { name: 'caf\xe9-dir' },
    { name: 'caf\xe9-dir/\x80', link: '\xff' },
    { name: 'missing/parent/of/this', content: 'orphan' },
    { name: 'twice', content: 'first', mode: 0o600 },
    { name: 'twice', content: 'second and longer' },
    { name: 'dir-then-file/x', content: 'x' },
    { name: 'dir-then-file', content: 'a file now' },
    { name: 'file-then-dir', content: 'a file' },
    { name: 'file-then-dir' },
    { name: 'file-then-dir/y', content: 'y' },
    { name: 'dir-twice', mode: 0o700, xattrs: { 'user.one': '1' } },
    { name: 'dir-twice/kept', content: 'kept' },
    { name: 'dir-twice', mode: 0o711, uid: 7, mtime: [7, 7], xattrs: { 'user.two': '2' } },
    { name: 'usr' },
    { name: 'usr/lib' },
    { name: 'lib', link: 'usr/lib' },
    { name: 'lib/through-link', content: 'lies in usr/lib' },
    { name: 'loop-a', link: 'missing-target/..' },
    { name: 'hole', size: 5 * 1024 * 1024, extents: [{ offset: 4 * 1024 * 1024, data: Buffer.from('after a hole') }] },
    { name: 'ends-off-block', content: 'z'.repeat(4097) },
    { name: 'merge', mode: 0o755 },
    { name: 'merge/from-below', content: 'below' },
    { name: 'merge/replaced', content: 'below' },
    { name: 'hidden' },
    { name: 'hidden/a', content: 'a' },
    { name: 'hidden/b', content: 'b' },
    { name: 'opaque' },
    { name: 'opaque/below', content: 'b' },
    { name: 'opaque/sub' },
    { name: 'opaque/sub/below', content: 'b' },
    { name: 'link-to-dir', link: 'merge' },
    { name: 'link-to-tmp', link: '/tmp' },
    { name: 'group-1', content: 'one inode' },
    { name: 'group-2', type: 'hardLink', link: 'group-1', mode: 0o644 },
    { name: 'group-3', type: 'hardLink', link: 'group-2', mode: 0o644 },
    { name: 'file-over-dir' },
    { name: 'file-over-dir/x', content: 'x' },
    { name: 'dir-over-file', content: 'f' },
    { name: 'device-hides', content: 'hidden by a 0/0 device' },
    { name: 'special', mode: 0o1733, uid: 12, gid: 13, xattrs: { 'user.kept': 'k' } },
    { name: 'reborn' },
    { name: 'reborn/old', content: 'old' },
    { name: 'gone-at-once', content: '1' },
    { name: '.wh.gone-at-once', content: '' },
    { name: '.wh.comes-after', content: '' },
    { name: 'comes-after', content: '2' },
    { name: 'opaque-here' },
    { name: 'opaque-here/before', content: 'before' },
    { name: 'opaque-here/.wh..wh..opq', content: '' },
    { name: 'opaque-here/after', content: 'after' },
  ];
}

export function middleLayer(): EntrySpec[] {
  return [
    { name: 'merge', mode: 0o700, uid: 1, mtime: [44, 44], xattrs: { 'user.new': 'n' } },
    { name: 'merge/replaced', link: 'from-below' },
    { name: 'merge/added', content: 'added' },
    { name: 'hidden/.wh.a', content: '' },
    { name: '.wh.reborn', content: '' },
    { name: 'opaque' },
    { name: 'opaque/before', content: 'sibling before' },
    { name: 'opaque/sub' },
    { name: 'opaque/sub/mine', content: 'mine' },
    { name: 'opaque/.wh..wh..opq', content: '' },
    { name: 'opaque/after', content: 'sibling after' },
    { name: 'link-to-dir/x', content: 'a directory now' },
    { name: 'link-to-tmp/x', content: 'with the mode of tmp' },
    { name: '.wh.group-2', content: '' },
    { name: 'file-over-dir', content: 'a file' },
    { name: 'dir-over-file' },
    { name: 'dir-over-file/y', content: 'y' },
    { name: 'device-hides', type: 'charDevice', dev: [0, 0] },
    { name: 'special/deep/new', content: 'inherits' },
    { name: '.wh.never-existed', content: '' },
    { name: 'new-hard', content: 'pair' },
    { name: 'new-hard-2', type: 'hardLink', link: 'new-hard', mode: 0o644 },
    { name: '.wh.twice', content: '' },
    { name: 'twice', content: 'again' },
    { name: 'etc/.wh.old-time', content: '' },
    { name: '.wh..wh..opq', content: '' },
  ];
}

export function topLayer(): EntrySpec[] {
  return [
    { name: 'reborn', mode: 0o701 },
    { name: 'reborn/new', content: 'new' },
    { name: 'opaque/sub/.wh.mine', content: '' },
    { name: 'device-hides', content: 'visible again' },
    { name: 'hidden/c', content: 'c' },
    { name: 'merge/from-below', content: 'replaced from the top', mode: 0o4711 },
    { name: '.wh.dev', content: '' },
    { name: 'etc/passwd', content: 'root:x:0:0\nuser:x:1:1\n' },
  ];
}

const TAR_TYPES = {
  file: 'file',
  hardLink: 'hardlink',
  symlink: 'symlink',
  charDevice: 'char',
  blockDevice: 'block',
  directory: 'dir',
  fifo: 'fifo',
} as const;

export function typeOfSpec(spec: EntrySpec): keyof typeof TAR_TYPES {
  if (spec.type !== undefined) return spec.type;
  if (spec.link !== undefined) return 'symlink';
  return spec.content !== undefined || spec.size !== undefined ? 'file' : 'directory';
}

/** The same layer as members of a tar archive; sparse files are written out. */
export function toTarEntries(specs: readonly EntrySpec[]): TarEntry[] {
  return specs.map((spec) => {
    const type = typeOfSpec(spec);
    const content = Buffer.alloc(spec.size ?? Buffer.from(spec.content ?? '').length);
    if (spec.content !== undefined) content.set(Buffer.from(spec.content));
    for (const extent of spec.extents ?? []) content.set(extent.data, extent.offset);
    const [sec, nsec] = spec.mtime ?? [1_600_000_000, 0];
    const slash = type === 'directory' ? '/' : '';
    return {
      name: Buffer.from(`./${spec.name}${spec.name === '' ? '' : slash}`, 'latin1'),
      type: TAR_TYPES[type],
      mode: spec.mode ?? (type === 'directory' ? 0o755 : 0o644),
      uid: spec.uid ?? 0,
      gid: spec.gid ?? 0,
      mtime: nsec === 0 ? sec : `${sec}.${String(nsec).padStart(9, '0')}`,
      ...(type === 'file' ? { content } : {}),
      ...(spec.link === undefined ? {} : { linkname: Buffer.from(spec.link, 'latin1') }),
      ...(spec.xattrs === undefined ? {} : { xattrs: spec.xattrs }),
      ...(spec.dev === undefined ? {} : { devmajor: spec.dev[0], devminor: spec.dev[1] }),
    };
  });
}

/** Directories that some layer uses without an entry of its own: containerd gives them the time of the unpack. */
export function undescribedDirectories(layers: readonly (readonly EntrySpec[])[]): Set<string> {
  const found = new Set<string>(['']);
  for (const specs of layers) {
    const described = new Set(specs.filter((spec) => typeOfSpec(spec) === 'directory').map((spec) => spec.name));
    for (const { name } of specs) {
      const parts = name.split('/');
      for (let i = 1; i < parts.length; i++) {
        const parent = parts.slice(0, i).join('/');
        if (!described.has(parent)) found.add(parent);
      }
    }
  }
  return found;
}
