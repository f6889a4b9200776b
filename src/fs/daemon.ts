// Composition root of dedupd: takes the root's lock, wires store, loader, transport and control server, and stops in
// order. One per root.
import { closeSync, rmSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { setFlagsFromString } from 'node:v8';
import { Command } from 'commander';
import { type Config, lazyDisabledReason, loadConfig } from '../config.ts';
import { DedupError, errorCode } from '../errors.ts';
import { createLogger, type Logger } from '../log.ts';
import type { Metrics } from '../metrics.ts';
import { DEFAULT_CONFIG_FILE, RootPaths, RunPaths } from '../paths.ts';
import { EXIT_LOCKED } from '../protocol.ts';
import { isRoot } from '../runtime.ts';
import { VERSION } from '../version.ts';
import { type ImagePuller, startControlServer } from './control-server.ts';
import { DataPlane } from './data-plane.ts';
import { type Exporter, startExporter } from './exporter.ts';
import type { LocalBlobs } from './registry/local-blobs.ts';
import { isStillLocked, lockRoot } from './root-lock.ts';

/**
 * Lets the engine count buffers together with its heap when it decides to collect. By default it collects for every few
 * buffers of a fetch: a third of the CPU time of reading a whole image (docs/measurements.md, "Memory").
 */
function countBuffersWithTheHeap(): void {
  // The flag came with the V8 of Node.js 24.
  if (Number(process.versions.node.split('.')[0]) >= 24)
    setFlagsFromString('--external-memory-accounted-in-global-limit');
}

/** Verbs are no part of the daemon: dedupd.ts hands them to others. */
const HELP = `
Without a verb it runs in the foreground. Verbs ask the dedupd that runs:
  warm   bring images, or what their starts read, to this node ahead; "dedupd warm --help" says how

Examples:
  dedupd --config /etc/dedup-snapshotter/config.json
  dedupd warm registry.example.com/app:2-lazy
`;

/** What dedupd does as containerd's client, of which the data path knows nothing. */
export interface ContainerdSide {
  /** Makes what answers PullImage. */
  readonly imagePuller: (parts: { readonly plane: DataPlane; readonly config: Config }) => ImagePuller;
  /** Layers in the content store of the containerd at this address. */
  readonly localBlobs: (address: string) => LocalBlobs;
}

/** Runs until a signal or Shutdown, then ends the process. */
export async function runDaemon(argv: readonly string[], containerd: ContainerdSide): Promise<void> {
  const program = new Command('dedupd')
    .description('Data daemon of dedup-snapshotter: fetches, verifies and stores what containers read.')
    .version(VERSION)
    .option('--config <file>', 'configuration file (default: /etc/dedup-snapshotter/config.json)')
    .addHelpText('after', HELP);
  countBuffersWithTheHeap();
  program.parse(argv as string[]);
  const configFile = program.opts<{ config?: string }>().config;
  try {
    const config = loadConfig(configFile ?? DEFAULT_CONFIG_FILE, configFile !== undefined);
    const log = createLogger('dedupd', { level: config.verbose ? 'debug' : config.log_level });
    try {
      await serve(config, log, containerd);
      // A transport may keep threads that only the end of the process takes away (fuse-native).
      process.exit(0);
    } catch (error) {
      log.fatal({ err: error }, 'dedupd ends');
      process.exit(errorCode(error) === 'LOCKED' ? EXIT_LOCKED : 1);
    }
  } catch (error) {
    // No configuration, no log: say it to whoever started us.
    process.stderr.write(`dedupd: ${error instanceof Error ? error.message : String(error)}\n`);
    process.exitCode = 1;
  }
}

/** Loaded only where it is wanted: the library takes 20 ms of a start, and memory for good. */
async function makeMetrics(config: Config): Promise<Metrics | undefined> {
  if (!config.exporterConfig.enable) return undefined;
  return new (await import('../metrics.ts')).Metrics();
}

function serveMetrics(metrics: Metrics, plane: DataPlane, config: Config, log: Logger): Promise<Exporter> {
  const { port, uriPrefix: path, address } = config.exporterConfig;
  metrics.collect(() => plane.numbers());
  return startExporter({ port, path, address, metrics, log });
}

/** How often it is looked whether the root is still ours. */
const ROOT_CHECK_MS = 1_000;

async function serve(config: Config, log: Logger, containerd: ContainerdSide): Promise<void> {
  if (!isRoot())
    throw new DedupError('NOT_ROOT', 'dedupd mounts file systems, which only root may do', { hint: 'use sudo' });
  const disabled = lazyDisabledReason(config);
  if (disabled !== undefined) throw new DedupError('FAILED_PRECONDITION', `dedupd has nothing to do: ${disabled}`);
  let requestShutdown = (): void => {};
  const stopped = new Promise<string>((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) process.once(signal, () => resolve(signal));
    requestShutdown = () => resolve('Shutdown');
  });
  const paths = new RootPaths(config.root);
  const run = new RunPaths(config.run_dir);
  const lock = await lockRoot(paths, run, log);
  const servesRoot = () => isStillLocked(paths, lock);
  try {
    await mkdir(run.dir, { recursive: true, mode: 0o700 });
    const metrics = await makeMetrics(config);
    await using plane = await DataPlane.open({
      config,
      paths,
      run,
      localBlobs: containerd.localBlobs(config.containerd_address),
      onWaited: metrics === undefined ? undefined : (ms) => metrics.waited(ms),
      log,
    });
    const server = await startControlServer({
      address: run.dedupdSocket,
      plane,
      pullImage: containerd.imagePuller({ plane, config }),
      version: VERSION,
      log,
      servesRoot,
      onShutdown: () => requestShutdown(),
    });
    const exporter = metrics && (await serveMetrics(metrics, plane, config, log));
    log.info({ root: config.root, transport: plane.transportName }, 'dedupd is ready');
    const watch = setInterval(() => {
      try {
        if (servesRoot()) return;
      } catch (error) {
        log.error({ err: error, root: config.root }, 'the root cannot be looked at');
        return;
      }
      log.warn({ root: config.root }, 'the root was emptied: this dedupd ends, another one begins anew');
      requestShutdown();
    }, ROOT_CHECK_MS);
    log.info({ reason: await stopped }, 'stopping');
    clearInterval(watch);
    await exporter?.close();
    await server.close();
    // The successor on an emptied root may listen there by now.
    if (servesRoot()) rmSync(run.dedupdSocket, { force: true });
    else plane.abandonMounts();
  } finally {
    closeSync(lock);
  }
  log.info('stopped');
}
