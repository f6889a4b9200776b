// Measures one cold start of a container, phase by phase, from the outside: the same steps for containerd's overlayfs and
// for ours. Used by the demo and by benchmarks; never by tests, which do not look at times.
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { diskBytes } from '../../src/bench/start.ts';
import type { TestContainerd } from './containerd.ts';
import type { Product } from './product.ts';
import type { RegistryProcess } from './registry.ts';

export interface ColdStart {
  /** Milliseconds. */
  readonly pullMs: number;
  readonly createMs: number;
  /** From `task start` to the first byte of output. */
  readonly firstOutputMs: number;
  readonly totalMs: number;
  /** Answers of the registry and bytes of their bodies, up to the end of the container. */
  readonly requests: number;
  readonly wireBytes: number;
  /** What the snapshotter's directories grew by, bytes. */
  readonly diskBytes: number;
  readonly output: string;
}

export interface ColdStartSetup {
  readonly containerd: TestContainerd;
  readonly registry: RegistryProcess;
  readonly product: Product;
}

export type Way = 'overlayfs' | 'dedup';

export function dropCaches(): void {
  writeFileSync('/proc/sys/vm/drop_caches', '3');
}

function directoriesOf(setup: ColdStartSetup, way: Way): string[] {
  const content = `${setup.containerd.root}/io.containerd.content.v1.content`;
  return way === 'dedup'
    ? [setup.product.root, content]
    : [`${setup.containerd.root}/io.containerd.snapshotter.v1.overlayfs`, content];
}

let number = 0;

/**
 * Pulls `reference`, creates a container and runs `command` in it, with cold page caches. The container is removed, the
 * image stays. Errors: whatever the commands print.
 */
export async function coldStart(
  setup: ColdStartSetup,
  way: Way,
  reference: string,
  command: readonly string[],
): Promise<ColdStart> {
  const { containerd, registry, product } = setup;
  const directories = directoriesOf(setup, way);
  const diskBefore = await diskBytes(directories);
  const before = registry.traffic();
  dropCaches();
  const startedMs = performance.now();
  if (way === 'dedup') {
    await product.cli(['rpull', '-a', containerd.address, '-n', containerd.namespace, reference], {
      timeoutMs: 300_000,
    });
  } else {
    await containerd.ctr(['image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference], {
      timeoutMs: 300_000,
    });
  }
  const pulledMs = performance.now();
  const name = `cold-${process.pid}-${number++}`;
  await containerd.ctr(['container', 'create', '--snapshotter', way, '--', reference, name, ...command]);
  const createdMs = performance.now();
  const { firstMs, output } = await startTask(containerd, name);
  await containerd.ctr(['container', 'rm', name], { allowFailure: true });
  const after = registry.traffic();
  return {
    pullMs: pulledMs - startedMs,
    createMs: createdMs - pulledMs,
    firstOutputMs: firstMs - createdMs,
    totalMs: firstMs - startedMs,
    requests: after.requests - before.requests,
    wireBytes: after.bytes - before.bytes,
    diskBytes: (await diskBytes(directories)) - diskBefore,
    output,
  };
}

function startTask(containerd: TestContainerd, name: string): Promise<{ firstMs: number; output: string }> {
  return new Promise((resolve, reject) => {
    const args = ['--address', containerd.address, '--namespace', containerd.namespace, 'task', 'start', name];
    const child = spawn('ctr', args, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 120_000 });
    let firstMs = 0;
    let output = '';
    const take = (data: Buffer): void => {
      if (firstMs === 0) firstMs = performance.now();
      output += data.toString();
    };
    child.stdout.on('data', take);
    child.stderr.on('data', take);
    child.once('error', reject);
    child.once('close', (code) => {
      if (code === 0) resolve({ firstMs: firstMs || performance.now(), output });
      else reject(new Error(`${name} ended with ${code}: ${output}`));
    });
  });
}

/** Removes an image and everything it brought, and waits for containerd's collection. */
export async function forgetImage(containerd: TestContainerd, reference: string): Promise<void> {
  await containerd.ctr(['image', 'rm', '--sync', reference], { allowFailure: true });
}
