// Keeps what a pull has made so far from containerd's garbage collection, for as long as the puller lives and hardly
// longer. Called by pull.ts; everything the pull touches must be held here before it is made or relied upon.
//
// containerd cannot prolong a lease. So a lease lives for a short time only, and long before it ends a fresh one is made
// that holds the same things. A puller that is killed renews nothing: a moment later its last lease is void, and the
// next collection takes the lease and all it held.
import { randomBytes } from 'node:crypto';
import { DedupError, wrapError } from '../errors.ts';
import type { ContainerdClient, LeaseResource } from './containerd-client.ts';

export interface PullLeaseOptions {
  /** How long one lease is valid; a third of it passes between two. */
  readonly lifetimeMs: number;
  /** Called once when leases can no longer be renewed: what was made may be gone, the pull must end. */
  readonly onLost: (error: DedupError) => void;
}

/** Label with the time after which containerd's collector ignores a lease (containerd gc.md). */
const LABEL_EXPIRE = 'containerd.io/gc.expire';

export class PullLease {
  readonly #client: ContainerdClient;
  readonly #options: PullLeaseOptions;
  readonly #name = `dedup-rpull-${Date.now().toString(36)}-${randomBytes(4).toString('hex')}`;
  readonly #held = new Map<string, LeaseResource>();
  /** Leases made and not yet deleted, oldest first. */
  readonly #ids: string[] = [];
  #count = 0;
  #expiresAtMs = 0;
  #timer: NodeJS.Timeout | undefined;
  #renewing: Promise<void> = Promise.resolve();
  #lost: DedupError | undefined;
  #ended: boolean = false;

  private constructor(client: ContainerdClient, options: PullLeaseOptions) {
    this.#client = client;
    this.#options = options;
  }

  /** Creates the first lease. Errors: those of containerd. */
  static async start(client: ContainerdClient, options: PullLeaseOptions): Promise<PullLease> {
    const lease = new PullLease(client, options);
    await lease.#renew();
    lease.#schedule();
    return lease;
  }

  /** A name no other pull uses, for keys of snapshots and ingests. */
  get name(): string {
    return this.#name;
  }

  /**
   * The lease to name in the next call: at least half of its time is left.
   * Errors: FAILED_PRECONDITION when it ran out, or why it could not be renewed.
   */
  get current(): string {
    this.check();
    return this.#ids.at(-1) as string;
  }

  /** Throws when what is held may have been collected. Errors: as `current`. */
  check(): void {
    if (this.#lost !== undefined) throw this.#lost;
    if (Date.now() >= this.#expiresAtMs) {
      this.#lost = new DedupError('FAILED_PRECONDITION', 'the lease on what was pulled so far ran out', {
        hint: 'the machine or containerd stood still for too long; run rpull again',
      });
      throw this.#lost;
    }
  }

  /** True when a call that began under lease `id` may still end under it. */
  mayEndUnder(id: string): boolean {
    return id === this.#ids.at(-1);
  }

  /**
   * Announces things that the next calls make: every lease to come holds them. The present one gets them by the calls
   * themselves, which name `current`.
   */
  async expect(...resources: LeaseResource[]): Promise<void> {
    for (const resource of resources) this.#held.set(keyOf(resource), resource);
    // A renewal under way may have passed these by; one that starts from now on takes them along.
    await this.#renewing;
  }

  /** Holds things that somebody else may have made. They need not exist: hold first, look afterwards. */
  async hold(...resources: LeaseResource[]): Promise<void> {
    await this.expect(...resources);
    const id = this.current;
    for (const resource of resources) await this.#client.addToLease(id, resource);
  }

  /** Leaves things out of the leases to come: something else that is held keeps them, or they are gone. */
  forget(...resources: LeaseResource[]): void {
    for (const resource of resources) this.#held.delete(keyOf(resource));
  }

  /** Stops renewing and deletes the leases. With `sync` what only they held is gone when this returns. */
  async end(sync: boolean): Promise<void> {
    if (this.#ended) return;
    this.#ended = true;
    clearTimeout(this.#timer);
    await this.#renewing;
    const last = this.#ids.pop();
    for (const id of this.#ids.splice(0)) await this.#client.deleteLease(id, false);
    if (last !== undefined) await this.#client.deleteLease(last, sync);
  }

  #schedule(): void {
    this.#timer = setTimeout(() => {
      this.#renewing = this.#renew().then(
        () => {
          if (!this.#ended) this.#schedule();
        },
        (error: unknown) => this.#renewalFailed(error),
      );
    }, this.#options.lifetimeMs / 3);
  }

  /** Tries again until the present lease has run out. */
  #renewalFailed(error: unknown): void {
    if (this.#ended) return;
    if (Date.now() + this.#options.lifetimeMs / 3 < this.#expiresAtMs) {
      this.#schedule();
      return;
    }
    this.#lost = wrapError(error, 'renewing the lease on what was pulled so far');
    this.#options.onLost(this.#lost);
  }

  async #renew(): Promise<void> {
    const id = `${this.#name}-${this.#count++}`;
    // From before the call, so that our idea of the end is never later than containerd's.
    const expiresAtMs = Date.now() + this.#options.lifetimeMs;
    const timeoutMs = Math.max(1000, this.#options.lifetimeMs / 3);
    await this.#client.createLease(id, { [LABEL_EXPIRE]: new Date(expiresAtMs).toISOString() }, { timeoutMs });
    for (const resource of this.#held.values()) await this.#client.addToLease(id, resource, { timeoutMs });
    this.#ids.push(id);
    this.#expiresAtMs = expiresAtMs;
    // The one before may be named by calls under way and stays until it runs out; older ones are of no use.
    while (this.#ids.length > 2) {
      const old = this.#ids.shift() as string;
      await this.#client.deleteLease(old, false, { timeoutMs });
    }
  }
}

function keyOf(resource: LeaseResource): string {
  return `${resource.type} ${resource.id}`;
}
