// Waiting for work that may be given up before it ends: one race for everybody. A leaf.

/**
 * What `work` resolves to; or, as soon as the signal is aborted, a rejection with `why()`. The work itself goes on, for
 * whoever else waits for it; how it ends is then nobody's business here.
 */
export async function orAborted<T>(work: Promise<T>, signal: AbortSignal, why: () => unknown): Promise<T> {
  const { promise, reject } = Promise.withResolvers<never>();
  const abort = (): void => reject(why());
  if (signal.aborted) abort();
  else signal.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([promise, work]);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}
