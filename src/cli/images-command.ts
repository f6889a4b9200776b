// `images`: the merged images that are mounted, how much of each is here, and what the store holds.
import type { Command } from 'commander';
import type { DedupdImage } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';
import { connectDaemon } from './daemon-client.ts';

function row(columns: readonly string[], widths: readonly number[]): string {
  return `${columns
    .map((text, at) => text.padEnd(widths[at] ?? 0))
    .join('  ')
    .trimEnd()}\n`;
}

function printTable(images: readonly DedupdImage[]): void {
  const header = ['ID', 'LAYERS', 'SIZE', 'PRESENT', 'TRANSPORT', 'PATH', 'REFERENCE'];
  const rows = images.map((image) => [
    String(image.mount_id),
    String(image.layers.length),
    formatBytes(image.total_bytes),
    `${image.total_bytes === 0 ? 100 : Math.floor((image.present_bytes / image.total_bytes) * 100)}%`,
    image.transport,
    image.path,
    image.reference,
  ]);
  const widths = header.map((title, at) => Math.max(title.length, ...rows.map((cells) => cells[at]?.length ?? 0)));
  for (const cells of [header, ...rows]) process.stdout.write(row(cells, widths));
}

export function registerImagesCommand(program: Command, context: CliContext): void {
  program
    .command('images')
    .description('list the images that are mounted and how much of each is here')
    .option('--json', 'images and statistics as JSON')
    .addHelpText('after', '\nExamples:\n  dedup-snapshotter images\n  dedup-snapshotter images --json | jq .stats\n')
    .action(async (options: { json?: boolean }) => {
      const daemon = await connectDaemon(context, { start: false });
      const [images, stats] = await Promise.all([daemon.listImages(), daemon.stats()]).finally(() => daemon.close());
      if (options.json === true) {
        process.stdout.write(`${JSON.stringify({ images, stats }, null, 2)}\n`);
        return;
      }
      printTable(images);
      process.stdout.write(
        `store: ${stats.chunks} chunks, ${formatBytes(stats.chunk_bytes)} known, ${formatBytes(stats.present_bytes)} present\n`,
      );
    });
}
