// How an error of a verb reaches a person.
import { DedupError } from '../errors.ts';

/** Prints what failed, what to do, and the code of docs/errors.md. */
export function printError(program: string, error: unknown): void {
  if (error instanceof DedupError) {
    process.stderr.write(`${program}: ${error.message} [${error.code}]\n`);
    if (error.hint !== undefined) process.stderr.write(`  ${error.hint}\n`);
    return;
  }
  process.stderr.write(`${program}: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`);
}
