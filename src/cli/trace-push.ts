// `trace push`: a trace beside its image in the registry, where nodes that pull the image find it.
import type { Command } from 'commander';
import { DedupError } from '../errors.ts';
import { parseUserPassword } from '../fs/registry/credentials.ts';
import { RegistryPool } from '../fs/registry/pool.ts';
import { parseReference, tagOrDigest } from '../fs/registry/reference.ts';
import { pushTrace } from '../prefetch/trace-artifact.ts';
import { findSubject } from '../prefetch/trace-subject.ts';
import type { CliContext } from './context.ts';
import { imageOf, openTraces, selectTrace, shortId } from './trace-selection.ts';

const HELP = `
The image stays as it is: the trace is pushed as an artifact that refers to its manifest, which nodes find when they
pull it. In registries without the referrers API it takes the place of the one pushed before; elsewhere the latest counts.
The registry must have the image with exactly the layers of the trace. File names of the image are part of a trace.

Examples:
  dedup-snapshotter trace push registry.example.com/app:1
  dedup-snapshotter trace push 4fd2 --to registry.example.com/mirror/app:1 -u alice:secret
`;

interface PushFlags {
  readonly to?: string;
  readonly user?: string;
}

export function registerTracePush(trace: Command, context: CliContext): void {
  trace
    .command('push')
    .description('push a trace beside its image, for other nodes')
    .argument('<trace>', 'ID (or its beginning) or image')
    .option('--to <reference>', 'image in a registry that gets it (default: the one it was recorded of)')
    .option(
      '-u, --user <user:password>',
      'credentials for the registry (default: those of Docker or the configuration)',
    )
    .addHelpText('after', HELP)
    .action(async (word: string, flags: PushFlags) => {
      const credentials = flags.user === undefined ? undefined : parseUserPassword(flags.user);
      const target = flags.to === undefined ? undefined : parseReference(flags.to);
      const { store, list } = await openTraces(context);
      const info = selectTrace(list, word);
      const image = target ?? imageOf(info);
      const recorded = await store.read(info.file);
      // Without mirrors: an old list of referrers read from one and written back would lose entries.
      await using pool = new RegistryPool({ ...context.registryOptions(), mirrors: [] });
      const repository = pool.repository(image, credentials);
      const interrupt = new AbortController();
      const onSignal = () => interrupt.abort(new DedupError('CANCELLED', 'interrupted'));
      process.once('SIGINT', onSignal);
      process.once('SIGTERM', onSignal);
      try {
        const subject = await findSubject(repository, tagOrDigest(image), recorded, interrupt.signal);
        // Under the name it has there: what the image is called elsewhere is nobody's business there.
        const tag = target === undefined ? recorded.tag : (target.tag ?? '');
        const named = { ...recorded, repository: repository.name, tag, manifest: subject.digest };
        const artifact = await pushTrace(repository, subject, named, interrupt.signal);
        process.stdout.write(
          `pushed the trace ${shortId(info.id)} as ${artifact}, a referrer of ${repository.name}@${subject.digest}\n`,
        );
      } finally {
        process.off('SIGINT', onSignal);
        process.off('SIGTERM', onSignal);
      }
    });
}
