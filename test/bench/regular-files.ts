// The regular files of an unpacked tree and what they hold, read with nothing of ours: what benchmarks of space compare
// the store with.
import { createHash } from 'node:crypto';
import { closeSync, lstatSync, openSync, readdirSync, readSync } from 'node:fs';
import { join } from 'node:path';
import { MiB } from '../../src/units.ts';

export interface RegularFile {
  /** Below the tree, without a leading slash. */
  readonly path: string;
  readonly bytes: number;
}

/** Every name of every regular file, in no particular order. Symlinks are not followed; other files are left out. */
export function* regularFiles(tree: string, below = ''): Generator<RegularFile> {
  for (const entry of readdirSync(join(tree, below), { withFileTypes: true })) {
    const path = below === '' ? entry.name : `${below}/${entry.name}`;
    if (entry.isDirectory()) yield* regularFiles(tree, path);
    else if (entry.isFile()) yield { path, bytes: lstatSync(join(tree, path)).size };
  }
}

const buffer = Buffer.allocUnsafe(4 * MiB);

/** SHA-256 of a file, and of each of its parts of 4 MiB, in hexadecimal. */
export function fileDigests(path: string): { readonly whole: string; readonly parts: readonly Part[] } {
  const whole = createHash('sha256');
  const parts: Part[] = [];
  const fd = openSync(path, 'r');
  try {
    for (;;) {
      let bytes = 0;
      for (let read = -1; read !== 0 && bytes < buffer.length; bytes += read)
        read = readSync(fd, buffer, bytes, buffer.length - bytes, null);
      if (bytes === 0) break;
      const part = buffer.subarray(0, bytes);
      whole.update(part);
      parts.push({ bytes, digest: createHash('sha256').update(part).digest('hex'), zeros: isZero(part) });
    }
  } finally {
    closeSync(fd);
  }
  return { whole: whole.digest('hex'), parts };
}

export interface Part {
  readonly bytes: number;
  readonly digest: string;
  /** Nothing but zeros: a hole to a file system that knows them. */
  readonly zeros: boolean;
}

function isZero(bytes: Buffer): boolean {
  return bytes[0] === 0 && bytes.subarray(1).equals(bytes.subarray(0, -1));
}
