// `bench`: measures cold starts of an image on this node, beside overlayfs and any other snapshotter. This file is the
// verb: options, checks and words for people; how things are measured is in src/bench/.
import { randomInt } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import type { Command } from 'commander';
import { type Contender, type ContenderNode, dedup, overlayfs, parsePeer, peer } from '../bench/contenders.ts';
import { describeMachine } from '../bench/machine.ts';
import { clearNamespace, OwnRegistries, ownNode, removeNamespace, requireSnapshotters } from '../bench/own-node.ts';
import { type Daemon, socketOwner } from '../bench/process-use.ts';
import { writeReport } from '../bench/report/write.ts';
import type { BenchLink, BenchResult, Ready } from '../bench/result.ts';
import { ResultFile } from '../bench/result-file.ts';
import { type BenchPlan, runBench } from '../bench/run.ts';
import { DedupError } from '../errors.ts';
import { RootPaths, RunPaths } from '../paths.ts';
import type { CliContext } from './context.ts';

interface BenchFlags {
  readonly lazyImage?: string;
  readonly snapshotters: string;
  readonly peer: readonly string[];
  readonly peerDir: readonly string[];
  readonly pairs: string;
  readonly readyLine?: string;
  readonly readyPort?: string;
  readonly readyExit?: boolean;
  readonly output: string;
  readonly address?: string;
  readonly containerdRoot: string;
  readonly user?: string;
  readonly seed?: string;
  readonly resume?: boolean;
  readonly timeoutSeconds: string;
}

const EXAMPLES = `
Examples:
  dedup-snapshotter bench registry.example.com/app:1 --lazy-image registry.example.com/app:1-lazy
                                                 the image's own command, until it ends
  dedup-snapshotter bench nginx:1.27 --lazy-image registry.example.com/nginx:1.27-lazy --ready-port 80
  dedup-snapshotter bench registry.example.com/app:1 --ready-line 'listening' -- /app/server --port 80
  dedup-snapshotter bench registry.example.com/app:1 \\
      --peer 'stargz=/run/containerd-stargz-grpc/containerd-stargz-grpc.sock,ctr-remote -a {address} -n {namespace} image rpull --plain-http {image}'
                                                 beside another snapshotter, registered with containerd as NAME

Every start is cold: caches are dropped (of the whole machine), and the image is removed after it. Everything happens in
containerd's namespace "dedup-bench"; an image that another namespace has makes a pull warm, which is said. Images are
pulled through a proxy on this machine that counts requests and bytes. Do nothing else on the machine meanwhile.
Results are in DIR: report.md, charts, and result.json, which is complete after every start.
`;

const collect = (value: string, previous: readonly string[]): string[] => [...previous, value];

export function registerBenchCommand(program: Command, context: CliContext): void {
  program
    .command('bench')
    .description("measure cold starts of an image with this node's containerd, beside overlayfs")
    .argument('<image>', 'image to start, as any snapshotter pulls it')
    .argument('[command...]', "what to run in it, after -- (default: the image's own command)")
    .option('--lazy-image <reference>', 'the same image with lazy indexes, for ours (default: the image itself)')
    .option('--snapshotters <names>', 'which of overlayfs and dedup to measure', 'overlayfs,dedup')
    .option('--peer <name=socket[,pull-command]>', 'another snapshotter; may be given several times', collect, [])
    .option('--peer-dir <name=directory>', 'where a peer keeps its files, for the figure of disk space', collect, [])
    .option('--pairs <number>', 'how often each snapshotter is measured', '10')
    .option('--ready-line <regular expression>', 'ready when it prints such a line')
    .option('--ready-port <port>', 'ready when it listens on this TCP port')
    .option('--ready-exit', 'ready when it has ended with status 0 (the default)')
    .option('--output <directory>', 'where results go', 'dedup-bench')
    .option('--address <socket>', "containerd's socket (default: as configured)")
    .option('--containerd-root <directory>', "containerd's root directory", '/var/lib/containerd')
    .option('-u, --user <user:password>', 'credentials for the registry')
    .option('--seed <number>', 'makes the order of the starts that of an earlier run')
    .option('--resume', 'go on with the run whose results are in the output directory')
    .option('--timeout-seconds <seconds>', 'most that a pull or a start may take', '600')
    .addHelpText('after', EXAMPLES)
    .action(async (image: string, command: readonly string[], flags: BenchFlags) => {
      context.requireRoot('bench');
      await bench(context, image, command, flags);
    });
}

