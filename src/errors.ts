// The one error class of the project and the register of its codes: what each means, which gRPC status and errno it
// becomes at the edges, and whether trying again can help. Every layer throws these; only the edges map them.

/** gRPC status numbers used by this project (grpc/status codes). */
export const GrpcStatus = {
  cancelled: 1,
  unknown: 2,
  invalidArgument: 3,
  deadlineExceeded: 4,
  notFound: 5,
  alreadyExists: 6,
  permissionDenied: 7,
  resourceExhausted: 8,
  failedPrecondition: 9,
  aborted: 10,
  unimplemented: 12,
  internal: 13,
  unavailable: 14,
  dataLoss: 15,
  unauthenticated: 16,
} as const;

interface CodeInfo {
  /** gRPC status number sent to a client. */
  readonly grpc: number;
  /** errno name answered to the kernel. */
  readonly errno: 'EIO' | 'ENOENT' | 'EINVAL' | 'ENOSPC' | 'EACCES' | 'ETIMEDOUT' | 'EEXIST' | 'EBUSY';
  /** True when the same call may succeed later without anything being changed. */
  readonly retryable: boolean;
  /** One sentence for docs/errors.md. */
  readonly doc: string;
}

function code(grpc: keyof typeof GrpcStatus, errno: CodeInfo['errno'], retryable: boolean, doc: string): CodeInfo {
  return Object.freeze({ grpc: GrpcStatus[grpc], errno, retryable, doc });
}

/** Register of all error codes. docs/errors.md is generated from it. */
export const ERROR_CODES = Object.freeze({
  INVALID_ARGUMENT: code('invalidArgument', 'EINVAL', false, 'A value given by the caller is malformed.'),
  INVALID_CONFIG: code('invalidArgument', 'EINVAL', false, 'The configuration file has an unknown key or a bad value.'),
  INVALID_REFERENCE: code('invalidArgument', 'EINVAL', false, 'An image reference cannot be parsed.'),
  NOT_FOUND: code('notFound', 'ENOENT', false, 'The named thing does not exist.'),
  ALREADY_EXISTS: code('alreadyExists', 'EEXIST', false, 'The named thing exists already.'),
  FAILED_PRECONDITION: code('failedPrecondition', 'EBUSY', false, 'The thing is in a state that forbids the call.'),
  UNIMPLEMENTED: code('unimplemented', 'EINVAL', false, 'The call exists but is not offered.'),
  UNAVAILABLE: code('unavailable', 'EIO', true, 'A process or service that is needed does not answer.'),
  DEADLINE: code('deadlineExceeded', 'ETIMEDOUT', true, 'The call took longer than it may.'),
  CANCELLED: code('cancelled', 'EIO', true, 'The caller or a shutdown ended the call.'),
  CLOSED: code('failedPrecondition', 'EIO', false, 'A resource was used after it was closed.'),
  REGISTRY_HTTP: code('unavailable', 'EIO', true, 'The registry answered with an error or the connection broke.'),
  REGISTRY_NOT_FOUND: code('notFound', 'EIO', false, 'The registry does not have the manifest or blob.'),
  REGISTRY_AUTH: code('unauthenticated', 'EIO', false, 'The registry refused the credentials, or none are known.'),
  REGISTRY_PROTOCOL: code('internal', 'EIO', false, 'The registry answered something that contradicts the protocol.'),
  DIGEST_MISMATCH: code(
    'dataLoss',
    'EIO',
    false,
    'Bytes do not have the digest they are named by. Never retried into success.',
  ),
  INDEX_INVALID: code('dataLoss', 'EIO', false, 'A layer index is truncated, malformed, or contradicts itself.'),
  LAYER_INVALID: code('dataLoss', 'EIO', false, 'A layer is not a well-formed tar stream or does not decompress.'),
  LAYER_NOT_LAZY: code('failedPrecondition', 'EIO', false, 'The layer cannot be loaded lazily, for the reason given.'),
  IMAGE_INVALID: code('dataLoss', 'EIO', false, 'An image cannot be expressed as EROFS, or its metadata is malformed.'),
  TRACE_INVALID: code('invalidArgument', 'EIO', false, 'A file or artifact is not an access trace that can be read.'),
  STORE_IO: code('internal', 'EIO', true, 'Reading or writing the node store failed.'),
  STORE_FULL: code('resourceExhausted', 'ENOSPC', true, 'The disk or the store address space is full.'),
  STORE_CORRUPT: code('dataLoss', 'EIO', false, 'The store and its database disagree.'),
  KERNEL: code('internal', 'EIO', false, 'A system call failed; errno and path are part of the message.'),
  KERNEL_UNSUPPORTED: code('failedPrecondition', 'EIO', false, 'This kernel lacks what the operation needs.'),
  NOT_ROOT: code('permissionDenied', 'EACCES', false, 'The operation needs root.'),
  LOCKED: code('failedPrecondition', 'EBUSY', true, 'Another process holds the lock on the root directory.'),
  INTERNAL: code('internal', 'EIO', false, 'A bug: an invariant of the program does not hold.'),
} as const);

export type ErrorCode = keyof typeof ERROR_CODES;

/** Facts attached to an error, shown in logs. Never put a secret in here. */
export type ErrorDetails = Readonly<Record<string, string | number | boolean | undefined>>;

/**
 * The base class of every error this project throws.
 * `message` says what was being done and to what; `cause` keeps the underlying error; `hint` says what to do about it.
 */
export class DedupError extends Error {
  override readonly name = 'DedupError';
  readonly code: ErrorCode;
  readonly hint: string | undefined;
  readonly details: ErrorDetails;

  constructor(
    code: ErrorCode,
    message: string,
    options: { cause?: unknown; hint?: string; details?: ErrorDetails } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.hint = options.hint;
    this.details = options.details ?? {};
  }

  get info(): CodeInfo {
    return ERROR_CODES[this.code];
  }
}

/** Wraps `cause` with what was being done. Keeps the code of a DedupError unless `code` is given; else INTERNAL. */
export function wrapError(cause: unknown, doing: string, code?: ErrorCode): DedupError {
  const inner = cause instanceof DedupError ? cause : undefined;
  const message = `${doing}: ${cause instanceof Error ? cause.message : String(cause)}`;
  return new DedupError(code ?? inner?.code ?? 'INTERNAL', message, {
    cause,
    ...(inner?.hint === undefined ? {} : { hint: inner.hint }),
    ...(inner === undefined ? {} : { details: inner.details }),
  });
}

/** The code of any thrown value: its own for a DedupError, INTERNAL otherwise. */
export function errorCode(error: unknown): ErrorCode {
  return error instanceof DedupError ? error.code : 'INTERNAL';
}
