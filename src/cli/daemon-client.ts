// A connection to dedupd for a verb of the command line; starts a daemon when none runs and the verb needs one.
import { RunPaths } from '../paths.ts';
import { DedupdClient } from '../snapshotter/dedupd-client.ts';
import { DedupdSupervisor } from '../snapshotter/dedupd-supervisor.ts';
import type { CliContext } from './context.ts';

/** The caller closes the client. Errors: UNAVAILABLE with what to do. */
export async function connectDaemon(context: CliContext, options: { start: boolean }): Promise<DedupdClient> {
  const config = context.config();
  const client = new DedupdClient({ address: new RunPaths(config.run_dir).dedupdSocket, root: config.root });
  try {
    if (options.start) {
      const supervisor = new DedupdSupervisor({ config, configFile: context.configFile, client, log: context.log });
      await supervisor.ensure();
    } else await client.hello();
  } catch (error) {
    client.close();
    throw error;
  }
  return client;
}
