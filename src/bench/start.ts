// One cold start of a container, phase by phase, from the outside: drop caches, pull, create, start, wait until ready; then
// everything is removed again, so that the next start finds nothing. The same steps for every snapshotter.
import { randomBytes } from 'node:crypto';
import { rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BenchTarget, Contender } from './contenders.ts';
import { epochMs, type Meter, requestTimes } from './meter.ts';
import { type BenchNode, ctr, execute, launch } from './node-commands.ts';
import { ProcessMeter } from './process-use.ts';
import { waitReady } from './ready.ts';
import type { ResourceSampler } from './resources.ts';
import type { ColdStartResult, ResourceTrace } from './result.ts';

export interface StartSetup {
  readonly node: BenchNode;
  readonly contender: Contender;
  readonly target: BenchTarget;
  readonly meter: Meter;
  /** Most that pull and start may take each, milliseconds. */
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
  /** What has reached the disk so far, bytes. Given: after the clock has stopped everything is written back, and counted. */
  readonly diskWrites?: () => number;
  /** Records the resources of this start: its own cost is then part of what is measured. */
  readonly sampler?: ResourceSampler;
}

/** A measured start without its place in the run. */
export type StartOutcome = Omit<ColdStartResult, 'link' | 'order' | 'pair'>;

/** Writes back dirty pages, then drops the page, dentry and inode caches of this machine. */
export async function dropCaches(): Promise<void> {
  await execute(['sync']);
  await writeFile('/proc/sys/vm/drop_caches', '3');
}

/** Bytes that directories take on disk; missing ones take none. */
export async function diskBytes(directories: readonly string[]): Promise<number> {
  const text = await execute(['du', '-s', '-x', '--block-size=1', '--', ...directories], { allowFailure: true });
  return text.split('\n').reduce((sum, line) => sum + Number(line.split('\t')[0] ?? 0), 0);
}

interface Measured {
  readonly result: StartOutcome;
  readonly trace?: Omit<ResourceTrace, 'link'>;
}

/** Errors: those of the commands, with their output; the node is cleaned in any case. */
export async function coldStart(setup: StartSetup): Promise<Measured> {
  const { contender, target } = setup;
  await contender.prepare?.(target);
  const measured = await measuredStart(setup);
  const counters = await contender.counters?.(target);
  return counters === undefined ? measured : { ...measured, result: { ...measured.result, counters } };
}

async function measuredStart(setup: StartSetup): Promise<Measured> {
  const { contender, target, meter, sampler } = setup;
  const directories = contender.directories;
  const diskBefore = await diskBytes(directories);
  const daemons = await contender.daemons();
  const container = new BenchContainer(setup);
  await dropCaches();
  await target.prepare?.();
  const use = new ProcessMeter(daemons);
  const writtenBefore = setup.diskWrites?.() ?? 0;
  sampler?.start(daemons);
  const startedMs = performance.now();
  const fromAt = epochMs(startedMs);
  try {
    await execute(contender.pullCommand(target), { timeoutMs: setup.timeoutMs });
    const pulledMs = performance.now();
    await container.create();
    const createdMs = performance.now();
    const readyMs = await container.startAndWait();
    const toAt = epochMs(readyMs);
    const samples = sampler?.stop();
    const processes = use.use();
    if (setup.diskWrites !== undefined) await execute(['sync']);
    const deviceBytes = setup.diskWrites && setup.diskWrites() - writtenBefore;
    await container.remove();
    const requests = requestTimes(await meter.requests(fromAt, toAt), fromAt, target.blobs);
    const firstLayerMs = requests.find(({ kind }) => kind === 'layer')?.startMs;
    const pullMs = pulledMs - startedMs;
    const result: StartOutcome = {
      snapshotter: contender.name,
      image: target.image.name,
      phases: {
        ...(firstLayerMs === undefined ? {} : { controlMs: Math.min(pullMs, firstLayerMs) }),
        pullMs,
        createMs: createdMs - pulledMs,
        runMs: readyMs - createdMs,
        totalMs: readyMs - startedMs,
      },
      requests: requests.length,
      wireBytes: requests.reduce((sum, { bytes }) => sum + bytes, 0),
      processes,
      diskBytes: Math.max(0, (await diskBytes(directories)) - diskBefore),
      ...(deviceBytes === undefined ? {} : { deviceBytes }),
      requestTimes: requests,
    };
    if (samples === undefined) return { result };
    const marks = [
      { name: 'pull', atMs: pullMs },
      { name: 'create', atMs: createdMs - startedMs },
      { name: 'ready', atMs: readyMs - startedMs },
    ];
    return { result, trace: { snapshotter: contender.name, image: target.image.name, marks, samples } };
  } finally {
    sampler?.stop();
    await container.remove();
    await forgetImage(setup.node, contender.reference(target));
  }
}

/** Removes an image and what only it needs, and waits for containerd's collection. */
export async function forgetImage(node: BenchNode, reference: string): Promise<void> {
  await execute(ctr(node, 'image', 'rm', '--sync', reference), { allowFailure: true });
}

/** One container of a target: created, started, waited for, removed. Its name is its own. */
export class BenchContainer {
  readonly name = `bench-${randomBytes(6).toString('hex')}`;
  readonly #setup: Omit<StartSetup, 'meter' | 'sampler'>;
  #removed = false;
  #task: ReturnType<typeof launch> | undefined;

  constructor(setup: Omit<StartSetup, 'meter' | 'sampler'>) {
    this.#setup = setup;
  }

  get #pidFile(): string {
    return join(tmpdir(), `${this.name}.pid`);
  }

  async create(): Promise<void> {
    const { node, contender, target } = this.#setup;
    const image = contender.reference(target);
    const snapshotter = ['--snapshotter', contender.plugin];
    await execute(ctr(node, 'container', 'create', ...snapshotter, '--', image, this.name, ...target.image.command));
  }

  /** Answers when it was ready, as performance.now(). Errors: those of waitReady. */
  async startAndWait(): Promise<number> {
    const { node, target, timeoutMs, signal } = this.#setup;
    this.#task = launch(ctr(node, 'task', 'start', '--pid-file', this.#pidFile, this.name));
    const watched = {
      child: this.#task,
      pidFile: this.#pidFile,
      timeoutMs,
      ...(signal === undefined ? {} : { signal }),
    };
    return await waitReady(target.image.ready, watched);
  }

  /** Kills what runs in it and removes it with its snapshot. Safe to call twice. */
  async remove(): Promise<void> {
    if (this.#removed) return;
    this.#removed = true;
    const { node } = this.#setup;
    const task = this.#task;
    if (task !== undefined && task.exitCode === null && task.signalCode === null) {
      const ended = new Promise((resolve) => task.once('exit', resolve));
      await execute(ctr(node, 'task', 'kill', '--signal', 'SIGKILL', this.name), { allowFailure: true });
      await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 10_000).unref())]);
      task.kill('SIGKILL');
    }
    await execute(ctr(node, 'task', 'rm', '--force', this.name), { allowFailure: true });
    await execute(ctr(node, 'container', 'rm', this.name), { allowFailure: true });
    await rm(this.#pidFile, { force: true });
  }
}
