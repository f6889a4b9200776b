// Merges consecutive lazy layers into one tree, as overlayfs would show their unpacked directories. Called by the image
// builder in its own process; pure computation, no I/O. The rules are listed in docs/formats/erofs-image.md.
import { DedupError } from '../../errors.ts';
import type { EntryTable } from '../index/layer-index.ts';
import type { LowerLayer } from './inherit.ts';
import { inheritedAttributes, lowerLayer } from './inherit.ts';
import type { LayerTreeResult } from './layer-tree.ts';
import { buildLayerTree, resolveInside } from './layer-tree.ts';
import { ImageTree } from './tree.ts';

export interface MergeOptions {
  /** True when nothing lies below these layers: whiteouts are resolved away instead of kept. */
  readonly bottom: boolean;
  /** The layers below this segment, top to bottom, for directories that no layer of it describes. */
  readonly below?: readonly LowerLayer[];
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
    this.#mergeDirectory(this.#root, layer.root, this.#bottom);
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
    // Those of a directory without an entry were taken from below when its layer was built.
    tree.copyDirectoryAttributes(lower, upper);
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
  /** Top to bottom. */
  const lowers: LowerLayer[] = [...(options.below ?? [])];
  layers.forEach((entries, layer) => {
    const lowest = options.bottom && layer === 0;
    const built = buildLayerTree(tree, entries, { layer, lowest, findBelow: (path) => stack.find(path) });
    for (const { inode, path } of built.made) {
      const attributes = tree.implicit[inode] === 1 ? inheritedAttributes(lowers, path) : undefined;
      if (attributes !== undefined) tree.setDirectoryAttributes(inode, attributes);
    }
    stack.push(built);
    lowers.unshift(lowerLayer(() => entries, lowest));
  });
  tree.root = stack.root!;
  return tree;
}
