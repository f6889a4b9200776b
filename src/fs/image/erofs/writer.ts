// Lays a merged tree out as an EROFS image and writes its metadata to a file. Called by the image builder in its own
// process. File content is never touched: inodes point at addresses of the node store. docs/formats/erofs-image.md.
import { createHash } from 'node:crypto';
import { writeSync } from 'node:fs';
import { DedupError } from '../../../errors.ts';
import { BLOCK_BYTES, roundUp } from '../../../units.ts';
import type { ChunkTable } from '../../index/layer-index.ts';
import { EntryType } from '../../index/layer-index.ts';
import type { ImageTree, InodeKind, XattrSet } from '../tree.ts';
import { directoryBytes, direntType, namesInBlock, sortedNames, writeDirectoryBlock } from './dirent.ts';
import type { DataLayoutValue } from './inode.ts';
import {
  CHUNK_INDEX_BYTES,
  chunkFormat,
  DataLayout,
  encodeDevice,
  INODE_BYTES,
  modeType,
  writeChunkIndex,
  writeInode,
} from './inode.ts';
import { SequentialFile } from './sequential-file.ts';
import { encodeSuperblock, headBytes, NID_BYTES, NULL_BLOCK, SUPERBLOCK_OFFSET } from './superblock.ts';
import { writeXattrArea, XATTR_HEADER_BYTES, xattrAreaBytes } from './xattr.ts';

/** Where the chunks of one layer are. */
export interface LayerContent {
  readonly chunkBytes: number;
  readonly chunks: Pick<ChunkTable, 'count' | 'length' | 'zero'>;
  /** Store address of each chunk in bytes, 4 KiB aligned. Zero chunks need one in the flat layout only. */
  readonly addresses: Float64Array;
}

/**
 * `device`: files are chunk-based on an extra device of `deviceBlocks` blocks (Linux 5.16 and later). `flat`: metadata and
 * content on one device that starts at byte `baseAddress` of the store, every file one contiguous run (Linux 5.4 and later).
 */
export type ImageLayout =
  | { readonly kind: 'device'; readonly deviceBlocks: number }
  | { readonly kind: 'flat'; readonly baseAddress: number };

export interface ImageSummary {
  /** Length of the metadata, a multiple of 4096. */
  readonly bytes: number;
  readonly inodes: number;
  /** Regular files, hard links counted once, and the sum of their sizes. */
  readonly files: number;
  readonly contentBytes: number;
  /** Names, without "." and "..". */
  readonly entries: number;
}

const OPAQUE: XattrSet = [{ name: 'trusted.overlay.opaque', value: Buffer.from('y') }];

/** The last 16 bits' worth of inode numbers that the root may have. */
const MAX_ROOT_NID = 65_535;

class ImagePlan {
  readonly tree: ImageTree;
  readonly contents: readonly LayerContent[];
  readonly layout: ImageLayout;
  /** Reachable rows in the order of their inodes on disk. */
  readonly order: Uint32Array;
  inodes = 0;
  entries = 0;
  files = 0;
  contentBytes = 0;
  /** By row: position of the inode / 32, links, layout, first block of data outside the inode (or in the region, before `place`). */
  readonly nid: Uint32Array;
  readonly links: Uint32Array;
  readonly dataLayout: Uint8Array;
  readonly firstBlock: Uint32Array;
  readonly xattrBytes: Uint32Array;
  /** By row of a directory: its names, and its parent's row. */
  readonly names: (string[] | undefined)[] = [];
  readonly parent: Uint32Array;
  /** End of the inodes, and number of blocks after them. */
  inodeEnd: number;
  dataBlocks = 0;

  constructor(tree: ImageTree, contents: readonly LayerContent[], layout: ImageLayout) {
    this.tree = tree;
    this.contents = contents;
    this.layout = layout;
    this.order = new Uint32Array(tree.count);
    this.nid = new Uint32Array(tree.count);
    this.links = new Uint32Array(tree.count);
    this.dataLayout = new Uint8Array(tree.count);
    this.firstBlock = new Uint32Array(tree.count);
    this.xattrBytes = new Uint32Array(tree.count);
    this.parent = new Uint32Array(tree.count);
    this.inodeEnd = headBytes(layout.kind === 'device');
    this.#visit();
  }

  get deviceLayout(): boolean {
    return this.layout.kind === 'device';
  }

  xattrsOf(inode: number): XattrSet | undefined {
    const own = this.tree.xattrs[inode];
    if (this.tree.opaque[inode] === 0) return own;
    return own === undefined ? OPAQUE : [...own, ...OPAQUE];
  }

