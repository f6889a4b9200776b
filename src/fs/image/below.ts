// Looks up what a directory is in the layers below a segment. Used by the image builder for directories that a layer
// uses without describing them; containerd copies their attributes from its lower directories.
import type { BigIntStats } from 'node:fs';
import { lstatSync, readFileSync, readlinkSync } from 'node:fs';
import { decodeLayerIndex } from '../index/format.ts';
import { native } from '../native.ts';
import type { SegmentBelow } from './build-protocol.ts';
import { cleanComponents, resolveInside, usableXattrs } from './layer-tree.ts';
import { mergeLayers } from './merge.ts';
import type { DirectoryAttributes, XattrSet } from './tree.ts';

/** `absent`: look further down. `other`: something that is no directory stops the search. */
type Found = DirectoryAttributes | 'absent' | 'other';

const MAX_LINKS = 255;

/** The look-up for MergeOptions.attributesBelow. `segments` from top to bottom. */
export function attributesBelow(segments: readonly SegmentBelow[]): (path: string) => DirectoryAttributes | undefined {
  const lookUps = segments.map((segment) =>
    segment.kind === 'directory' ? inDirectory(segment.path) : inLayers(segment.indexes),
  );
  return (path) => {
    for (const lookUp of lookUps) {
      const found = lookUp(path);
      if (found === 'other') return undefined;
      if (found !== 'absent') return found;
    }
    return undefined;
  };
}

function inLayers(indexes: readonly string[]): (path: string) => Found {
  const layers = indexes.map((index) => decodeLayerIndex(readFileSync(index)).entries);
  const tree = mergeLayers(layers, { bottom: false });
  return (path) => {
    const resolved = resolveInside(tree, tree.root, path.split('/'));
    if (resolved === undefined) return 'other';
    if (resolved.found < resolved.names.length) {
      return tree.isDirectory(resolved.inode) ? 'absent' : 'other';
    }
    const { inode } = resolved;
    if (!tree.isDirectory(inode)) return 'other';
    return {
      mode: tree.mode[inode]!,
      uid: tree.uid[inode]!,
      gid: tree.gid[inode]!,
      mtimeSec: tree.mtimeSec[inode]!,
      mtimeNsec: tree.mtimeNsec[inode]!,
      xattrs: tree.xattrs[inode],
    };
  };
}

/** In the order of names, which layers have too: the same content gives the same image. */
function sortedXattrs(path: Uint8Array): XattrSet {
  return native()
    .readXattrs(path)
    .sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** Symlinks are followed inside `root` only. */
function inDirectory(root: string): (path: string) => Found {
  const full = (names: readonly string[]): Buffer =>
    Buffer.concat([Buffer.from(root), Buffer.from(names.map((name) => `/${name}`).join(''), 'latin1')]);
  return (path) => {
    let names: string[] = path.split('/');
    let links = 0;
    for (let i = 0; i < names.length; ) {
      const here = full(names.slice(0, i + 1));
      let stats: BigIntStats;
      try {
        stats = lstatSync(here, { bigint: true });
      } catch (error) {
        const code = (error as NodeJS.ErrnoException).code;
        if (code === 'ENOENT') return 'absent';
        if (code === 'ENOTDIR') return 'other';
        throw error;
      }
      if (stats.isSymbolicLink()) {
        if (++links > MAX_LINKS) return 'other';
        const target = readlinkSync(here, 'latin1');
        const before = target.startsWith('/') ? '' : names.slice(0, i).join('/');
        names = [...cleanComponents(`${before}/${target}`), ...names.slice(i + 1)];
        i = 0;
        continue;
      }
      if (!stats.isDirectory()) return 'other';
      if (++i < names.length) continue;
      return {
        mode: Number(stats.mode & 0o7777n),
        uid: Number(stats.uid),
        gid: Number(stats.gid),
        mtimeSec: Number(stats.mtimeNs / 1_000_000_000n),
        mtimeNsec: Number(stats.mtimeNs % 1_000_000_000n),
        xattrs: usableXattrs(sortedXattrs(here)),
      };
    }
    return 'absent';
  };
}
