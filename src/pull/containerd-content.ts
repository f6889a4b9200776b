// Layers in containerd's own content store, for dedupd to read instead of asking a registry again. Wired by the
// composition root (dedupd.ts); only reads.
import { errorCode } from '../errors.ts';
import type { LocalBlobs } from '../fs/registry/local-blobs.ts';
import { ContainerdClient } from './containerd-client.ts';

/** `address`: containerd's socket. */
export function containerdContent(address: string): LocalBlobs {
  return async (namespace, digest, signal) => {
    const client = new ContainerdClient({ address, namespace });
    let found: { size: number } | undefined;
    try {
      found = await client.contentInfo(digest, { signal });
    } catch (error) {
      client.close();
      if (errorCode(error) === 'UNAVAILABLE' || errorCode(error) === 'DEADLINE') return undefined;
      throw error;
    }
    if (found === undefined) {
      client.close();
      return undefined;
    }
    return {
      size: found.size,
      stream: client.streamContent(digest, { signal }),
      [Symbol.asyncDispose]: async () => client.close(),
    };
  };
}
