// `dedup`: how far the conversion of ordinary layers has come, and whether it goes on. The service does the work.
import type { Command } from 'commander';
import type { ConversionStatus } from '../snapshotter/conversions-service.ts';
import { ServiceClient } from '../snapshotter/service-client.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';

const HELP = `
Layers that containerd unpacked the ordinary way are cut into chunks in the background, one after the other: each
distinct chunk is kept once, whatever image brought it, and new containers read it from there. The directory of such a
layer is deleted once nothing uses it any more. "pause" ends the conversion under way, which starts over after "resume";
it lasts over restarts. Both answer as "status" does.

A layer for which there is no room waits until there is: 15 % of the disk, at least 256 MiB, are left for others, and so
is what "quota_bytes" allows. Layers that are left as they are stay so over restarts; "resume" tries them again, too:
after an upgrade of the kernel, say, or when there is more memory.

Examples:
  dedup-snapshotter dedup status
  dedup-snapshotter dedup status --json | jq .pending
  dedup-snapshotter dedup pause
  dedup-snapshotter dedup resume
`;

const METHODS = { status: 'Status', pause: 'Pause', resume: 'Resume' } as const;
const DESCRIPTIONS: Readonly<Record<keyof typeof METHODS, string>> = {
  status: 'how many layers were converted, which one is under way, and what stays as it is',
  pause: 'convert nothing until "resume"',
  resume: 'go on, and try again what was given up or left as it is',
};

/** The status for people, a line each. */
export function statusLines(status: ConversionStatus): string[] {
  const { paused, waiting, pending, later, done, left, failed, current, directories } = status;
  const lines = [`conversions: ${paused ? 'paused' : waiting === '' ? 'on' : `waiting: ${waiting}`}`];
  if (current !== null) {
    const { name, bytes, total, entries, held } = current;
    const of = total === 0 ? '' : ` of about ${formatBytes(total)}`;
    const inEntries = entries === 0 ? '' : ` in ${entries} entries`;
    lines.push(`under way: ${name}, ${formatBytes(bytes)}${of} read${inEntries}`);
    if (held !== '') lines.push(`  held up for a moment: ${held}`);
  }
  lines.push(`pending: ${pending}`, `done: ${done}`);
  if (later > 0) lines.push(`after the next start of the machine, because committed by hand: ${later}`);
  const list = (title: string, items: readonly string[]): void => {
    if (items.length > 0) lines.push(`${title}: ${items.length}`, ...items.map((item) => `  ${item}`));
  };
  list(
    'left as they are, until "resume"',
    left.map(({ name, reason }) => `${name}: ${reason}`),
  );
  list(
    'failed',
    failed.map(
      ({ snapshot, attempts, reason, given_up }) =>
        `snapshot ${snapshot}: ${reason} (${given_up ? `given up after ${attempts} attempts` : `attempt ${attempts}`})`,
    ),
  );
  list(
    'directories of converted layers that are still there',
    directories.map(({ name, reason }) => `${name}: ${reason}`),
  );
  return lines;
}

export function registerDedupCommand(program: Command, context: CliContext): void {
  const dedup = program
    .command('dedup')
    .description('deduplication of ordinary layers in the background: status, pause, resume')
    .addHelpText('after', HELP);
  for (const verb of ['status', 'pause', 'resume'] as const) {
    dedup
      .command(verb)
      .description(DESCRIPTIONS[verb])
      .option('--json', 'as JSON')
      .addHelpText('after', `\nExample:\n  dedup-snapshotter dedup ${verb}\n`)
      .action(async (options: { json?: boolean }) => {
        const client = new ServiceClient(context.config().address);
        try {
          const status = await client.conversions(METHODS[verb]);
          const text = options.json === true ? JSON.stringify(status, null, 2) : statusLines(status).join('\n');
          process.stdout.write(`${text}\n`);
        } finally {
          client.close();
        }
      });
  }
}
