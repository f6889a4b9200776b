// Lines of /proc/PID/mountinfo (proc(5)). A leaf: the data path looks for its own mounts, the snapshotter for everybody's.

export interface MountLine {
  /** As in "mnt_id" of /proc/PID/fdinfo. */
  readonly id: string;
  /** major:minor of its file system. */
  readonly device: string;
  /** Directory of its file system that is mounted. */
  readonly root: string;
  readonly mountPoint: string;
  readonly fstype: string;
  /** Of the file system, not of the mount. */
  readonly options: string;
}

/** Blanks, newlines and backslashes are written as octal numbers (fs/proc_namespace.c, mangle). */
function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
}

/** The mounts of a table, oldest first. */
export function parseMountinfo(text: string): MountLine[] {
  const lines: MountLine[] = [];
  for (const line of text.split('\n')) {
    const fields = line.split(' ');
    const [id = '', , device = '', root, mountPoint] = fields;
    if (root === undefined || mountPoint === undefined) continue;
    // Optional fields end with a dash; type, source and options of the file system follow.
    const dash = fields.indexOf('-', 6);
    lines.push({
      id,
      device,
      root: unescapeOctal(root),
      mountPoint: unescapeOctal(mountPoint),
      fstype: fields[dash + 1] ?? '',
      options: unescapeOctal(fields[dash + 3] ?? ''),
    });
  }
  return lines;
}
