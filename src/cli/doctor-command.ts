// `doctor`: what this kernel and machine can do, which transport follows, and what is wrong with the installation.
// Read-only; runs without root and says what it could not see then.
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, statfsSync } from 'node:fs';
import { dirname } from 'node:path';
import type { Command } from 'commander';
import { lazyDisabledReason, notYetInEffect } from '../config.ts';
import { native } from '../fs/native.ts';
import { atLeast, inspectMachine, type Machine, majorMinor } from '../fs/transport/machine.ts';
import { chooseTransport, obstacles } from '../fs/transport/select.ts';
import { DEFAULT_CONFIG_FILE, RunPaths } from '../paths.ts';
import { formatBytes } from '../units.ts';
import type { CliContext } from './context.ts';

type Verdict = 'ok' | 'note' | 'problem';

interface Finding {
  readonly verdict: Verdict;
  readonly subject: string;
  readonly text: string;
  /** What to do about a problem. */
  readonly advice?: string;
}

const CONTAINERD_CONFIG = '/etc/containerd/config.toml';

function commandOutput(command: string, args: string[]): string | undefined {
  try {
    return execFileSync(command, args, {
      encoding: 'utf8',
      timeout: 5_000,
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim();
  } catch {
    return undefined; // The command is missing or fails: the finding says so.
  }
}

function inflaterFinding(): Finding {
  if (native().inflater() === 'isa-l') return { verdict: 'ok', subject: 'gzip', text: 'decoded by ISA-L' };
  return {
    verdict: 'note',
    subject: 'gzip',
    text: 'decoded by zlib',
    advice: 'install ISA-L (Debian: libisal2, Fedora: isa-l): it decodes layers more than twice as fast',
  };
}

function machineFindings(machine: Machine): Finding[] {
  const found: Finding[] = [];
  const supported = atLeast(machine.version, 5, 4);
  found.push({
    verdict: supported ? (atLeast(machine.version, 5, 15) ? 'ok' : 'note') : 'problem',
    subject: 'kernel',
    text: `Linux ${machine.kernel}${supported && !atLeast(machine.version, 5, 15) ? ' (works; 5.15 or later is recommended)' : ''}`,
  });
  found.push({
    verdict: machine.root ? 'ok' : 'note',
    subject: 'user',
    text: machine.root ? 'root' : 'not root: mounts and devices could not be tried',
  });
  for (const [subject, present, advice] of [
    ['EROFS', machine.erofs, 'without it only ordinary images work; RHEL and CentOS 8 (and most 9) kernels lack it'],
    ['overlayfs', machine.overlay, 'load the overlay module'],
    ['/dev/fuse', machine.fuseDevice, 'load the fuse module'],
    ['/dev/loop-control', machine.loopControl, 'load the loop module'],
  ] as const) {
    if (present) found.push({ verdict: 'ok', subject, text: 'there' });
    else found.push({ verdict: 'problem', subject, text: 'missing or not accessible', advice });
  }
  found.push(inflaterFinding());
  return found;
}

function transportFinding(machine: Machine, context: CliContext): Finding {
  const off = lazyDisabledReason(context.config());
  if (off !== undefined) return { verdict: 'note', subject: 'transport', text: `none: ${off}` };
  const blocked = obstacles({ ...machine, root: true });
  if (blocked.length > 0) return { verdict: 'problem', subject: 'transport', text: 'none: ordinary images only' };
  const choice = chooseTransport({ ...machine, root: true }, context.config().transport);
  const layout =
    choice.layout === 'device'
      ? 'metadata file and store as device'
      : 'one device (kernel before 5.16 has no device table)';
  return { verdict: 'ok', subject: 'transport', text: `${choice.name}, ${layout}: ${choice.because}` };
}

/** What docs/clients.md asks of containerd's configuration, by containerd's version. */
function clientFindings(version: readonly [number, number], text: string, remapIds: boolean): Finding[] {
  const found: Finding[] = [];
  if (remapIds !== /capabilities\s*=\s*\[[^\]]*["']remap-ids["']/.test(text)) {
    found.push({
      verdict: 'problem',
      subject: 'user namespaces',
      text: `"remap_ids" is ${remapIds}, and containerd ${remapIds ? 'knows nothing of it' : 'relies on it'}`,
      advice: 'set "remap_ids" and capabilities = ["remap-ids"] of [proxy_plugins.dedup] together (docs/clients.md)',
    });
  }
  if (atLeast(version, 2, 0) && !text.includes('unpack_config')) {
    found.push({
      verdict: 'problem',
      subject: 'containerd unpack_config',
      text: 'containerd 2 unpacks into dedup only when told so',
      advice:
        "list overlayfs and dedup in [[plugins.'io.containerd.transfer.v1.local'.unpack_config]], with the platform",
    });
  }
  if (atLeast(version, 2, 1) && !/enable_remote_snapshot_annotations\s*=\s*["']true["']/.test(text)) {
    found.push({
      verdict: 'note',
      subject: 'containerd annotations',
      text: 'without them ctr image pull names no image: lazy only where the registry needs no port, or is a mirror',
      advice: `add to ${CONTAINERD_CONFIG}:  [proxy_plugins.dedup.exports]  enable_remote_snapshot_annotations = "true"`,
    });
  }
  if (!/disable_snapshot_annotations\s*=\s*false/.test(text) || !/snapshotter\s*=\s*["']dedup["']/.test(text)) {
    found.push({
      verdict: 'note',
      subject: 'containerd CRI',
      text: 'pulls of Kubernetes are not lazy',
      advice: 'for Kubernetes set snapshotter = "dedup" and disable_snapshot_annotations = false (docs/clients.md)',
    });
  }
  return found;
}

function containerdFindings(context: CliContext): Finding[] {
  const found: Finding[] = [];
  const version = commandOutput('containerd', ['--version']);
  if (version === undefined) {
    found.push({
      verdict: 'problem',
      subject: 'containerd',
      text: 'not found in PATH',
      advice: 'install containerd 1.6 or later',
    });
  } else {
    found.push({ verdict: 'ok', subject: 'containerd', text: version.split(' ').slice(2, 3).join(' ') || version });
  }
  const { address, containerd_address: socket } = context.config();
  found.push(
    existsSync(socket)
      ? { verdict: 'ok', subject: 'containerd socket', text: socket }
      : { verdict: 'note', subject: 'containerd socket', text: `${socket} is not there: containerd is not running` },
  );
  const text = existsSync(CONTAINERD_CONFIG) ? readFileSync(CONTAINERD_CONFIG, 'utf8') : '';
  const advice = `add to ${CONTAINERD_CONFIG}:  [proxy_plugins.dedup]  type = "snapshot"  address = "${address}"`;
  if (!text.includes('proxy_plugins') || !text.includes(address)) {
    found.push({
      verdict: 'note',
      subject: 'containerd plugin',
      text: `not configured in ${CONTAINERD_CONFIG}`,
      advice,
    });
  } else found.push({ verdict: 'ok', subject: 'containerd plugin', text: `configured in ${CONTAINERD_CONFIG}` });
  found.push(
    ...clientFindings(majorMinor(/\d+\.\d+.*/.exec(version ?? '')?.[0] ?? ''), text, context.config().remap_ids),
  );
  return found;
}

function storageFindings(context: CliContext, machine: Machine): Finding[] {
  const config = context.config();
  const found: Finding[] = [];
  let probe = config.root;
  while (!existsSync(probe)) probe = dirname(probe);
  const disk = statfsSync(probe);
  const free = disk.bavail * disk.bsize;
  found.push({
    verdict: free < 1024 ** 3 ? 'problem' : 'ok',
    subject: 'disk',
    text: `${formatBytes(free)} free below ${config.root}`,
    ...(free < 1024 ** 3 ? { advice: 'free some space: less than 1 GiB is left' } : {}),
  });
  const shared = { node: 'every image of this node', registry: 'images of one registry', repository: 'one repository' };
  found.push({
    verdict: 'ok',
    subject: 'dedup_scope',
    text: `chunks are shared among ${shared[config.dedup_scope]}${config.dedup_scope === 'node' ? ' (right for one tenant; narrow it for several)' : ''}`,
  });
  const socket = new RunPaths(config.run_dir).dedupdSocket;
  found.push({
    verdict: existsSync(socket) ? 'ok' : 'note',
    subject: 'dedupd',
    text: existsSync(socket)
      ? `socket ${socket}`
      : machine.root
        ? 'does not run (the service starts it)'
        : 'only root can see whether it runs',
  });
  const file = context.configFile ?? DEFAULT_CONFIG_FILE;
  if (existsSync(file)) {
    for (const text of notYetInEffect(JSON.parse(readFileSync(file, 'utf8')))) {
      found.push({ verdict: 'note', subject: 'configuration', text });
    }
  }
  return found;
}

const MARKS: Readonly<Record<Verdict, string>> = { ok: ' ok ', note: 'note', problem: 'FAIL' };

export function registerDoctorCommand(program: Command, context: CliContext): void {
  program
    .command('doctor')
    .description('say what this machine can do, which transport follows, and what to mend')
    .option('--json', 'findings as JSON')
    .addHelpText(
      'after',
      '\nExamples:\n  dedup-snapshotter doctor\n  dedup-snapshotter doctor --json | jq \'.[] | select(.verdict == "problem")\'\n\nThe exit status is 1 when something is wrong.\n',
    )
    .action((options: { json?: boolean }) => {
      const machine = inspectMachine();
      const findings = [
        ...machineFindings(machine),
        transportFinding(machine, context),
        ...containerdFindings(context),
        ...storageFindings(context, machine),
      ];
      if (options.json === true) process.stdout.write(`${JSON.stringify(findings, null, 2)}\n`);
      else {
        for (const { verdict, subject, text, advice } of findings) {
          process.stdout.write(`[${MARKS[verdict]}] ${subject.padEnd(24)} ${text}\n`);
          if (advice !== undefined) process.stdout.write(`${' '.repeat(7)}${' '.repeat(24)} -> ${advice}\n`);
        }
      }
      if (findings.some((finding) => finding.verdict === 'problem')) process.exitCode = 1;
    });
}
