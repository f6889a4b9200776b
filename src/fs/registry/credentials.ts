// Registry credentials from files in Docker's config.json format. Read again whenever they changed on disk; their
// values never leave the registry client.
import { readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import { DedupError } from '../../errors.ts';
import { hostAliases } from './reference.ts';

export interface Credentials {
  readonly username?: string;
  readonly password?: string;
  /** OAuth2 refresh token, exchanged at the token server. */
  readonly identityToken?: string;
  /** Sent to the registry as it is. */
  readonly registryToken?: string;
}

const entry = z.looseObject({
  username: z.string().optional(),
  password: z.string().optional(),
  auth: z.string().optional(),
  identitytoken: z.string().optional(),
  registrytoken: z.string().optional(),
});
const file = z.looseObject({ auths: z.record(z.string(), entry).nullish() });
type Entry = z.infer<typeof entry>;

/** "user:password" as given on a command line. Errors: INVALID_ARGUMENT. */
export function parseUserPassword(text: string): Credentials {
  const colon = text.indexOf(':');
  if (colon < 1) throw new DedupError('INVALID_ARGUMENT', 'credentials are written user:password');
  return { username: text.slice(0, colon), password: text.slice(colon + 1) };
}

/** The credentials of one host, optionally only for repositories below a path. */
interface Rule {
  readonly host: string;
  readonly path: string;
  readonly credentials: Credentials;
}

/** Looks credentials up in files; the first file that has some for a repository decides. */
export class CredentialFiles {
  readonly #files: readonly { readonly path: string; readonly required: boolean }[];
  readonly #read = new Map<string, { readonly version: string; readonly rules: readonly Rule[] }>();

  /** `configured` must exist when credentials are looked up; Docker's own file may be missing. */
  constructor(configured?: string, env: Readonly<Record<string, string | undefined>> = process.env) {
    const docker = join(env.DOCKER_CONFIG || join(env.HOME || homedir(), '.docker'), 'config.json');
    this.#files = [
      ...(configured === undefined ? [] : [{ path: configured, required: true }]),
      { path: docker, required: false },
    ];
  }

  /** Credentials for a repository: the longest matching "host/path" wins over "host". Errors: INVALID_CONFIG. */
  async find(host: string, path: string): Promise<Credentials | undefined> {
    const hosts = hostAliases(host);
    for (const { path: filePath, required } of this.#files) {
      const rules = await this.#rules(filePath, required);
      const matching = rules.filter(
        (rule) => hosts.includes(rule.host) && (rule.path === '' || `${path}/`.startsWith(`${rule.path}/`)),
      );
      const best = matching.sort((a, b) => b.path.length - a.path.length)[0];
      if (best !== undefined) return best.credentials;
    }
    return undefined;
  }

  async #rules(path: string, required: boolean): Promise<readonly Rule[]> {
    let text: string;
    let version: string;
    try {
      const { mtimeMs, size, ino } = await stat(path);
      version = `${mtimeMs} ${size} ${ino}`;
      const known = this.#read.get(path);
      if (known?.version === version) return known.rules;
      text = await readFile(path, 'utf8');
    } catch (cause) {
      const missing =
        (cause as NodeJS.ErrnoException).code === 'ENOENT' || (cause as NodeJS.ErrnoException).code === 'ENOTDIR';
      if (missing && !required) return [];
      throw new DedupError('INVALID_CONFIG', `cannot read the credentials file ${path}`, { cause });
    }
    const rules = parseCredentials(text, path);
    this.#read.set(path, { version, rules });
    return rules;
  }
}

/** The rules of a config.json. Its text never becomes part of an error. Errors: INVALID_CONFIG. */
export function parseCredentials(text: string, path: string): Rule[] {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    throw new DedupError('INVALID_CONFIG', `the credentials file ${path} is not JSON`);
  }
  const parsed = file.safeParse(json);
  if (!parsed.success) {
    const where = parsed.error.issues[0]?.path.join('.') ?? '';
    throw new DedupError(
      'INVALID_CONFIG',
      `the credentials file ${path} has a wrong value at ${JSON.stringify(where)}`,
    );
  }
  return Object.entries(parsed.data.auths ?? {}).flatMap(([key, value]) => {
    const credentials = credentialsOf(value, key, path);
    return credentials === undefined ? [] : [{ ...keyParts(key), credentials }];
  });
}

/** "https://index.docker.io/v1/", "ghcr.io", "ghcr.io/owner/name" → host and path. */
function keyParts(key: string): { host: string; path: string } {
  const bare = key.replace(/^https?:\/\//, '').replace(/\/+$/, '');
  const slash = bare.indexOf('/');
  const host = (slash < 0 ? bare : bare.slice(0, slash)).toLowerCase();
  const path = slash < 0 ? '' : bare.slice(slash + 1);
  // Docker appends the API version to the key of its own registry.
  return { host, path: path === 'v1' || path === 'v2' ? '' : path };
}

function credentialsOf(value: Entry, key: string, path: string): Credentials | undefined {
  if (value.identitytoken) return { identityToken: value.identitytoken };
  if (value.registrytoken) return { registryToken: value.registrytoken };
  if (value.username && value.password !== undefined) return { username: value.username, password: value.password };
  if (value.auth) {
    const decoded = Buffer.from(value.auth, 'base64').toString('utf8');
    const colon = decoded.indexOf(':');
    if (colon < 1) {
      throw new DedupError(
        'INVALID_CONFIG',
        `the "auth" of ${JSON.stringify(key)} in ${path} is not Base64 of user:password`,
      );
    }
    return { username: decoded.slice(0, colon), password: decoded.slice(colon + 1).replace(/\0+$/, '') };
  }
  return undefined;
}