  kindOf(inode: number): InodeKind {
    return this.tree.kind[inode] as InodeKind;
  }

  /** Length of what lies outside of the inode for a directory or symlink, or would if it were not inline. */
  sizeOf(inode: number): number {
    const kind = this.kindOf(inode);
    if (kind === EntryType.directory) return directoryBytes(this.names[inode]!);
    if (kind === EntryType.symlink) return this.tree.link[inode]!.length;
    return kind === EntryType.file ? this.tree.size[inode]! : 0;
  }

  /** Gives every reachable inode a place: a directory's children side by side, then each subdirectory's. */
  #visit(): void {
    const { tree } = this;
    const pending: number[] = [tree.root];
    this.parent[tree.root] = tree.root;
    this.links[tree.root] = 2;
    this.names[tree.root] = sortedNames(tree.childrenOf(tree.root).keys());
    this.#place(tree.root);
    while (pending.length > 0) {
      const directory = pending.pop()!;
      const children = tree.childrenOf(directory);
      const subdirectories: number[] = [];
      for (const name of this.names[directory]!) {
        if (name === '.' || name === '..') continue;
        const child = children.get(name)!;
        this.entries++;
        if (tree.isDirectory(child)) {
          this.parent[child] = directory;
          this.links[child] = 2;
          this.links[directory]!++;
          this.names[child] = sortedNames(tree.childrenOf(child).keys());
          subdirectories.push(child);
          this.#place(child);
        } else if (this.links[child]!++ === 0) {
          this.#place(child);
        }
      }
      for (let i = subdirectories.length - 1; i >= 0; i--) pending.push(subdirectories[i]!);
    }
  }

  #place(inode: number): void {
    const xattrBytes = xattrAreaBytes(this.xattrsOf(inode));
    this.xattrBytes[inode] = xattrBytes;
    const kind = this.kindOf(inode);
    let at = roundUp(this.inodeEnd, INODE_BYTES);
    let end = at + INODE_BYTES + xattrBytes;
    let layout: DataLayoutValue = DataLayout.flatPlain;
    const size = this.sizeOf(inode);
    if (kind === EntryType.directory || kind === EntryType.symlink) {
      if (size === 0) throw new DedupError('IMAGE_INVALID', 'a symbolic link without a target');
      const tail = size % BLOCK_BYTES;
      // Inline data must lie in one block, and a symlink that is inline at all must be shorter than one.
      const canInline =
        tail > 0 && INODE_BYTES + xattrBytes + tail <= BLOCK_BYTES && (kind === EntryType.directory || size === tail);
      if (canInline) {
        layout = DataLayout.flatInline;
        if (Math.floor(end / BLOCK_BYTES) !== Math.floor((end + tail - 1) / BLOCK_BYTES)) {
          at = roundUp(at, BLOCK_BYTES);
          end = at + INODE_BYTES + xattrBytes;
        }
        end += tail;
      }
      const blocks = canInline ? (size - tail) / BLOCK_BYTES : Math.ceil(size / BLOCK_BYTES);
      this.firstBlock[inode] = this.dataBlocks;
      this.dataBlocks += blocks;
    } else if (kind === EntryType.file) {
      this.files++;
      this.contentBytes += size;
      this.#checkContent(inode, size);
      if (size > 0 && this.deviceLayout) {
        layout = DataLayout.chunkBased;
        end = roundUp(end, CHUNK_INDEX_BYTES) + this.tree.chunkCount[inode]! * CHUNK_INDEX_BYTES;
      }
    }
    this.dataLayout[inode] = layout;
    this.nid[inode] = at / NID_BYTES;
    this.inodeEnd = end;
    this.order[this.inodes++] = inode;
  }

  #checkContent(inode: number, size: number): void {
    const { layer, firstChunk, chunkCount } = this.tree;
    const content = this.contents[layer[inode]!];
    if (content === undefined) throw new DedupError('INTERNAL', `no content table for layer ${layer[inode]}`);
    const count = chunkCount[inode]!;
    const { chunkBytes } = content;
    if (firstChunk[inode]! + count > content.chunks.count || count !== Math.ceil(size / chunkBytes)) {
      throw new DedupError('IMAGE_INVALID', `a file of ${size} bytes does not have ${count} chunks of ${chunkBytes}`);
    }
    for (let i = 0; i < count; i++) {
      const expected = Math.min(chunkBytes, size - i * chunkBytes);
      if (content.chunks.length[firstChunk[inode]! + i] !== expected) {
        throw new DedupError('IMAGE_INVALID', `chunk ${i} of a file of ${size} bytes is not ${expected} bytes long`);
      }
    }
  }
}

