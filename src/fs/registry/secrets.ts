// Removes secrets from text that is on its way into an error or a log line. Everything the registry client quotes from
// a server, and every URL it names, goes through here.

const REMOVED = '[removed]';

/** Origin and path of `url`, without user information and without the query, where signatures and tokens live. */
export function redactUrl(url: URL): string {
  return `${url.protocol}//${url.host}${url.pathname}${url.search === '' ? '' : '?…'}`;
}

const PATTERNS: readonly [RegExp, string][] = [
  [/\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}/gi, `$1 ${REMOVED}`],
  [
    /(["']?(?:access_?token|refresh_?token|identity_?token|id_token|token|password|passwd|secret|auth|authorization)["']?\s*[:=]\s*["']?)[^\s"',;&}]+/gi,
    `$1${REMOVED}`,
  ],
  [/([?&][A-Za-z0-9_-]*(?:sig|signature|token|credential|key|policy)[A-Za-z0-9_-]*=)[^&\s"'<>]+/gi, `$1${REMOVED}`],
  [/(\w+:\/\/)[^/\s@]+@/g, `$1${REMOVED}@`],
  [/\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?/g, REMOVED],
];

/** `text` without the given secrets (also in Base64 and percent encoding) and without what looks like one. */
export function redact(text: string, secrets: Iterable<string> = []): string {
  let out = text;
  for (const secret of secrets) {
    if (secret.length < 3) continue;
    for (const form of [secret, Buffer.from(secret).toString('base64'), encodeURIComponent(secret)]) {
      out = out.replaceAll(form, REMOVED);
    }
  }
  for (const [pattern, replacement] of PATTERNS) out = out.replace(pattern, replacement);
  return out;
}
