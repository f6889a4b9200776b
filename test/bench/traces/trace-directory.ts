// The product's directory of access traces as benchmarks handle it: emptied, filled with a trace of an earlier run, and
// waited upon until a run has written its own. Touches files only; the product finds them as it finds its own.
import { readdir, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { BenchTarget, Contender } from '../../../src/bench/contenders.ts';
import { execute } from '../../../src/bench/node-commands.ts';
import { BenchContainer, dropCaches, forgetImage } from '../../../src/bench/start.ts';
import type { Digest } from '../../../src/digest.ts';
import { RootPaths } from '../../../src/paths.ts';
import { type AccessTrace, traceId } from '../../../src/prefetch/access-trace.ts';
import { TraceStore } from '../../../src/prefetch/trace-store.ts';
import { waitFor } from '../../support/containerd.ts';
import type { Product } from '../../support/product.ts';
import type { PushedImage, World } from '../world.ts';

/** A recording ends 30 s after its first read at the latest. */
const RECORDED_MS = 60_000;
/** What a run recorded is written when its image is unmounted; when it is unmounted, within this time. */
const WRITTEN_MS = 5000;
const UNMOUNTED_MS = 60_000;
/** A file that is being written when the image has just gone. */
const SETTLED_MS = 500;
const LOOK_MS = 50;
const PULL_TIMEOUT_MS = 600_000;

const hostAndPath = (reference: string): string => reference.replace(/:[^:/]+$/, '');

export class TraceDirectory {
  readonly #product: Product;
  readonly #store: TraceStore;

  constructor(product: Product) {
    this.#product = product;
    this.#store = new TraceStore(new RootPaths(product.root).traces);
  }

  /** Leaves these traces and no other. What was recording has written its trace before: dedupd writes when it unmounts. */
  async set(traces: readonly AccessTrace[]): Promise<void> {
    await this.#unmounted();
    await this.clear();
    for (const trace of traces) await this.#store.save(trace);
  }

  /** Leaves none, whatever still records. */
  async clear(): Promise<void> {
    await sleep(SETTLED_MS);
    const directory = this.#store.directory;
    for (const name of await readdir(directory).catch(() => [])) await rm(join(directory, name), { force: true });
  }

  /** What tells a file from one written later under the same name; undefined where there is none. */
  async mark(layers: readonly string[]): Promise<string | undefined> {
    const ending = `-${traceId(layers as Digest[]).slice(0, 16)}.trace`;
    const names = await readdir(this.#store.directory).catch(() => []);
    const name = names.find((one) => one.endsWith(ending));
    if (name === undefined) return undefined;
    const found = await stat(join(this.#store.directory, name), { bigint: true }).catch(() => undefined);
    return found === undefined ? undefined : `${found.ino} ${found.mtimeNs}`;
  }

  /** Whether the trace of these layers was written since `before` was its mark, within this time. */
  async writtenSince(layers: readonly string[], before: string | undefined, timeoutMs: number): Promise<boolean> {
    const untilMs = performance.now() + timeoutMs;
    for (;;) {
      const now = await this.mark(layers);
      if (now !== undefined && now !== before) return true;
      if (performance.now() > untilMs) return false;
      await sleep(LOOK_MS);
    }
  }

  /** The same after the image was removed: its recording has ended when this returns. */
  async endedSince(layers: readonly string[], before: string | undefined): Promise<boolean> {
    await this.#unmounted();
    return await this.writtenSince(layers, before, WRITTEN_MS);
  }

  async #unmounted(): Promise<void> {
    await waitFor(
      'dedupd to have no image mounted',
      async () => (await this.#product.client.listImages()).length === 0,
      UNMOUNTED_MS,
    );
  }

  /**
   * The trace of one cold start with no trace to go by. The container runs on until dedupd has written it, as on a node.
   * Errors: when none appears.
   */
  async record(world: World, contender: Contender, { target, layers }: PushedImage): Promise<AccessTrace> {
    const { node } = world;
    const container = new BenchContainer({ node, contender, target, timeoutMs: PULL_TIMEOUT_MS });
    await this.set([]);
    await dropCaches();
    try {
      await execute(contender.pullCommand(target), { timeoutMs: PULL_TIMEOUT_MS });
      await container.create();
      await container.startAndWait();
      if (!(await this.writtenSince(layers, undefined, RECORDED_MS))) {
        throw new Error(
          `no trace of ${target.lazy} in ${this.#store.directory} within ${RECORDED_MS / 1000} s of its container being ready: ` +
            'does this dedupd record what containers read (prefetch.enabled)?',
        );
      }
      const trace = await this.#store.load(traceId(layers as Digest[]));
      if (trace === undefined) throw new Error(`the trace of ${target.lazy} cannot be read`);
      return trace;
    } finally {
      await container.remove();
      await forgetImage(node, contender.reference(target));
    }
  }
}

/** The trace as that of an image in the target's repository: one of other layers is what dedupd takes for an earlier version. */
export function asOfRepository(trace: AccessTrace, target: BenchTarget): AccessTrace {
  return { ...trace, repository: hostAndPath(target.lazy), tag: '', manifest: '' };
}
