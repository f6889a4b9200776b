// What a snapshot is: its kinds, what may be asked of each, and the facts kept about it. Shared by the metastore and
// everything that reads from it; touches no database.
import { DedupError } from '../errors.ts';
import type { LayerKey } from './images.ts';
import type { Labels } from './labels.ts';
import type { Lower } from './mounts.ts';

export type SnapshotKind = 'active' | 'view' | 'committed';

/** What may be asked of a snapshot of each kind; everything may be removed that has no children. */
const MOVES: Readonly<Record<SnapshotKind, readonly ('commit' | 'mounts')[]>> = Object.freeze({
  active: ['commit', 'mounts'],
  view: ['mounts'],
  committed: [],
});

/** Errors: FAILED_PRECONDITION when a snapshot of this kind has no such move. */
export function requireMove(snapshot: { name: string; kind: SnapshotKind }, move: 'commit' | 'mounts'): void {
  if (MOVES[snapshot.kind].includes(move)) return;
  throw new DedupError(
    'FAILED_PRECONDITION',
    `snapshot ${JSON.stringify(snapshot.name)} is ${snapshot.kind} and has no ${move}`,
    { hint: move === 'commit' ? 'only active snapshots can be committed' : 'make a view of it' },
  );
}

/**
 * What has become of the conversion of an ordinary layer (docs/decisions/0020-ordinary-layers-converted.md): still to be
 * made, never to be tried again by itself, made.
 */
export type ConversionState = 'pending' | 'left' | 'done';

/**
 * The directory of a converted layer: stays until it is known that an image can be made of the layer, may still be in use,
 * is being deleted. Absent once it is gone.
 */
export type DirectoryState = 'unproven' | 'waits' | 'goes';

/** How a committed snapshot that is no remote one came about. */
export interface Origin {
  /** True when containerd's unpack of a layer committed it, and not somebody who may have it mounted still. */
  readonly unpacked: boolean;
  /** The kernel's boot id at the commit. */
  readonly boot: string;
}

export interface Usage {
  readonly bytes: number;
  readonly inodes: number;
}

/** One snapshot. `name` is the key while it is active or a view, the name once committed: one space of names. */
export interface SnapshotRecord {
  readonly id: number;
  readonly name: string;
  readonly kind: SnapshotKind;
  readonly parentId: number | undefined;
  /** "" without a parent. */
  readonly parent: string;
  readonly labels: Labels;
  /** Milliseconds since the epoch, with a fraction; of a committed one since its commit, as containerd's own have it. */
  readonly createdMs: number;
  readonly updatedMs: number;
  /** The frozen lower set, top to bottom, of an active snapshot or view. */
  readonly lowers: readonly Lower[];
  /** Set for a remote snapshot, and for a converted one: its content is a lazy layer. */
  readonly layer: LayerKey | undefined;
  /** What was answered to Usage, once it was asked for a committed snapshot. */
  readonly usage: Usage | undefined;
  /** Absent for all but committed snapshots that are, or were, ordinary layers; `conversion`, too. */
  readonly origin: Origin | undefined;
  readonly conversion: ConversionState | undefined;
  readonly directory: DirectoryState | undefined;
}

export interface NewSnapshot {
  readonly id: number;
  readonly name: string;
  readonly kind: SnapshotKind;
  readonly parent: string;
  readonly labels: Labels;
  readonly lowers: readonly Lower[];
  readonly layer?: LayerKey | undefined;
  /** These are given for a snapshot that is restored. */
  readonly origin?: Origin | undefined;
  readonly usage?: Usage | undefined;
  readonly conversion?: ConversionState | undefined;
  readonly directory?: DirectoryState | undefined;
}
