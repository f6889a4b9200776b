// Blobs of a pull on their way into containerd's content store: held by the pull's lease before they are made, with the
// repository they came from in a label. Called by pull.ts; knows nothing of images.
import { setTimeout as sleep } from 'node:timers/promises';
import type { Digest } from '../digest.ts';
import type { ImageReference } from '../fs/registry/reference.ts';
import { hasCode } from './containerd-calls.ts';
import type { ContainerdClient, Labels, LeaseResource } from './containerd-client.ts';
import type { PullLease } from './pull-lease.ts';

/** containerd refuses labels whose name and value together are longer (containerd labels/validate.go). */
const MAX_LABEL_BYTES = 4096;

/** How often a blob is tried that is said to be there and is not, and the pause between, milliseconds. */
const ATTEMPTS = 6;
const RETRY_MS = 50;

/** True when containerd takes the label. */
export function fitsLabel(name: string, value: string): boolean {
  return Buffer.byteLength(name) + Buffer.byteLength(value) <= MAX_LABEL_BYTES;
}

export class PulledContent {
  readonly #client: ContainerdClient;
  readonly #lease: PullLease;
  readonly #reference: ImageReference;
  readonly #signal: AbortSignal;

  constructor(parts: {
    readonly client: ContainerdClient;
    readonly lease: PullLease;
    readonly reference: ImageReference;
    readonly signal: AbortSignal;
  }) {
    this.#client = parts.client;
    this.#lease = parts.lease;
    this.#reference = parts.reference;
    this.#signal = parts.signal;
  }

  /**
   * Puts a blob of any size into the content store, with its source and the labels wanted once its bytes are here; asks
   * for its bytes only when the node lacks it. When this returns, the blob is there and held.
   */
  async write(
    blob: { digest: Digest; size: number },
    labels: () => Labels,
    bytes: () => AsyncIterable<Buffer>,
  ): Promise<void> {
    const content: LeaseResource = { id: blob.digest, type: 'content' };
    const ref = `${this.#lease.name}-${blob.digest}`;
    const ingest: LeaseResource = { id: ref, type: 'ingests' };
    await this.#lease.expect(content, ingest);
    try {
      for (let attempt = 1; ; attempt++) {
        try {
          await this.#ingest(ref, blob, () => ({ ...labels(), ...this.#sourceLabel('') }), bytes);
          return;
        } catch (error) {
          if (!hasCode(error, 'ALREADY_EXISTS')) {
            await this.#client.abortIngest(ref).catch(() => undefined); // the lease takes care of what stays
            throw error;
          }
        }
        if (await this.#takeOver(content, blob.digest, labels, attempt === ATTEMPTS)) return;
        await sleep(RETRY_MS * attempt, undefined, { signal: this.#signal });
      }
    } finally {
      this.#lease.forget(ingest);
    }
  }

  /**
   * A blob that was there before, or that somebody else wrote faster: holds it, then adds to its labels what is ours. False
   * when it is not there after all: its bytes are before containerd's record of them is, or it was just collected.
   */
  async #takeOver(content: LeaseResource, digest: Digest, labels: () => Labels, last: boolean): Promise<boolean> {
    try {
      await this.#lease.hold(content);
      const known = (await this.#client.contentInfo(digest, this.#scope()))?.labels ?? {};
      const own = { ...labels(), ...this.#sourceLabel(known[this.#sourceName] ?? '') };
      await this.#client.setContentLabels(digest, own, this.#scope());
      return true;
    } catch (error) {
      if (last || !hasCode(error, 'NOT_FOUND')) throw error;
      return false;
    }
  }

  /** Errors: ALREADY_EXISTS. A blob that another namespace has is taken over without being sent. */
  async #ingest(
    ref: string,
    blob: { digest: Digest; size: number },
    labels: () => Labels,
    bytes: () => AsyncIterable<Buffer>,
  ): Promise<void> {
    const lease = this.#lease.current;
    let writer = await this.#client.openWriter(ref, blob, { lease, signal: this.#signal });
    try {
      if (writer.offset !== blob.size) for await (const part of bytes()) await writer.write(part);
      if (!this.#lease.mayEndUnder(lease)) {
        // The commit belongs to the lease that the stream was opened under, which may have run out by now.
        await writer.close();
        writer = await this.#client.openWriter(ref, blob, this.#scope());
      }
      await writer.commit(blob, labels());
    } catch (error) {
      writer.cancel();
      throw error;
    }
  }

  /** containerd names the host without its port (containerd remotes/docker/handler.go). */
  get #sourceName(): string {
    return `containerd.io/distribution.source.${this.#reference.host.replace(/:\d+$/, '')}`;
  }

  /** This repository added to those that a blob is known to come from. */
  #sourceLabel(known: string): Labels {
    const repositories = known.split(',').filter((repository) => repository !== '');
    const value = [...new Set([...repositories, this.#reference.path])].sort().join(',');
    return fitsLabel(this.#sourceName, value) ? { [this.#sourceName]: value } : {};
  }

  #scope(): { lease: string; signal: AbortSignal } {
    return { lease: this.#lease.current, signal: this.#signal };
  }
}