/** Errors: INVALID_ARGUMENT. */
function wholeNumber(option: string, text: string, minimum: number, maximum: number): number {
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= minimum && value <= maximum) return value;
  throw new DedupError('INVALID_ARGUMENT', `${option} ${JSON.stringify(text)} is not a number`, {
    hint: `give a whole number from ${minimum} to ${maximum}`,
  });
}

function readyOf(flags: BenchFlags): Ready {
  const given = [flags.readyLine, flags.readyPort, flags.readyExit].filter((value) => value !== undefined);
  if (given.length > 1)
    throw new DedupError('INVALID_ARGUMENT', 'give one of --ready-line, --ready-port, --ready-exit');
  if (flags.readyPort !== undefined) {
    return { kind: 'port', port: wholeNumber('--ready-port', flags.readyPort, 1, 65_535) };
  }
  if (flags.readyLine === undefined) return { kind: 'exit' };
  try {
    new RegExp(flags.readyLine);
  } catch (cause) {
    throw new DedupError('INVALID_ARGUMENT', `--ready-line ${flags.readyLine} is not a regular expression`, { cause });
  }
  return { kind: 'line', pattern: flags.readyLine };
}

function ourDaemons(context: CliContext): Daemon[] {
  const { address, run_dir: runDir } = context.config();
  const sockets = { 'dedup-snapshotter': address, dedupd: new RunPaths(runDir).dedupdSocket };
  return Object.entries(sockets).flatMap(([name, socket]) => {
    const pid = socketOwner(socket);
    return pid === undefined ? [] : [{ name, pid }];
  });
}

function peerDirectories(flags: BenchFlags): Map<string, string[]> {
  const found = new Map<string, string[]>();
  for (const text of flags.peerDir) {
    const [, name = '', directory = ''] = /^([^=]+)=(\/.*)$/.exec(text) ?? [];
    if (directory === '') throw new DedupError('INVALID_ARGUMENT', `--peer-dir ${text} is not NAME=DIRECTORY`);
    found.set(name, [...(found.get(name) ?? []), directory]);
  }
  return found;
}

/** The snapshotters that were asked for. Errors: INVALID_ARGUMENT. */
function contendersOf(context: CliContext, node: ContenderNode, flags: BenchFlags): Contender[] {
  const own: Readonly<Record<string, () => Contender>> = {
    overlayfs: () => overlayfs(node),
    dedup: () =>
      dedup(node, {
        program: ourProgram(context),
        pullFlags: flags.user === undefined ? [] : ['--user', flags.user],
        root: context.config().root,
        daemons: () => Promise.resolve(ourDaemons(context)),
      }),
  };
  const contenders = flags.snapshotters.split(',').map((name) => {
    const make = own[name.trim()];
    if (make !== undefined) return make();
    throw new DedupError('INVALID_ARGUMENT', `--snapshotters: ${JSON.stringify(name)} is not overlayfs or dedup`, {
      hint: 'others are given with --peer NAME=SOCKET[,PULL-COMMAND]',
    });
  });
  const directories = peerDirectories(flags);
  for (const spec of flags.peer.map(parsePeer)) contenders.push(peer(node, spec, directories.get(spec.name) ?? []));
  return contenders;
}

