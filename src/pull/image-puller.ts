// Answers PullImage of dedupd's control socket: the request's words into a pull, the pull's events into messages. Wired by
// the composition root (dedupd.ts); the data path below src/fs imports none of this.
import { DedupError } from '../errors.ts';
import type { ImagePuller, PullImageEventMessage, PullImageMessage } from '../fs/control-server.ts';
import type { Repository } from '../fs/registry/blob-reader.ts';
import { hostPlatform, parsePlatform } from '../fs/registry/image-manifest.ts';
import { type ImageReference, parseReference } from '../fs/registry/reference.ts';
import { RootPaths } from '../paths.ts';
import { ContainerdClient } from './containerd-client.ts';
import { DEFAULT_LEASE_LIFETIME_MS, type ManifestLayer, type PullEvent, pullImage, type Readiness } from './pull.ts';

/** What a pull needs of the data path; implemented by DataPlane. */
export interface PullPlane {
  readonly root: string;
  /** A repository read with these credentials (user:password), or with those known when there are none. */
  repository(name: ImageReference, userAndPassword: string): Repository;
  /** Keeps credentials for lazy reads. */
  giveCredentials(host: string, userAndPassword: string): void;
  /** Begins to fetch what the layers need to be lazy. */
  imageAhead(
    manifest: ManifestLayer['digest'],
    layers: readonly ManifestLayer[],
    config: Promise<Buffer>,
    source: ImageReference,
    onRead: (position: number, bytesDone: number) => void,
    wholeFrom: Promise<number>,
  ): { readonly layers: readonly (Promise<Readiness> | undefined)[]; ended(): void };
}

/** Progress of a transfer is told this often at most, milliseconds. */
const PROGRESS_MS = 100;

export function imagePuller(parts: {
  readonly plane: PullPlane;
  readonly config: { readonly containerd_address: string };
}): ImagePuller {
  /** Snapshotters that were found to be this product's or not, by containerd's address and their name. */
  const ours = new Map<string, boolean>();
  return async (request, show, signal) => {
    const reference = parseReference(request.reference);
    try {
      await pull(parts.plane, reference, request, parts.config.containerd_address, ours, show, signal);
    } catch (error) {
      if (!signal.aborted) throw error;
      throw new DedupError('CANCELLED', `pulling ${reference.host}/${reference.path} was interrupted`, {
        cause: error,
        hint: 'nothing was left behind; run it again',
      });
    }
  };
}

async function pull(
  plane: PullPlane,
  reference: ImageReference,
  request: PullImageMessage,
  defaultAddress: string,
  ours: Map<string, boolean>,
  show: (event: PullImageEventMessage) => void,
  signal: AbortSignal,
): Promise<void> {
  const { credentials, namespace, snapshotter } = request;
  const platform = request.platform === '' ? hostPlatform() : parsePlatform(request.platform);
  const repository = plane.repository(reference, credentials);
  const address = request.containerd_address === '' ? defaultAddress : request.containerd_address;
  const client = new ContainerdClient({ address, namespace });
  let ahead: ReturnType<PullPlane['imageAhead']> | undefined;
  const showEvent = messages(show);
  const remember = (): void => {
    // They have proven to be right, and the first lazy read may come before the pull ends.
    if (credentials !== '') plane.giveCredentials(reference.host, credentials);
  };
  try {
    await pullImage({
      client,
      repository,
      reference,
      snapshotter,
      platform,
      signal,
      onEvent: (event) => {
        if (event.kind === 'resolved') remember();
        showEvent(event);
      },
      own: {
        snapshots: new RootPaths(plane.root).snapshots,
        known: ours.get(`${address} ${snapshotter}`),
        learned: (isOurs) => ours.set(`${address} ${snapshotter}`, isOurs),
      },
      makeReady: (manifest, layers, config, onRead, wholeFrom) => {
        remember();
        ahead = plane.imageAhead(manifest, layers, config, reference, onRead, wholeFrom);
        return ahead.layers;
      },
      leaseLifetimeMs: request.lease_ms === 0 ? DEFAULT_LEASE_LIFETIME_MS : request.lease_ms,
    });
  } finally {
    ahead?.ended();
    client.close();
  }
}

/** Events as messages; of a transfer its begin and its end are told, and in between not all. */
function messages(show: (event: PullImageEventMessage) => void): (event: PullEvent) => void {
  let toldMs = 0;
  return (event) => {
    switch (event.kind) {
      case 'resolved': {
        const layers = event.layers.map(({ digest, size }) => ({ digest, size }));
        show({ resolved: { name: event.name, manifest: event.manifest, layers } });
        return;
      }
      case 'layer':
        show({ step: { layer: event.layer, state: event.outcome, bytes: 0 } });
        return;
      case 'unpacking':
        show({ step: { layer: event.layer, state: 'unpacking', bytes: 0 } });
        return;
      case 'fetching': {
        const now = performance.now();
        if (event.bytes !== 0 && event.bytes !== event.totalBytes && now - toldMs < PROGRESS_MS) return;
        toldMs = now;
        show({ step: { layer: event.layer, state: 'fetching', bytes: event.bytes } });
        return;
      }
    }
  };
}
