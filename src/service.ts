// Composition root of the service: wires metastore, snapshotter and gRPC server, keeps a dedupd running, and stops in
// order. Carries no image bytes.
import { mkdir, readFile } from 'node:fs/promises';
import { type Config, conversionDisabledReason, lazyDisabledReason, notYetInEffect } from './config.ts';
import { DedupError, wrapError } from './errors.ts';
import { parseReference } from './fs/registry/reference.ts';
import { createLogger, type Logger } from './log.ts';
import { DEFAULT_CONFIG_FILE, RootPaths, RunPaths } from './paths.ts';
import { ManifestSearch } from './pull/manifest-search.ts';
import { isRoot } from './runtime.ts';
import { DedupdClient } from './snapshotter/dedupd-client.ts';
import { DedupdSupervisor } from './snapshotter/dedupd-supervisor.ts';
import { claimAddress, startSnapshotsServer } from './snapshotter/grpc-server.ts';
import { type ImageMounter, noImages } from './snapshotter/images.ts';
import { openMetastore } from './snapshotter/metastore-client.ts';
import { Snapshotter } from './snapshotter/snapshotter.ts';

const AFTER_START_MS = 2_000;

/** Logs every key of the file that nothing uses yet: no key is ignored silently. */
export async function reportUnusedKeys(configFile: string | undefined, log: Logger): Promise<void> {
  let text: string;
  try {
    text = await readFile(configFile ?? DEFAULT_CONFIG_FILE, 'utf8');
  } catch {
    return; // No file: nothing was asked for. loadConfig has refused an unreadable one.
  }
  for (const sentence of notYetInEffect(JSON.parse(text))) log.warn(sentence);
}

/** Resolves at the first signal that asks this process to stop. */
export function stopSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) process.once(signal, () => resolve(signal));
  });
}

/**
 * Runs until a signal. Errors: NOT_ROOT, LOCKED when one runs already, UNAVAILABLE, STORE_IO. dedupd goes on when this
 * ends.
 */
export async function runService(config: Config, configFile: string | undefined): Promise<void> {
  const log = createLogger('dedup-snapshotter', { level: config.verbose ? 'debug' : config.log_level });
  if (!isRoot()) {
    throw new DedupError('NOT_ROOT', 'the service mounts file systems for containerd, which only root may do', {
      hint: 'run it with sudo, or through systemd',
    });
  }
  const stopped = stopSignal();
  await reportUnusedKeys(configFile, log);
  await claimAddress(config.address);
  const paths = new RootPaths(config.root);
  await mkdir(paths.root, { recursive: true, mode: 0o700 });

  const client: DedupdClient = new DedupdClient({
    address: new RunPaths(config.run_dir).dedupdSocket,
    root: config.root,
    revive: () => supervisor.revive(),
  });
  const supervisor = new DedupdSupervisor({ config, configFile, client, log });
  const disabled = lazyDisabledReason(config);
  if (disabled === undefined) {
    try {
      await supervisor.ensure();
    } catch (error) {
      // Ordinary layers work without dedupd; lazy ones answer UNAVAILABLE with the reason until it is back.
      log.error({ err: error }, 'dedupd is not running: lazy layers are unavailable');
    }
    supervisor.watch();
  }
  const images: ImageMounter = disabled === undefined ? client : noImages(disabled);
  const metastore = await openMetastore(paths.metadataDb);
  const snapshotter = new Snapshotter({
    paths,
    metastore,
    images,
    sourceOf: (reference) => {
      const { host, path } = parseReference(reference);
      return { host, repository: path };
    },
    finder: disabled === undefined ? new ManifestSearch(config.containerd_address) : undefined,
    log,
    remapIds: config.remap_ids,
    convert: { off: conversionDisabledReason(config) },
  });
  try {
    await snapshotter.start();
    const server = await startSnapshotsServer({ address: config.address, snapshotter, log });
    // What starting left behind is not needed again; collected now, it does not stay for hours.
    setTimeout(() => globalThis.gc?.(), AFTER_START_MS).unref();
    log.info({ signal: await stopped }, 'stopping');
    await server.close();
  } catch (error) {
    throw wrapError(error, 'running the snapshots service');
  } finally {
    supervisor.close();
    await snapshotter.close();
    await metastore.close();
    client.close();
  }
}
