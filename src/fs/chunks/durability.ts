// Turns verified presence into durable presence: groups fdatasync of the store and then records the pieces. Used by
// NodeStore. Never records a piece whose write began after the fdatasync that is to cover it.
import type { Logger } from '../../log.ts';
import type { DurablePieces } from './index-protocol.ts';

/** A range of blocks that became present, with what to record for it. */
export interface FreshPiece {
  /** First block of the chunk's placement. */
  readonly placementBlock: number;
  /** Bits of pieces that became present; -1 for the whole chunk; 0 when nothing can be recorded yet. */
  readonly mask: number;
  readonly firstBlock: number;
  readonly blocks: number;
}

export interface DurabilityTarget {
  /** fdatasync of the store. */
  sync(): Promise<void>;
  record(pieces: DurablePieces): Promise<void>;
  /** Makes blocks absent again. */
  forget(firstBlock: number, blocks: number): void;
}

export interface DurabilityLimits {
  /** A group is flushed when its oldest piece has waited this long. */
  readonly delayMs: number;
  /** A group is flushed when it holds this many bytes. */
  readonly maxBytes: number;
}

export class Durability {
  readonly #target: DurabilityTarget;
  readonly #limits: DurabilityLimits;
  readonly #log: Logger;
  /** Present, not yet covered by an fdatasync that began. */
  #fresh: FreshPiece[] = [];
  #freshBytes = 0;
  /** Covered by the fdatasync that is running. */
  #syncing: FreshPiece[] = [];
  #timer: NodeJS.Timeout | undefined;
  #running: Promise<void> | undefined;
  /** Counts failed fdatasyncs: a write that spans one cannot be trusted. */
  #failures = 0;

  constructor(target: DurabilityTarget, limits: DurabilityLimits, log: Logger) {
    this.#target = target;
    this.#limits = limits;
    this.#log = log;
  }

  /** To be compared before and after a write: when it changed, what was written must be made absent again. */
  get failures(): number {
    return this.#failures;
  }

  add(pieces: readonly FreshPiece[], bytes: number): void {
    for (const piece of pieces) this.#fresh.push(piece);
    this.#freshBytes += bytes;
    if (this.#freshBytes >= this.#limits.maxBytes) this.#start();
    else if (this.#fresh.length > 0) this.#timer ??= setTimeout(() => this.#start(), this.#limits.delayMs).unref();
  }

  /** Forgets pieces whose bytes are taken away: they must not be recorded any more. */
  forget(gone: (piece: FreshPiece) => boolean): void {
    const stays = (piece: FreshPiece): boolean => !gone(piece);
    this.#fresh = this.#fresh.filter(stays);
    this.#syncing = this.#syncing.filter(stays);
  }

  #start(): void {
    // A failure is logged and its pieces are absent again; whoever calls flush() learns of it there.
    this.flush().catch(() => undefined);
  }

  /**
   * Makes everything that is present now durable; `always` syncs even if no piece is new, for what else was written.
   * Errors: STORE_IO, STORE_FULL; then the pieces are absent again.
   */
  async flush(always = false): Promise<void> {
    while (this.#running !== undefined) await this.#running.catch(() => undefined);
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#fresh.length === 0 && !always) return;
    this.#running = this.#flushGroup();
    try {
      await this.#running;
    } finally {
      this.#running = undefined;
    }
  }

  async #flushGroup(): Promise<void> {
    this.#syncing = this.#fresh;
    this.#fresh = [];
    this.#freshBytes = 0;
    try {
      await this.#target.sync();
    } catch (error) {
      // Linux reports a lost write once; which one is unknown, so nothing since the last good flush is kept.
      this.#failures++;
      const lost = [...this.#syncing, ...this.#fresh];
      this.#syncing = [];
      this.#fresh = [];
      this.#freshBytes = 0;
      for (const piece of lost) this.#target.forget(piece.firstBlock, piece.blocks);
      this.#log.error(
        { err: error, pieces: lost.length },
        'the store could not be flushed; its newest pieces are fetched again',
      );
      throw error;
    }
    const group = this.#syncing;
    this.#syncing = [];
    const masks = new Map<number, number>();
    for (const piece of group) {
      if (piece.mask !== 0) masks.set(piece.placementBlock, (masks.get(piece.placementBlock) ?? 0) | piece.mask);
    }
    try {
      await this.#target.record({ blocks: Float64Array.from(masks.keys()), masks: Int32Array.from(masks.values()) });
    } catch (error) {
      // The pieces are present and right; after a restart they are fetched again.
      this.#log.warn({ err: error }, 'presence could not be recorded');
    }
  }
}
