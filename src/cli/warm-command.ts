// `dedupd warm`: has the running dedupd bring images, or what their starts read, to this node before anyone asks for them. This
// file is the verb: options, signals and words for people; it loads nothing that it can do without.
import type { Command } from 'commander';
import { DedupError, errorCode } from '../errors.ts';
import { RunPaths } from '../paths.ts';
import { formatBytes } from '../units.ts';
import { printError } from './print-error.ts';
import { parseRate, parseTime } from './quantity.ts';
import { runDirectory } from './run-directory.ts';
import { explainUnreached } from './unreached.ts';
import { forgetWarm, listWarm, type WarmEvent, type WarmImage, type WarmRequest, warmImage } from './warm-client.ts';
import { LineDisplay, PatientDisplay, type WarmDisplay } from './warm-progress.ts';

interface WarmFlags {
  readonly all?: boolean;
  readonly platform?: string;
  readonly user?: string;
  readonly rate?: string;
  readonly keep?: string;
  readonly json?: boolean;
  readonly list?: boolean;
  readonly forget?: boolean;
}

const EXAMPLES = `
Examples:
  dedupd warm registry.example.com/app:2-lazy              what its starts read, by its trace
  dedupd warm --all --rate 20MB/s --keep 7d registry.example.com/app:2-lazy registry.example.com/db:9-lazy
                                                           all of two images, slowly, for a week
  dedupd warm -u alice:secret --platform linux/arm64 127.0.0.1:5000/team/app:1
  dedupd warm --list                                       what is kept, and until when
  dedupd warm --forget registry.example.com/app:2-lazy     its layers may go at the next clean-up

Without --all it fetches what the trace of the image names: the node's own, one found beside the image, or that of another
version of it; without any trace the files that its command is certain to read. Layers without an index are left out.
What is here is not fetched again: interrupt it and run it again. What is fetched stays for --keep even if no container uses it.
"warm_up" in the configuration does the same at every start of dedupd.
`;

export function registerWarmCommand(program: Command): void {
  program
    .command('warm')
    .description('bring images, or what their starts read, to this node ahead')
    .argument('[references...]', 'images, e.g. registry.example.com/team/app:1')
    .option('--all', 'all of the images, not only what their starts read')
    .option('--platform <os/arch>', "which image of a multi-platform one (default: this machine's)")
    .option(
      '-u, --user <user:password>',
      'credentials for the registry (default: those of Docker or the configuration)',
    )
    .option('--rate <rate>', 'fetch no faster, e.g. 20MB/s (default: warm_up.rate_bytes_per_second)')
    .option('--keep <time>', 'how long it is kept although nobody uses it (default: 24h)')
    .option('--json', 'what became of each image, as JSON')
    .option('--list', 'show the images that are kept')
    .option('--forget', 'keep the images no longer')
    .addHelpText('after', EXAMPLES)
    .action(async (references: readonly string[], flags: WarmFlags) => {
      const configFile = program.opts<{ config?: string }>().config;
      const socket = new RunPaths(await runDirectory(configFile)).dedupdSocket;
      const interrupt = new AbortController();
      const onSignal = () => interrupt.abort();
      process.once('SIGINT', onSignal);
      process.once('SIGTERM', onSignal);
      try {
        await perform(socket, references, flags, interrupt.signal);
      } catch (error) {
        throw await explainUnreached(error, configFile, '');
      } finally {
        process.off('SIGINT', onSignal);
        process.off('SIGTERM', onSignal);
      }
    });
}

async function perform(
  socket: string,
  references: readonly string[],
  flags: WarmFlags,
  signal: AbortSignal,
): Promise<void> {
  if (flags.list === true) {
    if (references.length > 0 || flags.forget === true)
      throw new DedupError('INVALID_ARGUMENT', '--list shows all images that are kept, and takes no name');
    showList(await listWarm(socket, signal), flags.json === true);
    return;
  }
  if (references.length === 0) {
    throw new DedupError('INVALID_ARGUMENT', 'no image is named', { hint: 'dedupd warm --help' });
  }
  if (flags.forget === true) {
    const forgotten = await forgetWarm(socket, references, signal);
    if (flags.json === true) process.stdout.write(`${JSON.stringify({ forgotten })}\n`);
    else process.stdout.write('kept no longer: what nobody else uses goes at the next clean-up\n');
    return;
  }
  const rest = {
    platform: flags.platform ?? '',
    credentials: flags.user ?? '',
    all: flags.all === true,
    bytesPerSecond: flags.rate === undefined ? 0 : parseRate(flags.rate),
    keepMs: flags.keep === undefined ? 0 : parseTime(flags.keep),
  };
  await warmAll(
    socket,
    references.map((reference) => ({ reference, ...rest })),
    flags.json === true,
    signal,
  );
}

