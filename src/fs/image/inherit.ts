// What a directory looks like that a layer uses without describing it: containerd copies mode, owner, times and extended
// attributes from the first lower layer that has anything at its path. It asks the layers one by one, each as unpacked:
// what another layer between them hides is found all the same. Used by merge.ts and below.ts.
import type { EntryTable } from '../index/layer-index.ts';
import { EntryType } from '../index/layer-index.ts';
import { buildLayerTree, resolveInside } from './layer-tree.ts';
import type { DirectoryAttributes } from './tree.ts';
import { ImageTree } from './tree.ts';

/** What one layer has at a path. `other`: something that is no directory. `made`: a directory it does not describe. */
export type Found =
  | { readonly kind: 'absent' }
  | { readonly kind: 'other' }
  | { readonly kind: 'directory'; readonly attributes: DirectoryAttributes }
  | { readonly kind: 'made'; readonly path: readonly string[] };

/** Looks into one layer. Names are latin1, one character per byte; symlinks on the way are followed inside the layer. */
export type LowerLayer = (path: readonly string[]) => Found;

/**
 * Attributes that a directory at `path` takes from `lowers`, top to bottom; undefined for those of a new directory.
 * Source: mkparent in archive/tar.go of containerd 1.6.
 */
export function inheritedAttributes(
  lowers: readonly LowerLayer[],
  path: readonly string[],
): DirectoryAttributes | undefined {
  let wanted = path;
  for (const lower of lowers) {
    const found = lower(wanted);
    switch (found.kind) {
      case 'absent':
        continue;
      case 'other':
        return undefined;
      case 'directory':
        return found.attributes;
      case 'made':
        // It took them from further below itself.
        wanted = found.path;
    }
  }
  return undefined;
}

/** A layer by its entries; its tree is built when it is first asked. `lowest`: it is the bottom layer of the image. */
export function lowerLayer(entries: () => EntryTable, lowest: boolean): LowerLayer {
  let built: { readonly tree: ImageTree; readonly root: number } | undefined;
  return (path) => {
    built ??= buildAlone(entries(), lowest);
    const { tree, root } = built;
    const resolved = resolveInside(tree, root, path);
    if (resolved === undefined) return { kind: 'other' };
    const { names, inode, found } = resolved;
    if (!tree.isDirectory(inode)) return { kind: 'other' };
    if (found < names.length) return { kind: 'absent' };
    if (tree.implicit[inode] === 1) return { kind: 'made', path: names };
    return { kind: 'directory', attributes: tree.directoryAttributes(inode) };
  };
}

function buildAlone(entries: EntryTable, lowest: boolean): { tree: ImageTree; root: number } {
  const tree = new ImageTree(entries.count + 64);
  // Stands for files of lower layers that hard links name: only directories are looked at here.
  const file = tree.add(EntryType.file);
  const { root } = buildLayerTree(tree, entries, { layer: 0, lowest, findBelow: () => file });
  return { tree, root };
}
