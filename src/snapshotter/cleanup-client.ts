// Asks a running snapshots service to clean up, as containerd does after its own collection. Used by `gc`.
import { credentials, Metadata, type ServiceClientConstructor, type ServiceError } from '@grpc/grpc-js';
import { wrapError } from '../errors.ts';
import { loadProto } from '../protocol.ts';

/** Directories of large images take their time. */
const DEADLINE_MS = 120_000;

/** One Cleanup, to its end. Errors: UNAVAILABLE, with what the service said. */
export async function requestCleanup(address: string): Promise<void> {
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
  ) => void;
  try {
    await new Promise<void>((resolve, reject) => {
      cleanup.call(client, {}, new Metadata(), { deadline: Date.now() + DEADLINE_MS }, (error) => {
        if (error === null) resolve();
        else reject(wrapError(error, `cleaning up through ${address}`, 'UNAVAILABLE'));
      });
    });
  } finally {
    client.close();
  }
}
