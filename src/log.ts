// Logging: pino, JSON lines, with secrets removed before anything is written. Every process makes one logger here.
import { type Logger, pino } from 'pino';
import { DedupError } from './errors.ts';

export type { Logger };

/** Field names whose values never reach a log line. */
const SECRET_PATHS = ['password', 'token', 'auth', 'authorization', 'credentials', 'secret'].flatMap((name) => [
  name,
  `*.${name}`,
]);

export interface LogOptions {
  readonly level: 'trace' | 'debug' | 'info' | 'warn' | 'error';
  /** Descriptor written to; 1 under systemd, so that journald sees it. */
  readonly fd?: number;
}

/** A logger named after the process. Lines are written synchronously: the last words of a dying process count. */
export function createLogger(name: string, options: LogOptions): Logger {
  return pino(
    {
      name,
      level: options.level,
      base: { pid: process.pid },
      redact: { paths: SECRET_PATHS, censor: '[removed]' },
      serializers: { err: serializeError },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    },
    pino.destination({ fd: options.fd ?? 1, sync: true }),
  );
}

/** Message, code, details and causes of an error; no stack for the expected ones. */
function serializeError(error: unknown): unknown {
  if (!(error instanceof Error)) return String(error);
  const cause = error.cause === undefined ? {} : { cause: serializeError(error.cause) };
  if (error instanceof DedupError) {
    const stack = error.code === 'INTERNAL' ? { stack: error.stack } : {};
    return { code: error.code, message: error.message, hint: error.hint, ...error.details, ...stack, ...cause };
  }
  return { type: error.name, message: error.message, stack: error.stack, ...cause };
}
