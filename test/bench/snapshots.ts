// What containerd's calls take while a thousand snapshots are there: Prepare, Mounts, Commit, Remove and List, ours and
// containerd's overlayfs, both through containerd, in turn.
//   node test/bench/snapshots.ts [ROUNDS] [SNAPSHOTS]
import { TestContainerd } from '../support/containerd.ts';
import { Product } from '../support/product.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

const rounds = Number(process.argv[2] ?? 300);
const snapshots = Number(process.argv[3] ?? 1000);
/** Layers of an image. */
const CHAIN = 10;
const KEPT = { 'containerd.io/gc.root': 'bench' };

const product = await Product.create({ log_level: 'info' });
await product.start();
const containerd = await TestContainerd.start({ proxies: { dedup: product.address } });
const CALLS = ['prepare', 'mounts', 'commit', 'remove', 'list'] as const;
const contenders = ['overlayfs', 'dedup'].map((snapshotter) => ({
  snapshotter,
  client: new SnapshotsClient(containerd.address, { snapshotter, namespace: 'bench' }),
  tops: [] as string[],
  took: Object.fromEntries(CALLS.map((call) => [call, [] as number[]])) as Record<(typeof CALLS)[number], number[]>,
}));
try {
  for (const { client, tops } of contenders) {
    for (let i = 0; i < snapshots; i++) {
      const parent = i % CHAIN === 0 ? '' : `layer-${i - 1}`;
      await client.prepare(`key-${i}`, parent, KEPT);
      await client.commit(`layer-${i}`, `key-${i}`, KEPT);
      if (i % CHAIN === CHAIN - 1) tops.push(`layer-${i}`);
    }
  }
  for (let round = 0; round < rounds; round++) {
    for (const { client, tops, took } of round % 2 === 0 ? contenders : contenders.toReversed()) {
      const timed = async (call: (typeof CALLS)[number], work: () => Promise<unknown>): Promise<void> => {
        const startedMs = performance.now();
        await work();
        took[call].push(performance.now() - startedMs);
      };
      const [key, name] = [`round-${round}`, `committed-${round}`];
      await timed('prepare', () => client.prepare(key, tops[round % tops.length], KEPT));
      await timed('mounts', () => client.mounts(key));
      await timed('commit', () => client.commit(name, key, KEPT));
      await timed('remove', () => client.remove(name));
      if (round % 10 === 0) await timed('list', () => client.list());
    }
  }
  console.log(`${snapshots} snapshots in chains of ${CHAIN}, ${rounds} rounds, through containerd; milliseconds\n`);
  console.log(`| call | ${contenders.map(({ snapshotter: name }) => `${name} median | ${name} p99`).join(' | ')} |`);
  console.log(`| --- |${' ---: |'.repeat(2 * contenders.length)}`);
  for (const call of CALLS) {
    const cells = contenders.flatMap(({ took }) => {
      const sorted = took[call].toSorted((a, b) => a - b);
      return [sorted[sorted.length >> 1]!, sorted[Math.floor(sorted.length * 0.99)]!].map((ms) => ms.toFixed(1));
    });
    console.log(`| ${call} | ${cells.join(' | ')} |`);
  }
} finally {
  for (const { client } of contenders) client.close();
  await containerd.stop();
  await product.stop();
}
