// `gc`: gives back at once what is not needed, instead of when it is due, and says how much each step freed.
import { statfs } from 'node:fs/promises';
import type { Command } from 'commander';
import { errorCode } from '../errors.ts';
import { somebodyListens } from '../protocol.ts';
import { requestCleanup } from '../snapshotter/cleanup-client.ts';
import type { GcStep } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';
import { connectDaemon } from './daemon-client.ts';

const HELP = `
What nobody uses goes by itself: after containerd's own collection, and some minutes later. This does it now: directories
of removed snapshots, images that are mounted and not used, layers that no snapshot names, what exceeds "quota_bytes".
Images that containerd still has are not touched: remove them first. A step says what the store gave back; the last line
also what the whole file system of "root" has more, directories and metadata included, and whatever others wrote meanwhile.

Examples:
  dedup-snapshotter gc
  dedup-snapshotter gc --json | jq .disk_bytes
`;

/** From then on it is said what takes so long. */
const SHOW_AFTER_MS = 2_000;

/** Bytes that the file system below `root` has free; 0 when it does not say. */
async function freeBytes(root: string): Promise<number> {
  const found = await statfs(root).catch(() => undefined);
  return found === undefined ? 0 : found.bavail * found.bsize;
}

/** What a step did, for people. */
function describe({ step, count, disk_bytes, address_bytes }: GcStep): string {
  const what: Record<string, string> = {
    'release images': `${count} unused image${count === 1 ? '' : 's'} unmounted`,
    'drop layers': `${count} layer${count === 1 ? '' : 's'} dropped`,
    evict: `${count} piece${count === 1 ? '' : 's'} evicted`,
    'free addresses': `${formatBytes(address_bytes)} of address space can be given again`,
  };
  const freed = step === 'free addresses' ? '' : `, ${formatBytes(disk_bytes)} freed`;
  return `${(what[step] ?? step) + freed}\n`;
}

export function registerGcCommand(program: Command, context: CliContext): void {
  program
    .command('gc')
    .description('give back disk space that is not needed, now')
    .option('--json', 'what each step freed as JSON')
    .addHelpText('after', HELP)
    .action(async ({ json = false }: { json?: boolean }) => {
      const { address, root } = context.config();
      const startedMs = performance.now();
      const progress = (text: string): void => {
        if (performance.now() - startedMs > SHOW_AFTER_MS) process.stderr.write(`${text} …\n`);
      };
      const say = (line: string): void => {
        if (!json) process.stdout.write(line);
      };
      const daemon = await connectDaemon(context, { start: false });
      const steps: GcStep[] = [];
      const freeBefore = await freeBytes(root);
      try {
        const before = await daemon.space();
        const timer = setTimeout(() => progress('removing what snapshots left'), SHOW_AFTER_MS + 1);
        try {
          if (await somebodyListens(address)) {
            const notReleased = await requestCleanup(address);
            if (notReleased !== undefined) {
              process.stderr.write(`what removed images used was not released: ${notReleased}\n`);
              process.exitCode = 1;
            }
          } else say('the snapshots service does not run: what its snapshots used is dropped when it does\n');
        } catch (error) {
          process.stderr.write(`the snapshots service did not clean up [${errorCode(error)}]\n`);
          process.exitCode = 1;
        } finally {
          clearTimeout(timer);
        }
        const cleaned = Math.max(0, before.disk_bytes - (await daemon.space()).disk_bytes);
        steps.push({ step: 'clean up', done: true, count: 0, disk_bytes: cleaned, address_bytes: 0 });
        if (cleaned > 0) say(`removed snapshots: ${formatBytes(cleaned)} freed\n`);
        for await (const step of daemon.gc()) {
          if (!step.done) progress(step.step);
          else {
            steps.push(step);
            say(describe(step));
          }
        }
      } finally {
        daemon.close();
      }
      const moreFree = (await freeBytes(root)) - freeBefore;
      const diskBytes = steps.reduce((sum, { disk_bytes }) => sum + disk_bytes, 0);
      if (json) {
        const told = steps.map(({ step, count, disk_bytes, address_bytes }) => ({
          step,
          count,
          disk_bytes,
          address_bytes,
        }));
        process.stdout.write(
          `${JSON.stringify({ disk_bytes: diskBytes, filesystem_bytes: moreFree, steps: told }, null, 2)}\n`,
        );
        return;
      }
      const fileSystem = moreFree > diskBytes ? `; the file system has ${formatBytes(moreFree)} more` : '';
      say(`${formatBytes(diskBytes)} of chunks freed in all${fileSystem}\n`);
    });
}
