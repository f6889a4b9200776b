// What one namespace's pull from a registry that does not answer costs another namespace: containerd holds locks during
// Prepare, Commit and Remove, and a collection waits for them.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { digestOf } from '../../src/digest.ts';
import { LABEL_IMAGE_REF, LABEL_INDEX, LABEL_LAYER_DIGEST, LABEL_SNAPSHOT_REF } from '../../src/snapshotter/labels.ts';
import { LazyNode } from '../support/lazy-node.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

const DURATION_MS = 12_000;
/** The budget of a Prepare, 2 s, and what else a busy machine takes. */
const LIMIT_MS = 2_500;
/** Keeps containerd's collector away from what belongs to no image. */
const KEPT = { 'containerd.io/gc.root': 'test' };

describe('a registry that stalls for 30 s', () => {
  let node: LazyNode;
  before(async () => {
    node = await LazyNode.start();
    node.proxy.setRules({ fault: { kind: 'stall', ms: 30_000 } });
  });
  after(() => node?.stop());

  const client = (namespace: string) =>
    new SnapshotsClient(node.containerd.address, { snapshotter: 'dedup', namespace });

  test('holds calls of another namespace up for 2.5 s at most, with collections forced meanwhile', async (t) => {
    const until = performance.now() + DURATION_MS;
    const goesOn = () => performance.now() < until;
    let pulled = 0;
    const pull = async (): Promise<void> => {
      const stalled = client('a');
      for (let i = 0; goesOn(); i++) {
        const digest = digestOf(`layer ${i}`);
        await stalled.prepare(`extract-${i}`, '', {
          ...KEPT,
          [LABEL_SNAPSHOT_REF]: digestOf(`chain ${i}`),
          [LABEL_IMAGE_REF]: `${node.proxy.host}/team/stalled:1`,
          [LABEL_LAYER_DIGEST]: digest,
          [LABEL_INDEX]: digest,
        });
        pulled++;
      }
      stalled.close();
    };
    let collections = 0;
    const collect = async (): Promise<void> => {
      for (; goesOn(); collections++) await node.containerd.gc();
    };
    const took: Record<'prepare' | 'commit' | 'remove', number[]> = { prepare: [], commit: [], remove: [] };
    const work = async (): Promise<void> => {
      const other = client('b');
      const timed = async (what: keyof typeof took, call: () => Promise<unknown>): Promise<void> => {
        const startedMs = performance.now();
        await call();
        took[what].push(performance.now() - startedMs);
      };
      for (let i = 0; goesOn(); i++) {
        await timed('prepare', () => other.prepare(`key-${i}`, '', KEPT));
        await timed('commit', () => other.commit(`layer-${i}`, `key-${i}`, KEPT));
        await timed('remove', () => other.remove(`layer-${i}`));
      }
      other.close();
    };
    await Promise.all([pull(), collect(), work()]);
    assert.ok(pulled >= 4 && collections >= 2, `${pulled} stalled Prepares, ${collections} collections`);
    for (const [what, values] of Object.entries(took)) {
      const sorted = values.toSorted((a, b) => a - b);
      const p99 = sorted[Math.floor(sorted.length * 0.99)] ?? Number.NaN;
      t.diagnostic(
        `${what}: ${sorted.length} calls, median ${sorted[sorted.length >> 1]?.toFixed(0)} ms, p99 ${p99.toFixed(0)} ms`,
      );
      assert.ok(p99 <= LIMIT_MS, `${what}: p99 ${p99} ms of ${sorted.length} calls`);
    }
  });
});
