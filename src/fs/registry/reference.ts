// Image references: Docker's short and full names parsed into host, repository, tag and digest, and the address of the
// server behind a host name. Used by the CLI, the control server and the registry client; touches no network.
import { type Digest, isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';

/** A parsed image reference. Made by `parseReference` only. */
export interface ImageReference {
  readonly __reference: unique symbol;
  /** Host with port as users and containerd write it: "docker.io", "127.0.0.1:5000", "[::1]:5000". */
  readonly host: string;
  /** Repository path: "library/nginx". */
  readonly path: string;
  /** Absent when only a digest was given. */
  readonly tag: string | undefined;
  readonly digest: Digest | undefined;
}

const COMPONENT = /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$/;
const TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;
const HOST_NAME =
  /^(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])(?:\.(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9]))*$/;
const IPV6 = /^\[[0-9a-fA-F:]+\]$/;
const MAX_NAME_CHARS = 255;

function invalid(text: string, reason: string, hint: string): DedupError {
  return new DedupError(
    'INVALID_REFERENCE',
    `invalid image reference ${JSON.stringify(text.slice(0, 300))}: ${reason}`,
    {
      hint,
    },
  );
}

/**
 * Parses `[host[:port]/]path[:tag][@digest]` the way Docker does: no host means docker.io, a one-part path there gets
 * "library/", and the tag defaults to "latest" unless a digest is given.
 * Errors: INVALID_REFERENCE with a hint. Source: the reference grammar of the OCI distribution spec, "Pulling manifests",
 * and Docker's rule for telling a host from a path.
 */
export function parseReference(text: string): ImageReference {
  const example = 'write it like nginx, nginx:1.27, ghcr.io/owner/name:tag or 127.0.0.1:5000/name@sha256:…';
  if (text === '') throw invalid(text, 'it is empty', example);
  if (/\s/.test(text)) throw invalid(text, 'it contains white space', example);
  if (/^[a-z][a-z0-9+.-]*:\/\//i.test(text)) throw invalid(text, 'it starts with a scheme', 'leave out "https://"');

  let rest = text;
  let digest: Digest | undefined;
  const at = rest.indexOf('@');
  if (at >= 0) {
    const given = rest.slice(at + 1);
    if (!isDigest(given)) {
      throw invalid(text, 'the part after "@" is not a digest', 'a digest is sha256: and 64 lowercase hex digits');
    }
    digest = given;
    rest = rest.slice(0, at);
  }
  let tag: string | undefined;
  const colon = rest.lastIndexOf(':');
  if (colon > rest.lastIndexOf('/') && !rest.slice(colon).includes(']')) {
    tag = rest.slice(colon + 1);
    if (!TAG.test(tag)) {
      throw invalid(
        text,
        `bad tag ${JSON.stringify(tag)}`,
        'a tag has 1–128 of A–Z a–z 0–9 _ . - and starts with none of . -',
      );
    }
    rest = rest.slice(0, colon);
  }
  const { host, path } = splitHost(rest);
  checkHost(text, host);
  checkPath(text, path);
  if (host.length + 1 + path.length > MAX_NAME_CHARS) {
    throw invalid(text, `the name is longer than ${MAX_NAME_CHARS} characters`, example);
  }
  if (tag === undefined && digest === undefined) tag = 'latest';
  return Object.freeze({ host, path, tag, digest }) as ImageReference;
}

function splitHost(name: string): { host: string; path: string } {
  const slash = name.indexOf('/');
  const first = slash < 0 ? '' : name.slice(0, slash);
  const isHost = slash >= 0 && (/[.:[]/.test(first) || first === 'localhost' || first !== first.toLowerCase());
  let host = isHost ? first : 'docker.io';
  let path = isHost ? name.slice(slash + 1) : name;
  if (host === 'index.docker.io') host = 'docker.io';
  if (host === 'docker.io' && !path.includes('/')) path = `library/${path}`;
  return { host, path };
}

function checkHost(text: string, host: string): void {
  const match = /^(\[[^\]]*\]|[^:]*)(?::(.*))?$/.exec(host);
  const name = match?.[1] ?? '';
  const port = match?.[2];
  if (!HOST_NAME.test(name) && !IPV6.test(name)) {
    throw invalid(text, `bad host ${JSON.stringify(host)}`, 'a host is a name or an address, with :port if needed');
  }
  if (port !== undefined && (!/^[0-9]{1,5}$/.test(port) || Number(port) < 1 || Number(port) > 65535)) {
    throw invalid(text, `bad port in ${JSON.stringify(host)}`, 'a port is a number from 1 to 65535');
  }
}

function checkPath(text: string, path: string): void {
  if (path !== path.toLowerCase()) {
    throw invalid(
      text,
      'the repository name has upper-case letters',
      `repository names are lower case: ${path.toLowerCase()}`,
    );
  }
  for (const component of path.split('/')) {
    if (!COMPONENT.test(component)) {
      throw invalid(
        text,
        `bad repository part ${JSON.stringify(component)}`,
        'parts of a repository name have a–z, 0–9 and single . _ __ - between them',
      );
    }
  }
  const short = path.startsWith('library/') ? path.slice(8) : path;
  if (/^[0-9a-f]{64}$/.test(short)) {
    throw invalid(text, 'the name is 64 hex digits', 'to name an image by digest write NAME@sha256:…');
  }
}

/** The full name, as containerd stores it: "docker.io/library/nginx:latest". */
export function formatReference(reference: ImageReference): string {
  const tag = reference.tag === undefined ? '' : `:${reference.tag}`;
  const digest = reference.digest === undefined ? '' : `@${reference.digest}`;
  return `${reference.host}/${reference.path}${tag}${digest}`;
}

/** What to ask the registry for: the digest where there is one, else the tag. */
export function tagOrDigest(reference: ImageReference): string {
  return reference.digest ?? reference.tag ?? 'latest';
}

/** Names under which one registry is known; credentials stored for any of them count for all. */
export function hostAliases(host: string): readonly string[] {
  const docker = ['docker.io', 'index.docker.io', 'registry-1.docker.io'];
  return docker.includes(host) ? docker : [host];
}

/** Host and port that serve a registry: docker.io is served elsewhere than its name says. */
export function serverOf(host: string): string {
  return host === 'docker.io' ? 'registry-1.docker.io' : host;
}

/** True for localhost, 127.0.0.0/8 and ::1, with or without port. */
export function isLoopback(host: string): boolean {
  const name = host
    .replace(/:\d+$/, '')
    .replace(/^\[(.*)\]$/, '$1')
    .toLowerCase();
  return name === 'localhost' || name.endsWith('.localhost') || name === '::1' || /^127(\.\d{1,3}){3}$/.test(name);
}
