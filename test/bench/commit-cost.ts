// What it costs to make an image out of a container, as `nerdctl commit` does: the difference of the container's snapshot
// against its image becomes content. On containerd's overlayfs, on ordinary layers here, and on the same layers converted.
//   node test/bench/commit-cost.ts [--rounds 5] [--write]
import { writeFile } from 'node:fs/promises';
import { parseArgs } from 'node:util';
import { waitFor } from '../support/containerd.ts';
import { debianImages, PYTHON_IMAGE } from '../support/debian-images.ts';
import { pushLayout } from '../support/images.ts';
import { LazyNode } from '../support/lazy-node.ts';
import { writeSection } from './section.ts';

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '5' }, write: { type: 'boolean', default: false } },
});
const ROUNDS = Number(values.rounds);

function quartiles(of: readonly number[]): string {
  const sorted = [...of].sort((a, b) => a - b);
  const at = (q: number): string =>
    (sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? 0).toFixed(0);
  return `${at(0.5)} ms (${at(0.25)}–${at(0.75)})`;
}

const node = await LazyNode.start({ config: { convert_ordinary: true, log_level: 'info' } });
try {
  const { dir, images } = await debianImages([PYTHON_IMAGE], console.error);
  const image = images.get(PYTHON_IMAGE.tag);
  const top = image?.layers.at(-1)?.chainId ?? '';
  const reference = await pushLayout(dir, PYTHON_IMAGE.tag, node.registry.host, 'python', 'plain');
  const { containerd } = node;
  const times: Record<string, { diff: number[]; commit: number[] }> = {};
  let containers = 0;

  /** A container that changes a thousand files, its difference, and its commit. */
  const round = async (name: string, snapshotter: string): Promise<void> => {
    const of = (times[name] ??= { diff: [], commit: [] });
    const key = `commit-${++containers}`;
    const script =
      'mkdir /new; i=0; while [ $i -lt 1000 ]; do echo $i > /new/$i; i=$((i+1)); done; echo changed >> /etc/passwd';
    await containerd.ctr(['run', '--snapshotter', snapshotter, reference, key, '/bin/sh', '-c', script]);
    const snapshots = ['snapshots', '--snapshotter', snapshotter];
    await writeFile('/proc/sys/vm/drop_caches', '3');
    const startedMs = performance.now();
    await containerd.ctr([...snapshots, 'diff', '--keep', key, top], { timeoutMs: 120_000 });
    of.diff.push(performance.now() - startedMs);
    await containerd.ctr([...snapshots, 'label', key, 'containerd.io/gc.root=now']);
    await containerd.ctr(['containers', 'rm', '--keep-snapshot', key]);
    const commitMs = performance.now();
    await containerd.ctr([...snapshots, 'commit', `${key}-done`, key]);
    of.commit.push(performance.now() - commitMs);
    await containerd.ctr([...snapshots, 'rm', `${key}-done`]);
  };
  const pull = (snapshotter: string) =>
    containerd.ctr(['images', 'pull', '--plain-http', '--snapshotter', snapshotter, reference], { timeoutMs: 120_000 });
  await node.product.cli(['dedup', 'pause']);
  await pull('overlayfs');
  await pull('dedup');
  for (let i = 0; i < ROUNDS; i++) {
    await round('overlayfs', 'overlayfs');
    await round('ordinary layers', 'dedup');
  }
  await node.product.cli(['dedup', 'resume']);
  await waitFor(
    'the conversion',
    async () => {
      const { stdout } = await node.product.cli(['dedup', 'status', '--json']);
      return (JSON.parse(stdout) as { pending: number; done: number }).pending === 0;
    },
    120_000,
  );
  for (let i = 0; i < ROUNDS; i++) {
    await round('converted layers', 'dedup');
    await round('overlayfs', 'overlayfs');
  }
  const text = [
    `\`node test/bench/commit-cost.ts --rounds ${ROUNDS}\`: a container of the python test image writes a thousand small files and changes one; then`,
    '`ctr snapshots diff` with nothing in memory, as `nerdctl commit` has it made, and a commit of its snapshot by hand. Medians with quartiles, the',
    'start of `ctr` included.',
    '',
    '| image on | difference | commit |',
    '| --- | --- | --- |',
    ...Object.entries(times).map(
      ([name, { diff, commit }]) => `| ${name} | ${quartiles(diff)} | ${quartiles(commit)} |`,
    ),
    '',
  ].join('\n');
  process.stdout.write(text);
  if (values.write) await writeSection('Images made of containers', text);
} finally {
  await node.stop();
}
