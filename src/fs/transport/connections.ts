// FUSE connections by the number that the kernel's control file system gives them. Ends one whose server cannot answer any
// more and cannot end either (root-lock.ts); a session that lives ends its own (native/fuse/session.cc).
import { closeSync, openSync, writeSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MNT_DETACH, native } from '../native.ts';

/**
 * Fails everything that waits for a connection and all that comes after. `controlDir` is made, and holds the control file
 * system meanwhile: /sys/fs/fuse/connections is empty on many machines. `isStill` is asked once the connection's control file
 * is open, which stands for that connection and no later one of its number. False when there is none, or it is not any more.
 * Errors: KERNEL, those of node:fs and of `isStill`.
 */
export async function abortConnection(
  connection: number,
  controlDir: string,
  isStill: () => Promise<boolean>,
): Promise<boolean> {
  await mkdir(controlDir, { recursive: true, mode: 0o700 });
  await native().mount({ source: 'none', target: controlDir, fstype: 'fusectl', flags: 0, data: '' });
  try {
    const control = openSync(join(controlDir, String(connection), 'abort'), 'w');
    try {
      if (!(await isStill())) return false;
      writeSync(control, '1');
    } finally {
      closeSync(control);
    }
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  } finally {
    await native().umount(controlDir, MNT_DETACH);
  }
}
