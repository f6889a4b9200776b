// Recognises the errors of node:fs by their errno name.

/** True when `error` is a system error with this errno name, "ENOENT" for example. */
export function isErrno(error: unknown, name: string): boolean {
  return error instanceof Error && (error as NodeJS.ErrnoException).code === name;
}
