// Makes the tables of a layer index from a description in JavaScript, and a sparse store file with the content of its
// files, so that the image builder can be tested without tar, registry or node store.
import { createHash } from 'node:crypto';
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';
import { digestOf } from '../../src/digest.ts';
import type { ChunkTable, EntryTable, LayerIndex } from '../../src/fs/index/layer-index.ts';
import { EntryType } from '../../src/fs/index/layer-index.ts';
import { BLOCK_BYTES, MiB, roundUp } from '../../src/units.ts';

const PIECE_BYTES = MiB;

const sha256 = (bytes: Uint8Array): Buffer => createHash('sha256').update(bytes).digest();
const zeroDigests = new Map<number, Buffer>();

function zeroDigest(length: number): Buffer {
  const known = zeroDigests.get(length) ?? sha256(Buffer.alloc(length));
  zeroDigests.set(length, known);
  return known;
}

export interface EntrySpec {
  /** Latin1 string: one character per byte. */
  readonly name: string;
  readonly type?: keyof typeof EntryType;
  readonly link?: string;
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  readonly mtime?: readonly [number, number];
  readonly dev?: readonly [number, number];
  readonly xattrs?: Readonly<Record<string, string | Buffer>>;
  /** Content of a file; or pieces of it at offsets, with `size`. */
  readonly content?: string | Buffer;
  readonly size?: number;
  readonly extents?: readonly { readonly offset: number; readonly data: Buffer }[];
}

export interface MadeLayer {
  readonly entries: EntryTable;
  readonly chunks: ChunkTable;
  readonly chunkBytes: number;
  readonly addresses: Float64Array;
}

/** A sparse file that plays the node store: gives addresses upwards and writes content padded with zeros. */
export class FakeStore {
  readonly path: string;
  readonly bytes: number;
  readonly #fd: number;
  #next: number;

