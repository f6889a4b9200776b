// A token server for docker-registry's token authentication: checks Basic credentials and issues signed tokens, counting
// and recording what it was asked. Used by the tests of the registry client.
import { createPrivateKey, randomUUID, sign } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { TestCertificates } from './tls.ts';

export interface TokenRequest {
  readonly method: string;
  readonly scopes: readonly string[];
  readonly user: string | undefined;
}

export class TokenServer {
  readonly requests: TokenRequest[] = [];
  readonly service = 'test-registry';
  readonly issuer = 'test-issuer';
  /** Seconds, as announced and as signed. */
  lifetimeS = 300;
  /** Tokens that registries will refuse, as if revoked. */
  issueBroken = false;
  /** Every token issued, to look for in messages. */
  readonly issued: string[] = [];
  readonly #server: Server;
  readonly #users: Readonly<Record<string, string>>;
  readonly #key: string;
  readonly #chain: string;

  private constructor(users: Readonly<Record<string, string>>, key: string, certificate: string) {
    this.#users = users;
    this.#key = key;
    this.#chain = certificate.replace(/-----[^-]+-----|\s/g, '');
    this.#server = createServer((request, response) => {
      this.#answer(request).then(
        ({ status, body }) => response.writeHead(status, { 'content-type': 'application/json' }).end(body),
        () => response.destroy(),
      );
    });
  }

  /** `users` maps names to passwords; anonymous requests get pull tokens only. */
  static async start(certificates: TestCertificates, users: Readonly<Record<string, string>>): Promise<TokenServer> {
    const [key, certificate] = await Promise.all([
      readFile(certificates.keyFile, 'utf8'),
      readFile(certificates.certFile, 'utf8'),
    ]);
    const server = new TokenServer(users, key, certificate);
    await new Promise<void>((resolve) => server.#server.listen(0, '127.0.0.1', () => resolve()));
    return server;
  }

  get realm(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/token`;
  }

  async stop(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  async #answer(request: IncomingMessage): Promise<{ status: number; body: string }> {
    let body = '';
    for await (const chunk of request) body += String(chunk);
    const parameters =
      request.method === 'POST' ? new URLSearchParams(body) : new URL(request.url ?? '/', this.realm).searchParams;
    const scopes = parameters.getAll('scope').flatMap((scope) => scope.split(' '));
    const basic = /^Basic (.*)$/.exec(request.headers.authorization ?? '')?.[1];
    const [name = '', password] = Buffer.from(basic ?? '', 'base64')
      .toString()
      .split(':');
    const refresh = parameters.get('refresh_token') ?? undefined;
    const user = basic !== undefined ? name : refresh?.replace(/^refresh-/, '');
    this.requests.push({ method: request.method ?? '', scopes, user });
    const known = user === undefined || (refresh === undefined ? this.#users[name] === password : user in this.#users);
    if (!known) {
      return {
        status: 401,
        body: JSON.stringify({ errors: [{ code: 'UNAUTHORIZED', message: `no entry for ${basic}` }] }),
      };
    }
    const access = scopes.map((scope) => {
      const [type = '', path = '', actions = ''] = scope.split(':');
      const allowed = actions.split(',').filter((action) => user !== undefined || action === 'pull');
      return { type, name: path, actions: allowed };
    });
    const token = this.issueBroken ? `broken-${randomUUID()}` : this.#token(access);
    this.issued.push(token);
    return { status: 200, body: JSON.stringify({ token, expires_in: this.lifetimeS }) };
  }

  #token(access: readonly object[]): string {
    const now = Math.floor(Date.now() / 1000);
    const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
    const claims = {
      iss: this.issuer,
      sub: 'test',
      aud: this.service,
      nbf: now - 30,
      iat: now,
      exp: now + this.lifetimeS,
    };
    const signed = `${part({ typ: 'JWT', alg: 'ES256', x5c: [this.#chain] })}.${part({ ...claims, jti: randomUUID(), access })}`;
    const key = createPrivateKey(this.#key);
    const signature = sign('sha256', Buffer.from(signed), { key, dsaEncoding: 'ieee-p1363' });
    return `${signed}.${signature.toString('base64url')}`;
  }
}
