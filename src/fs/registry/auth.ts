// Authorization at one registry: Basic, and Bearer tokens fetched from the realm the registry names. Keeps tokens until
// they expire. Called by http-exchange.ts around each request; credentials come from credentials.ts.
import { DedupError } from '../../errors.ts';
import type { Credentials } from './credentials.ts';
import { HttpExchange } from './http-exchange.ts';
import type { HttpResponse, HttpTransport } from './http-transport.ts';
import { withSignal } from './http-transport.ts';
import { redactUrl } from './secrets.ts';

/** What a request does to which repository. */
export interface Scope {
  readonly repository: string;
  readonly action: 'pull' | 'push';
}

export interface Challenge {
  /** Lower case: "basic", "bearer". */
  readonly scheme: string;
  readonly parameters: Readonly<Record<string, string | undefined>>;
}

interface Token {
  readonly header: string;
  /** Milliseconds since the epoch. */
  readonly expiresAt: number;
}

const MAX_TOKEN_BYTES = 1024 * 1024;
/** Lifetime of a token whose answer names none (distribution spec, token authentication). */
const DEFAULT_LIFETIME_S = 60;
/** A token is not used in the last part of its life: the request has to arrive, too. */
const MARGIN_S = 5;
const TOKEN_TIMEOUT_MS = 20_000;

export class Authorizer {
  readonly #transport: HttpTransport;
  readonly #host: string;
  readonly #find: () => Promise<Credentials | undefined>;
  readonly #exchange: HttpExchange;
  readonly #tokens = new Map<string, Token>();
  readonly #pending = new Map<string, Promise<Token>>();
  readonly #secrets = new Set<string>();
  #challenge: Challenge | undefined;

  /** `find` returns the credentials for this registry and repository; it is asked whenever a token is needed. */
  constructor(transport: HttpTransport, host: string, find: () => Promise<Credentials | undefined>) {
    this.#transport = transport;
    this.#host = host;
    this.#find = find;
    this.#exchange = new HttpExchange(this.#transport);
  }

  /** The Authorization header for a request, from what earlier answers taught; undefined before the first challenge. */
  async current(origin: string, scope: Scope, signal: AbortSignal): Promise<string | undefined> {
    const challenge = this.#challenge;
    if (challenge === undefined) return undefined;
    const token = this.#tokens.get(keyOf(scope));
    if (token !== undefined && token.expiresAt > Date.now()) return token.header;
    return await this.#obtain(origin, challenge, scope, signal);
  }

  /** Is there a way to answer this 401 or 403? */
  canRenew(response: HttpResponse, used: string | undefined): boolean {
    const offered = challengeOf(response) ?? (used === undefined ? undefined : this.#challenge);
    if (offered === undefined) return false;
    // 403 to a user name and password: known, and not allowed. Nothing newer can change that.
    return !(offered.scheme === 'basic' && response.status === 403);
  }

  /** A new header after `used` was refused. Errors: REGISTRY_AUTH and those of the token server. */
  async renew(
    origin: string,
    scope: Scope,
    response: HttpResponse,
    used: string | undefined,
    signal: AbortSignal,
  ): Promise<string | undefined> {
    const challenge = challengeOf(response) ?? this.#challenge;
    if (challenge === undefined) return undefined;
    this.#challenge = challenge;
    const key = keyOf(scope);
    const known = this.#tokens.get(key);
    // Another request may have renewed it already while this one was under way.
    if (known !== undefined && known.header !== used && known.expiresAt > Date.now()) return known.header;
    this.#tokens.delete(key);
    const renewed = await this.#obtain(origin, challenge, scope, signal);
    if (renewed === used) {
      // The file was read again and says the same; so would the registry.
      throw new DedupError('REGISTRY_AUTH', `${this.#host} refused the credentials for ${scope.repository}`, {
        details: { status: response.status },
        hint: `check the credentials for ${this.#host}`,
      });
    }
    return renewed;
  }

  /** Everything that must not appear in a message. */
  secrets(): Iterable<string> {
    return this.#secrets;
  }

  async #obtain(origin: string, challenge: Challenge, scope: Scope, signal: AbortSignal): Promise<string | undefined> {
    const key = keyOf(scope);
    let pending = this.#pending.get(key);
    if (pending === undefined) {
      // Shared by everyone who waits for this token, so no single caller's signal may end it.
      pending = this.#fetch(origin, challenge, scope).finally(() => this.#pending.delete(key));
      this.#pending.set(key, pending);
    }
    const token = await withSignal(pending, signal, `authorizing at ${this.#host}`);
    return token.header;
  }

