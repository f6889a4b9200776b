// The unix socket that containerd and the command line talk to: takes the address, serves the snapshots service and our
// own on it, gives it back. Called by the composition root.
import { mkdir, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { Server, type ServiceClientConstructor } from '@grpc/grpc-js';
import type { Logger } from 'pino';
import { DedupError } from '../errors.ts';
import { loadProto, serveOn, somebodyListens } from '../protocol.ts';
import { MiB } from '../units.ts';
import { conversionsService } from './conversions-service.ts';
import { snapshotsService } from './snapshots-service.ts';
import type { Snapshotter } from './snapshotter.ts';

export interface SnapshotsServerOptions {
  /** Path of the unix socket. */
  readonly address: string;
  readonly snapshotter: Snapshotter;
  readonly log: Logger;
}

/** Labels of a pull can be large; messages of containerd stay below its own limit of 16 MiB. */
const MAX_MESSAGE_BYTES = 16 * MiB;
/** How long calls under way may take when the server is closed. */
const CLOSE_TIMEOUT_MS = 5000;

/**
 * Serves until closed. A socket left by a dead server is replaced.
 * Errors: LOCKED when another server answers on the address; UNAVAILABLE when it cannot be bound.
 */
export async function startSnapshotsServer(options: SnapshotsServerOptions): Promise<{ close(): Promise<void> }> {
  const { address, snapshotter, log } = options;
  await claimAddress(address);
  const packages = loadProto('snapshots.proto') as unknown as {
    containerd: { services: { snapshots: { v1: { Snapshots: ServiceClientConstructor } } } };
  };
  const server = new Server({
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
    'grpc.max_send_message_length': MAX_MESSAGE_BYTES,
  });
  server.addService(packages.containerd.services.snapshots.v1.Snapshots.service, snapshotsService(snapshotter, log));
  const ours = loadProto('service.proto') as unknown as { dedup: { v1: { Conversions: ServiceClientConstructor } } };
  server.addService(ours.dedup.v1.Conversions.service, conversionsService(snapshotter, log));
  const close = await serveOn(server, address, CLOSE_TIMEOUT_MS);
  log.info({ address }, 'snapshots service is ready');
  return { close };
}

/**
 * Makes the directory and removes a socket nobody listens on. Called before the database is touched, too: a second
 * service must not tidy up below the first. Errors: LOCKED when another server answers; UNAVAILABLE.
 */
export async function claimAddress(address: string): Promise<void> {
  await mkdir(dirname(address), { recursive: true, mode: 0o711 });
  if (await somebodyListens(address)) {
    throw new DedupError('LOCKED', `another server answers on ${address}`, {
      hint: 'stop it, or configure another address',
    });
  }
  await rm(address, { force: true });
}
