#!/usr/bin/env bash
# Checks (or with --write rewrites) the format of the C++ sources.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v clang-format >/dev/null || { echo "lint: clang-format is missing: apt-get install clang-format" >&2; exit 1; }
mode=(--dry-run --Werror)
[ "${1:-}" = --write ] && mode=(-i)
# The style by name: test/ has C++ too, and clang-format looks for the file only above each source.
find native test -path native/build -prune -o \( -name '*.cc' -o -name '*.h' \) -print0 |
  xargs -0 clang-format --style=file:native/.clang-format "${mode[@]}"
