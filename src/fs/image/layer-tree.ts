// Replays one layer's tar members into a tree of its own, as containerd 1.6 unpacks them into an empty upper directory:
// duplicates, missing parents, symlinked parents, hard links, whiteouts. Called by merge.ts, which stacks the results.
import { DedupError } from '../../errors.ts';
import type { EntryTable } from '../index/layer-index.ts';
import { EntryType } from '../index/layer-index.ts';
import type { ImageTree, InodeKind, XattrSet } from './tree.ts';
import { WHITEOUT } from './tree.ts';

const WHITEOUT_PREFIX = '.wh.';
const OPAQUE_MARKER = '.wh..wh..opq';
/** Symbolic links followed for one path before it counts as a loop: fs.RootPath of containerd's continuity gives up at 255. */
const MAX_LINKS = 255;
/** NAME_MAX, and PATH_MAX without its final zero: what Linux takes, and so what containerd could unpack. */
const MAX_NAME_BYTES = 255;
const MAX_PATH_BYTES = 4095;
/** Directories above one another; a name of MAX_PATH_BYTES has no more, chained symlinks could. */
const MAX_DEPTH = 2048;
/** Longest time os.Chtimes of containerd can set: 2^63 − 1 nanoseconds. Anything outside [0, that] becomes 0. */
const MAX_MTIME_SEC = 9_223_372_036;

export interface LayerTreeResult {
  readonly root: number;
  /** True when the layer has a whiteout or an opaque directory: without any, nothing needs to be searched for them. */
  readonly hides: boolean;
  /** Directories that were made because an entry needed them, with their paths; some may have got an entry later. */
  readonly made: readonly { readonly inode: number; readonly path: readonly string[] }[];
}

export interface LayerTreeOptions {
  readonly layer: number;
  /** True for the lowest layer of an image: nothing lies below, so whiteouts act on the layer itself and vanish. */
  readonly lowest: boolean;
  /** Finds a hard link's target in the layers merged so far; undefined when there is none. */
  readonly findBelow: (path: string) => number | undefined;
}

function invalid(layer: number, entry: string, why: string): DedupError {
  return new DedupError('IMAGE_INVALID', `layer ${layer}, entry ${JSON.stringify(entry)}: ${why}`);
}

/** Why `name` cannot be a name in a directory; undefined when it can. */
function badName(name: string): string | undefined {
  if (name.length > MAX_NAME_BYTES) return 'a name longer than 255 bytes';
  if (name === '' || name === '.' || name === '..' || name.includes('\0')) return 'a name that no directory can hold';
  return undefined;
}

/** Components of `path` with "." and ".." resolved lexically; ".." at the root stays at the root. */
export function cleanComponents(path: string): string[] {
  const out: string[] = [];
  for (const part of path.split('/')) {
    if (part === '' || part === '.') continue;
    if (part === '..') out.pop();
    else out.push(part);
  }
  return out;
}

/**
 * Resolves `parts` below `root`, following symlinks inside it. Result: names after resolution and the row of the last one
 * that exists with all before it, with how many do. Undefined for a loop. A target is cleaned lexically before it is
 * walked, as fs.RootPath does.
 */
export function resolveInside(
  tree: ImageTree,
  root: number,
  parts: readonly string[],
): { names: readonly string[]; inode: number; found: number } | undefined {
  let names = parts;
  let links = 0;
  restart: for (;;) {
    let inode = root;
    for (let i = 0; i < names.length; i++) {
      const next = tree.children[inode]?.get(names[i]!);
      if (next === undefined) return { names, inode, found: i };
      if (tree.kind[next] === EntryType.symlink) {
        if (++links > MAX_LINKS) return undefined;
        const target = tree.link[next]!;
        const before = target.startsWith('/') ? '' : names.slice(0, i).join('/');
        names = [...cleanComponents(`${before}/${target}`), ...names.slice(i + 1)];
        continue restart;
      }
      inode = next;
    }
    return { names, inode, found: names.length };
  }
}

/**
 * The attributes that an image may carry; undefined for none. containerd never sets `trusted.*`, and ignores namespaces
 * the file system does not know; `user.overlay.*` would be instructions to overlayfs.
 */
