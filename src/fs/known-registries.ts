// The repositories that layers are read from, with the credentials given for their hosts since dedupd started. Opened by
// plane-resources.ts; used by everything of the data plane that asks a registry. Credentials stay in memory.
import type { LayerSourceName } from './chunks/index-protocol.ts';
import type { Repository } from './registry/blob-reader.ts';
import { type Credentials, parseUserPassword } from './registry/credentials.ts';
import type { RegistryPool, RepositoryName } from './registry/pool.ts';

export class KnownRegistries implements AsyncDisposable {
  readonly #pool: RegistryPool;
  /** By host. */
  readonly #credentials = new Map<string, Credentials>();

  /** Closes the pool when it is closed itself. */
  constructor(pool: RegistryPool) {
    this.#pool = pool;
  }

  /** A source with the credentials known for its host now. */
  ofSource(source: LayerSourceName): Repository {
    const { host, repository } = source;
    return this.#pool.repository({ host, path: repository }, this.#credentials.get(host));
  }

  /** A repository with the credentials (user:password) given, or those known for its host. Errors: INVALID_ARGUMENT. */
  repository(name: RepositoryName, userAndPassword = ''): Repository {
    return userAndPassword === ''
      ? this.ofSource({ host: name.host, repository: name.path })
      : this.#pool.repository(name, parseUserPassword(userAndPassword));
  }

  /** Keeps credentials (user:password) for a host, until dedupd ends. Errors: INVALID_ARGUMENT. */
  remember(host: string, userAndPassword: string): void {
    this.#credentials.set(host, parseUserPassword(userAndPassword));
  }

  /** Requests and bytes of all of them since the start. */
  get traffic(): { readonly requests: number; readonly bytes: number } {
    return this.#pool.traffic;
  }

  /** Ends all connections. Idempotent. */
  async close(): Promise<void> {
    await this.#pool.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
