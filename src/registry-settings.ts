// Turns the configuration into the options of the registry client; used by dedupd and by the CLI verbs that talk to a
// registry themselves.
import type { Config } from './config.ts';
import type { RegistryOptions } from './fs/registry/pool.ts';

const DOCKER_HUB = 'docker.io';

/** The schema has checked that it is one. */
function endpointUrl(value: string): string {
  return new URL(/^https?:\/\//.test(value) ? value : `https://${value}`).origin;
}

/** Options for RegistryPool. `registry` comes before `dedupd.registry`. */
export function registryOptions(config: Config): RegistryOptions {
  return {
    endpoints: { [DOCKER_HUB]: endpointUrl(config.registry === '' ? config.dedupd.registry : config.registry) },
    insecureHosts: config.insecure_registries,
    caFiles: config.ca_files,
    mirrors: config.mirrorRegistry,
    // What is fetched ahead takes no connection of a reader.
    dataConnections: config.dedupd.workers + config.prefetch.workers,
    ...(config.credentials_file === undefined ? {} : { credentialsFile: config.credentials_file }),
  };
}
