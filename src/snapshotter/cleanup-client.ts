// Asks a running snapshots service to clean up, as containerd does after its own collection. Used by `gc`.
import {
  type ClientUnaryCall,
  credentials,
  Metadata,
  type ServiceClientConstructor,
  type ServiceError,
} from '@grpc/grpc-js';
import { wrapError } from '../errors.ts';
import { loadProto } from '../protocol.ts';
import { NOT_RELEASED_METADATA } from '../protocol-version.ts';

/** Directories of large images take their time. */
const DEADLINE_MS = 120_000;

/**
 * One Cleanup, to its end. Answers why what nobody uses was not released, undefined when it was. Errors: UNAVAILABLE,
 * with what the service said.
 */
export async function requestCleanup(address: string): Promise<string | undefined> {
  const packages = loadProto('snapshots.proto') as unknown as {
    containerd: { services: { snapshots: { v1: { Snapshots: ServiceClientConstructor } } } };
  };
  const client = new packages.containerd.services.snapshots.v1.Snapshots(
    `unix:${address}`,
    credentials.createInsecure(),
  );
  const cleanup = client.Cleanup as (
    request: object,
    metadata: Metadata,
    options: { deadline: number },
    done: (error: ServiceError | null) => void,
  ) => ClientUnaryCall;
  try {
    return await new Promise<string | undefined>((resolve, reject) => {
      const call = cleanup.call(client, {}, new Metadata(), { deadline: Date.now() + DEADLINE_MS }, (error) => {
        if (error !== null) reject(wrapError(error, `cleaning up through ${address}`, 'UNAVAILABLE'));
      });
      // After the answer, with what came behind it.
      call.once('status', ({ metadata }) => resolve(metadata.get(NOT_RELEASED_METADATA)[0]?.toString()));
    });
  } finally {
    client.close();
  }
}
