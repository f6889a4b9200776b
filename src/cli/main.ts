// The command line: without a verb it is the service, with one it does a job and ends. One file per verb; this one only
// puts them together.
import { Command } from 'commander';
import { VERSION } from '../version.ts';
import type { CliContext } from './context.ts';
import { printError } from './print-error.ts';

const EXAMPLES = `
Examples:
  dedup-snapshotter                              run the service in the foreground
  dedup-snapshotter doctor                       what this machine can do, and what is missing
  dedup-snapshotter index REGISTRY/app:1 --annotate REGISTRY/app:1-lazy
                                                 make an image lazily loadable
  dedup-snapshotter rpull REGISTRY/app:1-lazy    pull it without its layers; then: ctr run --snapshotter dedup …
  dedup-snapshotter mount REGISTRY/app:1 /mnt/app
                                                 look into an image without containerd
  dedup-snapshotter stats                        what the chunks take, and what sharing them saves
  dedup-snapshotter bench REGISTRY/app:1 --lazy-image REGISTRY/app:1-lazy
                                                 measure how fast it starts here, beside overlayfs
`;

/** What most verbs share, loaded at the first call. */
type SharedContext = () => Promise<CliContext>;

/** Runs the command line; sets the exit status. Never rejects. */
export async function runCommandLine(argv: readonly string[]): Promise<void> {
  const program = new Command('dedup-snapshotter')
    .description('Starts containers before their image is on the node: lazy, verified, deduplicated.')
    .version(VERSION)
    .option('--config <file>', 'configuration file (default: /etc/dedup-snapshotter/config.json)')
    .addHelpText('after', EXAMPLES)
    .showHelpAfterError('(add --help for usage)')
    .enablePositionalOptions();
  let loaded: Promise<CliContext> | undefined;
  const context = (): Promise<CliContext> => {
    loaded ??= import('./context.ts').then(({ CliContext }) => new CliContext(program));
    return loaded;
  };
  program.action(async () => {
    const { runService } = await import('../service.ts');
    const service = await context();
    await runService(service.config(), service.configFile);
  });
  try {
    // Verbs are loaded when named: the service should not carry them, nor one verb the others.
    await registerVerb(program, context, argv);
    program.helpCommand(true);
    refuseUnknownVerb(program, argv);
    await program.parseAsync(argv);
  } catch (error) {
    printError('dedup-snapshotter', error);
    process.exitCode = 1;
  }
}

/** `context` is loaded by those that use it: rpull is over before the schema of the configuration is loaded. */
const VERBS: Readonly<Record<string, (program: Command, context: SharedContext) => Promise<void>>> = {
  index: async (program, context) =>
    (await import('./index-command.ts')).registerIndexCommand(program, await context()),
  rpull: async (program) => (await import('./rpull-command.ts')).registerRpullCommand(program),
  mount: async (program, context) =>
    (await import('./mount-command.ts')).registerMountCommand(program, await context()),
  umount: async (program, context) =>
    (await import('./mount-command.ts')).registerUmountCommand(program, await context()),
  images: async (program, context) =>
    (await import('./images-command.ts')).registerImagesCommand(program, await context()),
  gc: async (program, context) => (await import('./gc-command.ts')).registerGcCommand(program, await context()),
  stats: async (program, context) =>
    (await import('./stats-command.ts')).registerStatsCommand(program, await context()),
  dedup: async (program, context) =>
    (await import('./dedup-command.ts')).registerDedupCommand(program, await context()),
  trace: async (program, context) =>
    (await import('./trace-command.ts')).registerTraceCommand(program, await context()),
  repair: async (program, context) =>
    (await import('./repair-command.ts')).registerRepairCommand(program, await context()),
  bench: async (program, context) =>
    (await import('./bench-command.ts')).registerBenchCommand(program, await context()),
  config: async (program, context) =>
    (await import('./config-command.ts')).registerConfigCommand(program, await context()),
  doctor: async (program, context) =>
    (await import('./doctor-command.ts')).registerDoctorCommand(program, await context()),
};

/** The words after the program, without the value of --config. */
function wordsOf(argv: readonly string[]): string[] {
  return argv.slice(2).filter((_word, at, all) => all[at - 1] !== '--config');
}

/** Without this, a word that is no verb would be an argument too many of the service. */
function refuseUnknownVerb(program: Command, argv: readonly string[]): void {
  const first = wordsOf(argv).find((word) => !word.startsWith('-'));
  if (first === undefined || first === 'help' || Object.hasOwn(VERBS, first)) return;
  program.error(`error: unknown command ${JSON.stringify(first)}`);
}

async function registerVerb(program: Command, context: SharedContext, argv: readonly string[]): Promise<void> {
  const words = wordsOf(argv);
  const named = words.find((word) => Object.hasOwn(VERBS, word));
  const service = words.every((word) => word.startsWith('--config'));
  for (const [verb, register] of Object.entries(VERBS)) {
    // Help and unknown words need the whole list, a known verb only itself, the service none.
    if (!service && (named === undefined || named === verb)) await register(program, context);
  }
}
