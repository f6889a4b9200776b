// The user namespace that a snapshot is prepared for, as containerd's clients say it in labels, and what that asks of the
// snapshot's mounts. Called by the snapshotter when containerd was told that it remaps IDs (`remap_ids`); mounts nothing.
import { DedupError } from '../errors.ts';
import type { Labels } from './labels.ts';
import type { Segment } from './mounts.ts';

/** `container-id:host-id:size`, comma separated (containerd core/snapshots, since 1.7). */
export const LABEL_UID_MAPPING = 'containerd.io/snapshot/uidmapping';
export const LABEL_GID_MAPPING = 'containerd.io/snapshot/gidmapping';

export interface IdMapping {
  /** Options by which containerd's mount, from 2.0 on, maps the lower directories. */
  readonly options: readonly string[];
  /** Who is root in that namespace, seen from outside: owner of what is written to. */
  readonly owner: { readonly uid: number; readonly gid: number };
}

const RANGE = /^(\d+):(\d+):(\d+)$/;

/** The ID outside that stands for 0 inside. */
function rootOf(label: string, mapping: string): number {
  for (const range of mapping.split(',')) {
    const [, inside, outside, size] = RANGE.exec(range) ?? [];
    if (inside === undefined) throw new DedupError('INVALID_ARGUMENT', `label ${label}: ${range} is no ID mapping`);
    if (Number(inside) === 0 && Number(size) > 0) return Number(outside);
  }
  throw new DedupError('INVALID_ARGUMENT', `label ${label}: ${mapping} does not map ID 0`);
}

/** What the labels say of a user namespace; undefined when nothing. Errors: INVALID_ARGUMENT. */
export function idMapping(labels: Labels): IdMapping | undefined {
  const uids = labels[LABEL_UID_MAPPING];
  const gids = labels[LABEL_GID_MAPPING];
  if (uids === undefined && gids === undefined) return undefined;
  if (uids === undefined || gids === undefined) {
    throw new DedupError('INVALID_ARGUMENT', `labels ${LABEL_UID_MAPPING} and ${LABEL_GID_MAPPING} come together`);
  }
  const owner = { uid: rootOf(LABEL_UID_MAPPING, uids), gid: rootOf(LABEL_GID_MAPPING, gids) };
  return { options: [`uidmap=${uids}`, `gidmap=${gids}`], owner };
}

/**
 * Refuses lowers that containerd would not map as a whole. From 2.0.7, 2.1.5 and 2.2 on it maps the directory that is
 * common to all lowers, without what is mounted below it (core/mount, doPrepareIDMappedOverlay): of several lowers a lazy
 * one, which is a mount of its own, would be an empty directory. Errors: UNIMPLEMENTED.
 */
export function requireMappable(lowers: readonly Segment[]): void {
  if (lowers.length < 2 || lowers.every(({ kind }) => kind === 'normal')) return;
  throw new DedupError(
    'UNIMPLEMENTED',
    'an image of lazy and ordinary layers cannot be used in a user namespace without a copy of it',
    {
      hint: 'index all of its layers, or none; or set "remap_ids" to false and take remap-ids from containerd\'s list',
    },
  );
}
