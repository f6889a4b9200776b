// Layers that wait for room on the disk: when each is looked at again, and how much room it must find then. A layer that
// waits is not read; one that was stopped in the middle asks for more room, later. Used by converter.ts; converts nothing.

interface Wait {
  readonly reason: string;
  /** How often it was stopped in the middle. */
  readonly stops: number;
  /** How often there was no room to begin since then. */
  readonly looks: number;
  /** Not before, by performance.now(). */
  readonly notBeforeMs: number;
}

/** Between two looks, which cost next to nothing, milliseconds. */
const LONGEST_LOOK_MS = 60_000;
/** To the next reading of a layer that was stopped in the middle, in first pauses, and at most, milliseconds. */
const STOPPED_PAUSES = 60;
const LONGEST_STOP_MS = 3_600_000;
/** Files that a file system keeps in their inodes take a block each in the store: no directory takes more than this. */
const MOST_ROOM = 8;

export class RoomWaits {
  readonly #firstPauseMs: number;
  readonly #waits = new Map<number, Wait>();

  constructor(firstPauseMs: number) {
    this.#firstPauseMs = firstPauseMs;
  }

  /** Room that a layer of so many bytes must find before it is begun. */
  needed(id: number, bytes: number): number {
    return bytes * Math.min(MOST_ROOM, 2 ** (this.#waits.get(id)?.stops ?? 0));
  }

  /** `begun`: it was stopped in the middle. True when it had not waited before. */
  add(id: number, reason: string, begun: boolean): boolean {
    const before = this.#waits.get(id);
    const stops = (before?.stops ?? 0) + (begun ? 1 : 0);
    const looks = begun ? 0 : (before?.looks ?? 0) + 1;
    const pauseMs = begun
      ? Math.min(LONGEST_STOP_MS, this.#firstPauseMs * STOPPED_PAUSES * 2 ** (stops - 1))
      : Math.min(LONGEST_LOOK_MS, this.#firstPauseMs * 2 ** (looks - 1));
    this.#waits.set(id, { reason, stops, looks, notBeforeMs: performance.now() + pauseMs });
    return before === undefined;
  }

  /** Not before, by performance.now(); undefined when it does not wait. */
  notBeforeMs(id: number): number | undefined {
    return this.#waits.get(id)?.notBeforeMs;
  }

  /** Why the oldest that waits does; "" when none does. */
  get reason(): string {
    const oldest = Math.min(...this.#waits.keys());
    return this.#waits.get(oldest)?.reason ?? '';
  }

  /** Those that only look are let look at once; true when there are any. */
  lookAgain(): boolean {
    let any = false;
    for (const [id, wait] of this.#waits) {
      if (wait.looks === 0) continue;
      this.#waits.set(id, { ...wait, notBeforeMs: 0 });
      any = true;
    }
    return any;
  }

  forget(id: number): void {
    this.#waits.delete(id);
  }

  clear(): void {
    this.#waits.clear();
  }
}
