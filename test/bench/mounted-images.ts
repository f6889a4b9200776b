// What many mounted images cost: 200 distinct lazy images on one node, each with a container's snapshot over it. Times of
// Prepare and Mounts, memory, descriptors, threads and loop devices of both processes; then a killed dedupd, restarts, a
// machine that comes back, and the removal of everything.
//   node test/bench/mounted-images.ts [IMAGES]
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { isDeepStrictEqual } from 'node:util';
import { cpuSeconds, pssBytes } from '../../src/bench/process-use.ts';
import { RootPaths } from '../../src/paths.ts';
import { mountsBelow, unmountBelow, waitFor } from '../support/containerd.ts';
import { busyboxEntries, type LayerSource } from '../support/images.ts';
import { LazyNode, NOTHING_LEFT, noise, type PublishedImage } from '../support/lazy-node.ts';
import { devicesOfStore, storeIdOf } from '../support/loop-names.ts';
import { SnapshotsClient } from '../support/snapshots-service.ts';

const images = Number(process.argv[2] ?? 200);
/** Images that share a bottom layer; every top layer shares one file with all others. */
const BASES = 10;
const FILE_BYTES = 256 * 1024;
const FILES = 4;
/** Prepares in flight while images are mounted again. */
const PARALLEL = 8;
const KEPT = { 'containerd.io/gc.root': 'bench' };
const LIFETIME_SECONDS = 3600;
const PATIENCE_MS = 120_000;

interface Mounted extends PublishedImage {
  readonly number: number;
  readonly key: string;
  readonly top: string;
  path: string;
  /** SHA-256 of its files, made ahead: it takes longer than to read them. */
  readonly sums: readonly string[];
}

const content = (image: number, file: number) => noise(FILE_BYTES, `image ${image} file ${file}`);
const sum = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');

async function layers(image: number): Promise<LayerSource[]> {
  const files = Array.from({ length: FILES }, (_, i) => ({ name: `f${i}`, content: content(image, i) }));
  const shared = { name: 'shared', content: noise(FILE_BYTES, 'shared') };
  return [
    { entries: [...(await busyboxEntries()), { name: 'base', content: noise(FILE_BYTES, `base ${image % BASES}`) }] },
    { entries: [...files, shared] },
  ];
}

/** Runs `work` for each item, at most `width` at a time. */
async function each<T>(items: readonly T[], width: number, work: (item: T) => Promise<void>): Promise<void> {
  const left = items.values();
  const next = async (): Promise<void> => {
    for (const item of left) await work(item);
  };
  await Promise.all(Array.from({ length: width }, next));
}

const node = await LazyNode.start({
  // Every image has its part in dedupd, also once it is here completely.
  config: { log_level: 'info', direct_mounts: false },
  containerd: { lifetimeSeconds: LIFETIME_SECONDS },
});
const client = new SnapshotsClient(node.containerd.address, {
  snapshotter: 'dedup',
  namespace: node.containerd.namespace,
});
const rows: [string, string][] = [];
const say = (what: string, figure: string): void => {
  rows.push([what, figure]);
  console.error(`${what}: ${figure}`);
};
const ms = (value: number): string => (value < 100 ? value.toFixed(1) : value.toFixed(0));

async function took(work: () => Promise<unknown>): Promise<number> {
  const startedMs = performance.now();
  await work();
  return performance.now() - startedMs;
}

/** Median, 99th percentile, first and last of times in the order in which they were taken. */
function spread(times: readonly number[]): string {
  const sorted = times.toSorted((a, b) => a - b);
  const [median, p99] = [sorted[sorted.length >> 1]!, sorted[Math.floor(sorted.length * 0.99)]!];
  return `${ms(median)} | ${ms(p99)} | ${ms(times[0]!)} | ${ms(times.at(-1)!)}`;
}

const storeId = await storeIdOf(new RootPaths(node.product.root));
const loops = async (): Promise<number> => (await devicesOfStore(storeId)).length;

interface Use {
  readonly pss: number;
  readonly descriptors: number;
  readonly threads: number;
}

function useOf(pid: number): Use {
  const threads = Number(/^Threads:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]);
  return { pss: pssBytes(pid), descriptors: readdirSync(`/proc/${pid}/fd`).length, threads };
}

const uses: { when: string; service: Use; daemon: Use; loops: number; mounts: number }[] = [];
async function use(when: string): Promise<void> {
  await sleep(3_000); // Both collect garbage when a burst is over.
  const [service, daemon] = [node.product.servicePid ?? 0, await node.product.daemonPid()].map(useOf);
  const mounts = mountsBelow(node.product.root).length;
  uses.push({ when, service: service!, daemon: daemon!, loops: await loops(), mounts });
}

/** Reads a file of every image until it has its bytes, EIO counted; wrong ones are fatal. Milliseconds since `startedMs`. */
async function readAll(all: readonly Mounted[], file: number, startedMs: number): Promise<{ ms: number; eio: number }> {
  let eio = 0;
  const deadline = performance.now() + PATIENCE_MS;
  await Promise.all(
    all.map(async ({ number, path, sums }) => {
      for (;;) {
        try {
          const found = sum(await readFile(join(path, `f${file}`)));
          if (found !== sums[file]) throw new Error(`image ${number}, file ${file}: wrong bytes`);
          return;
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== 'EIO' || performance.now() > deadline) throw error;
          eio++;
          await sleep(20);
        }
      }
    }),
  );
  return { ms: performance.now() - startedMs, eio };
}

const answers = async (other: number): Promise<boolean> =>
  ![0, other].includes(await node.product.daemonPid().catch(() => 0));

