// `repair`: removes containerd's records of snapshots that the snapshotter has lost, in every namespace.
import type { Command } from 'commander';
import type { ContainerdClientOptions } from '../pull/containerd-calls.ts';
import { ContainerdClient } from '../pull/containerd-client.ts';
import type { CliContext } from './context.ts';
import { removeStaleRecords } from './stale-records.ts';

interface RepairFlags {
  /** As configured when absent. */
  readonly address?: string;
  readonly snapshotter: string;
  readonly namespace?: string;
}

const HELP = `
When the root directory was emptied or replaced while containerd still had images, containerd goes on to believe that
their snapshots exist: pulls say that everything is here, and containers fail to start. This removes those records, and
says which images to pull again. Records of snapshots that exist are not touched. The service must run.

Examples:
  dedup-snapshotter repair
  dedup-snapshotter repair --namespace k8s.io
`;

export function registerRepairCommand(program: Command, context: CliContext): void {
  program
    .command('repair')
    .description('remove what containerd still records of snapshots that were lost, so that images can be pulled again')
    .option('-n, --namespace <name>', 'only this namespace of containerd (default: all)')
    .option('-a, --address <socket>', "containerd's socket (default: as configured)")
    .option('--snapshotter <name>', 'name of the snapshotter in containerd', 'dedup')
    .addHelpText('after', HELP)
    .action(async (flags: RepairFlags) => {
      const address = flags.address ?? context.config().containerd_address;
      let found = 0;
      for (const namespace of flags.namespace === undefined ? await allNamespaces(address) : [flags.namespace]) {
        found += await repair({ address, namespace }, flags.snapshotter);
      }
      if (found === 0) say('containerd and the snapshotter agree: nothing to repair');
    });
}

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

async function allNamespaces(address: string): Promise<readonly string[]> {
  const client = new ContainerdClient({ address, namespace: '' });
  try {
    return await client.listNamespaces();
  } finally {
    client.close();
  }
}

/** Answers how many stale records were found. */
async function repair(where: ContainerdClientOptions, snapshotter: string): Promise<number> {
  const client = new ContainerdClient(where);
  try {
    const { removed, kept, images, containers } = await removeStaleRecords(client, snapshotter);
    const found = removed.length + kept.length;
    if (found === 0) return 0;
    say(`${where.namespace}: removed ${removed.length} record${removed.length === 1 ? '' : 's'} of lost snapshots`);
    for (const name of images) say(`  pull again: ${name}`);
    for (const id of containers) say(`  remove the container, its file system is lost: ${id}`);
    for (const key of kept) say(`  kept, because something stands on it: ${key}`);
    if (kept.length > 0) process.exitCode = 1;
    return found;
  } finally {
    client.close();
  }
}
