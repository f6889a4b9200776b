// `rpull`: has dedupd pull an image into containerd without the layers that can be loaded lazily. This file is the verb:
// options, signals and words for people. A pull takes a moment, so this loads nothing that it can do without.
import type { Command } from 'commander';
import { DedupError } from '../errors.ts';
import { RunPaths } from '../paths.ts';
import { formatBytes } from '../units.ts';
import { type PullEvent, type PullRequest, pullImage } from './pull-client.ts';
import { LineProgress, type Progress } from './pull-progress.ts';
import { runDirectory } from './run-directory.ts';
import { explainUnreached } from './unreached.ts';

interface RpullFlags {
  readonly user?: string;
  readonly platform?: string;
  readonly namespace: string;
  readonly address?: string;
  readonly snapshotter: string;
  readonly leaseSeconds?: string;
}

const EXAMPLES = `
Examples:
  dedup-snapshotter rpull registry.example.com/app:1-lazy
  ctr run --snapshotter dedup --rm -t registry.example.com/app:1-lazy app /bin/sh

  dedup-snapshotter rpull -u alice:secret 127.0.0.1:5000/team/app:1     a registry that asks who you are
  dedup-snapshotter rpull --platform linux/arm64 nginx                  docker.io/library/nginx:latest for another machine
  dedup-snapshotter rpull --namespace k8s.io registry.example.com/app:1 where Kubernetes looks for images

A layer without a lazy index is read whole, once, and its chunks are kept; one that cannot be indexed is unpacked the
ordinary way. "dedup-snapshotter index" makes indexes.
dedupd carries the pull out, so the service must run. A pull that is interrupted or killed leaves nothing behind.
`;

export function registerRpullCommand(program: Command): void {
  program
    .command('rpull')
    .description('pull an image into containerd without the layer data that can be loaded on demand')
    .argument('<reference>', 'image to pull, e.g. nginx:1.27 or registry.example.com/team/app:1')
    .option(
      '-u, --user <user:password>',
      'credentials for the registry (default: those of Docker or the configuration)',
    )
    .option('--platform <os/arch>', "which image of a multi-platform one (default: this machine's)")
    .option('-n, --namespace <name>', 'namespace of containerd', process.env.CONTAINERD_NAMESPACE ?? 'default')
    .option('-a, --address <socket>', "containerd's socket (default: as dedupd is configured)")
    .option('--snapshotter <name>', 'snapshotter that gets the layers', 'dedup')
    .option('--lease-seconds <seconds>', 'how long leftovers are kept if dedupd is killed (default: 30)')
    .addHelpText('after', EXAMPLES)
    .action(async (reference: string, flags: RpullFlags) => {
      const request = {
        reference,
        platform: flags.platform ?? '',
        credentials: flags.user ?? '',
        containerdAddress: flags.address ?? '',
        namespace: flags.namespace,
        snapshotter: flags.snapshotter,
        leaseMs: leaseMs(flags.leaseSeconds),
      };
      await rpull(request, program.opts<{ config?: string }>().config);
    });
}

async function rpull(request: PullRequest, configFile: string | undefined): Promise<void> {
  const socket = new RunPaths(await runDirectory(configFile)).dedupdSocket;
  const interrupt = new AbortController();
  const onSignal = () => interrupt.abort();
  process.once('SIGINT', onSignal);
  process.once('SIGTERM', onSignal);
  let progress: Progress = new LineProgress();
  if (process.stderr.isTTY) progress = new (await import('./pull-bar.ts')).BarProgress();
  const summary = new Summary();
  try {
    for await (const event of pullImage(socket, request, interrupt.signal)) {
      progress.show(event);
      summary.add(event);
    }
    progress.end();
    process.stdout.write(`${summary}\n`);
  } catch (error) {
    progress.end();
    throw await explainUnreached(error, configFile, "pull with containerd's own client");
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}

/** Milliseconds; 0 for the usual time. Errors: INVALID_ARGUMENT. */
function leaseMs(text: string | undefined): number {
  if (text === undefined) return 0;
  const seconds = Number(text);
  if (Number.isFinite(seconds) && seconds >= 1 && seconds <= 86_400) return Math.round(seconds * 1000);
  throw new DedupError('INVALID_ARGUMENT', `--lease-seconds ${JSON.stringify(text)} is not a time`, {
    hint: 'give a number from 1 to 86400',
  });
}

/** One line on a whole pull. */
class Summary {
  #name = '';
  #sizes: readonly number[] = [];
  readonly #count = { present: 0, lazy: 0, stored: 0, unpacked: 0 };
  readonly #bytes = { stored: 0, unpacked: 0 };

  add(event: PullEvent): void {
    if (event.kind === 'resolved') {
      this.#name = event.name;
      this.#sizes = event.layers.map(({ size }) => size);
      return;
    }
    if (event.state === 'fetching' || event.state === 'unpacking') return;
    this.#count[event.state]++;
    if (event.state === 'stored' || event.state === 'unpacked')
      this.#bytes[event.state] += this.#sizes[event.layer] ?? 0;
  }

  toString(): string {
    const { present, lazy, stored, unpacked } = this.#count;
    const bytes = (state: 'stored' | 'unpacked') =>
      this.#count[state] === 0 ? '' : ` (${formatBytes(this.#bytes[state])})`;
    const parts = [`${lazy} lazy`];
    if (stored > 0) parts.push(`${stored} read and stored${bytes('stored')}`);
    parts.push(`${unpacked} fetched and unpacked${bytes('unpacked')}`, `${present} already here`);
    return `${this.#name}: ${this.#sizes.length} layers: ${parts.join(', ')}`;
  }
}
