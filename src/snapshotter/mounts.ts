// Turns the layers below a snapshot into segments, and a frozen set of lower directories into the mounts containerd
// is told. Pure: called by the snapshotter with paths; touches no file but the overlay module's list of parameters.
import { existsSync } from 'node:fs';
import { release } from 'node:os';
import type { RootPaths } from '../paths.ts';
import type { IdMapping } from './id-mapping.ts';
import type { Below, LayerKey } from './images.ts';
import type { SnapshotKind, SnapshotRecord } from './snapshot-record.ts';

/** A mount as containerd's types.Mount. */
export interface Mount {
  readonly type: string;
  readonly source: string;
  readonly target: string;
  readonly options: readonly string[];
}

/** One lower directory: a normally unpacked layer, or the merged image of consecutive lazy layers. */
export type Lower =
  | { readonly kind: 'normal'; readonly id: number }
  | {
      readonly kind: 'lazy';
      /** Bottom to top. */
      readonly layers: readonly LayerKey[];
      readonly bottom: boolean;
      readonly mountId: number;
      readonly path: string;
    };

/** A lower that is not mounted yet. */
export type Segment =
  | { readonly kind: 'normal'; readonly id: number }
  | { readonly kind: 'lazy'; readonly layers: readonly LayerKey[]; readonly bottom: boolean };

/** Segments, top to bottom, of a chain of committed snapshots given top to bottom. Consecutive lazy layers are one. */
export function segments(chain: readonly SnapshotRecord[]): Segment[] {
  const result: Segment[] = [];
  let lazy: LayerKey[] = [];
  const flush = (bottom: boolean): void => {
    if (lazy.length > 0) result.push({ kind: 'lazy', layers: lazy.reverse(), bottom });
    lazy = [];
  };
  for (const snapshot of chain) {
    if (snapshot.layer !== undefined) {
      lazy.push(snapshot.layer);
    } else {
      flush(false);
      result.push({ kind: 'normal', id: snapshot.id });
    }
  }
  flush(true);
  return result;
}

/** What dedupd is told of the lowers below a merged image; both top to bottom. */
export function describeBelow(lowers: readonly Segment[], paths: RootPaths): Below[] {
  return lowers.map((lower) =>
    lower.kind === 'normal'
      ? { kind: 'directory', path: paths.snapshotFs(lower.id) }
      : { kind: 'layers', layers: lower.layers },
  );
}

const OVERLAY_OFF = ['index', 'metacopy', 'redirect_dir'] as const;
const OVERLAY_MODULE = '/sys/module/overlay';

/**
 * The features that are switched off for every overlay, as far as the kernel knows them: with them on, a lower
 * directory could not be shared or moved. Every kernel since 4.19 parses all three; before the module is loaded its
 * list of parameters does not exist and the kernel's version decides.
 */
export function overlayOptions(): string[] {
  const loaded = existsSync(`${OVERLAY_MODULE}/parameters`);
  const [major = 0, minor = 0] = release().split('.').map(Number);
  const modern = major > 4 || (major === 4 && minor >= 19);
  return OVERLAY_OFF.filter((name) => (loaded ? existsSync(`${OVERLAY_MODULE}/parameters/${name}`) : modern)).map(
    (name) => `${name}=off`,
  );
}

function bind(source: string, mode: 'ro' | 'rw', options: readonly string[]): Mount {
  return { type: 'bind', source, target: '', options: [...options, mode, 'rbind'] };
}

/**
 * The mounts of an active snapshot or view. `lowers` are top to bottom. A snapshot with nothing below is a bind of its
 * own directory, a view of one lower a read-only bind of that; everything else is an overlay. With a mapping they carry
 * its options, as those of containerd's overlayfs do.
 */
export function mountsOf(
  snapshot: {
    readonly id: number;
    readonly kind: Exclude<SnapshotKind, 'committed'>;
    readonly mapping: IdMapping | undefined;
  },
  lowers: readonly Lower[],
  paths: RootPaths,
  options: readonly string[],
): Mount[] {
  const mapped = snapshot.mapping?.options ?? [];
  const directories = lowers.map((lower) => (lower.kind === 'lazy' ? lower.path : paths.snapshotFs(lower.id)));
  const [first] = directories;
  if (first === undefined) return [bind(paths.snapshotFs(snapshot.id), snapshot.kind === 'view' ? 'ro' : 'rw', mapped)];
  if (snapshot.kind === 'view' && directories.length === 1) return [bind(first, 'ro', mapped)];
  // containerd maps the parent of a single lower: the dot makes that the root of the mount, not the directory around it.
  const alone = mapped.length > 0 && directories.length === 1 && lowers[0]?.kind === 'lazy';
  const lowerdir = `lowerdir=${alone ? `${first}/.` : directories.join(':')}`;
  const upper =
    snapshot.kind === 'view'
      ? []
      : [`workdir=${paths.snapshotWork(snapshot.id)}`, `upperdir=${paths.snapshotFs(snapshot.id)}`];
  return [{ type: 'overlay', source: 'overlay', target: '', options: [...options, ...mapped, ...upper, lowerdir] }];
}
