// The ways an image comes into the store completely: read whole by `rpull`, read whole through a lazy mount, or unpacked by
// containerd and converted afterwards. Each returns when all of it is on the disk.
import { run, type TestContainerd, waitFor } from '../../support/containerd.ts';
import { openView } from '../../support/lazy-view.ts';
import type { Product } from '../../support/product.ts';
import { allConverted } from './conversions.ts';
import { storeTotals } from './store-space.ts';

export type How = 'lazy' | 'eager' | 'converted';
export const HOWS: readonly How[] = ['lazy', 'eager', 'converted'];

export interface Setup {
  readonly containerd: TestContainerd;
  readonly product: Product;
}

export interface ImageToBring {
  /** Unchanged, and with indexes: the latter is there for `lazy` only. */
  readonly plain: string;
  readonly lazy: string;
  /** Of the topmost layer. */
  readonly chainId: string;
}

const PULL_TIMEOUT_MS = 900_000;

export async function bringIn(setup: Setup, how: How, image: ImageToBring): Promise<void> {
  const { containerd, product } = setup;
  const rpull = ['rpull', '-a', containerd.address, '-n', containerd.namespace];
  switch (how) {
    case 'eager':
      await product.cli([...rpull, image.plain], { timeoutMs: PULL_TIMEOUT_MS });
      break;
    case 'lazy':
      await product.cli([...rpull, image.lazy], { timeoutMs: PULL_TIMEOUT_MS });
      await readEverything(setup, image.chainId);
      break;
    case 'converted':
      await containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'dedup', image.plain], {
        timeoutMs: PULL_TIMEOUT_MS,
      });
      await allConverted(product);
      break;
  }
  await recorded(product);
  await run('sync', [], { timeoutMs: 300_000 });
}

/** Reads every file of an image through its mount. What an upper layer hides of a lower one is not read. */
async function readEverything(setup: Setup, chainId: string): Promise<void> {
  const view = await openView(setup, 'dedup', chainId);
  try {
    // Into a pipe: GNU tar does not read files when its output is /dev/null itself.
    await run('sh', ['-c', `tar cf - -C ${view.path} . | cat > /dev/null`], { timeoutMs: PULL_TIMEOUT_MS });
  } finally {
    await view.close();
  }
}

/** Waits until index.db says of all that is present that it is on the disk. */
async function recorded(product: Product): Promise<void> {
  await waitFor(
    'all that is present to be recorded',
    async () => storeTotals(product.root).durableBlockBytes >= (await product.stats()).present_bytes,
    60_000,
  );
}
