// `stats`: what the store takes on the disk, what sharing saves, and what each image needs of it.
import type { Command } from 'commander';
import type { Space } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';
import { connectDaemon } from './daemon-client.ts';

const HELP = `
"disk" is what du(1) says of the folder chunks/. "deduplication" is what the layers would take if each had its chunks to
itself, over what the distinct chunks take. Of an image, "shared" is what another image uses too; lower layers of it that
are mounted by themselves are none.

Examples:
  dedup-snapshotter stats
  dedup-snapshotter stats --json | jq '.images[] | select(.pinned)'
`;

/** How many times the distinct chunks would be there without sharing. */
function ratio({ referenced_bytes, chunk_bytes }: Space): number {
  return chunk_bytes === 0 ? 1 : referenced_bytes / chunk_bytes;
}

function lines(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, at) => Math.max(...rows.map((cells) => cells[at]!.length)));
  return rows
    .map(
      (cells) =>
        `${cells
          .map((cell, at) => cell.padEnd(widths[at]!))
          .join('  ')
          .trimEnd()}\n`,
    )
    .join('');
}

function show(space: Space): string {
  const quota = space.quota_bytes === 0 ? 'no quota' : `quota ${formatBytes(space.quota_bytes)}`;
  const head = [
    ['disk', `${formatBytes(space.disk_bytes)}, of them ${formatBytes(space.present_bytes)} of chunks (${quota})`],
    ['chunks', `${space.chunks} distinct, ${formatBytes(space.chunk_bytes)}`],
    ['layers use', formatBytes(space.referenced_bytes)],
    ['deduplication', `${ratio(space).toFixed(2)} times`],
    [
      'addresses',
      `${formatBytes(space.free_bytes)} free, ${formatBytes(space.quarantined_bytes)} in quarantine, ${formatBytes(space.freed_bytes)} to be freed`,
    ],
    ['evicted', `${formatBytes(space.evicted_bytes)} since dedupd started`],
  ];
  const images = space.images.map((image) => [
    String(image.image_id),
    formatBytes(image.total_bytes),
    `${image.total_bytes === 0 ? 100 : Math.floor((image.present_bytes / image.total_bytes) * 100)}%`,
    formatBytes(image.shared_bytes),
    image.pinned ? 'yes' : 'no',
    image.transport === '' ? '-' : image.transport,
    image.reference,
  ]);
  const header = ['IMAGE', 'SIZE', 'PRESENT', 'SHARED', 'PINNED', 'SERVED BY', 'REFERENCE'];
  return lines(head) + (images.length === 0 ? '' : `\n${lines([header, ...images])}`);
}

export function registerStatsCommand(program: Command, context: CliContext): void {
  program
    .command('stats')
    .description('show what the chunks take on the disk, what sharing saves, and what each image needs')
    .option('--json', 'everything as JSON, in bytes')
    .addHelpText('after', HELP)
    .action(async ({ json = false }: { json?: boolean }) => {
      const daemon = await connectDaemon(context, { start: false });
      const space = await daemon.space().finally(() => daemon.close());
      process.stdout.write(
        json ? `${JSON.stringify({ ...space, dedup_ratio: ratio(space) }, null, 2)}\n` : show(space),
      );
    });
}
