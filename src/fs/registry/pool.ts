// Makes Repository objects from names and configuration, with every wrapper in place, and keeps them for the process.
// dedupd owns one RegistryPool, and so does each verb of the command line that talks to a registry.
import { createHash } from 'node:crypto';
import { Authorizer } from './auth.ts';
import { CredentialFiles, type Credentials } from './credentials.ts';
import { HttpRepository } from './http-blob.ts';
import { singleRangeServers } from './http-ranges.ts';
import { HttpTransport, type TransportOptions } from './http-transport.ts';
import { MirroredRepository } from './mirrored.ts';
import type { ImageReference } from './reference.ts';
import { type RegistryLog, RetryingRepository, type RetryOptions } from './retrying.ts';
import type { StreamingRepository } from './verified-stream.ts';

/** A repository by name; an ImageReference is one, too. */
export type RepositoryName = Pick<ImageReference, 'host' | 'path'>;

export interface RegistryOptions extends TransportOptions {
  /** Used instead of what files say, for every repository opened with these options. */
  readonly credentials?: Credentials;
  /** Docker config.json; Docker's own file (DOCKER_CONFIG or ~/.docker) is read after it. */
  readonly credentialsFile?: string;
  /** Servers by host, e.g. {"docker.io": "https://registry-1.docker.io"}. */
  readonly endpoints?: Readonly<Record<string, string>>;
  /** Asked in this order before the registry itself. `insecure` adds the host to `insecureHosts`. */
  readonly mirrors?: readonly { readonly host: string; readonly insecure?: boolean }[];
  readonly retry?: RetryOptions;
  readonly log?: RegistryLog;
}

/** A mirror is a shortcut: where it does not answer soon, the next one is asked. */
const MIRROR_RETRY: RetryOptions = { attempts: 2, deadlineMs: 15_000 };

export class RegistryPool {
  readonly #options: RegistryOptions;
  readonly #transport: HttpTransport;
  readonly #files: CredentialFiles;
  readonly #singleRangeServers = singleRangeServers();
  readonly #repositories = new Map<string, StreamingRepository>();

  constructor(options: RegistryOptions = {}) {
    this.#options = options;
    const insecureMirrors = (options.mirrors ?? []).flatMap(({ host, insecure }) => (insecure === true ? [host] : []));
    this.#transport = new HttpTransport({
      ...options,
      insecureHosts: [...(options.insecureHosts ?? []), ...insecureMirrors],
    });
    this.#files = new CredentialFiles(options.credentialsFile, options.env);
  }

  /** The repository of that name; the same object for the same name and credentials. */
  repository(name: RepositoryName, credentials?: Credentials): StreamingRepository {
    const given = credentials ?? this.#options.credentials;
    const key = `${name.host}/${name.path} ${given === undefined ? '' : hashOf(given)}`;
    let repository = this.#repositories.get(key);
    if (repository === undefined) {
      repository = this.#open(name, given);
      this.#repositories.set(key, repository);
    }
    return repository;
  }

  /** Requests and bytes of all repositories since the pool was made. */
  get traffic(): { readonly requests: number; readonly bytes: number } {
    let [requests, bytes] = [0, 0];
    for (const repository of this.#repositories.values()) {
      requests += repository.traffic.requests;
      bytes += repository.traffic.bytes;
    }
    return { requests, bytes };
  }

  /** Ends all connections. Idempotent. */
  async close(): Promise<void> {
    this.#repositories.clear();
    await this.#transport.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #open(name: RepositoryName, given: Credentials | undefined): StreamingRepository {
    const { endpoints, mirrors, retry, log } = this.#options;
    const origin = new RetryingRepository(this.#http(name, given, endpoints?.[name.host]), retry, log);
    const others = (mirrors ?? []).filter(({ host }) => host !== name.host);
    if (others.length === 0) return origin;
    const wrapped = others.map(({ host }) => {
      // Credentials given for the origin are not the mirror's business: it gets those stored for it.
      const mirror = this.#http({ host, path: name.path }, undefined, endpoints?.[host], name.host);
      return new RetryingRepository(mirror, { ...retry, ...MIRROR_RETRY }, log);
    });
    return new MirroredRepository(wrapped, origin, log);
  }

  #http(
    name: RepositoryName,
    given: Credentials | undefined,
    endpoint: string | undefined,
    mirrorOf?: string,
  ): HttpRepository {
    const find = async () => given ?? (await this.#files.find(name.host, name.path));
    return new HttpRepository({
      host: name.host,
      path: name.path,
      transport: this.#transport,
      singleRangeServers: this.#singleRangeServers,
      authorizer: new Authorizer(this.#transport, name.host, find),
      ...(endpoint === undefined ? {} : { endpoint }),
      ...(mirrorOf === undefined ? {} : { mirrorOf }),
    });
  }
}

/** The pool's key for credentials; the secrets themselves stay out of it. */
function hashOf(credentials: Credentials): string {
  return createHash('sha256').update(JSON.stringify(credentials)).digest('hex');
}

/** One repository on connections of its own; idle ones do not keep the process alive. */
export function openRepository(name: RepositoryName, options: RegistryOptions = {}): StreamingRepository {
  return new RegistryPool(options).repository(name);
}
