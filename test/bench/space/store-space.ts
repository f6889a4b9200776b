// What a node's root takes on the disk, part by part, and what index.db says of it: read with du and SQL, as an operator
// would.
import { existsSync } from 'node:fs';
import Database from 'better-sqlite3';
import { diskBytes } from '../../../src/bench/start.ts';
import { RootPaths } from '../../../src/paths.ts';
import { BLOCK_BYTES } from '../../../src/units.ts';

/** Disk space in bytes. */
export interface StoreSpace {
  /** All of chunks/, as `du` says. */
  readonly chunks: number;
  /** Of it: the chunks themselves, the sums of their blocks, and what is kept back for a full disk. */
  readonly store: number;
  readonly sums: number;
  readonly reserve: number;
  /** images/: metadata of mounted images, layer indexes and restart points. */
  readonly images: number;
  readonly indexDb: number;
  /** snapshots/: layers that are not in the store. */
  readonly snapshots: number;
}

export async function storeSpace(root: string): Promise<StoreSpace> {
  const paths = new RootPaths(root);
  const of = async (...files: readonly string[]): Promise<number> =>
    await diskBytes(files.filter((file) => existsSync(file)));
  const withLog = (file: string): string[] => [file, `${file}-wal`, `${file}-shm`];
  return {
    chunks: await of(paths.chunks),
    store: await of(paths.store),
    sums: await of(paths.storeSums),
    reserve: await of(paths.storeReserve),
    images: await of(paths.images),
    indexDb: await of(...withLog(paths.indexDb), ...withLog(paths.metadataDb)),
    snapshots: await of(paths.snapshots),
  };
}

export interface StoreTotals {
  /** The guide's statistic: chunks that more than one layer uses. */
  readonly sharedChunks: number;
  readonly sharedBytes: number;
  readonly chunks: number;
  readonly bytes: number;
  /** Of chunks, each rounded up to whole blocks. */
  readonly blockBytes: number;
  /** The same of what is recorded to be on the disk. */
  readonly durableBlockBytes: number;
  /** What `bytes` would be if each layer had its own chunks. */
  readonly referencedBytes: number;
}

const TOTALS = `
SELECT COUNT(*) AS chunks, IFNULL(SUM(size), 0) AS bytes, IFNULL(SUM(size * ref_count), 0) AS referencedBytes,
  IFNULL(SUM((size + ${BLOCK_BYTES - 1}) / ${BLOCK_BYTES} * ${BLOCK_BYTES}), 0) AS blockBytes
FROM chunks`;

interface PartlyDurable {
  readonly size: number;
  readonly pieceBytes: number;
  readonly durable: number;
}

/** docs/formats/index-db.md, `chunks.durable`. */
function durableBlockBytes({ size, pieceBytes, durable }: PartlyDurable): number {
  let bytes = 0;
  for (let piece = 0; piece * pieceBytes < size; piece++) {
    if (durable !== -1 && (durable & (1 << piece)) === 0) continue;
    const length = Math.min(pieceBytes, size - piece * pieceBytes);
    bytes += Math.ceil(length / BLOCK_BYTES) * BLOCK_BYTES;
  }
  return bytes;
}

export function storeTotals(root: string): StoreTotals {
  const db = new Database(new RootPaths(root).indexDb, { readonly: true });
  try {
    const [sharedChunks, sharedBytes] = db
      .prepare<[], [number, number | null]>('SELECT COUNT(*), SUM(size) FROM chunks WHERE ref_count > 1;')
      .raw()
      .get()!;
    const all = db.prepare<[], Omit<StoreTotals, 'sharedChunks' | 'sharedBytes' | 'durableBlockBytes'>>(TOTALS).get()!;
    const rows = db.prepare<[], PartlyDurable>('SELECT size, piece_bytes AS pieceBytes, durable FROM chunks').all();
    return {
      sharedChunks,
      sharedBytes: sharedBytes ?? 0,
      ...all,
      durableBlockBytes: rows.reduce((sum, row) => sum + durableBlockBytes(row), 0),
    };
  } finally {
    db.close();
  }
}
