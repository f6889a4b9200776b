// Turns the configuration into the options of the registry client; used by dedupd and by the CLI verbs that talk to a
// registry themselves.
import type { Config } from './config.ts';
import { DedupError } from './errors.ts';
import type { RegistryOptions } from './fs/registry/pool.ts';

const DOCKER_HUB = 'docker.io';

function endpointUrl(value: string, key: string): string {
  const text = /^https?:\/\//.test(value) ? value : `https://${value}`;
  try {
    return new URL(text).origin;
  } catch (cause) {
    throw new DedupError('INVALID_CONFIG', `"${key}": ${JSON.stringify(value)} is not a registry address`, {
      cause,
      hint: 'give host, host:port or a URL such as https://registry.example.com',
    });
  }
}

/** Options for RegistryPool and openRepository. `registry` comes before `dedupd.registry`. Errors: INVALID_CONFIG. */
export function registryOptions(config: Config): RegistryOptions {
  const endpoint =
    config.registry === ''
      ? endpointUrl(config.dedupd.registry, 'dedupd.registry')
      : endpointUrl(config.registry, 'registry');
  return {
    endpoints: { [DOCKER_HUB]: endpoint },
    insecureHosts: config.insecure_registries,
    caFiles: config.ca_files,
    mirrors: config.mirrorRegistry,
    dataConnections: config.dedupd.workers,
    ...(config.credentials_file === undefined ? {} : { credentialsFile: config.credentials_file }),
  };
}