  async #fetch(origin: string, challenge: Challenge, scope: Scope): Promise<Token> {
    const credentials = await this.#find();
    for (const secret of secretsOf(credentials)) this.#secrets.add(secret);
    const token =
      challenge.scheme === 'basic'
        ? this.#basic(credentials)
        : await this.#bearer(origin, challenge, scope, credentials);
    this.#secrets.add(token.header.slice(token.header.indexOf(' ') + 1));
    this.#tokens.set(keyOf(scope), token);
    return token;
  }

  #basic(credentials: Credentials | undefined): Token {
    if (credentials?.username === undefined || credentials.password === undefined) {
      throw new DedupError('REGISTRY_AUTH', `${this.#host} wants a user name and password, and none are known`, {
        hint: `add ${this.#host} to the credentials file, or pass -u user:password (dedupd forgets those of "rpull -u" when it restarts)`,
      });
    }
    return { header: basicHeader(credentials.username, credentials.password), expiresAt: Number.POSITIVE_INFINITY };
  }

  async #bearer(
    origin: string,
    challenge: Challenge,
    scope: Scope,
    credentials: Credentials | undefined,
  ): Promise<Token> {
    if (credentials?.registryToken !== undefined) {
      return { header: `Bearer ${credentials.registryToken}`, expiresAt: Number.POSITIVE_INFINITY };
    }
    const realm = this.#realm(origin, challenge);
    const doing = `getting a token for ${this.#host} from ${redactUrl(realm)}`;
    const service = challenge.parameters.service;
    const wanted = `repository:${scope.repository}:${scope.action === 'push' ? 'pull,push' : 'pull'}`;
    const signal = AbortSignal.timeout(TOKEN_TIMEOUT_MS);
    let response: HttpResponse;
    if (credentials?.identityToken !== undefined) {
      const form = new URLSearchParams({
        grant_type: 'refresh_token',
        refresh_token: credentials.identityToken,
        client_id: 'dedup-snapshotter',
        scope: wanted,
        ...(service === undefined ? {} : { service }),
      });
      const headers = { 'content-type': 'application/x-www-form-urlencoded' };
      const body = Buffer.from(form.toString());
      response = await this.#exchange.send({ method: 'POST', url: realm, headers, body, lane: 'control', signal });
    } else {
      if (service !== undefined) realm.searchParams.set('service', service);
      realm.searchParams.append('scope', wanted);
      const headers: Record<string, string> = {};
      if (credentials?.username !== undefined && credentials.password !== undefined) {
        headers.authorization = basicHeader(credentials.username, credentials.password);
      }
      response = await this.#exchange.send({ method: 'GET', url: realm, headers, lane: 'control', signal });
    }
    if (response.status !== 200) throw await this.#refused(response, doing, signal);
    return parseToken(await this.#exchange.bytes(response, MAX_TOKEN_BYTES, doing, signal), doing);
  }

  async #refused(response: HttpResponse, doing: string, signal: AbortSignal): Promise<DedupError> {
    const refused = await new HttpExchange(this.#transport, this).failure(response, doing, signal);
    const permanent = response.status >= 400 && response.status < 500 && ![408, 425, 429].includes(response.status);
    return permanent
      ? new DedupError('REGISTRY_AUTH', refused.message, {
          details: refused.details,
          hint: `check the credentials for ${this.#host}`,
        })
      : refused;
  }

  #realm(origin: string, challenge: Challenge): URL {
    const realm = URL.parse(challenge.parameters.realm ?? '');
    const http = realm?.protocol === 'http:';
    if (realm === null || !/^https?:$/.test(realm.protocol) || (http && origin.startsWith('https:'))) {
      throw new DedupError('REGISTRY_PROTOCOL', `${this.#host} names a token server that cannot be used`, {
        details: realm === null ? {} : { realm: redactUrl(realm) },
      });
    }
    realm.username = '';
    realm.password = '';
    return realm;
  }
}

function keyOf(scope: Scope): string {
  return `${scope.action} ${scope.repository}`;
}

export function basicHeader(username: string, password: string): string {
  return `Basic ${Buffer.from(`${username}:${password}`, 'utf8').toString('base64')}`;
}

function secretsOf(credentials: Credentials | undefined): string[] {
  if (credentials === undefined) return [];
  const { password, identityToken, registryToken } = credentials;
  return [password, identityToken, registryToken].filter((secret) => secret !== undefined);
}

function parseToken(bytes: Buffer, doing: string): Token {
  let parsed: { token?: unknown; access_token?: unknown; expires_in?: unknown };
  try {
    parsed = JSON.parse(bytes.toString('utf8')) as typeof parsed;
  } catch {
    // The parser's message quotes the text, which may hold a token: no cause here.
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the answer is not JSON`);
  }
  const token = parsed?.token || parsed?.access_token;
  if (typeof token !== 'string' || !/^[\x21-\x7e]+$/.test(token)) {
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: the answer holds no usable token`);
  }
  const lifetime =
    typeof parsed.expires_in === 'number' && parsed.expires_in > 0 ? parsed.expires_in : DEFAULT_LIFETIME_S;
  const usable = Math.max(lifetime - MARGIN_S, lifetime / 2);
  return { header: `Bearer ${token}`, expiresAt: Date.now() + usable * 1000 };
}

function challengeOf(response: HttpResponse): Challenge | undefined {
  const value = response.headers['www-authenticate'];
  if (value === undefined) return undefined;
  const offered = parseChallenges(Array.isArray(value) ? value.join(', ') : value);
  return offered.find(({ scheme }) => scheme === 'bearer') ?? offered.find(({ scheme }) => scheme === 'basic');
}

/** The challenges of a WWW-Authenticate header, in order (RFC 9110 §11.6.1). Malformed parts are left out. */
export function parseChallenges(value: string): Challenge[] {
  const challenges: { scheme: string; parameters: Record<string, string> }[] = [];
  const token = "[!#$%&'*+.^_`|~0-9A-Za-z-]+";
  const part = new RegExp(
    `\\s*(?:,\\s*)*(?:(${token})\\s*=\\s*(?:"((?:[^"\\\\]|\\\\.)*)"|(${token}))|(${token})(?=\\s|,|$)(?:\\s+[A-Za-z0-9._~+/-]+=*(?=\\s*(?:,|$)))?)`,
    'y',
  );
  let match: RegExpExecArray | null;
  while (part.lastIndex < value.length && (match = part.exec(value)) !== null) {
    const [, name, quoted, plain, scheme] = match;
    if (scheme !== undefined) challenges.push({ scheme: scheme.toLowerCase(), parameters: Object.create(null) });
    else if (name !== undefined) {
      const last = challenges.at(-1);
      if (last !== undefined) last.parameters[name.toLowerCase()] = quoted?.replace(/\\(.)/g, '$1') ?? plain ?? '';
    }
  }
  return challenges;
}
