// The wall clock finer than Date.now(): containerd compares times of snapshots that are microseconds apart.

/** The wall clock is slewed by up to 500 ppm (adjtimex(2)): by a quarter of a millisecond in this time. */
const TRUSTED_MS = 500;

/** What the fine clock must be moved by, and when that was found, by performance.now(). */
let offsetMs = 0;
let foundMs = Number.NEGATIVE_INFINITY;

/** Waits for the next millisecond of the wall clock, one at most: at its beginning both clocks are known. */
function compare(): void {
  const begun = Date.now();
  let now = begun;
  while (now === begun) now = Date.now();
  foundMs = performance.now();
  offsetMs = now - (performance.timeOrigin + foundMs);
}

/** Milliseconds since the epoch, with a fraction of microseconds. Never outside of what Date.now() says. */
export function wallClockMs(): number {
  if (performance.now() - foundMs > TRUSTED_MS) compare();
  const earliest = Date.now();
  const fine = performance.timeOrigin + performance.now() + offsetMs;
  const latest = Date.now() + 1;
  if (fine >= earliest && fine <= latest) return fine;
  // It was set, or runs on differently.
  foundMs = Number.NEGATIVE_INFINITY;
  return fine < earliest ? earliest : latest - 1;
}