/** One after the other; one that fails does not keep the others back. Errors: that of the only one, CANCELLED, no dedupd. */
async function warmAll(
  socket: string,
  requests: readonly WarmRequest[],
  json: boolean,
  signal: AbortSignal,
): Promise<void> {
  const results: object[] = [];
  try {
    for (const request of requests) {
      try {
        const result = await warmOne(socket, request, signal);
        results.push(jsonOf(result));
        if (!json) process.stdout.write(`${sentence(result)}\n`);
        for (const { digest, reason } of json ? [] : result.leftOut)
          process.stdout.write(`  left out ${digest.slice(0, 19)}: ${reason}\n`);
      } catch (error) {
        const { message } = error as Error;
        results.push({ reference: request.reference, error: { code: errorCode(error), message } });
        const reached = !(error instanceof DedupError) || error.details.reached === undefined;
        if (requests.length === 1 || signal.aborted || !reached) throw error;
        printError('dedupd', error);
        process.exitCode = 1;
      }
    }
  } finally {
    if (json) process.stdout.write(`${JSON.stringify(results, undefined, 2)}\n`);
  }
}

async function warmOne(socket: string, request: WarmRequest, signal: AbortSignal): Promise<WarmEvent> {
  let open = (): WarmDisplay => new LineDisplay();
  if (process.stderr.isTTY) {
    const { BarDisplay } = await import('./warm-bar.ts');
    open = () => new BarDisplay();
  }
  const display = new PatientDisplay(open);
  try {
    for await (const event of warmImage(socket, request, signal)) {
      if (event.done) return event;
      display.show(event);
    }
    throw new DedupError('INTERNAL', 'dedupd ended the warm-up without a word');
  } catch (error) {
    if (!signal.aborted) throw error;
    const hint = 'run it again: it goes on where it ended';
    throw new DedupError('CANCELLED', `warming ${request.reference} was interrupted`, { cause: error, hint });
  } finally {
    display.end();
  }
}

const PARTS: Readonly<Record<string, string>> = {
  all: 'all of it',
  trace: 'what its starts read, by the trace of this node',
  registry: 'what its starts read, by the trace beside it in its registry',
  version: 'what starts read, by the trace of another version',
  start: 'what its command reads first; it has no trace',
  nothing: 'nothing, for nothing is known of its start; --all fetches all of it',
};

function sentence({ reference, part, bytesTotal, untilMs }: WarmEvent): string {
  const amount = bytesTotal === 0 ? 'nothing was missing' : `${formatBytes(bytesTotal)} fetched`;
  return `${reference}: ${amount} (${PARTS[part] ?? part}); kept until ${new Date(untilMs).toISOString()}`;
}

function jsonOf({ reference, manifest, part, bytesTotal, layers, leftOut, untilMs }: WarmEvent): object {
  return {
    reference,
    manifest,
    part,
    fetched_bytes: bytesTotal,
    layers,
    left_out: leftOut,
    kept_until: new Date(untilMs).toISOString(),
  };
}

function showList(images: readonly WarmImage[], json: boolean): void {
  const kept = ({ untilMs, configured }: WarmImage) => (configured ? undefined : new Date(untilMs).toISOString());
  if (json) {
    const rows = images.map((image) => ({
      reference: image.reference,
      platform: image.platform,
      layers: image.layers,
      kept_until: kept(image) ?? null,
      configured: image.configured,
    }));
    process.stdout.write(`${JSON.stringify(rows, undefined, 2)}\n`);
    return;
  }
  if (images.length === 0) process.stdout.write('no image is kept for having been warmed\n');
  for (const image of images) {
    const until = kept(image) === undefined ? 'as long as the configuration names it' : `until ${kept(image)}`;
    process.stdout.write(`${image.reference}  ${image.platform}  ${image.layers} layers  ${until}\n`);
  }
}
