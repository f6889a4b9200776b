// Mounts EROFS images over loop devices for tests and takes everything down again. Uses util-linux, not our own addon,
// so that image tests stand alone.
import { execFileSync } from 'node:child_process';
import { mkdirSync, rmdirSync } from 'node:fs';

export interface TestMount {
  readonly path: string;
  /** Unmounts and detaches; idempotent. */
  close(): void;
}

function attach(file: string, offset = 0): string {
  const args = ['-f', '--show', '-r', ...(offset > 0 ? ['-o', String(offset)] : []), file];
  return execFileSync('losetup', args, { encoding: 'utf8' }).trim();
}

/**
 * Mounts `image` read-only at a new directory `path`, with `device` as extra device when given. `offset`: where the
 * file system starts in `image`, bytes.
 */
export function mountErofs(image: string, path: string, options: { device?: string; offset?: number } = {}): TestMount {
  const loops: string[] = [];
  const undo: (() => void)[] = [() => rmdirSync(path)];
  let closed = false;
  const close = (): void => {
    if (closed) return;
    closed = true;
    for (const step of undo.reverse()) step();
  };
  mkdirSync(path);
  try {
    for (const [file, offset] of [
      [image, options.offset],
      ...(options.device === undefined ? [] : [[options.device, 0] as const]),
    ] as const) {
      const loop = attach(file, offset);
      loops.push(loop);
      undo.push(() => execFileSync('losetup', ['-d', loop]));
    }
    const data = loops[1] === undefined ? 'ro' : `ro,device=${loops[1]}`;
    execFileSync('mount', ['-t', 'erofs', '-o', data, loops[0]!, path]);
    undo.push(() => execFileSync('umount', [path]));
  } catch (error) {
    close();
    throw error;
  }
  return { path, close };
}
