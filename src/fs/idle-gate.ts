// Holds background work back while somebody waits for something: readers of images, pulls. Asked between two batches of
// the work; never stops it for good.
import { setTimeout as sleep } from 'node:timers/promises';

/** How often it is looked whether the node is still busy, milliseconds. */
const LOOK_MS = 100;
/** Nothing may have happened for this long, milliseconds: a start reads in bursts. */
const QUIET_MS = 2_000;
/** A node that is never quiet gets one batch done this often, milliseconds. */
const PATIENCE_MS = 10_000;

export class IdleGate {
  readonly #activity: () => number;
  readonly #busy: () => boolean;
  #asked = 0;
  #seen = -1;
  #changedMs = Number.NEGATIVE_INFINITY;

  /** `activity`: a count that grows with everything that is done for somebody; `busy`: somebody waits right now. */
  constructor(activity: () => number, busy: () => boolean) {
    this.#activity = activity;
    this.#busy = busy;
  }

  /** Tells of something that is done for somebody and that no count tells of. */
  asked(): void {
    this.#asked++;
  }

  /** Nothing when work may go on now, else a promise for when it may. Rejects with the signal's reason. */
  pass(signal: AbortSignal): Promise<void> | undefined {
    return this.#quiet() ? undefined : this.#wait(signal);
  }

  #quiet(): boolean {
    const now = performance.now();
    const activity = this.#activity() + this.#asked;
    if (activity !== this.#seen || this.#busy()) {
      // The first look finds what happened before anybody asked.
      if (this.#seen !== -1) this.#changedMs = now;
      this.#seen = activity;
    }
    return now - this.#changedMs >= QUIET_MS;
  }

  async #wait(signal: AbortSignal): Promise<void> {
    const until = performance.now() + PATIENCE_MS;
    while (performance.now() < until) {
      await sleep(LOOK_MS, undefined, { signal });
      if (this.#quiet()) return;
    }
  }
}
