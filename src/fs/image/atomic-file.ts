// Makes a file appear complete and durable, or not at all. Used by the image builder.
import { closeSync, fsyncSync, openSync, renameSync, rmSync } from 'node:fs';
import { dirname } from 'node:path';

/** Name of the temporary file that process `pid` writes for `path`. */
export function temporaryFile(path: string, pid: number): string {
  return `${path}.tmp-${pid}`;
}

/**
 * Opens a temporary file beside `path` (0600), lets `write` fill it, syncs and renames it, syncs the directory. Returns
 * what `write` returns; when it throws, the temporary file is removed.
 */
export function writeFileAtomically<T>(path: string, write: (fd: number) => T): T {
  const temporary = temporaryFile(path, process.pid);
  try {
    const fd = openSync(temporary, 'w', 0o600);
    let result: T;
    try {
      result = write(fd);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(temporary, path);
    syncDirectory(dirname(path));
    return result;
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
}

function syncDirectory(path: string): void {
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
