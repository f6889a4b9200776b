// `rpull`: pulls an image into containerd without the layers that can be loaded lazily. This file is the verb: options,
// signals, progress and words for people; what is done to containerd is in containerd/pull.ts.
import cliProgress from 'cli-progress';
import type { Command } from 'commander';
import { DedupError } from '../errors.ts';
import { type Credentials, parseUserPassword } from '../fs/registry/credentials.ts';
import { hostPlatform, parsePlatform } from '../fs/registry/image-manifest.ts';
import { type RegistryOptions, RegistryPool } from '../fs/registry/pool.ts';
import { type ImageReference, parseReference } from '../fs/registry/reference.ts';
import { formatBytes } from '../units.ts';
import { ContainerdClient } from './containerd/client.ts';
import { DEFAULT_LEASE_LIFETIME_MS, type PullEvent, type PullResult, pullImage } from './containerd/pull.ts';

/** What the verb needs of the command line around it. */
export interface RpullContext {
  registryOptions(): RegistryOptions;
  /** containerd's socket, unless --address names another. */
  readonly containerdAddress: string;
  /** Told the credentials given with -u before the first layer is offered: lazy reads need them later. */
  onCredentials?(host: string, username: string, password: string): Promise<void>;
}

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

A layer without a lazy index is fetched and unpacked the ordinary way. "dedup-snapshotter index" makes indexes.
A pull that is interrupted or killed leaves nothing behind: containerd's next garbage collection takes it all.
`;

export function registerRpullCommand(program: Command, context: RpullContext): void {
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
    .option('-a, --address <socket>', "containerd's socket (default: as configured)")
    .option('--snapshotter <name>', 'snapshotter that gets the layers', 'dedup')
    .option(
      '--lease-seconds <seconds>',
      `how long the leftovers of a killed pull are kept (default: ${DEFAULT_LEASE_LIFETIME_MS / 1000})`,
    )
    .addHelpText('after', EXAMPLES)
    .action(async (reference: string, flags: RpullFlags) => {
      await rpull(parseReference(reference), flags, context);
    });
}

async function rpull(reference: ImageReference, flags: RpullFlags, context: RpullContext): Promise<void> {
  const platform = flags.platform === undefined ? hostPlatform() : parsePlatform(flags.platform);
  const leaseLifetimeMs = leaseLifetime(flags.leaseSeconds);
  const credentials = flags.user === undefined ? undefined : parseUserPassword(flags.user);
  await using pool = new RegistryPool(context.registryOptions());
  const client = new ContainerdClient({
    address: flags.address ?? context.containerdAddress,
    namespace: flags.namespace,
  });
  const interrupt = new AbortController();
  const onSignal = () => interrupt.abort(new DedupError('CANCELLED', 'interrupted'));
  process.once('SIGINT', onSignal);
  process.once('SIGTERM', onSignal);
  const progress = process.stderr.isTTY ? new BarProgress() : new LineProgress();
  try {
    await announce(reference, credentials, context);
    const result = await pullImage({
      client,
      repository: pool.repository(reference, credentials),
      reference,
      snapshotter: flags.snapshotter,
      platform,
      signal: interrupt.signal,
      onEvent: (event) => progress.show(event),
      leaseLifetimeMs,
    });
    progress.end();
    process.stdout.write(`${summary(result)}\n`);
  } catch (error) {
    progress.end();
    if (!interrupt.signal.aborted) throw error;
    throw new DedupError('CANCELLED', `pulling ${reference.host}/${reference.path} was interrupted`, {
      cause: error,
      hint: 'nothing was left behind; run it again',
    });
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
    client.close();
  }
}

async function announce(
  reference: ImageReference,
  credentials: Credentials | undefined,
  context: RpullContext,
): Promise<void> {
  if (credentials?.username === undefined || context.onCredentials === undefined) return;
  await context.onCredentials(reference.host, credentials.username, credentials.password ?? '');
}

function leaseLifetime(text: string | undefined): number {
  if (text === undefined) return DEFAULT_LEASE_LIFETIME_MS;
  const seconds = Number(text);
  if (Number.isFinite(seconds) && seconds >= 1 && seconds <= 86_400) return seconds * 1000;
  throw new DedupError('INVALID_ARGUMENT', `--lease-seconds ${JSON.stringify(text)} is not a time`, {
    hint: 'give a number from 1 to 86400',
  });
}

function summary(result: PullResult): string {
  const count = (outcome: string) => result.layers.filter((layer) => layer.outcome === outcome);
  const unpacked = count('unpacked');
  const fetched = unpacked.reduce((bytes, layer) => bytes + layer.size, 0);
  const parts = [
    `${count('lazy').length} lazy`,
    `${unpacked.length} fetched and unpacked${unpacked.length === 0 ? '' : ` (${formatBytes(fetched)})`}`,
    `${count('present').length} already here`,
  ];
  return `${result.name}: ${result.layers.length} layers: ${parts.join(', ')}`;
}

interface Progress {
  show(event: PullEvent): void;
  end(): void;
}

/** One line per layer, for logs and pipes. */
class LineProgress implements Progress {
  #layers: readonly { readonly digest: string; readonly size: number }[] = [];

  show(event: PullEvent): void {
    switch (event.kind) {
      case 'resolved':
        this.#layers = event.layers;
        process.stderr.write(`${event.name}: ${event.layers.length} layers, manifest ${event.manifest}\n`);
        return;
      case 'layer':
        process.stderr.write(`${this.#title(event.layer)}: ${WORDS[event.outcome]}\n`);
        return;
      case 'unpacking':
        process.stderr.write(`${this.#title(event.layer)}: unpacking\n`);
        return;
      case 'fetching':
        if (event.bytes === 0)
          process.stderr.write(`${this.#title(event.layer)}: fetching ${formatBytes(event.totalBytes)}\n`);
        return;
    }
  }

  end(): void {}

  #title(position: number): string {
    return `layer ${position + 1}/${this.#layers.length} ${this.#layers[position]?.digest.slice(0, 19) ?? ''}`;
  }
}

const WORDS = { present: 'already here', lazy: 'lazy, nothing fetched', unpacked: 'unpacked' } as const;

/** One bar over all layers, for a terminal. */
class BarProgress implements Progress {
  #bar: cliProgress.SingleBar | undefined;
  #done = 0;

  show(event: PullEvent): void {
    switch (event.kind) {
      case 'resolved':
        this.#bar = new cliProgress.SingleBar(
          { format: '[{bar}] {layer}/{layers} layers  {step}', stream: process.stderr, hideCursor: true },
          cliProgress.Presets.shades_classic,
        );
        this.#bar.start(Math.max(1, event.layers.length), 0, { layer: 0, layers: event.layers.length, step: '' });
        return;
      case 'layer':
        this.#done = event.layer + 1;
        this.#bar?.update(this.#done, { layer: this.#done, step: '' });
        return;
      case 'unpacking':
        this.#bar?.update(this.#done + 0.9, { step: 'unpacking' });
        return;
      case 'fetching':
        this.#bar?.update(this.#done + (0.9 * event.bytes) / Math.max(1, event.totalBytes), {
          step: `fetching ${formatBytes(event.bytes)} of ${formatBytes(event.totalBytes)}`,
        });
        return;
    }
  }

  end(): void {
    this.#bar?.stop();
    this.#bar = undefined;
  }
}