async function requireRunning(context: CliContext, node: ContenderNode, contenders: readonly Contender[]) {
  await requireSnapshotters(
    node,
    contenders.map(({ plugin }) => plugin),
  );
  const { address, run_dir: runDir } = context.config();
  if (!contenders.some(({ name }) => name === 'dedup') || ourDaemons(context).length === 2) return;
  throw new DedupError('UNAVAILABLE', `dedup-snapshotter does not run with ${address} and ${runDir}`, {
    hint: 'start it, or name its configuration with --config FILE',
  });
}

async function bench(context: CliContext, image: string, command: readonly string[], flags: BenchFlags): Promise<void> {
  const config = context.config();
  const pairs = wholeNumber('--pairs', flags.pairs, 1, 10_000);
  const timeoutMs = wholeNumber('--timeout-seconds', flags.timeoutSeconds, 1, 86_400) * 1000;
  const path = join(flags.output, 'result.json');
  const resume = flags.resume === true;
  const earlier = resume ? await ResultFile.seedOf(path) : undefined;
  const seed =
    flags.seed === undefined ? (earlier ?? randomInt(2 ** 31)) : wholeNumber('--seed', flags.seed, 0, 2 ** 31);
  const ready = readyOf(flags);
  const say = (text: string): void => void process.stderr.write(`${text}\n`);
  const node = await ownNode({
    address: flags.address ?? config.containerd_address,
    containerdRoot: flags.containerdRoot,
    ...(flags.user === undefined ? {} : { user: flags.user }),
  });
  const contenders = contendersOf(context, node, flags);
  await requireRunning(context, node, contenders);

  await using registries = new OwnRegistries(context.registryOptions(), flags.user);
  const lazy = flags.lazyImage ?? image;
  const { target, layers, tls } = await registries.target({ name: image, plain: image, lazy, command, ready });
  const link: BenchLink = { name: 'as it is', tls };
  const fresh: BenchResult = {
    format: 'dedup-snapshotter-bench/1',
    startedAt: new Date().toISOString(),
    seed,
    machine: await describeMachine(),
    images: [target.image],
    links: [link],
    snapshotters: contenders.map(({ name }) => name),
    starts: [],
    floors: [],
    resources: [],
  };
  const file = await ResultFile.open(path, fresh, { resume });
  const yardstick = contenders.find(({ name }) => name === 'overlayfs');
  const ours = contenders.find(({ name }) => name === 'dedup');
  const indexDirectory = new RootPaths(config.root).layers;
  const both = yardstick !== undefined && ours !== undefined;
  const interrupt = new AbortController();
  const onSignal = (): void => interrupt.abort(new DedupError('CANCELLED', 'interrupted', { hint: RESUME_HINT }));
  process.once('SIGINT', onSignal);
  process.once('SIGTERM', onSignal);
  say(`seed ${seed}, ${availableParallelism()} cores, results in ${flags.output}`);
  await clearNamespace(node);
  try {
    const plan: BenchPlan = {
      seed,
      cells: [{ target, layers, link, pairs }],
      contenders,
      node,
      meter: registries,
      timeoutMs,
      signal: interrupt.signal,
      enterLink: () => Promise.resolve(),
      ...(both ? { floor: { probe: registries.probe(image), yardstick, ours, indexDirectory } } : {}),
      sampler: { intervalMs: 100, networkBytes: () => registries.bytes, foreign: () => [] },
      say,
    };
    await runBench(plan, file);
  } catch (error) {
    // What was being done when the signal came fails too; that is not the reason.
    interrupt.signal.throwIfAborted();
    throw error;
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
    await removeNamespace(node);
    if (file.result.starts.length > 0) {
      process.stdout.write(`${await writeReport(file.result, flags.output)}\n`);
    }
  }
}

const RESUME_HINT = 'what was measured is kept; go on with --resume and the same --output';

/** How this program is called again, with the same runtime and configuration. */
function ourProgram(context: CliContext): string[] {
  const config = context.configFile === undefined ? [] : ['--config', context.configFile];
  return [process.execPath, ...process.execArgv, process.argv[1] ?? 'dedup-snapshotter', ...config];
}
