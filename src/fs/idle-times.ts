// Looks for the end of bursts of reads: what is better done when nobody reads is done then. Owned by the DataPlane; IdleGate,
// which holds work back, looks at more than reads.

/** A burst of reads is over when none came for this long. */
const CHECK_MS = 1_000;

export class IdleTimes {
  readonly #timer: NodeJS.Timeout;
  /** Reads of bursts after which garbage was collected; what starting left behind counts as the first burst. */
  #collected = -1;
  #seen = 0;

  /**
   * `onIdle` is called each time that nobody has read for a moment, and garbage is collected once after every burst. Buffers of
   * fetched spans are outside the JavaScript heap, which alone is too small to make the engine look for them; a node has
   * better use for that memory.
   */
  constructor(counts: () => { readonly reads: number; readonly waiting: number }, onIdle: () => void) {
    this.#timer = setInterval(() => {
      const { reads, waiting } = counts();
      const idle = reads === this.#seen && waiting === 0;
      this.#seen = reads;
      if (!idle) return;
      onIdle();
      this.#collect(reads);
    }, CHECK_MS).unref();
  }

  #collect(reads: number): void {
    const { gc } = globalThis; // Only the launcher starts us with it.
    if (gc === undefined || reads === this.#collected) return;
    gc();
    this.#collected = reads;
  }

  /** Idempotent. */
  close(): void {
    clearInterval(this.#timer);
  }
}
