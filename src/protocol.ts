// What every process shares of gRPC: finds and loads the .proto files, serves on a unix socket of its own.
import { existsSync } from 'node:fs';
import { chmod } from 'node:fs/promises';
import { connect } from 'node:net';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type GrpcObject, loadPackageDefinition, type Server, ServerCredentials } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { DedupError, wrapError } from './errors.ts';

/** Exit status of a dedupd that found the root locked by another one. systemd/dedupd.service names it, too. */
export const EXIT_LOCKED = 3;

function locate(name: string): string {
  for (let directory = dirname(fileURLToPath(import.meta.url)); ; directory = dirname(directory)) {
    const file = join(directory, 'proto', name);
    if (existsSync(file)) return file;
    if (directory === dirname(directory))
      throw new DedupError('INTERNAL', `proto/${name} is missing beside the program`);
  }
}

/** The packages of `proto/<name>`. Names of fields stay as written, int64 become numbers, enums numbers. */
export function loadProto(name: string): GrpcObject {
  return loadPackageDefinition(
    loadSync(locate(name), {
      keepCase: true,
      longs: Number,
      enums: Number,
      defaults: true,
      arrays: true,
      objects: true,
      includeDirs: [dirname(locate(name))],
    }),
  );
}

/** True when a server accepts connections on a unix socket. Errors: UNAVAILABLE when it cannot be told. */
export function somebodyListens(address: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const socket = connect(address, () => {
      socket.destroy();
      resolve(true);
    });
    socket.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT' || error.code === 'ECONNREFUSED') resolve(false);
      else reject(wrapError(error, `looking at ${address}`, 'UNAVAILABLE'));
    });
  });
}

/**
 * Listens on a unix socket that only root may use. The returned function stops: calls under way get `closeTimeoutMs`.
 * Idempotent. Errors: UNAVAILABLE when the socket cannot be bound.
 */
export async function serveOn(server: Server, address: string, closeTimeoutMs: number): Promise<() => Promise<void>> {
  await new Promise<void>((resolve, reject) => {
    server.bindAsync(`unix:${address}`, ServerCredentials.createInsecure(), (error) => {
      if (error === null) resolve();
      else reject(wrapError(error, `listening on ${address}`, 'UNAVAILABLE'));
    });
  });
  await chmod(address, 0o600);
  let closing: Promise<void> | undefined;
  return () => {
    closing ??= new Promise((resolve) => {
      const timer = setTimeout(() => {
        server.forceShutdown();
        resolve();
      }, closeTimeoutMs);
      server.tryShutdown(() => {
        clearTimeout(timer);
        resolve();
      });
    });
    return closing;
  };
}
