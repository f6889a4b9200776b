// Builds the EROFS metadata of one image segment in a process of its own, so that neither the event loop nor the memory
// of the daemon feels it. Called by dedupd before the first mount of a chain. One such process may wait for the next
// build: starting it takes longer than most builds.
import { type ChildProcess, fork } from 'node:child_process';
import { rmSync } from 'node:fs';
import type { Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import PQueue from 'p-queue';
import { DedupError } from '../../errors.ts';
import { MiB } from '../../units.ts';
import { temporaryFile } from './atomic-file.ts';
import type { ImageBuildAnswer, ImageBuildRequest, ImageBuildResult } from './build-protocol.ts';

export type { ImageBuildLayer, ImageBuildRequest, ImageBuildResult, SegmentBelow } from './build-protocol.ts';

/** Four million entries fit; a layer that needs more is refused instead of filling the node. */
const MAX_HEAP_MIB = 2048;
const DEADLINE_MS = 120_000;
/** Each build takes a core and about 170 MiB at 100,000 entries; more at once would only starve the serving loop. */
const builds = new PQueue({ concurrency: 2 });

/** How long a process waits for the next build, and how large it may have become. */
const IDLE_MS = 10_000;
const IDLE_MAX_BYTES = 160 * MiB;

const WORKER = fileURLToPath(
  new URL(import.meta.url.endsWith('.ts') ? './build-worker.ts' : './build-worker.js', import.meta.url),
);

/**
 * Merges the layers, writes the metadata to `request.output` (temporary file, fsync, rename) and returns its sizes.
 * Two run at a time, others wait. Errors: IMAGE_INVALID, INDEX_INVALID, STORE_FULL, DEADLINE, CANCELLED through `signal`, INTERNAL when the process dies.
 */
export function buildImage(request: ImageBuildRequest, signal?: AbortSignal): Promise<ImageBuildResult> {
  return builds.add(() => buildInChild(request, signal));
}

/** The process that waits for the next build, if any. */
let waiting: { readonly child: ChildProcess; readonly release: () => void } | undefined;

/** Starts the process of the next build now: for a caller who will need it in a moment. */
export function prepareBuilder(): void {
  if (waiting === undefined) keep(startChild());
}

function startChild(): ChildProcess {
  const child = fork(WORKER, [], {
    // typed arrays travel as they are
    serialization: 'advanced',
    execArgv: [`--max-old-space-size=${MAX_HEAP_MIB}`, '--disable-warning=ExperimentalWarning'],
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
  });
  child.stderr?.setEncoding('utf8');
  // Whoever waits for it listens as well; one that nobody waits for may fail to start.
  child.on('error', () => undefined);
  return child;
}

/** Lets a process wait for the next build without keeping this one alive; ends it after a while. */
function keep(child: ChildProcess): void {
  if (waiting !== undefined || child.pid === undefined) {
    end(child);
    return;
  }
  setReferenced(child, false);
  const ended = (): void => {
    clearTimeout(timer);
    child.off('close', ended).off('error', ended);
    if (waiting?.child === child) waiting = undefined;
  };
  const timer = setTimeout(() => {
    ended();
    end(child);
  }, IDLE_MS).unref();
  child.once('close', ended).once('error', ended);
  waiting = { child, release: ended };
}

/** Whether this process waits for a child before it may end. */
function setReferenced(child: ChildProcess, referenced: boolean): void {
  const method = referenced ? 'ref' : 'unref';
  child[method]();
  child.channel?.[method]();
  (child.stderr as Socket | null)?.[method]();
}

/** It ends by itself once nobody talks to it. */
function end(child: ChildProcess): void {
  if (child.connected) child.disconnect();
}

function takeChild(): ChildProcess {
  const taken = waiting;
  if (taken === undefined) return startChild();
  taken.release();
  if (!taken.child.connected) return startChild();
  setReferenced(taken.child, true);
  return taken.child;
}

function buildInChild(request: ImageBuildRequest, signal?: AbortSignal): Promise<ImageBuildResult> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted === true) {
      reject(new DedupError('CANCELLED', `building ${request.output} was cancelled`));
      return;
    }
    const child = takeChild();
    let stderr = '';
    let failure: DedupError | undefined;
    const stop = (error: DedupError): void => {
      failure ??= error;
      child.kill('SIGKILL');
    };
    const deadline = setTimeout(
      () => stop(new DedupError('DEADLINE', `building ${request.output} took more than ${DEADLINE_MS} ms`)),
      DEADLINE_MS,
    );
    const cancel = (): void => stop(new DedupError('CANCELLED', `building ${request.output} was cancelled`));
    signal?.addEventListener('abort', cancel, { once: true });
    const settle = (outcome: ImageBuildResult | DedupError): void => {
      clearTimeout(deadline);
      signal?.removeEventListener('abort', cancel);
      child.off('message', onMessage).off('error', onError).off('close', onClose);
      child.stderr?.off('data', onStderr);
      if (outcome instanceof Error) reject(outcome);
      else resolve(outcome);
    };
    const onStderr = (text: string): void => {
      stderr = (stderr + text).slice(-2000);
    };
    const onMessage = (message: unknown): void => {
      // One that was told to stop ends, whatever it says meanwhile.
      if (failure !== undefined) return;
      const answer = message as ImageBuildAnswer;
      if ('result' in answer) settle(answer.result);
      else settle(new DedupError(answer.code, answer.message, { details: answer.details }));
      if ('result' in answer && answer.result.peakBytes <= IDLE_MAX_BYTES) keep(child);
      else end(child);
    };
    const ended = (why: string): void => {
      if (child.pid !== undefined) rmSync(temporaryFile(request.output, child.pid), { force: true });
      settle(failure ?? new DedupError('INTERNAL', `building ${request.output}: ${why}`, { details: { stderr } }));
    };
    const onError = (error: Error): void => {
      failure ??= new DedupError('INTERNAL', `building ${request.output}: ${error.message}`, { cause: error });
      if (child.pid === undefined) ended('its process did not start');
    };
    const onClose = (code: number | null, by: string | null): void =>
      ended(`its process ended with ${by ?? `exit code ${code}`}`);
    child.stderr?.on('data', onStderr);
    child.on('message', onMessage).on('error', onError).on('close', onClose);
    if (child.pid === undefined) return; // it has no channel; its error says why
    child.send(request, (error) => {
      if (error !== null)
        stop(new DedupError('INTERNAL', `building ${request.output}: ${error.message}`, { cause: error }));
    });
  });
}
