// Which readahead of a mounted image is best: reads a cold image whole with several values of read_ahead_kb, interleaved,
// and counts the requests that reach dedupd. Behind READ_AHEAD_KIB of src/fs/transport/erofs-mount.ts.
//   node test/bench/mount-readahead.ts [ROUNDS]
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { dropCaches } from '../support/cold-start.ts';
import { run } from '../support/containerd.ts';
import { debianImages, PYTHON_IMAGE } from '../support/debian-images.ts';
import { pushLayout } from '../support/images.ts';
import { Product } from '../support/product.ts';
import { RegistryProcess } from '../support/registry.ts';

const ROUNDS = Number(process.argv[2] ?? 5);
const VALUES_KIB = [128, 512, 1024, 4096];

/** Queue directories of the loop devices that hold metadata below `root`. */
function queues(root: string): string[] {
  return readdirSync('/sys/block')
    .filter((name) => name.startsWith('loop'))
    .filter((name) => {
      try {
        return readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').startsWith(root);
      } catch {
        return false; // The device is free.
      }
    })
    .map((name) => `/sys/block/${name}/queue/read_ahead_kb`);
}

const registry = await RegistryProcess.start();
const product = await Product.create({ log_level: 'info', direct_mounts: false });
try {
  const { dir } = await debianImages([PYTHON_IMAGE], console.log);
  const plain = await pushLayout(dir, PYTHON_IMAGE.tag, registry.host, 'python', 'plain');
  const lazy = `${registry.host}/python:lazy`;
  await product.cli(['index', plain, '--annotate', lazy]);
  await product.start();
  const target = join(product.dir, 'mnt');
  mkdirSync(target);
  const results = new Map(VALUES_KIB.map((value) => [value, { ms: [] as number[], misses: 0, hits: 0 }]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const value of VALUES_KIB) {
      await product.cli(['mount', lazy, target]);
      for (const queue of queues(product.root)) writeFileSync(queue, String(value));
      const before = await product.stats();
      dropCaches();
      const started = performance.now();
      await run('sh', ['-c', `tar cf - -C ${target} . | cat > /dev/null`], { timeoutMs: 300_000 });
      const result = results.get(value)!;
      result.ms.push(performance.now() - started);
      const after = await product.stats();
      result.misses = after.misses - before.misses;
      result.hits = after.hits - before.hits;
      await product.cli(['umount', target]);
      await product.client.retainLayers([]);
    }
  }
  console.log('| read_ahead_kb | everything read, median (range) | misses | hits |');
  console.log('| --- | --- | --- | --- |');
  for (const [value, { ms, misses, hits }] of results) {
    const sorted = ms.sort((a, b) => a - b).map((time) => (time / 1000).toFixed(2));
    console.log(`| ${value} | ${sorted[sorted.length >> 1]} s (${sorted[0]}–${sorted.at(-1)}) | ${misses} | ${hits} |`);
  }
} finally {
  await product.stop();
  await registry.stop();
}
