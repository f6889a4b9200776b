// Merges consecutive lazy layers into one tree, as overlayfs would show their unpacked directories. Called by the image
// builder in its own process; pure computation, no I/O. The rules are listed in docs/formats/erofs-image.md.
import { DedupError } from '../../errors.ts';
import type { EntryTable } from '../index/layer-index.ts';
import type { LayerTreeResult } from './layer-tree.ts';
import { buildLayerTree, resolveInside } from './layer-tree.ts';
import type { DirectoryAttributes } from './tree.ts';
import { ImageTree } from './tree.ts';

export interface MergeOptions {
  /** True when nothing lies below these layers: whiteouts are resolved away instead of kept. */
  readonly bottom: boolean;
  /**
   * Attributes of a directory below this segment, by path (latin1, no leading "/"), for directories that a layer uses
   * without describing them. Undefined where nothing below is a directory.
   */
  readonly attributesBelow?: (path: string) => DirectoryAttributes | undefined;
}

/** Takes away every whiteout and opaque mark below `directory`: nothing beneath it can show through. */
function seal(tree: ImageTree, directory: number): void {
  tree.opaque[directory] = 0;
  const children = tree.childrenOf(directory);
  for (const [name, child] of children) {
    if (tree.isWhiteout(child)) children.delete(name);
    else if (tree.isDirectory(child)) seal(tree, child);
  }
}

class Stack {
  readonly #tree: ImageTree;
  readonly #bottom: boolean;
  /** True while the layer being stacked has something that hides. */
  #hides: boolean;
  /** Root of the tree stacked so far; undefined before the first layer. */
  #root: number | undefined;

  constructor(tree: ImageTree, bottom: boolean) {
    this.#tree = tree;
    this.#bottom = bottom;
    this.#hides = false;
  }

  get root(): number | undefined {
    return this.#root;
  }

  /** Puts a layer's tree on top. */
  push(layer: LayerTreeResult): void {
    this.#hides = layer.hides;
    if (this.#root === undefined) {
      this.#root = layer.root;
      if (this.#bottom && layer.hides) seal(this.#tree, layer.root);
      return;
    }
    this.#inherit(this.#root, layer.made);
    this.#mergeDirectory(this.#root, layer.root, this.#bottom);
  }

  /**
   * Directories without an entry take the attributes of what lies below at their path. containerd follows symlinks in
   * its lower directories there, though the new directory then replaces the link.
   */
  #inherit(root: number, made: LayerTreeResult['made']): void {
    const tree = this.#tree;
    for (const { inode, path } of made) {
      if (tree.implicit[inode] === 0) continue;
      const below = resolveInside(tree, root, path);
      if (below === undefined || below.found < below.names.length || !tree.isDirectory(below.inode)) continue;
      tree.copyDirectoryAttributes(inode, below.inode);
    }
  }

  /** The row at `path` in the layers stacked so far, symlinks in its parents followed. */
  find(path: string): number | undefined {
    if (this.#root === undefined) return undefined;
    const parts = path.split('/');
    const last = parts.pop()!;
    const parent = resolveInside(this.#tree, this.#root, parts);
    if (parent === undefined || parent.found < parent.names.length) return undefined;
    return this.#tree.children[parent.inode]?.get(last);
  }

  /** Stacks directory `upper` on `lower`, in place. `sealed`: nothing below this segment can show through here. */
  #mergeDirectory(lower: number, upper: number, sealed: boolean): void {
    const tree = this.#tree;
    if (tree.implicit[upper] === 0) {
      tree.copyDirectoryAttributes(lower, upper);
      tree.implicit[lower] = 0;
    }
    if (tree.opaque[upper] === 1) {
      seal(tree, upper);
      tree.children[lower] = tree.childrenOf(upper);
      tree.opaque[lower] = sealed ? 0 : 1;
      return;
    }
    const closed = sealed || tree.opaque[lower] === 1;
    const into = tree.childrenOf(lower);
    for (const [name, child] of tree.childrenOf(upper)) {
      const below = into.get(name);
      if (tree.isWhiteout(child)) {
        if (closed) into.delete(name);
        else into.set(name, child);
      } else if (!tree.isDirectory(child)) {
        into.set(name, child);
      } else if (below !== undefined && tree.isDirectory(below)) {
        this.#mergeDirectory(below, child, closed);
      } else {
        this.#adopt(child, below, closed);
        into.set(name, child);
      }
    }
  }

  /** Prepares a directory that has no directory below it in this segment; `below` is what it replaces, if anything. */
  #adopt(directory: number, below: number | undefined, closed: boolean): void {
    const tree = this.#tree;
    if (closed || below !== undefined) {
      if (this.#hides) seal(tree, directory);
      tree.opaque[directory] = closed ? 0 : 1;
    }
  }
}

/** Gives directories that no layer of the segment describes the attributes that they have below it. */
function inheritFromBelow(
  tree: ImageTree,
  directory: number,
  path: string,
  lookUp: (path: string) => DirectoryAttributes | undefined,
): void {
  for (const [name, child] of tree.childrenOf(directory)) {
    if (!tree.isDirectory(child)) continue;
    const childPath = path === '' ? name : `${path}/${name}`;
    if (tree.implicit[child] === 1) {
      const attributes = lookUp(childPath);
      if (attributes !== undefined) tree.setDirectoryAttributes(child, attributes);
    }
    if (tree.opaque[child] === 0) inheritFromBelow(tree, child, childPath, lookUp);
  }
}

/**
 * Merges the entries of `layers`, given bottom to top, into one tree. `tree.layer` holds positions in `layers`.
 * Errors: IMAGE_INVALID for what containerd could not unpack either, and for a hard link to a file that no layer of
 * the segment has.
 */
export function mergeLayers(layers: readonly EntryTable[], options: MergeOptions): ImageTree {
  if (layers.length === 0) throw new DedupError('INTERNAL', 'an image segment has at least one layer');
  let rows = 1;
  for (const entries of layers) rows += entries.count + 64;
  const tree = new ImageTree(rows);
  const stack = new Stack(tree, options.bottom);
  layers.forEach((entries, layer) => {
    const lowest = options.bottom && layer === 0;
    stack.push(buildLayerTree(tree, entries, { layer, lowest, findBelow: (path) => stack.find(path) }));
  });
  tree.root = stack.root!;
  if (!options.bottom && options.attributesBelow !== undefined) {
    inheritFromBelow(tree, tree.root, '', options.attributesBelow);
  }
  return tree;
}