  constructor(path: string, bytes = 8 * 1024 * MiB, first: number = MiB) {
    this.path = path;
    this.bytes = bytes;
    this.#next = first;
    this.#fd = openSync(path, 'w+');
    ftruncateSync(this.#fd, bytes);
  }

  assign(length: number): number {
    const address = this.#next;
    this.#next += roundUp(length, BLOCK_BYTES);
    return address;
  }

  write(address: number, data: Buffer): void {
    writeSync(this.#fd, data, 0, data.length, address);
  }

  close(): void {
    closeSync(this.#fd);
  }
}

function columns(count: number) {
  return {
    type: new Uint8Array(count),
    mode: new Uint16Array(count),
    uid: new Uint32Array(count),
    gid: new Uint32Array(count),
    mtimeSec: new Float64Array(count),
    mtimeNsec: new Uint32Array(count),
    size: new Float64Array(count),
    devMajor: new Uint32Array(count),
    devMinor: new Uint32Array(count),
    firstChunk: new Uint32Array(count),
    chunkCount: new Uint32Array(count),
    xattrSet: new Uint32Array(count).fill(0xffffffff),
  };
}

/** Tables of a layer with these members, in this order; content goes to `store`, contiguous per file. */
export function makeLayer(
  specs: readonly EntrySpec[],
  store: FakeStore,
  options: { chunkBytes?: number; zeroAddresses?: boolean; writeContent?: boolean } = {},
): MadeLayer {
  const chunkBytes = options.chunkBytes ?? 4 * MiB;
  const table = columns(specs.length);
  const xattrSets: { name: string; value: Buffer }[][] = [];
  const addresses: number[] = [];
  const lengths: number[] = [];
  const zeros: number[] = [];
  const tarOffsets: number[] = [];
  const pieceStart: number[] = [0];
  const pieces: Buffer[] = [];
  const names: Buffer[] = [];
  let tarAt = 0;
  specs.forEach((spec, i) => {
    const type =
      spec.type ??
      (spec.link !== undefined
        ? 'symlink'
        : spec.content !== undefined || spec.size !== undefined
          ? 'file'
          : 'directory');
    table.type[i] = EntryType[type];
    table.mode[i] = spec.mode ?? (type === 'directory' ? 0o755 : 0o644);
    table.uid[i] = spec.uid ?? 0;
    table.gid[i] = spec.gid ?? 0;
    table.mtimeSec[i] = spec.mtime?.[0] ?? 1_600_000_000;
    table.mtimeNsec[i] = spec.mtime?.[1] ?? 0;
    table.devMajor[i] = spec.dev?.[0] ?? 0;
    table.devMinor[i] = spec.dev?.[1] ?? 0;
    if (spec.xattrs !== undefined) {
      table.xattrSet[i] = xattrSets.length;
      xattrSets.push(
        Object.entries(spec.xattrs)
          .sort(([a], [b]) => (a < b ? -1 : 1))
          .map(([name, value]) => ({ name, value: Buffer.from(value) })),
      );
    }
    if (type !== 'file') return;
    const content = spec.content === undefined ? undefined : Buffer.from(spec.content);
    const extents = spec.extents ?? (content === undefined ? [] : [{ offset: 0, data: content }]);
    const size = spec.size ?? content!.length;
    table.size[i] = size;
    table.firstChunk[i] = lengths.length;
    table.chunkCount[i] = Math.ceil(size / chunkBytes);
    tarAt += 512;
    for (let offset = 0; offset < size; offset += chunkBytes) {
      const length = Math.min(chunkBytes, size - offset);
      const inside = extents.filter((e) => e.offset < offset + length && e.offset + e.data.length > offset);
      const zero = inside.length === 0;
      const address = zero && options.zeroAddresses !== true ? -1 : store.assign(length);
      const whole = zero ? undefined : Buffer.alloc(length);
      for (const extent of inside) {
        const from = Math.max(offset, extent.offset);
        const to = Math.min(offset + length, extent.offset + extent.data.length);
        const part = extent.data.subarray(from - extent.offset, to - extent.offset);
        whole?.set(part, from - offset);
        if (options.writeContent !== false) store.write(address + from - offset, part);
      }
      const own: Buffer[] = [];
      for (let at = 0; at < length; at += PIECE_BYTES) {
        const bytes = Math.min(PIECE_BYTES, length - at);
        own.push(whole === undefined ? zeroDigest(bytes) : sha256(whole.subarray(at, at + bytes)));
      }
      names.push(own.length === 1 ? own[0]! : sha256(Buffer.concat(own)));
      pieces.push(...own);
      pieceStart.push(pieces.length);
      tarOffsets.push(tarAt + offset);
      lengths.push(length);
      addresses.push(address);
      zeros.push(zero ? 1 : 0);
    }
    tarAt += roundUp(size, 512);
  });
  const count = lengths.length;
  const entries: EntryTable = {
    count: specs.length,
    ...table,
    name: specs.map((spec) => spec.name),
    link: specs.map((spec) => spec.link ?? ''),
    xattrSets,
  };
  const chunks: ChunkTable = {
    count,
    digest: new Uint8Array(Buffer.concat(names)),
    length: Uint32Array.from(lengths),
    tarOffset: Float64Array.from(tarOffsets),
    pieceStart: Uint32Array.from(pieceStart),
    pieceDigest: new Uint8Array(Buffer.concat(pieces)),
    fragmentStart: new Uint32Array(count + 1),
    fragmentChunkOffset: new Uint32Array(0),
    fragmentTarOffset: new Float64Array(0),
    fragmentLength: new Uint32Array(0),
    zero: Uint8Array.from(zeros),
  };
  return { entries, chunks, chunkBytes, addresses: Float64Array.from(addresses) };
}

/** A whole layer index around a made layer, with invented identity and framing. */
export function layerIndexOf(layer: MadeLayer): LayerIndex {
  const digest = digestOf('a layer that was never a tar');
  let tarBytes = 1024;
  for (let i = 0; i < layer.chunks.count; i++) {
    tarBytes = Math.max(tarBytes, layer.chunks.tarOffset[i]! + roundUp(layer.chunks.length[i]!, 512));
  }
  const starts = Float64Array.from({ length: Math.ceil(tarBytes / MiB) }, (_, i) => i * MiB);
  return {
    layerDigest: digest,
    layerBytes: tarBytes,
    diffId: digest,
    tarBytes: tarBytes,
    compression: 'none',
    spanBytes: MiB,
    chunkBytes: layer.chunkBytes,
    pieceBytes: PIECE_BYTES,
    restart: { digest, size: 0, framingLength: 0 },
    entries: layer.entries,
    chunks: layer.chunks,
    spans: {
      count: starts.length,
      outOffset: starts,
      inOffset: starts,
      bits: new Uint8Array(starts.length),
      memberStart: new Uint8Array(starts.length),
      windowOffset: new Float64Array(starts.length),
      windowLength: new Uint32Array(starts.length),
    },
  };
}
