import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { DedupError } from '../../src/errors.ts';
import { parseReference } from '../../src/fs/registry/reference.ts';
import type { ContainerdClient, ContentInfo, Labels } from '../../src/pull/containerd-client.ts';
import { PullLease } from '../../src/pull/pull-lease.ts';
import { PulledContent } from '../../src/pull/pulled-content.ts';

const BYTES = Buffer.from('a blob');
const BLOB = { digest: digestOf(BYTES), size: BYTES.length };

/** A containerd that says for a while that it has the blob before it has a record of it. */
class Containerd {
  /** How often it still says so. */
  early: number;
  /** What it says of a blob that it has no record of: at its look-up, or at its labels only. */
  readonly seen: ContentInfo | undefined;
  readonly writers: string[] = [];
  labels: Labels | undefined;

  constructor(early: number, looksThere: boolean) {
    this.early = early;
    this.seen = looksThere
      ? { digest: BLOB.digest, size: BLOB.size, updated_at: { seconds: 0, nanos: 0 }, labels: {} }
      : undefined;
  }

  async createLease(): Promise<void> {}
  async deleteLease(): Promise<void> {}
  async addToLease(): Promise<void> {}
  async abortIngest(): Promise<void> {}

  async openWriter(ref: string): Promise<unknown> {
    this.writers.push(ref);
    if (this.early > 0) {
      this.early--;
      throw new DedupError('ALREADY_EXISTS', `content ${BLOB.digest} is there`);
    }
    return {
      offset: 0,
      write: async () => {},
      commit: async (_blob: unknown, labels: Labels) => {
        this.labels = labels;
      },
      close: async () => {},
      cancel: () => {},
    };
  }

  async contentInfo(): Promise<ContentInfo | undefined> {
    return this.seen;
  }

  async setContentLabels(): Promise<void> {
    throw new DedupError('NOT_FOUND', `labelling content ${BLOB.digest}: not found`);
  }
}

async function write(containerd: Containerd): Promise<void> {
  const client = containerd as unknown as ContainerdClient;
  const lease = await PullLease.start(client, { lifetimeMs: 60_000, onLost: assert.fail });
  try {
    const reference = parseReference('registry.test/team/app:1');
    const content = new PulledContent({ client, lease, reference, signal: AbortSignal.timeout(10_000) });
    await content.write(
      BLOB,
      () => ({ own: 'label' }),
      async function* () {
        yield BYTES;
      },
    );
  } finally {
    await lease.end(false);
  }
}

describe('PulledContent', () => {
  for (const looksThere of [false, true]) {
    const when = looksThere ? 'found' : 'not even found';
    it(`tries a blob again that containerd says is there before it has its record, ${when} when it is looked up`, async () => {
      const containerd = new Containerd(2, looksThere);
      await write(containerd);
      assert.equal(containerd.writers.length, 3);
      assert.deepEqual(containerd.labels, {
        own: 'label',
        'containerd.io/distribution.source.registry.test': 'team/app',
      });
    });
  }

  it('gives a blob up that stays without a record, with what containerd says of it', async () => {
    const containerd = new Containerd(1000, true);
    await assert.rejects(write(containerd), { code: 'NOT_FOUND', message: /labelling content/ });
    assert.equal(containerd.writers.length, 6);
  });
});
