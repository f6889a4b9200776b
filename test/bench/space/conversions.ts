// The conversion of ordinary layers in the background, as an operator sees and steers it: `dedup-snapshotter dedup …`.
import { setTimeout as sleep } from 'node:timers/promises';
import type { Product } from '../../support/product.ts';

/** proto/service.proto, ConversionStatus: what benchmarks look at. */
export interface Conversions {
  /** Why nothing is converted; empty when there is no reason. */
  readonly waiting: string;
  readonly pending: number;
  readonly done: number;
  readonly current: { readonly bytes: number } | null;
  readonly left: readonly { readonly name: string; readonly reason: string }[];
  readonly failed: readonly { readonly reason: string; readonly given_up: boolean }[];
  /** Directories of converted layers that are still there. */
  readonly directories: readonly unknown[];
}

/** Answers the status after the verb was carried out. */
export async function conversions(product: Product, verb: 'status' | 'pause' | 'resume'): Promise<Conversions> {
  const { stdout } = await product.cli(['dedup', verb, '--json']);
  return JSON.parse(stdout) as Conversions;
}

export function underWay({ pending, current }: Conversions): boolean {
  return pending > 0 || current !== null;
}

/** Each look is a process of its own, and not to be felt beside what is measured. */
const LOOK_MS = 1000;

/**
 * Waits until every ordinary layer is converted and its directory is gone. Errors: a layer that cannot be converted, and a
 * deadline that has passed.
 */
export async function allConverted(product: Product, timeoutMs = 900_000): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const status = await conversions(product, 'status');
    const failed = [...status.left, ...status.failed.filter(({ given_up }) => given_up)];
    if (failed.length > 0)
      throw new Error(`layers cannot be converted: ${failed.map(({ reason }) => reason).join('; ')}`);
    // Nobody is going to mend what it waits for.
    if (status.waiting !== '') throw new Error(`layers are not converted: ${status.waiting}`);
    if (!underWay(status) && status.directories.length === 0) return;
    if (performance.now() > deadline) throw new Error(`layers are still not converted: ${JSON.stringify(status)}`);
    await sleep(LOOK_MS);
  }
}