/** Address of chunk `chunk` in blocks from `baseAddress`. Errors: IMAGE_INVALID when it does not fit. */
function blockOf(content: LayerContent, chunk: number, baseAddress: number, limitBlocks: number): number {
  const address = content.addresses[chunk];
  const block = address === undefined ? Number.NaN : (address - baseAddress) / BLOCK_BYTES;
  const blocks = Math.ceil(content.chunks.length[chunk]! / BLOCK_BYTES);
  if (!Number.isInteger(block) || block <= 0 || block + blocks > limitBlocks) {
    throw new DedupError('IMAGE_INVALID', `a chunk at store address ${address} cannot be part of this image`);
  }
  return block;
}

/** First block of a file whose chunks follow each other without a gap. Errors: IMAGE_INVALID where they do not. */
function contiguousBlock(plan: ImagePlan, inode: number, baseAddress: number, firstFree: number): number {
  const content = plan.contents[plan.tree.layer[inode]!]!;
  const first = plan.tree.firstChunk[inode]!;
  const start = blockOf(content, first, baseAddress, NULL_BLOCK);
  for (let i = 1; i < plan.tree.chunkCount[inode]!; i++) {
    const block = blockOf(content, first + i, baseAddress, NULL_BLOCK);
    if (block !== start + (i * content.chunkBytes) / BLOCK_BYTES) {
      throw new DedupError('IMAGE_INVALID', 'a file of the flat layout must lie in one contiguous run of the store');
    }
  }
  if (start < firstFree) throw new DedupError('IMAGE_INVALID', 'a file overlaps the metadata of its own image');
  return start;
}

function writeChunkIndexes(
  plan: ImagePlan,
  inode: number,
  out: SequentialFile,
  at: number,
  deviceBlocks: number,
): void {
  const content = plan.contents[plan.tree.layer[inode]!]!;
  const first = plan.tree.firstChunk[inode]!;
  const { view } = out;
  for (let i = 0; i < plan.tree.chunkCount[inode]!; i++) {
    const chunk = first + i;
    const hole = content.chunks.zero[chunk] === 1;
    writeChunkIndex(view, at + i * CHUNK_INDEX_BYTES, hole ? undefined : blockOf(content, chunk, 0, deviceBlocks));
  }
}

/** Writes the content of a directory: whole blocks to `blocks`, an inline tail at `tailAt` of `inodes`. */
function writeDirectory(
  plan: ImagePlan,
  directory: number,
  blocks: SequentialFile,
  inodes: SequentialFile,
  tailAt: number,
): void {
  const names = plan.names[directory]!;
  const children = plan.tree.childrenOf(directory);
  const entryOf = (name: string): { nid: number; type: number } => {
    const inode = name === '.' ? directory : name === '..' ? plan.parent[directory]! : children.get(name)!;
    return { nid: plan.nid[inode]!, type: direntType(plan.kindOf(inode)) };
  };
  const inline = plan.dataLayout[directory] === DataLayout.flatInline;
  for (let first = 0; first < names.length; ) {
    const count = namesInBlock(names, first);
    if (inline && first + count === names.length) {
      writeDirectoryBlock(inodes.bytes, inodes.view, tailAt, names, first, count, entryOf);
    } else {
      const at = blocks.take(BLOCK_BYTES);
      writeDirectoryBlock(blocks.bytes, blocks.view, at, names, first, count, entryOf);
    }
    first += count;
  }
}

/**
 * Writes the metadata of `tree` to `fd`, from offset 0. `contents[i]` belongs to layer i of the tree. The same input
 * gives the same bytes. Errors: IMAGE_INVALID for what EROFS cannot express.
 */
