// A limit of bytes a second for work that is no plan of the scheduler's. Used by warm-up; waits, fetches nothing.
import { setTimeout as sleep } from 'node:timers/promises';

export class Pace {
  readonly #bytesPerSecond: number | undefined;
  /** When what was taken so far has had its time, by performance.now(). */
  #freeMs = 0;

  /** `bytesPerSecond` undefined: no limit. */
  constructor(bytesPerSecond: number | undefined) {
    this.#bytesPerSecond = bytesPerSecond;
  }

  /** Resolves when so many bytes may be fetched; who comes later waits for those before. Rejects when `signal` is aborted. */
  async take(bytes: number, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#bytesPerSecond === undefined || bytes === 0) return;
    const now = performance.now();
    const waitMs = Math.max(0, this.#freeMs - now);
    this.#freeMs = Math.max(now, this.#freeMs) + (bytes / this.#bytesPerSecond) * 1000;
    if (waitMs > 0) await sleep(waitMs, undefined, { signal });
  }
}
