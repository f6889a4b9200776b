// What both ends of dedupd's control socket must agree on beside proto/dedupd.proto. Imports nothing.

/** Compared by Hello and PullImage; raised with every change that an older peer would misunderstand. */
export const DEDUPD_PROTOCOL = 2;

/** Metadata of a failed call: what to do about it, as UTF-8. */
export const HINT_METADATA = 'dedup-hint-bin';

/** Metadata of an answered Cleanup: why what nobody uses was not released, as UTF-8; absent when it was. */
export const NOT_RELEASED_METADATA = 'dedup-not-released-bin';
