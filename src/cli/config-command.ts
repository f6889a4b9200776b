// `config`: the configuration in effect, complete, as JSON; what install.sh writes as the default file.
import type { Command } from 'commander';
import type { CliContext } from './context.ts';

export function registerConfigCommand(program: Command, context: CliContext): void {
  program
    .command('config')
    .description('print the configuration in effect, every key filled in')
    .addHelpText('after', '\nExample:\n  dedup-snapshotter --config ./partial.json config\n')
    .action(() => {
      process.stdout.write(`${JSON.stringify(context.config(), null, 2)}\n`);
    });
}
