#!/usr/bin/env bash
# Checks (or with --write rewrites) the format of the C++ sources.
set -euo pipefail
cd "$(dirname "$0")/../native"
command -v clang-format >/dev/null || { echo "lint: clang-format is missing: apt-get install clang-format" >&2; exit 1; }
mode=(--dry-run --Werror)
[ "${1:-}" = --write ] && mode=(-i)
find . -path ./build -prune -o \( -name '*.cc' -o -name '*.h' \) -print0 | xargs -0 clang-format "${mode[@]}"
