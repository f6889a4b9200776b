// `mount` and `umount`: look into an image without containerd. dedupd does the work; an image without an index is read
// once to make one.
import { realpath } from 'node:fs/promises';
import { SingleBar } from 'cli-progress';
import type { Command } from 'commander';
import { DedupError } from '../errors.ts';
import type { MountProgress } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';
import { connectDaemon } from './daemon-client.ts';

async function existingDirectory(path: string): Promise<string> {
  try {
    return await realpath(path);
  } catch (cause) {
    throw new DedupError('NOT_FOUND', `${path}: no such directory`, { cause, hint: `create it: mkdir -p ${path}` });
  }
}

/** Shows steps as a bar on a terminal and as lines elsewhere. */
function progressDisplay(): { show: (progress: MountProgress) => void; end: () => void } {
  let shown = '';
  if (!process.stderr.isTTY) {
    return {
      show: ({ step }) => {
        if (step !== shown) process.stderr.write(`${step}\n`);
        shown = step;
      },
      end: () => {},
    };
  }
  let bar: SingleBar | undefined;
  const end = (): void => {
    bar?.stop();
    bar = undefined;
  };
  return {
    show: ({ step, bytes_done, bytes_total }) => {
      if (step !== shown) {
        end();
        shown = step;
        if (bytes_total === 0) process.stderr.write(`${step}\n`);
        else {
          bar = new SingleBar({
            format: `${step} {bar} {percentage}% | ${formatBytes(bytes_total)} | {eta_formatted}`,
            hideCursor: true,
            stream: process.stderr,
          });
          bar.start(bytes_total, bytes_done);
        }
      }
      bar?.update(bytes_done);
    },
    end,
  };
}

export function registerMountCommand(program: Command, context: CliContext): void {
  program
    .command('mount')
    .argument('<reference>', 'image, e.g. registry.example.com/app:1')
    .argument('<directory>', 'existing directory to mount it on')
    .option('-u, --user <user:password>', 'credentials for the registry')
    .option('--platform <os/arch[/variant]>', 'which image of a multi-platform index', '')
    .description('mount an image read-only, without containerd; its bytes are fetched when they are read')
    .addHelpText(
      'after',
      '\nExamples:\n  dedup-snapshotter mount registry.example.com/app:1-lazy /mnt/app\n  dedup-snapshotter mount -u me:secret --platform linux/arm64 registry.example.com/app:1 /mnt/app\n  dedup-snapshotter umount /mnt/app\n\nAn image without an index is downloaded once to make one; that takes as long as a pull.\n',
    )
    .action(async (reference: string, directory: string, options: { user?: string; platform: string }) => {
      context.requireRoot('mount');
      context.requireLazy();
      const target = await existingDirectory(directory);
      const daemon = await connectDaemon(context, { start: true });
      const abort = new AbortController();
      const stop = (): void => abort.abort();
      process.once('SIGINT', stop);
      const display = progressDisplay();
      try {
        const request = { reference, directory: target, platform: options.platform, credentials: options.user ?? '' };
        for await (const step of daemon.mountReference(request, abort.signal)) if (!step.done) display.show(step);
      } finally {
        display.end();
        process.removeListener('SIGINT', stop);
        daemon.close();
      }
      process.stdout.write(`${reference} is mounted on ${target}\n`);
    });
}

export function registerUmountCommand(program: Command, context: CliContext): void {
  program
    .command('umount')
    .argument('<directory>', 'directory given to mount')
    .description('unmount an image that "mount" mounted')
    .addHelpText('after', '\nExample:\n  dedup-snapshotter umount /mnt/app\n')
    .action(async (directory: string) => {
      context.requireRoot('umount');
      const daemon = await connectDaemon(context, { start: false });
      try {
        await daemon.unmountReference(await existingDirectory(directory));
      } finally {
        daemon.close();
      }
    });
}