try {
  console.error(`publishing and pulling ${images} images`);
  const all: Mounted[] = [];
  await each([...Array(images).keys()], 2, async (number) => {
    const published = await node.publish(`many/${number}`, await layers(number));
    const top = published.image.layers.at(-1)!.chainId;
    const sums = Array.from({ length: FILES }, (_, file) => sum(content(number, file)));
    all.push({ ...published, number, key: `bench-${number}`, top, path: '', sums });
  });
  all.sort((a, b) => a.number - b.number);
  await use('started');
  const pulls: number[] = [];
  for (const { lazy } of all) pulls.push(await took(() => node.rpull(lazy)));
  await use('pulled');

  const prepares: number[] = [];
  const mounts: number[] = [];
  const cpuBefore = cpuSeconds(await node.product.daemonPid());
  for (const image of all) {
    prepares.push(await took(() => client.prepare(image.key, image.top, KEPT)));
    mounts.push(
      await took(async () => {
        const [mount] = await client.mounts(image.key);
        image.path = /lowerdir=([^:,]+)/.exec(mount?.options.join(',') ?? '')?.[1] ?? '';
      }),
    );
  }
  const cpu = cpuSeconds(await node.product.daemonPid()) - cpuBefore;
  await use('mounted');
  const cold = await readAll(
    all.filter(({ number }) => number % 2 === 0),
    0,
    performance.now(),
  );
  say(`a file of ${images / 2} images read first, ms`, ms(cold.ms));
  await use('half of them read');

  const lists: number[] = [];
  const own = node.snapshots();
  for (let i = 0; i < 20; i++) lists.push(await took(() => client.list()));
  const ownLists: number[] = [];
  for (let i = 0; i < 20; i++) ownLists.push(await took(() => own.list()));
  own.close();

  let pid = await node.product.daemonPid();
  let startedMs = performance.now();
  process.kill(pid, 'SIGKILL');
  const back = waitFor('the next dedupd', () => answers(pid), PATIENCE_MS).then(() => performance.now() - startedMs);
  const again = await readAll(all, 1, startedMs);
  say('dedupd killed: the next one answers after, ms', ms(await back));
  say(`dedupd killed: files of all images read again after, ms (${again.eio} EIO meanwhile)`, ms(again.ms));
  await use('taken over');

  await node.product.stopService();
  say('service stopped: starts beside all that is mounted in, ms', ms(await took(() => node.product.start())));

  pid = await node.product.daemonPid();
  say('dedupd stopped in order: everything unmounted in, ms', ms(await took(() => node.product.stopDaemon())));
  await waitFor('the next dedupd', () => answers(pid), PATIENCE_MS);
  const mountAll = () => each(all, PARALLEL, async ({ key }) => void (await client.mounts(key)));
  await waitFor('containerd to have found the service', () =>
    client.mounts(all[0]!.key).then(
      () => true,
      () => false,
    ),
  );
  say(`Mounts of all images again, ${PARALLEL} at a time, ms`, ms(await took(mountAll)));

  await node.containerd.down('SIGKILL');
  await node.product.stopService('SIGKILL');
  await node.product.stopDaemon('SIGKILL');
  await unmountBelow(node.product.dir);
  await waitFor('loop devices to go', async () => (await loops()) === 0, PATIENCE_MS);
  await rm(node.product.runDir, { recursive: true });
  await writeFile('/proc/sys/vm/drop_caches', '3');
  startedMs = performance.now();
  await node.product.start();
  say('after a reboot: the service answers after, ms', ms(performance.now() - startedMs));
  await node.containerd.up();
  say(`after a reboot: Mounts of all, ${PARALLEL} at a time, ms`, ms(await took(mountAll)));
  say('after a reboot: a file of all images read, ms', ms((await readAll(all, 2, performance.now())).ms));
  await use('after a reboot');

  const removes: number[] = [];
  for (const { key } of all) removes.push(await took(() => client.remove(key)));
  for (const { lazy } of all) await node.containerd.ctr(['image', 'rm', lazy]);
  say('containerd collects, and Cleanup takes everything away, ms', ms(await took(() => node.collect())));
  await use('removed');
  const left = await node.leftovers();
  if (!isDeepStrictEqual(left, NOTHING_LEFT)) throw new Error(`left behind: ${JSON.stringify(left)}`);

  console.log(`${images} images of two layers, ${images / BASES} over each bottom layer, one snapshot over each\n`);
  console.log('| milliseconds | median | p99 | first | last |\n| --- | ---: | ---: | ---: | ---: |');
  for (const [call, times] of Object.entries({ rpull: pulls, Prepare: prepares, Mounts: mounts, Remove: removes }))
    console.log(`| ${call} | ${spread(times)} |`);
  console.log(`| List through containerd | ${spread(lists)} |\n| List | ${spread(ownLists)} |`);
  console.log(`\ndedupd's processor time for each Prepare and Mounts: ${ms((1000 * cpu) / images)} ms\n`);
  console.log(
    '| when | dedupd PSS, MiB | descriptors | threads | service PSS, MiB | descriptors | threads | loops | mounts |',
  );
  console.log(`| --- |${' ---: |'.repeat(8)}`);
  const cells = ({ pss, descriptors, threads }: Use) => `${(pss / 2 ** 20).toFixed(1)} | ${descriptors} | ${threads}`;
  for (const { when, service, daemon, loops, mounts } of uses)
    console.log(`| ${when} | ${cells(daemon)} | ${cells(service)} | ${loops} | ${mounts} |`);
  console.log('\n| what | figure |\n| --- | ---: |');
  for (const row of rows) console.log(`| ${row.join(' | ')} |`);
} catch (error) {
  console.error(node.product.log().split('\n').slice(-40).join('\n'));
  throw error;
} finally {
  client.close();
  await node.stop();
}
