// Builds the EROFS metadata of one image segment in a process of its own, so that neither the event loop nor the memory
// of the daemon feels it. Called by dedupd before the first mount of a chain.
import { fork } from 'node:child_process';
import { rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import PQueue from 'p-queue';
import { DedupError } from '../../errors.ts';
import { temporaryFile } from './atomic-file.ts';
import type { ImageBuildAnswer, ImageBuildRequest, ImageBuildResult } from './build-protocol.ts';

export type { ImageBuildLayer, ImageBuildRequest, ImageBuildResult, SegmentBelow } from './build-protocol.ts';

/** Four million entries fit; a layer that needs more is refused instead of filling the node. */
const MAX_HEAP_MIB = 2048;
const DEADLINE_MS = 120_000;
/** Each build takes a core and about 170 MiB at 100,000 entries; more at once would only starve the serving loop. */
const builds = new PQueue({ concurrency: 2 });

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

function buildInChild(request: ImageBuildRequest, signal?: AbortSignal): Promise<ImageBuildResult> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted === true) {
      reject(new DedupError('CANCELLED', `building ${request.output} was cancelled`));
      return;
    }
    const child = fork(WORKER, [], {
      // typed arrays travel as they are
      serialization: 'advanced',
      execArgv: [`--max-old-space-size=${MAX_HEAP_MIB}`, '--disable-warning=ExperimentalWarning'],
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    });
    let stderr = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr = (stderr + text).slice(-2000);
    });
    let failure: DedupError | undefined;
    let result: ImageBuildResult | undefined;
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
    child.once('message', (message) => {
      const answer = message as ImageBuildAnswer;
      if ('result' in answer) result = answer.result;
      else failure ??= new DedupError(answer.code, answer.message, { details: answer.details });
    });
    const settle = (why: string): void => {
      clearTimeout(deadline);
      signal?.removeEventListener('abort', cancel);
      if (child.pid !== undefined) rmSync(temporaryFile(request.output, child.pid), { force: true });
      if (failure !== undefined) reject(failure);
      else if (result !== undefined) resolve(result);
      else reject(new DedupError('INTERNAL', `building ${request.output}: ${why}`, { details: { stderr } }));
    };
    child.once('error', (error) => {
      failure ??= new DedupError('INTERNAL', `building ${request.output}: ${error.message}`, { cause: error });
      if (child.pid === undefined) settle('its process did not start');
    });
    child.once('close', (code, by) => settle(`its process ended with ${by ?? `exit code ${code}`}`));
    child.send(request, (error) => {
      if (error !== null)
        stop(new DedupError('INTERNAL', `building ${request.output}: ${error.message}`, { cause: error }));
    });
  });
}
