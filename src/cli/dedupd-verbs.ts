// The command line of `dedupd` when a verb is named. Without one it is the daemon, which loads none of this.
import { Command } from 'commander';
import { VERSION } from '../version.ts';
import { printError } from './print-error.ts';
import { registerWarmCommand } from './warm-command.ts';

/** Runs the verb; sets the exit status. Never rejects. */
export async function runDedupdVerb(argv: readonly string[]): Promise<void> {
  const program = new Command('dedupd')
    .version(VERSION)
    .option('--config <file>', 'configuration file (default: /etc/dedup-snapshotter/config.json)')
    .showHelpAfterError('(add --help for usage)')
    .enablePositionalOptions();
  registerWarmCommand(program);
  try {
    await program.parseAsync(argv as string[]);
  } catch (error) {
    printError('dedupd', error);
    process.exitCode = 1;
  }
}
