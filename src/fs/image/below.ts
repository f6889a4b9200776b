// The layers below a segment as the image builder can ask them: lazy ones by their indexes, unpacked ones on disk.
import type { BigIntStats } from 'node:fs';
import { lstatSync, readFileSync, readlinkSync } from 'node:fs';
import { decodeLayerIndex } from '../index/format.ts';
import { native } from '../native.ts';
import type { SegmentBelow } from './build-protocol.ts';
import type { Found, LowerLayer } from './inherit.ts';
import { lowerLayer } from './inherit.ts';
import { cleanComponents, usableXattrs } from './layer-tree.ts';
import type { XattrSet } from './tree.ts';

const MAX_LINKS = 255;

/** Every layer below, top to bottom, of `segments` given top to bottom down to the bottom of the chain. */
export function layersBelow(segments: readonly SegmentBelow[]): LowerLayer[] {
  return segments.flatMap((segment, position) => {
    if (segment.kind === 'directory') return [unpackedLayer(segment.path)];
    const lowestSegment = position === segments.length - 1;
    return segment.indexes
      .map((index, layer) =>
        lowerLayer(() => decodeLayerIndex(readFileSync(index)).entries, lowestSegment && layer === 0),
      )
      .reverse();
  });
}

/** In the order of names, which layers have too: the same content gives the same image. */
function sortedXattrs(path: Uint8Array): XattrSet {
  return native()
    .readXattrs(path)
    .sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** A layer unpacked at `root`. Symlinks are followed inside `root` only. */
function unpackedLayer(root: string): LowerLayer {
  const full = (names: readonly string[]): Buffer =>
    Buffer.concat([Buffer.from(root), Buffer.from(names.map((name) => `/${name}`).join(''), 'latin1')]);
  return (path): Found => {
    let names = path;
    let links = 0;
    for (let i = 0; i < names.length; ) {
      const here = full(names.slice(0, i + 1));
      let stats: BigIntStats;
      try {
        stats = lstatSync(here, { bigint: true });
      } catch (error) {
        const code = (error as NodeJS.ErrnoException).code;
        if (code === 'ENOENT') return { kind: 'absent' };
        if (code === 'ENOTDIR') return { kind: 'other' };
        throw error;
      }
      if (stats.isSymbolicLink()) {
        if (++links > MAX_LINKS) return { kind: 'other' };
        const target = readlinkSync(here, 'latin1');
        const before = target.startsWith('/') ? '' : names.slice(0, i).join('/');
        names = [...cleanComponents(`${before}/${target}`), ...names.slice(i + 1)];
        i = 0;
        continue;
      }
      if (!stats.isDirectory()) return { kind: 'other' };
      if (++i < names.length) continue;
      const attributes = {
        mode: Number(stats.mode & 0o7777n),
        uid: Number(stats.uid),
        gid: Number(stats.gid),
        mtimeSec: Number(stats.mtimeNs / 1_000_000_000n),
        mtimeNsec: Number(stats.mtimeNs % 1_000_000_000n),
        xattrs: usableXattrs(sortedXattrs(here)),
      };
      return { kind: 'directory', attributes };
    }
    return { kind: 'absent' };
  };
}
