// Runs a target once with all its data present and says which bytes it touched until it was ready (needed.ts).
import { readFile } from 'node:fs/promises';
import { DedupError } from '../errors.ts';
import type { BenchTarget, Contender } from './contenders.ts';
import { type Needed, neededBytes, readIndexes, touchedFiles, withoutReadahead } from './needed.ts';
import { type BenchNode, ctr, execute } from './node-commands.ts';
import { BenchContainer, dropCaches, forgetImage } from './start.ts';

export interface NeededSetup {
  readonly node: BenchNode;
  /** Ours. */
  readonly contender: Contender;
  readonly target: BenchTarget;
  /** Digests of the layers, bottom to top. */
  readonly layers: readonly string[];
  /** Where dedupd keeps the indexes of layers it knows. */
  readonly indexDirectory: string;
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
}

/** What the run found, with the size of the layers' tars. */
export interface NeededResult extends Needed {
  readonly uncompressedBytes: number;
}

/** Lower directories in what `ctr snapshots mounts` prints. */
export function lowerDirectories(mountCommand: string): string[] {
  return (/lowerdir=([^,\s]+)/.exec(mountCommand)?.[1] ?? '').split(':').filter((path) => path !== '');
}

const ATTEMPTS = 3;

/** How often anybody on this machine has dropped the page cache (proc(5), vmstat). */
async function cacheDrops(): Promise<number> {
  return Number(/^drop_pagecache (\d+)/m.exec(await readFile('/proc/vmstat', 'utf8'))?.[1] ?? 0);
}

/**
 * Errors: those of the commands; FAILED_PRECONDITION when a layer of the image is not loaded lazily; UNAVAILABLE when others
 * keep dropping caches, in which what was touched is looked up.
 */
export async function measureNeeded(setup: NeededSetup): Promise<NeededResult> {
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const found = await measureOnce(setup);
    if (found !== undefined) return found;
  }
  throw new DedupError('UNAVAILABLE', 'caches were dropped while it was looked up which pages a start has touched', {
    hint: 'run nothing beside a benchmark',
  });
}

/** Undefined when caches were dropped meanwhile. */
async function measureOnce(setup: NeededSetup): Promise<NeededResult | undefined> {
  const { node, contender, target, timeoutMs } = setup;
  const container = new BenchContainer(setup);
  try {
    await execute(contender.pullCommand(target), { timeoutMs });
    const indexes = await readIndexes(setup.indexDirectory);
    const layers = setup.layers.map((digest) => {
      const index = indexes.get(digest);
      if (index !== undefined) return index;
      throw new DedupError('FAILED_PRECONDITION', `layer ${digest} of ${target.lazy} is not loaded lazily`, {
        hint: `make indexes: dedup-snapshotter index ${target.plain} --annotate NEW-REFERENCE, and give --lazy-image`,
      });
    });
    await container.create();
    const snapshots = ['snapshots', '--snapshotter', contender.plugin];
    const lowers = lowerDirectories(await execute(ctr(node, ...snapshots, 'mounts', '/target', container.name)));
    // Into a pipe: GNU tar does not read files when its output is /dev/null itself.
    for (const lower of lowers) {
      await execute(['sh', '-c', 'tar cf - -C "$1" . | cat > /dev/null', 'sh', lower], { timeoutMs });
    }
    // Without readahead only what is asked for comes into the cache.
    const restore = await withoutReadahead(lowers);
    try {
      await dropCaches();
      const drops = await cacheDrops();
      await container.startAndWait();
      const files = (await Promise.all(lowers.map(touchedFiles))).flat();
      if ((await cacheDrops()) !== drops) return undefined;
      const uncompressedBytes = layers.reduce((sum, { tarBytes }) => sum + tarBytes, 0);
      return { ...neededBytes(layers, files), uncompressedBytes };
    } finally {
      await restore();
    }
  } finally {
    await container.remove();
    await forgetImage(node, contender.reference(target));
  }
}
