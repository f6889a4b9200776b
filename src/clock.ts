// The wall clock finer than Date.now(): containerd compares times of snapshots that are microseconds apart.

/** What the fine clock must be moved by: it runs on when the wall clock is set. */
let offsetMs = 0;

/** Milliseconds since the epoch, with a fraction of microseconds. Never outside of what Date.now() says. */
export function wallClockMs(): number {
  const earliest = Date.now();
  const fine = performance.timeOrigin + performance.now() + offsetMs;
  const latest = Date.now() + 1;
  if (fine >= earliest && fine <= latest) return fine;
  const right = fine < earliest ? earliest : latest - 1;
  offsetMs += right - fine;
  return right;
}
