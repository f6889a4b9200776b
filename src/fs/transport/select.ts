// Facts of the machine and configuration in, one transport out. The only file that knows every transport by name.
import type { Config } from '../../config.ts';
import { DedupError } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import { FuseTransport, type FuseTransportOptions } from './fuse.ts';
import { FuseNativeTransport } from './fuse-native.ts';
import { atLeast, type Machine } from './machine.ts';
import type { ErofsLayoutKind, Transport, TransportName } from './transport.ts';

export interface TransportChoice {
  readonly name: TransportName;
  readonly layout: ErofsLayoutKind;
  /** Why this one, for the log and doctor. */
  readonly because: string;
}

/** Everything that keeps this machine from loading lazily, as sentences; empty when nothing does. */
export function obstacles(machine: Machine): string[] {
  const found: string[] = [];
  if (!machine.root) found.push('not root: only root can mount images and attach loop devices');
  if (!atLeast(machine.version, 5, 4)) found.push(`kernel ${machine.kernel} is older than 5.4, the first with EROFS`);
  if (!machine.erofs) {
    found.push('the kernel has no EROFS (RHEL and CentOS 8, and most of 9): ordinary images work, lazy ones do not');
  }
  if (!machine.overlay) found.push('the kernel has no overlayfs');
  if (!machine.fuseDevice) found.push('/dev/fuse is missing or not accessible: load the fuse module');
  if (!machine.loopControl) found.push('/dev/loop-control is missing or not accessible: load the loop module');
  if (machine.pageBytes !== BLOCK_BYTES && !atLeast(machine.version, 6, 3)) {
    found.push(`pages of ${machine.pageBytes} bytes: EROFS before 6.3 mounts only images with blocks of that size`);
  }
  return found;
}

/** The transport for this machine. Errors: KERNEL_UNSUPPORTED with every reason. */
export function chooseTransport(machine: Machine, wanted: Config['transport']): TransportChoice {
  const reasons = obstacles(machine);
  if (reasons.length > 0) {
    throw new DedupError('KERNEL_UNSUPPORTED', `this machine cannot load images lazily: ${reasons.join('; ')}`, {
      hint: '`dedup-snapshotter doctor` explains; ordinary images work all the same',
    });
  }
  const layout = atLeast(machine.version, 5, 16) ? 'device' : 'flat';
  switch (wanted) {
    case 'auto':
      return { name: 'fuse', layout, because: 'the best transport of this version that this kernel has' };
    case 'fuse':
      return { name: 'fuse', layout, because: 'configured' };
    case 'fuse-native':
      return { name: 'fuse-native', layout, because: 'configured; one miss at a time: slower than fuse' };
  }
}

/** Starts the chosen transport. Errors: those of its start. */
export async function openTransport(choice: TransportChoice, options: FuseTransportOptions): Promise<Transport> {
  switch (choice.name) {
    case 'fuse':
      return await FuseTransport.start(options);
    case 'fuse-native':
      return await FuseNativeTransport.start(options);
  }
}
