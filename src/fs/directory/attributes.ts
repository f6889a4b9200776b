// Tells apart what overlayfs shows of a file's extended attributes and what they instruct it to do. Called by walk.ts for
// every file of an unpacked layer. What an image would not show as overlayfs does is refused, never left out.
// Source of the names: fs/overlayfs/overlayfs.h of Linux, enum ovl_xattr.
import { DedupError } from '../../errors.ts';
import { xattrAreaBytes } from '../image/erofs/xattr.ts';
import { usableXattrs } from '../image/layer-tree.ts';
import { MAX_XATTR_VALUE_BYTES, MAX_XATTRS_PER_SET, type Xattr } from '../index/tar-header.ts';

const PRIVATE = 'trusted.overlay.';
/** Set by the writer on directories that hide what lies below them; counted for all, so that what fits here fits there. */
const OPAQUE: Xattr = { name: `${PRIVATE}opaque`, value: Buffer.from('y') };

export interface OverlayAttributes {
  /** What a reader of the overlay sees, sorted by name; undefined without any. */
  readonly xattrs: readonly Xattr[] | undefined;
  /** Set to hide what lower layers have in this directory; says nothing on anything else. */
  readonly opaque: boolean;
}

export const NO_ATTRIBUTES: OverlayAttributes = { xattrs: undefined, opaque: false };

/** The error for what is to stay a directory. `path` below the root, latin1. */
export function leftAlone(path: string, why: string): DedupError {
  return new DedupError('LAYER_NOT_LAZY', `the unpacked layer's ${shown(path)} ${why}`, {
    details: { path: Buffer.from(path, 'latin1').toString() },
  });
}

/** A path for people. */
export function shown(path: string): string {
  return path === '' ? 'root' : JSON.stringify(Buffer.from(path, 'latin1').toString());
}

/** Errors: LAYER_NOT_LAZY naming `path` and the attribute. */
export function overlayAttributes(path: string, all: readonly Xattr[]): OverlayAttributes {
  if (all.length === 0) return NO_ATTRIBUTES;
  let opaque = false;
  const visible: Xattr[] = [];
  for (const attribute of all) {
    if (!attribute.name.startsWith(PRIVATE)) visible.push(attribute);
    else if (isOpaque(path, attribute)) opaque = true;
  }
  if (visible.length === 0) return { xattrs: undefined, opaque };
  requireExpressible(path, visible);
  return { xattrs: visible.sort((a, b) => (a.name < b.name ? -1 : 1)), opaque };
}

/** True for the mark of an opaque directory, false for what says nothing to who only reads. */
function isOpaque(path: string, { name, value }: Xattr): boolean {
  const instruction = name.slice(PRIVATE.length);
  switch (instruction) {
    case 'opaque':
      // "x": whiteouts that are files with an attribute may lie in it (Linux 6.8).
      if (value.length === 1 && value[0] === OPAQUE.value[0]) return true;
      throw leftAlone(path, `has ${name} with a value other than "y"`);
    case 'metacopy':
    case 'redirect':
    case 'whiteout':
    case 'whiteouts':
      throw leftAlone(path, `has ${name}: its content or name lies elsewhere`);
    default:
      // overlayfs shows trusted.overlay.overlay.x as trusted.overlay.x (Linux 6.7).
      if (instruction.startsWith('overlay.')) throw leftAlone(path, `has ${name}, which an image cannot have`);
      return false;
  }
}

function requireExpressible(path: string, visible: readonly Xattr[]): void {
  const usable = new Set(usableXattrs(visible)?.map(({ name }) => name));
  const other = visible.find(({ name }) => !usable.has(name));
  if (other !== undefined) throw leftAlone(path, `has ${other.name}, which an image cannot have`);
  const large = visible.find(({ value }) => value.length > MAX_XATTR_VALUE_BYTES);
  if (large !== undefined) throw leftAlone(path, `has ${large.name} of ${large.value.length} bytes`);
  if (visible.length > MAX_XATTRS_PER_SET) throw leftAlone(path, `has ${visible.length} extended attributes`);
  try {
    xattrAreaBytes([...visible, OPAQUE]);
  } catch (cause) {
    if (!(cause instanceof DedupError)) throw cause;
    throw leftAlone(path, `cannot be part of an image: ${cause.message}`);
  }
}