export function usableXattrs(set: XattrSet): XattrSet | undefined {
  const kept = set.filter(
    ({ name }) =>
      (name.startsWith('user.') && name.length > 5 && !name.startsWith('user.overlay.')) ||
      (name.startsWith('security.') && name.length > 9) ||
      name === 'system.posix_acl_access' ||
      name === 'system.posix_acl_default',
  );
  return kept.length === 0 ? undefined : kept;
}

function withXattrs(old: XattrSet | undefined, added: XattrSet | undefined): XattrSet | undefined {
  if (old === undefined || added === undefined) return added ?? old;
  const names = new Set(added.map(({ name }) => name));
  return [...old.filter(({ name }) => !names.has(name)), ...added];
}

/** Removes what an opaque marker in the lowest layer removes there: everything below that no entry described. */
function removeImplicit(tree: ImageTree, directory: number): void {
  const children = tree.childrenOf(directory);
  for (const [name, child] of children) {
    if (!tree.isDirectory(child)) continue;
    if (tree.implicit[child] === 1) children.delete(name);
    else removeImplicit(tree, child);
  }
}

/** Builds the layer's own tree in `tree`. Errors: IMAGE_INVALID where containerd could not unpack it either. */
export function buildLayerTree(tree: ImageTree, entries: EntryTable, options: LayerTreeOptions): LayerTreeResult {
  const { layer, lowest } = options;
  const root = tree.addImplicitDirectory();
  const xattrSets = entries.xattrSets.map(usableXattrs);
  let hides = false;
  const made: { inode: number; path: readonly string[] }[] = [];
  /** Directory rows by the path as entries spell it; forgotten whenever a name is replaced. */
  const parents = new Map<string, number>();

  const parentOf = (path: string, entry: string): number => {
    const known = parents.get(path);
    if (known !== undefined) return known;
    const resolved = resolveInside(tree, root, path.split('/'));
    if (resolved === undefined) throw invalid(layer, entry, 'too many symbolic links in its path');
    if (resolved.names.length > MAX_DEPTH) throw invalid(layer, entry, 'too many directories in its path');
    let inode = resolved.inode;
    for (let i = resolved.found; i < resolved.names.length; i++) {
      if (tree.isWhiteout(inode)) break;
      if (!tree.isDirectory(inode)) break;
      const bad = badName(resolved.names[i]!);
      if (bad !== undefined) throw invalid(layer, entry, bad);
      const child = tree.addImplicitDirectory();
      tree.childrenOf(inode).set(resolved.names[i]!, child);
      made.push({ inode: child, path: resolved.names.slice(0, i + 1) });
      inode = child;
    }
    if (!tree.isDirectory(inode)) throw invalid(layer, entry, 'a part of its path is not a directory');
    parents.set(path, inode);
    return inode;
  };

  const setAttributes = (inode: number, i: number, entry: string): void => {
    const sec = entries.mtimeSec[i]!;
    const inRange = sec >= 0 && sec < MAX_MTIME_SEC;
    tree.uid[inode] = entries.uid[i]!;
    tree.gid[inode] = entries.gid[i]!;
    tree.mode[inode] = tree.kind[inode] === EntryType.symlink ? 0o777 : entries.mode[i]! & 0o7777;
    tree.mtimeSec[inode] = inRange ? sec : 0;
    tree.mtimeNsec[inode] = inRange ? entries.mtimeNsec[i]! : 0;
    const set = entries.xattrSet[i]!;
    if (set === 0xffffffff) return;
    if (set >= xattrSets.length) throw invalid(layer, entry, 'its xattr set does not exist');
    tree.xattrs[inode] = withXattrs(tree.xattrs[inode], xattrSets[set]);
  };

  const put = (parent: number, base: string, inode: number): void => {
    const children = tree.childrenOf(parent);
    const old = children.get(base);
    // A replaced directory or symlink may have been part of any remembered path.
    if (old !== undefined && tree.kind[old] !== EntryType.file) parents.clear();
    children.set(base, inode);
  };

  const hide = (parent: number, base: string, name: string): void => {
    if (base === OPAQUE_MARKER) {
      if (lowest) {
        removeImplicit(tree, parent);
        parents.clear();
      } else if (parent !== root) {
        // overlayfs stacks the roots of its layers whether they are marked or not.
        tree.opaque[parent] = 1;
        hides = true;
      }
      return;
    }
    const hidden = base.slice(WHITEOUT_PREFIX.length);
    const bad = badName(hidden);
    if (bad !== undefined) throw invalid(layer, name, `a whiteout of ${bad}`);
    const children = tree.childrenOf(parent);
    if (lowest) {
      children.delete(hidden);
      parents.clear();
      return;
    }
    hides = true;
    const old = children.get(hidden);
    if (old === undefined) children.set(hidden, tree.add(WHITEOUT));
    else if (tree.isDirectory(old)) tree.opaque[old] = 1;
  };

  const addHardLink = (parent: number, base: string, i: number, name: string): void => {
    const target = entries.link[i]!;
    const slash = target.lastIndexOf('/');
    const last = target.slice(slash + 1);
    const directory = resolveInside(tree, root, slash < 0 ? [] : target.slice(0, slash).split('/'));
    const complete = directory !== undefined && directory.found === directory.names.length;
    const own = complete ? tree.children[directory.inode]?.get(last) : undefined;
    const inode = own ?? options.findBelow(target);
    if (inode === undefined) throw invalid(layer, name, `a hard link to ${JSON.stringify(target)}, which is not there`);
    if (tree.isDirectory(inode) || tree.isWhiteout(inode)) throw invalid(layer, name, 'a hard link to a directory');
    // chown(2), which containerd calls for the link too, drops file capabilities.
    tree.xattrs[inode] = tree.xattrs[inode]?.filter((attribute) => attribute.name !== 'security.capability');
    setAttributes(inode, i, name);
    put(parent, base, inode);
  };

  for (let i = 0; i < entries.count; i++) {
    const name = entries.name[i]!;
    // containerd ignores the entry of the root directory: its attributes are those of a fresh snapshot.
    if (name === '') continue;
    if (name.length > MAX_PATH_BYTES) throw invalid(layer, name.slice(0, 100), 'a path longer than 4,095 bytes');
    const slash = name.lastIndexOf('/');
    const base = name.slice(slash + 1);
    const parent = slash < 0 ? root : parentOf(name.slice(0, slash), name);
    if (base.startsWith(WHITEOUT_PREFIX)) {
      hide(parent, base, name);
      continue;
    }
    const bad = badName(base);
    if (bad !== undefined) throw invalid(layer, name, bad);
    const type = entries.type[i]!;
    if (type === EntryType.hardLink) {
      addHardLink(parent, base, i, name);
      continue;
    }
    if (type === EntryType.directory) {
      const old = tree.childrenOf(parent).get(base);
      const merges = old !== undefined && tree.isDirectory(old);
      const inode = merges ? old : tree.add(EntryType.directory);
      setAttributes(inode, i, name);
      tree.implicit[inode] = 0;
      if (!merges) put(parent, base, inode);
      continue;
    }
    if (type > EntryType.fifo) throw invalid(layer, name, `unknown type ${type}`);
    const device = type === EntryType.charDevice || type === EntryType.blockDevice;
    if (type === EntryType.charDevice && entries.devMajor[i] === 0 && entries.devMinor[i] === 0) {
      // overlayfs takes a 0/0 character device for a whiteout wherever it lies.
      hides = true;
      put(parent, base, tree.add(WHITEOUT));
      continue;
    }
    const inode = tree.add(type as InodeKind);
    setAttributes(inode, i, name);
    if (device) {
      tree.devMajor[inode] = entries.devMajor[i]!;
      tree.devMinor[inode] = entries.devMinor[i]!;
    } else if (type === EntryType.symlink) {
      const target = entries.link[i]!;
      if (target === '' || target.length > MAX_PATH_BYTES || target.includes('\0')) {
        throw invalid(layer, name, 'a symbolic link whose target is empty, too long or no path');
      }
      tree.link[inode] = target;
    } else if (type === EntryType.file) {
      tree.layer[inode] = layer;
      tree.size[inode] = entries.size[i]!;
      tree.firstChunk[inode] = entries.firstChunk[i]!;
      tree.chunkCount[inode] = entries.chunkCount[i]!;
    }
    put(parent, base, inode);
  }
  return { root, hides, made };
}