export function writeImage(
  fd: number,
  tree: ImageTree,
  contents: readonly LayerContent[],
  layout: ImageLayout,
): ImageSummary {
  for (const { chunkBytes } of contents) {
    if (!Number.isInteger(Math.log2(chunkBytes)) || chunkBytes < BLOCK_BYTES) {
      throw new DedupError('IMAGE_INVALID', `EROFS cannot express chunks of ${chunkBytes} bytes`);
    }
  }
  const plan = new ImagePlan(tree, contents, layout);
  // fsck.erofs reads the place of an attribute header behind an inode that has none, which must not be the file's end.
  const dataStart = roundUp(plan.inodeEnd + XATTR_HEADER_BYTES, BLOCK_BYTES);
  const totalBlocks = dataStart / BLOCK_BYTES + plan.dataBlocks;
  const rootNid = plan.nid[tree.root]!;
  if (rootNid > MAX_ROOT_NID) throw new DedupError('INTERNAL', `root inode number ${rootNid} has more than 16 bits`);
  const deviceBlocks = layout.kind === 'device' ? layout.deviceBlocks : undefined;
  const head = headBytes(plan.deviceLayout);
  const inodes = new SequentialFile(fd, head);
  const blocks = new SequentialFile(fd, dataStart);

  for (let i = 0; i < plan.inodes; i++) {
    const inode = plan.order[i]!;
    const kind = plan.kindOf(inode);
    const size = plan.sizeOf(inode);
    const xattrBytes = plan.xattrBytes[inode]!;
    const dataLayout = plan.dataLayout[inode] as DataLayoutValue;
    const dataBlock = dataStart / BLOCK_BYTES + plan.firstBlock[inode]!;
    let union = 0;
    let after = 0;
    if (dataLayout === DataLayout.flatInline) {
      after = size % BLOCK_BYTES;
      union = size === after ? 0 : dataBlock;
    } else if (dataLayout === DataLayout.chunkBased) {
      after = plan.tree.chunkCount[inode]! * CHUNK_INDEX_BYTES;
      union = chunkFormat(contents[tree.layer[inode]!]!.chunkBytes);
    } else if (kind === EntryType.directory || kind === EntryType.symlink) {
      union = dataBlock;
    } else if (kind === EntryType.file && size > 0 && layout.kind === 'flat') {
      union = contiguousBlock(plan, inode, layout.baseAddress, totalBlocks);
    } else if (kind === EntryType.charDevice || kind === EntryType.blockDevice) {
      union = encodeDevice(tree.devMajor[inode]!, tree.devMinor[inode]!);
    }
    inodes.padTo(plan.nid[inode]! * NID_BYTES);
    const gap = dataLayout === DataLayout.chunkBased ? roundUp(xattrBytes, CHUNK_INDEX_BYTES) - xattrBytes : 0;
    const at = inodes.take(INODE_BYTES + xattrBytes + gap + after);
    const { view } = inodes;
    writeInode(view, at, {
      layout: dataLayout,
      xattrBytes,
      mode: modeType(kind) | tree.mode[inode]!,
      size,
      union,
      inodeNumber: i + 1,
      uid: tree.uid[inode]!,
      gid: tree.gid[inode]!,
      mtimeSec: tree.mtimeSec[inode]!,
      mtimeNsec: tree.mtimeNsec[inode]!,
      links: plan.links[inode]!,
    });
    if (xattrBytes > 0) writeXattrArea(inodes.bytes, view, at + INODE_BYTES, plan.xattrsOf(inode)!);
    const afterAt = at + INODE_BYTES + xattrBytes + gap;
    if (dataLayout === DataLayout.chunkBased) writeChunkIndexes(plan, inode, inodes, afterAt, deviceBlocks!);
    else if (kind === EntryType.directory) writeDirectory(plan, inode, blocks, inodes, afterAt);
    else if (kind === EntryType.symlink) {
      const target = tree.link[inode]!;
      if (dataLayout === DataLayout.flatInline) inodes.bytes.write(target, afterAt, 'latin1');
      else {
        const targetAt = blocks.take(roundUp(target.length, BLOCK_BYTES));
        blocks.bytes.write(target, targetAt, 'latin1');
      }
    }
  }
  inodes.padTo(dataStart);
  const uuid = createHash('sha256').update(inodes.digest()).update(blocks.digest()).digest().subarray(0, 16);
  // RFC 9562 version 8: bits of our own making.
  uuid[6] = (uuid[6]! & 0x0f) | 0x80;
  uuid[8] = (uuid[8]! & 0x3f) | 0x80;
  const superblock = encodeSuperblock({ rootNid, inodes: plan.inodes, blocks: totalBlocks, uuid, deviceBlocks });
  writeSync(fd, Buffer.concat([Buffer.alloc(SUPERBLOCK_OFFSET), superblock]), 0, head, 0);
  return {
    bytes: totalBlocks * BLOCK_BYTES,
    inodes: plan.inodes,
    files: plan.files,
    contentBytes: plan.contentBytes,
    entries: plan.entries,
  };
}
