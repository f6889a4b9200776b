// The errors of blocks that were present when a read began and are not any more: punched, or changed by the disk.
import { DedupError, type ErrorCode } from '../../errors.ts';

/** Whoever asks again fetches them. */
export function takenAway(code: ErrorCode, message: string): DedupError {
  return new DedupError(code, message, { details: { again: true } });
}

export function isTakenAway(error: unknown): boolean {
  return error instanceof DedupError && error.details.again === true;
}
